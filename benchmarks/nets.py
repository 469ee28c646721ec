"""The networks that benchmarks run: the digits UNet and one of Stable Diffusion 1.5's shape.

Conditioning and latents are seeded normals: their values do not change what a forward costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule import NoiseSchedule
from selfnpo_fast.models import SD15_SMALL, Adapter, load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable

SEED = 0


@dataclass(frozen=True, kw_only=True)
class BenchNet:
    """A denoiser and everything that is needed to call it."""

    name: str
    module_factory: Callable[[torch.dtype], nn.Module]
    """Builds the denoiser in a dtype, with the same weights every time."""
    adapter: Adapter
    latent_shape: tuple[int, ...]
    """Shape of one sample's latents."""
    text_tokens: int
    text_width: int
    schedule: NoiseSchedule

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The denoiser in evaluation mode, with weights in `dtype`, on the default device."""
        return self.module_factory(dtype)

    def predict(
        self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The network's raw output (B, ...) by the project's adapter.

        x is (B, ...), t (B,) int64; the adapter casts the inputs to the network's dtype.
        """
        return self.adapter.predict(network, x, t, cond)

    def table(self, prompts: int, dtype: torch.dtype, device: torch.device) -> ConditioningTable:
        """Random text embeddings of shape (prompts + 1, text_tokens, text_width) in `dtype`.

        Row 0 stands for the empty prompt.
        """
        generator = torch.Generator().manual_seed(SEED)
        rows = torch.randn(prompts + 1, self.text_tokens, self.text_width, generator=generator).to(device)
        empty, filled = {"encoder_hidden_states": rows[:1]}, {"encoder_hidden_states": rows[1:]}
        return ConditioningTable.build(empty, filled, dtype)

    def latents(self, images: int, device: torch.device) -> torch.Tensor:
        """Random latents (images, ...) float32 that stand for the scaled latents of real images."""
        generator = torch.Generator().manual_seed(SEED + 1)
        return torch.randn(images, *self.latent_shape, generator=generator).to(device)


def digits() -> BenchNet:
    """The trained UNet of the embedded model: 1,077,572 parameters.

    Latents are 8x8, a prompt has 16 tokens of width 64.
    """
    adapter = load_adapter("digits")
    return _net("digits", adapter, adapter.load_denoiser)


def sd15_small() -> BenchNet:
    """Half of Stable Diffusion 1.5's UNet with random weights: 79,865,604 parameters.

    It has SD1.5's first two widths, 320 and 640, with one layer per block. Latents are 32x32, a
    prompt has 77 tokens of width 768. The configs are part of the package, where
    `selfnpo doctor --verify` uses them as well.
    """
    adapter = load_adapter(str(SD15_SMALL), configs_only=True)

    def seeded(dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return adapter.new_denoiser(dtype)

    return _net("sd15_small", adapter, seeded)


def _net(name: str, adapter: Adapter, factory: Callable[[torch.dtype], nn.Module]) -> BenchNet:
    tokens, width = adapter.conditioning_shapes["encoder_hidden_states"]
    return BenchNet(
        name=name,
        module_factory=factory,
        adapter=adapter,
        latent_shape=adapter.latent_shape,
        text_tokens=tokens,
        text_width=width,
        schedule=adapter.schedule,
    )


NETS = {"digits": digits, "sd15_small": sd15_small}
