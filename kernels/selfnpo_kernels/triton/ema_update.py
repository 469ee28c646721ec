"""`ema_update`: the moving average of a whole list of parameters in one launch."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch
import triton
import triton.language as tl

from selfnpo_kernels.triton.common import launch, rounded

# Elements of a program, by whether the tensors begin at multiples of 16 bytes. If they do, a thread
# has sixteen elements, in two to four accesses of 16 bytes. A view into a flat buffer may begin at
# any address; a thread then has four elements, in one access each (with sixteen, registers spilled).
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


# The launches of each list of parameters, by the addresses, sizes and dtypes of its tensors. A
# training run finds its lists and uploads nothing. The newest _MAX_TABLES are kept, since
# under ZeRO 3 parameters are gathered one by one at new addresses. Those that a CUDA graph refers
# to are kept always.
_tables: OrderedDict[tuple, list[tuple]] = OrderedDict()
_captured: dict[tuple, list[tuple]] = {}
_MAX_TABLES = 4096


def _table(device: torch.device, key: tuple) -> list[tuple]:
    """The launches of a list of parameters, built at the first call with it.

    Raises RuntimeError where the first call comes while a CUDA graph is captured.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _captured.get((device, key)) or _tables.get((device, key))
    if known is None:
        if capturing:
            raise RuntimeError("ema_update: call it once with this list of tensors before a CUDA graph is captured")
        known = _build(device, key)
    if capturing:
        _captured[device, key] = known
    _tables[device, key] = known
    _tables.move_to_end((device, key))
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    return known


def _build(device: torch.device, key: tuple) -> list[tuple]:
    """(tensors, programs, live dtype, shadow dtype, aligned) of each launch.

    There is one launch unless dtypes or alignments differ.
    """
    # Tensors of equal dtypes and alignment share a launch.
    groups = defaultdict(list)
    for master, live, shadow, size, live_dtype, shadow_dtype in key:
        aligned = (master | live | shadow) % 16 == 0
        groups[live_dtype, shadow_dtype, aligned].append((master, live, shadow, size))
    # One program for each chunk of each tensor of a launch.
    launches = []
    for (live_dtype, shadow_dtype, aligned), rows in groups.items():
        tensors = torch.tensor(rows, dtype=torch.int64)
        chunks = (tensors[:, 3] + _CHUNK[aligned] - 1) // _CHUNK[aligned]
        tensor = torch.repeat_interleave(torch.arange(len(rows)), chunks)
        chunk = torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]
        tables = tensors.to(device), torch.stack([tensor, chunk], dim=1).to(device)
        launches.append((*tables, _TYPES[live_dtype], _TYPES.get(shadow_dtype), aligned))
    return launches


def ema_update(masters, live, shadows, decay):
    """master <- decay master + (1 - decay) live and shadow <- master; see `ops.ema_update`.

    Elements are updated in the order of memory. Tensors of equal dtypes that all begin at multiples
    of 16 bytes share one launch. The first call with a list uploads its addresses, and therefore
    has to come before a CUDA graph is captured (RuntimeError otherwise).
    """
    if not masters:
        return
    device = masters[0].device
    if shadows:
        key = tuple(
            (m.data_ptr(), n.data_ptr(), s.data_ptr(), m.numel(), n.dtype, s.dtype)
            for m, n, s in zip(masters, live, shadows, strict=True)
        )
    else:
        key = tuple(
            (m.data_ptr(), n.data_ptr(), 0, m.numel(), n.dtype, None) for m, n in zip(masters, live, strict=True)
        )
    for tensors, programs, live_dtype, shadow_dtype, aligned in _table(device, key):
        launch(
            ema_update_kernel, len(programs), tensors, tensors, programs, 1 - decay, decay,
            LIVE=live_dtype, SHADOW=shadow_dtype, ALIGN=16 if aligned else 1, CHUNK=_CHUNK[aligned], num_warps=4,
        )  # fmt: skip
