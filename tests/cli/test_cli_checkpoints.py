"""`finetune checkpoints`, against a catalog and a server of our own."""

from __future__ import annotations

import hashlib
import json

import pytest
from click.testing import CliRunner
from fake_catalog import LICENSE, served
from hub.faulty_server import PAGE

from finetune.cli import cli
from finetune.hub import catalog, store


def call(*arguments):
    return CliRunner().invoke(cli, ["checkpoints", *map(str, arguments)])


def done(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(words, *arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and words in result.stderr.replace("\n", " "), result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def content(golden_dir):
    return (golden_dir / "stylegan2-32.pkl").read_bytes()


@pytest.fixture
def server(tmp_path, monkeypatch, content):
    monkeypatch.setenv("COLUMNS", "200")
    with served(tmp_path, {"ours": content}, monkeypatch) as running:
        yield running


class TestTables:
    def test_list_command(self, server):
        table = done("list").stdout
        assert "ours" in table and "Some License 1.0" in table and "ffhq-256-stylegan2" in table
        assert "stylegan1" not in table and "inception" not in table
        assert "stylegan1" in done("list", "--all").stdout

    def test_list_here(self, server):
        assert json.loads(done("list", "--here", "--json").stdout) == []
        done("fetch", "ours")
        (entry,) = json.loads(done("list", "--here", "--json").stdout)
        assert entry["id"] == "ours" and entry["path"] == done("where", "ours").stdout.strip()
        assert "yes" in next(line for line in done("list").stdout.splitlines() if line.startswith("ours"))

    def test_search_command(self, server):
        found = json.loads(done("search", "--json", "ffhq", "stylegan3-r").stdout)
        assert len(found) > 1 and all("r-ffhq" in entry["id"] for entry in found)
        nothing = done("search", "stylegan3-r", "ponies").stdout
        assert "No entry matches stylegan3-r and ponies" in nothing

    def test_show_command(self, server):
        text = done("show", "stylegan2-ffhq-config-f").stdout
        for words in (
            "resolution    1024 pixels",
            "trained with  gamma 10",
            "license ",
            "sha256 ",
            "address  ",
        ):
            assert words in text, words
        assert json.loads(done("show", "ours", "--json").stdout)["licence"]["name"] == LICENSE.name
        refused("Did you mean ffhq-256-stylegan2", "show", "ffhq-256-stylgan2")


class TestFetching:
    def test_fetch_shows_license_once_and_keeps_it(self, server, content, tmp_path, monkeypatch):
        monkeypatch.setenv("FINETUNE_OPS", "ref")  # else kernels are built for the empty cache
        first = done("fetch", "ours")
        assert f"License: {LICENSE}" in first.stderr
        path = first.stdout.strip()
        assert "License" not in done("fetch", "ours").stderr and len(server.requests) == 1
        command = ["export", "--network", "ours", "--format", "stylegan-pkl", "--out", tmp_path / "out.pkl"]
        exported = CliRunner().invoke(cli, [str(word) for word in command])
        assert exported.exit_code == 0, exported.output
        for network in (path, tmp_path / "out.pkl"):
            result = CliRunner().invoke(cli, ["inspect", str(network), "--json"])
            assert LICENSE.name in result.stdout, network

    def test_fetch_checks_all_names_first(self, server):
        refused("nothing-like-it is not in the catalog", "fetch", "ours", "nothing-like-it")
        assert server.requests == []

    def test_fetch_quotes_error_page(self, server):
        server.plan["ours.pkl"] = [PAGE]
        refused("not a network but", "fetch", "ours")
        assert not store.place_of(catalog.get("ours")).exists()

    def test_fetch_keeps_hash_of_first_download(self, server):
        path = store.place_of(catalog.get("ours"))
        done("fetch", "ours")
        path.unlink()
        server.plan["ours.pkl"] = ["other"]
        refused("instead of", "fetch", "ours")
        assert not path.exists()
        server.plan["ours.pkl"] = ["file"]
        done("fetch", "ours")

    def test_fetch_offline(self, server, monkeypatch):
        refused("is not on this machine", "fetch", "--offline", "ours")
        monkeypatch.setenv("FINETUNE_OFFLINE", "1")
        refused("is not on this machine", "fetch", "ours")
        assert server.requests == []

    def test_fetch_unknown_url(self, server, content):
        server.files["private.pkl"] = content
        result = done("fetch", f"{server.url}/private.pkl")
        assert "not stated" in result.stderr and result.stdout.strip().endswith("-private.pkl")


class TestVerify:
    def test_verify_ok_changed_missing(self, server):
        assert "has no checkpoints" in done("verify").stdout
        assert "Delete" not in refused("fetch` downloads missing files", "verify", "ours").stderr
        done("fetch", "ours")
        assert "ok " in done("verify").stdout
        path = store.place_of(catalog.get("ours"))
        path.write_bytes(b"\x80" + path.read_bytes()[1:-1] + b"?")
        result = refused("1 of 1 files", "verify")
        assert "changed  ours" in result.stdout and str(path) in result.stderr
        path.unlink()
        verdict = json.loads(call("verify", "ours", "--json").stdout)[0]
        assert (verdict["state"], verdict["name"]) == ("missing", "ours")

    def test_where_command(self, server):
        assert done("where").stdout.strip() == str(store.folder())
        refused("finetune checkpoints fetch ours", "where", "ours")


class TestAddFile:
    def test_add_file_identifies_by_hash(self, server, content, tmp_path):
        server.state("ours", sha256=hashlib.sha256(content).hexdigest(), sha256_from="a test")
        (tmp_path / "download(1).pkl").write_bytes(content)
        result = done("add-file", tmp_path / "download(1).pkl")
        assert result.stdout.startswith("ours: ") and f"License: {LICENSE}" in result.stdout
        assert done("where", "ours").stdout and server.requests == []
        assert "Fetching" not in done("fetch", "ours").stderr

    def test_add_file_with_name(self, server, content, tmp_path):
        (tmp_path / "x.pkl").write_bytes(content)
        refused("is not recognized Name it with --name", "add-file", tmp_path / "x.pkl")
        done("add-file", tmp_path / "x.pkl", "--name", "ours")

    def test_add_file_refuses_other_file(self, server, content, tmp_path):
        (tmp_path / "x.pkl").write_bytes(content)
        server.state("ours", resolution=1024)
        refused("its resolution is 32 instead of 1024", "add-file", tmp_path / "x.pkl", "--name", "ours")
        (tmp_path / "page.pkl").write_text("<html><title>Sign in</title>")
        refused("Sign in", "add-file", tmp_path / "page.pkl", "--name", "ours")
        refused("is not a file", "add-file", tmp_path / "absent.pkl")
        assert not store.place_of(catalog.get("ours")).exists()

    def test_add_file_with_license(self, server, content, tmp_path):
        (tmp_path / "x.pkl").write_bytes(content)
        refused("Omit the option", "add-file", tmp_path / "x.pkl", "--name", "ours", "--license", "mine")
        server.state("ours", licence=None)
        done("add-file", tmp_path / "x.pkl", "--name", "ours", "--licence", "mine")  # the hidden spelling
        result = CliRunner().invoke(cli, ["inspect", "ours", "--json"])
        assert '"licence": "mine"' in result.stdout


class TestAdd:
    def test_add_from_url(self, server, content, tmp_path):
        server.files["pretty-32.pkl"] = content
        url = f"{server.url}/pretty-32.pkl"
        options = ("--license", "CC0", "--license-page", "https://a.org", "--data", "dots", "--gamma", 0.5)
        entry = json.loads(done("add", url, *options, "--batch", 8).stdout)
        assert entry["id"] == "pretty-32" and entry["architecture"] == "stylegan2"
        assert (entry["resolution"], entry["classes"], entry["size"]) == (32, 0, len(content))
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["published"] == {"trained": {"gamma": 0.5, "batch": 8}}

        mine = tmp_path / "other.json"
        done("add", url, *options, "--alias", "pretty", "--into", mine)
        done("add", url, "--name", "prettier", "--into", mine)
        assert list(catalog.read_catalog(mine)) == ["pretty-32", "prettier"]

    def test_add_completes_known_entry(self, server, content, tmp_path):
        settings = {"finetune": {"gamma": 2}, "trained": {"batch": 8}}
        server.state("ours", dataset="dots", published=settings, resolution=64, inferred=("resolution",))
        url = server.entries["ours"].urls[0].replace("http://", "HTTP:/")  # as typed, or from a path
        options = ("--alias", "short", "--source", "me", "--gamma", 0.5, "--data", "dots")
        options += ("--license", LICENSE.name)
        entry = json.loads(done("add", url, *options).stdout)
        assert (entry["id"], entry["aliases"], entry["sources"]) == ("ours", ["short"], ["a test", "me"])
        assert entry["published"] == {"finetune": {"gamma": 2}, "trained": {"batch": 8, "gamma": 0.5}}
        assert entry["licence"]["page"] == LICENSE.page and entry["dataset"] == "dots"
        assert (entry["resolution"], entry["inferred"], entry["size"]) == (32, [], len(content))
        server.state("ours", classes=3)
        options = ("--license", "CC0", "--data", "cats", "--batch", 16, "--name", "theirs")
        result = refused("Omit what the catalog states", "add", url, *options)
        for words in (
            f"license is {LICENSE} in the catalog, not CC0.",
            "dataset is dots in the catalog, not cats.",
            "batch is 8 in the catalog, not 16.",
            "id is ours in the catalog, not theirs.",
            "classes is 3 in the catalog, not 0.",
        ):
            assert f"ours: {words}" in result.stderr

    def test_add_mistakes(self, server, content, tmp_path):
        refused("not a URL", "add", "ours.pkl")
        refused("Set it with --license", "add", "https://a.org/a.pkl", "--license-page", "https://a.org")
        server.files["again.pkl"] = content
        refused("ffhq256 is a name of", "add", f"{server.url}/again.pkl", "--alias", "ffhq256")
        (tmp_path / "mine-too.json").write_text("{")
        refused("is not JSON", "add", f"{server.url}/again.pkl", "--into", tmp_path / "mine-too.json")
        assert (tmp_path / "mine-too.json").read_text() == "{"
