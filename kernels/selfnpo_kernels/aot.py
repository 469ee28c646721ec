"""Compiles every Triton kernel on a machine without a GPU, and checks the machine code.

    python -m selfnpo_kernels.aot [--arch 80 90 100] [--quick] [--json FILE]

The launchers run on tensors without memory, and their launches are recorded: constexprs, warps and
alignments are those of a real call. The report has one line for each kernel:

- registers; - spills, in bytes of stack and local memory (from the cuobjdump of the triton wheel);
- bytes of shared memory; - bytes moved for each element, and the floor from `FLOORS`. The number
after the + counts bytes that are moved only for samples that restart;
- the widths in bytes of all accesses to tensors.

The exit status is 1 where a kernel spills, accesses a tensor in fewer than 16 bytes, moves more or
fewer bytes than the floor, computes 64-bit indices where 32 bits are enough (or the reverse), or
has an instruction that belongs to no access. `machine_code.py` reads the outputs of the compiler.

Some accesses may have any width: scalars; the partial sums of the second, tiny kernels; the last
seven elements of a parameter in `ema_update`; and row lengths that are no multiple of 16 bytes,
which are in the report for information. sm_100 is reported, and never fails the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from selfnpo_kernels.machine_code import index_bits, ir_accesses, matched, ptx_widths, resources, sass_wide, tool

# The fewest elements that a call can read and write: (network outputs and tensors of their dtype,
# states and tensors of their dtype, states of samples that restart, float32 masters).
FLOORS = {
    "normal": (0, 1, 0, 0),  # writes
    "affine_noise": (0, 2, 0, 0),  # x; out
    "affine_noise, noise given": (1, 2, 0, 0),
    "affine_noise, a row and a draw for each": (0, 2, 0, 0),
    "guidance_rescale": (2, 0, 0, 0),  # pos, neg
    "guided_step": (2, 3, 0, 0),  # pos, neg, x; x_next, x0
    "guided_step, one branch": (1, 3, 0, 0),
    "guided_step, x0_prev and noise": (2, 4, 0, 0),
    "guided_step, everything": (2, 5, 0, 0),  # and x0_prev, x0_prev2
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
    """One compiled kernel: a line of the report."""

    call: str
    """Key of `FLOORS`."""
    kernel: str
    """Name of the kernel's function."""
    mixture: str
    """Key of `MIXTURES`."""
    shape: str
    """Key of `SHAPES`."""
    arch: int
    """Compute capability, such as 90."""
    registers: int = 0
    """Registers of a thread."""
    spills: int = 0
    """Bytes of stack and local memory."""
    shared: int = 0
    """Bytes of shared memory."""
    loads: list[int] = field(default_factory=list)
    """Bytes that a thread reads with each instruction that loads from a tensor."""
    stores: list[int] = field(default_factory=list)
    """Bytes that a thread writes with each instruction that stores to a tensor."""
    scalars: int = 0
    """Number of accesses to scalars."""
    bytes: tuple[float, float] = (0.0, 0.0)
    """Bytes moved for each element: (of every sample, more of a sample that restarts)."""
    floor: tuple[float, float] | None = None
    """The fewest `bytes` that the call can move; None for the second kernel of a launcher."""
    index_bits: int = 0
    """Width of the index arithmetic: 32 or 64; 0 without 16-byte accesses."""
    problems: list[str] = field(default_factory=list)
    """What fails the run, in words."""
    error: str = ""
    """First line of the exception, where compiling or examining the kernel raised one."""

    @property
    def failed(self) -> bool:
        """Whether this kernel fails the run."""
        return self.arch not in REPORTED_ONLY and bool(self.error or self.problems)


# Launching and compiling


