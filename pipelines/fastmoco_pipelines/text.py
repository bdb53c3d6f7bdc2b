"""Text as it may be shown: URLs without their secrets, names that cannot steer a terminal,
durations."""

from __future__ import annotations

import re
from urllib.parse import unquote

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

OBJECTS = ("s3", "gs")
"""Schemes of object stores: all after the bucket is the key, with every `?`, `#` and `%` in it."""

AUTHORITY = re.compile(r"[\w.{},-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")
"""Host and port of a URL, or of a pattern of URLs."""

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})")

_EACH_URL = re.compile(r"([^,{/]*)://(.*?)(?=,[^,{/:]*://|$)", re.DOTALL)
"""Scheme and rest of every URL in a pattern, which may be braces around several."""

_SIGNATURE = re.compile(
    r"[?&](x-(amz|goog)-[\w-]*|\w*(sig|token|key|secret|password|credential|auth)\w*)=",
    re.IGNORECASE,
)
"""What looks like the secret of a query, pasted behind a key."""


def redact(url: str) -> str:
    """A URL, or a pattern of URLs, as it may be shown: without user, password, query and
    fragment. The key of an object store has no query, and is shown whole, unless it looks like one
    with a secret.

    Of a URL without a host before its first slash, but with an "@" after it, only the scheme is
    shown: all before the "@" may be a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        match = SCHEME.match(url)  # a slip such as https:/user:password@host
        return f"{match.group(0)}..." if match and match.group(1).lower() in STORES else url
    if any(_hides_a_password(*found) for found in _EACH_URL.findall(url)):
        return escaped(f"{scheme}://...")
    schemes = {found[0].lower() for found in _EACH_URL.findall(url)}
    if not schemes <= set(OBJECTS) or _SIGNATURE.search(rest):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    rest = re.sub(r"://[^/@]*@", "://", rest)  # of the second URL in braces around two
    authority, slash, path = rest.partition("/")
    authority = authority.rpartition("@")[2]
    next_url = re.search(r",([^,:]+):$", authority)
    alone = authority[: next_url.start()] if next_url and next_url[1] in STORES else authority
    if authority and AUTHORITY.fullmatch(alone) is None:
        authority = "..."  # not a host: it may be part of a password
    return escaped(f"{scheme}://{authority}{slash}{path}")


def _hides_a_password(scheme: str, rest: str) -> bool:
    """Whether a URL has an "@" in its path, query or fragment, and no host before them."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    host = authority.rpartition("@")[2].rstrip("}")  # of braces around hosts
    local = scheme.lower() == "file" and not authority
    return "@" in rest[len(authority) :] and not local and AUTHORITY.fullmatch(host) is None


def first_sentence(doc: str | None) -> str:
    """The first sentence of a docstring on one line, for lists and help texts; "" for none."""
    paragraph = " ".join((doc or "").strip().partition("\n\n")[0].split())
    stop = re.search(r"(?<!\be\.g)(?<!\bi\.e)\.(?= |$)", paragraph)
    return paragraph[: stop.end()] if stop else paragraph


def variable_hint(path: str) -> str:
    """What to do about an environment variable in a path that the shell has not replaced; "" where
    there is none."""
    named = next((part for part in path.split("/") if _VARIABLE.match(part)), None)
    if named is None:
        return ""
    return f": a shell does not replace {escaped(named)} in single quotes, but in double quotes"


def in_ascii(text: str) -> str:
    """Text for a picture: Pillow's own font draws a box for a letter beyond ASCII, so it becomes an
    escape (`\\xfc`)."""
    return text.encode("ascii", "backslashreplace").decode()


def counted(count: int, what: str) -> str:
    """A number with its noun: `1 shard`, `2 shards`, `2 classes`."""
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{count} {what if count == 1 else plural}"


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme and host; path; query and fragment with their marks. Of an object store the path is
    the whole key."""
    scheme, separator, rest = url.partition("://")
    ends = r"/" if scheme.lower() in OBJECTS else r"[/?#]"
    found = re.search(ends, rest)
    at = found.start() if found else len(rest)
    path, tail = rest[at:], ""
    if scheme.lower() not in OBJECTS and (mark := re.search(r"[?#]", path)):
        path, tail = path[: mark.start()], path[mark.start() :]
    return f"{scheme}{separator}{rest[:at]}", path, tail


def without_user(url: str) -> str:
    """A URL without user and password."""
    head, path, tail = split_url(url)
    scheme, separator, authority = head.partition("://")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{path}{tail}"


def shard_name(url: str) -> str:
    """File name of a shard's URL, without its folder."""
    head, path, _ = split_url(url)
    name = path.rpartition("/")[2]
    return name if head.partition(":")[0].lower() in OBJECTS else unquote(name)


def escaped_lines(text: str) -> str:
    """A message of several lines, made fit as by `escaped`: a line break stays where two spaces
    follow, so that no name in it can begin a line of its own."""
    return "\n  ".join(escaped(line) for line in text.split("\n  "))


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
