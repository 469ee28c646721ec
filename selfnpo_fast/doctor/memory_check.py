"""Compares the memory model of `costs.py` with the allocation records of a real update.

The records are those of torch.profiler.

The network has its real class and size but random weights, the text embeddings are random, and
everything else is the trainer's code: no weights are read. The second update is measured, because
the optimiser has its moments by then. On GPUs and CPUs alike the records are those of PyTorch's
allocator, so they contain neither the workspaces of libraries nor fragmentation.
"""

from __future__ import annotations

import gc
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from selfnpo_fast.config import LogConfig, TrainConfig
from selfnpo_fast.doctor.costs import GRADIENT_REDUCTION, OPTIMISER_STEP, REFERENCE_FORWARD, STUDENT_PASSES, Memory
from selfnpo_fast.doctor.random_inputs import random_inputs
from selfnpo_fast.models import Adapter
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.engine import start_deepspeed
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.trainer import Trainer

TOLERANCE = 0.10
"""Largest relative error of the computed peak that passes."""
AT_REST, PEAK = "at rest", "peak"
_UPDATE = "update"
_MARK = "selfnpo.verify."
"""Prefix of the profiler ranges that mark the phases of the measured update."""


@dataclass(frozen=True)
class Comparison:
    """Computed and measured bytes, both under the names of `measure`."""

    computed: dict[str, int]
    """By the memory model."""
    measured: dict[str, int]
    """By the profiler's records of one update."""

    @property
    def error(self) -> float:
        """Error of the computed peak, relative to the measured one."""
        return self.computed[PEAK] / self.measured[PEAK] - 1

    @property
    def within_tolerance(self) -> bool:
        """Whether the error of the peak is at most TOLERANCE."""
        return abs(self.error) <= TOLERANCE


def compare(predicted: Memory, measured: dict[str, int]) -> Comparison:
    """Puts the figures of the memory model next to those of `measure`.

    The engine reduces gradients within its backward pass, so the model's phases of the student's
    passes and of the reduction are one measured phase, which adds the larger of the two.
    """
    phases = predicted.phases
    computed = {
        AT_REST: predicted.total_at_rest,
        REFERENCE_FORWARD: phases[REFERENCE_FORWARD],
        STUDENT_PASSES: max(phases[STUDENT_PASSES], phases[GRADIENT_REDUCTION]),
        OPTIMISER_STEP: phases[OPTIMISER_STEP],
        PEAK: predicted.peak,
    }
    return Comparison(computed, measured)


def measure(config: TrainConfig, adapter: Adapter, prompts: int, world: World) -> dict[str, int]:
    """Runs two updates and returns the memory of the second one, in bytes by name.

    "at rest" is what lives before the update and "peak" the most that lives during it. The other
    names are those of the phases, with what each of them adds to the bytes at rest.
    """
    config = replace(config, log=LogConfig(sample_every=-1))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])
    # Objects of an earlier profile that are freed during this one would be subtracted from it.
    gc.collect()
    # The profile covers the trainer's set-up: the profiler knows the size of a freed block only if
    # it saw the allocation. DeepSpeed starts before the profile does.
    records, local = profile(activities=activities, profile_memory=True), _local_communication(world)
    with records, local, tempfile.TemporaryDirectory() as output:
        trainer = Trainer(config, random_inputs(config, adapter, prompts, world), world, Path(output))
        recorder = Recorder(config, world, adapter.schedule.num_train_timesteps)
        # The model describes a steady update: slots are filled and the optimiser has its moments.
        trainer.producer.rollout.fill()
        trainer.train_update(recorder)
        # In the measured update each phase marks its allocations in the profiler's records.
        trainer.producer.take = _marked(REFERENCE_FORWARD, trainer.producer.take)
        trainer.pair_loss = _marked(STUDENT_PASSES, trainer.pair_loss)
        trainer.engine.backward = _marked(STUDENT_PASSES, trainer.engine.backward)
        trainer.engine.step = _marked(OPTIMISER_STEP, trainer.engine.step)
        _marked(_UPDATE, trainer.train_update)(recorder)
    return _memory_by_phase(records, world.device.type)


def _local_communication(world: World) -> AbstractContextManager[None]:
    """Starts DeepSpeed; inside the returned context its collectives run at once, in this thread.

    The world has one rank, so every collective keeps or copies its tensor. gloo would run them
    in another thread, which may be the last one to release a tensor, and the profiler keeps no
    records of what that thread frees.
    """
    start_deepspeed(world)
    from deepspeed.comm import comm

    def keep_input(*args, **kwargs) -> FinishedWork:
        """The all-reduce and the broadcast of one rank leave their tensor as it is."""
        return FinishedWork()

    def copy_input(output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args, **kwargs) -> FinishedWork:
        """The all-gather and the reduce-scatter of one rank copy their input."""
        output_tensor.copy_(input_tensor)
        return FinishedWork()

    replacements = dict.fromkeys(("all_reduce", "broadcast"), keep_input)
    replacements |= dict.fromkeys(("all_gather_into_tensor", "reduce_scatter_tensor"), copy_input)
    return replaced_attributes(comm.cdb, replacements)


class FinishedWork:
    """The handle of a collective operation that is over."""

    def wait(self) -> None:
        """Returns at once."""


@contextmanager
def replaced_attributes(target: object, replacements: Mapping[str, object]) -> Iterator[None]:
    """Sets attributes of an instance inside the context and restores them at its end.

    An attribute that came from the instance's class is deleted from the instance again. Raises
    AttributeError, before anything is set, where the target lacks one of the attributes.
    """
    for name in replacements:
        getattr(target, name)
    originals = {name: vars(target)[name] for name in replacements if name in vars(target)}
    try:
        for name, value in replacements.items():
            setattr(target, name, value)
        yield
    finally:
        for name in replacements:
            if name in originals:
                setattr(target, name, originals[name])
            elif name in vars(target):
                delattr(target, name)


def _marked(name: str, function: Callable) -> Callable:
    """The function inside a profiler range of this name."""

    def call(*args, **kwargs):
        with record_function(_MARK + name):
            return function(*args, **kwargs)

    return call


def _memory_by_phase(records: profile, device_type: str) -> dict[str, int]:
    """What `measure` returns, from the profiler's records of allocations and marks."""
    kind = torch.autograd.DeviceType.CUDA if device_type == "cuda" else torch.autograd.DeviceType.CPU
    events = records.profiler.kineto_results.events()
    # Every allocation is a record of its size, every release one of its negative size; the running
    # sum is what lives after each record.
    blocks = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == kind
    )
    times, live = [time for time, _ in blocks], list(accumulate(size for _, size in blocks))
    # Each marked range becomes a range of records. A phase may have several, one per micro-batch.
    spans: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        if event.name().startswith(_MARK):
            first, last = (bisect_right(times, t) - 1 for t in (event.start_ns(), event.end_ns()))
            spans.setdefault(event.name().removeprefix(_MARK), []).append((first, last))
    ((first, last),) = spans.pop(_UPDATE)
    at_rest = live[first]
    out = {AT_REST: at_rest}
    for name, ranges in spans.items():
        out[name] = max(max(live[start : end + 1]) for start, end in ranges) - at_rest
    return out | {PEAK: max(live[first : last + 1])}
