"""Servers with a gate before the files: passwords, tokens, TLS with certificates of one's own, and
proxies that tunnel. Built on the fault server: 127.0.0.1 alone, and they stop by themselves.

    with GateServer(folder, wants={"Authorization": "Bearer x"}) as server: ...
    with GateServer(folder, wants=..., refusal=407, tunnel=other.server_address) as proxy: ...
    with GateServer(folder, tls=certificates.context("localhost")) as server: ...
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from tests.pipelines.http_fault_server import FaultHandler, FaultServer


class GateServer(FaultServer):
    """A file server, or a proxy that serves `folder` for every host it is asked for.

    Args:
        folder: that is served.
        wants: headers without which nothing is served.
        refusal: the status for a request without them.
        offers: of WWW-Authenticate or Proxy-Authenticate.
        tunnel: address to which every CONNECT leads.
        tls: serve https.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wants: dict[str, str] | None = None,
        refusal: int = 401,
        offers: str = "Basic",
        tunnel: tuple[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(folder, _GateHandler)
        self.wants = wants or {}
        self.refusal = refusal
        self.offers = offers
        self.tunnel = tunnel
        self.seen: list[tuple[str, dict[str, str]]] = []  # target and headers of every request
        self.scheme = "http" if tls is None else "https"
        if tls is not None:
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"


class _GateHandler(FaultHandler):
    server: GateServer

    def do_GET(self) -> None:
        if self._admitted():
            super().do_GET()

    def do_CONNECT(self) -> None:
        self.close_connection = True
        if not self._admitted():
            return
        if self.server.tunnel is None:
            self.head(502, {"Content-Length": 0})
            return
        with socket.create_connection(self.server.tunnel, 5) as far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_copy, args=(far, self.connection), daemon=True)
            back.start()
            _copy(self.connection, far)
            back.join(10)

    def _admitted(self) -> bool:
        self.server.seen.append((self.path, dict(self.headers)))
        if all(self.headers.get(name) == value for name, value in self.server.wants.items()):
            return True
        self.close_connection = True
        name = "Proxy-Authenticate" if self.server.refusal == 407 else "WWW-Authenticate"
        self.head(self.server.refusal, {name: self.server.offers, "Content-Length": 0})
        return False


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


class Certificates:
    """An authority of its own in a folder, and certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = folder / "authority.pem"
        self._run(
            *("req", "-x509", *NEW_KEY, "-keyout", "authority.key", "-out", "authority.pem"),
            *("-days", "9", "-subj", "/CN=authority of a test"),
        )
        (folder / "index.txt").touch()
        (folder / "ca.cnf").write_text(CONFIG)

    def signed(self, *hosts: str, ends: str = "21000101000000Z") -> Path:
        """A PEM file with a certificate for these hosts, and its key."""
        name = f"{hosts[0].replace('*', 'any')}-{ends}"
        self._run(
            *("req", *NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr"),
            *("-subj", f"/CN={hosts[0]}"),
            *("-addext", f"subjectAltName={','.join(f'DNS:{host}' for host in hosts)}"),
        )
        self._run(
            *("ca", "-batch", "-notext", "-config", "ca.cnf", "-create_serial"),
            *("-startdate", "20200101000000Z", "-enddate", ends),
            *("-in", f"{name}.csr", "-out", f"{name}.pem"),
        )
        both = self.folder / f"{name}.both.pem"
        both.write_bytes(
            b"".join((self.folder / f"{name}.{x}").read_bytes() for x in ("pem", "key"))
        )
        return both

    def context(self, *hosts: str, ends: str = "21000101000000Z") -> ssl.SSLContext:
        """For a server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.signed(*hosts, ends=ends))
        return context

    def _run(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
CONFIG = """
[ca]
default_ca = own
[own]
database = index.txt
serial = serial
new_certs_dir = .
certificate = authority.pem
private_key = authority.key
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""


def make_certificates(folder: Path) -> Certificates:
    """An authority of a test; the test is skipped where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return Certificates(folder)
