"""Reads the outputs of Triton's compiler for `aot.py`: IR, PTX and disassembled machine code.

Triton's last IR tells the accesses to tensors from those to per-sample scalars, since blocks and
scalars have different pointer types. `matched` assigns to each access its instructions in the PTX.
The 16-byte accesses are counted again in the machine code.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Access:
    """A global load or store in Triton's IR."""

    kind: str
    """ld or st."""
    elements: int
    """Elements of a program; 0 for a scalar."""
    size: int
    """Bytes of an element."""
    conditional: bool
    """Whether it lies inside an `scf.if`."""


def ir_accesses(ttgir: str) -> list[Access]:
    """All global loads and stores of a kernel's IR, in program order."""
    found: list[Access] = []
    regions: list[bool] = []  # for each open brace, whether it opens a branch of an scf.if
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("}") and regions:
            regions.pop()
        if text.split(" loc(")[0].endswith("{"):
            regions.append("scf.if" in text or "} else {" in text)
        match = re.search(r"\btt\.(load|store) .*: (?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)>", text)
        if match:
            operation, dims, bits = match.groups()
            elements = 0
            if dims:
                elements = 1
                for n in dims.rstrip("x").split("x"):
                    elements *= int(n)
            found.append(Access("ld" if operation == "load" else "st", elements, int(bits) // 8, any(regions)))
    return found


def ptx_widths(ptx: str) -> list[tuple[str, int]]:
    """(ld or st, bytes of a thread) of every global access in the PTX, in program order.

    Raises ValueError for an access that names no width.
    """
    found = []
    for kind, suffixes in re.findall(r"\b(ld|st)(?:\.\w+)*\.global((?:\.[\w:]+)+)", ptx):
        vector = re.search(r"\.v(\d)", suffixes)
        bits = re.search(r"\.[bufs](\d+)$", suffixes)
        if bits is None:
            raise ValueError(f"{kind}.global{suffixes} names no width")
        found.append((kind, int(vector[1] if vector else 1) * int(bits[1]) // 8))
    return found


def matched(accesses: list[Access], widths: list[tuple[str, int]], threads: int) -> list[tuple[Access, list[int]]]:
    """Each access with the widths in bytes of its instructions, both in program order.

    threads: of a program.
    Raises ValueError where the widths do not add up to the accesses.
    """
    remaining, result = list(widths), []
    for access in accesses:
        needed = access.size * max(1, access.elements // threads)
        instructions: list[int] = []
        while sum(instructions) < needed:
            if not remaining or remaining[0][0] != access.kind:
                raise ValueError(f"{access} has no instruction left: {remaining[:3]}")
            instructions.append(remaining.pop(0)[1])
        if sum(instructions) != needed:
            raise ValueError(f"{access} moves {sum(instructions)} bytes a thread where {needed} are expected")
        result.append((access, instructions))
    if remaining:
        raise ValueError(f"instructions without an access: {remaining}")
    return result


def index_bits(ptx: str) -> int:
    """Width of the arithmetic behind the addresses of 16-byte accesses: 32 or 64; 0 without any.

    32 means that indices have 32 bits until they are scaled by the size of an element. 64 means
    that an address depends on another product in 64 bits.
    """
    # The instruction that writes each 64-bit register, and the registers that are addresses.
    definitions = re.findall(r"^\s*([a-z][\w.]*)\s+(%rd\d+), (.*);", ptx, re.MULTILINE)
    written_by = {register: (operation, operands) for operation, register, operands in definitions}
    pending = re.findall(r"\.global[\w.:]*\.v4\.b32 [^\n;]*\[ (%rd\d+) ", ptx)
    # From each address back through the registers that it depends on.
    seen, bits = set(pending), 32 if pending else 0
    while pending:
        operation, operands = written_by.get(pending.pop(), ("", ""))
        factors = [int(n) for n in re.findall(r"(?<= )-?\d+(?=,|$)", operands)]
        if operation.startswith(("mul", "mad")):
            # A product of two registers, or of a register and more than the size of an element.
            bits = 64 if not factors or factors[0] > 8 else bits
        elif operation == "shl.b64" and factors[0] > 3:
            bits = 64
        new = set(re.findall(r"%rd\d+", operands)) - seen
        pending += new
        seen |= new
    return bits


def resources(usage: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL from the output of `cuobjdump --dump-resource-usage`."""
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def sass_wide(sass: str) -> int:
    """Number of 16-byte global accesses in machine code, the output of `nvdisasm -c`."""
    return len(re.findall(r"\b(?:LDG|STG)\.[\w.]*128", sass))


def tool(name: str, *arguments: str) -> str:
    """Standard output of an NVIDIA tool from the triton wheel, such as nvdisasm.

    Raises subprocess.CalledProcessError where the tool fails.
    """
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
