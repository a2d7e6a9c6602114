"""Downloads get their name only when they are complete and right; a server on this machine does all wrong."""

from __future__ import annotations

import os
import shutil
import threading
import time
import types
from email.utils import formatdate

import pytest
from hub.faulty_server import CONTENT, HALF, PAGE, SHA256, serving

from finetune.errors import FinetuneError, WeightsMissing
from finetune.hub import download as fetching
from finetune.hub.download import fetch
from torch_utils.files import lock_path

SIZE = len(CONTENT)
OTHER = CONTENT[::-1]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Lock files go to a cache of its own."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("FINETUNE_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "CHUNK", 4096)
    monkeypatch.setattr(fetching, "TIMEOUT_SEC", (5, 0.2))
    with serving() as running:
        yield running


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(fetching, "sleep", found.append)
    return found


@pytest.fixture
def get(server, pauses, tmp_path):
    """Fetch `/a` once the server knows what to do at each request."""

    def run(*plan, **expected):
        server.plan["a"] = list(plan) or ["file"]
        return fetch(f"{server.url}/a", tmp_path / "a.pkl", **expected)

    return run


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def refused(get, words, *plan, **expected):
    with pytest.raises(FinetuneError, match=words) as caught:
        get(*plan, **expected)
    assert "\n" not in caught.value.what and caught.value.exit_code == 2 and caught.value.hint
    return caught.value


def test_fetch_downloads(get, tmp_path):
    seen = []
    path = get(sha256=SHA256, size=SIZE, progress=lambda *args: seen.append(args))
    assert path.read_bytes() == CONTENT and left(tmp_path) == ["a.pkl"]
    assert seen[0] == (4096, SIZE) and seen[-1] == (SIZE, SIZE)


def test_fetch_hash_prefix_and_unknown_size(get):
    seen = []
    get("unknown-size", sha256=SHA256[:8].upper(), progress=lambda *args: seen.append(args))
    assert seen[-1] == (SIZE, None)


def test_fetch_verifies_existing_file(server, get, tmp_path):
    dest = tmp_path / "a.pkl"
    dest.write_bytes(CONTENT)
    assert get(sha256=SHA256) == dest
    dest.write_bytes(b"other")
    refused(get, f"{dest} has SHA-256", sha256=SHA256)
    assert dest.read_bytes() == b"other" and server.requests == []


# What fails for good: one request, one line, nothing left.
@pytest.mark.parametrize(
    "plan, expected, words",
    [
        (404, {}, "returned 404 Not Found"),
        ((302, {"Location": "/a"}), {}, "too many redirects"),
        (PAGE, {}, "not a network but a web page: 'Model not found'"),
        (PAGE, {"size": SIZE, "sha256": SHA256}, "a web page: 'Model not found'"),
        (b'{"requestStatus": {"statusCode": "NOT_FOUND"}}', {}, 'JSON: .*"NOT_FOUND"'),
        (b"moved to another place\n", {}, "text: 'moved to another place'"),
        (b"", {}, "not a network but an empty file"),
        (b"", {"size": SIZE, "sha256": SHA256}, "not a network but an empty file"),
        ("empty-unknown-size", {}, "not a network but an empty file"),
        ("empty-chunked", {"sha256": SHA256}, "not a network but an empty file"),
        ((206, {"Content-Length": "0", "Content-Range": "bytes 0-0/0"}), {}, "an empty file|broke"),
        ("file", {"sha256": "0" * 64}, f"has SHA-256 {SHA256} instead of 0000"),
        ("file", {"sha256": "abc"}, "instead of abc"),
        ("file", {"size": 10}, f"has {SIZE:,} bytes instead of 10"),
        ("unknown-size", {"size": 10}, "more than the 10 bytes expected"),
        ("unknown-size", {"size": SIZE + 1}, f"instead of {SIZE + 1:,}"),
        ("too-short", {"size": SIZE}, f"has {HALF:,} bytes instead of {SIZE:,}"),
        ("too-short", {"sha256": SHA256}, f"has SHA-256 .* instead of {SHA256}"),
    ],
    ids=str,
)
def test_fetch_refuses_wrong_content(server, get, pauses, tmp_path, plan, expected, words):
    error = refused(get, words, plan, **expected)
    assert f"{server.url}/a" in error.what and "add-file" in error.hint
    assert left(tmp_path) == [] and pauses == []


