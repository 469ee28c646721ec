"""Files that an earlier state of the code wrote, before its modules moved: they load bit for bit,
but for the latent store, whose pixels were read in another way.

tests/data/written_before_rooms holds a negative with full weights, one as a LoRA, both trained for
two updates from `tiny.write_sd`, and a latent store of three pictures.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from selfnpo_fast.data import latent_store
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.runtime.errors import UserError
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


def test_a_latent_store_of_the_first_format(adapter, tmp_path):
    """It is refused by name: its latents may be of other pixels than are read now.

    Deleted, as the error asks for, it is encoded again; these plain pictures have the pixels that
    they had. The source's path is that of this machine.
    """
    shutil.copytree(OLD / "images", tmp_path / "images")
    (old,) = (OLD / "store").iterdir()
    facts = json.loads((old / "store.json").read_text())
    assert facts["recipe"]["format"] == 1
    assert adapter.vae_sha256 == facts["recipe"]["vae_sha256"]
    copy = tmp_path / "stores" / old.name
    shutil.copytree(old, copy)
    facts["recipe"]["source"] = str(tmp_path / "images")
    (copy / "store.json").write_text(json.dumps(facts))
    recipe = {key: facts["recipe"][key] for key in ("limit", "seed")}
    arguments = str(tmp_path / "images"), str(tmp_path / "stores"), adapter
    expected = (
        rf"^data\.store: {copy} was written by an older version, .*; delete it, and its images are encoded again$"
    )
    with pytest.raises(UserError, match=expected):
        latent_store.stored_latents(*arguments, **recipe, world=World(0, 1, CPU))
    assert [path.name for path in (tmp_path / "stores").iterdir()] == [old.name]
    latent_store.stored_latents(
        *arguments, limit=2, seed=5, world=World(0, 1, CPU)
    )  # another recipe than the old one's
    shutil.rmtree(copy)
    latents, captions, _ = latent_store.stored_latents(*arguments, **recipe, world=World(0, 1, CPU))
    torch.testing.assert_close(latents, load_file(old / "latents.safetensors")["latents"], rtol=1e-5, atol=1e-6)
    assert captions == ["a cat", "two birds", "a red blot"]
