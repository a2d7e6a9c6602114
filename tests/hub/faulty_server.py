"""A web server on this machine that does one thing wrong, the same thing or another one at each request."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = b"\x80\x04" + bytes(range(256)) * 400 + b"."
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
PAGE = b"<!DOCTYPE html><html><head><title>Model not found</title></head><body>Sorry.</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Answers `/NAME…` with the next thing that the server's `plan[NAME]` says, the last one ever after.

    A thing is a word (see the methods `do_…`), a number (that status), or a pair of a number and headers.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.strip("/").partition("?")[0]
        self.content = self.server.files.get(name, CONTENT)
        with self.server.lock:
            plan = self.server.plan.get(name, ["file"])
            thing = plan.pop(0) if len(plan) > 1 else plan[0]
            self.server.requests.append((name, dict(self.headers)))
        if isinstance(thing, bytes):
            self.answer(200, thing)
        elif isinstance(thing, str):
            getattr(self, f"send_{thing.replace('-', '_')}")()
        else:
            status, headers = thing if isinstance(thing, tuple) else (thing, {})
            self.answer(status, b"busy", **headers)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def start(self, content=None, etag='"1"'):
        """The whole file or, where it is asked for, the rest of it; what is left to be sent."""
        content = self.content if content is None else content
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and self.headers.get("If-Range", etag) == etag:
            first = int(match[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            content = content[first:]
        else:
            self.send_response(200)
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def send_file(self):
        self.wfile.write(self.start())

    def send_no_range(self):
        self.answer(200, self.content)

    def send_half(self):
        """Half of what is left, and then nothing more."""
        content = self.start()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def send_half_unnamed(self):
        """Half, of a version that has no name."""
        content = self.start(etag=None)
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def send_stall(self):
        content = self.start()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.server.end.wait(2)
        self.close_connection = True

    def send_reset(self):
        content = self.start()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        time.sleep(0.02)  # so that the half arrives
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def send_other(self):
        """Another version of the file, of the same length."""
        self.wfile.write(self.start(self.content[::-1], etag='"2"'))

    def send_other_unasked(self):
        """The rest of another version, as a server does that knows no If-Range."""
        del self.headers["If-Range"]
        self.send_other()

    def send_unknown_size(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)
        self.close_connection = True

    def send_unknown_size_half(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content[:HALF])
        self.close_connection = True

    def send_empty_unknown_size(self):
        self.send_response(200)
        self.end_headers()
        self.close_connection = True

    def send_empty_chunked(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"0\r\n\r\n")

    def send_too_short(self):
        """Half of the file, as if it were all."""
        self.answer(200, self.content[:HALF])

    def send_redirect(self):
        """Send on to the file, whose name is asked for as `moved`."""
        self.answer(302, b"", Location=f"/moved?path={self.path.strip('/')}")

    def send_slowly(self):
        time.sleep(0.1)
        self.send_file()

    def handle(self):
        with contextlib.suppress(ConnectionError, OSError, ValueError):
            super().handle()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(files=None):
    """A server of `files` (name -> bytes, CONTENT for others) that follows its `plan`, empty at first.

    `requests` lists (name, headers) of what was asked for.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.plan, server.files, server.requests = {}, files or {}, []
        server.lock, server.end = threading.Lock(), threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.end.set()
            server.shutdown()
            thread.join()
