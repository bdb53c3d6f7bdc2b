"""One request to an HTTP server, with bounds on time, speed, redirects and answers.

Errors name the URL without user, password and query.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from fastmoco_pipelines.errors import (
    AbsentError,
    AccessError,
    PassingError,
    RemoteError,
    WrongContentError,
)
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.stores.store import Body, Request, Store
from fastmoco_pipelines.text import redact

CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # the states of a server that may pass by themselves
_CREDENTIALS = "check the credentials, or whether the URL's signature has expired"


class HttpStore(Store):
    """http and https: plain GET requests with ranges."""

    user_in_url = True
    quotes_names = True

    @contextmanager
    def open(self, request: Request) -> Iterator[Body]:
        """See `Store.open`."""
        start = request.start
        stop = request.stop
        validator = request.validator
        known = request.known if request.known.startswith('"') else ""  # a date is no ETag

        headers = {"Accept-Encoding": "identity", "User-Agent": "fastmoco"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            headers |= {"If-Range": validator} if validator else {}
        headers |= {"If-None-Match": known} if known else {}

        where = redact(request.url)
        with _answer(request.url, headers, request.limits, request.deadline) as (response, sock):
            _refuse_errors(where, response)
            answered = _validator(response)
            if response.status == 304 and known:
                yield Body(
                    start=0,
                    total=None,
                    validator=answered,
                    kind="",
                    chunks=iter(()),
                    unchanged=True,
                )
                return
            if response.getheader("Content-Encoding", "identity").lower() != "identity":
                raise RemoteError(
                    f"{where}: the server compresses it on the way: have it serve the file as it is"
                )
            begins = 0
            total = response.length
            if response.status == 206:
                total = _total_of_range(where, response, start, asked="Range" in headers)
                if validator and answered and answered != validator:
                    raise WrongContentError(f"{where}: has changed on the server while it was read")
                begins = start
            elif response.status != 200:
                raise RemoteError(
                    f"{where}: HTTP {response.status} is not an answer to a request for a file"
                )
            yield Body(
                start=begins,
                total=total,
                validator=answered,
                kind=ascii(response.getheader("Content-Type", "unknown"))[1:-1][:60],
                chunks=_chunks(where, response, sock, request.limits, request.deadline),
            )


STORE = HttpStore()


def _total_of_range(
    where: str, response: http.client.HTTPResponse, start: int, *, asked: bool
) -> int | None:
    """Size of the whole file by the head of a partial answer; None where it is not given.

    Raises:
        WrongContentError: if the answer is another range than was asked for.
    """
    content_range = response.getheader("Content-Range", "")
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", content_range.strip())
    if not asked or found is None or int(found[1]) != start:
        said = ascii(content_range)[:80]
        raise WrongContentError(
            f"{where}: answers with another range than asked for ({said}, from {start})"
        )
    return None if found[3] == "*" else int(found[3])


def _chunks(
    where: str,
    response: http.client.HTTPResponse,
    sock: socket.socket,
    limits: Limits,
    deadline: float,
) -> Iterator[bytes]:
    """The pieces of a body, as they come."""
    since = time.monotonic()
    received = 0
    with _naming(where), _cut_off_after(sock, deadline - since):
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk
            received += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed >= limits.speed_seconds:
                if received < limits.min_bytes_per_s * elapsed:
                    raise PassingError(f"{where}: only {received / elapsed:.0f} bytes/s arrive")
                since = since + elapsed
                received = 0


@contextmanager
def _answer(
    url: str, headers: Mapping[str, str], limits: Limits, deadline: float
) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
    """The head of the answer to a GET, after following redirects that may be followed."""
    first = url
    origin = urlsplit(url)
    public = False
    for _ in range(MAX_REDIRECTS + 1):
        where = redact(first)
        connection, target, own_headers = _connection(url, limits.connect_seconds)
        response = None
        try:
            # A host gets only its own credentials.
            sent = {**headers, **(own_headers if urlsplit(url).netloc == origin.netloc else {})}
            seconds = min(limits.respond_seconds, deadline - time.monotonic())
            with _naming(where):
                connection.connect()
                peer = _peer_is_public(connection)
                if public and not peer:
                    raise RemoteError(
                        f"{where}: redirects from a public to a private address ({redact(url)}): "
                        "refused"
                    )
                public = public or peer
                sock = connection.sock  # the connection drops it after its last answer
                sock.settimeout(limits.read_seconds)
                with _cut_off_after(sock, seconds):
                    connection.request("GET", target, headers=sent)
                    response = connection.getresponse()
            if response.status not in _REDIRECTS:
                yield response, sock
                return
            url = _redirected(where, url, response.getheader("Location", ""))
        finally:
            if response is not None:
                response.close()
            connection.close()
    raise RemoteError(
        f"{redact(first)}: redirects more than {MAX_REDIRECTS} times, in a circle perhaps"
    )


def _connection(url: str, seconds: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection to the URL's host, or to the proxy that the environment names; the target and
    headers to send."""
    parts = urlsplit(url)
    try:
        host = parts.hostname or ""
        port = parts.port
    except ValueError as error:
        raise RemoteError(f"{redact(url)}: is not a usable URL ({error})") from None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Authorization"] = f"Basic {b64encode(pair).decode()}"
    secure = parts.scheme.lower() == "https"
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme.lower())
    via = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
    address = (
        (via.hostname or "", via.port or 80) if via else (host, port or (443 if secure else 80))
    )
    if secure:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            *address, timeout=seconds
        )
        if via:
            connection.set_tunnel(host, port or 443)
    else:
        connection = http.client.HTTPConnection(*address, timeout=seconds)
        if via:
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            headers["Host"] = parts.netloc.rpartition("@")[2]
    return connection, target, headers


