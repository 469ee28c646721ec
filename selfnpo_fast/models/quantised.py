"""A frozen network whose Linear layers are stored in 8 or 4 bits.

`quantise` replaces layers by QuantisedLinear, which dequantises its weight at every call. Inputs
are never rounded, so the network is the one with the dequantised weights: in value, and in the
gradients that pass through it. The libraries' own 8-bit layers round their inputs as well on a
GPU, and let outliers in one row of a batch decide how the others are computed.

    int8    bitsandbytes, LLM.int8: a scale for each output channel
    nf4     bitsandbytes, QLoRA: a scale for each block of 64 weights
    fp8     torchao, float8_e4m3fn: a scale for each output channel

Shape letters: O output channels, I input channels.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line

LIBRARIES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "torchao"}
"""The library that serves each value of `model.quantization`."""
BLOCK = 64
"""Weights that share one scale in nf4."""
KEPT = ("embed", "norm", "^proj_in$", "^proj_out$")
"""Patterns of the paths of layers that keep their weights, as in diffusers' layerwise casting
(`DEFAULT_SKIP_MODULES_PATTERN`): modulations and embeddings react strongly to rounding, and are
small."""


class QuantisedLinear(nn.Linear):
    """A frozen Linear with its weight in 8 or 4 bits.

    Its stored numbers are buffers of whole numbers, which no cast reaches: `weight` holds O x I
    bytes, or O x I / 2 of nf4; `scale` holds float32 numbers, (O, 1) or (blocks,) of nf4.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, kind: str, stored: torch.Tensor, scale: torch.Tensor, like: nn.Linear) -> None:
        """The layer `like` with the given numbers, as `_stored` returns them."""
        nn.Module.__init__(self)
        self.kind, self.in_features, self.out_features = kind, like.in_features, like.out_features
        self.register_buffer("weight", stored)
        self.register_buffer("scale", scale)
        self.bias = like.bias
        self.train(like.training)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (O, I) that the layer computes with, as a new tensor."""
        return _dequantised(self.kind, self.weight, self.scale, (self.out_features, self.in_features), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., I) to (B, ..., O), in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, self.weight, self.scale, bias, self.kind, self.out_features)

    def _apply(self, fn, recurse: bool = True) -> QuantisedLinear:
        """Apply `fn`, such as a move to a device; a cast does not reach the scales."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """nn.Linear's, with the kind."""
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T + b with a frozen W that is dequantised in both passes.

    Autograd would keep the dequantised weight of every layer until the backward pass.
    """

    @staticmethod
    def forward(ctx, x, stored, scale, bias, kind: str, out_features: int):
        ctx.save_for_backward(stored, scale)
        ctx.kind, ctx.shape = kind, (out_features, x.shape[-1])
        return F.linear(x, _dequantised(kind, stored, scale, ctx.shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        weight = _dequantised(ctx.kind, *ctx.saved_tensors, ctx.shape, grad.dtype)
        return grad @ weight, None, None, None, None, None


def _dequantised(
    kind: str, stored: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight (O, I): products in float32, rounded once."""
    if kind == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(stored, scale, BLOCK, "nf4", shape, dtype)
    if kind == "fp8":
        stored = stored.view(torch.float8_e4m3fn).to(dtype)  # exact: e4m3 is part of both halves
    # Without `out` there would be a float32 copy of the weight.
    return torch.mul(stored, scale, out=torch.empty(shape, dtype=dtype, device=stored.device))


