"""One request to an HTTP server, with bounds on time, speed, redirects and answers.

The connections are urllib3's (`connections.py`), and so are proxies and TLS. Errors name the URL
without user, password and query.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import LocationParseError
from urllib3.response import BaseHTTPResponse

from fastmoco_pipelines.errors import (
    AbsentError,
    AccessError,
    BusyError,
    PassingError,
    RemoteError,
    WrongContentError,
)
from fastmoco_pipelines.stores.connections import (
    Exchange,
    get,
    named,
    plain_socket,
    proxy_refusal,
)
from fastmoco_pipelines.stores.credentials import CURES, Credentials, credentials_for
from fastmoco_pipelines.stores.proxies import DEFAULT_PORTS, Proxy, proxy_of
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.stores.store import Body, Request, Store
from fastmoco_pipelines.text import redact

CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 503)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # the states of a server that may pass by themselves


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer whose head has come, and how it was asked for."""

    response: BaseHTTPResponse
    exchange: Exchange
    proxy: Proxy | None
    credentials: Credentials


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
        with _answer(request.url, headers, request.limits, request.deadline) as answer:
            response = answer.response
            _refuse_errors(where, answer)
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
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise RemoteError(
                    f"{where}: the server compresses it on the way: have it serve the file as it is"
                )
            begins = 0
            total = response.length_remaining
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
                kind=ascii(response.headers.get("Content-Type", "unknown"))[1:-1][:60],
                chunks=_chunks(where, answer, request.limits, request.deadline),
            )


STORE = HttpStore()


def _total_of_range(
    where: str, response: BaseHTTPResponse, start: int, *, asked: bool
) -> int | None:
    """Size of the whole file by the head of a partial answer; None where it is not given.

    Raises:
        WrongContentError: if the answer is another range than was asked for.
    """
    content_range = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", content_range.strip())
    if not asked or found is None or int(found[1]) != start:
        said = ascii(content_range)[:80]
        raise WrongContentError(
            f"{where}: answers with another range than asked for ({said}, from {start})"
        )
    return None if found[3] == "*" else int(found[3])


def _chunks(where: str, answer: _Answer, limits: Limits, deadline: float) -> Iterator[bytes]:
    """The pieces of a body, as they come."""
    response, exchange = answer.response, answer.exchange
    since = time.monotonic()
    received = 0
    exchange.cut_off_after(deadline - since)
    with named(where, None, exchange):
        while chunk := response.read1(CHUNK_BYTES, decode_content=False):
            yield chunk
            received += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed >= limits.speed_seconds:
                if received < limits.min_bytes_per_s * elapsed:
                    raise PassingError(f"{where}: only {received / elapsed:.0f} bytes/s arrive")
                since = since + elapsed
                received = 0
        exchange.go_on()


@contextmanager
def _answer(
    url: str, headers: Mapping[str, str], limits: Limits, deadline: float
) -> Iterator[_Answer]:
    """The head of the answer to a GET, after following redirects that may be followed."""
    first = url
    public = False

    def admit(connection: Any) -> None:
        nonlocal public
        peer = _peer_is_public(connection)
        if public and not peer:
            raise RemoteError(
                f"{where}: redirects from a public to a private address ({redact(url)}): refused"
            )
        public = public or peer

    where = redact(first)
    for _ in range(MAX_REDIRECTS + 1):
        address, proxy = _address(url)
        # A host gets only its own credentials.
        credentials = credentials_for(url, first)
        seconds = min(limits.respond_seconds, deadline - time.monotonic())
        with named(where, proxy):
            response, exchange = get(
                address, {**headers, **credentials.headers}, proxy, limits, seconds, admit
            )
        try:
            if response.status not in _REDIRECTS:
                yield _Answer(response, exchange, proxy, credentials)
                return
            url = _redirected(where, url, response.headers.get("Location", ""))
        finally:
            # A connection is used again if its answer was read to its end.
            exchange.go_on()
            response.close()
    raise RemoteError(
        f"{where}: redirects more than {MAX_REDIRECTS} times, in a circle perhaps; if it leads to "
        f"a page for logging in: {CURES}"
    )


def _address(url: str) -> tuple[str, Proxy | None]:
    """A URL without user and password, and the proxy for it."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if not host:
            raise ValueError("no host")
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        if urllib3.util.parse_url(address).host is None:
            raise ValueError("no host")
    except ValueError as error:
        # The texts of urllib3 quote the whole URL.
        reason = "its host's name" if isinstance(error, LocationParseError) else str(error)
        raise RemoteError(f"{redact(url)}: is not a usable URL ({reason})") from None
    scheme = parts.scheme.lower()
    return address, proxy_of(scheme, host, port or DEFAULT_PORTS[scheme])


def _peer_is_public(connection: Any) -> bool:
    """Whether the other end of the connection itself, not only its name, is outside this
    network."""
    name = plain_socket(connection.sock).getpeername()[0]
    address = ipaddress.ip_address(name.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_global)


def _redirected(where: str, url: str, location: str) -> str:
    """The URL that a redirect leads to."""
    # Headers are read as Latin-1; a name in it is UTF-8 more often than not.
    with suppress(UnicodeError):
        location = location.encode("latin-1").decode()
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


def _refuse_errors(where: str, answer: _Answer) -> None:
    """Raise what an error status means."""
    response, proxy = answer.response, answer.proxy
    status = response.status
    through = f" (asked through {proxy.shown})" if proxy else ""
    if status in (404, 410):
        raise AbsentError(f"{where}: does not exist (HTTP {status}): check the name{through}")
    if status in (401, 403):
        raise AccessError(
            f"{where}: access is refused (HTTP {status}): {_access_cure(answer)}{through}"
        )
    if status == 407 and proxy:
        raise proxy_refusal(where, proxy, status, response.headers.get("Proxy-Authenticate", ""))
    if status == 416:
        raise WrongContentError(f"{where}: is shorter than its index says (HTTP 416)")
    if status in _PASSING:
        wait = _seconds_to_wait(response.headers.get("Retry-After", ""))
        kind = BusyError if status in _BUSY else PassingError
        raise kind(f"{where}: HTTP {status}{through}", wait)
    if status == 511:
        raise RemoteError(
            f"{where}: this network asks for a login first (HTTP {status}): open a page in a "
            "browser, and log in"
        )
    if status >= 400:
        raise RemoteError(f"{where}: HTTP {status}: check the URL{through}")


def _access_cure(answer: _Answer) -> str:
    """What to do about a refused access."""
    if answer.credentials.sources:
        sent = " and ".join(answer.credentials.sources)
        return f"check the credentials, which came from {sent}, and what they allow"
    return (
        "no credentials were sent; check whether the URL's signature has expired, or, for a "
        f"private or gated set, {CURES}"
    )


def _seconds_to_wait(text: str) -> float:
    """Of a Retry-After: a number of seconds, or a date."""
    if text.isascii() and text.isdecimal():
        return float(text) if len(text) < 6 else 0.0
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return seconds if 0 < seconds < 100_000 else 0.0


def _validator(response: BaseHTTPResponse) -> str:
    etag = response.headers.get("ETag", "").strip()
    if re.fullmatch(r'"[\x21\x23-\x7e]{1,256}"', etag):
        return etag
    date = response.headers.get("Last-Modified", "").strip()
    return date if re.fullmatch(r"[A-Za-z0-9:, -]{1,64}", date) else ""
