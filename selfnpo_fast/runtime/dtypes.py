"""Floating point precisions: their names, and those of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of torch for each name that configs and options use."""
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The name of each dtype in the header of a safetensors file."""


def network_dtype(network: Any) -> torch.dtype:
    """The dtype that a network, or what stands for one, computes in: that of inputs and outputs.

    It is not always that of the first parameter: diffusers leaves some layers of some networks in
    float32 (`_keep_in_fp32_modules`), and layerwise casting stores layers in 8 bits.
    """
    if not hasattr(network, "_keep_in_fp32_modules") and isinstance(getattr(network, "dtype", None), torch.dtype):
        return network.dtype
    # A network of diffusers says it too, but walks all its modules for it, which takes a
    # millisecond: it is asked only where the weights do not say it.
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            return parameter.dtype if parameter.itemsize >= 2 else getattr(network, "dtype", parameter.dtype)
    return getattr(network, "dtype", next(network.parameters()).dtype)


def not_below_16_bits(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`change`, a move or a cast, for tensors that move along but stay out of casts to 8 bits."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        """The tensor moved, and cast unless to less than 16 bits."""
        result = change(tensor)
        is_cut = tensor.is_floating_point() and tensor.itemsize >= 2 > result.itemsize
        return tensor.to(result.device) if is_cut else result

    return changed
