"""The arms of `bench_sampler.py`: ways to draw the same guided pictures with one network."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import synchronize
from benchmarks.nets import BenchNet
from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.diffusion.schedulers import new_scheduler
from selfnpo_fast.guidance.sampler import SamplerConfig, start_noise
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import Deltas, LowRank
from selfnpo_fast.runtime.batch_or_split import BatchOrSplit
from selfnpo_fast.runtime.capture import CudaGraphs

RANK = 16
"""Rank of the negative's LoRA."""
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of the LoRA: the default of `lora.targets`."""
GUIDANCE_SCALE = 7.5
SEED = 0
WITHOUT = {
    "StableDiffusionPipeline": {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""What keeps other parts than denoiser and scheduler out of a stock pipeline."""


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


Draw = Callable[[], torch.Tensor]
"""Draws a batch: latents (B, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to draw."""

    name: str
    """Name in the results."""
    label: str
    """Name in table and chart."""
    prepare: Callable[[Bench, ExitStack], Draw]
    """Returns a function that draws latents (B, C, H, W); the ExitStack takes its clean-up."""
    truth: str
    """The right latents: those of "plain" guidance, or of guidance against the "negative"."""
    networks: int = 1
    """Whole networks that the arm holds."""
    graphs: bool = False
    """Whether steps are replayed as CUDA graphs, which needs a GPU."""
    attaches: bool = False
    """Whether the arm changes the network that the arms share: it is prepared for every use."""


