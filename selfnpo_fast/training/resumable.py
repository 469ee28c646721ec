"""Which checkpoint a run can continue from: whole, finite, and of the same recipe."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.files import read_json
from selfnpo_fast.runtime.finite import first_not_finite
from selfnpo_fast.runtime.folders import MANIFEST, why_not_whole
from selfnpo_fast.runtime.limits import MAX_COUNT, MAX_TENSORS
from selfnpo_fast.runtime.version import __version__
from selfnpo_fast.runtime.world import World

STATE = "state.json"
"""The file of counters, config, inputs and versions."""
MOMENTS = "optimizer"
"""The part of a rank's file that has to be finite. A rollout may hold a state that is not: the
updates that it spoils are skipped, and it ends."""
_NAME = re.compile(r"update-(\d{7,18})$")
_PACKAGES = ("deepspeed", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors")
"""Other packages whose versions can change the bits of a run."""
_MAY_CHANGE = ("updates", "log", "output")
"""Sections of a config that a resumed run may change: its length, its log, its folder."""
_SHOWN = 10
"""Differences that one message names."""


def versions() -> dict[str, str]:
    """The version of each package that can change the bits of a run, or "not installed".

    Our own version is the code's: a checkout on PYTHONPATH is not installed. torch's own has the
    build, such as 2.13.0+cu130, which the metadata of some wheels leaves out.
    """
    ours = {"selfnpo-fast": __version__, "torch": str(torch.__version__)}
    return ours | {name: _installed(name) for name in _PACKAGES}


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a run may need no bitsandbytes
        return "not installed"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    return sorted((path for path in folder.glob("update-*") if is_checkpoint(path)), key=update_of)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return _NAME.search(folder.name) is not None


def update_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was written."""
    return int(_NAME.search(checkpoint.name)[1])


def recipe(config: TrainConfig) -> dict:
    """The part of a config that a resumed run has to share, as JSON would hold it.

    All but the run's length, its log, its folders, CUDA graphs, where text embeddings lie, what
    becomes of bad pictures, and which frames of videos are taken: the fingerprints of the inputs
    tell whether that has changed anything.
    """
    fields = {key: value for key, value in asdict(config).items() if key not in _MAY_CHANGE}
    for name in ("data.store", "data.on_bad", "data.stride", "prompts.store", "prompts.device_mib", "engine.graphs"):
        section, _, field = name.partition(".")
        del fields[section][field]
    return json.loads(json.dumps(fields))


def differences(present: dict, saved: dict, prefix: str = "") -> list[str]:
    """A phrase for each entry of two nested dictionaries that is not the same in both."""
    phrases = []
    for key in sorted(present.keys() | saved.keys()):
        now, then = present.get(key), saved.get(key)
        if isinstance(now, dict) and isinstance(then, dict):
            phrases += differences(now, then, f"{prefix}{key}.")
        elif now != then:
            phrases.append(f"{prefix}{one_line(key, 80)} is {shortened(now)}, but was {shortened(then)}")
    more = [f"and {len(phrases) - _SHOWN} more"] if len(phrases) > _SHOWN else []
    return phrases[:_SHOWN] + more


def newest_checkpoint(folder: Path, config: TrainConfig, world: World, before: int | None = None) -> Path | None:
    """The newest good checkpoint in `folder` that was written before update `before`.

    None where there are no checkpoints. One that is not whole, or holds values that are not finite,
    is passed over with a warning. Rank 0 looks, so that all ranks choose the same one.

    Raises UserError on all ranks where none is good, or where the newest good one belongs to
    another recipe or cannot be shared by this number of ranks.
    """

    def look() -> Path | None:
        """The checkpoint, looked for on rank 0."""
        checkpoint = newest_good(folder, before)
        if checkpoint is not None:
            _refuse_foreign(checkpoint, config, world)
        elif any(before is None or update_of(path) < before for path in list_checkpoints(folder)):
            raise UserError(f"no checkpoint in {folder} is whole and finite; start again with --overwrite")
        return checkpoint

    return world.on_main(look)


