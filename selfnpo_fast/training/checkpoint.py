"""What a run leaves on disk: checkpoints to go on from, and the negative model itself. All safetensors and JSON.

A checkpoint is a folder `update-NNNNNNN`:

    student.safetensors          the trained parameters, float32, whole tensors by name
    exp_avg[_sq].safetensors     Adam's moments, float32, whole tensors by name: any number of ranks can go on from them
    reference.safetensors        the float32 masters of a moving reference
    rank<r>.safetensors          of each rank: rollout slots, sums of the metrics, generator states, 8-bit moments
    state.json, manifest.json    counters, config and versions; sizes and hashes of the other files

DeepSpeed's own checkpoint files are pickles, neither written nor read.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.folders import remove, why_not_whole, write_manifest
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import Tensors, Writer
from selfnpo_fast.training.engine import StudentEngine
from selfnpo_fast.training.moving_reference import Reference

_NAME = re.compile(r"update-(\d{7,})$")
_VERSIONS = ("selfnpo-fast", "torch", "deepspeed", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors")
_FREE = ("updates", "log", "output")
"""Sections of a config that a resumed run may change: its length, its log, its folder."""


def save_checkpoint(
    folder: Path,
    update: int,
    *,
    engine: StudentEngine,
    reference: Reference,
    own: dict[str, Tensors],
    counters: dict,
    config: TrainConfig,
    world: World,
) -> Path:
    """Write `folder/update-NNNNNNN` with all ranks taking part, and delete all but the newest `log.keep`.

    `own` is this rank's state by part (rollout, recorder), `counters` plain values that are the same on all ranks.
    Raises RunError on all ranks where it could not be written; older checkpoints are untouched then.
    """
    writer = Writer(folder / f"update-{update:07d}", world)
    main = world.is_main
    writer.save("student.safetensors", engine.full_weights(), write=main)
    for key in engine.moments():
        writer.save(f"{key}.safetensors", engine.full_moments(key), write=main)
    writer.save("reference.safetensors", reference.saved(), write=main)
    own = {**own, "rng": _rng_state(world), "optimizer": engine.native_state()}
    flat = ((f"{part}.{name}", value) for part, tensors in own.items() for name, value in tensors.items())
    writer.save(f"rank{world.rank}.safetensors", flat, write=True)
    state = {
        "update": update,
        "world_size": world.size,
        "engine": engine.counters(),
        **counters,
        "config": recipe(config),
        "versions": _versions(),
    }
    writer.run("state.json", lambda: (writer.folder / "state.json").write_text(json.dumps(state, indent=1)))
    world.barrier()
    writer.run("manifest.json", lambda: write_manifest(writer.folder))
    target = writer.finish()
    if main:
        for old in list_checkpoints(folder)[: -config.log.keep]:
            try:
                remove(old)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be deleted: %s", old, one_line(error))
    world.barrier()
    return target


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def _rng_state(world: World) -> Tensors:
    """torch's generators. Noise, prompts and timesteps need none (they are functions of the sample id): these serve
    what a network may draw for itself, such as dropout."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def _restore_rng(state: Tensors, world: World) -> None:
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    return sorted((path for path in folder.glob("update-*") if _NAME.search(path.name)), key=update_of)