# What may work the next time, until it has failed too often.
@pytest.mark.parametrize(
    "thing, words",
    [
        (503, "returned 503"),
        (
            "half-unnamed",
            f"broke after {HALF // 4096 * 4096:,}|broke after {HALF:,} of {SIZE:,} bytes",
        ),
        ("unknown-size-half", f"the connection broke after {HALF:,} bytes"),
        ("too-short", f"the connection broke after {HALF:,} bytes, in the middle of a pickle"),
    ],
)
def test_fetch_gives_up_after_repeated_failures(get, pauses, tmp_path, thing, words):
    refused(get, words, thing)
    assert [round(pause - 2**i, 3) <= 2**i / 4 for i, pause in enumerate(pauses)] == [True] * 3
    assert pauses == sorted(pauses) and len(pauses) == 3
    assert not (tmp_path / "a.pkl").exists()


@pytest.mark.parametrize("fault", [503, "half", "stall", "reset", "half-unnamed"])
@pytest.mark.parametrize("expected", [{}, {"sha256": SHA256}], ids=["unknown", "known"])
def test_fetch_retries_transient_failure(server, get, pauses, tmp_path, fault, expected):
    assert get(fault, "file", **expected).read_bytes() == CONTENT
    assert len(pauses) == 1 and left(tmp_path) == ["a.pkl"]
    second = server.requests[1][1]
    # Only bytes of a version that has a name, or of a file whose hash is known, may be gone on with.
    assert ("Range" in second) == (fault in ("half", "stall", "reset") or (fault != 503 and bool(expected)))
    assert second.get("If-Range") == ('"1"' if fault in ("half", "stall", "reset") else None)


def test_fetch_resumes_after_redirect(server, get, pauses):
    server.plan["moved"] = ["half", "file"]
    assert get("redirect", sha256=SHA256).read_bytes() == CONTENT
    assert [name for name, _ in server.requests] == ["a", "moved"] * 2
    assert "Range" in server.requests[3][1] and len(pauses) == 1


def test_fetch_accepts_torch_save_file(server, pauses, tmp_path):
    server.files["t"] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9" + bytes(9000)
    assert fetch(f"{server.url}/t", tmp_path / "t").stat().st_size == 9009 and pauses == []


def test_fetch_continues_while_bytes_arrive(get, pauses):
    assert get(*["half"] * 6, "file").read_bytes() == CONTENT
    assert len(pauses) == 6 and max(pauses) < 2


