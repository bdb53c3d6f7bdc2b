"""A small HTTP server on this machine that serves a folder, with ranges and
validators, and scripted faults.

    with FaultServer(folder) as server:
        server.script["train-000001.tar"] = [status(503), drop(after=1000)]   # the first two requests only
        server.always["train-000002.tar"] = stall(after=10)                    # every request

It listens on 127.0.0.1 alone. No answer takes longer than ANSWER_SECONDS, but those of `hold`,
which take HOLD_SECONDS; and it stops by itself after LIFE_SECONDS.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

ANSWER_SECONDS = 15.0
HOLD_SECONDS = 60.0
LIFE_SECONDS = 300.0


class FaultServer(ThreadingHTTPServer):
    """See the module. `requests` contains (name, Range, If-Range) of every request so far."""

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[FaultHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or FaultHandler)
        self.folder = folder
        self.script: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.stopping = threading.Event()
        self.held: list[str] = []  # files whose answer is held back, or was
        self.given_up: list[str] = []  # files of which a client has waited for the end
        self.pause = 0.0  # seconds before every 64 kB, so that a download can be met on its way

    @property
    def url(self) -> str:
        """URL of the folder, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, name: str) -> int:
        """Requests for a file so far."""
        return sum(request[0] == name for request in self.requests)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self._life = threading.Timer(LIFE_SECONDS, self.stop)
        self._life.daemon = True
        self._life.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._life.cancel()
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect, which is part of the tests."""


class FaultHandler(BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"
    timeout = ANSWER_SECONDS

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path.lstrip("/"))
        self.server.requests.append(
            (name, self.headers.get("Range", ""), self.headers.get("If-Range", ""))
        )
        self.close_connection = True
        path = self.server.folder / name
        if ".." in name or not path.is_file():
            status(404)(self, b"")
            return
        script = self.server.script.get(name)
        fault = script.pop(0) if script else self.server.always.get(name, serve)
        fault(self, path.read_bytes())

    def head(self, code: int, headers: dict[str, object]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def push(self, data: bytes) -> None:
        for start in range(0, len(data), 65536):
            if self.server.pause and self.server.stopping.wait(self.server.pause):
                return
            self.wfile.write(data[start : start + 65536])
        self.wfile.flush()

    def wait(self) -> None:
        self.server.stopping.wait(ANSWER_SECONDS)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass


Fault = Callable[[FaultHandler, bytes], None]


def etag(data: bytes) -> str:
    """The validator of a file."""
    return f'"{hashlib.sha256(data).hexdigest()[:20]}"'


def answer(
    handler: FaultHandler, data: bytes, tag: str | None = None, *, ranges: bool = True
) -> tuple[int, dict, bytes]:
    """Status, headers and body of the right answer."""
    tag = etag(data) if tag is None else tag
    headers: dict[str, object] = {"ETag": tag or None, "Content-Type": "application/x-tar"}
    if tag and handler.headers.get("If-None-Match") == tag:
        return 304, headers, b""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", "")) if ranges else None
    if match is None or handler.headers.get("If-Range", tag) != tag:
        return 200, headers | {"Content-Length": len(data)}, data
    start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
    if start >= len(data):
        return 416, headers | {"Content-Range": f"bytes */{len(data)}", "Content-Length": 0}, b""
    body = data[start:stop]
    where = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
    return 206, headers | {"Content-Range": where, "Content-Length": len(body)}, body


def serve(handler: FaultHandler, data: bytes) -> None:
    """No fault."""
    code, headers, body = answer(handler, data)
    handler.head(code, headers)
    handler.push(body)


def plain(
    *, tag: str | None = None, ranges: bool = True, other: Callable[[bytes], bytes] = bytes
) -> Fault:
    """A server without ranges, or no ETags (`tag=""`), or has other bytes."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        code, headers, body = answer(handler, other(data), tag, ranges=ranges)
        handler.head(code, headers)
        handler.push(body)

    return fault


def status(code: int, **headers: object) -> Fault:
    """An error page."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        handler.head(
            code, {"Content-Length": 5, **{k.replace("_", "-"): v for k, v in headers.items()}}
        )
        handler.push(b"sorry")

    return fault


def redirect(location: str) -> Fault:
    """A redirect to another URL."""
    return status(302, Location=location)


def html(length: int | None = None) -> Fault:
    """A web page instead of the file, as login portals do."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        page = b"<html>please log in</html>".ljust(len(data) if length is None else length)
        handler.head(200, {"Content-Length": len(page), "Content-Type": "text/html"})
        handler.push(page)

    return fault


def drop(after: int, *, sized: bool = True, chunked: bool = False, tag: str | None = None) -> Fault:
    """Disconnect after some bytes of the answer, with or without a Content-Length."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        code, headers, body = answer(handler, data, tag)
        if not sized:
            headers.pop("Content-Length")
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        handler.head(code, headers)
        part = body[:after]
        handler.push(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        handler.hang_up()

    return fault


def stall(after: int | None) -> Fault:
    """Stop sending after some bytes of the body; None: send nothing at all."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        if after is not None:
            code, headers, body = answer(handler, data)
            handler.head(code, headers)
            handler.push(body[:after])
        handler.wait()

    return fault


def hold() -> Fault:
    """A byte now and then, for so long that a client which waits for the end is found out."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        code, headers, body = answer(handler, data)
        handler.head(code, headers)
        handler.server.held.append(handler.path)
        until = time.monotonic() + HOLD_SECONDS
        for i in range(len(body)):
            handler.wfile.write(body[i : i + 1])  # an error as soon as the client has hung up
            handler.wfile.flush()
            if handler.server.stopping.wait(0.05):
                return
            if time.monotonic() > until:
                break
        handler.server.given_up.append(handler.path)  # before the client can see the end

    return fault


def drip(*, head: bool = False, pause: float = 0.03) -> Fault:
    """Byte by byte: the head, or the body."""

    def fault(handler: FaultHandler, data: bytes) -> None:
        code, headers, body = answer(handler, data)
        if head:
            body = b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000
        else:
            handler.head(code, headers)
        until = time.monotonic() + ANSWER_SECONDS
        for i in range(len(body)):
            handler.wfile.write(body[i : i + 1])
            handler.wfile.flush()
            if handler.server.stopping.wait(pause) or time.monotonic() > until:
                return

    return fault


def wrong_range(shift: int = 512, *, honest: bool = True) -> Fault:
    """Another range of bytes, labelled with its real range (`honest`), or
    with the requested one.
    """

    def fault(handler: FaultHandler, data: bytes) -> None:
        code, headers, body = answer(handler, data)
        start = len(data) - len(body)
        if code == 206 and honest:
            headers["Content-Range"] = f"bytes {start - shift}-{len(data) - shift - 1}/{len(data)}"
        if code == 206:
            body = data[start - shift : len(data) - shift]
        handler.head(code, headers)
        handler.push(body)

    return fault
