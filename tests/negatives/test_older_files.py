"""Files that an earlier state of the code wrote, before its modules moved: they load bit for bit.

tests/data/written_before_rooms holds a negative with full weights, one as a LoRA, both trained for
two updates from `tiny.write_sd`, and a latent store of three pictures.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from selfnpo_fast.data import latent_store
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.runtime.folders import MANIFEST, write_manifest
from selfnpo_fast.runtime.world import World

OLD = Path(__file__).parents[1] / "data" / "written_before_rooms"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(str(tiny.write_sd(tmp_path_factory.mktemp("model"))))


def test_full_weights(adapter):
    negative = load_negative(adapter.load_denoiser(torch.float32), OLD / "full")
    stored = load_file(OLD / "full" / "unet" / "diffusion_pytorch_model.safetensors")
    found = negative.network.state_dict()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def test_a_lora(adapter):
    negative = load_negative(adapter.load_denoiser(torch.float32), OLD / "lora")
    stored = load_file(OLD / "lora" / "pytorch_lora_weights.safetensors")
    assert len(negative.deltas) == len(stored) / 2 == 32
    for path, delta in negative.deltas.items():
        assert torch.equal(delta.down, stored[f"unet.{path}.lora_A.weight"])
        assert torch.equal(delta.up, stored[f"unet.{path}.lora_B.weight"])
        assert delta.scale == 1.0


@dataclass
class NeverEncodes:
    """The adapter's facts about a store; asked for a latent it fails."""

    path: str
    resolution: int
    latent_shape: tuple[int, ...]
    vae_sha256: str

    def encode(self, *arguments):
        raise AssertionError("the store was not used")


def test_a_latent_store(adapter, tmp_path):
    """The store is named after its source's path and times, which are this machine's: those are
    written anew."""
    shutil.copytree(OLD / "images", tmp_path / "images")
    (old,) = (OLD / "store").iterdir()
    facts = json.loads((old / "store.json").read_text())
    assert adapter.vae_sha256 == facts["recipe"]["vae_sha256"]
    shape = tuple(facts["shape"][1:])
    stand_in = NeverEncodes(adapter.path, facts["recipe"]["resolution"], shape, facts["recipe"]["vae_sha256"])
    recipe = {key: facts["recipe"][key] for key in ("limit", "seed")}
    identity = latent_store._identify(str(tmp_path / "images"), str(tmp_path / "stores"), stand_in, **recipe)
    assert identity.recipe.keys() == facts["recipe"].keys()
    assert identity.recipe["format"] == facts["recipe"]["format"]
    shutil.copytree(old, identity.folder)
    (identity.folder / "store.json").write_text(json.dumps(facts | {"recipe": identity.recipe}))
    (identity.folder / MANIFEST).unlink()
    write_manifest(identity.folder)
    latents, captions, _ = latent_store.stored_latents(
        str(tmp_path / "images"), str(tmp_path / "stores"), stand_in, **recipe, world=World(0, 1, CPU)
    )
    assert torch.equal(latents, load_file(old / "latents.safetensors")["latents"])
    assert captions == ["a cat", "two birds", "a red blot"]
