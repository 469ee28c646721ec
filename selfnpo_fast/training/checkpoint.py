"""Checkpoints: what a run can continue from, in safetensors and JSON.

A checkpoint is a folder `update-NNNNNNN`:

    student.safetensors         the trained parameters
    exp_avg.safetensors         Adam's first moment
    exp_avg_sq.safetensors      Adam's second moment
    reference.safetensors       the float32 masters of a moving reference
    rank<r>.safetensors         of each rank: the rollout, sums of the metrics, states of the
                                random generators, 8-bit moments
    state.json                  counters, config and versions
    manifest.json               sizes and hashes of the other files

The first four files hold whole float32 tensors by name, from which any number of ranks can
continue. DeepSpeed's own checkpoint files are pickles; they are neither written nor read.
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
_PACKAGES = ("selfnpo-fast", "torch", "deepspeed", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors")
"""Packages whose versions can change the bits of a run."""
_MAY_CHANGE = ("updates", "log", "output")
"""Sections of a config that a resumed run may change: its length, its log, its folder."""


class WholePart(Protocol):
    """State that is the same on any number of ranks: whole tensors by name, in one file."""

    def state_dict(self) -> Iterable[tuple[str, torch.Tensor]] | None:
        """(name, tensor) pairs, or None where there is nothing yet; all ranks iterate together."""

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`."""


class RankPart(Protocol):
    """State of each rank: tensors by name."""

    def state_dict(self) -> Tensors:
        """This rank's tensors."""

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`."""

    def reshard(self, states: list[Tensors], world: World) -> Tensors | None:
        """This rank's part of the states that another number of ranks have saved.

        None leaves this rank's state as it is.
        """


class CounterPart(Protocol):
    """Plain values that are the same on all ranks."""

    def state_dict(self) -> dict:
        """Values that JSON can hold."""

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All of a run that a checkpoint holds, by name."""

    whole: Mapping[str, WholePart]
    """A file each."""
    by_rank: Mapping[str, RankPart]
    """Together in one file per rank."""
    counters: Mapping[str, CounterPart]
    """In state.json. They are loaded before all other parts."""


class Generators:
    """torch's random generators, for what a network may draw, such as dropout.

    Noise, prompts and timesteps need none: they are functions of the sample id.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def state_dict(self) -> Tensors:
        """The generators' states on the CPU and, where there is one, on the GPU."""
        state = {"cpu": torch.get_rng_state()}
        cuda = self.world.device.type == "cuda"
        return state | ({"cuda": torch.cuda.get_rng_state(self.world.device)} if cuda else {})

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`."""
        torch.set_rng_state(state["cpu"])
        if self.world.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.world.device)

    def reshard(self, states: list[Tensors], world: World) -> None:
        """None: another number of ranks draws other numbers."""


def save_checkpoint(folder: Path, update: int, parts: Parts, config: TrainConfig, world: World) -> Path:
    """Write the checkpoint `folder/update-NNNNNNN`, and delete all but the newest `log.keep`.

    All ranks take part. Returns the checkpoint's folder. Raises RunError on all ranks where it
    could not be written; older checkpoints are untouched then.
    """
    writer = Writer(folder / f"update-{update:07d}", world)
    main = world.is_main
    # Whole parts: all ranks gather, rank 0 writes.
    for name, part in parts.whole.items():
        tensors = part.state_dict()
        if tensors is not None:
            writer.save(f"{name}.safetensors", tensors, write=main)
    # This rank's parts.
    of_rank = {name: part.state_dict() for name, part in parts.by_rank.items()}
    flat = ((f"{part}.{name}", value) for part, tensors in of_rank.items() for name, value in tensors.items())
    writer.save(f"rank{world.rank}.safetensors", flat, write=True)
    # Counters, and what decides whether a run may continue from here.
    state = {
        "update": update,
        "world_size": world.size,
        **{name: part.state_dict() for name, part in parts.counters.items()},
        "config": recipe(config),
        "versions": _versions(),
    }
    writer.run("state.json", lambda: (writer.folder / "state.json").write_text(json.dumps(state, indent=1)))
    # The manifest comes last, when the files of all ranks are there.
    world.barrier()
    writer.run("manifest.json", lambda: write_manifest(writer.folder))
    target = writer.finish()
    # Old checkpoints go once the new one is whole.
    if main:
        for old in list_checkpoints(folder)[: -config.log.keep]:
            try:
                remove(old)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be deleted: %s", old, one_line(error))
    world.barrier()
    return target


def load_checkpoint(checkpoint: Path, parts: Parts, world: World) -> int:
    """Restore every part from a checkpoint that `newest_checkpoint` has chosen; returns its update.

    Raises UserError where a file cannot be read.
    """
    state = read_state(checkpoint)
    # Other versions may round differently.
    changed = _differences(_versions(), state.get("versions", {}))
    if changed:
        logger.warning("the run goes on, but perhaps not in the same bits: version of %s", "; ".join(changed))
    # Counters first: other parts read them.
    for name, counters in parts.counters.items():
        counters.load_state_dict(state[name])
    # Whole parts; a file is missing where the part had nothing to save.
    for name, part in parts.whole.items():
        file = checkpoint / f"{name}.safetensors"
        if file.is_file():
            part.load_state_dict(_read(file))
    # This rank's parts: as saved, or a new share of what all ranks saved.
    same_ranks = state["world_size"] == world.size
    ranks = [world.rank] if same_ranks else range(state["world_size"])
    saved = [_unflatten(_read(checkpoint / f"rank{rank}.safetensors")) for rank in ranks]
    for name, part in parts.by_rank.items():
        states = [parts_of_rank.get(name, {}) for parts_of_rank in saved]
        of_rank = states[0] if same_ranks else part.reshard(states, world)
        if of_rank is not None:
            part.load_state_dict(of_rank)
    return state["update"]


def _versions() -> dict[str, str]:
    """The installed version of each of these packages."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    return sorted((path for path in folder.glob("update-*") if _NAME.search(path.name)), key=update_of)


