"""Text as it may be shown: URLs without their secrets, names that cannot steer a terminal,
durations."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

STORES: dict[str, object] = {
    "http": "fastmoco_pipelines.stores.http",
    "https": "fastmoco_pipelines.stores.http",
    "s3": "fastmoco_pipelines.stores.object_store",
    "gs": "fastmoco_pipelines.stores.object_store",
}
"""The schemes of URLs that are read: scheme, in lower case -> a `stores.store.Store`, or the name
of the module whose `STORE` is one, imported with the first URL (`stores.table`). The table is here,
because messages must hide the secrets of every scheme, also where no store is ever used."""

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
"""The scheme at the beginning of a URL, two letters at least: `C:` is a drive."""

AUTHORITY = re.compile(r"[\w.{},-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")
"""Host and port of a URL, or of a pattern of URLs."""

_EACH_URL = re.compile(r"([^,{/]*)://(.*?)(?=,[^,{/:]*://|$)", re.DOTALL)
"""Scheme and rest of every URL in a pattern, which may be braces around several."""


def redact(url: str) -> str:
    """A URL, or a pattern of URLs, as it may be shown: without user, password, query and
    fragment.

    Of a URL without a host before its first slash, but with an "@" after it, only the scheme is
    shown: all before the "@" may be a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        match = SCHEME.match(url)  # a slip such as https:/user:password@host
        return f"{match.group(0)}..." if match and match.group(1).lower() in STORES else url
    if any(_hides_a_password(*found) for found in _EACH_URL.findall(url)):
        return ascii(f"{scheme}://...")[1:-1]
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    rest = re.sub(r"://[^/@]*@", "://", rest)  # of the second URL in braces around two
    authority, slash, path = rest.partition("/")
    authority = authority.rpartition("@")[2]
    next_url = re.search(r",([^,:]+):$", authority)
    alone = authority[: next_url.start()] if next_url and next_url[1] in STORES else authority
    if authority and AUTHORITY.fullmatch(alone) is None:
        authority = "..."  # not a host: it may be part of a password
    return ascii(f"{scheme}://{authority}{slash}{path}")[1:-1]


def _hides_a_password(scheme: str, rest: str) -> bool:
    """Whether a URL has an "@" in its path, query or fragment, and no host before them."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    host = authority.rpartition("@")[2].rstrip("}")  # of braces around hosts
    local = scheme.lower() == "file" and not authority
    return "@" in rest[len(authority) :] and not local and AUTHORITY.fullmatch(host) is None


def first_sentence(doc: str | None) -> str:
    """The first sentence of a docstring on one line, for lists and help texts; "" for none."""
    paragraph = " ".join((doc or "").strip().partition("\n\n")[0].split())
    sentence, stop, _ = f"{paragraph} ".partition(". ")
    return f"{sentence}." if stop else paragraph


def shard_name(url: str) -> str:
    """File name of a shard's URL, without its folder."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


def escaped(text: str, *, keep: str = "") -> str:
    """Text made fit for a terminal or a log: nothing in it can move the cursor.

    Args:
        text: from a tar, a decoder, a file's name.
        keep: characters that stay although they are not printable, e.g. a newline.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def spoken(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
