"""A negative model made of a checkpoint: what the run itself would have written at that update."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.fingerprint import base_records
from selfnpo_fast.negatives.merge import new_folder
from selfnpo_fast.negatives.weights import WeightReader, module_weights
from selfnpo_fast.negatives.write import save_negative
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.folders import why_not_whole
from selfnpo_fast.runtime.layout import check_layout, layout_of
from selfnpo_fast.runtime.options import parse_with_config
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import Tensors
from selfnpo_fast.training.input_record import weights_sha256
from selfnpo_fast.training.lora import make_trainable
from selfnpo_fast.training.resumable import STATE, is_checkpoint, newest_good, open_tensors, read_state

STUDENT = "student.safetensors"
"""The file of a checkpoint that holds the trained weights, whole, whatever the ZeRO stage was."""


def export(checkpoint: str | Path, output: str | Path, *, model: str | None = None) -> Path:
    """Write the negative model of a checkpoint to `output`, which is returned.

    It is equal, bit for bit, to the one that the run has written or would have written at that
    update. The CPU and one process suffice. The base's denoiser is loaded, for its config and its
    fingerprint.

    checkpoint    a checkpoint's folder, or that of a run: then its newest checkpoint
    output        a new or empty folder
    model         the base, where it is no longer at the run's `model.path`

    Raises UserError where the checkpoint is not whole or cannot be read, where the base is another
    one than the run's, and where `output` is not empty; RunError where it cannot be written or the
    weights are not finite.
    """
    target = new_folder(output)
    folder = _whole_checkpoint(Path(checkpoint))
    state = read_state(folder)
    config = _config(folder, state)
    # The base, as the run has read it.
    commit = _recorded_base(state).get("commit") or config.model.revision
    path = config.model.path if model is None else model
    adapter = load_adapter(
        path,
        revision=commit if model is None else None,
        variant=config.model.variant,
        expert=config.model.expert,
    )
    dtype = DTYPES[config.engine.precision]
    network = adapter.load_denoiser(dtype, "model")
    weights = module_weights(network, path)
    _refuse_other_base(folder, state, weights, path)
    records = base_records(adapter, network, config.model.path, commit, ScheduleFacts.of(adapter.schedule, path))
    # The student's weights in its place.
    make_trainable(network, adapter.trained_denoisers, config.lora, config.seed)
    trained = _trained(folder, network)
    frozen = ((name, p.detach()) for name, p in network.named_parameters() if name not in trained)
    alone = World(0, 1, torch.device("cpu"))
    lora = config.lora.rank > 0
    return save_negative(target, network, trained.items(), frozen, adapter, dtype, alone, lora=lora, base=records)


def _whole_checkpoint(path: Path) -> Path:
    """The checkpoint's folder, which is whole. Raises UserError."""
    path = path.expanduser()
    try:
        if not is_checkpoint(path):
            inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            newest = newest_good(inside)
            if newest is None:
                raise UserError(f"checkpoint: {path} holds none; give a run's folder, or one such as update-0000250")
            logger.info("checkpoint: %s", newest)
            return newest
        if (reason := why_not_whole(path)) is not None:
            raise UserError(f"checkpoint: {path} is not whole: {reason}; give another")
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"checkpoint: {one_line(error)}") from error
    return path


@dataclass
class _NoOptions:
    """No options."""


def _config(folder: Path, state: dict) -> TrainConfig:
    """The recipe of a checkpoint's run, checked like any config file. Raises UserError."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(json.dumps(state["config"]), encoding="utf-8")
        try:
            return parse_with_config(_NoOptions, TrainConfig, ["--config", str(file)], "selfnpo export", file).config
        except UserError as error:
            reason = one_line(error).replace(str(file), STATE)
            raise UserError(f"{folder / STATE} holds no recipe of this version: {reason}") from error


def _recorded_base(state: dict) -> dict:
    """What the state says of the base; nothing where it is older than that record."""
    inputs = state.get("inputs")
    base = inputs.get("base") if isinstance(inputs, dict) else None
    commit = base.get("commit") if isinstance(base, dict) else None
    return base if isinstance(base, dict) and (commit is None or isinstance(commit, str)) else {}


def _refuse_other_base(folder: Path, state: dict, weights: WeightReader, path: str) -> None:
    """UserError where the weights are not those of the base that the checkpoint records."""
    expected = _recorded_base(state).get("sha256")
    if expected is None:
        logger.warning("%s does not record its base: whether %s is it is not looked at", folder, path)
    elif weights_sha256((name, weights.read(name)) for name in weights.shapes) != expected:
        raise UserError(f"model: {path} has other weights than the base of {folder}; give that with --model")


def _trained(folder: Path, network: nn.Module) -> Tensors:
    """The student's weights by name, one float32 tensor for each trained weight of the network.

    Raises UserError where the file does not hold them.
    """
    path = folder / STUDENT
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    expected = {name: (torch.float32, tuple(p.shape)) for name, p in network.named_parameters() if p.requires_grad}
    try:
        check_layout(layout_of(tensors.items()), expected)
    except ValueError as error:
        raise UserError(f"{path} does not fit its base: {one_line(error)}") from error
    return tensors
