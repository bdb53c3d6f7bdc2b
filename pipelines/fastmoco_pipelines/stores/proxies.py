"""Which proxy the environment names for a URL, as curl and requests read it.

`http_proxy` for http, `https_proxy` for https, `all_proxy` for both where the first is not set;
each in lower case first, then in upper case. `no_proxy` lists the hosts that are reached directly.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from fastmoco_pipelines.errors import RemoteError

DEFAULT_PORTS = {"http": 80, "https": 443}
SOCKS = ("socks4", "socks4a", "socks5", "socks5h")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A proxy, and where it was named."""

    variable: str
    """Of the environment; messages name it."""
    address: str
    """Scheme, host and port, without user and password."""
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    @property
    def shown(self) -> str:
        """What messages call it."""
        return f"the proxy {self.address.partition('://')[2]} of {self.variable}"

    @property
    def headers(self) -> dict[str, str]:
        """What it gets beside the request."""
        if self.user is None:
            return {}
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Proxy-Authorization": f"Basic {pair}"}


def proxy_of(
    scheme: str, host: str, port: int, environment: Mapping[str, str] | None = None
) -> Proxy | None:
    """The proxy for a host; None where it is reached directly.

    Args:
        scheme: http or https.
        host: a name or an address, without brackets.
        port: of the host.
        environment: the variables; None: those of this process.

    Raises:
        RemoteError: if a variable names no proxy that can be used; its text does not quote it.
    """
    variables = os.environ if environment is None else environment
    variable, text = _named(scheme, variables)
    if not text or _is_direct(host, port, variables.get("no_proxy", variables.get("NO_PROXY", ""))):
        return None
    return _parsed(variable, text)


def _named(scheme: str, variables: Mapping[str, str]) -> tuple[str, str]:
    """The variable that decides, and its value; an empty value means no proxy."""
    for name in (f"{scheme}_proxy", "all_proxy"):
        # A CGI server puts a client's header `Proxy:` into HTTP_PROXY.
        upper_counts = name != "http_proxy" or "REQUEST_METHOD" not in variables
        for variable in (name, name.upper()) if upper_counts else (name,):
            if variable in variables:
                return variable, variables[variable].strip()
    return "", ""


def _parsed(variable: str, text: str) -> Proxy:
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    scheme = {"socks": "socks5h"}.get(scheme.lower(), scheme.lower())

    # A password may hold an @ or a / that its user did not encode.
    credentials, at, place = rest.rpartition("@")
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if scheme not in (*DEFAULT_PORTS, *SOCKS) or not host or not host.isprintable() or " " in host:
        raise RemoteError(
            f"{variable}: its value is not the URL of a proxy, such as http://host:3128 or "
            "http://user:password@host:3128 (write a special character of a password "
            "percent-encoded: %40 is @, %3A is :)"
        )

    port = port or DEFAULT_PORTS.get(scheme, 1080)
    user, _, password = credentials.partition(":")
    return Proxy(
        variable=variable,
        address=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}",
        user=unquote(user) if at else None,
        password=unquote(password),
    )


def _is_direct(host: str, port: int, listed: str) -> bool:
    """Whether a host is in a list such as `localhost,.example.org,10.0.0.0/8,host:8080,[::1]`; `*`
    is every host."""
    return any(_covers(entry, host, port) for entry in re.split(r"[,\s]+", listed) if entry)


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    entry = entry.lower().rstrip(".")
    host = host.lower().rstrip(".")

    # Addresses and networks; an address without a port may be IPv6, with colons of its own.
    bare, _, given = (
        entry.rpartition(":") if re.search(r"(^[^:]*|\]):\d{1,5}$", entry) else (entry, "", "")
    )
    if given and int(given) != port:
        return False
    bare = bare.strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = bare.removeprefix("*").removeprefix(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(bare, strict=False)
    except ValueError:
        return False
