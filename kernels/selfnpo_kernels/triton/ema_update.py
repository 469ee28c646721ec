"""The moving average of a whole list of parameters in one launch."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch
import triton
import triton.language as tl

from selfnpo_kernels.triton.common import launch, rounded

# Elements a program, by whether the tensors begin at multiples of 16 bytes. Sixteen a thread: two to four accesses of
# 16 bytes. A view into a flat buffer may begin anywhere: four a thread then, one access each (sixteen have spilled).
_CHUNK = {True: 2048, False: 512}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _update(master, live, shadow, lane, mask, weight, rest):
    old = tl.load(master + lane, mask=mask, other=0)
    new = tl.load(live + lane, mask=mask, other=0).to(tl.float32)
    # As torch.lerp: exact at both ends, and a value that stands still stays.
    moved = tl.where(weight < 0.5, old + weight * (new - old), new - rest * (new - old))
    tl.store(master + lane, moved, mask=mask)
    if shadow is not None:
        tl.store(shadow + lane, rounded(moved, shadow.dtype.element_ty), mask=mask)


@triton.jit
def ema_update_kernel(
    tensors, programs, weight, rest,
    LIVE: tl.constexpr, SHADOW: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """tensors (n, 4) int64: addresses of master, live and shadow, and elements; programs (p, 2) int64: tensor, chunk.

    The interpreter dereferences integer addresses too: it runs this very kernel.
    """
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
    # The compiler sees that `whole` is a multiple of eight, so masked accesses stay 16 bytes wide; what is left of a
    # tensor, seven elements at most, is done by its last program.
    whole = size // 8 * 8
    lane = tl.arange(0, CHUNK)
    _update(master, live, shadow, lane, lane < whole, weight, rest)
    if (whole < size) & (size <= CHUNK):
        few = tl.arange(0, 8)
        _update(master + whole, live + whole, None if SHADOW is None else shadow + whole, few, few < size - whole,
                weight, rest)  # fmt: skip


# Tables by what they hold: addresses, sizes and dtypes. A steady state finds its tables here and uploads nothing. The
# newest are kept (under ZeRO 3 parameters are gathered one by one, at ever new addresses), and for good those that a
# CUDA graph holds the addresses of.
_tables: OrderedDict[tuple, list[tuple]] = OrderedDict()
_captured: dict[tuple, list[tuple]] = {}
_MOST = 4096


def _table(device: torch.device, key: tuple) -> list[tuple]:
    """The launches of a list, built at its first call. RuntimeError if that is while a CUDA graph is captured."""
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
    if len(_tables) > _MOST:
        _tables.popitem(last=False)
    return known


def _build(device: torch.device, key: tuple) -> list[tuple]:
    """(tensors, programs, live dtype, shadow dtype, aligned) of each launch: as a rule there is one."""
    groups = defaultdict(list)
    for master, live, shadow, size, live_dtype, shadow_dtype in key:
        aligned = (master | live | shadow) % 16 == 0
        groups[live_dtype, shadow_dtype, aligned].append((master, live, shadow, size))
    launches = []
    for (live_dtype, shadow_dtype, aligned), rows in groups.items():
        tensors = torch.tensor(rows, dtype=torch.int64)
        chunks = (tensors[:, 3] + _CHUNK[aligned] - 1) // _CHUNK[aligned]
        owner = torch.repeat_interleave(torch.arange(len(rows)), chunks)
        chunk = torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]
        tables = tensors.to(device), torch.stack([owner, chunk], dim=1).to(device)
        launches.append((*tables, _TYPES[live_dtype], _TYPES.get(shadow_dtype), aligned))
    return launches


def ema_update(masters, live, shadows, decay):
    """master <- decay master + (1 - decay) live and shadow <- master, in place, every tensor in its order in memory.

    Tensors of equal dtypes that all begin at multiples of 16 bytes share one launch. The first call with a list uploads
    its addresses, so it has to come before a CUDA graph is captured.
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
