"""Checkpoints: what a run can continue from, in safetensors and JSON.

A checkpoint is a folder `update-NNNNNNN`:

    student.safetensors         the trained parameters
    exp_avg.safetensors         Adam's first moment
    exp_avg_sq.safetensors      Adam's second moment
    reference.safetensors       the float32 masters of a moving reference
    rank<r>.safetensors         of each rank: the rollout, sums of the metrics, states of the
                                random generators, 8-bit moments
    state.json                  counters, config, fingerprints of the inputs, versions, and the
                                names of the files above that belong to the checkpoint
    manifest.json               sizes and hashes of the other files

The first four files hold whole float32 tensors by name, from which any number of ranks can
continue. They and 8-bit moments are looked at before they are written: a state that is not finite
never gets the name of a checkpoint. DeepSpeed's own checkpoint files are pickles; they are neither
written nor read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.folders import remove, write_manifest
from selfnpo_fast.runtime.layout import Layout, check_layout, layout_of
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import Tensors, Writer
from selfnpo_fast.training.resumable import (
    MOMENTS,
    STATE,
    differences,
    list_checkpoints,
    open_tensors,
    read_state,
    recipe,
    update_of,
    versions,
)


class WholePart(Protocol):
    """State that is the same on any number of ranks: whole tensors by name, in one file."""

    required: bool
    """Whether a checkpoint has to hold it; asked once the counters are loaded."""

    def layout(self) -> Layout:
        """dtype and shape of each tensor of `state_dict()`; nothing is exchanged among ranks."""

    def state_dict(self) -> Iterable[tuple[str, torch.Tensor]] | None:
        """(name, tensor) pairs, or None where there is nothing yet; all ranks iterate together."""

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`."""


class RankPart(Protocol):
    """State of each rank: tensors by name."""

    def state_dict(self) -> Tensors:
        """This rank's tensors."""

    def load_state_dict(self, state: Tensors) -> None:
        """Continue from `state_dict()`.

        Raises an error, best a ValueError that says why, where `state` is none of this run's. A
        file may hold anything: names, shapes, dtypes and indices are to be checked before use.
        """

    def reshard(self, states: list[Tensors], world: World) -> Tensors | None:
        """This rank's part of the states that another number of ranks have saved.

        None leaves this rank's state as it is.
        """


