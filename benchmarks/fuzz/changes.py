"""How an input is changed: bytes, JSON, lines, pickles, tars, safetensors, zips.

Every function takes a generator of random numbers and a sound input, and returns a changed one. Half
of the changes know the format, so that checksums are right and what is behind them is reached.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NESTING = (33, 1000, 100_000)
"""Depths of nested lists and objects."""
_NESTED = "\ue000nested{}\ue000"
_NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64)
_ODD: tuple[Any, ...] = (
    *(None, True, False, "", [], {}, [[]], [{}], {"": ""}, [None], 0.5, -0.0, 1e300, -1e308),
    *(float("nan"), float("inf"), *_NUMBERS, *(-n for n in _NUMBERS), 10**400),
    *("0", "nan", "../../etc/passwd", "/dev/zero", "a/b", ".", "..", "\x1b[31m\x07", "\x00"),
    *("\ud800", "\u202e", "é" * 50, "x" * 5000, "https://u:p@host/?token=s", "%s%n{0}", "true"),
)
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, ord("-"), ord("9"), ord('"'), ord("{"), ord("\n"))


def change_bytes(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Flip, set, cut, repeat, insert or exchange bytes, one to four times; half of the time near
    the start."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        _change_bytes_once(rng, changed, others)
    return bytes(changed)


def _change_bytes_once(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    if not data:
        data += rng.randbytes(rng.randint(0, 40))
        return
    at = rng.randrange(min(len(data), 700) if rng.random() < 0.5 else len(data))
    length = rng.randint(1, 40)
    kind = rng.randrange(11)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.choice(_EDGES)
    elif kind == 2:
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    elif kind == 3:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 4:
        del data[at : at + length]
    elif kind == 5:
        data[at:at] = data[at : at + length]
    elif kind == 6 and rng.random() < 0.3:
        del data[at:]
    elif kind == 7:
        size = rng.choice((2, 4, 8))
        value = rng.choice(_NUMBERS) % 256**size
        order = "big" if rng.random() < 0.5 else "little"
        data[at : at + size] = value.to_bytes(size, order)[: len(data[at : at + size])]
    elif kind == 8 and others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[at : at + length] = other[start : start + rng.randint(1, 400)]
    elif kind == 9:
        data[at:at] = rng.choice((b"\xff", b"\xef\xbb\xbf", b"\x00" * 9, b"\r\n", b"9" * 5000))
    else:
        data[at] = (data[at] + rng.choice((1, 255))) % 256


def change_json(rng: Random, text: bytes, *, indent: int | None = None) -> bytes:
    """Replace, remove, rename, repeat, exchange and nest parts of a JSON text, one to three
    times."""
    try:
        tree = [json.loads(text)]
    except (ValueError, RecursionError):  # changed before
        return change_bytes(rng, text)
    for _ in range(rng.randint(1, 3)):
        _change_tree(rng, tree)
    written = json.dumps(tree[0] if tree else None, indent=indent)
    for depth in NESTING:
        mark = json.dumps(_NESTED.format(depth))
        if mark in written:
            start, end = rng.choice((("[", "]"), ('{"a":', "}")))
            written = written.replace(mark, start * depth + "0" + end * depth, 1)
    if rng.random() < 0.1 and "{" in written:  # a key twice
        at = rng.choice([i for i, c in enumerate(written) if c == "{"][:50])
        key = rng.choice(_keys(tree) or ["a"])
        written = f"{written[: at + 1]}{json.dumps(key)}: {json.dumps(rng.choice(_ODD[:20]))}, {written[at + 1 :]}"
    data = written.encode("utf-8", "surrogatepass")
    return change_bytes(rng, data) if rng.random() < 0.05 else data


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending and len(found) < 3000:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                pending.append(node[key])
    return found


def _keys(tree: Any) -> list[str]:
    return [key for node, key in _places(tree) if isinstance(node, dict)]


def _change_tree(rng: Random, tree: list[Any]) -> None:
    places = _places(tree)
    if not places:
        return
    node, key = rng.choice(places)
    value = node[key]
    kind = rng.randrange(10)
    if kind == 0 and node is not tree:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice((key + "x", "", key.upper(), "__class__"))] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.insert(key, value)
    elif kind == 3:
        other, place = rng.choice(places)
        # A copy: a tree that contains itself cannot be written.
        node[key] = json.loads(json.dumps(other[place])) if other is not tree else value
    elif kind == 4:
        node[key] = [value] if rng.random() < 0.5 else {"a": value}
    elif kind == 5:
        node[key] = json.dumps(value) if rng.random() < 0.5 else str(value)
    elif kind == 6 and rng.random() < 0.3:
        node[key] = _NESTED.format(rng.choice(NESTING))
    elif kind == 7 and isinstance(value, int | float):
        node[key] = rng.choice((value + 1, value - 1, -value, value * 2, value % 7 + 0.5))
    elif kind == 8 and isinstance(value, str):
        node[key] = change_bytes(rng, value.encode("utf-8", "replace")).decode(
            "utf-8", "surrogateescape"
        )
    else:
        node[key] = copy.deepcopy(rng.choice(_ODD))  # a later change may go into it


def change_lines(
    rng: Random, data: bytes, change: Callable[[Random, bytes], bytes] = change_json
) -> bytes:
    """Change, remove, repeat, exchange and tear lines; `change` is for a line."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        if not lines:
            break
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 2:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif kind == 3:
            lines[at] = change_bytes(rng, lines[at])
        elif kind == 4:
            lines[at] = lines[at].rstrip(b"\n") + rng.choice((b"\r\n", b"", b"\x00\n", b"\xff\n"))
        elif lines[at].startswith(b"{"):
            with_end = b"\n" if lines[at].endswith(b"\n") else b""
            lines[at] = change(rng, lines[at].split(b"\n")[0].rstrip(b"\x00\xff\r")) + with_end
    return b"".join(lines)