class Bench:
    """A network and a negative of it, which is a LoRA or, merged, a second whole network.

    `batch` is the number of pictures per call, `steps` the number of DDIM steps.
    """

    def __init__(self, net: BenchNet, *, batch: int, steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self.net, self.batch, self.device, self.dtype = net, batch, device, dtype
        self.network = net.network(dtype, device)
        self.deltas = random_lora(self.network)
        self.full: nn.Module | None = None  # built when an arm first needs it: the others do without its memory
        table = net.table(batch, dtype, device)
        self.prompts, self.empty = table.gather(torch.arange(batch, device=device) + 1), table.empty(1)
        self.config = SamplerConfig(steps=steps, guidance_scale=GUIDANCE_SCALE, solver="ddim", batch_size=batch)
        self.noise = start_noise(list(range(batch)), net.latent_shape, device)

    def second(self) -> nn.Module:
        """The negative as a whole network."""
        if self.full is None:
            self.full = self.net.network(self.dtype, self.device)
            merge(self.full, self.deltas)
        return self.full

    def negatives(self) -> Conditioning:
        """The negative branch's rows (B, ...)."""
        return {name: self.empty[name].expand_as(rows) for name, rows in self.prompts.items()}

    def pipeline(self) -> Any:
        """The stock pipeline around the network, without text encoders and autoencoder."""
        family = self.net.adapter.family
        scheduler = DDIMScheduler.from_config(self.net.adapter.scheduler_config, clip_sample=False)
        parts = dict.fromkeys(family.part_classes) | WITHOUT[family.pipeline_class]
        pipe = family.load_class(family.pipeline_class)(unet=self.network, scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw_stock(self, pipe: Any) -> torch.Tensor:
        """Latents (B, C, H, W) from a call of the pipeline."""
        prompts, negatives = self.prompts, self.negatives()
        height, width = (side * pipe.vae_scale_factor for side in self.net.latent_shape[1:])
        arguments = {
            "prompt_embeds": prompts["encoder_hidden_states"],
            "negative_prompt_embeds": negatives["encoder_hidden_states"],
        }
        if "text_embeds" in prompts:
            size = self.net.adapter.size
            size = size.height, size.width
            arguments |= {
                "pooled_prompt_embeds": prompts["text_embeds"],
                "negative_pooled_prompt_embeds": negatives["text_embeds"],
                "original_size": size,
                "target_size": size,
            }
        return pipe(
            num_inference_steps=self.config.steps,
            guidance_scale=GUIDANCE_SCALE,
            latents=self.noise.to(self.dtype),
            height=height,
            width=width,
            output_type="latent",
            **arguments,
        ).images


class Drawing:
    """Draws latents with a GuidedSampler, and measures how much of a call the networks take."""

    def __init__(self, bench: Bench, negative: Negative | None, graphs: bool) -> None:
        self.bench = bench
        self.sampler = GuidedSampler(bench.net.adapter, bench.network, negative, graphs=graphs)

    def __call__(self) -> torch.Tensor:
        bench = self.bench
        return self.sampler.latents(bench.prompts, bench.empty, list(range(bench.batch)), bench.config)

    @property
    def captures(self) -> bool:
        """Whether steps are captured: not on a CPU, and no more once a capture has failed."""
        return getattr(self.sampler._trajectories.capture, "on", False)

    def beyond(self) -> float:
        """Runs one call; returns the share of its time outside of the networks' forwards.

        The device is waited for before and after each forward, so that on a GPU the share includes
        launches that would otherwise hide behind the forward. Inside of a captured step there is
        nothing to wait for: this is for a sampler without graphs.
        """
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
        try:
            synchronize(device)
            start = time.perf_counter()
            self()
            synchronize(device)
            total = time.perf_counter() - start
        finally:
            branches.predict = forward
        return 1 - inside / total


def calls_to_settle(draw: Draw, steps: int) -> int:
    """Calls of `steps` steps after which an arm does nothing for the first time any more.

    A sampler times both ways to run its branches, then warms up and captures its step; in one more
    call it only repeats itself. Other arms have one first call.
    """
    first = 1
    if isinstance(draw, Drawing):
        captured = CudaGraphs.WARM_UP + 1 if draw.captures else 0
        first = math.ceil((2 * BatchOrSplit.TRIALS + captured) / steps)
    return first + 1


def _stock(bench: Bench, _: ExitStack) -> Draw:
    """Prepares the stock pipeline with plain guidance."""
    pipe = bench.pipeline()
    return lambda: bench.draw_stock(pipe)


def _attached(kind: str) -> Callable[[Bench, ExitStack], Draw]:
    """Prepares the stock pipeline with a negative attached; kind is "lora" or "full"."""

    def prepare(bench: Bench, undo: ExitStack) -> Draw:
        pipe = bench.pipeline()
        undo.enter_context(attach_negative(pipe, _negative(bench, kind)))
        return lambda: bench.draw_stock(pipe)

    return prepare


def _negative(bench: Bench, kind: str) -> Negative | None:
    """The negative as a LoRA ("lora"), as a whole network ("full"), or None ("none")."""
    if kind == "lora":
        return Negative("bench", deltas=bench.deltas)
    return Negative("bench", network=bench.second()) if kind == "full" else None


def _sampled(kind: str, graphs: bool) -> Callable[[Bench, ExitStack], Draw]:
    """Prepares a GuidedSampler with a negative of this kind."""

    def prepare(bench: Bench, undo: ExitStack) -> Draw:
        drawing = Drawing(bench, _negative(bench, kind), graphs)
        undo.callback(drawing.sampler.close)
        return drawing

    return prepare


def _two_networks(bench: Bench, _: ExitStack) -> Draw:
    """Prepares what the authors do: two whole networks, with eager guidance and diffusers' step.

    Each step makes one forward after the other.
    """
    adapter = bench.net.adapter
    scheduler, second = new_scheduler("ddim", adapter.scheduler), bench.second()
    prompts, negatives = adapter.arguments(bench.prompts), adapter.arguments(bench.negatives())

    @torch.no_grad()
    def draw() -> torch.Tensor:
        scheduler.set_timesteps(bench.config.steps, device=bench.device)
        x = bench.noise.to(bench.dtype)
        for t in scheduler.timesteps:
            pos = bench.network(x, t, **prompts).sample
            neg = second(x, t, **negatives).sample
            x = scheduler.step(neg + GUIDANCE_SCALE * (pos - neg), t, x).prev_sample
        return x

    return draw


STOCK, TWO = "stock", "two_networks"


def _attach_arm(kind: str, label: str, networks: int = 1) -> Arm:
    label, prepare = f"attach_negative, {label}", _attached(kind)
    return Arm(name=f"attach_{kind}", label=label, prepare=prepare, truth="negative", networks=networks, attaches=True)


def _sampler_arms(name: str, label: str, kind: str, networks: int = 1) -> tuple[Arm, Arm]:
    """The sampler with a negative of this kind, without and with graphs."""
    truth = "plain" if kind == "none" else "negative"
    label = f"GuidedSampler, {label}"
    settings = {"truth": truth, "networks": networks}
    return (
        Arm(name=name, label=label, prepare=_sampled(kind, False), **settings),
        Arm(name=f"{name}_graphs", label=f"{label}, graphs", prepare=_sampled(kind, True), graphs=True, **settings),
    )


ARMS = (
    Arm(name=STOCK, label="stock pipeline, plain guidance", prepare=_stock, truth="plain"),
    _attach_arm("lora", "LoRA"),
    _attach_arm("full", "full weights", networks=2),
    *_sampler_arms("sampler", "plain guidance", "none"),
    *_sampler_arms("sampler_lora", "LoRA", "lora"),
    *_sampler_arms("sampler_full", "full weights", "full", networks=2),
    Arm(name=TWO, label="two networks in turn, eager step", prepare=_two_networks, truth="negative", networks=2),
)


class Peak:
    """The most memory that an arm takes: what its networks hold, plus the most that it adds.

    Networks and states of other arms are not counted. To be made before the arm is prepared.
    """

    def __init__(self, bench: Bench, arm: Arm) -> None:
        self.bench, self.arm = bench, arm
        self.networks = [bench.network] + ([bench.second()] if arm.networks == 2 else [])
        self.cuda = bench.device if bench.device.type == "cuda" else None
        gc.collect()
        if self.cuda is not None:
            torch.cuda.synchronize(self.cuda)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.held = bytes_of(self.networks)
            self.allocated, self.reserved = (
                torch.cuda.memory_allocated(self.cuda),
                torch.cuda.memory_reserved(self.cuda),
            )

    def read(self, draw: Draw) -> dict[str, int | None]:
        """`peak_bytes` allocated and, on a GPU, `reserved_bytes` by its caching allocator.

        A GPU keeps count since this was made. On a CPU one more call is recorded.
        """
        if self.cuda is not None:
            added = torch.cuda.max_memory_allocated(self.cuda) - self.allocated
            reserved = torch.cuda.max_memory_reserved(self.cuda) - self.reserved
            return {"peak_bytes": self.held + added, "reserved_bytes": self.held + reserved}
        # Attached layers hold the LoRA as buffers of the network, where it is counted already.
        lora = sum(d.down.nbytes + d.up.nbytes for d in self.bench.deltas.values()) if "lora" in self.arm.name else 0
        held = bytes_of(self.networks) + (lora if isinstance(draw, Drawing) else 0)
        return {"peak_bytes": held + most_allocated(draw), "reserved_bytes": None}


def bytes_of(networks: list[nn.Module]) -> int:
    """Bytes of the networks' weights and buffers."""
    return sum(p.nbytes for network in networks for p in (*network.parameters(), *network.buffers()))


def most_allocated(draw: Draw) -> int:
    """The most bytes that a call of `draw` holds at once on the CPU, by PyTorch's records."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        draw()
    blocks = sorted(
        (event.start_ns(), event.nbytes())
        for event in records.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    )
    return max(accumulate((size for _, size in blocks), initial=0))
