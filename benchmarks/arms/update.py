"""The arms of `bench_update.py`: ways to run a training update, and how one of them is timed."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import spread, synchronize
from benchmarks.random_run import CALLS_TO_CAPTURE, RandomRun, freed, recipe
from selfnpo_fast.config import TrainConfig
from selfnpo_fast.doctor import costs
from selfnpo_fast.doctor.costs import Tracer
from selfnpo_fast.doctor.report import make_tracer
from selfnpo_fast.rollout import Producer, UpdatePairs
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.world import World

GRAPHS_OFF = "CUDA graphs: off"
"""How `runtime.capture` begins the line with which it gives up."""
GATE_UPDATES = 6
"""Updates of the gate: steps are captured in the third, and replayed in those after it."""
GATE_TOLERANCE = 1e-3
"""Largest relative difference of a loss in the gate. All arms train on equal pairs there, in
float32; other pairs change a loss by tens of percents."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run an update."""

    name: str
    """Name in the results."""
    label: str
    """Name in the table."""
    overlap: bool = False
    graphs: bool = False
    channels_last: bool = False
    student_only: bool = False
    """Whether all updates learn from the first update's pairs, so that no rollout runs."""

    @property
    def words(self) -> list[str]:
        """The options of `selfnpo train` that make the arm."""
        options = {"rollout.overlap": self.overlap, "engine.graphs": self.graphs}
        options["engine.channels_last"] = self.channels_last
        return [word for name, on in options.items() for word in (f"--{name}", str(on).lower())]


PLAIN, STUDENT, OVERLAP, GRAPHS, BOTH = "plain", "student_only", "overlap", "graphs", "overlap_graphs"
ARMS = (
    Arm(name=PLAIN, label="no overlap, no graphs"),
    Arm(name=STUDENT, label="the student alone", student_only=True),
    Arm(name=OVERLAP, label="overlap", overlap=True),
    Arm(name=BOTH, label="overlap and graphs", overlap=True, graphs=True),
    Arm(name="all", label="overlap, graphs, channels_last", overlap=True, graphs=True, channels_last=True),
    Arm(name=GRAPHS, label="graphs", graphs=True),
    Arm(name="channels_last", label="channels_last", channels_last=True),
)
"""In order of value: a run that is cut off has the first ones."""
HIDDEN = {OVERLAP: PLAIN, BOTH: GRAPHS}
"""The arms that hide the reference's forward, each with the arm that does the same in turn."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms of a benchmark have in common."""

    net: str
    """A name of `random_run.FOLDERS`."""
    words: tuple[str, ...]
    """Options of `selfnpo train`, on top of the recommended recipe."""
    rounds: int
    updates: int
    """Updates of a round."""

    def config(self, arm: Arm) -> TrainConfig:
        """The run of an arm."""
        return recipe(self.net, *arm.words, *self.words)


class SamePairs(Producer):
    """Gives the pairs of the first update again and again."""

    def __init__(self, producer: Producer) -> None:
        super().__init__(producer.rollout, producer.predictor, producer.accumulation, producer.version)
        self._pairs = producer.take()

    def take(self) -> UpdatePairs:
        """The pairs of the first update."""
        return self._pairs


class Bench:
    """Times one arm after the other. Each is a trainer of its own, and all begin with the slots
    that the first one has filled."""

    def __init__(self, setting: Setting, world: World) -> None:
        self.setting, self.world, self.device = setting, world, world.device
        self.tracer = make_tracer(setting.config(ARMS[0]))
        self._slots: dict[str, torch.Tensor] | None = None

    def seconds(self, action: Callable[[], object]) -> float:
        """Seconds of an action, from an idle device to an idle device."""
        synchronize(self.device)
        start = time.perf_counter()
        action()
        synchronize(self.device)
        return time.perf_counter() - start

    def time_arm(self, arm: Arm, record: dict, save: Callable[[], None]) -> None:
        """Fills `record` with what an arm takes, and calls `save` after each round.

        Raises RuntimeError where the arm does not run what it says, or gives no finite loss.
        """
        config = self.setting.config(arm)
        with random_run(config, self.tracer, self.world) as (run, build_seconds), said() as lines:
            record |= {"build_s": build_seconds, "warnings": lines}
            self._begin(run, record)
            captured = arm.graphs and self.device.type == "cuda"
            groups = config.rollout.pool * config.engine.accumulation
            count = CALLS_TO_CAPTURE * groups if captured else 2
            if arm.student_only:
                run.trainer.producer = SamePairs(run.trainer.producer)
            record["warm_up_s"] = self.seconds(lambda: [run.update() for _ in range(count)])
            record["warm_up_updates"] = count
            check_lines(lines)
            rounds = record["rounds"] = []
            for _ in range(self.setting.rounds):
                taken = self.seconds(lambda: [run.update() for _ in range(self.setting.updates)])
                rounds.append(taken / self.setting.updates)
                record["seconds_per_update"] = spread(rounds)
                save()
            record |= self._memory()
            (loss,) = run.losses(1)
            record["loss"] = loss
            if not math.isfinite(loss):
                raise RuntimeError("the loss is not finite: the optimiser has skipped updates")

    def _begin(self, run: RandomRun, record: dict) -> None:
        """Fills the slots, or takes those of the arm before; memory is counted from here on."""
        rollout = run.trainer.producer.rollout
        if self._slots is None:
            record["fill_s"] = self.seconds(rollout.fill)
            self._slots = {name: value.clone() for name, value in rollout.state_dict().items()}
        else:
            rollout.load_state_dict(self._slots)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the slots that are kept for the arms to come."""
        return sum(value.nbytes for value in (self._slots or {}).values())

    def _memory(self) -> dict[str, int | None]:
        """Most bytes of PyTorch's tensors, and most that its allocator held, captures included."""
        if self.device.type != "cuda":
            return {"peak_bytes": None, "reserved_bytes": None}
        peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return {"peak_bytes": peak, "reserved_bytes": reserved}

    def derived(self, arm: Arm, record: dict, peak_tflops: float | None) -> dict:
        """What follows from an arm's median seconds and from the doctor's closed forms."""
        config = self.setting.config(arm)
        plan = self.tracer.plan(config, 1, self.device.type)
        flops, memory = costs.update_flops(plan), costs.memory(plan)
        seconds = record["seconds_per_update"]["median"]
        tflops = (flops.student if arm.student_only else flops.total) / seconds / 1e12
        return {
            "pairs_per_second": config.engine.batch_size / seconds,
            "hours_per_1000_updates": seconds / 3.6,
            "tflops": tflops,
            "share_of_peak": tflops / peak_tflops if peak_tflops else None,
            "computed_peak_bytes": memory.peak,
            "computed_at_rest_bytes": memory.total_at_rest,
        }