def update_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was written."""
    return int(_NAME.search(checkpoint.name)[1])


def recipe(config: TrainConfig) -> dict:
    """The part of a config that a resumed run has to share: all but its length, its log and its folders."""
    fields = {key: value for key, value in asdict(config).items() if key not in _FREE}
    del fields["data"]["store"]
    return json.loads(json.dumps(fields))


def _differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            found += _differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found.append(f"{prefix}{key} is {mine!r}, but was {other!r}")
    return found


def newest_checkpoint(folder: Path, config: TrainConfig, world: World, before: int | None = None) -> Path | None:
    """The newest whole checkpoint under `folder` (written before update `before`), or None where there is none at all.

    One that is not whole is passed over with a warning. Raises UserError where none is whole, or the newest belongs to
    another recipe or cannot be shared by this number of ranks. Rank 0 looks, so that all ranks take the same.
    """
    found = error = None
    if world.is_main:
        try:
            found = newest_whole(folder, before)
            if found is not None:
                _refuse_foreign(found, config, world)
        except UserError as refused:
            error = str(refused)
    found, error = world.gather((found and str(found), error))[0]
    if error:
        raise UserError(error)
    return Path(found) if found else None


def newest_whole(folder: Path, before: int | None = None) -> Path | None:
    """The newest whole checkpoint (written before update `before`); warns about those that are not.

    None where there are no checkpoints at all; raises UserError where there are, but none is whole.
    """
    all_of_them = [path for path in list_checkpoints(folder) if before is None or update_of(path) < before]
    for path in reversed(all_of_them):
        reason = why_not_whole(path)
        if reason is None:
            return path
        logger.warning("passing over %s, which is not whole: %s", path, reason)
    if all_of_them:
        raise UserError(f"no checkpoint in {folder} is whole; start anew with --overwrite")
    return None


def _refuse_foreign(checkpoint: Path, config: TrainConfig, world: World) -> None:
    state = read_state(checkpoint)
    differences = _differences(recipe(config), state["config"])
    if differences:
        raise UserError(
            f"--resume: {checkpoint} is of another run: {'; '.join(differences)}; use the same config or another output"
        )
    if state["world_size"] != world.size and config.optimizer.name == "adamw8bit":
        raise UserError(
            f"--resume: {checkpoint} was written by {state['world_size']} ranks, not {world.size}; the 8-bit moments "
            "belong to each rank's own share of the weights; use as many ranks, or optimizer.name adamw from the start"
        )


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's counters, world size and config."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state["config"], dict) or not isinstance(state["world_size"], int):
            raise ValueError("no config or no world size in it")
        return state
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--resume: {checkpoint}/state.json is not readable: {one_line(error)}") from error


def _read(path: Path) -> Tensors:
    """Tensors by name, mapped from the file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {path} is not readable: {one_line(error)}; delete its folder") from error


def load_checkpoint(
    checkpoint: Path, *, engine: StudentEngine, reference: Reference, rollout, recorder, world: World
) -> dict:
    """Restore everything from a checkpoint that `newest_checkpoint` has chosen; returns its counters."""
    state = read_state(checkpoint)
    other = _differences(_versions(), state.get("versions", {}))
    if other:
        logger.warning("the run goes on, but perhaps not in the same bits: version of %s", "; ".join(other))
    engine.load_weights(_read(checkpoint / "student.safetensors"))
    for key in engine.moment_names:
        if (checkpoint / f"{key}.safetensors").is_file():
            engine.load_moments(key, _read(checkpoint / f"{key}.safetensors"), state["engine"]["steps"])
    reference.load_state_dict(_read(checkpoint / "reference.safetensors"))
    if state["world_size"] == world.size:
        mine = _unflatten(_read(checkpoint / f"rank{world.rank}.safetensors"))
        _restore_rng(mine["rng"], world)
        engine.load_native_state(mine.get("optimizer", {}))
    else:
        ranks = [_unflatten(_read(checkpoint / f"rank{rank}.safetensors")) for rank in range(state["world_size"])]
        mine = {
            "rollout": _share([parts["rollout"] for parts in ranks], world),
            "recorder": _first_takes_all([parts["recorder"] for parts in ranks], world),
        }
    rollout.load_state_dict(mine["rollout"])
    recorder.load_state_dict(mine["recorder"])
    engine.load_counters(state["engine"])
    return state


def _unflatten(tensors: Tensors) -> dict[str, Tensors]:
    parts: dict[str, Tensors] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def _share(states: list[Tensors], world: World) -> Tensors:
    """This rank's part of what all ranks saved: (groups, lanes, ...) tensors lie side by side, scalars are common."""
    out = {}
    for name, first in states[0].items():
        if first.ndim < 2:
            out[name] = first
        else:
            whole = torch.cat([state[name] for state in states], dim=1)
            out[name] = whole.chunk(world.size, dim=1)[world.rank]
    return out


def _first_takes_all(states: list[Tensors], world: World) -> Tensors:
    """Sums over ranks belong to nobody in particular: the first rank carries them on."""
    total = {name: sum(state[name] for state in states) for name in states[0]}
    return total if world.is_main else {name: torch.zeros_like(value) for name, value in total.items()}
