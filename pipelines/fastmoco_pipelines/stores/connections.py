"""Connections of urllib3, kept open between requests, and watched: a request is cut off when its
time is over, and its other end is looked at before anything is sent.

urllib3 knows HTTP, TLS, proxies and pools. It neither tries again nor follows redirects here: that
is `retries.py` and `http.py`.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProtocolError
from urllib3.exceptions import TimeoutError as WaitedError
from urllib3.response import BaseHTTPResponse

from fastmoco_pipelines.errors import PassingError, RemoteError
from fastmoco_pipelines.spec import MOST_TRANSFERS
from fastmoco_pipelines.stores import authorities
from fastmoco_pipelines.stores.proxies import SOCKS, Proxy
from fastmoco_pipelines.stores.retries import Limits

POOL_CONNECTIONS = MOST_TRANSFERS + 32  # of one host; more than there are threads that ask at once
_LOGGERS = ("connection", "connectionpool", "poolmanager", "response", "util.retry")
_thread = threading.local()
ERRORS = (HTTPError, http.client.HTTPException, OSError, ValueError)
"""What urllib3 and its sockets raise."""


class Exchange:
    """One request and its answer.

    Args:
        seconds: until the head of the answer is complete, once there is a connection.
        admit: looks at the connection before the request is sent; raises RemoteError.
    """

    def __init__(self, seconds: float, admit: Callable[[Any], None]) -> None:
        self.reused = False
        """The connection has served an earlier request: its server may have closed it since."""
        self.sock: Any = None
        """The socket; None until the server, or the proxy, has been reached."""
        self.cut = False
        """Its time was over."""
        self._seconds = seconds
        self._admit = admit
        self._timer: threading.Timer | None = None

    def reach(self, sock: Any) -> None:
        """The server, or a proxy, has been reached."""
        self.sock = sock
        self.cut_off_after(self._seconds)

    def begin(self, connection: Any) -> None:
        """The request is sent next."""
        self.reach(connection.sock)
        self._admit(connection)

    def cut_off_after(self, seconds: float) -> None:
        """Shut the connection when the time is over: a socket's own timeout starts again with every
        byte that drips in."""
        self.go_on()
        self._timer = threading.Timer(max(0.0, seconds), self._shut)
        self._timer.daemon = True
        self._timer.start()

    def go_on(self) -> None:
        """Do not shut it any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _shut(self) -> None:
        self.cut = True
        try:
            # Not TLS's own, which may not be called from another thread.
            socket.socket.shutdown(plain_socket(self.sock), socket.SHUT_RDWR)
        except (OSError, TypeError):  # closed meanwhile
            return


def plain_socket(sock: Any) -> Any:
    """The socket itself; of TLS inside the TLS of a proxy, the one to the proxy."""
    return getattr(sock, "socket", sock)


class _Watched:
    """A connection that shows itself to the exchange of its thread."""

    served = False

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        _thread.exchange.reach(sock)
        return sock

    def request(self, *args: Any, **options: Any) -> None:
        exchange: Exchange = _thread.exchange
        exchange.reused = self.served
        if self.sock is None:  # type: ignore[attr-defined]
            self.connect()  # type: ignore[attr-defined]
        exchange.begin(self)
        self.served = True
        super().request(*args, **options)  # type: ignore[misc]

    def close(self) -> None:
        self.served = False
        super().close()  # type: ignore[misc]


class _Connection(_Watched, HTTPConnection):
    pass


