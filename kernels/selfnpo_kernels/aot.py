"""Compile every Triton kernel on a machine without a GPU, and hold what comes out against the contract.

    python -m selfnpo_kernels.aot [--arch 80 90 100] [--quick] [--json FILE]

The launchers themselves are run on tensors without memory and their launches recorded, so constexprs, warps and
alignments are those of a real call. One line a kernel: registers; spills (bytes of stack and local memory, from the
wheel's cuobjdump); shared memory; the widths in bytes of all accesses to tensors; bytes moved per element against the
floor of `FLOORS`, those moved only for samples that restart after a +. Exit status 1 on any spill, any access to a
tensor narrower than 16 bytes, any byte above the floor, 64-bit indices where 32 bits do (or the reverse), or an
instruction that cannot be accounted for.

What is a tensor access is decided in Triton's last IR, where loads and stores of blocks and of per-sample scalars
differ by type; each is then matched with its instructions in the PTX, and the 16-byte ones are counted again in the
machine code (nvdisasm). Not held to a width: scalars; the partial sums of the second, tiny kernels; the last seven
elements of a parameter in `ema_update`; row lengths that are no multiple of 16 bytes, shown for information. sm_100 is
reported and never fails the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# Bytes that a call cannot do without, counted in elements read and written: (network output and its kin, state and its
# kin, state of samples that restart, float32 masters).
FLOORS = {
    "normal": (0, 1, 0, 0),  # writes
    "affine_noise": (0, 2, 0, 0),  # x; out
    "affine_noise, noise given": (1, 2, 0, 0),
    "affine_noise, a row and a draw for each": (0, 2, 0, 0),
    "guidance_rescale": (2, 0, 0, 0),  # pos, neg
    "guided_step": (2, 3, 0, 0),  # pos, neg, x; x_next, x0
    "guided_step, one branch": (1, 3, 0, 0),
    "guided_step, everything": (2, 4, 0, 0),  # and x0_prev
    "tdft_step, from noise": (2, 4, 2, 0),  # pos, neg, x; x, target, x_s; final in, final out
    "tdft_step, unconditional": (1, 4, 2, 0),
    "tdft_step, naive": (2, 4, 2, 0),
    "tdft_step, from data": (1, 4, 1, 0),  # pos, x; x, target, x_s; latents
    "x0_loss, l2": (2, 2, 0, 0),  # pred, x_s, target; slope
    "x0_loss, huber": (2, 2, 0, 0),
    "x0_loss, no slope": (1, 2, 0, 0),
    "x0_loss_backward": (2, 0, 0, 0),  # slope; out
    "ema_update": (2, 0, 0, 2),  # live, master; master, shadow
    "ema_update, no shadow": (1, 0, 0, 2),
}
MIXTURES = {  # network output, state
    "fp32": (torch.float32, torch.float32),
    "bf16/fp32": (torch.bfloat16, torch.float32),
    "fp16/fp32": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32/bf16": (torch.float32, torch.bfloat16),
}
SHAPES = {  # samples, elements of one
    "common": (80, 4 * 64 * 64),
    "64-bit": (2**18, 4 * 64 * 64),
    "small": (64, 4 * 8 * 8),
    "video": (1, 13 * 16 * 60 * 90),  # its last block is not full
    "awkward": (3, 3 * 63 * 65),
}
REPORTED_ONLY = (100,)


@dataclass
class Row:
    """One compiled kernel."""

    call: str
    kernel: str
    mixture: str
    shape: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    scalars: int = 0
    bytes: tuple[float, float] = (0.0, 0.0)
    floor: tuple[float, float] | None = None
    index_bits: int = 0
    problems: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether the run fails for it."""
        return self.arch not in REPORTED_ONLY and bool(self.error or self.problems)


# What the compiler's outputs say


@dataclass(frozen=True)
class Access:
    """A load or store in Triton's IR."""

    kind: str  # ld or st
    elements: int  # of a program; 0 for a scalar
    size: int  # bytes an element
    conditional: bool


