"""The machine for pickles: what asks for more than it has is refused before anything is taken."""

from __future__ import annotations

import contextlib
import pickle
import random

import pytest

from fastmoco.checkpoint import pickle_machine
from fastmoco.checkpoint.pickle_machine import (
    PickleError,
    Record,
    UnknownNameError,
    read_pickle,
)
from tests.hostile_pickles import HOSTILE

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_data_come_back(protocol: int) -> None:
    data = [
        {"a": 1, "b": [True, False, None, 2.5, -7, 2**40, -(2**70)], 3: ("x", b"y", ()), "": {}},
        "é" * 300,
        {0: list(range(3000))},
    ]
    found, end = read_pickle(pickle.dumps(data, protocol) + b"rest", {"_codecs.encode": _encode})
    assert found == data
    assert end == len(pickle.dumps(data, protocol))


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def test_an_object_is_a_record_and_is_not_built() -> None:
    found, _ = read_pickle(pickle.dumps(random.Random()), {"random.Random": None})
    assert isinstance(found, Record)
    assert (found.name, len(found.state)) == ("random.Random", 3)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused(name: str) -> None:
    body, words = HOSTILE[name]
    if "DCP" in words:
        read_pickle(b"\x80\x04" + body, {})
        return
    with pytest.raises(PickleError) as error:
        read_pickle(b"\x80\x04" + body, {})
    assert words in str(error.value)


def test_a_name_that_is_not_known_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"os\.system"):
        read_pickle(b"cos\nsystem\n)R.", {})


def test_the_number_of_objects_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MOST_OBJECTS", 100)
    for content in (b"]" * 101, b"(]" + b"]" * 100 + b"e", b"}" * 101, b"N\x85" * 101):
        with pytest.raises(PickleError, match="more than 100 objects"):
            read_pickle(content + b".", {})
    with pytest.raises(PickleError, match="remembers more than 100 objects"):
        read_pickle(b"N" + b"\x94" * 102 + b".", {})
    monkeypatch.setattr(pickle_machine, "MOST_BYTES", 1000)
    with pytest.raises(PickleError, match="more than 1000 bytes"):
        read_pickle(b"N" * 1001 + b".", {})


def test_every_changed_byte_is_data_or_refused() -> None:
    """No change of a byte lets anything but a `PickleError` out."""
    sound = pickle.dumps({"a": [1, 2.5, (3, "b")], "c": {"d": None, "e": 2**40}}, 4)
    rng = random.Random(7)
    for _ in range(3000):
        content = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        with contextlib.suppress(PickleError):
            read_pickle(content, {})