_HOSTILE = (
    b"cposix\nsystem\n(S'true'\ntR.",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R",
    b"r\x00\x00\x00\x10",  # LONG_BINPUT 2**28
    b"\x95\x00\x00\x00\x00\x00\x01\x00\x00",  # FRAME of 2**40
    b"\x8d\x00\x00\x00\x00\x00\x00\x00\x7f",  # BINUNICODE8, huge
    b"\x8e\xff\xff\xff\x7f\x00\x00\x00\x00",  # BINBYTES8 of 2 GiB
    b"\x96\xff\xff\xff\x7f\x00\x00\x00\x00",  # BYTEARRAY8 of 2 GiB
    b"\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
    b"N" + b"\x85" * 5000,  # a deeply nested tuple
    b"N" + b"2\x86" * 60,  # 2**60 leaves
    b"}N" + b"2\x86" * 60 + b"Ns",  # as a key
    *(b"(", b"t", b"l", b"d", b"]", b"}", b")", b"\x8f", b"0", b"1", b"2", b".", b"N", b"R", b"b"),
    *(
        b"\x81",
        b"\x92",
        b"\x94",
        b"h\x00",
        b"h\xff",
        b"j\x00\x00\x00\x10",
        b"P1\n",
        b"Q",
        b"\x82\x01",
    ),
    *(b"\x80\x63", b"\x97", b"\x98", b"K\xff", b"J\xff\xff\xff\x7f", b"I99999999999999999999\n"),
    b"L" + b"9" * 5000 + b"L\n",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
)


_ARGUMENT = dict.fromkeys(b"Khq\x80\x82", 1) | dict.fromkeys(b"M\x83", 2)
_ARGUMENT |= dict.fromkeys(b"Jjr\x84", 4) | dict.fromkeys(b"G\x95", 8)
_LENGTH = dict.fromkeys(b"UC\x8c\x8a", 1) | dict.fromkeys(b"TXB\x8b", 4)
_LENGTH |= dict.fromkeys(b"\x8d\x8e\x96", 8)
_LINES = dict.fromkeys(b"ILFSVPgp", 1) | dict.fromkeys(b"ci", 2)


def opcodes(data: bytes) -> list[bytes]:
    """A pickle in parts: each opcode with its argument; what follows the last one is a part too."""
    parts = []
    at = 0
    while at < len(data):
        code = data[at]
        end = at + 1 + _ARGUMENT.get(code, 0)
        if size := _LENGTH.get(code):
            end += size + int.from_bytes(data[at + 1 : at + 1 + size], "little")
        for _ in range(_LINES.get(code, 0)):
            line = data.find(b"\n", end)
            end = len(data) if line < 0 else line + 1
        parts.append(data[at:end])
        at = end
        if code == ord("."):
            break
    return [*parts, data[at:]] if at < len(data) else parts


