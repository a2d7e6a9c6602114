"""Downloads get their name only when they are complete and right; a local server plays the internet."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune.checkpoint.fetch import CHUNK, fetch
from finetune.errors import FinetuneError, WeightsMissing

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unknown-size":
            self.send_header(
                "Content-Length", str(len(CONTENT) * 2 if self.path == "/short" else len(CONTENT))
            )
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("FINETUNE_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.requests = 0
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_download(url, tmp_path):
    seen = []
    dest = tmp_path / "sub" / "a.pkl"
    assert (
        fetch(f"{url}/a", dest, sha256=SHA256, size=len(CONTENT), progress=lambda *args: seen.append(args))
        == dest
    )
    assert dest.read_bytes() == CONTENT and left(tmp_path) == ["a.pkl"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen[0] == (CHUNK, len(CONTENT))


def test_the_beginning_of_a_hash_and_an_unknown_size(url, tmp_path):
    seen = []
    fetch(
        f"{url}/unknown-size",
        tmp_path / "a",
        sha256_prefix=SHA256[:8].upper(),
        progress=lambda *args: seen.append(args),
    )
    assert seen[-1] == (len(CONTENT), None)


def test_a_file_that_is_there_is_verified_and_kept(server, url, tmp_path):
    dest = tmp_path / "a"
    dest.write_bytes(CONTENT)
    assert fetch(f"{url}/a", dest, sha256=SHA256) == dest
    dest.write_bytes(b"other")
    with pytest.raises(FinetuneError, match="SHA-256") as error:
        fetch(f"{url}/a", dest, sha256=SHA256)
    assert str(dest) in str(error.value) and dest.read_bytes() == b"other"
    assert server.requests == 0


@pytest.mark.parametrize(
    "path, expected, words",
    [
        ("missing", {}, "answers 404"),
        ("a", {"sha256": "0" * 64}, "instead of 0000"),
        ("a", {"sha256_prefix": "abc"}, "instead of abc"),
        ("a", {"size": 10}, "more than the 10 bytes"),
        ("a", {"size": 10**8}, "instead of 100,000,000"),
        ("short", {}, "broke off|cannot be downloaded"),
    ],
)
def test_what_is_wrong_leaves_nothing_behind(url, tmp_path, path, expected, words):
    with pytest.raises(FinetuneError, match=words) as error:
        fetch(f"{url}/{path}", tmp_path / "a.pkl", **expected)
    assert f"{url}/{path}" in str(error.value)
    assert left(tmp_path) == []


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.delenv("FINETUNE_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(FinetuneError, match="cannot be downloaded"):
        fetch("http://127.0.0.1:9/a", tmp_path / "a")
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_written(url, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FinetuneError, match="cannot be written"):
        fetch(f"{url}/a", tmp_path / "file" / "a")


def test_offline(server, url, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_OFFLINE", "1")
    with pytest.raises(WeightsMissing, match="forbids") as error:
        fetch(f"{url}/a", tmp_path / "a")
    assert f"{url}/a" in str(error.value)
    (tmp_path / "a").write_bytes(CONTENT)
    assert fetch(f"{url}/a", tmp_path / "a", sha256=SHA256).is_file()
    assert server.requests == 0
