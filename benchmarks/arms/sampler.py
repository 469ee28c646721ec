"""The arms of `bench_sampler.py`: ways to draw the same pictures under guidance, on one network and one negative."""

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

from benchmarks.nets import BenchNet
from selfnpo_fast import GuidedSampler, attach_negative
from selfnpo_fast.guidance.sampler import SamplerConfig, make_scheduler, start_noise
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import Deltas, LowRank

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
GUIDANCE_SCALE = 7.5
SEED = 0


def random_lora(network: nn.Module, rank: int = RANK) -> Deltas:
    """A low-rank update of every attention projection, as `lora.targets` has them by default."""
    generator, deltas = torch.Generator().manual_seed(SEED + 7), {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(TARGETS):
            down = torch.randn(rank, layer.in_features, generator=generator).to(layer.weight) / layer.in_features**0.5
            up = torch.randn(layer.out_features, rank, generator=generator).to(layer.weight)
            deltas[path] = LowRank(down=down, up=up, scale=0.1)
    return deltas


def merge(network: nn.Module, deltas: Deltas) -> None:
    """Fold the update into the network's own weights."""
    with torch.no_grad():
        for path, delta in deltas.items():
            weight = network.get_submodule(path).weight
            weight.add_(delta.delta().to(weight))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to draw; `prepare(bench)` gives a function that draws latents and whatever undoes it."""

    name: str
    label: str
    prepare: Callable[[Bench, ExitStack], Callable[[], torch.Tensor]]
    truth: str
    """Whose latents these have to be: `plain` guidance or guidance against the `negative`."""
    networks: int = 1


class Bench:
    """One network with a LoRA, and the same as a whole second network."""

    def __init__(self, net: BenchNet, *, batch: int, steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self.net, self.batch, self.device = net, batch, device
        self.network = net.network(dtype).to(device)
        self.deltas = random_lora(self.network)
        self.full: nn.Module | None = None  # made when an arm needs it: peak memory is that of each arm alone
        self.dtype = dtype
        table = net.table(batch, dtype, device)
        self.prompts, self.empty = table.gather(torch.arange(batch, device=device) + 1), table.empty(1)
        self.config = SamplerConfig(steps=steps, guidance_scale=GUIDANCE_SCALE, solver="ddim", batch_size=batch)
        self.noise = start_noise(list(range(batch)), net.latent_shape, device)

    def second(self) -> nn.Module:
        """The negative as a network of its own."""
        if self.full is None:
            self.full = self.net.network(self.dtype).to(self.device)
            merge(self.full, self.deltas)
        return self.full

    def pipeline(self) -> StableDiffusionPipeline:
        """The stock pipeline around the network; text and pictures are left out, in all arms alike."""
        scheduler = DDIMScheduler.from_config(self.net.adapter.scheduler_config, clip_sample=False)
        parts = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None}
        pipe = StableDiffusionPipeline(
            unet=self.network, scheduler=scheduler, feature_extractor=None, requires_safety_checker=False, **parts
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw_stock(self, pipe: StableDiffusionPipeline) -> torch.Tensor:
        """Latents (B, C, H, W) by the pipeline's own call."""
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
        """Latents by a GuidedSampler."""
        return Drawing(self, GuidedSampler(self.net.adapter, self.network, negative))


class Drawing:
    """Draws latents with a sampler, and can tell the time within networks from the rest."""

    def __init__(self, bench: Bench, sampler: GuidedSampler) -> None:
        self.bench, self.sampler = bench, sampler

    def __call__(self) -> torch.Tensor:
        bench = self.bench
        return self.sampler.latents(bench.prompts, bench.empty, list(range(bench.batch)), bench.config)

    def beyond(self) -> float:
        """The share of one call that is not spent in forwards of networks."""
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
        whole = time.perf_counter() - start
        branches.predict = forward
        return 1 - inside / whole


def _stock(bench: Bench, _: ExitStack) -> Callable[[], torch.Tensor]:
    pipe = bench.pipeline()
    return lambda: bench.draw_stock(pipe)


def _attached(kind: str) -> Callable:
    def prepare(bench: Bench, undo: ExitStack) -> Callable[[], torch.Tensor]:
        pipe = bench.pipeline()
        undo.enter_context(attach_negative(pipe, _negative(bench, kind)))
        return lambda: bench.draw_stock(pipe)

    return prepare


def _negative(bench: Bench, kind: str) -> Negative | None:
    if kind == "lora":
        return Negative("bench", deltas=bench.deltas)
    return Negative("bench", network=bench.second()) if kind == "full" else None


def _sampled(kind: str) -> Callable:
    return lambda bench, _: bench.sampler(_negative(bench, kind))


def _two_networks(bench: Bench, _: ExitStack) -> Callable[[], torch.Tensor]:
    """Two whole networks, one forward after the other, eager guidance and diffusers' own step, as the authors do."""
    scheduler = make_scheduler("ddim", bench.net.adapter.scheduler_config)
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
    """Bytes of weights held and of the most that one call allocates beside them, by PyTorch's allocation records."""
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


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
