"""What is sent to prove who asks: by host, from the URL, the environment or the user's files.

    user:password@ in the URL     Basic
    FASTMOCO_HTTP_HEADERS         any header, by host: 'data.example=Authorization: Bearer TOKEN'
    HF_TOKEN, or its file         Bearer, for Hugging Face over https
    ~/.netrc, or NETRC            Basic, for the machines it lists

The first of them that names an Authorization wins. A value is never shown: messages name its
source.
"""

from __future__ import annotations

import base64
import logging
import netrc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from fastmoco_pipelines.errors import RemoteError
from fastmoco_pipelines.files.small import UnfitFileError, read_small
from fastmoco_pipelines.stores.proxies import DEFAULT_PORTS

HEADERS = "FASTMOCO_HTTP_HEADERS"
CURES = (
    f"give a header for its host in {HEADERS}, a token of Hugging Face in HF_TOKEN, or user and "
    "password in ~/.netrc (docs/data.md)"
)
_MAX_BYTES = 1 << 20
_HUGGING_FACE = ("huggingface.co", "hf.co")
_ENTRY = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/=\[\]]+)(?::(?P<port>\d{1,5}))?/?"
    r"\s*=\s*(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*:"
    r"\s*(?P<value>[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?)"
)
_OURS = {
    "accept-encoding",
    "connection",
    "content-length",
    "host",
    "if-none-match",
    "if-range",
    "proxy-authorization",
    "range",
    "transfer-encoding",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Headers for one host, and where they come from."""

    headers: dict[str, str] = field(default_factory=dict, repr=False)
    sources: tuple[str, ...] = ()


def credentials_for(
    url: str, asked: str, environment: Mapping[str, str] | None = None
) -> Credentials:
    """What a request carries.

    Args:
        url: of the request, to which a redirect may have led.
        asked: the URL that the user gave; another host than its host gets nothing.
        environment: the variables; None: those of this process.

    Raises:
        RemoteError: if FASTMOCO_HTTP_HEADERS or HF_ENDPOINT cannot be read; its text quotes neither.
    """
    variables = os.environ if environment is None else environment
    parts, origin = urlsplit(url), urlsplit(asked)
    if not _same_place(parts, origin):
        return Credentials()
    headers: dict[str, str] = {}
    sources: list[str] = []

    def add(name: str, value: str, source: str) -> None:
        if name.lower() not in {known.lower() for known in headers}:
            headers[name] = value
            sources.append(source)

    if origin.username is not None:
        user, password = unquote(origin.username), unquote(origin.password or "")
        add("Authorization", _basic(user, password), "the URL")
    for entry in _entries(variables.get(HEADERS, "")):
        if _fits(entry, parts):
            add(entry["name"] or "", entry["value"] or "", HEADERS)
    if token := _hugging_face_token(parts, variables):
        add("Authorization", f"Bearer {token[0]}", token[1])
    if login := _netrc_login(parts.hostname or "", variables):
        add("Authorization", _basic(*login[:2]), login[2])
    return Credentials(headers, tuple(dict.fromkeys(sources)))


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _port(parts: SplitResult) -> int | None:
    return parts.port or DEFAULT_PORTS.get(parts.scheme.lower())


def _same_place(parts: SplitResult, origin: SplitResult) -> bool:
    """Whether two URLs name the same host and port, or the second one's https in place of its
    http."""
    if parts.hostname != origin.hostname:
        return False
    upgraded = (origin.scheme.lower(), parts.scheme.lower()) == ("http", "https")
    both_default = (_port(origin), _port(parts)) == (80, 443)
    return _port(parts) == _port(origin) or (upgraded and both_default)


def _entries(text: str) -> list[dict[str, str | None]]:
    """The headers of FASTMOCO_HTTP_HEADERS: entries on lines of their own, or with `|` between."""
    found = []
    pieces = [piece.strip() for piece in re.split(r"[|\n]", text)]
    for number, piece in enumerate((piece for piece in pieces if piece), start=1):
        match = _ENTRY.fullmatch(piece)
        if match is None:
            raise RemoteError(
                f"{HEADERS}: entry {number} is not HOST=NAME: VALUE, such as "
                "data.example=Authorization: Bearer TOKEN (several: with | between them)"
            )
        if match["name"].lower() in _OURS:
            raise RemoteError(
                f"{HEADERS}: entry {number} names the header {match['name']}, which every request "
                "sets by itself: leave it out"
            )
        found.append(match.groupdict())
    return found


def _fits(entry: Mapping[str, str | None], parts: SplitResult) -> bool:
    """Whether an entry is for the host of a URL; it may name the scheme and the port too."""
    same_host = (entry["host"] or "").strip("[]").lower().rstrip(".") == (
        parts.hostname or ""
    ).rstrip(".")
    same_scheme = entry["scheme"] in (None, parts.scheme.lower())
    return same_host and same_scheme and entry["port"] in (None, str(_port(parts)))


def _hugging_face_token(parts: SplitResult, variables: Mapping[str, str]) -> tuple[str, str] | None:
    """(token, its source) for a host of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    try:
        endpoint = urlsplit(variables.get("HF_ENDPOINT", ""))
    except ValueError:
        raise RemoteError(
            "HF_ENDPOINT: its value is not a URL such as https://mirror.example: correct it, or "
            "unset it"
        ) from None
    ours = parts.scheme.lower() == "https" and parts.hostname in _HUGGING_FACE
    if not ours and (not endpoint.hostname or parts[:2] != endpoint[:2]):
        return None

    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if _is_token(token := variables.get(variable, "").strip()):
            return token, variable

    home = Path(variables.get("HOME") or "~")
    cache = Path(variables.get("XDG_CACHE_HOME") or home / ".cache")
    folder = Path(variables.get("HF_HOME") or cache / "huggingface")
    path = _at_home(Path(variables.get("HF_TOKEN_PATH") or folder / "token"))
    if path is None:
        return None
    try:
        token = read_small(path, _MAX_BYTES).decode("ascii").strip()
    except UnfitFileError as error:
        _warn_once(f"{error}; it is not used as a token of Hugging Face")
        return None
    except (OSError, ValueError):
        return None
    return (token, str(path)) if _is_token(token) else None


def _at_home(path: Path) -> Path | None:
    """A path with `~` or `~user` replaced; None where there is no such home folder, as for a user
    of a container without an entry."""
    try:
        return path.expanduser()
    except RuntimeError:
        return None


@lru_cache(maxsize=16)
def _warn_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _is_token(text: str) -> bool:
    return re.fullmatch(r"[\x21-\x7e]{1,4096}", text) is not None


def _netrc_login(host: str, variables: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(user, password, file) of the entry of a host; an entry `default` is no entry of any host."""
    home = Path(variables.get("HOME") or "~")
    given = variables.get("NETRC")
    if given == os.devnull:  # as one says that there is none
        return None
    path = _at_home(Path(given or home / ".netrc"))
    if path is None:
        return None
    try:
        state = path.stat()
    except OSError:
        return None
    for name, user, password in _machines(str(path), state.st_mtime_ns, state.st_size):
        if name.lower() == host.lower():
            return user, password, str(path)
    return None


@lru_cache(maxsize=4)
def _machines(path: str, changed_ns: int, size: int) -> tuple[tuple[str, str, str], ...]:
    """The entries of a netrc file; none where it cannot be read, which is logged once.

    Args:
        path: of the file.
        changed_ns, size: its state; another one is read again.
    """
    del changed_ns, size
    try:
        read_small(path, _MAX_BYTES)
        read = netrc.netrc(path)
    except UnfitFileError as error:
        _warn_once(f"{error}; it is not used as a netrc file")
        return ()
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        logging.getLogger(__name__).warning(
            f"{path}{line}: cannot be read as a netrc file, and is not used"
        )
        return ()
    listed = ((name, read.authenticators(name)) for name in read.hosts if name != "default")
    return tuple((name, found[0] or "", found[2] or "") for name, found in listed if found)
