"""Tiling and slicing of an adapter's autoencoder, for data and for sample grids."""

from __future__ import annotations

import pytest
import tiny_transformers
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from test_new_family import TokenAdapter, save

from selfnpo_fast import models
from selfnpo_fast.config import ModelConfig
from selfnpo_fast.models import load_adapter, load_adapter_of
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_transformers.write_sd3(tmp_path_factory.mktemp("sd3"))


def encoded(vae, pictures: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples of the posterior with keyed noise, scaled."""
    posterior = vae.encode(pictures).latent_dist
    noise = normal(NoiseKey(seed, ids, draw_id(Draw.POSTERIOR)), posterior.mean.shape[1:])
    return (posterior.mean + posterior.std * noise - vae.config.shift_factor) * vae.config.scaling_factor


def test_data_is_encoded_in_tiles_and_the_hash_says_so(folder):
    config = {"path": str(folder), "height": 96, "width": 80}
    plain, tiled, sliced = (
        load_adapter_of(ModelConfig(**config, **more)) for more in ({}, {"vae_tiling": True}, {"vae_slicing": True})
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    torch.manual_seed(0)
    pictures, ids = torch.rand(2, 3, 96, 80) * 2 - 1, torch.tensor([5, 2])
    found, sizes, encode = {}, [], AutoencoderKL._encode
    for adapter in (plain, tiled, sliced):
        found[adapter] = adapter.encode(pictures, ids, seed=3)
    for adapter in (plain, tiled):
        torch.testing.assert_close(found[adapter], encoded(vae, pictures, ids, 3), rtol=1e-5, atol=1e-5)
        vae.enable_tiling()
    torch.testing.assert_close(found[sliced], found[plain], rtol=1e-5, atol=1e-5)
    assert (found[tiled] - found[plain]).abs().max() > 1e-3
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(AutoencoderKL, "_encode", lambda this, x: sizes.append(len(x)) or encode(this, x))
        sliced.encode(pictures, ids, seed=3)
    assert sizes == [1, 1]
    assert plain.vae_sha256 == sliced.vae_sha256 != tiled.vae_sha256
    assert not any((adapter.vae.use_tiling, adapter.vae.use_slicing) != (False, False) for adapter in found)


def test_clips_are_encoded_in_tiles(tmp_path):
    folder = tiny_transformers.write_cogvideox(tmp_path)
    adapter = load_adapter(str(folder), height=48, width=32, frames=9, vae_tiling=True)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    for one in (vae, adapter.vae):
        one.tile_overlap_factor_height, one.tile_overlap_factor_width = 1 / 2, 1 / 3
    vae.enable_tiling()
    clips = torch.rand(1, 9, 3, 48, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = vae.encode(clips.transpose(1, 2)).latent_dist
    noise = normal(NoiseKey(7, torch.tensor([4]), draw_id(Draw.POSTERIOR)), posterior.mean.shape[1:])
    expected = ((posterior.mean + posterior.std * noise) * vae.config.scaling_factor).transpose(1, 2)
    torch.testing.assert_close(adapter.encode(clips, torch.tensor([4]), seed=7), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_them_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    models.register(TokenAdapter.family)
    folder = save(tmp_path / "model")
    for name in ("vae_tiling", "vae_slicing"):
        line = rf"^model\.{name}: this family's autoencoder has no {name[4:]}; leave the option out$"
        with pytest.raises(UserError, match=line):
            load_adapter(str(folder), **{name: True})
