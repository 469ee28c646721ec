"""What a run leaves on disk: checkpoints to go on from, and the negative model itself. All safetensors and JSON.

A folder is written aside and renamed when it is whole. DeepSpeed's own checkpoint files are pickles and never used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.engine import StudentEngine
from selfnpo_fast.errors import UserError
from selfnpo_fast.moving_reference import Reference
from selfnpo_fast.world import World

_NAME = re.compile(r"update-(\d{7})$")


def _barrier(world: World) -> None:
    if world.size > 1:
        torch.distributed.barrier()


def _copies(
    items: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None, keep: bool = True
) -> dict[str, torch.Tensor]:
    """CPU copies by name, as safetensors wants them. Ranks that do not `keep` take part in the gathering alone."""
    out = {}
    for name, value in items:
        if keep:
            out[name] = value.to("cpu", dtype or value.dtype, copy=True).contiguous()
    return out


def _native_params(engine: StudentEngine) -> list[torch.Tensor]:
    """This rank's optimiser parameters in their own order (flat partitions under ZeRO)."""
    if engine.stage == 3:  # which empties the parameter groups between steps
        return list(engine.engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.engine.basic_optimizer.param_groups for p in group["params"]]


def _native_state(engine: StudentEngine) -> dict[str, torch.Tensor]:
    """The optimiser's own state on this rank."""
    state = engine.engine.basic_optimizer.state
    return {
        f"{i}.{key}": torch.as_tensor(value)
        for i, p in enumerate(_native_params(engine))
        for key, value in state[p].items()
    }


def _restore_native(engine: StudentEngine, saved: dict[str, torch.Tensor]) -> None:
    state = engine.engine.basic_optimizer.state
    for i, p in enumerate(_native_params(engine)):
        mine = {key.split(".", 1)[1]: value for key, value in saved.items() if key.split(".", 1)[0] == str(i)}
        # torch's AdamW keeps its step count as a tensor on the CPU, bitsandbytes as an int.
        step = mine.pop("step")
        step = step if isinstance(engine.engine.basic_optimizer, torch.optim.AdamW) else int(step)
        state[p] = {"step": step, **{key: value.to(p.device) for key, value in mine.items()}}


def save_checkpoint(
    folder: Path,
    update: int,
    *,
    engine: StudentEngine,
    reference: Reference,
    rollout_state: dict[str, torch.Tensor],
    config: TrainConfig,
    world: World,
    keep: int,
) -> Path:
    """Write `folder/update-NNNNNNN` with all ranks taking part, and delete all but the `keep` newest."""
    target = folder / f"update-{update:07d}"
    aside = folder / f".writing-update-{update:07d}"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _barrier(world)
    weights = _copies(engine.full_weights(), keep=world.is_main)
    save_file(_copies(_native_state(engine).items()), aside / f"optimizer-rank{world.rank}.safetensors")
    save_file(_copies(rollout_state.items()), aside / f"rollout-rank{world.rank}.safetensors")
    if world.is_main:
        save_file(weights, aside / "student.safetensors")
        save_file(_copies(reference.state_dict().items()), aside / "reference.safetensors")
        state = {
            "update": update,
            "lr_steps": engine.lr_scheduler.last_epoch,
            "world_size": world.size,
            "config": recipe(config),
        }
        (aside / "state.json").write_text(json.dumps(state, indent=2))
    _barrier(world)
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier(world)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("update-*") if _NAME.search(path.name))


def recipe(config: TrainConfig) -> dict:
    """The part of a config that a resumed run has to share: all but its length, its log and its folder."""
    fields = {key: value for key, value in asdict(config).items() if key not in ("updates", "log", "output")}
    return json.loads(json.dumps(fields))


def _first_difference(ours: dict, theirs: dict, prefix: str = "") -> str | None:
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            inner = _first_difference(mine, other, f"{prefix}{key}.")
            if inner:
                return inner
        elif mine != other:
            return f"{prefix}{key} is {mine!r}, but was {other!r}"
    return None


def newest_checkpoint(folder: Path, config: TrainConfig, world: World) -> Path | None:
    """The newest checkpoint under `folder`, or None. Raises UserError where it belongs to another recipe or world."""
    found = list_checkpoints(folder)
    if not found:
        return None
    state = read_state(found[-1])
    difference = _first_difference(recipe(config), state["config"])
    if difference:
        raise UserError(f"--resume: {found[-1]} is of another run: {difference}; use the same config or another output")
    if state["world_size"] != world.size:
        raise UserError(f"--resume: {found[-1]} was written by {state['world_size']} ranks, not {world.size}")
    return found[-1]


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's update, learning-rate steps, world size and config."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--resume: {checkpoint} is not readable: {error}; delete it to use an older one") from error


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--resume: {path} is not readable: {reason}; delete its folder to use an older one") from error


def load_checkpoint(checkpoint: Path, *, engine: StudentEngine, reference: Reference, rollout, world: World) -> int:
    """Restore student, optimiser, reference, learning rate and slots; returns the update to go on from."""
    state = read_state(checkpoint)
    load_weights(engine, _load(checkpoint / "student.safetensors"))
    _restore_native(engine, _load(checkpoint / f"optimizer-rank{world.rank}.safetensors"))
    reference.load_state_dict(_load(checkpoint / "reference.safetensors"))
    rollout.load_state_dict(_load(checkpoint / f"rollout-rank{world.rank}.safetensors"))
    engine.set_lr_steps(state["lr_steps"])
    return state["update"]


def load_weights(engine: StudentEngine, weights: dict[str, torch.Tensor]) -> None:
    """Set trainable parameters and their fp32 masters from whole tensors by name."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, param in engine.trainable:
        if engine.stage > 0:
            safe_set_full_fp32_param(param, weights[name].to(param.device))
        with torch.no_grad(), engine.gather([param], modify=True):
            param.copy_(weights[name])


def save_negative(folder: Path, engine: StudentEngine, adapter, dtype: torch.dtype, world: World, lora: bool) -> Path:
    """Write the negative model: `folder/unet` as a diffusers component, or a LoRA file that diffusers loads.

    Weights are stored in the run's precision. All ranks take part; rank 0 writes.
    """
    weights = _copies(engine.full_weights(), dtype, keep=world.is_main)
    if not lora:
        weights |= _copies(engine.frozen_weights(), dtype, keep=world.is_main)
    if world.is_main:
        aside = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if lora:
            _write_lora(aside, engine.module, weights, adapter)
        else:
            part = aside / adapter.denoiser_name
            engine.module.save_config(part)
            save_file(weights, part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    _barrier(world)
    return folder


def _write_lora(folder: Path, module: nn.Module, weights: dict[str, torch.Tensor], adapter) -> None:
    """PEFT's layout with its config in the metadata, as `pipe.load_lora_weights(folder)` expects it."""
    import diffusers
    from peft.utils import get_peft_model_state_dict

    config = module.peft_config["default"].to_dict()
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    getattr(diffusers, adapter.pipeline_class).save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(module, state_dict=weights),
        unet_lora_adapter_metadata=metadata,
        safe_serialization=True,
    )