class _TlsConnection(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def get(
    url: str,
    headers: Mapping[str, str],
    proxy: Proxy | None,
    limits: Limits,
    seconds: float,
    admit: Callable[[Any], None],
) -> tuple[BaseHTTPResponse, Exchange]:
    """The head of the answer to one GET. `named` words its errors.

    An idle connection that its server has closed is replaced at once.

    Args:
        url: without user and password.
        headers: of the request.
        proxy: through which it goes.
        limits: for a connection, and between two pieces of the answer.
        seconds: until the head is complete.
        admit: see `Exchange`.
    """
    tls = (
        authorities.settings()
        if "https" in (urlsplit(url).scheme.lower(), _scheme(proxy))
        else None
    )
    manager = _manager(os.getpid(), proxy, tls)
    for _ in range(POOL_CONNECTIONS):
        exchange = Exchange(seconds, admit)
        try:
            return _get_once(manager, exchange, url, headers, limits), exchange
        except ProtocolError as error:
            if not exchange.reused or exchange.cut:
                raise ExchangeError(error, exchange) from error
        except ERRORS as error:
            raise ExchangeError(error, exchange) from error
    raise PassingError(f"{urlsplit(url).netloc}: closes every connection")


class ExchangeError(Exception):
    """What failed, and how far the request had come; see `named`."""

    def __init__(self, error: BaseException, exchange: Exchange) -> None:
        super().__init__(error)
        self.error = error
        self.exchange = exchange


def _get_once(
    manager: urllib3.PoolManager,
    exchange: Exchange,
    url: str,
    headers: Mapping[str, str],
    limits: Limits,
) -> BaseHTTPResponse:
    _thread.exchange = exchange
    try:
        return manager.urlopen(
            "GET",
            url,
            headers=dict(headers),
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            enforce_content_length=False,
            timeout=urllib3.Timeout(connect=limits.connect_seconds, read=limits.read_seconds),
        )
    finally:
        exchange.go_on()
        _thread.exchange = None


def _scheme(proxy: Proxy | None) -> str:
    return proxy.address.partition(":")[0] if proxy else ""


@lru_cache(maxsize=8)
def _manager(
    process: int, proxy: Proxy | None, tls: tuple[tuple[str, str], ...] | None
) -> urllib3.PoolManager:
    """The pools of one proxy and one choice of authorities.

    Args:
        process: that holds them: a child must not write to the sockets of its parent.
        proxy: None: direct connections.
        tls: from `authorities.settings`; None: http alone.
    """
    del process
    context = authorities.tls_context(tls) if tls is not None else None
    options: dict[str, Any] = {"num_pools": 16, "maxsize": POOL_CONNECTIONS, "ssl_context": context}
    if proxy is None:
        manager = urllib3.PoolManager(**options)
    elif _scheme(proxy) in SOCKS:
        return _socks_manager(proxy, options)
    else:
        manager = urllib3.ProxyManager(
            proxy.address, proxy_headers=proxy.headers, proxy_ssl_context=context, **options
        )
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


def _socks_manager(proxy: Proxy, options: dict[str, Any]) -> urllib3.PoolManager:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the same: that PySocks is missing
            from urllib3.contrib import socks
    except ImportError:
        raise RemoteError(
            f"{proxy.variable}: a proxy of the kind {_scheme(proxy)} needs the package PySocks: "
            "pip install PySocks, or name an http proxy"
        ) from None

    class Connection(_Watched, socks.SOCKSConnection):
        pass

    class TlsConnection(_Watched, socks.SOCKSHTTPSConnection):
        pass

    class Pool(socks.SOCKSHTTPConnectionPool):
        ConnectionCls = Connection

    class TlsPool(socks.SOCKSHTTPSConnectionPool):
        ConnectionCls = TlsConnection

    user = proxy.user
    manager = socks.SOCKSProxyManager(
        proxy.address, username=user, password=proxy.password if user else None, **options
    )
    manager.pool_classes_by_scheme = {"http": Pool, "https": TlsPool}
    return manager


@contextmanager
def named(where: str, proxy: Proxy | None, exchange: Exchange | None = None) -> Iterator[None]:
    """Network errors as PassingError that names the URL, or the proxy; a refused certificate does
    not pass. The libraries' own texts are not quoted: they may hold the request, and with it a
    token."""
    try:
        yield
    except ExchangeError as failed:
        raise _worded(where, proxy, failed.error, failed.exchange) from None
    except ERRORS as error:
        raise _worded(where, proxy, error, exchange) from None


def _worded(
    where: str, proxy: Proxy | None, error: BaseException, exchange: Exchange | None
) -> RemoteError:
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RemoteError(f"{where}: {authorities.explain(cause)}")
    if proxy and exchange and (refusal := _tunnel_refusal(chain)):
        return proxy_refusal(where, proxy, refusal)
    for cause in chain:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return RemoteError(
                f"{where}: no TLS connection can be made ({cause.reason or 'refused'}): check "
                "the scheme and the port of the URL, and which TLS the server speaks"
            )

    # The last OSError is the one that the system gave.
    systems = [cause for cause in chain if isinstance(cause, OSError)]
    reason = (systems[-1].strerror if systems else None) or type(chain[-1]).__name__
    if proxy and exchange and exchange.sock is None:
        if any(isinstance(cause, ConnectTimeoutError | TimeoutError) for cause in chain) and not (
            any(isinstance(cause, NewConnectionError) for cause in chain)
        ):
            reason = "no answer in time"
        return PassingError(
            f"{where}: {proxy.shown} cannot be reached ({reason}): check {proxy.variable}, or list "
            "the URL's host in no_proxy"
        )
    cut = exchange is not None and exchange.cut
    waited = any(isinstance(cause, TimeoutError) for cause in chain) or (
        isinstance(error, WaitedError) and not isinstance(error, NewConnectionError)
    )
    if cut or waited:
        return PassingError(f"{where}: no answer in time")
    if systems:
        return PassingError(f"{where}: the connection failed ({reason})")
    return PassingError(f"{where}: the connection was lost ({reason})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those inside it, the outermost first."""
    for _ in range(10):
        if error is None:
            return
        yield error
        inner = [item for item in error.args if isinstance(item, BaseException)]
        hidden = error.__context__ if isinstance(error, NewConnectionError) else None  # of SOCKS
        known = getattr(error, "original_error", None) or getattr(error, "socket_err", None)
        error = known or (inner[-1] if inner else error.__cause__ or hidden)


def _tunnel_refusal(chain: list[BaseException]) -> int:
    """The status by which a proxy refuses a tunnel; 0 for none."""
    for cause in chain:
        words = str(cause.args[0]) if isinstance(cause, OSError) and cause.args else ""
        before, found, status = words.partition("Tunnel connection failed: ")
        if found and not before and status[:3].isdecimal():
            return int(status[:3])
    return 0


def proxy_refusal(where: str, proxy: Proxy, status: int, offers: str = "Basic") -> RemoteError:
    """What a proxy's own answer means.

    Args:
        where: the URL, as it may be shown.
        proxy: that answered.
        status: of HTTP.
        offers: its Proxy-Authenticate.
    """
    if status == 407 and "basic" not in offers.lower():
        kind = ascii(offers.split()[0])[1:-1][:20] if offers.split() else "another scheme"
        return RemoteError(
            f"{where}: {proxy.shown} asks for a login by {kind} (HTTP 407), and only user and "
            "password (Basic) can be sent: name a proxy that takes them, or run a local one that "
            "logs in"
        )
    if status == 407:
        what = "asks for user and password" if proxy.user is None else "refuses user and password"
        return RemoteError(
            f"{where}: {proxy.shown} {what} (HTTP 407): give them in {proxy.variable}, as "
            "http://user:password@host:port (special characters percent-encoded: %40 is @)"
        )
    text = f"{where}: {proxy.shown} refuses to connect to it (HTTP {status})"
    if status in (408, 425, 429, 500, 502, 503, 504):
        return PassingError(text)
    return RemoteError(f"{text}: list the URL's host in no_proxy, or ask who runs the proxy")


def _mute(record: logging.LogRecord) -> bool:
    """Whether a record of urllib3 may be logged: those about our requests quote whole URLs."""
    return getattr(_thread, "exchange", None) is None


for _name in _LOGGERS:
    logging.getLogger(f"urllib3.{_name}").addFilter(_mute)