def ir_accesses(ttgir: str) -> list[Access]:
    """All global loads and stores, in program order; what lies inside an `scf.if` is conditional."""
    found, regions = [], []
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
    """(ld or st, bytes a thread) of every global access, in program order."""
    found = []
    for kind, suffixes in re.findall(r"\b(ld|st)(?:\.\w+)*\.global((?:\.[\w:]+)+)", ptx):
        vector = re.search(r"\.v(\d)", suffixes)
        bits = re.search(r"\.[bufs](\d+)$", suffixes)
        found.append((kind, int(vector[1] if vector else 1) * int(bits[1]) // 8))
    return found


def matched(accesses: list[Access], widths: list[tuple[str, int]], threads: int) -> list[tuple[Access, list[int]]]:
    """The widths of the instructions that make each access. Raises ValueError where they do not add up."""
    rest, result = list(widths), []
    for access in accesses:
        needed = access.size * max(1, access.elements // threads)
        own: list[int] = []
        while sum(own) < needed:
            if not rest or rest[0][0] != access.kind:
                raise ValueError(f"{access} has no instruction left: {rest[:3]}")
            own.append(rest.pop(0)[1])
        if sum(own) != needed:
            raise ValueError(f"{access} moves {sum(own)} bytes a thread where {needed} are expected")
        result.append((access, own))
    if rest:
        raise ValueError(f"instructions without an access: {rest}")
    return result


def index_bits(ptx: str) -> int:
    """64 where the address of a 16-byte access holds a product of more than an element's size, made in 64 bits; 32
    where indices are 32 bits wide until they are scaled by that size; 0 without such accesses."""
    definitions = re.findall(r"^\s*([a-z][\w.]*)\s+(%rd\d+), (.*);", ptx, re.MULTILINE)
    made = {target: (operation, rest) for operation, target, rest in definitions}
    todo = re.findall(r"\.global[\w.:]*\.v4\.b32 [^\n;]*\[ (%rd\d+) ", ptx)
    seen, bits = set(todo), 32 if todo else 0
    while todo:
        operation, operands = made.get(todo.pop(), ("", ""))
        factors = [int(n) for n in re.findall(r"(?<= )-?\d+(?=,|$)", operands)]
        if operation.startswith(("mul", "mad")):
            # Two registers multiplied, or a register and more than a size.
            bits = 64 if not factors or factors[0] > 8 else bits
        elif operation == "shl.b64" and factors[0] > 3:
            bits = 64
        new = set(re.findall(r"%rd\d+", operands)) - seen
        todo += new
        seen |= new
    return bits


def resources(usage: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one function in what `cuobjdump --dump-resource-usage` prints."""
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def sass_wide(sass: str) -> int:
    """16-byte global accesses in machine code."""
    return len(re.findall(r"\b(?:LDG|STG)\.[\w.]*128", sass))


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# The launches


def calls(net: torch.dtype, state: torch.dtype, samples: int, count: int) -> dict[str, Callable[[], object]]:
    """A call of the launcher for every entry of `FLOORS`, on tensors without memory."""
    from selfnpo_kernels import triton as ops

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    p, x = empty(samples, count, dtype=net), empty(samples, count, dtype=state)
    index, slots = empty(samples, dtype=torch.int64), empty(4, samples, dtype=torch.int64)
    each = empty(samples, 2)
    weight, k2, k7 = empty(samples), empty(50, 2), empty(50, 7)
    key = (None, 1, index, 0, None)
    tables = (empty(26, 7), empty(26, 2), empty(26, 1000, 2), empty(26, dtype=torch.int64), empty(26))
    rules, naive = (700, 80, 5, 1, 0.1, False, False), (700, 80, 5, 1, 0.1, True, True)
    # An odd row length comes with a view that begins between two 16-byte boundaries.
    masters, live = [empty(samples * count)], [empty(samples * count + 1, dtype=net)[count % 2 :][: samples * count]]
    return {
        "normal": lambda: ops.normal(index, (count,), 1, 0, None, state),
        "affine_noise": lambda: ops.affine_noise(x, k2, index, *key),
        "affine_noise, noise given": lambda: ops.affine_noise(x, k2, index, p, 0, None, 0, None),
        "affine_noise, a row and a draw for each": lambda: ops.affine_noise(x, each, None, None, 1, index, 0, index),
        "guidance_rescale": lambda: ops.guidance_rescale(p, p, k7, index, 0.7),
        "guided_step": lambda: ops.guided_step(p, p, x, k7, index, None, None, None, 0, None, 0, None),
        "guided_step, one branch": lambda: ops.guided_step(p, None, x, k7, index, None, None, None, 0, None, 0, None),
        "guided_step, everything": lambda: ops.guided_step(p, p, x, k7, index, weight, x, *key),
        "tdft_step, from noise": lambda: ops.tdft_step(p, p, x, x, slots, slots, *tables, None, *rules),
        "tdft_step, unconditional": lambda: ops.tdft_step(None, p, x, x, slots, slots, *tables, None, *rules),
        "tdft_step, naive": lambda: ops.tdft_step(p, p, x, x, slots, slots, *tables, None, *naive),
        "tdft_step, from data": lambda: ops.tdft_step(
            p, None, x, None, slots, slots, *tables, empty(700, count, dtype=state), *rules
        ),
        "x0_loss, l2": lambda: ops.x0_loss(p, x, x, k2, index, weight, "l2", 1e-3, True),
        "x0_loss, huber": lambda: ops.x0_loss(p, x, x, k2, index, weight, "huber", 1e-3, True),
        "x0_loss, no slope": lambda: ops.x0_loss(p, x, x, k2, index, weight, "huber", 1e-3, False),
        "x0_loss_backward": lambda: ops.x0_loss_backward(p, k2, index, weight, empty()),
        "ema_update": lambda: ops.ema_update(masters, live, live, 0.999),
        "ema_update, no shadow": lambda: ops.ema_update(masters, live, [], 0.999),
    }


def floor(call: str, net: torch.dtype, state: torch.dtype) -> tuple[float, float]:
    """(bytes per element that every sample moves, more that a restarting one may)."""
    nets, states, restarting, masters = FLOORS[call]
    return nets * net.itemsize + states * state.itemsize + masters * 4.0, restarting * float(state.itemsize)


def compiled(kernel, arguments: tuple, options: dict, arch: int):
    """`kernel` as its launch on a device of compute capability `arch` would have it, ints and pointers specialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*arguments, **options)
    chosen, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialisation, None)
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=chosen.__dict__)


def examine(row: Row, binary, options: dict, main: bool) -> None:
    """Fill in what the compiled kernel is like, and what is wrong with it. `main`: not a tiny second kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = resources(_tool("cuobjdump", "--dump-resource-usage", file.name))
        wide = sass_wide(_tool("nvdisasm", "-c", file.name))
    row.registers, row.spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
    row.shared = binary.metadata.shared
    row.index_bits = index_bits(binary.asm["ptx"])
    if row.spills:
        row.problems.append(f"{row.spills} bytes of stack or local memory")
    if not main:
        return
    block = options.get("BLOCK", options.get("CHUNK"))  # elements that a program works on
    threads = 32 * binary.metadata.num_warps
    accesses = matched(ir_accesses(binary.asm["ttgir"]), ptx_widths(binary.asm["ptx"]), threads)
    row.scalars = sum(access.elements == 0 for access, _ in accesses)
    tensors = [(access, widths) for access, widths in accesses if access.elements >= block]
    row.loads = [w for access, widths in tensors if access.kind == "ld" for w in widths]
    row.stores = [w for access, widths in tensors if access.kind == "st" for w in widths]
    row.bytes = tuple(
        sum(threads * sum(widths) for access, widths in tensors if access.conditional == conditional) / block
        for conditional in (False, True)
    )
    if row.shape == "awkward":
        return
    # Whole addresses come from ema_update's table.
    bits = 64 if row.shape == "64-bit" or row.call.startswith("ema_update") else 32
    if row.index_bits != bits:
        row.problems.append(f"{row.index_bits}-bit indices instead of {bits}-bit ones")
    narrow = [w for w in row.loads + row.stores if w < 16]
    if narrow:
        row.problems.append(f"{len(narrow)} tensor accesses below 16 bytes")
    elif wide != len(row.loads) + len(row.stores):
        row.problems.append(f"{wide} accesses of 16 bytes in machine code, {len(row.loads + row.stores)} in the PTX")
    if row.bytes != row.floor:
        row.problems.append(f"{row.bytes} bytes an element, floor {row.floor}")


def _work(job: tuple[str, str, str, int]) -> list[Row]:
    """Compile and examine the kernels of one call."""
    from selfnpo_kernels.triton import common

    call, mixture, shape, arch = job
    net, state = MIXTURES[mixture]
    with common.recorded() as launches:
        calls(net, state, *SHAPES[shape])[call]()
    rows = []
    for i, (kernel, arguments, options) in enumerate(launches):
        row = Row(call, kernel.__name__, mixture, shape, arch, floor=floor(call, net, state) if i == 0 else None)
        try:
            binary = compiled(kernel, arguments, options, arch)
            examine(row, binary, options, main=i == 0)
        except Exception as error:  # one kernel's failure is a line of the report, whatever it is
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
    return rows


# The report


def mixtures(call: str, shape: str) -> list[str]:
    """The mixtures in which a call is compiled for a shape; a call that knows one dtype meets each of them once."""
    nets, states, _, _ = FLOORS[call]
    both = bool(nets and states)
    few = {"64-bit": ["fp32"], "small": ["bf16/fp32" if both else "bf16"], "video": ["bf16/fp32" if both else "bf16"]}
    return [name for name in few.get(shape, MIXTURES) if both or "/" not in name]


def jobs(architectures: list[int], quick: bool) -> list[tuple[str, str, str, int]]:
    """What to compile: (call, mixture, shape, architecture)."""
    chosen = []
    for arch in architectures:
        if quick:
            chosen += [(call, "bf16/fp32", "common", arch) for call in FLOORS]
            chosen += [(call, "fp32", "64-bit", arch) for call in ("affine_noise", "tdft_step, from data")]
            continue
        for shape in SHAPES:
            chosen += [(call, mixture, shape, arch) for call in FLOORS for mixture in mixtures(call, shape)]
    return chosen


def _table(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        widths = " ".join(f"{kind} {sorted(set(w))}x{len(w)}" for kind, w in (("ld", r.loads), ("st", r.stores)) if w)
        moved = "" if r.floor is None else f"{r.bytes[0]:g}+{r.bytes[1]:g} of {r.floor[0]:g}+{r.floor[1]:g}"
        lines.append(
            f"sm_{r.arch:<4}{r.shape:8} {r.mixture:10} {r.call:40} {r.kernel:26} {r.registers:4} {r.spills:3} "
            f"{r.shared:6} {moved:18} {widths} {r.error or '; '.join(r.problems)}"
        )
    head = f"{'arch':7}{'rows':8} {'dtypes':10} {'call':40} {'kernel':26} regs spl shared {'bytes/element':18} widths"
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, write the JSON; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m selfnpo_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--quick", action="store_true", help="one mixture and row length, two 64-bit kernels")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # the workers import triton; this process does not
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        rows = [row for group in pool.imap(_work, jobs(chosen.arch, chosen.quick)) for row in group]
    print(_table(rows))
    failed = [row for row in rows if row.failed]
    print(f"{len(rows)} kernels, {len(failed)} failed")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) | {"failed": row.failed} for row in rows], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
