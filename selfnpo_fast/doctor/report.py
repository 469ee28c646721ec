"""`selfnpo doctor`: what a config will cost, before any weight is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from selfnpo_fast.config import EngineConfig, ModelConfig, PromptConfig, RolloutConfig, TrainConfig
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.doctor import costs
from selfnpo_fast.doctor.costs import GIB, Machine, Memory, Run, Tracer
from selfnpo_fast.doctor.memory_check import TOLERANCE, Comparison, compare, measure
from selfnpo_fast.models import SD15_SMALL, load_adapter
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import init_world

CARDS = (16.0, 24.0, 40.0, 80.0)
"""GiB of usual cards."""
USABLE = 0.92
"""Share of a card that an update may need; the rest is for the CUDA context, workspaces and fragmentation."""
VERIFIED = (
    TrainConfig(model=ModelConfig(path="digits"), prompts=PromptConfig(source="digits")),
    TrainConfig(
        model=ModelConfig(path=str(SD15_SMALL)),
        prompts=PromptConfig(limit=64),
        rollout=RolloutConfig(grid_steps=5, pool=1),  # filling the slots is soon done
        engine=EngineConfig(batch_size=2),
    ),
)
"""What `--verify` runs when no config is named: the networks of benchmarks/nets.py."""


def examine(config: TrainConfig, *, memory_gib: float | None = None, world_size: int = 1) -> str:
    """The report. Raises UserError for every mistake in config or model that can be seen without weights."""
    tracer = make_tracer(config)
    run = tracer.run(config, world_size, "cuda")
    peak = costs.memory(run)
    cards = CARDS if memory_gib is None else (memory_gib,)
    machine = measure_this_machine(config.engine.precision)
    parts = [
        _facts(run),
        _memory_table(tracer, run, peak, cards),
        _times(run, [*costs.GPUS, *([machine] if machine else [])]),
        _savings(tracer, run, peak, cards),
        _assumptions(machine),
    ]
    return "\n\n".join(parts)


def make_tracer(config: TrainConfig) -> Tracer:
    """A tracer of the config's model; reads config files and the prompts' number, no weights."""
    model = config.model
    adapter = load_adapter(model.path, revision=model.revision, variant=model.variant, resolution=model.resolution)
    if config.rollout.start == "data":
        return Tracer(adapter, config.data.limit)  # at most; counting would mean to read the images
    prompts = config.prompts
    return Tracer(adapter, len(read_prompts(prompts.source, column=prompts.column, limit=prompts.limit)))


def shown(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _si(value: float) -> str:
    """1234567 as 1.23 M."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.3g} s"


def _rows(rows: Iterable[tuple[str, str]], width: int = 32) -> list[str]:
    return [f"  {name:<{width}}{value:>12}" for name, value in rows]


def _facts(run: Run) -> str:
    config, network, work = run.config, run.network, costs.work(run)
    engine, pairs = config.engine, run.config.engine.batch_size
    stage = costs.zero_stage(config)
    lines = [
        "computed, not measured; nothing was loaded but config files",
        f"model     {config.model.path}: {_si(network.total)} parameters, {_si(network.trained)} trained "
        f"({f'LoRA rank {config.lora.rank}' if config.lora.rank else 'full weights'})",
        f"update    {pairs} pairs (ranks x micro-batches x pairs: {run.world_size} x {engine.accumulation} x "
        f"{run.micro_batch}); {engine.precision}, ZeRO {stage}, {config.optimizer.name}, "
        f"gradient checkpointing {'on' if engine.gradient_checkpointing else 'off'}",
        f"forwards  {costs.forwards_per_pair(config.rollout):.3g} of the reference per pair "
        f"({config.rollout.mode} from {config.rollout.start}, w = {config.rollout.omega:g})"
        + (f"; at most {n:,} once, to fill the slots" if (n := costs.startup_forwards(run)) else ""),
        f"FLOPs     {_si(work.total)} per update: reference {_si(work.reference)}, student {_si(work.student)}",
        f"files     checkpoint {shown(costs.checkpoint_bytes(run))}, negative model {shown(costs.negative_bytes(run))}",
    ]
    return "\n".join(lines)


def _memory_table(tracer: Tracer, run: Run, memory: Memory, cards: Iterable[float]) -> str:
    config = run.config
    rest = sum(memory.rest.values())
    lines = ["memory of a rank"]
    lines += _rows((name, shown(size)) for name, size in memory.rest.items())
    lines += _rows([("at rest", shown(rest))])
    lines += _rows((f"+ {name}", shown(size)) for name, size in memory.phases.items())
    lines += _rows([("peak of an update", shown(memory.peak))])
    for on in (False, True):
        changed = replace(config, engine=replace(config.engine, gradient_checkpointing=on))
        student = tracer.run(changed, run.world_size, run.device).student
        lines.append(
            f"  activations {'with' if on else 'without'} gradient checkpointing: {shown(student.kept)} kept for the "
            f"backward, {shown(student.peak - student.peak_gradients)} beside the gradients at its peak"
        )
    verdicts = [f"{card:g} GiB {'fits' if fits(memory, card) else 'does not fit'}" for card in cards]
    lines.append(f"  cards: {', '.join(verdicts)}")
    return "\n".join(lines)


def fits(memory: Memory, card: float) -> bool:
    """Whether an update fits into a card of that many GiB."""
    return memory.peak <= USABLE * card * GIB