def change_pickle(rng: Random, data: bytes) -> bytes:
    """Remove, repeat, exchange and insert whole opcodes, and change their arguments."""
    parts = opcodes(data)
    for _ in range(rng.randint(1, 3)):
        if not parts:
            break
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(7)
        if kind == 0:
            del parts[at : at + rng.randint(1, 3)]
        elif kind == 1:
            parts[at:at] = parts[at : at + rng.randint(1, 8)] * rng.choice((1, 1, 2, 500))
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind in (3, 4):
            parts.insert(at, rng.choice(_HOSTILE))
        elif len(parts[at]) > 1:
            parts[at] = parts[at][:1] + change_bytes(rng, parts[at][1:])
    changed = b"".join(parts)
    return change_bytes(rng, changed) if rng.random() < 0.1 else changed


def change_tar(rng: Random, data: bytes) -> bytes:
    """Change fields of headers, mostly with right checksums, or any bytes."""
    changed = bytearray(data)
    heads = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    for _ in range(rng.randint(1, 4)):
        if heads and rng.random() < 0.6:
            at = rng.choice(heads) + rng.choice((0, 3, 124, 124, 130, 135, 148, 156, 157, 257, 345))
            field = rng.choice(
                (
                    rng.randbytes(rng.randint(1, 12)),
                    b"77777777777\0",
                    b"\x80" + bytes(3) + b"\xff" * 8,
                    b"-0000000001\0",
                    b"/../../etc/passwd\0",
                    *(bytes([kind]) for kind in b"0123567xgLKSVDM"),
                )
            )
            changed[at : at + len(field)] = field[: len(changed) - at]
        else:
            _change_bytes_once(rng, changed, ())
    if rng.random() < 0.7:
        mend_tar(changed)
    return bytes(changed)


def mend_tar(data: bytearray) -> None:
    """Correct the checksums of everything that looks like a header."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def change_safetensors(rng: Random, data: bytes) -> bytes:
    """Change the header, mostly with its right length, or any bytes."""
    if rng.random() < 0.25:
        return change_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.4:
        names = [name for name in header if name != "__metadata__"]
        entry = header[rng.choice(names)]
        entry["dtype"] = rng.choice(
            ("I32", "F64", "BF16", "BOOL", "U8", "F8_E4M3", "F4", "C64", "X", entry["dtype"])
        )
        if rng.random() < 0.5:
            entry["shape"] = rng.choice(
                ([2**31, 2**31], [2**62], [], [0], [1] * 100, entry["shape"][::-1], [-1])
            )
        if rng.random() < 0.3:
            entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [4, 0], [0], [0, 4]))
        text = json.dumps(header).encode()
    else:
        text = change_json(rng, json.dumps(header).encode())
    length = len(text) if rng.random() < 0.9 else rng.choice(_NUMBERS) % 2**64
    return length.to_bytes(8, "little") + text + data[8 + size :]


def change_zip(
    rng: Random, data: bytes, change: Callable[[Random, bytes], bytes] = change_pickle
) -> bytes:
    """Change one member of a zip, with right checksums, or any bytes; `change` is for a member
    called data.pkl."""
    if rng.random() < 0.2:
        return change_bytes(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        names = source.namelist()
        chosen = "data.pkl" if rng.random() < 0.8 else rng.choice(names).rpartition("/")[2]
        for name in names:
            content = source.read(name)
            if name.endswith(f"/{chosen}"):
                if rng.random() < 0.05:
                    continue
                content = (change if chosen == "data.pkl" else change_bytes)(rng, content)
            target.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def change_words(rng: Random, data: bytes) -> bytes:
    """Change a text of words that are divided by zeros: options of a command, variables, patterns."""
    words = data.split(b"\0")
    for _ in range(rng.randint(1, 3)):
        if not words:
            break
        at = rng.randrange(len(words))
        kind = rng.randrange(6)
        if kind == 0:
            del words[at]
        elif kind == 1:
            words.insert(at, rng.choice(words))
        elif kind == 2:
            words[at] = str(rng.choice(_ODD[:-1])).encode("utf-8", "surrogatepass")
        elif kind == 3:
            name, mark, _ = words[at].partition(b"=")
            words[at] = name + mark + str(rng.choice(_ODD)).encode("utf-8", "surrogatepass")
        elif kind == 4:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        else:
            words[at] = change_bytes(rng, words[at]) if words[at] else b"x"
    return b"\0".join(word.replace(b"\0", b"") for word in words)
