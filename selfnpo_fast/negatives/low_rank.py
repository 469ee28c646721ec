"""Low-rank updates of layers: what a LoRA holds, independent of how its file names things."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from selfnpo_fast.runtime.dtypes import network_dtype

MAX_UPDATE = 65_504.0
"""Largest size of an element of an update: float16's largest number. No weight of a network that
works comes near it."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A low-rank update of one layer: its weight W becomes W + scale up down.

    Shapes for rank r:
    - Linear, W (out, in): down (r, in), up (out, r).
    - Conv2d, W (out, in, h, w): down (r, in, h, w), up (out, r, 1, 1).
    """

    down: torch.Tensor
    """The factor that is applied to the layer's input."""
    up: torch.Tensor
    """The factor that is applied to the result of `down`."""
    scale: float
    """alpha / rank, times the weight that the user gave to the whole update."""

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def is_too_large(self) -> bool:
        """Whether an element of the update is beyond MAX_UPDATE or is not finite."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        if not down.numel() or not up.numel():
            return not math.isfinite(self.scale)
        # An element is a row of `up` times a column of `down`: at most the product of their norms.
        bound = abs(self.scale) * up.norm(dim=1).max().item() * down.norm(dim=0).max().item()
        if bound <= MAX_UPDATE:
            return False
        return not self.delta().abs().max().item() <= MAX_UPDATE  # also where it is not a number

    def delta(self) -> torch.Tensor:
        """The whole update as one float32 tensor of the weight's shape.

        Shapes:
        - Linear: (out, in).
        - Conv2d: (out, in, h, w).
        """
        up, down = self.up.float(), self.down.float()
        return (self.scale * (up.flatten(1) @ down.flatten(1))).reshape(len(up), *down.shape[1:])


Deltas = dict[str, LowRank]
"""Updates by the dotted path of their layer, as in `denoiser.get_submodule(path)`."""


def factor_shapes(weight: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `(down, up)` of rank `rank` for a layer whose weight has the shape `weight`."""
    return (rank, *weight[1:]), (weight[0], rank, *(1,) * (len(weight) - 2))


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, also of a quantised one that is stored in another shape."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]


def update_dtype(layer: nn.Module, network: nn.Module) -> torch.dtype:
    """The dtype of an update of a layer of `network`: that of the layer's weight or, where that is
    stored as whole numbers, the one that the network computes in."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight.dtype if weight.is_floating_point() else network_dtype(network)
