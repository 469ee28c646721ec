"""Checkpoints: what a run can continue from, in safetensors and JSON.

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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.folders import remove, why_not_whole, write_manifest
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import Tensors, Writer

_NAME = re.compile(r"update-(\d{7,})$")
_VERSIONS = ("selfnpo-fast", "torch", "deepspeed", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors")
_FREE = ("updates", "log", "output")
"""Sections of a config that a resumed run may change: its length, its log, its folder."""


class WholePart(Protocol):
    """State that is the same on any number of ranks: whole tensors by name, in a file of its own."""

    def state_dict(self) -> Iterable[tuple[str, torch.Tensor]] | None:
        """(name, tensor) pairs, which all ranks have to iterate together; None where there is nothing yet."""

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`."""


class RankPart(Protocol):
    """State of each rank: tensors by name."""

    def state_dict(self) -> Tensors:
        """This rank's tensors."""

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`."""

    def reshard(self, states: list[Tensors], world: World) -> Tensors | None:
        """This rank's state from those that another number of ranks have saved; None leaves it as it is."""


class CounterPart(Protocol):
    """Plain values that are the same on all ranks."""

    def state_dict(self) -> dict:
        """Values that JSON can hold."""

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All of a run that a checkpoint holds, by name. Counters are loaded first."""

    whole: Mapping[str, WholePart]
    by_rank: Mapping[str, RankPart]
    counters: Mapping[str, CounterPart]


class Generators:
    """torch's random generators. Noise, prompts and timesteps need none (they are functions of the sample id): these
    serve what a network may draw for itself, such as dropout."""

    def __init__(self, world: World) -> None:
        self.world = world

    def state_dict(self) -> Tensors:
        """The generators' states on the CPU and, where there is one, on the GPU."""
        state = {"cpu": torch.get_rng_state()}
        cuda = self.world.device.type == "cuda"
        return state | ({"cuda": torch.cuda.get_rng_state(self.world.device)} if cuda else {})

    def load_state_dict(self, state: Tensors) -> None:
        """Restore them."""
        torch.set_rng_state(state["cpu"])
        if self.world.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.world.device)

    def reshard(self, states: list[Tensors], world: World) -> None:
        """None: other ranks draw other numbers."""


def save_checkpoint(folder: Path, update: int, parts: Parts, config: TrainConfig, world: World) -> Path:
    """Write `folder/update-NNNNNNN` with all ranks taking part, and delete all but the newest `log.keep`.

    Raises RunError on all ranks where it could not be written; older checkpoints are untouched then.
    """
    writer = Writer(folder / f"update-{update:07d}", world)
    main = world.is_main
    for name, part in parts.whole.items():
        tensors = part.state_dict()
        if tensors is not None:
            writer.save(f"{name}.safetensors", tensors, write=main)
    mine = {name: part.state_dict() for name, part in parts.by_rank.items()}
    flat = ((f"{part}.{name}", value) for part, tensors in mine.items() for name, value in tensors.items())
    writer.save(f"rank{world.rank}.safetensors", flat, write=True)
    state = {
        "update": update,
        "world_size": world.size,
        **{name: part.state_dict() for name, part in parts.counters.items()},
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


def load_checkpoint(checkpoint: Path, parts: Parts, world: World) -> int:
    """Restore every part from a checkpoint that `newest_checkpoint` has chosen; returns its update."""
    state = read_state(checkpoint)
    other = _differences(_versions(), state.get("versions", {}))
    if other:
        logger.warning("the run goes on, but perhaps not in the same bits: version of %s", "; ".join(other))
    for name, counters in parts.counters.items():
        counters.load_state_dict(state[name])
    for name, part in parts.whole.items():
        file = checkpoint / f"{name}.safetensors"
        if file.is_file():
            part.load_state_dict(_read(file))
    same_ranks = state["world_size"] == world.size
    ranks = [world.rank] if same_ranks else range(state["world_size"])
    saved = [_unflatten(_read(checkpoint / f"rank{rank}.safetensors")) for rank in ranks]
    for name, part in parts.by_rank.items():
        states = [one.get(name, {}) for one in saved]
        mine = states[0] if same_ranks else part.reshard(states, world)
        if mine is not None:
            part.load_state_dict(mine)
    return state["update"]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


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


def _unflatten(tensors: Tensors) -> dict[str, Tensors]:
    parts: dict[str, Tensors] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts
