"""What may be changed of a config so that a run needs less memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.models import Family, Size
from selfnpo_fast.training.engine import zero_stage

RANK = 16
"""The rank that is proposed where full weights need too much."""


def memory_saving_changes(
    config: TrainConfig, world_size: int, family: Family, sizes: Sequence[Size] = ()
) -> list[tuple[str, TrainConfig]]:
    """Changes of a config that save memory, those with the fewest side effects first.

    Each is a pair of command-line options, such as "--rollout.pool 1", and the changed config. A
    rank comes with the rate and the layers of the family's LoRAs. `sizes` are the one that is trained
    on and smaller ones, which come last.
    """
    engine = config.engine
    changes = []

    def add(option: str, **sections) -> None:
        parts = {name: replace(getattr(config, name), **fields) for name, fields in sections.items()}
        changes.append((option, replace(config, **parts)))

    if engine.graphs and config.rollout.mode == "continuous":
        add("--engine.graphs false", engine={"graphs": False})
    if config.prompts.device_mib:
        add("--prompts.device_mib 0", prompts={"device_mib": 0})
    if not engine.gradient_checkpointing:
        add("--engine.gradient_checkpointing true", engine={"gradient_checkpointing": True})
    if engine.precision == "fp32":
        add("--engine.precision bf16", engine={"precision": "bf16"})
    if config.optimizer.name == "adamw" and engine.offload != "optimizer":
        add("--optimizer.name adamw8bit", optimizer={"name": "adamw8bit"})
    highest = 2 if config.lora.rank else 3
    for stage in range(zero_stage(config) + 1, highest + 1 if world_size > 1 else 0):
        add(f"--engine.zero_stage {stage}", engine={"zero_stage": stage})
    micro = engine.micro_batch(world_size)
    for divisor in sorted({divisor for divisor in (2, micro) if divisor > 1 and micro % divisor == 0}):
        steps = engine.accumulation * divisor
        add(f"--engine.accumulation {steps}", engine={"accumulation": steps})
    if config.rollout.mode == "continuous" and config.rollout.pool > 1:
        add("--rollout.pool 1", rollout={"pool": 1})
    if config.lora.rank and config.model.quantization != "nf4" and engine.offload != "blocks":
        for kind in ("int8", "nf4") if config.model.quantization == "none" else ("nf4",):
            add(f"--model.quantization {kind}", model={"quantization": kind})
    if engine.offload == "none" and config.model.quantization == "none":
        _add_offload(config, add)
    if not config.lora.rank:
        targets = list(family.lora_targets)
        add(
            f"--lora.rank {RANK} --optimizer.lr {family.lora_rate:g} --lora.targets [{','.join(targets)}]",
            lora={"rank": RANK, "targets": targets},
            optimizer={"lr": family.lora_rate},
            engine={"zero_stage": min(engine.zero_stage, 2)},
        )
    for size in sizes[1:]:
        asked = {"frames": size.frames}
        if size.sides != sizes[0].sides:
            square = config.model.resolution is not None
            asked = {"resolution": size.height} if square else dict(size.sides)
        add(" ".join(f"--model.{name} {value}" for name, value in asked.items()), model=asked)
    return changes


def _add_offload(config: TrainConfig, add: Callable[..., None]) -> None:
    """Add the offload that the config could have, with all options that it needs."""
    engine = config.engine
    if config.lora.rank:
        wanted = {"graphs": False, "compile": "off", "gradient_checkpointing": True, "offload": "blocks"}
        changed = {name: value for name, value in wanted.items() if getattr(engine, name) != value}
        words = [f"--engine.{name} {str(value).lower()}" for name, value in changed.items()]
        words += ["--rollout.overlap false"] if config.rollout.overlap else []
        add(" ".join(words), engine=changed, rollout={"overlap": False})
    elif zero_stage(config):
        words = ["--engine.offload optimizer"] + ["--optimizer.name adamw"] * (config.optimizer.name != "adamw")
        add(" ".join(words), engine={"offload": "optimizer"}, optimizer={"name": "adamw"})
