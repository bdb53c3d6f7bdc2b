"""A server that is far away: every connection and every request takes its latency, and some answers
are cut off by a reset. It serves a folder on 127.0.0.1 and ends when its standard input does.

    python benchmarks/distant_server.py FOLDER LATENCY_S RESETS SEED

It prints its port, and at the end a line of JSON: requests of tars, resets, and the most connections
that were busy with one at the same time.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class DistantServer(ThreadingHTTPServer):
    """See the module.

    Args:
        folder: that is served.
        latency_s: seconds for a connection, and for each answer.
        resets: share of the answers with a tar that are cut off.
        seed: of the choice of these.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, latency_s: float, resets: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.latency_s = latency_s
        self.resets = resets
        self.seed = seed
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.reset = 0
        self.busy = 0
        self.most_busy = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that disconnect are nothing to report."""

    def is_reset(self, name: str) -> bool:
        """Whether this answer is cut off: a function of the seed, the name and how often it was
        asked for."""
        with self.lock:
            self.asked[name] += 1
            text = f"{self.seed} {name} {self.asked[name]}"
            drawn = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < self.resets
            self.reset += drawn
        return drawn

    def figures(self) -> dict[str, int]:
        """What has happened so far."""
        return {
            "requests": sum(self.asked.values()),
            "resets": self.reset,
            "most_busy": self.most_busy,
        }


class _Handler(BaseHTTPRequestHandler):
    server: DistantServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def setup(self) -> None:
        time.sleep(self.server.latency_s)
        super().setup()

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        path = self.server.folder / name
        if ".." in name or not path.is_file():
            self._answer(404, b"", "")
            return
        data = path.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        if not name.endswith(".tar"):
            time.sleep(self.server.latency_s)
            known = self.headers.get("If-None-Match") == tag
            self._answer(304 if known else 200, b"" if known else data, tag)
            return
        server = self.server
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            time.sleep(server.latency_s)
            self._tar(data, tag, cut=server.is_reset(name))
        finally:
            with server.lock:
                server.busy -= 1

    def _tar(self, data: bytes, tag: str, *, cut: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        body = data[start:]
        where = f"bytes {start}-{len(data) - 1}/{len(data)}" if asked else ""
        if not cut:
            self._answer(206 if asked else 200, body, tag, where)
            return
        self._head(206 if asked else 200, len(body), tag, where)
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _answer(self, code: int, body: bytes, tag: str, where: str = "") -> None:
        self._head(code, len(body), tag, where)
        self.wfile.write(body)
        self.wfile.flush()

    def _head(self, code: int, length: int, tag: str, where: str) -> None:
        self.send_response(code)
        for name, value in (("ETag", tag), ("Content-Range", where), ("Content-Length", length)):
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def main() -> None:
    """Serve until standard input ends."""
    folder, latency, resets, seed = sys.argv[1:]
    server = DistantServer(Path(folder), float(latency), float(resets), int(seed))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    print(json.dumps(server.figures()), flush=True)


if __name__ == "__main__":
    main()