def newest_good(folder: Path, before: int | None = None) -> Path | None:
    """The newest whole and finite checkpoint in `folder` that was written before update `before`.

    Warns about those that are not. None where there is none. Raises UserError for one that is whole
    and cannot be read.
    """
    for path in reversed(list_checkpoints(folder)):
        if before is None or update_of(path) < before:
            if (reason := why_not_whole(path)) is not None:
                logger.warning("passing over %s, which is not whole: %s", path, reason)
            elif (reason := _why_not_finite(path)) is not None:
                logger.warning("passing over %s, which is not finite: %s", path, reason)
            else:
                return path
    return None


def _why_not_finite(checkpoint: Path) -> str | None:
    """The first tensor of weights, moments and reference that is not finite, or None."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        of_rank = path.name.startswith("rank")
        with open_tensors(path) as file:
            names = [name for name in file.keys() if not of_rank or name.startswith(f"{MOMENTS}.")]
            found = first_not_finite((name, file.get_tensor(name)) for name in names)
        if found is not None:
            return f"{path.name}: {one_line(found, 80)}"
    return None


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file of a checkpoint. Raises UserError where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            if len(file.keys()) > MAX_TENSORS:
                raise ValueError(f"it holds more than {MAX_TENSORS:,} tensors")
            yield file
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is not readable: {one_line(error)}; delete its folder") from error


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's counters, world size, config and inputs, with the types that they have to
    have.

    Raises UserError where state.json is none of this checkpoint.
    """
    path = checkpoint / STATE
    state = read_json(path, str(checkpoint))
    try:
        if not isinstance(state, dict):
            raise ValueError("no object")
        if state.get("update") != update_of(checkpoint) or isinstance(state["update"], bool):
            raise ValueError(f"its update is {shortened(state.get('update'))}, but its folder is {checkpoint.name}")
        size = state.get("world_size")
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_COUNT:
            raise ValueError(f"its world_size is {shortened(size)}")
        for key in ("config", "versions"):
            if not isinstance(state.get(key), dict):
                raise ValueError(f"its {key} is {shortened(state.get(key))}")
        _check_files(checkpoint, state)
    except ValueError as error:
        raise UserError(f"{path} is no state of a run: {one_line(error)}; delete its folder") from error
    return state


def _check_files(checkpoint: Path, state: dict) -> None:
    """ValueError where a file that the state names is not in the manifest, or not there.

    Checkpoints of older versions name no files: then they are those of the folder.
    """
    if "files" not in state:
        state["files"] = [path.name for path in checkpoint.glob("*.safetensors")]
    files = state["files"]
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"its files are {shortened(files)}")
    listed = read_json(checkpoint / MANIFEST, str(checkpoint))
    if not isinstance(listed, dict):
        raise ValueError(f"its manifest is {shortened(listed)}")
    for name in files:
        if name not in listed:
            raise ValueError(f"{one_line(name, 80)} belongs to it, and the manifest does not list it")
    if sum(name.startswith("rank") for name in files) != state["world_size"]:
        raise ValueError(f"it is of {state['world_size']} ranks, and has other files of ranks")


def _completed(saved: dict, defaults: dict) -> dict:
    """A saved recipe with the default of each choice that it does not have."""
    filled = defaults | saved
    for key, of_section in defaults.items():
        if isinstance(of_section, dict) and isinstance(filled[key], dict):
            filled[key] = of_section | filled[key]
    return filled


def _refuse_foreign(checkpoint: Path, config: TrainConfig, world: World) -> None:
    """Raises UserError where a run of this config and world cannot continue from a checkpoint."""
    state = read_state(checkpoint)
    # A choice that came after the checkpoint was then what its default is now.
    now, then = recipe(config), _completed(state["config"], recipe(TrainConfig()))
    # Where the checkpoint has the fingerprint of the base, that decides: a revision may be pinned
    # later.
    if isinstance(state.get("inputs"), dict) and isinstance(then.get("model"), dict):
        now["model"]["revision"] = then["model"].get("revision")
    changed = differences(now, then)
    if changed:
        raise UserError(f"{checkpoint} is of another run: {'; '.join(changed)}; use the same config or another output")
    if state["world_size"] != world.size and config.optimizer.name == "adamw8bit":
        raise UserError(
            f"{checkpoint} was written by {state['world_size']} ranks, not {world.size}; the 8-bit moments "
            "belong to each rank's own share of the weights; use as many ranks, or optimizer.name adamw from the start"
        )
