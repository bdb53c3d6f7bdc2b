"""Compiling for absent GPUs: the reading of machine code on a made-up listing, and every op's
defaults for real."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import compiled
from benchmarks.aot import machine_code
from benchmarks.aot.machine_code import (
    AotCase,
    Assembled,
    Compiled,
    _instructions,
    _matrix_loops,
    read_code,
)
from benchmarks.compiled import OPS

ROOT = Path(__file__).resolve().parents[2]
LISTING = """
        /*0000*/                   FMUL R1, R2, R3 ;                       /* 0x00 */
        /*0010*/                   MOV R4, RZ ;                            /* 0x00 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   FMNMX R1, R2, R3, PT ;
        /*0060*/               @P1 BRA 0x80 ;
        /*0070*/                   BRA 0x10 ;
        /*0080*/                   EXIT ;
"""


def _case(**changes) -> AotCase:
    fields = {
        "name": "op.kernel",
        "kernel": None,
        "signature": {},
        "constexprs": {},
        "num_warps": 4,
        "num_stages": 2,
        "default_on": (90,),
        "matrix": True,
    }
    return AotCase(**(fields | changes))


def _compiled(**changes) -> Compiled:
    fields = {
        "registers": 200,
        "spill_bytes": 0,
        "shared_bytes": 1024,
        "opcodes": Counter(HGMMA=4),
        "loop_opcodes": Counter(),
    }
    return Compiled(**(fields | changes))


def test_a_listing_is_read_with_its_predicates_and_modifiers():
    opcodes = [opcode for _, opcode, _ in _instructions(LISTING)]
    assert opcodes == ["FMUL", "MOV", "HGMMA", "MUFU", "BRA", "FMNMX", "BRA", "BRA", "EXIT"]


def test_only_the_innermost_loop_with_a_matrix_product_counts():
    """The jump back to 0x10 holds the whole loop and an FMNMX that does not run in it."""
    assert _matrix_loops(_instructions(LISTING)) == Counter(HGMMA=1, MUFU=1, BRA=1)


def test_each_of_several_that_are_disassembled_together_keeps_its_own(monkeypatch):
    """The first and the last are two halves of one listing; between them is another architecture's."""
    listings = {90: LISTING, 80: "/*0000*/ HMMA R1 ;"}
    monkeypatch.setattr(machine_code, "_disassemble", lambda _, capability: listings[capability])
    first, other, last = read_code(
        [
            Assembled(90, 24, 8, 1024, bytes(0x50)),
            Assembled(80, 16, 0, 0, bytes(0x10)),
            Assembled(90, 32, 0, 512, bytes(0x40)),
        ]
    )
    looped = Counter(HGMMA=1, MUFU=1, BRA=1)
    assert first == Compiled(24, 8, 1024, Counter(FMUL=1, MOV=1) + looped, looped)
    assert other == Compiled(16, 0, 0, Counter(HMMA=1), Counter())
    assert last == Compiled(32, 0, 512, Counter(FMNMX=1, BRA=2, EXIT=1), Counter())


def test_only_sections_of_instructions_are_code():
    """Of a file with a section of data between two of instructions."""
    sections = [(0, 0, 0), (6, 64, 32), (3, 96, 16), (6, 112, 16)]  # flags, start, length
    headers = b"".join(
        struct.pack("<IIQQQQ24x", 0, 1, flags, 0, start, length)
        for flags, start, length in sections
    )
    head = struct.pack("<40xQ10xHH2x", 128, 64, len(sections))
    assert machine_code._code(head + b"a" * 32 + b"x" * 16 + b"b" * 16 + headers) == (
        b"a" * 32 + b"b" * 16
    )


def test_code_that_cannot_be_read_is_a_fault_of_its_own_row(monkeypatch):
    def disassemble(code: bytes, _: int) -> str:
        if b"?" in code:
            raise subprocess.CalledProcessError(1, "nvdisasm")
        return LISTING

    codes = {"good": bytes(0x50), "bad": b"?" * 0x50}
    monkeypatch.setattr(machine_code, "_disassemble", disassemble)
    monkeypatch.setattr(compiled, "_cases", lambda _: [_case(name=name) for name in codes])
    monkeypatch.setattr(
        compiled, "assemble_case", lambda case, at: Assembled(at, 24, 0, 1024, codes[case.name])
    )
    good, bad = compiled._measure([("op", "good", 90), ("op", "bad", 90)])
    assert good[2] is not None
    assert good[2].registers == 24
    assert bad[2] is None
    assert "is not disassembled" in bad[3][0]


@pytest.mark.parametrize(
    ("case", "compiled", "fault"),
    [
        (_case(), _compiled(), None),
        (_case(), _compiled(spill_bytes=8), "8 bytes of spills"),
        (_case(default_on=()), _compiled(spill_bytes=8), None),
        (_case(), _compiled(shared_bytes=232_449), "232449 bytes of shared memory"),
        (_case(), _compiled(opcodes=Counter(HMMA=4)), "no HGMMA"),
        (_case(matrix=False), _compiled(opcodes=Counter()), None),
        (
            _case(forbidden_in_loop=("FMUL",)),
            _compiled(loop_opcodes=Counter(FMUL=3)),
            "3 FMUL in the inner loop",
        ),
    ],
)
def test_each_gate_names_what_breaks_it(case, compiled, fault):
    found = compiled.faults(case, 90)
    assert found == [] if fault is None else (len(found) == 1 and fault in found[0])


QUICK = """
import contextlib, io, json
from benchmarks.compiled import OPS, main
found = {}
for op in OPS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(["--op", op, "--quick", "--jobs", "1"])
    found[op] = code, text.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def quick() -> dict[str, tuple[int, str]]:
    """Exit code and text of every op's quick compilation, in one process that imports once."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", QUICK],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_default_configuration_holds_its_gates_on_sm_90a(op, quick):
    """All configurations and architectures are compiled by `make kernels`."""
    code, text = quick[op]
    assert code == 0, text[-3000:]
    assert "\n0 compiled" not in text, "no configuration is a default on sm_90a"
