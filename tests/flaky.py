"""A server between a client and a bucket that fails now and then, as those of real buckets do."""

from __future__ import annotations

import collections
import contextlib
import http.client
import http.server
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

_PER_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}


class Flaky:
    """What the server does, and what it has been asked.

    Attributes:
      address: `http://host:port` of the server.
      failed: how many requests were not answered by the bucket, by how: `503`, `reset`.
      asked: how often each request came: method and path, with the query.
    """

    def __init__(self, bucket: str, every: int) -> None:
        """Serves nothing yet.

        Args:
          bucket: `http://host:port` of what answers the other requests; empty: nothing does, all are forbidden.
          every: of so many requests one fails; 0: none.
        """
        self.address = ""
        self.failed: collections.Counter[str] = collections.Counter()
        self.asked: collections.Counter[tuple[str, str]] = collections.Counter()
        self._bucket, self._every = urllib.parse.urlsplit(bucket).netloc, every
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Flaky]:
        """While the context is open."""
        flaky = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                flaky.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def shutdown_request(self, request: Any) -> None:
                """Does not say goodbye first."""
                self.close_request(request)

            def handle_error(self, *_: object) -> None:
                """A client may hang up."""

        with Server(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.address = f"http://127.0.0.1:{server.server_port}"
            try:
                yield self
            finally:
                server.shutdown()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """One request: 503, a connection that is reset, or what the bucket says."""
        content = self._content(handler)
        with self._lock:
            self.asked[handler.command, handler.path] += 1
            number = sum(self.asked.values())
            how = ("503", "reset")[number // self._every % 2] if self._every and number % self._every == 0 else ""
            if how:
                self.failed[how] += 1
        if how == "reset":
            # Without lingering, closing sends a reset.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
        elif how:
            self._send(handler, 503, [], b"")
        elif not self._bucket:
            self._send(handler, 403, [], b'{"error": {"code": 403, "message": "tester may not do that"}}')
        else:
            self._pass_on(handler, content)

    def _pass_on(self, handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        with contextlib.closing(http.client.HTTPConnection(self._bucket, timeout=60)) as bucket:
            headers = {name: value for name, value in handler.headers.items() if name.lower() not in _PER_HOP}
            bucket.request(handler.command, handler.path, content, headers)
            answer = bucket.getresponse()
            read = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _PER_HOP]
            length = answer.getheader("Content-Length") if handler.command == "HEAD" else None
        self._send(handler, answer.status, kept, read, length)

    @staticmethod
    def _send(
        handler: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: str | None = None,
    ) -> None:
        handler.send_response_only(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", length or str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    @staticmethod
    def _content(handler: http.server.BaseHTTPRequestHandler) -> bytes:
        if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            chunks.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(chunks)