def update_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was written."""
    return int(_NAME.search(checkpoint.name)[1])


def recipe(config: TrainConfig) -> dict:
    """The part of a config that a resumed run has to share, as JSON would hold it.

    All but the run's length, its log and its folders.
    """
    fields = {key: value for key, value in asdict(config).items() if key not in _MAY_CHANGE}
    del fields["data"]["store"]
    return json.loads(json.dumps(fields))


def _differences(present: dict, saved: dict, prefix: str = "") -> list[str]:
    """A phrase for each entry of two nested dictionaries that is not the same in both."""
    phrases = []
    for key in sorted(present.keys() | saved.keys()):
        now, then = present.get(key), saved.get(key)
        if isinstance(now, dict) and isinstance(then, dict):
            phrases += _differences(now, then, f"{prefix}{key}.")
        elif now != then:
            phrases.append(f"{prefix}{key} is {now!r}, but was {then!r}")
    return phrases


def newest_checkpoint(folder: Path, config: TrainConfig, world: World, before: int | None = None) -> Path | None:
    """The newest whole checkpoint in `folder` that was written before update `before`.

    None where there are no checkpoints. A checkpoint that is not whole is passed over with a
    warning. Rank 0 looks, so that all ranks choose the same one.

    Raises UserError on all ranks where none is whole, or where the newest whole one belongs to
    another recipe or cannot be shared by this number of ranks.
    """
    checkpoint = error = None
    if world.is_main:
        try:
            checkpoint = newest_whole(folder, before)
            if checkpoint is not None:
                _refuse_foreign(checkpoint, config, world)
        except UserError as refused:
            error = str(refused)
    checkpoint, error = world.gather((checkpoint and str(checkpoint), error))[0]
    if error:
        raise UserError(error)
    return Path(checkpoint) if checkpoint else None


def newest_whole(folder: Path, before: int | None = None) -> Path | None:
    """The newest whole checkpoint in `folder` that was written before update `before`.

    Warns about those that are not whole. None where there are no checkpoints. Raises UserError
    where there are some, but none is whole.
    """
    checkpoints = [path for path in list_checkpoints(folder) if before is None or update_of(path) < before]
    for path in reversed(checkpoints):
        reason = why_not_whole(path)
        if reason is None:
            return path
        logger.warning("passing over %s, which is not whole: %s", path, reason)
    if checkpoints:
        raise UserError(f"no checkpoint in {folder} is whole; start again with --overwrite")
    return None


def _refuse_foreign(checkpoint: Path, config: TrainConfig, world: World) -> None:
    """Raises UserError where a run of this config and world cannot continue from a checkpoint."""
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
    """The checkpoint's counters, world size and config. Raises UserError if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state["config"], dict) or not isinstance(state["world_size"], int):
            raise ValueError("no config or no world size in it")
        return state
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--resume: {checkpoint}/state.json is not readable: {one_line(error)}") from error


def _read(path: Path) -> Tensors:
    """Tensors by name, mapped from the file. Raises UserError where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume: {path} is not readable: {one_line(error)}; delete its folder") from error


def _unflatten(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors of each part, from tensors by `<part>.<name>`."""
    parts: dict[str, Tensors] = {}
    for full_name, value in tensors.items():
        part, _, name = full_name.partition(".")
        parts.setdefault(part, {})[name] = value
    return parts
