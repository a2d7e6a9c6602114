"""A stand-in for the Hugging Face Hub on this machine: repositories in memory, and the requests it got."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.begin()
        if parts[:2] == ["api", "models"]:
            repo = self.server.repos.get("/".join(parts[2:4]))
            if repo is None:
                return self.fail(404, "RepoNotFound")
            if parts[4:5] == ["tree"]:
                return self.answer(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                        for name, content in repo["files"].items()
                    ]
                )
            files = [{"rfilename": name} for name in repo["files"]]
            info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "private": repo["private"], "siblings": files}
            return self.answer({**info, "tags": [], "downloads": 0, "likes": 0})
        repo, name = self.server.repos.get("/".join(parts[:2])), "/".join(parts[4:])
        if repo is None or name not in repo["files"]:
            return self.fail(404, "EntryNotFound" if repo else "RepoNotFound")
        content = repo["files"][name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def do_POST(self):
        parts = self.begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts[:3] == ["api", "repos", "create"]:
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            private = given.get("private", given.get("visibility") == "private")
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, {"private": private, "files": {}})
            return self.answer({"url": f"{self.server.url}/{name}", "name": name}, status)
        if parts[1:2] == ["validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if "preupload" in parts:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer({"files": modes})
        if "commit" in parts:
            repo = self.server.repos["/".join(parts[2:4])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self.fail(404, "unknown")

    def begin(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        return path.strip("/").split("/")

    def answer(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status, code):
        self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class HubServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
