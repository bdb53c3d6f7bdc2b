"""Text as it may be shown: URLs without their secrets, names that cannot steer a terminal,
durations.

`shown` is for a text of any origin. `redact` is for a URL that is known to be one, and `escaped` for
a name.
"""

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

MOST_SHOWN = 1000
"""Characters of one word of a command line in a message; a path has at most 4096 bytes."""

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})")

_EACH_URL = re.compile(r"([^,{/]*)://(.*?)(?=,[^,{/:]*://|$)", re.DOTALL)
"""Scheme and rest of every URL in a pattern, which may be braces around several."""

_SIGNATURE = re.compile(
    r"[?&](x-(amz|goog)-[\w-]*|\w*(sig|token|key|secret|password|credential|auth)\w*)=",
    re.IGNORECASE,
)
"""What looks like the secret of a query, pasted behind a key."""

_URL_MARK = re.compile(r"://|%(?:25)*3a%(?:25)*2f%(?:25)*2f", re.IGNORECASE)
"""What follows the scheme of a URL, also percent-encoded."""
_BEFORE_MARK = re.compile(r"[{]*[\w.+-]*\Z", re.ASCII)
_WORD = re.compile(r"\S*")
_QUOTED = {mark: re.compile(rf"(?:[^\\{mark}\n]|\\.)*(?={mark})") for mark in "'\"`"}
"""The rest of a quoted text, in which the quote may be escaped."""
_TO_AT_SIGN = re.compile(r"[^\n@]{0,1000}@")
_SHELL_QUOTE = "'\"'\"'"
"""How `shlex.quote` writes a quote in a quoted word."""
_HINT = re.compile(r"%(?:25)*(?:3a|3d)|authorization|bearer|:[/\\]|hf_", re.IGNORECASE)
_USER = re.compile(r"(?<![^\s'\"=({,;])[^\s/@:'\"=({,;]+:(?=[^\s/@])")


def _without_password(found: re.Match[str]) -> str:
    """The word before an `@`, without the `user:password` at its end. In two steps: one pattern for
    both takes minutes for a long text in which a user may begin behind each comma."""
    user = _USER.search(found.string, found.start(), found.end() - 1)
    return found[0] if user is None else found.string[found.start() : user.start()] + "...@"


_OTHER_SECRETS = (
    (
        re.compile(
            r"(?i)\b((?:https?|s3|gs|ftp):(?!//)[/\\]+)[^\s@?]{0,500}[@?]\S*?(['\"]?[:;,.)]*)(?!\S)"
        ),
        r"\1...\2",
    ),
    (re.compile(r"(?<![^\s/@])[^\s/@]+@(?=[\w.\[-])"), _without_password),
    (re.compile(r"(?<=//)[^\s/@]+@"), "...@"),
    (
        re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*)['\"]?(?:basic|bearer|digest|aws4).*"),
        r"\1...",
    ),
    (re.compile(r"(?i)\b(bearer\s+)(?=\S{0,200}\d)\S{8,}"), r"\1..."),
    (
        re.compile(
            r"(?i)((?:(?:[?&;]|%(?:25)*(?:3f|26))[\w.-]{0,40}"
            r"(?:sig|token|key|secret|password|credential|auth)[\w.-]{0,40}"
            r"|\b(?:x-amz|x-goog)-[\w-]{1,40}|\b(?:password|passwd|access_token|client_secret))"
            r"(?:=|%(?:25)*3d))[^\s'\"&]+"
        ),
        r"\1...",
    ),
    (
        re.compile(
            r"(?i)\b((?:\w{1,60}_)?(?:token|secret|passw(?:or)?d|(?:access|api|secret)_key)"
            r"\s{0,2}=\s{0,2}['\"]?)[^\s'\"&]+"
        ),
        r"\1...",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "hf_..."),
)
"""Secrets that are in no whole URL: one with a slip (`https:/host`), `user:password@host`, the header
of a request, a query alone, a variable with its value (`HF_TOKEN=...`), a token of Hugging Face."""


def shown(text: str, *, keep: str = "") -> str:
    """A text of any origin as it may be shown or logged: as `without_secrets`, then as `escaped`.

    Args:
        text: a message, a name, what a library or a server has said.
        keep: characters that stay although they are not printable, e.g. a newline.
    """
    return escaped(without_secrets(text), keep=keep)


def without_secrets(text: str) -> str:
    """A text with every URL in it as `redact` shows it, also within quotes, nested, escaped as by
    `repr`, or percent-encoded; and without passwords and tokens outside of URLs.

    A text may end a URL anywhere: what follows up to the next space or quote counts as a part of it.
    """
    if not _may_hold_secrets(text):
        return text
    parts: list[str] = []
    at = 0
    while (mark := _URL_MARK.search(text, at)) is not None:
        before = _BEFORE_MARK.search(text, at, mark.start())
        start = before.start() if before else mark.start()
        end = _end_of_url(text, start, mark.end())
        encoded = mark[0].startswith("%")
        url = (
            text[start : mark.end()] + "..." * (end > mark.end())
            if encoded
            else redact(text[start:end])
        )
        parts += [text[at:start], url]
        at = end
    rest = "".join([*parts, text[at:]])
    for secret, instead in _OTHER_SECRETS:
        rest = secret.sub(instead, rest)
    return rest


def shown_word(word: str) -> str:
    """A word of a command line as it may be shown: a URL in it goes to its end, with all spaces. Of
    a long one, the beginning."""
    mark = word.find("://")
    before = _BEFORE_MARK.search(word, 0, max(mark, 0))
    start = before.start() if before else 0
    text = shown(word[:start] + redact(word[start:]) if mark >= 0 else word)
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[:MOST_SHOWN]}... ({len(text):,} characters)"


def _may_hold_secrets(text: str) -> bool:
    """Whether a text needs a closer look: most lines need none."""
    return "@" in text or "=" in text or "://" in text or bool(_HINT.search(text))


def _end_of_url(text: str, start: int, after: int) -> int:
    """Where a URL ends: at the quote that closes it, else at a space.

    Args:
        text: that has it.
        start: where the URL begins.
        after: where the part after the scheme begins.
    """
    opened = text[start - 1] if start else ""
    if opened in _QUOTED and (closed := _QUOTED[opened].match(text, after)):
        end = closed.end()
        while text.startswith(_SHELL_QUOTE, end):
            rest = _QUOTED["'"].match(text, end + len(_SHELL_QUOTE))
            end = rest.end() if rest else end + len(_SHELL_QUOTE)
        return end
    end = _word_end(text, after)
    end -= len(text[after:end]) - len(text[after:end].rstrip(":;,.)"))
    # A password with a space in it: up to the `@`, in the same line.
    authority = re.split(r"[/?#]", text[after:end], maxsplit=1)[0]
    if "@" in text[after:end] or AUTHORITY.fullmatch(authority):
        return end
    more = _TO_AT_SIGN.match(text, end)
    return _word_end(text, more.end()) if more else end


def _word_end(text: str, at: int) -> int:
    found = _WORD.match(text, at)
    return found.end() if found else at


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
    stop = re.search(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)\.(?= |$)", paragraph)
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


def shown_lines(text: str) -> str:
    """A message of several lines, made fit as by `shown`: a line break stays where two spaces
    follow, so that no name in it can begin a line of its own."""
    return "\n  ".join(escaped(line) for line in without_secrets(text).split("\n  "))


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