def test_fetch_restarts_without_range_support(get):
    assert get("half", "no-range").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "answer",
    [
        (206, {"Content-Range": f"bytes 0-3/{SIZE}"}),
        (206, {"Content-Range": f"bytes {HALF + 9}-{SIZE - 1}/{SIZE}"}),
        (206, {"Content-Range": f"bytes {HALF}-"}),
        (206, {}),
        (416, {"Content-Range": "bytes */5"}),
        (416, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("expected", [{}, {"sha256": SHA256}], ids=["unknown", "known"])
def test_fetch_restarts_after_wrong_range(server, get, pauses, answer, expected):
    assert get("half", answer, "file", **expected).read_bytes() == CONTENT
    assert ["Range" in headers for _, headers in server.requests] == [False, True, False]
    assert len(pauses) == 2 and pauses[1] == 0


def test_fetch_resumes_earlier_part(server, get, tmp_path):
    refused(get, "returned 404", "half", 404)
    assert left(tmp_path) == ["a.pkl.part", "a.pkl.part.json"]
    assert get("file").read_bytes() == CONTENT
    assert int(server.requests[-1][1]["Range"][6:-1]) >= HALF - 4096


@pytest.mark.parametrize("note", ["", "[]", "1", '{"url": 1}'])
def test_fetch_restarts_part_with_damaged_note(server, get, tmp_path, note):
    refused(get, "returned 404", "half", 404)
    (tmp_path / "a.pkl.part.json").write_text(note)
    assert get("file").read_bytes() == CONTENT
    assert "Range" not in server.requests[-1][1]


@pytest.mark.parametrize("other", ["other", "other-unasked"])
def test_fetch_restarts_changed_file(get, pauses, tmp_path, other):
    assert get("half", other, "other").read_bytes() == OTHER
    (tmp_path / "a.pkl").unlink()
    refused(get, f"instead of {SHA256}", "half", other, "other", size=SIZE, sha256=SHA256)
    assert left(tmp_path) == []


def test_fetch_restarts_mismatched_parts(server, get, tmp_path):
    """Another address of the same file: its rest would do, but it is another file after all."""
    server.plan["b"] = ["other", "file"]
    server.plan["a"] = ["half-unnamed", 404]
    urls = [f"{server.url}/a", f"{server.url}/b"]
    messages = []
    path = fetch(urls, tmp_path / "a.pkl", sha256=SHA256, on_message=messages.append)
    assert path.read_bytes() == CONTENT
    assert "returned 404 Not Found. Trying another URL." in messages[1]
    assert "are of different files" in messages[2]
    assert [("Range" in headers) for name, headers in server.requests if name == "b"] == [True, False]


def test_fetch_reports_failures_of_all_urls(server, pauses, tmp_path):
    server.plan |= {"a": [404], "b": [PAGE]}
    with pytest.raises(FinetuneError) as caught:
        fetch([f"{server.url}/a", f"{server.url}/b"], tmp_path / "a.pkl")
    assert "returned 404" in caught.value.what and "Model not found" in caught.value.what
    assert "\n" not in caught.value.what and left(tmp_path) == []


def test_fetch_waits_for_retry_after(get, pauses):
    soon = formatdate(time.time() + 30, usegmt=True)
    get((429, {"Retry-After": "7"}), (429, {"Retry-After": soon}), (429, {"Retry-After": "?"}), "file")
    assert pauses[0] == 7 and 25 < pauses[1] <= 30 and 4 <= pauses[2] <= 5


def test_fetch_refuses_long_retry_after(get, pauses):
    refused(get, "429 Too Many Requests, and asks to retry in 3,600 s", (429, {"Retry-After": "3600"}))
    assert pauses == []


def test_fetch_without_server(pauses, tmp_path, monkeypatch):
    monkeypatch.delenv("FINETUNE_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(FinetuneError) as caught:
        fetch("http://127.0.0.1:9/a", tmp_path / "a")
    assert caught.value.what == "http://127.0.0.1:9/a: download failed (Connection refused)"
    assert left(tmp_path) == []


def test_fetch_uses_proxy(server, pauses, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", server.url)
    server.plan["http://models.invalid/a"] = ["file"]
    assert fetch("http://models.invalid/a", tmp_path / "a").read_bytes() == CONTENT
    assert server.requests[0][1]["Host"] == "models.invalid"


def test_fetch_checks_free_space(get, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    error = refused(get, f"Not enough space in {tmp_path} for http.*/a: 1 MiB needed, 0 MiB free.", "file")
    assert "FINETUNE_CACHE" in error.hint
    assert left(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_fetch_full_disk(get, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.Part, "begin", lambda part, *args: part.path.symlink_to("/dev/full"))
    refused(get, f"No space left in {tmp_path} after 0 bytes", "file")
    assert left(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_fetch_read_only_folder(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FinetuneError, match="cannot be written"):
        fetch(f"{server.url}/a", tmp_path / "file" / "a")


def test_fetch_offline_refuses(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="forbids") as error:
        fetch(f"{server.url}/a", tmp_path / "a")
    assert f"{server.url}/a" in str(error.value)
    (tmp_path / "a").write_bytes(CONTENT)
    assert fetch(f"{server.url}/a", tmp_path / "a", sha256=SHA256).is_file()
    assert server.requests == []


def test_fetch_concurrent_processes_download_once(server, tmp_path):
    """Threads that opened the lock file separately exclude each other like processes."""
    server.plan["a"] = ["slowly"]
    messages = []

    def run():
        fetch(f"{server.url}/a", tmp_path / "a", on_message=messages.append)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1 and left(tmp_path) == ["a"]
    assert messages == [fetching.WAITING] * 2


def test_fetch_ignores_lock_of_dead_process(get, tmp_path):
    path = lock_path(tmp_path / "a.pkl")
    path.parent.mkdir(parents=True)
    path.write_text("12345")
    assert get().read_bytes() == CONTENT
    assert left(tmp_path) == ["a.pkl"]


def test_fetch_refuses_redirect_to_http(server, tmp_path, monkeypatch):
    import requests

    real = requests.Session.get

    def get(session, url, **options):
        response = real(session, f"{server.url}/a", **options)
        response.history = [types.SimpleNamespace(url=url)]
        return response

    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(FinetuneError, match=r"/a: redirects to http://.*not encrypted"):
        fetch("https://models.invalid/a", tmp_path / "a")
    assert fetch("https://models.invalid/a", tmp_path / "a", sha256=SHA256).is_file()
