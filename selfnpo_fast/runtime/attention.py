"""Which kernels a network's attention layers compute with, chosen layer by layer.

Networks of diffusers keep the arithmetic of each attention layer in its `processor`. There are two
kinds. Those of Wan and of most transformers carry `_attention_backend`, which names one of
diffusers' backends. Those of UNets, SD3 and CogVideoX call torch's `scaled_dot_product_attention`
themselves, which takes the kernel that torch thinks best.

A choice is written into the processors of one network, so that it holds wherever that network
computes: in captured steps, in compiled blocks, and where checkpointing recomputes. Nothing of the
process is changed. diffusers' own `set_attention_backend` changes its default for all networks of
the process, and torch's `sdpa_kernel` switches kernels for all threads; neither is called here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError, one_line

ATTENTION = ("auto", "sdpa", "flash", "xformers")
"""auto leaves the processors as they are. sdpa is torch's attention, flash its FlashAttention
kernel and no other, xformers the package's memory-efficient attention."""
_SDPA = "scaled_dot_product_attention"
_BACKENDS = {"sdpa": "native", "flash": "_native_flash", "xformers": "xformers"}
"""diffusers' names of the choices, where processors carry `_attention_backend`."""
_WITHOUT_SDPA = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}
"""Processors of diffusers that compute without torch's attention, and those that compute the same
with it."""
_XFORMERS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "JointAttnProcessor2_0")
_XFORMERS += ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")
"""Processors that diffusers can replace by those of xformers."""


def set_attention(
    network: nn.Module, choice: str, *, field: str = "engine.attention", threads: bool = False, say: bool = True
) -> int:
    """Choose the attention of a network's layers; returns how many layers compute with the choice.

    - choice: one of ATTENTION.
    - field: the option that errors name.
    - threads: whether two threads may compute with such networks at once.
    - say: log the number of layers, which is counted from the processors after they are set.

    Raises UserError where the package, the device or the dtype does not allow the choice, and where
    it reaches no layer.
    """
    if choice == "auto":
        return 0
    layers, device, dtype = list(_layers(network)), next(network.parameters()).device, network_dtype(network)
    reason = why_not(choice, device.type, dtype) or _why_missing(choice)
    if reason is not None:
        raise UserError(f"{field}: {choice} {reason}")
    if threads and choice == "flash" and any(_has_backend(layer.processor) for _, layer in layers):
        raise UserError(
            f"{field}: flash switches torch's kernels for all threads in a {type(network).__name__}, and "
            "rollout.overlap computes in two; turn one of them off, or use sdpa"
        )
    for path, layer in layers:
        _set(path, layer, choice, field)
        if choice == "flash" and attention_of(layer) == "sdpa" and _flash_serves(layer, device, dtype):
            _swap_class(layer)
    reached = sum(attention_of(layer) == choice for _, layer in layers)
    if not reached:
        what = f"none of the {len(layers)} attention layers" if layers else "no attention layer"
        raise UserError(f"{field}: {choice} reaches {what} of {type(network).__name__}; use auto")
    if say:
        logger.info("attention: %s in %d of %d layers", choice, reached, len(layers))
    return reached


