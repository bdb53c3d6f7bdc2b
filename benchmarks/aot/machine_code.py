"""Compile a kernel without a GPU and read the cost of its machine code.

Triton brings NVIDIA's assembler and disassembler. So registers, spills, shared memory and
instruction counts of every configuration that a launcher may pick are known, and gated, on a
machine without a GPU.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block may use."""
MATRIX_OPCODES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The tensor-core instruction of each architecture that bf16 and fp16 products must compile to."""


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One configuration of one kernel.

    Attributes:
        name: `"<op>.<kernel> <what sets it apart>"`, unique.
        kernel: the function under `@triton.jit`.
        signature: type of every argument by name, in order: `"*bf16"`, `"i32"`, `"fp32"`,
            `"constexpr"`.
        constexprs: value of every constexpr.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        targets: compute capabilities (80, 90, 100) that the launcher may use this configuration on.
        default_on: those of `targets` where it is the launcher's default: no spills allowed there.
        aligned: arguments that are divisible by 16, pointers and strides alike.
        matrix: whether the architecture's own tensor-core instruction must appear.
        forbidden_in_loop: opcodes that must not be in a loop with tensor-core instructions.
        quick: whether a quick look, as in `make test`, compiles it if it is a default; the others
            are for `make kernels`.
        fp_fusion: whether products and sums may become fused multiply-adds, as in the launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[int, ...] = (80, 90, 100)
    default_on: tuple[int, ...] = ()
    aligned: tuple[str, ...] = ()
    matrix: bool = False
    forbidden_in_loop: tuple[str, ...] = ()
    quick: bool = True
    fp_fusion: bool = True


@dataclass(frozen=True)
class Assembled:
    """One configuration for one architecture: what the assembler says of it, and its machine code."""

    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    code: bytes


@dataclass(frozen=True)
class Compiled:
    """What one configuration costs on one architecture.

    Attributes:
        registers: per thread.
        spill_bytes: stores and loads of spilled registers per thread.
        shared_bytes: shared memory per block.
        opcodes: count of each instruction in the whole kernel.
        loop_opcodes: the same for the loops that hold tensor-core instructions.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    opcodes: Counter[str]
    loop_opcodes: Counter[str]

    def faults(self, case: AotCase, capability: int) -> list[str]:
        """Every gate that this configuration breaks; empty if it holds."""
        found = []
        if capability in case.default_on and self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of spills in a default configuration")
        if self.shared_bytes > SHARED_LIMITS[capability]:
            found.append(
                f"{self.shared_bytes} bytes of shared memory; the chip has "
                f"{SHARED_LIMITS[capability]}"
            )
        if case.matrix and not self.opcodes[MATRIX_OPCODES[capability]]:
            found.append(f"no {MATRIX_OPCODES[capability]}")
        found += [
            f"{self.loop_opcodes[opcode]} {opcode} in the inner loop"
            for opcode in case.forbidden_in_loop
            if self.loop_opcodes[opcode]
        ]
        return found


def assemble_case(case: AotCase, capability: int) -> Assembled:
    """Compile for one architecture; needs triton (outside its interpreter) and no GPU.

    Raises:
        RuntimeError: with the assembler's message, if the code does not assemble.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        case.kernel,
        dict(case.signature),
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills, binary = _assemble(kernel.asm["ptx"], ARCHITECTURES[capability])
    shared = int(kernel.metadata.shared)
    return Assembled(capability, registers, spills, shared, _code(binary))


def read_code(assembled: Sequence[Assembled]) -> list[Compiled]:
    """What each of them costs.

    One call for each architecture disassembles all: the disassembler takes half a second to start.
    """
    costs: dict[int, Compiled] = {}
    for capability in {one.capability for one in assembled}:
        places = [i for i, one in enumerate(assembled) if one.capability == capability]
        code = b"".join(assembled[i].code for i in places)
        instructions = _instructions(_disassemble(code, capability))
        start = 0
        for i in places:
            one = assembled[i]
            end = start + len(one.code)
            own = [found for found in instructions if start <= found[0] < end]
            costs[i] = Compiled(
                registers=one.registers,
                spill_bytes=one.spill_bytes,
                shared_bytes=one.shared_bytes,
                opcodes=Counter(opcode for _, opcode, _ in own),
                loop_opcodes=_matrix_loops(own),
            )
            start = end
    return [costs[i] for i in range(len(assembled))]


def _tools() -> Path:
    """The folder of NVIDIA's tools that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def _assemble(ptx: str, architecture: str) -> tuple[int, int, bytes]:
    """Registers, spilled bytes and the file of machine code.

    Newer PTX needs the newer of the two bundled assemblers.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        for assembler in ("ptxas", "ptxas-blackwell"):
            if not (_tools() / assembler).exists():
                continue
            done = subprocess.run(
                [_tools() / assembler, "-v", f"--gpu-name={architecture}", source, "-o", binary],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"{architecture}: {done.stderr.strip()[-500:]}")
        elf = binary.read_bytes()
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    if registers is None:
        raise RuntimeError(
            f"{architecture}: the assembler names no registers: {done.stderr.strip()[-500:]}"
        )
    return int(registers[1]), sum(map(int, spills)), elf


def _code(elf: bytes) -> bytes:
    """The sections of an ELF file that hold instructions (SHF_EXECINSTR), one after another."""
    (headers,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    code = b""
    for header in range(headers, headers + size * count, size):
        _, _, flags, _, start, length = struct.unpack_from("<IIQQQQ", elf, header)
        if flags & 4:
            code += elf[start : start + length]
    return code


def _disassemble(code: bytes, capability: int) -> str:
    """The listing of bare instructions; addresses, and those that are jumped to, count from the
    first.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        architecture = ARCHITECTURES[capability].replace("sm_", "SM")
        return subprocess.run(
            [_tools() / "nvdisasm", f"--binary={architecture}", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def _instructions(listing: str) -> list[tuple[int, str, str]]:
    """(address, opcode without its modifiers, whole text) of every instruction of a disassembly."""
    found = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing):
        words = text.split()
        if words and words[0].startswith("@"):
            words = words[1:]
        if words:
            found.append((int(address, 16), words[0].split(".")[0], text))
    return found


def _matrix_loops(instructions: list[tuple[int, str, str]]) -> Counter[str]:
    """Opcodes inside every innermost loop (the span of a backward branch) that holds a tensor-core
    instruction.

    Code that waits on a barrier is moved to the end of a kernel and jumps back from there; such a
    span holds a whole loop and is none itself, which is why only spans without a smaller one inside
    count.
    """
    matrix = [address for address, opcode, _ in instructions if opcode in MATRIX_OPCODES.values()]
    spans = []
    for address, opcode, text in instructions:
        target = re.search(r"\b0x([0-9a-f]+)\s*$", text) if opcode == "BRA" else None
        if target is not None and any(int(target[1], 16) <= at < address for at in matrix):
            spans.append((int(target[1], 16), address))
    innermost = [
        (start, end)
        for start, end in spans
        if not any(
            start <= low and high <= end and (start, end) != (low, high) for low, high in spans
        )
    ]
    return Counter(
        opcode
        for address, opcode, _ in instructions
        if any(start <= address <= end for start, end in innermost)
    )