def calls(net: torch.dtype, state: torch.dtype, samples: int, count: int) -> dict[str, Callable[[], object]]:
    """A call of the launcher for every entry of `FLOORS`, on tensors without memory.

    net, state: dtypes of network outputs and of states.
    samples, count: number of samples, and of the elements of one.
    """
    from selfnpo_kernels import triton as ops

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    # Network outputs and states; arguments with a few numbers for each sample; tables.
    p, x = empty(samples, count, dtype=net), empty(samples, count, dtype=state)
    index, slots = empty(samples, dtype=torch.int64), empty(4, samples, dtype=torch.int64)
    each = empty(samples, 2)
    weight, k2, k8 = empty(samples), empty(50, 2), empty(50, 8)
    key, none = (None, 1, index, 0, None), (None, 0, None, 0, None)
    tables = (empty(26, 8), empty(26, 2), empty(26, 1000, 2), empty(26, dtype=torch.int64), empty(26))
    rules, naive = (700, 80, 5, 1, 0.1, False, False), (700, 80, 5, 1, 0.1, True, True)
    # An odd row length comes with a view that begins between two multiples of 16 bytes.
    masters, live = [empty(samples * count)], [empty(samples * count + 1, dtype=net)[count % 2 :][: samples * count]]
    return {
        "normal": lambda: ops.normal(index, (count,), 1, 0, None, state),
        "affine_noise": lambda: ops.affine_noise(x, k2, index, *key),
        "affine_noise, noise given": lambda: ops.affine_noise(x, k2, index, p, 0, None, 0, None),
        "affine_noise, a row and a draw for each": lambda: ops.affine_noise(x, each, None, None, 1, index, 0, index),
        "guidance_rescale": lambda: ops.guidance_rescale(p, p, k8, index, 0.7),
        "guided_step": lambda: ops.guided_step(p, p, x, k8, index, None, None, None, *none),
        "guided_step, one branch": lambda: ops.guided_step(p, None, x, k8, index, None, None, None, *none),
        "guided_step, x0_prev and noise": lambda: ops.guided_step(p, p, x, k8, index, weight, x, None, *key),
        "guided_step, everything": lambda: ops.guided_step(p, p, x, k8, index, weight, x, x, *key),
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
    """(bytes moved for each element of every sample, more for a sample that restarts)."""
    nets, states, restarting, masters = FLOORS[call]
    return nets * net.itemsize + states * state.itemsize + masters * 4.0, restarting * float(state.itemsize)


def _bound(kernel, arguments: tuple, options: dict, arch: int) -> tuple:
    """(target, backend, bound arguments, specialisation, compiler's options) of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return target, backend, *bind(*arguments, **options)


def specialisation(kernel, arguments: tuple, options: dict, arch: int) -> str:
    """What a launch is compiled for: two launches share a compiled kernel if this is the same."""
    _, _, _, specialised, chosen = _bound(kernel, arguments, options, arch)
    return f"{kernel.__name__} {specialised} {chosen}"


def compiled(kernel, arguments: tuple, options: dict, arch: int):
    """`kernel`, compiled as for a launch with these arguments on compute capability `arch`.

    Integers and pointers are specialised as in a real launch.
    """
    import triton
    from triton.compiler import ASTSource

    target, backend, bound, specialised, _ = _bound(kernel, arguments, options, arch)
    chosen, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialised, None)
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=chosen.__dict__)


def examine(row: Row, binary, options: dict, main: bool) -> None:
    """Fills in the measurements of a compiled kernel and its problems.

    main: whether to examine the accesses, too; not for the tiny second kernel of a launcher.
    Raises ValueError where an instruction belongs to no access.
    """
    # Registers, spills and the machine code.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = resources(tool("cuobjdump", "--dump-resource-usage", file.name))
        wide = sass_wide(tool("nvdisasm", "-c", file.name))
    row.registers, row.spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
    row.shared = binary.metadata.shared
    row.index_bits = index_bits(binary.asm["ptx"])
    if row.spills:
        row.problems.append(f"{row.spills} bytes of stack or local memory")
    if not main:
        return
    # The accesses to tensors, and the bytes that they move.
    block = options["BLOCK"] if "BLOCK" in options else options["CHUNK"]  # elements of a program
    threads = 32 * binary.metadata.num_warps
    accesses = matched(ir_accesses(binary.asm["ttgir"]), ptx_widths(binary.asm["ptx"]), threads)
    row.scalars = sum(access.elements == 0 for access, _ in accesses)
    tensors = [(access, widths) for access, widths in accesses if access.elements >= block]
    row.loads = [w for access, widths in tensors if access.kind == "ld" for w in widths]
    row.stores = [w for access, widths in tensors if access.kind == "st" for w in widths]
    every_sample, restarting = (
        sum(threads * sum(widths) for access, widths in tensors if access.conditional == conditional) / block
        for conditional in (False, True)
    )
    row.bytes = every_sample, restarting
    # What is wrong with them. The addresses of ema_update come from a table, in 64 bits.
    if row.shape == "awkward":
        return
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
    """Compiles and examines the kernels of one call; `job` is one of `jobs`."""
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
        except Exception as error:  # any failure of one kernel is a line of the report
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
    return rows


# The report


def mixtures(call: str, shape: str) -> list[str]:
    """The mixtures in which a call is compiled for a shape.

    A call whose tensors have one dtype is compiled only for the mixtures of one dtype.
    """
    nets, states, _, _ = FLOORS[call]
    both = bool(nets and states)
    few = {"64-bit": ["fp32"], "small": ["bf16/fp32" if both else "bf16"], "video": ["bf16/fp32" if both else "bf16"]}
    return [name for name in few.get(shape, MIXTURES) if both or "/" not in name]


def jobs(architectures: list[int], quick: bool) -> list[tuple[str, str, str, int]]:
    """The (call, mixture, shape, architecture) of every compilation."""
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
    """The report."""
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
    """Compiles the kernels, prints the report, writes the JSON; returns 1 where a kernel fails."""
    parser = argparse.ArgumentParser(prog="python -m selfnpo_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities")
    parser.add_argument("--quick", action="store_true", help="one mixture and row length, two 64-bit kernels")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    chosen = parser.parse_args(arguments)
    # The workers inherit the environment and import triton; with the variable it would interpret.
    os.environ.pop("TRITON_INTERPRET", None)
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
