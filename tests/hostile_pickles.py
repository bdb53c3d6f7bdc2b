"""Pickles that ask for more than they are: memory, time, names, objects that they do not contain."""

from __future__ import annotations


def _long(opcode: bytes, size: int, width: int) -> bytes:
    return opcode + size.to_bytes(width, "little")


def nested_tuple(depth: int = 60) -> bytes:
    """A tuple that contains itself twice, and so on: its hash takes 2^depth steps."""
    return b"K\x01K\x01\x86\x94" + b"".join(
        b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x94" for level in range(depth)
    )


HOSTILE: dict[str, tuple[bytes, str]] = {
    # name: (what follows the protocol, words of the refusal)
    "a nested tuple as key": (nested_tuple() + b"}h\x3cNs.", "a tuple is no key"),
    "a nested tuple as key, in a table": (b"}(" + nested_tuple() + b"Nu.", "a tuple is no key"),
    "a list as key": (b"}]Ns.", "a list is no key"),
    "a large number as key": (b"}\x8a\x08" + b"\x7f" * 8 + b"Ns.", "a int is no key"),
    "a memo index of 2^28": (b"]" + _long(b"r", 1 << 28, 4) + b".", "memo index of 268435456"),
    "a memo index of 200": (b"]q\xc8.", "memo index of 200, and 0 are in use"),
    "a memo that is empty": (b"h\x05.", "a value that it does not contain"),
    "a long memo that is empty": (_long(b"j", 1 << 31, 4) + b".", "does not contain"),
    "a frame of 2^40": (_long(b"\x95", 1 << 40, 8) + b"N.", "a frame of 1099511627776 bytes"),
    "bytes of 2^40": (_long(b"\x8e", 1 << 40, 8) + b".", "opcode 0x8e"),
    "a text of 2^40": (_long(b"\x8d", 1 << 40, 8) + b".", "opcode 0x8d"),
    "an array of 2^40": (_long(b"\x96", 1 << 40, 8) + b".", "opcode 0x96"),
    "a text of 4 GB": (_long(b"X", 0xFFFFFFFF, 4) + b"a.", "asks for 4294967295 bytes"),
    "bytes of 4 GB": (_long(b"B", 0xFFFFFFFF, 4) + b"a.", "asks for 4294967295 bytes"),
    "a number of 2 GB": (_long(b"\x8b", 0x7FFFFFFF, 4) + b"a.", "opcode 0x8b"),
    "a number of 255 bytes": (b"\x8a\xff" + b"\x7f" * 255 + b".", "a whole number of 255 bytes"),
    "digits without end": (b"I" + b"9" * 9999 + b"\n.", "opcode 0x49"),
    "a thousand marks": (b"(" * 1000 + b"t" * 1000 + b".", "nested deeper than 100"),
    "an end without a beginning": (b"Nt.", "does not contain"),
    "an empty stack": (b"\x86.", "does not contain"),
    "nothing to return": (b".", "does not contain"),
    "half an item": (b"}(Nu.", "an item of what is no dictionary"),
    "an item of a tuple": (b")NNs.", "an item of what is no dictionary"),
    "an end of a text": (b"]\x8c\x01aa.", "instead of DCP's metadata"),
    "appended to a tuple": (b")Na.", "no list"),
    "a persistent id": (b"NQ.", "something outside"),
    "a persistent name": (b"Pstorage\n.", "opcode 0x50"),
    "an extension": (b"\x82\x01.", "opcode 0x82"),
    "a buffer": (b"\x97.", "opcode 0x97"),
    "a call of a text": (b"\x8c\x01a)R.", "calls what is no name"),
    "an object of keywords": (b"N)}\x92.", "opcode 0x92"),
    "a name that is no text": (b"NN\x93.", "names ?"),
    "a name without an end": (b"cposix", "no end"),
    "no UTF-8": (b"\x8c\x01\xff.", "not UTF-8"),
    "no end": (b"N", "ends too early"),
    "built of a list": (b"]Nb.", "builds what is no object"),
}
"""By what is wrong with it."""