def _stored(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers, scales) of a weight (O, I), on its device; see QuantisedLinear for the shapes."""
    if kind == "int8":
        from bitsandbytes.functional import int8_vectorwise_quant

        numbers, largest, _ = int8_vectorwise_quant(weight.half())
        return numbers, (largest.float() / 127)[:, None]
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        numbers, state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        return numbers, state.absmax.float()
    from torchao.quantization import Float8Tensor

    tensor = Float8Tensor.from_hp(weight.float())
    return tensor.qdata.view(torch.uint8), tensor.scale.float()


def quantised_paths(denoiser: nn.Module) -> list[str]:
    """The paths of the layers of a denoiser that `quantise` replaces.

    They are the Linear layers of its blocks, which diffusers keeps in lists, without those that
    KEPT or the network itself names (`_skip_layerwise_casting_patterns`, `_keep_in_fp32_modules`).
    """
    named = [
        getattr(denoiser, name, None) or () for name in ("_skip_layerwise_casting_patterns", "_keep_in_fp32_modules")
    ]
    kept = re.compile("|".join((*KEPT, *named[0], *map(re.escape, named[1]))))
    lists = tuple(f"{path}." for path, module in denoiser.named_modules() if isinstance(module, nn.ModuleList))
    return [
        path
        for path, layer in denoiser.named_modules()
        if type(layer) is nn.Linear and path.startswith(lists) and not kept.search(path)
    ]


def quantise(denoiser: nn.Module, kind: str, device: torch.device) -> None:
    """Store the Linear layers of a denoiser's blocks in `kind`, and move the denoiser to `device`.

    One layer at a time is moved in its own precision, so that the device never holds the whole
    network in it.

    Raises UserError where the library is missing, where the network has no such layer, and where a
    layer's numbers are not finite.
    """
    _check_library(kind)
    denoiser.requires_grad_(False)
    paths = quantised_paths(denoiser)
    if not paths:
        raise UserError(
            f"model.quantization: the blocks of a {type(denoiser).__name__} have no Linear layer for {kind}"
        )
    elements = 0
    for path in paths:
        layer = denoiser.get_submodule(path)
        stored, scale = _stored(kind, layer.weight.detach().to(device))
        if not scale.isfinite().all():
            raise UserError(f"model.quantization: {path} has weights that are too large for {kind}")
        parent, _, name = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), name, QuantisedLinear(kind, stored, scale, layer))
        elements += layer.weight.numel()
    denoiser.to(device)
    rest = sum(p.numel() for p in denoiser.parameters())
    say_once(
        f"model.quantization: {kind} by {LIBRARIES[kind]} for {len(paths)} Linear layers of the blocks, "
        f"{elements / (elements + rest):.0%} of the weights",
        level=20,
    )


def plan_quantised(denoiser: nn.Module, kind: str) -> None:
    """`quantise` for a network without numbers, on the meta device: shapes and dtypes alone."""
    if kind == "nf4":
        import bitsandbytes  # noqa: F401  # its operators
    for path in quantised_paths(denoiser):
        layer = denoiser.get_submodule(path)
        out_features, in_features = layer.out_features, layer.in_features
        elements = out_features * in_features
        shape, scales = (out_features, in_features), (out_features, 1)
        if kind == "nf4":
            shape, scales = (-(-elements // 2), 1), (math.ceil(elements / BLOCK),)
        stored = torch.empty(shape, dtype=torch.int8 if kind == "int8" else torch.uint8, device="meta")
        scale = torch.empty(scales, dtype=torch.float32, device="meta")
        parent, _, name = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), name, QuantisedLinear(kind, stored, scale, layer))


def _check_library(kind: str) -> None:
    """Raise UserError where the library that serves `kind` cannot be imported."""
    library = LIBRARIES[kind]
    try:
        __import__(library)
    except ImportError as error:
        mend = "pip install 'selfnpo-fast[quant]'" if library == "torchao" else f"pip install {library}"
        raise UserError(f"model.quantization: {kind} needs {library}: {one_line(error, 120)}; {mend}") from error


def quantised_elements(network: nn.Module) -> int:
    """How many weights of a network are quantised."""
    layers = (layer for layer in network.modules() if isinstance(layer, QuantisedLinear))
    return sum(layer.in_features * layer.out_features for layer in layers)
