"""The text that `selfnpo doctor` prints: what a config will cost, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from selfnpo_fast.config import EngineConfig, ModelConfig, PromptConfig, RolloutConfig, TrainConfig
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.doctor import costs
from selfnpo_fast.doctor.costs import GIB, Memory, PlannedRun, Tracer
from selfnpo_fast.doctor.expert_rows import rows_per_pair
from selfnpo_fast.doctor.machines import GPUS, Machine, measure_this_machine, update_seconds
from selfnpo_fast.doctor.memory_check import TOLERANCE, Comparison, compare, measure
from selfnpo_fast.doctor.savings import memory_saving_changes
from selfnpo_fast.models import SD15_SMALL, load_adapter_of
from selfnpo_fast.runtime.attention import why_not
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import init_world
from selfnpo_fast.training.engine import zero_stage
from selfnpo_fast.training.methods import find_method

CARDS = (16.0, 24.0, 40.0, 80.0)
"""Memory of common GPUs in GiB."""
USABLE = 0.92
"""Share of a card that an update may need; CUDA, workspaces and fragmentation take what is left."""
LEAST_SAVING = 0.01
"""Share of the peak that a change has to save to be suggested."""
VERIFIED = (
    TrainConfig(model=ModelConfig(path="digits"), prompts=PromptConfig(source="digits")),
    TrainConfig(
        model=ModelConfig(path=str(SD15_SMALL)),
        prompts=PromptConfig(limit=64),
        rollout=RolloutConfig(grid_steps=5, pool=1),  # few slots with short lives are quickly filled
        engine=EngineConfig(batch_size=2),
    ),
)
"""What `--verify` runs when no config is named: the networks of benchmarks/nets.py."""


def examine(config: TrainConfig, *, memory_gib: float | None = None, world_size: int = 1) -> str:
    """The report on a config with `world_size` ranks, for cards of `memory_gib` GiB or of CARDS.

    Raises UserError for every mistake in the config or the model that shows without weights.
    """
    reason = why_not(config.engine.attention, "cuda", DTYPES[config.engine.precision])
    if reason is not None:
        raise UserError(f"engine.attention: {config.engine.attention} {reason}")
    tracer = make_tracer(config)
    run = tracer.plan(config, world_size, "cuda")
    memory = costs.memory(run)
    cards = CARDS if memory_gib is None else (memory_gib,)
    this_machine = measure_this_machine(config.engine.precision)
    machines = [*GPUS, *([this_machine] if this_machine else [])]
    parts = [
        _run_section(run),
        _memory_section(tracer, run, memory, cards),
        _time_section(run, machines),
        _savings_section(tracer, run, memory, cards),
        _assumptions_section(machines),
    ]
    return "\n\n".join(parts)


def make_tracer(config: TrainConfig) -> Tracer:
    """A tracer of the config's model; reads config files and the number of prompts, but no weights.

    Of real data the tracer takes `data.limit` images, an upper bound: counting would read them all.
    """
    find_method(config.method)  # a name that is not known is refused
    adapter = load_adapter_of(config.model, configs_only=True)
    if config.rollout.start == "data":
        return Tracer(adapter, config.data.limit)
    prompts = config.prompts
    return Tracer(adapter, len(read_prompts(prompts.source, column=prompts.column, limit=prompts.limit)))


def format_bytes(size: float) -> str:
    """A number of bytes as text, in GiB from a tenth of a GiB on, else in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _format_si(value: float) -> str:
    """A number as text with an SI prefix: 1234567 is "1.23 M"."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"


def _format_seconds(seconds: float) -> str:
    """A duration as text, in seconds, minutes or hours."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.3g} s"


def _table_lines(rows: Iterable[tuple[str, str]], width: int = 32) -> list[str]:
    """One line per (name, value), names `width` wide."""
    return [f"  {name:<{width}}{value:>12}" for name, value in rows]