class CounterPart(Protocol):
    """Plain values that are the same on all ranks."""

    def state_dict(self) -> dict:
        """Values that JSON can hold."""

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`. Raises an error as `RankPart.load_state_dict` does."""


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
        """Continue from `state_dict()`; that of a GPU may be missing, or have no GPU to go to.

        Raises an error for states that no generator has.
        """
        own = self.state_dict()
        common = own.keys() & state.keys() | {"cpu"}
        found = {name: value for name, value in state.items() if name in common or name != "cuda"}
        check_layout(layout_of(found.items()), layout_of((name, own[name]) for name in common))
        torch.set_rng_state(state["cpu"])
        if self.world.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.world.device)

    def reshard(self, states: list[Tensors], world: World) -> None:
        """None: another number of ranks draws other numbers."""


def save_checkpoint(
    folder: Path, update: int, parts: Parts, config: TrainConfig, world: World, inputs: dict | None
) -> Path:
    """Write the checkpoint `folder/update-NNNNNNN`, and delete all but the newest `log.keep`.

    `inputs` is the record of what the run reads (`training.input_record`), on rank 0. All ranks
    take part. Returns the checkpoint's folder. Raises RunError on all ranks where it could not be
    written, and NotFiniteError where weights, moments or reference are not finite; older
    checkpoints are untouched then.
    """
    writer = Writer(folder / f"update-{update:07d}", world)
    main = world.is_main
    # Whole parts: all ranks gather, rank 0 looks and writes.
    files = [f"rank{rank}.safetensors" for rank in range(world.size)]
    for name, part in parts.whole.items():
        tensors = part.state_dict()
        if tensors is not None:
            files.append(f"{name}.safetensors")
            writer.save(files[-1], tensors, write=main, finite=True)
    # This rank's parts.
    own = f"rank{world.rank}.safetensors"
    of_rank = {name: part.state_dict() for name, part in parts.by_rank.items()}
    writer.look(own, of_rank.get(MOMENTS, {}))
    flat = ((f"{part}.{name}", value) for part, tensors in of_rank.items() for name, value in tensors.items())
    writer.save(own, flat, write=True)
    # Counters, and what decides whether a run may continue from here.
    state = {
        "update": update,
        "world_size": world.size,
        "files": sorted(files),
        **{name: part.state_dict() for name, part in parts.counters.items()},
        "config": recipe(config),
        "inputs": inputs,
        "versions": versions(),
    }
    text = json.dumps(state, indent=1, allow_nan=False)
    writer.run(STATE, lambda: (writer.folder / STATE).write_text(text, encoding="utf-8"))
    # The manifest comes last, when the files of all ranks are there.
    world.barrier()
    writer.run("manifest.json", lambda: write_manifest(writer.folder, [*files, STATE]))
    target = writer.finish()
    if main:
        _delete_old(folder, update, config.log.keep)
    world.barrier()
    return target


def _delete_old(folder: Path, update: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, once the one of `update` is whole.

    Those of later updates were passed over when the run was resumed: they are of no use, and do not
    count.
    """
    for old in [path for path in list_checkpoints(folder) if update_of(path) <= update][:-keep]:
        try:
            remove(old)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be deleted: %s", old, one_line(error))


def load_checkpoint(checkpoint: Path, parts: Parts, world: World) -> int:
    """Restore every part from a checkpoint that `newest_checkpoint` has chosen; returns its update.

    Raises UserError on all ranks where a file cannot be read, or holds no state of this run.
    """
    state = read_state(checkpoint)
    # Other versions may round differently.
    changed = differences(versions(), state["versions"])
    if changed:
        logger.warning("the run goes on, but perhaps not in the same bits: version of %s", "; ".join(changed))
    # Counters first: other parts read them.
    for name, counters in parts.counters.items():
        with _refusing(checkpoint / STATE, name):
            counters.load_state_dict(state[name])
    # Whole parts; a file is missing where the part had nothing to save.
    for name, part in parts.whole.items():
        file = checkpoint / f"{name}.safetensors"
        if file.name in state["files"]:
            tensors = _read(file)
            with _refusing(file, name):
                check_layout(layout_of(tensors.items()), part.layout())
                part.load_state_dict(tensors)
        elif part.required:
            raise UserError(f"{checkpoint} lacks {file.name}; delete its folder")
    # This rank's parts: as saved, or a new share of what all ranks saved.
    world.together(lambda: _load_rank_parts(checkpoint, parts.by_rank, state["world_size"], world))
    return state["update"]


def _load_rank_parts(checkpoint: Path, parts: Mapping[str, RankPart], size: int, world: World) -> None:
    """Restore this rank's parts from the files of `size` ranks. Raises UserError."""
    same_ranks = size == world.size
    paths = [checkpoint / f"rank{rank}.safetensors" for rank in ([world.rank] if same_ranks else range(size))]
    saved = [_read_parts(path, parts) for path in paths]
    for name, part in parts.items():
        states = [parts_of_rank[name] for parts_of_rank in saved]
        with _refusing(paths[0], name, RuntimeError):
            of_rank = states[0] if same_ranks else part.reshard(states, world)
            if of_rank is not None:
                part.load_state_dict(of_rank)


@contextmanager
def _refusing(path: Path, part: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what loading a part throws over a state of another run into one line.

    `more` are further errors that mean the same; a RuntimeError of a part that ranks load together
    may as well be a lost rank.
    """
    try:
        yield
    except (UserError, RunError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, *more) as error:
        raise UserError(f"{path} does not fit this run: {part}: {one_line(error)}; delete its folder") from error


def _read(path: Path) -> Tensors:
    """Tensors by name, mapped from the file. Raises UserError where it cannot be read."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _read_parts(path: Path, parts: Iterable[str]) -> dict[str, Tensors]:
    """The tensors of each part of a rank, named `<part>.<name>` in the file. Raises UserError."""
    of_part: dict[str, Tensors] = {part: {} for part in parts}
    for full_name, tensor in _read(path).items():
        part, _, name = full_name.partition(".")
        if part not in of_part:
            raise UserError(f"{path} does not fit this run: {one_line(part, 80)} is unknown; delete its folder")
        of_part[part][name] = tensor
    return of_part
