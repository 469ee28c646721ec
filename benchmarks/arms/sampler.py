"""The arms of `bench_sampler.py`: ways to draw the same guided pictures with one network."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import synchronize
from benchmarks.nets import BenchNet
from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.diffusion.schedulers import new_scheduler
from selfnpo_fast.guidance.sampler import SamplerConfig, start_noise
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import Deltas, LowRank

RANK = 16
"""Rank of the negative's LoRA."""
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of the LoRA: the default of `lora.targets`."""
GUIDANCE_SCALE = 7.5
SEED = 0


def random_lora(network: nn.Module, rank: int = RANK) -> Deltas:
    """A random low-rank update of every attention projection of the network."""
    generator, deltas = torch.Generator().manual_seed(SEED + 7), {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(TARGETS):
            down = torch.randn(rank, layer.in_features, generator=generator).to(layer.weight) / layer.in_features**0.5
            up = torch.randn(layer.out_features, rank, generator=generator).to(layer.weight)
            deltas[path] = LowRank(down=down, up=up, scale=0.1)
    return deltas


def merge(network: nn.Module, deltas: Deltas) -> None:
    """Adds the update to the network's weights in place."""
    with torch.no_grad():
        for path, delta in deltas.items():
            weight = network.get_submodule(path).weight
            weight.add_(delta.delta().to(weight))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to draw."""

    name: str
    """Name in the results."""
    label: str
    """Name in table and chart."""
    prepare: Callable[[Bench, ExitStack], Callable[[], torch.Tensor]]
    """Returns a function that draws latents (B, C, H, W); the ExitStack takes its clean-up."""
    truth: str
    """The right latents: those of "plain" guidance, or of guidance against the "negative"."""
    networks: int = 1
    """Whole networks that the arm holds."""


class Bench:
    """A network and a negative of it, which is a LoRA or, merged, a second whole network.

    `batch` is the number of pictures per call, `steps` the number of DDIM steps.
    """

    def __init__(self, net: BenchNet, *, batch: int, steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self.net, self.batch, self.device = net, batch, device
        self.network = net.network(dtype).to(device)
        self.deltas = random_lora(self.network)
        self.full: nn.Module | None = None  # built when an arm first needs it: the others do without its memory
        self.dtype = dtype
        table = net.table(batch, dtype, device)
        self.prompts, self.empty = table.gather(torch.arange(batch, device=device) + 1), table.empty(1)
        self.config = SamplerConfig(steps=steps, guidance_scale=GUIDANCE_SCALE, solver="ddim", batch_size=batch)
        self.noise = start_noise(list(range(batch)), net.latent_shape, device)

    def second(self) -> nn.Module:
        """The negative as a whole network."""
        if self.full is None:
            self.full = self.net.network(self.dtype).to(self.device)
            merge(self.full, self.deltas)
        return self.full

    def pipeline(self) -> StableDiffusionPipeline:
        """The stock pipeline around the network, without text encoder and autoencoder."""
        scheduler = DDIMScheduler.from_config(self.net.adapter.scheduler_config, clip_sample=False)
        parts = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None}
        pipe = StableDiffusionPipeline(
            unet=self.network, scheduler=scheduler, feature_extractor=None, requires_safety_checker=False, **parts
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw_stock(self, pipe: StableDiffusionPipeline) -> torch.Tensor:
        """Latents (B, C, H, W) from a call of the pipeline."""
        row = self.prompts["encoder_hidden_states"]
        side = self.net.latent_shape[-1] * pipe.vae_scale_factor
        return pipe(
            prompt_embeds=row,
            negative_prompt_embeds=self.empty["encoder_hidden_states"].expand_as(row),
            num_inference_steps=self.config.steps,
            guidance_scale=GUIDANCE_SCALE,
            latents=self.noise.to(row.dtype),
            height=side,
            width=side,
            output_type="latent",
        ).images

    def sampler(self, negative: Negative | None) -> Drawing:
        """A function that draws latents with a GuidedSampler."""
        return Drawing(self, GuidedSampler(self.net.adapter, self.network, negative))


class Drawing:
    """Draws latents with a GuidedSampler, and measures how much of a call the networks take."""

    def __init__(self, bench: Bench, sampler: GuidedSampler) -> None:
        self.bench, self.sampler = bench, sampler

    def __call__(self) -> torch.Tensor:
        bench = self.bench
        return self.sampler.latents(bench.prompts, bench.empty, list(range(bench.batch)), bench.config)

    def beyond(self) -> float:
        """Runs one call; returns the share of its time outside of the networks' forwards."""
        branches, device, inside = self.sampler._branches, self.bench.device, 0.0
        forward = branches.predict

        def timed(*arguments):
            nonlocal inside
            synchronize(device)
            start = time.perf_counter()
            out = forward(*arguments)
            synchronize(device)
            inside += time.perf_counter() - start
            return out

        branches.predict = timed
        start = time.perf_counter()
        self()
        synchronize(device)
        total = time.perf_counter() - start
        branches.predict = forward
        return 1 - inside / total


