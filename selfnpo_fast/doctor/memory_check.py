"""The memory model of `costs.py` held against a real update, by the allocation records of torch.profiler.

The network has its real class and size and random weights, text embeddings are random, and all else is the trainer's
own: no weights are read. The second update counts, when the optimiser has its moments. On a GPU as on a CPU the records
are those of PyTorch's allocator, so that neither libraries' workspaces nor fragmentation are in them.
"""

from __future__ import annotations

import gc
import tempfile
from bisect import bisect_right
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from selfnpo_fast.config import LogConfig, TrainConfig
from selfnpo_fast.doctor.costs import Memory
from selfnpo_fast.models import StableDiffusionAdapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.engine import start_deepspeed
from selfnpo_fast.training.inputs import Inputs
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.trainer import Trainer

TOLERANCE = 0.10
_MARK = "selfnpo.verify."


@dataclass(frozen=True)
class Comparison:
    """Bytes by name: what the model says, and what was allocated."""

    computed: dict[str, int]
    measured: dict[str, int]

    @property
    def error(self) -> float:
        """Of the peak, relative to what was measured."""
        return self.computed["peak"] / self.measured["peak"] - 1

    @property
    def holds(self) -> bool:
        """Whether the peak is within TOLERANCE."""
        return abs(self.error) <= TOLERANCE


def compare(predicted: Memory, measured: dict[str, int]) -> Comparison:
    """The model's figures under the names of `measure`: gradients are reduced within the engine's backward."""
    phases, rest = predicted.phases, sum(predicted.rest.values())
    backward = max(phases["student forward and backward"], phases["gradient reduction"])
    computed = {
        "at rest": rest,
        "reference forward": phases["reference forward"],
        "student forward and backward": backward,
        "optimiser step": phases["optimiser step"],
        "peak": predicted.peak,
    }
    return Comparison(computed, measured)


def measure(config: TrainConfig, adapter: StableDiffusionAdapter, prompts: int, world: World) -> dict[str, int]:
    """Bytes that live before the second update, what each phase adds to them, and the peak of that update."""
    config = replace(config, log=LogConfig(sample_every=-1))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])
    gc.collect()  # what an earlier profile saw made, and this one saw freed, would count against it
    # From the very start: a block's size is known to the profiler only if it saw the block made.
    records, alone = profile(activities=activities, profile_memory=True), _nothing_sent(world)
    with records, alone, tempfile.TemporaryDirectory() as output:
        trainer = Trainer(config, _random_inputs(config, adapter, prompts, world), world, Path(output))
        recorder = Recorder(config, world, adapter.schedule.num_train_timesteps)
        trainer.producer.rollout.fill()  # a steady update is what the model describes
        trainer.train_update(recorder)
        trainer.producer.take = _marked("reference forward", trainer.producer.take)
        trainer.pair_loss = _marked("student forward and backward", trainer.pair_loss)
        trainer.engine.backward = _marked("student forward and backward", trainer.engine.backward)
        trainer.engine.step = _marked("optimiser step", trainer.engine.step)
        _marked("update", trainer.train_update)(recorder)
    return _peaks(records, world.device.type)


def _nothing_sent(world: World) -> AbstractContextManager:
    """With one rank, what DeepSpeed sends around does at once what it comes to.

    gloo has them done by a thread of its own, which may be the last to let go of a tensor, or copies one; and of what
    that thread frees the profiler keeps no records.
    """
    start_deepspeed(world)
    from deepspeed.comm import comm

    def unchanged(*args, **kwargs):
        """Of an all-reduce, or a broadcast."""
        return _Done()

    def copied(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args, **kwargs):
        """Of an all-gather, or a reduce-scatter."""
        output_tensor.copy_(input_tensor)
        return _Done()

    replaced = dict.fromkeys(("all_reduce", "broadcast"), unchanged)
    replaced |= dict.fromkeys(("all_gather_into_tensor", "reduce_scatter_tensor"), copied)
    return mock.patch.multiple(comm.cdb, **replaced)


class _Done:
    """The handle of a reduction that is over."""

    def wait(self) -> None:
        """Returns at once."""


def _marked(name: str, function):
    def call(*args, **kwargs):
        with record_function(_MARK + name):
            return function(*args, **kwargs)

    return call


def _random_inputs(config: TrainConfig, adapter: StableDiffusionAdapter, prompts: int, world: World) -> Inputs:
    dtype, device = DTYPES[config.engine.precision], world.device

    def rows(count: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(count, *shape, device=device) for name, shape in adapter.conditioning_shapes.items()}

    latents = torch.randn(prompts, *adapter.latent_shape) if config.rollout.start == "data" else None
    with torch.random.fork_rng(devices=[]):
        student = adapter.new_denoiser(dtype).to(device)
    table = ConditioningTable.build(rows(1), rows(prompts), dtype)
    return Inputs(adapter, table, [""] * prompts, latents, student, base={})


def _peaks(records: profile, device_type: str) -> dict[str, int]:
    """Running sums of the allocation records, cut by the marks."""
    kind = torch.autograd.DeviceType.CUDA if device_type == "cuda" else torch.autograd.DeviceType.CPU
    events = records.profiler.kineto_results.events()
    blocks = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == kind
    )
    times, live = [time for time, _ in blocks], list(accumulate(size for _, size in blocks))
    spans: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        if event.name().startswith(_MARK):
            first, last = (bisect_right(times, t) - 1 for t in (event.start_ns(), event.end_ns()))
            spans.setdefault(event.name().removeprefix(_MARK), []).append((first, last))
    ((first, last),) = spans.pop("update")
    rest = live[first]
    out = {"at rest": rest}
    for name, parts in spans.items():
        out[name] = max(max(live[start : end + 1]) for start, end in parts) - rest
    return out | {"peak": max(live[first : last + 1])}