def _run_section(run: PlannedRun) -> str:
    """The model, one update, its forwards and FLOPs, and the sizes of files."""
    config, counts, flops = run.config, run.parameter_counts, costs.update_flops(run)
    engine, startup = config.engine, costs.startup_forwards(run)
    checkpoint, negative = costs.checkpoint_bytes(run), costs.negative_bytes(run)
    lines = [
        "computed, not measured; nothing was loaded but config files",
        f"model     {config.model.path}: {_format_si(counts.total)} parameters, {_format_si(counts.trained)} trained "
        f"({f'LoRA rank {config.lora.rank}' if config.lora.rank else 'full weights'}"
        + _experts_text(run)
        + ("" if config.model.quantization == "none" else f", base in {config.model.quantization}")
        + ")",
        f"update    {engine.batch_size} pairs (ranks x micro-batches x pairs: {run.world_size} x "
        f"{engine.accumulation} x {run.micro_batch}); {engine.precision}, ZeRO {zero_stage(config)}, "
        f"{config.optimizer.name}, gradient checkpointing {'on' if engine.gradient_checkpointing else 'off'}, "
        f"attention {engine.attention}, offload {engine.offload}",
        f"forwards  {costs.forwards_per_pair(config.rollout):.3g} of the reference per pair "
        f"({config.rollout.mode} from {config.rollout.start}, omega = {config.rollout.omega:g})"
        + (f"; at most {startup:,} once, to fill the slots" if startup else ""),
        *_lost_lines(run),
        f"FLOPs     {_format_si(flops.total)} per update: reference {_format_si(flops.reference)}, "
        f"student {_format_si(flops.student)}",
        f"files     checkpoint {format_bytes(checkpoint)}, negative model {format_bytes(negative)}",
    ]
    if costs.prompts_on_host(run):
        size = format_bytes(costs.prompt_table_bytes(run))
        lines.append(
            f"prompts   {size} of text embeddings, at most, in prompts.store on the disk "
            f"(prompts.device_mib {config.prompts.device_mib}); every host maps them into memory"
        )
    return "\n".join(lines)


def _lost_lines(run: PlannedRun) -> list[str]:
    """A line on the pairs that one of two experts cannot learn from, where there are any."""
    adapter = run.denoiser.adapter
    if adapter.boundary is None or len(adapter.trained_denoisers) > 1:
        return []
    rows = rows_per_pair(adapter, run.config.rollout, run.micro_batch)
    if rows == 1:
        return []
    return [f"pairs     the student computes {rows:.0%} of them: above the others there is no level of the expert"]


def _experts_text(run: PlannedRun) -> str:
    """Which of two experts is trained; nothing of a model with one denoiser."""
    adapter = run.denoiser.adapter
    return "" if adapter.boundary is None else f", of {' and '.join(adapter.trained_denoisers)}"


def _memory_section(tracer: Tracer, run: PlannedRun, memory: Memory, cards: Iterable[float]) -> str:
    """Resident memory, what each phase adds, the peak, activations, and which cards suffice."""
    config = run.config
    lines = ["memory of a rank"]
    lines += _table_lines((name, format_bytes(size)) for name, size in memory.resident.items())
    lines += _table_lines([("at rest", format_bytes(memory.total_at_rest))])
    lines += _table_lines((f"+ {name}", format_bytes(size)) for name, size in memory.phases.items())
    lines += _table_lines([("peak of an update", format_bytes(memory.peak))])
    lines += _table_lines((f"host memory: {name}", format_bytes(size)) for name, size in memory.host.items())
    for checkpointing in (False, True):
        # Offloaded blocks want checkpointing, and leave the activations as they are.
        engine = replace(config.engine, gradient_checkpointing=checkpointing, offload="none")
        changed = replace(config, engine=engine)
        student = tracer.plan(changed, run.world_size, run.device).student
        activations = student.peak - student.peak_gradients
        lines.append(
            f"  activations {'with' if checkpointing else 'without'} gradient checkpointing: "
            f"{format_bytes(student.kept)} kept for the backward, {format_bytes(activations)} besides the gradients "
            "at its peak"
        )
    verdicts = [f"{card:g} GiB {'fits' if fits(memory, card) else 'does not fit'}" for card in cards]
    lines.append(f"  cards: {', '.join(verdicts)}")
    return "\n".join(lines)


def fits(memory: Memory, card: float) -> bool:
    """Whether an update fits into the usable part of a card of `card` GiB."""
    return memory.peak <= USABLE * card * GIB


def _time_section(run: PlannedRun, machines: Iterable[Machine]) -> str:
    """Time per update and in all on each machine that has a rate for the run's precision."""
    lines = [f"time of {run.config.updates:,} updates on {run.world_size} of each (computed, not measured)"]
    for machine in machines:
        seconds = update_seconds(run, machine)
        if seconds is None:
            continue
        total = seconds * run.config.updates
        gpu_hours = f", {total * run.world_size / 3600:.3g} GPU hours" if machine.gpu else ""
        lines.append(
            f"  {machine.name:<16}{_format_seconds(seconds)} per update, {_format_seconds(total)} in all{gpu_hours}"
        )
    return "\n".join(lines)


