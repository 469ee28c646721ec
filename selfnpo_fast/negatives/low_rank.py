"""A low-rank update of one layer: what a LoRA holds for it, whatever its file called it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """W + scale up down. For a Linear: down (r, in), up (out, r). For a Conv2d: down (r, in, h, w), up (out, r, 1, 1).

    `scale` is alpha / rank times whatever weight the user gave the whole update.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def delta(self) -> torch.Tensor:
        """The whole update in the layer's shape, float32; (out, in) or (out, in, h, w)."""
        up, down = self.up.float(), self.down.float()
        return (self.scale * (up.flatten(1) @ down.flatten(1))).reshape(len(up), *down.shape[1:])


Deltas = dict[str, LowRank]
"""By the dotted path of the layer in the denoiser, as in `denoiser.get_submodule(path)`."""