def why_not(choice: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a choice is not possible on a type of device in a dtype, to follow its name; None where
    it is."""
    if choice == "xformers" and device != "cuda":
        return f"has kernels for GPUs only, not for {device}; use sdpa"
    if choice == "flash" and device not in ("cuda", "cpu"):
        return f"has no kernel for {device}; use sdpa"
    if choice == "flash" and device == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return "computes in bf16 or fp16 on a GPU, not in float32; use sdpa, or another engine.precision"
    return None


def attention_of(layer: nn.Module) -> str:
    """What an attention layer computes with: one of ATTENTION, or the name of its processor."""
    processor = layer.processor
    if _has_backend(processor):
        backend = processor._attention_backend
        names = {value: name for name, value in _BACKENDS.items()}
        return "auto" if backend is None else names.get(str(backend.value), str(backend.value))
    if isinstance(processor, _Flash):
        return "flash"
    kind = type(processor).__name__
    return "xformers" if "XFormers" in kind else "sdpa" if _calls_sdpa(processor) else kind


def _layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of the attention layers."""
    return ((path, part) for path, part in network.named_modules() if callable(getattr(part, "processor", None)))


def _has_backend(processor: object) -> bool:
    return hasattr(processor, "_attention_backend")


def _calls_sdpa(processor: object) -> bool:
    """Whether the code of a processor names torch's attention."""
    code = getattr(type(processor).__call__, "__code__", None)
    return code is not None and _SDPA in code.co_names


def _why_missing(choice: str) -> str | None:
    """Why the package of a choice cannot be used; None where it can."""
    if choice != "xformers":
        return None
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    try:
        _check_attention_backend_requirements(AttentionBackendName.XFORMERS)
    except RuntimeError:
        return "needs the package xformers, which is missing or too old: pip install xformers, or use sdpa"
    return None


def _set(path: str, layer: Any, choice: str, field: str) -> None:
    """Write a choice into the processor of one layer, where it can take the choice."""
    if _has_backend(layer.processor):
        from diffusers.models.attention_dispatch import AttentionBackendName

        layer.processor._attention_backend = AttentionBackendName(_BACKENDS[choice])
        return
    # Back to the processor's own class.
    if isinstance(layer.processor, _Flash):
        layer.processor.__class__ = type(layer.processor).plain
    if choice == "xformers":
        if type(layer.processor).__name__ in _XFORMERS:
            try:
                layer.set_use_memory_efficient_attention_xformers(True)
            except Exception as error:
                raise UserError(f"{field}: xformers fails at {path}: {one_line(error, 160)}; use sdpa") from error
        return
    kind = _WITHOUT_SDPA.get(type(layer.processor).__name__)
    if kind is not None:
        from diffusers.models import attention_processor

        layer.set_processor(getattr(attention_processor, kind)())


def _flash_serves(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel takes heads as wide as the layer's; tried on one token."""
    width, heads = getattr(getattr(layer, "to_q", None), "out_features", None), getattr(layer, "heads", None)
    if not width or not heads:
        return True
    token = torch.zeros(1, 1, 1, width // heads, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            _flash(token, token, token)
    except RuntimeError:
        return False
    return True


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by torch's FlashAttention kernel, with the same arguments.

    Raises UserError for a mask and for grouped heads, which the kernel does not take.
    """
    if attn_mask is not None or enable_gqa:
        raise UserError("attention: flash takes neither masks nor grouped heads, and a layer has them; use sdpa")
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]
    # The kernel takes heads whose width is a multiple of 8; the scale is that of the width before.
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if width % 8:
        query, key, value = (functional.pad(x, (0, -width % 8)) for x in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, False, scale=scale)[0][..., :width]


class _FlashCalls(TorchFunctionMode):
    """Inside it, this thread's calls of torch's attention take the FlashAttention kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            return _flash(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Flash:
    """What processors with the FlashAttention kernel have in common."""

    plain: type
    """The class without it."""


def _swap_class(layer: Any) -> None:
    """Give a layer's processor the FlashAttention kernel; its weights stay.

    Layers may share a processor, whose heads another layer makes too wide: it becomes a copy.
    """
    processor = layer.processor if isinstance(layer.processor, nn.Module) else copy.copy(layer.processor)
    processor.__class__ = _flash_class(type(processor))
    layer.processor = processor


@functools.cache
def _flash_class(plain: type) -> type:
    """The class of a processor with the FlashAttention kernel."""

    @functools.wraps(plain.__call__)  # layers read the names of its arguments
    def call(self, *args, **kwargs):
        with _FlashCalls():
            return plain.__call__(self, *args, **kwargs)

    return type(f"Flash{plain.__name__}", (plain, _Flash), {"plain": plain, "__call__": call})