def _times(run: Run, machines: Iterable[Machine]) -> str:
    lines = [f"time of {run.config.updates:,} updates on {run.world_size} of each (computed, not measured)"]
    for machine in machines:
        seconds = costs.update_seconds(run, machine)
        if seconds is None:
            continue
        whole = seconds * run.config.updates
        hours = f", {whole * run.world_size / 3600:.3g} GPU hours" if machine.gpu else ""
        lines.append(f"  {machine.name:<16}{_duration(seconds)} per update, {_duration(whole)} in all{hours}")
    return "\n".join(lines)


def _savings(tracer: Tracer, run: Run, memory: Memory, cards: Iterable[float]) -> str:
    """What each change saves by itself, and the first changes, one upon the other, that make each card fit."""
    lines = ["what each change alone takes off the peak"]

    def peak(config: TrainConfig) -> Memory:
        return costs.memory(tracer.run(config, run.world_size, run.device))

    saved = [(words, memory.peak - peak(config).peak) for words, config in costs.levers(run.config, run.world_size)]
    lines += _rows(((words, shown(size)) for words, size in saved if size > 0), width=40)
    if len(lines) == 1:
        lines.append("  nothing is left to change")
    for card in cards:
        if fits(memory, card):
            continue
        words, reached = reach(tracer, run, card)
        verdict = f"{' '.join(words)} needs {shown(reached.peak)}" if fits(reached, card) else (
            f"not by these changes; all of them need {shown(reached.peak)}"
        )  # fmt: skip
        lines.append(f"  to fit {card:g} GiB: {verdict}")
    return "\n".join(lines)


def reach(tracer: Tracer, run: Run, card: float) -> tuple[list[str], Memory]:
    """Changes, gentlest first, until an update fits into `card` GiB or none is left; those that save nothing are not
    among them. Also the memory that is needed then."""
    config, words, memory = run.config, {}, costs.memory(run)
    while not fits(memory, card):
        for setting, changed in costs.levers(config, run.world_size):
            after = costs.memory(tracer.run(changed, run.world_size, run.device))
            if after.peak < 0.99 * memory.peak:
                option, value = setting.split()
                words[option] = value
                config, memory = changed, after
                break
        else:
            break
    return [f"{option} {value}" for option, value in words.items()], memory


THIS_MACHINE = 0.8
"""Share of a convolution's own rate that whole networks are assumed to reach here. On the development machine, one
thread, updates of sd15_small take what this says; those of digits, whose layers are tiny, twice that."""


def measure_this_machine(precision: str) -> Machine | None:
    """This machine's speed at a 3x3 convolution of SD1.5's, in about a second; None for fp16 without a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "fp16" and device.type == "cpu":
        return None
    dtype = DTYPES[precision]
    channels, side, batch = 320, 32, 2
    layer = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype, device=device)
    x = torch.randn(batch, channels, side, side, dtype=dtype, device=device)
    source = torch.empty(2**26, dtype=torch.uint8, device=device)

    def seconds(action) -> float:
        """The least of four calls."""
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    with torch.no_grad():
        rate = 2 * batch * side**2 * 9 * channels**2 / seconds(lambda: layer(x))
        copied = 2 * source.nbytes / seconds(source.clone)
    return Machine(
        name="this machine",
        flops={precision: rate},
        bandwidth=copied,
        utilisation=THIS_MACHINE,
        source="measured just now: a 3x3 convolution of 320 channels, a copy",
        gpu=device.type == "cuda",
    )


def _assumptions(machine: Machine | None) -> str:
    lines = ["assumed"]
    for each in (*costs.GPUS, *([machine] if machine else [])):
        rates = ", ".join(f"{name} {_si(rate)}FLOP/s" for name, rate in each.flops.items())
        lines.append(
            f"  {each.name}: {rates}, of which networks reach {each.utilisation:.0%}; "
            f"{_si(each.bandwidth)}B/s ({each.source})"
        )
    lines += [
        "  time: networks, then optimiser and EMA; no communication between ranks, no overlap, no loading",
        "  memory: PyTorch's tensors on a GPU with flash attention; a card fits when the peak is at most "
        f"{USABLE:.0%} of it; sample grids and the encoding of prompts, which have memory of their own, are left out",
    ]
    return "\n".join(lines)


def hold_against_update(config: TrainConfig) -> Comparison:
    """The memory model beside a real update on this machine, one rank, phase after phase.

    Without overlap, whose other thread the profiler keeps no records of, and without compilers, which allocate as well.
    """
    rollout, engine = replace(config.rollout, overlap=False), replace(config.engine, compile="off")
    config = replace(config, rollout=rollout, engine=engine)
    world, tracer = init_world(), make_tracer(config)
    if world.size > 1:
        raise UserError(f"--verify: it holds one rank against the model, not {world.size}; start it without a launcher")
    predicted = costs.memory(tracer.run(config, 1, world.device.type))
    return compare(predicted, measure(config, tracer.adapter, tracer.prompts, world))


def check(configs: Iterable[TrainConfig]) -> tuple[str, bool]:
    """Holds the memory model against a real update of each config; the table, and whether all peaks are near."""
    lines, holds = [], True
    for config in configs:
        logger.info("running two updates of %s", config.model.path)
        found = hold_against_update(config)
        lines += _comparison(config, found)
        holds &= found.holds
    return "\n".join(lines), holds


def _comparison(config: TrainConfig, found: Comparison) -> list[str]:
    lines = [f"{config.model.path}, batch {config.engine.batch_size}, MiB", f"{'computed':>46}{'measured':>12}"]
    for name, measured in found.measured.items():
        lines.append(f"  {name:<32}{found.computed[name] / 2**20:>12.2f}{measured / 2**20:>12.2f}")
    verdict = "within" if found.holds else "NOT within"
    return [*lines, f"  peak: {found.error:+.1%}, {verdict} {TOLERANCE:.0%}", ""]