def hidden_shares(arms: dict[str, dict]) -> dict[str, float]:
    """Share of the reference's forward that overlap hides, by arm.

    1 - (t_overlap - t_student) / (t_in_turn - t_student), of the medians; 1 where the update takes
    no longer than the student alone.
    """
    timed = {name: arm for name, arm in arms.items() if "seconds_per_update" in arm and "error" not in arm}
    median = {name: arm["seconds_per_update"]["median"] for name, arm in timed.items()}
    out = {}
    for name, base in HIDDEN.items():
        if {name, base, STUDENT} <= median.keys() and median[base] > median[STUDENT]:
            out[name] = 1 - (median[name] - median[STUDENT]) / (median[base] - median[STUDENT])
    return out


@contextmanager
def random_run(config: TrainConfig, tracer: Tracer, world: World) -> Iterator[tuple[RandomRun, float]]:
    """A run with random weights, and the seconds that it took to build; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = RandomRun(config, tracer, world, Path(folder))
        synchronize(world.device)
        try:
            yield run, time.perf_counter() - start
        finally:
            run.close()


@contextmanager
def said() -> Iterator[list[str]]:
    """The warnings that our log receives inside the context, as they come."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        """Keeps the text of each record."""

        def emit(self, record: logging.LogRecord) -> None:
            """Adds a record's text."""
            lines.append(record.getMessage())

    keeper = Keeper(logging.WARNING)
    logger.addHandler(keeper)
    try:
        yield lines
    finally:
        logger.removeHandler(keeper)


def check_lines(lines: Sequence[str]) -> None:
    """RuntimeError where CUDA graphs were given up: the arm would run as plain launches."""
    for line in lines:
        if line.startswith(GRAPHS_OFF):
            raise RuntimeError(line)


def gate_losses(arm: Arm, zero_stage: int, world: World) -> list[float]:
    """The first losses of an arm on the digits network in float32, with a frozen reference, whose
    pairs are the same with overlap as without."""
    words = ["--engine.precision", "fp32", "--engine.tf32", "false", "--engine.zero_stage", str(zero_stage)]
    words += ["--engine.batch_size", "4", "--engine.gradient_checkpointing", "true", "--optimizer.name", "adamw"]
    words += ["--optimizer.lr", "1e-4", "--reference.kind", "frozen", "--prompts.limit", "16", "--log.every", "1"]
    words += ["--rollout.grid_steps", "5", "--rollout.pool", "1"]
    config = recipe("digits", *arm.words, *words)
    with random_run(config, make_tracer(config), world) as (run, _), said() as lines:
        losses = run.losses(GATE_UPDATES)
        check_lines(lines)
    return losses


def gate(arm: Arm, expected: Sequence[float], found: Sequence[float]) -> dict:
    """How far an arm's first losses are from those of `plain`; raises RuntimeError where too
    far."""
    errors = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    largest = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    record = {"losses": list(found), "largest_error": largest}
    if not largest <= GATE_TOLERANCE:
        raise RuntimeError(f"{arm.name}: first losses {list(found)} are not those of {PLAIN}, {list(expected)}")
    return record


__all__ = ["ARMS", "HIDDEN", "PLAIN", "STUDENT", "Arm", "Bench", "Setting", "freed", "gate", "gate_losses"]
