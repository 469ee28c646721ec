"""The networks that benchmarks run: the digits UNet, and others without weights.

Conditioning, latents and the weights of all but the digits UNet are seeded random numbers: their
values do not change what a forward costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models import SD15_SMALL, Adapter, load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable

CONFIGS = Path(__file__).resolve().parent / "configs"
SEED = 0


@dataclass(frozen=True, kw_only=True)
class BenchNet:
    """A denoiser and everything that is needed to call it."""

    name: str
    adapter: Adapter
    trained: bool = False
    """Whether the adapter has weights. Without them the denoiser gets random ones."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return self.adapter.latent_shape

    @property
    def schedule(self) -> Levels:
        """The model's noise levels."""
        return self.adapter.schedule

    def network(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """The denoiser in evaluation mode, with weights in `dtype` on `device`: the same every time.

        Random weights are drawn on the device in that dtype, as torch initialises layers: neither
        the host nor the device ever holds another copy. They differ between kinds of device.
        """
        if self.trained:
            return self.adapter.load_denoiser(dtype).to(device)
        device, before = torch.device(device), torch.get_default_dtype()
        drawing = [device] if device.type == "cuda" else []
        try:
            torch.set_default_dtype(dtype)
            with torch.random.fork_rng(devices=drawing), device:
                torch.manual_seed(SEED)
                return self.adapter.new_denoiser(dtype)
        finally:
            torch.set_default_dtype(before)

    def predict(
        self, network: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The network's raw output (B, ...) by the project's adapter.

        x is (B, ...), t (B,) int64 noise levels; the adapter casts the inputs to the network's dtype.
        """
        return self.adapter.predict_level(network, x, t, cond)

    def table(self, prompts: int, dtype: torch.dtype, device: torch.device) -> ConditioningTable:
        """Random conditioning: rows (prompts + 1, ...) in `dtype` by the adapter's
        `conditioning_shapes`, and the sizes of SDXL as they are.

        Row 0 stands for the empty prompt.
        """
        generator = torch.Generator().manual_seed(SEED)
        rows = {
            name: torch.randn(prompts + 1, *shape, generator=generator)
            for name, shape in self.adapter.conditioning_shapes.items()
        }
        rows = {name: value.to(device) for name, value in self.adapter.sized(rows, self.adapter.size).items()}
        empty, filled = ({name: value[part] for name, value in rows.items()} for part in (slice(1), slice(1, None)))
        return ConditioningTable.build(empty, filled, dtype)

    def latents(self, images: int, device: torch.device) -> torch.Tensor:
        """Random latents (images, ...) float32 that stand for the scaled latents of real images."""
        generator = torch.Generator().manual_seed(SEED + 1)
        return torch.randn(images, *self.latent_shape, generator=generator).to(device)


def digits() -> BenchNet:
    """The trained UNet of the embedded model: 1,077,572 parameters.

    Latents are 8x8, a prompt has 16 tokens of width 64.
    """
    return BenchNet(name="digits", adapter=load_adapter("digits"), trained=True)


def sd15_small() -> BenchNet:
    """Half of Stable Diffusion 1.5's UNet: 79,865,604 parameters.

    It has SD1.5's first two widths, 320 and 640, with one layer per block. Latents are 32x32, a
    prompt has 77 tokens of width 768. The configs are part of the package, where
    `selfnpo doctor --verify` uses them as well.
    """
    return BenchNet(name="sd15_small", adapter=load_adapter(str(SD15_SMALL), configs_only=True))


def _without_weights(name: str, **size: int) -> BenchNet:
    """The network of the configs in `CONFIGS`; `size` is for `load_adapter`."""
    return BenchNet(name=name, adapter=load_adapter(str(CONFIGS / name), configs_only=True, **size))


def cogvideox_small() -> BenchNet:
    """A narrow CogVideoX: 7 blocks of width 640, 66,000,064 parameters.

    Rotary positions and noise levels are those of 5B. Latents are 3x16x16x24, of 9 frames; a prompt
    has 226 tokens of width 4,096.
    """
    return _without_weights("cogvideox_small")


def sd35_small() -> BenchNet:
    """A narrow Stable Diffusion 3.5 medium: 6 blocks of width 640, 97,696,064 parameters.

    As in the published model the first half of the blocks has a second attention. Latents are
    16x32x32; a prompt has 333 tokens of width 4,096 and 2,048 numbers of pooled text.
    """
    return _without_weights("sd35_small")


def sd15() -> BenchNet:
    """Stable Diffusion 1.5's UNet: 859,520,964 parameters.

    Latents are 64x64, a prompt has 77 tokens of width 768.
    """
    return _without_weights("sd15")


def sdxl() -> BenchNet:
    """Stable Diffusion XL's UNet: 2,567,463,684 parameters.

    Latents are 128x128. A prompt has 77 tokens of width 2,048, 1,280 numbers of pooled text and six
    of sizes.
    """
    return _without_weights("sdxl")


def sd35_medium() -> BenchNet:
    """Stable Diffusion 3.5 medium's transformer: 2,243,171,520 parameters.

    Latents are 16x128x128; a prompt is as in `sd35_small`.
    """
    return _without_weights("sd35_medium")


def cogvideox_5b() -> BenchNet:
    """CogVideoX-5B's transformer: 5,570,283,072 parameters.

    Latents are 3x16x60x90, of 9 frames instead of 49: without checkpointing the activations of one
    whole clip fill a card. A prompt is as in `cogvideox_small`.
    """
    return _without_weights("cogvideox_5b", frames=9)


def wan21_1_3b() -> BenchNet:
    """Wan 2.1's smaller transformer: 1,418,996,800 parameters.

    Latents are 16x5x60x104, of 17 frames instead of 81, for the same reason as in `cogvideox_5b`. A
    prompt has 512 tokens of width 4,096.
    """
    return _without_weights("wan21_1_3b", frames=17)


NETS = {
    "digits": digits,
    "sd15_small": sd15_small,
    "cogvideox_small": cogvideox_small,
    "sd35_small": sd35_small,
    "sd15": sd15,
    "sdxl": sdxl,
    "sd35_medium": sd35_medium,
    "cogvideox_5b": cogvideox_5b,
    "wan21_1_3b": wan21_1_3b,
}
UNETS = ("digits", "sd15_small", "sd15", "sdxl")
"""The networks that `bench_sampler.py` puts into stock pipelines."""
SMALL = ("digits", "sd15_small")
"""The UNets that a CPU can run, which are all that `--net all` means."""
TRANSFORMERS = ("cogvideox_small", "sd35_small")
"""The transformers that a CPU can run, which `--net transformers` means."""


def chosen(net: str | None, quick: bool = False) -> tuple[str, ...]:
    """The names in `NETS` that an option `--net` stands for.

    None is `all`, or with `quick` the smallest network.
    """
    if net is None:
        net = SMALL[0] if quick else "all"
    return {"all": SMALL, "transformers": TRANSFORMERS}.get(net, (net,))