def _peer_is_public(connection: http.client.HTTPConnection) -> bool:
    """Whether the other end of the connection itself, not only its name, is outside this
    network."""
    address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_global)


def _redirected(where: str, url: str, location: str) -> str:
    """The URL that a redirect leads to."""
    try:
        target = urljoin(url, location)
        scheme, before = urlsplit(target).scheme.lower(), urlsplit(url).scheme.lower()
    except ValueError:  # its text quotes the address, and with it a token perhaps
        raise RemoteError(f"{where}: redirects to what is not a usable URL: refused") from None
    if scheme not in ("http", "https") or not location:
        raise RemoteError(
            f"{where}: redirects to {scheme!a}, which is not an http address: refused"
        )
    if (before, scheme) == ("https", "http"):
        raise RemoteError(
            f"{where}: redirects from https to http: refused; use the URL that it leads to"
        )
    return target


def _refuse_errors(where: str, response: http.client.HTTPResponse) -> None:
    """Raise what an error status means."""
    status = response.status
    if status in (404, 410):
        raise AbsentError(f"{where}: does not exist (HTTP {status}): check the name")
    if status in (401, 403):
        raise AccessError(f"{where}: access is refused (HTTP {status}): {_CREDENTIALS}")
    if status == 416:
        raise WrongContentError(f"{where}: is shorter than its index says (HTTP 416)")
    if status in _PASSING:
        wait = response.getheader("Retry-After", "")
        raise PassingError(
            f"{where}: HTTP {status}", float(wait) if wait.isdecimal() and len(wait) < 6 else 0.0
        )
    if status >= 400:
        raise RemoteError(f"{where}: HTTP {status}: check the URL")


def _validator(response: http.client.HTTPResponse) -> str:
    etag = response.getheader("ETag", "").strip()
    if re.fullmatch(r'"[\x21\x23-\x7e]{1,256}"', etag):
        return etag
    date = response.getheader("Last-Modified", "").strip()
    return date if re.fullmatch(r"[A-Za-z0-9:, -]{1,64}", date) else ""


@contextmanager
def _cut_off_after(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Shut the connection when the time is over: a socket's own timeout starts again with every
    byte that drips in."""
    timer = threading.Timer(max(0.0, seconds), _shut, [sock])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(sock: socket.socket) -> None:
    try:
        # not TLS's own, which may not be called from another thread
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:  # closed meanwhile
        return


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Network errors as PassingError that names the URL; a broken certificate does not pass."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise RemoteError(
            f"{where}: its certificate is not valid ({error.verify_message})"
        ) from None
    except TimeoutError:
        raise PassingError(f"{where}: no answer in time") from None
    except OSError as error:
        raise PassingError(
            f"{where}: the connection failed ({error.strerror or type(error).__name__})"
        ) from None
    except (http.client.HTTPException, ValueError) as error:
        # Their texts may quote the request, and with it a token.
        raise PassingError(f"{where}: the connection was lost ({type(error).__name__})") from None
