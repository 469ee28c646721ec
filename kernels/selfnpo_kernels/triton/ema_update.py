"""`ema_update`: the moving average of a whole list of parameters in one launch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from selfnpo_kernels.known_lists import CACHE, KnownLists
from selfnpo_kernels.triton.common import launch, rounded

# Elements of a program, by whether the tensors begin at multiples of 16 bytes. If they do, a thread
# has sixteen elements, in two to four accesses of 16 bytes. A view into a flat buffer may begin at
# any address; a thread then has four elements, in one access each (with sixteen, registers
# spilled).
_CHUNK = {True: 2048, False: 512}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _update(master, live, shadow, lane, mask, weight, decay):
    """Updates the elements `lane` of one tensor where `mask` holds; weight is 1 - decay."""
    old = tl.load(master + lane, mask=mask, other=0)
    new = tl.load(live + lane, mask=mask, other=0).to(tl.float32)
    # As torch.lerp: exact at both ends, and old == new is left as it is.
    averaged = tl.where(weight < 0.5, old + weight * (new - old), new - decay * (new - old))
    tl.store(master + lane, averaged, mask=mask)
    if shadow is not None:
        tl.store(shadow + lane, rounded(averaged, shadow.dtype.element_ty), mask=mask)


@triton.jit
def ema_update_kernel(
    tensors, programs, weight, decay,
    LIVE: tl.constexpr, SHADOW: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of a tensor.

    tensors: (n, 4) int64, the addresses of a master, its live tensor and its shadow, and its size.
    programs: (p, 2) int64, the tensor and the chunk of each program.

    Triton's interpreter dereferences integer addresses, too, and so runs the same kernel.
    """
    # What this program works on.
    programs += tl.program_id(0) * 2
    tensors += tl.load(programs) * 4
    start = tl.load(programs + 1) * CHUNK
    size = tl.load(tensors + 3) - start
    master = tl.multiple_of(tl.load(tensors).to(tl.pointer_type(tl.float32)), ALIGN) + start
    live = tl.multiple_of(tl.load(tensors + 1).to(tl.pointer_type(LIVE)), ALIGN) + start
    if SHADOW is None:
        shadow = None
    else:
        shadow = tl.multiple_of(tl.load(tensors + 2).to(tl.pointer_type(SHADOW)), ALIGN) + start
    # The compiler sees that `whole` is a multiple of eight, and keeps masked accesses 16 bytes
    # wide. The last program of a tensor updates the up to seven elements after them.
    whole = size // 8 * 8
    lane = tl.arange(0, CHUNK)
    _update(master, live, shadow, lane, lane < whole, weight, decay)
    if (whole < size) & (size <= CHUNK):
        few = tl.arange(0, 8)
        _update(master + whole, live + whole, None if SHADOW is None else shadow + whole, few, few < size - whole,
                weight, decay)  # fmt: skip


@dataclass
class Tables:
    """What the launches of one call need."""

    launches: list[tuple]
    """(tensors, programs, live dtype, shadow dtype, aligned) of each launch.

    There is one launch unless dtypes or alignments differ.
    """
    nbytes: int
    """Bytes of device memory that the tables take."""
    uploaded: torch.cuda.Event | None = None
    """On a GPU: when the tables are whole."""
    streams: set[int] = field(default_factory=set)
    """Handles of the CUDA streams that may read them."""

    def order(self) -> None:
        """Let the present stream read the tables.

        It waits for them. And their memory is not used again before the stream has done what it
        has been given by the time they are dropped.
        """
        stream = torch.cuda.current_stream()
        if stream.cuda_stream not in self.streams:
            assert self.uploaded is not None, "set where there are streams"
            stream.wait_event(self.uploaded)
            for tensors, programs, *_ in self.launches:
                tensors.record_stream(stream)
                programs.record_stream(stream)
            self.streams.add(stream.cuda_stream)


def _uploaded(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The table on the device, for which the host does not wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _build(device: torch.device, masters, live, shadows) -> Tables:
    """The tables of some lists."""
    # Tensors of equal dtypes and alignment share a launch.
    groups = defaultdict(list)
    for i, master in enumerate(masters):
        shadow, shadow_dtype = (shadows[i].data_ptr(), _TYPES[shadows[i].dtype]) if shadows else (0, None)
        row = master.data_ptr(), live[i].data_ptr(), shadow, master.numel()
        aligned = (row[0] | row[1] | row[2]) % 16 == 0
        groups[_TYPES[live[i].dtype], shadow_dtype, aligned].append(row)
    # One program for each chunk of each tensor of a launch.
    launches, nbytes = [], 0
    for (live_dtype, shadow_dtype, aligned), rows in groups.items():
        tensors = torch.tensor(rows, dtype=torch.int64)
        chunks = (tensors[:, 3] + _CHUNK[aligned] - 1) // _CHUNK[aligned]
        tensor = torch.repeat_interleave(torch.arange(len(rows)), chunks)
        chunk = torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]
        tables = [_uploaded(table, device) for table in (tensors, torch.stack([tensor, chunk], dim=1))]
        launches.append((*tables, live_dtype, shadow_dtype, aligned))
        nbytes += sum(triton.cdiv(table.nbytes, 512) * 512 for table in tables)  # the allocator's unit
    return Tables(launches, nbytes)


def _prepared(known: KnownLists, masters, live, shadows) -> Tables:
    """The tables of known lists, built at the first call with them.

    Raises RuntimeError where the first call comes while a CUDA graph is captured.
    """
    on_gpu = known.device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if known.prepared is None:
        if capturing:
            raise RuntimeError("ema_update: call it once with this list of tensors before a CUDA graph is captured")
        tables = _build(known.device, masters, live, shadows)
        if on_gpu:
            tables.uploaded = torch.cuda.current_stream().record_event()
        CACHE.prepare(known, tables, tables.nbytes)
    if capturing:
        # The graph reads the tables at each replay. They are whole: before it captures,
        # torch.cuda.graph waits for the device.
        CACHE.keep(known)
    elif on_gpu:
        known.prepared.order()
    return known.prepared


def ema_update(masters, live, shadows, decay, known: KnownLists | None = None):
    """master <- decay master + (1 - decay) live and shadow <- master; see `ops.ema_update`.

    known: what is known of the lists; None where they are used once.

    Elements are updated in the order of memory. Tensors of equal dtypes that all begin at multiples
    of 16 bytes share one launch. The first call with a list uploads its addresses, and therefore
    has to come before a CUDA graph is captured (RuntimeError otherwise).
    """
    if not masters:
        return
    with torch.cuda.device_of(masters[0]):
        if known is None:
            tables = _build(masters[0].device, masters, live, shadows)
        else:
            tables = _prepared(known, masters, live, shadows)
        for tensors, programs, live_dtype, shadow_dtype, aligned in tables.launches:
            launch(
                ema_update_kernel, len(programs), tensors, tensors, programs, 1 - decay, decay,
                LIVE=live_dtype, SHADOW=shadow_dtype, ALIGN=16 if aligned else 1, CHUNK=_CHUNK[aligned], num_warps=4,
            )  # fmt: skip
