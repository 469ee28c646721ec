"""What a run leaves on disk: checkpoints to go on from, and the negative model itself. All safetensors and JSON.

A folder is written aside and renamed when it is whole. DeepSpeed's own checkpoint files are pickles and never used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from selfnpo_fast.engine import StudentEngine
from selfnpo_fast.errors import UserError
from selfnpo_fast.moving_reference import Reference
from selfnpo_fast.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"update-(\d{7})$")


def _barrier(world: World) -> None:
    if world.size > 1:
        torch.distributed.barrier()


def _contiguous(items: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """CPU copies by name, as safetensors wants them."""
    return {name: value.to("cpu", dtype or value.dtype, copy=True).contiguous() for name, value in items}


def _native_params(engine: StudentEngine) -> list[torch.Tensor]:
    """This rank's optimiser parameters in their own order (flat partitions under ZeRO)."""
    return [p for group in engine.engine.basic_optimizer.param_groups for p in group["params"]]


def _native_state(engine: StudentEngine) -> dict[str, torch.Tensor]:
    """The optimiser's own state on this rank, for optimisers whose moments are quantised in blocks (8-bit)."""
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
        step = int(mine.pop("step"))
        state[p] = {"step": step, **{key: value.to(p.device) for key, value in mine.items()}}


def _optimizer_state(engine: StudentEngine) -> tuple[dict[str, torch.Tensor], int]:
    """Whole Adam moments by parameter name, and the optimiser's step count. Collective under ZeRO."""
    from deepspeed.utils import safe_get_full_optimizer_state

    basic = engine.engine.basic_optimizer
    moments, step = {}, 0
    for name, param in engine.trainable:
        for key in MOMENTS:
            if engine.stage == 0:
                moments[f"{name}.{key}"] = basic.state[param][key]
            else:
                moments[f"{name}.{key}"] = safe_get_full_optimizer_state(param, key)
    for state in basic.state.values():
        step = int(state.get("step", step))
    return _contiguous(moments.items()), step


def _restore_optimizer(engine: StudentEngine, moments: dict[str, torch.Tensor], step: int) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    basic = engine.engine.basic_optimizer
    for name, param in engine.trainable:
        for key in MOMENTS:
            value = moments[f"{name}.{key}"].to(param.device)
            if engine.stage == 0:
                basic.state[param].setdefault("step", torch.tensor(float(step)))
                basic.state[param][key] = value
            else:
                safe_set_full_optimizer_state(param, value, key)
    if engine.stage > 0:
        for state in basic.state.values():
            state["step"] = torch.tensor(float(step))


def save_checkpoint(
    folder: Path,
    update: int,
    *,
    engine: StudentEngine,
    reference: Reference,
    rollout_state: dict[str, torch.Tensor],
    fingerprint: dict,
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
    weights = _contiguous(engine.full_weights())
    native = engine.quantised_moments
    moments, step = ({}, 0) if native else _optimizer_state(engine)
    if native:
        save_file(_contiguous(_native_state(engine).items()), aside / f"optimizer-rank{world.rank}.safetensors")
    save_file(_contiguous(rollout_state.items()), aside / f"rollout-rank{world.rank}.safetensors")
    if world.is_main:
        save_file(weights, aside / "student.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        save_file(_contiguous(reference.state_dict().items()), aside / "reference.safetensors")
        state = {"update": update, "optimizer_step": step, "world_size": world.size, "config": fingerprint}
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


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's update, world size and config."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--resume: {checkpoint} is not readable: {error}; delete it to use an older one") from error


def load_checkpoint(
    checkpoint: Path, *, engine: StudentEngine, reference: Reference, rollout, lr_updates: int, world: World
) -> None:
    """Restore student, optimiser, reference, learning rate and slots. The world size has to be the one of the run."""
    state = read_state(checkpoint)
    if state["world_size"] != world.size:
        raise UserError(f"--resume: {checkpoint} was written by {state['world_size']} ranks, not {world.size}")
    load_weights(engine, load_file(checkpoint / "student.safetensors"))
    if engine.quantised_moments:
        _restore_native(engine, load_file(checkpoint / f"optimizer-rank{world.rank}.safetensors"))
    else:
        _restore_optimizer(engine, load_file(checkpoint / "optimizer.safetensors"), state["optimizer_step"])
    reference.load_state_dict(load_file(checkpoint / "reference.safetensors"))
    rollout.load_state_dict(load_file(checkpoint / f"rollout-rank{world.rank}.safetensors"))
    for _ in range(lr_updates):
        engine.lr_scheduler.step()


def load_weights(engine: StudentEngine, weights: dict[str, torch.Tensor]) -> None:
    """Set trainable parameters and their fp32 masters from whole tensors by name."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, param in engine.trainable:
        if engine.stage > 0:
            safe_set_full_fp32_param(param, weights[name].to(param.device))
        with torch.no_grad(), engine.gather([param]):
            param.copy_(weights[name])


def save_negative(folder: Path, engine: StudentEngine, adapter, dtype: torch.dtype, world: World, lora: bool) -> Path:
    """Write the negative model: `folder/unet` as a diffusers component, or a LoRA file that diffusers loads.

    Weights are stored in the run's precision. All ranks take part; rank 0 writes.
    """
    weights = _contiguous(engine.full_weights(), dtype)
    if not lora:
        weights |= _contiguous(engine.frozen_weights(), dtype)
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