def _stock(bench: Bench, _: ExitStack) -> Callable[[], torch.Tensor]:
    """Prepares the stock pipeline with plain guidance."""
    pipe = bench.pipeline()
    return lambda: bench.draw_stock(pipe)


def _attached(kind: str) -> Callable:
    """Prepares the stock pipeline with a negative attached; kind is "lora" or "full"."""

    def prepare(bench: Bench, undo: ExitStack) -> Callable[[], torch.Tensor]:
        pipe = bench.pipeline()
        undo.enter_context(attach_negative(pipe, _negative(bench, kind)))
        return lambda: bench.draw_stock(pipe)

    return prepare


def _negative(bench: Bench, kind: str) -> Negative | None:
    """The negative as a LoRA ("lora"), as a whole network ("full"), or None ("none")."""
    if kind == "lora":
        return Negative("bench", deltas=bench.deltas)
    return Negative("bench", network=bench.second()) if kind == "full" else None


def _sampled(kind: str) -> Callable:
    """Prepares a GuidedSampler with a negative of this kind."""
    return lambda bench, _: bench.sampler(_negative(bench, kind))


def _two_networks(bench: Bench, _: ExitStack) -> Callable[[], torch.Tensor]:
    """Prepares what the authors do: two whole networks, with eager guidance and diffusers' step.

    Each step makes one forward after the other.
    """
    scheduler = new_scheduler("ddim", bench.net.adapter.scheduler)
    second = bench.second()

    @torch.no_grad()
    def draw() -> torch.Tensor:
        scheduler.set_timesteps(bench.config.steps)
        row = bench.prompts["encoder_hidden_states"]
        empty = bench.empty["encoder_hidden_states"].expand_as(row)
        x = bench.noise.to(row.dtype)
        for t in scheduler.timesteps:
            pos = bench.network(x, t, row).sample
            neg = second(x, t, empty).sample
            x = scheduler.step(neg + GUIDANCE_SCALE * (pos - neg), t, x).prev_sample
        return x

    return draw


def _arm(name: str, label: str, prepare: Callable, truth: str = "negative", networks: int = 1) -> Arm:
    return Arm(name=name, label=label, prepare=prepare, truth=truth, networks=networks)


STOCK, TWO = "stock", "two_networks"
ARMS = (
    _arm(STOCK, "stock pipeline, plain guidance", _stock, truth="plain"),
    _arm("attach_lora", "attach_negative, LoRA", _attached("lora")),
    _arm("attach_full", "attach_negative, full weights", _attached("full"), networks=2),
    _arm("sampler", "GuidedSampler, plain guidance", _sampled("none"), truth="plain"),
    _arm("sampler_lora", "GuidedSampler, LoRA", _sampled("lora")),
    _arm("sampler_full", "GuidedSampler, full weights", _sampled("full"), networks=2),
    _arm(TWO, "two networks in turn, eager step", _two_networks, networks=2),
)


def peak_bytes(draw: Callable[[], torch.Tensor], networks: list[nn.Module], extra: int, device: torch.device) -> int:
    """Bytes of the networks' weights, plus `extra`, plus the most that a call of `draw` allocates.

    The allocations are those of PyTorch's allocation records.
    """
    held = sum(p.nbytes for network in networks for p in (*network.parameters(), *network.buffers())) + extra
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    gc.collect()
    with profile(activities=activities, profile_memory=True) as records:
        draw()
    blocks = sorted(
        (event.start_ns(), event.nbytes())
        for event in records.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == kind
    )
    return held + max(accumulate((size for _, size in blocks), initial=0))
