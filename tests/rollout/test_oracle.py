"""Single training iterations of the authors' code, replayed through the public lockstep path.

The files hold all random draws, embeddings and weights, and what the authors' code computed from
them. `SELFNPO_ORACLE_DIR` names another folder of such files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open

from selfnpo_fast.config import LossConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models import StableDiffusionAdapter, StableDiffusionXLAdapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import Grid, GuidedPredictor, LockstepDraws, lockstep_rollout
from selfnpo_fast.training.objective import Objective

FOLDER = Path(os.environ.get("SELFNPO_ORACLE_DIR", Path(__file__).parents[1] / "data" / "oracle"))
FILES = sorted(FOLDER.glob("*.safetensors"))
CPU = torch.device("cpu")


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def network(tensors: dict[str, torch.Tensor], config: dict, prefix: str) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**config)
    unet.load_state_dict({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
    return unet


def conditioning(tensors: dict[str, torch.Tensor], sdxl: bool) -> ConditioningTable:
    """Row 0 unconditional, row i + 1 the i-th sample's caption."""
    empty = {"encoder_hidden_states": tensors["uncond_prompt_embeds"][:1]}
    rows = {"encoder_hidden_states": tensors["prompt_embeds"]}
    if sdxl:
        empty |= {"text_embeds": tensors["uncond_pooled_embeds"][:1], "time_ids": tensors["time_ids"][:1]}
        rows |= {"text_embeds": tensors["pooled_embeds"], "time_ids": tensors["time_ids"]}
    return ConditioningTable.build(empty, rows)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference against the largest expected magnitude."""
    scale = expected.abs().max().clamp(min=1e-12)
    error = ((actual.detach() - expected).abs().max() / scale).item()
    assert error <= tolerance, f"relative error {error:.2e}"


def test_the_folder_holds_files():
    assert FILES, f"no oracle files in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lockstep_iteration_matches_the_authors_code(path: Path):
    tensors, meta = read(path)
    unet_config = json.loads(meta["unet_config"])
    sdxl = "pooled_embeds" in tensors
    uncond = tensors["uncond_prompt_embeds"]
    assert torch.equal(uncond, uncond[:1].expand_as(uncond)), "the table has one unconditional row"
    table = conditioning(tensors, sdxl)
    schedule = Levels.of(DDIMScheduler(**json.loads(meta["scheduler"])))
    adapter = (StableDiffusionXLAdapter if sdxl else StableDiffusionAdapter)("unused")
    reference = network(tensors, unet_config, "reference.")
    student = network(tensors, unet_config, "student.")
    predictor = GuidedPredictor(
        lambda x, t, cond: adapter.predict(reference, x, t, cond), table, float(meta["guidance_w"])
    )
    draws = LockstepDraws(
        start_index=tensors["start_index"],
        steps=torch.full_like(tensors["start_index"], int(meta["rollout_steps"])),
        noise=tensors["noise"],
        s=tensors["s"],
        renoise=tensors["renoise"],
    )
    rows = torch.arange(len(tensors["latents"])) + 1
    grid = Grid.build(schedule, int(meta["ddim_steps"]), CPU, omega=predictor.omega)

    out = lockstep_rollout(predictor, grid, draws, tensors["latents"], rows)

    assert torch.equal(grid.timestep(draws.start_index), tensors["start_timesteps"])
    assert torch.equal(out.t, tensors["t"])
    close(out.x_start, tensors["x_start"], 2e-5)
    close(out.x_t, tensors["x_t"], 2e-5)
    close(out.target, tensors["x0_target"], 2e-5)
    close(out.x_s, tensors["x_s"], 2e-5)

    pred = adapter.predict(student, out.x_s, draws.s, table.gather(rows))
    objective = Objective.build(LossConfig(kind=meta["loss"], c=float(meta["huber_c"])), schedule, CPU)
    k = objective.k[draws.s]
    close(k[:, 0, None, None, None] * out.x_s + k[:, 1, None, None, None] * pred, tensors["x0_pred"], 2e-5)
    loss, _ = objective(pred, out.x_s, draws.s, out.target, torch.ones(len(rows)))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    close(loss, tensors["loss"].squeeze(), 1e-4)
    close(norm, tensors["grad_norm"].squeeze(), 1e-4)
    close(student.conv_in.weight.grad, tensors["grad_conv_in"].view_as(student.conv_in.weight), 1e-4)


def test_forwards_per_pair_are_half_of_the_authors():
    """w = -1 needs only the unconditional branch: K + 1 forwards per pair, not 2 (K + 1)."""
    path = next(path for path in FILES if path.stem.startswith("sd15"))
    tensors, meta = read(path)
    table = conditioning(tensors, sdxl=False)
    batch = len(tensors["latents"])
    schedule = Levels.of(DDIMScheduler(**json.loads(meta["scheduler"])))
    for w, expected in ((-1.0, 6), (0.0, 6), (-5.0, 12)):
        predictor = GuidedPredictor(lambda x, t, cond: torch.zeros_like(x), table, w)
        draws = LockstepDraws(
            start_index=torch.full((batch,), 20),
            steps=torch.full((batch,), 5),
            noise=tensors["noise"],
            s=tensors["s"],
            renoise=tensors["renoise"],
        )
        grid = Grid.build(schedule, 25, CPU, omega=w)
        lockstep_rollout(predictor, grid, draws, tensors["latents"], torch.arange(batch) + 1)
        assert predictor.forwards == expected * batch