def _savings_section(tracer: Tracer, run: PlannedRun, memory: Memory, cards: Iterable[float]) -> str:
    """What each change saves by itself, and the changes that make the run fit each small card."""
    lines = ["what each change alone takes off the peak"]
    savings = []
    for option, changed in _changes(tracer, run.config, run.world_size):
        after = costs.memory(tracer.plan(changed, run.world_size, run.device))
        savings.append((option, memory.peak - after.peak))
    lines += _table_lines(((option, format_bytes(size)) for option, size in savings if size > 0), width=40)
    if len(lines) == 1:
        lines.append("  nothing is left to change")
    for card in cards:
        if fits(memory, card):
            continue
        options, after = changes_to_fit(tracer, run, card)
        needed = format_bytes(after.peak)
        if fits(after, card):
            verdict = f"{' '.join(options)} needs {needed}"
        else:
            verdict = f"not by these changes; all of them need {needed}"
        lines.append(f"  to fit {card:g} GiB: {verdict}")
    return "\n".join(lines)


def changes_to_fit(tracer: Tracer, run: PlannedRun, card: float) -> tuple[list[str], Memory]:
    """Options that make an update fit into `card` GiB, and the memory that it needs with them.

    Changes are applied one after another, in the order of `memory_saving_changes`, until the update
    fits or no change saves LEAST_SAVING of the peak; then the update does not fit.
    """
    config, values, memory = run.config, {}, costs.memory(run)
    while not fits(memory, card):
        for setting, changed in _changes(tracer, config, run.world_size):
            after = costs.memory(tracer.plan(changed, run.world_size, run.device))
            if after.peak < (1 - LEAST_SAVING) * memory.peak:
                words = setting.split()  # a later value of an option replaces an earlier one
                values |= dict(zip(words[::2], words[1::2], strict=True))
                config, memory = changed, after
                break
        else:
            break
    return [f"{option} {value}" for option, value in values.items()], memory


def _changes(tracer: Tracer, config: TrainConfig, world_size: int) -> list[tuple[str, TrainConfig]]:
    """What may be changed of a config of the tracer's model."""
    size = tracer.size_of(config)
    sizes = (size, *tracer.adapter.smaller_sizes(size))
    return memory_saving_changes(config, world_size, tracer.adapter.family, sizes)


def _assumptions_section(machines: Iterable[Machine]) -> str:
    """The rates behind the times, and what times and memory leave out."""
    lines = ["assumed"]
    for machine in machines:
        rates = ", ".join(f"{name} {_format_si(rate)}FLOP/s" for name, rate in machine.flops.items())
        lines.append(
            f"  {machine.name}: {rates}, of which networks reach {machine.utilisation:.0%}; "
            f"{_format_si(machine.bandwidth)}B/s ({machine.source})"
        )
    lines += [
        "  time: networks, then optimiser and EMA; no communication between ranks, no overlap, no loading",
        "  memory: PyTorch's tensors on a GPU with flash attention, and the pool of CUDA graphs, which no other pass "
        f"can use; a card fits when the peak is at most {USABLE:.0%} of it; sample grids and the encoding of prompts, "
        "which need further memory, are left out",
    ]
    return "\n".join(lines)


def check(configs: Iterable[TrainConfig]) -> tuple[str, bool]:
    """Compares the memory model with a real update of each config.

    Returns the table to print, and whether every computed peak is within the tolerance.
    """
    lines, all_within = [], True
    for config in configs:
        logger.info("running two updates of %s", config.model.path)
        comparison = compare_with_update(config)
        lines += _comparison_lines(config, comparison)
        all_within &= comparison.within_tolerance
    return "\n".join(lines), all_within


def compare_with_update(config: TrainConfig) -> Comparison:
    """Compares the memory model, phase by phase, with a real update on this machine and one rank.

    Overlap is turned off, because the profiler keeps no records of its second thread, and so are
    compilers, because they allocate memory as well, and CUDA graphs, which are captured in later
    updates than the measured one. Raises UserError where there are several ranks.
    """
    rollout, engine = replace(config.rollout, overlap=False), replace(config.engine, compile="off", graphs=False)
    config = replace(config, rollout=rollout, engine=engine)
    world, tracer = init_world(), make_tracer(config)
    if world.size > 1:
        raise UserError(f"--verify: it holds one rank against the model, not {world.size}; start it without a launcher")
    predicted = costs.memory(tracer.plan(config, 1, world.device.type))
    return compare(predicted, measure(config, tracer.adapter, tracer.prompts, world))


def _comparison_lines(config: TrainConfig, comparison: Comparison) -> list[str]:
    """The table of one config, and a line with its verdict."""
    lines = [f"{config.model.path}, batch {config.engine.batch_size}, MiB", f"{'computed':>46}{'measured':>12}"]
    for name, measured in comparison.measured.items():
        lines.append(f"  {name:<32}{comparison.computed[name] / 2**20:>12.2f}{measured / 2**20:>12.2f}")
    verdict = "within" if comparison.within_tolerance else "NOT within"
    return [*lines, f"  peak: {comparison.error:+.1%}, {verdict} {TOLERANCE:.0%}", ""]
