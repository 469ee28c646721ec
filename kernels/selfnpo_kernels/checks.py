"""What the operations refuse: one function for each op, for every backend and for tracing.

A check takes the arguments of its op's schema (`schemas.py`). It returns None, or raises a
ValueError of one line that names the op and the argument.
"""

from __future__ import annotations

import itertools
import math
from typing import NoReturn

import torch

from selfnpo_kernels.schemas import STEP_COLUMNS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def arithmetic(*tensors: torch.Tensor | None) -> torch.dtype:
    """float32, or float64 where a tensor is float64."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def no_shared_memory(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError where two of the tensors overlap in memory.

    A block of a GPU kernel would read what another block has overwritten. The check needs real
    memory, so tracing does not call it.
    """
    spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors.items() if t is not None and t.nbytes}
    for (name, (start, end)), (other, (begin, stop)) in itertools.combinations(spans.items(), 2):
        if start < stop and begin < end:
            _fail(op, other, f"shares memory with {name}; give it memory of its own")


def no_gradient(op: str, **tensors) -> None:
    """Raises ValueError where an input requires a gradient that the op does not compute."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                _fail(op, name, "requires a gradient, and the op has none; call it under torch.no_grad()")


def _fail(op: str, name: str, what: str) -> NoReturn:
    raise ValueError(f"{op}: {name} {what}")


def _state(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor | None = None, dtype=None) -> None:
    """Expects a row-major floating tensor (B, ...), of the shape and device of `like` if given."""
    if tensor.dtype not in FLOATS:
        _fail(op, name, f"is {tensor.dtype}; expected float32, bfloat16 or float16")
    if dtype is not None and tensor.dtype != dtype:
        _fail(op, name, f"is {tensor.dtype}; expected {dtype}")
    if tensor.ndim < 2:
        _fail(op, name, f"has shape {tuple(tensor.shape)}; expected (samples, ...)")
    if 0 in tensor.shape[1:]:
        _fail(op, name, f"has shape {tuple(tensor.shape)}; expected one element per sample at least")
    if not tensor.is_contiguous():
        _fail(op, name, f"is not row-major (strides {tensor.stride()}); call contiguous() where it is made")
    if like is not None:
        if tensor.shape != like.shape:
            _fail(op, name, f"has shape {tuple(tensor.shape)}; expected {tuple(like.shape)}")
        _device(op, name, tensor, like)


def _device(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        _fail(op, name, f"is on {tensor.device}; expected {like.device}")


def _exactly(op: str, name: str, tensor: torch.Tensor, shape: tuple, dtype: torch.dtype, like: torch.Tensor) -> None:
    """Expects a contiguous tensor of one shape and dtype, on the device of `like`.

    A None in `shape` admits any size. float64 is taken instead of float32 where `like` is float64.
    """
    right_dtype = tensor.dtype == dtype or (dtype == torch.float32 and tensor.dtype == like.dtype == torch.float64)
    matches = right_dtype and tensor.ndim == len(shape)
    if not (matches and all(n is None or m == n for m, n in zip(tensor.shape, shape, strict=True))):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        _fail(op, name, f"is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} of shape ({wanted})")
    if not tensor.is_contiguous():
        _fail(op, name, "is not contiguous")
    _device(op, name, tensor, like)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _table(op: str, k: torch.Tensor, columns: int, index: torch.Tensor | None, x: torch.Tensor) -> None:
    """Expects a coefficient table (R, columns), and an index (B,) or a fitting R."""
    _exactly(op, "k", k, (None, columns), torch.float32, x)
    if index is not None:
        _exactly(op, "index", index, (x.shape[0],), torch.int64, x)
    elif k.shape[0] not in (1, x.shape[0]):
        _fail(op, "k", f"has {k.shape[0]} rows for {x.shape[0]} samples; give one for each, one for all, or an index")


def _noise(op: str, x, noise, sample_ids, draws, required: bool) -> None:
    """Expects a noise tensor like x or the parts of a key; or nothing unless noise is required."""
    if noise is not None:
        _state(op, "noise", noise, x)
    elif sample_ids is not None:
        _exactly(op, "sample_ids", sample_ids, (x.shape[0],), torch.int64, x)
        if draws is not None:
            _exactly(op, "draws", draws, (x.shape[0],), torch.int64, x)
    elif required:
        _fail(op, "noise", "is missing; expected a tensor or a NoiseKey")


def normal(sample_ids, shape, seed, draw, draws, dtype):
    """See `ops.normal`."""
    _exactly("normal", "sample_ids", sample_ids, (None,), torch.int64, sample_ids)
    if draws is not None:
        _exactly("normal", "draws", draws, (sample_ids.shape[0],), torch.int64, sample_ids)
    if dtype not in FLOATS:
        _fail("normal", "dtype", f"is {dtype}; expected float32, bfloat16 or float16")
    if 0 in shape:
        _fail("normal", "shape", f"is {tuple(shape)}; expected one element per sample at least")


def affine_noise(x, k, index, noise, seed, sample_ids, draw, draws):
    """See `ops.affine_noise`."""
    _state("affine_noise", "x", x)
    _table("affine_noise", k, 2, index, x)
    _noise("affine_noise", x, noise, sample_ids, draws, required=True)


def guidance_rescale(pos, neg, k, index, phi):
    """See `ops.guidance_rescale`."""
    _branches("guidance_rescale", pos, neg, pos)
    _table("guidance_rescale", k, STEP_COLUMNS, index, pos)
    if not 0 <= phi <= 1:
        _fail("guidance_rescale", "phi", f"is {phi}; expected 0 to 1")
    if math.prod(pos.shape[1:]) < 2:
        _fail("guidance_rescale", "pos", "has one element per sample, whose standard deviation is not defined")


def _branches(op: str, pos, neg, x) -> None:
    """Expects one network output or two of one dtype, each of the shape of x."""
    if pos is None and neg is None:
        _fail(op, "pos", "and neg are both missing; expected one network output at least")
    for name, tensor in (("pos", pos), ("neg", neg)):
        if tensor is not None:
            _state(op, name, tensor, x)
    if pos is not None and neg is not None and pos.dtype != neg.dtype:
        _fail(op, "neg", f"is {neg.dtype} and pos is {pos.dtype}; expected one dtype")


def guided_step(pos, neg, x, k, index, scale, x0_prev, x0_prev2, noise, seed, sample_ids, draw, draws):
    """See `ops.guided_step`."""
    _state("guided_step", "x", x)
    _branches("guided_step", pos, neg, x)
    _table("guided_step", k, STEP_COLUMNS, index, x)
    if scale is not None:
        _exactly("guided_step", "scale", scale, (x.shape[0],), torch.float32, x)
    if x0_prev is not None:
        _state("guided_step", "x0_prev", x0_prev, x, x.dtype)
    if x0_prev2 is not None:
        _state("guided_step", "x0_prev2", x0_prev2, x, x.dtype)
    _noise("guided_step", x, noise, sample_ids, draws, required=False)


def tdft_step(
    pos, neg, x, final, slots, next_slots, step, start, renoise, timesteps, weight, latents,
    num_prompts, stride, max_steps, seed, dropout, shuffled, naive,
):  # fmt: skip
    """See `ops.tdft_step`."""
    op = "tdft_step"
    # States and network outputs.
    _state(op, "x", x)
    _branches(op, pos, neg, x)
    # Final states from noise, latents from data.
    if (final is None) == (latents is None):
        _fail(op, "final", "and latents: expected final alone (from noise) or latents alone (from data)")
    if final is not None:
        _state(op, "final", final, x, x.dtype)
    if latents is not None:
        _state(op, "latents", latents)
        _device(op, "latents", latents, x)
        if tuple(latents.shape) != (num_prompts, *x.shape[1:]):
            _fail(op, "latents", f"has shape {tuple(latents.shape)}; expected {(num_prompts, *x.shape[1:])}")
    # Slots and tables.
    batch, rows = x.shape[0], timesteps.shape[0]
    if rows < (2 if latents is None else 3):
        _fail(op, "timesteps", f"has {rows} rows; expected t = 0 and a grid of one step, or of two from data")
    _exactly(op, "slots", slots, (4, batch), torch.int64, x)
    _exactly(op, "next_slots", next_slots, (4, batch), torch.int64, x)
    _exactly(op, "timesteps", timesteps, (rows,), torch.int64, x)
    _exactly(op, "step", step, (None, STEP_COLUMNS), torch.float32, x)
    _exactly(op, "start", start, (rows, 2), torch.float32, x)
    _exactly(op, "renoise", renoise, (rows, None, 2), torch.float32, x)
    _exactly(op, "weight", weight, (rows,), torch.float32, x)
    if step.shape[0] < rows:
        _fail(op, "step", f"has {step.shape[0]} rows; expected at least {rows}")
    # Numbers.
    for name, value in (("num_prompts", num_prompts), ("stride", stride), ("max_steps", max_steps)):
        if not 1 <= value < 2**31:
            _fail(op, name, f"is {value}; expected 1 to 2^31 - 1")
    if not 0 <= dropout <= 1:
        _fail(op, "dropout", f"is {dropout}; expected 0 to 1")


def x0_loss(pred, x_s, target, k, index, weight, kind, c, want_slope):
    """See `ops.x0_loss`."""
    _state("x0_loss", "pred", pred)
    _state("x0_loss", "x_s", x_s, pred)
    _state("x0_loss", "target", target, pred)
    if x_s.dtype != target.dtype:
        _fail("x0_loss", "target", f"is {target.dtype} and x_s is {x_s.dtype}; expected one dtype")
    _table("x0_loss", k, 2, index, pred)
    _exactly("x0_loss", "weight", weight, (pred.shape[0],), torch.float32, pred)
    if kind not in ("l2", "huber"):
        _fail("x0_loss", "kind", f"is {kind!r}; expected l2 or huber")
    if kind == "huber" and not 1e-12 <= c < math.inf:  # float32 cannot hold a smaller square
        _fail("x0_loss", "c", f"is {c}; expected 1e-12 or more")


def x0_loss_backward(slope, k, index, weight, grad):
    """See `reference.x0_loss_backward`."""
    _state("x0_loss_backward", "slope", slope)
    _table("x0_loss_backward", k, 2, index, slope)
    _exactly("x0_loss_backward", "weight", weight, (slope.shape[0],), torch.float32, slope)
    _exactly("x0_loss_backward", "grad", grad, (), torch.float32, slope)


def ema_update(masters, live, shadows, decay):
    """See `ops.ema_update`."""
    ema_decay(decay)
    ema_lists(masters, live, shadows)


def ema_decay(decay):
    """The part of `ema_update` that every call needs."""
    if not 0 <= decay <= 1:
        _fail("ema_update", "decay", f"is {decay}; expected 0 to 1")


def ema_lists(masters, live, shadows):
    """The part of `ema_update` that depends on the lists alone (`known_lists.py`)."""
    op = "ema_update"
    if len(live) != len(masters) or len(shadows) not in (0, len(masters)):
        _fail(op, "masters", f"are {len(masters)}, live {len(live)}, shadows {len(shadows)}; expected equal lengths")
    for i, master in enumerate(masters):
        if master.dtype not in (torch.float32, torch.float64):
            _fail(op, f"masters[{i}]", f"is {master.dtype}; expected float32")
        for name, tensors in (("masters", masters), ("live", live), ("shadows", shadows)):
            if not tensors:
                continue
            tensor = tensors[i]
            if tensor.dtype not in FLOATS:
                _fail(op, f"{name}[{i}]", f"is {tensor.dtype}; expected float32, bfloat16 or float16")
            if tensor.shape != master.shape or tensor.stride() != master.stride():
                _fail(op, f"{name}[{i}]", f"has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected "
                      f"{tuple(master.shape)} and {master.stride()}")  # fmt: skip
            # Any order of the axes will do: the kernels walk the memory.
            if not _dense(tensor):
                _fail(op, f"{name}[{i}]", f"has gaps (strides {tensor.stride()}); expected a dense tensor")
            _device(op, f"{name}[{i}]", tensor, master)


def in_memory(op: str, **lists) -> None:
    """Raises ValueError where a tensor's storage is too small for it, as after `resize_(0)`.

    Tracing has no memory, and does not call it.
    """
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
            if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
                _fail(op, f"{name}[{i}]", f"has a storage of {tensor.untyped_storage().nbytes()} bytes; needs {needed}")
