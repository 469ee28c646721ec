"""Models that are not trained are refused by the class of their pipeline, in one line with the
reason."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
import tiny
from diffusers.loaders import PeftAdapterMixin
from fuzzing import assert_one_line

from selfnpo_fast.config import ModelConfig
from selfnpo_fast.models import FAMILIES, load_adapter, load_adapter_of
from selfnpo_fast.models.refused import REFUSED
from selfnpo_fast.runtime.errors import UserError


def refusal(tmp_path, name: str) -> str:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError) as caught:
        load_adapter(str(tmp_path))
    text = str(caught.value)
    assert_one_line(text, "model.path", f"is a {name}", "; supported are StableDiffusionPipeline, ")
    return text


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_is_refused_with_its_reason(tmp_path, name):
    assert f"is a {name}, which is refused: {REFUSED[name]}" in refusal(tmp_path, name)
    assert hasattr(diffusers, name), "the class is diffusers'"
    assert getattr(FAMILIES.get(name), "adapter", None) is None, "what is trained is not refused"


def test_classes_that_take_a_negative_say_so(tmp_path):
    for name in ("FluxPipeline", "QwenImagePipeline"):
        assert "takes a negative by attach_negative and is neither trained nor sampled" in refusal(tmp_path, name)
    text = refusal(tmp_path, "CogVideoXImageToVideoPipeline")
    assert "takes a negative by attach_negative; such a negative is trained of a CogVideoXPipeline" in text
    assert "refused" not in refusal(tmp_path, "QwenImagePipeline")


def test_an_unknown_class_has_the_general_line(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AuraFlowPipeline"}))
    with pytest.raises(UserError, match=r"is a AuraFlowPipeline; supported are "):
        load_adapter(str(tmp_path))


def test_the_reasons_hold_in_the_installed_diffusers():
    """As far as the source of diffusers shows them."""
    for name in ("PixArtTransformer2DModel", "LuminaNextDiT2DModel"):
        assert not issubclass(getattr(diffusers, name), PeftAdapterMixin)
    for name in ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanImagePipeline"):
        assert not hasattr(getattr(diffusers, name), "load_lora_weights")
    for name, parts in {
        "FluxPipeline": ("guidance=guidance",),
        "Flux2Pipeline": ("guidance=guidance",),
        "HunyuanVideoPipeline": ("guidance=guidance",),
        "HunyuanVideo15Pipeline": ("self.guider",),
        "HunyuanImagePipeline": ("guider",),
        "SanaPipeline": ("timestep_scale", "latent_channels"),
        "LuminaPipeline": (":3]",),
        "Ideogram4Pipeline": ("self.unconditional_transformer",),
    }.items():
        source = inspect.getsource(inspect.unwrap(getattr(diffusers, name).__call__))
        assert all(part in source for part in parts), name
    assert "negative_prompt" not in inspect.signature(diffusers.Flux2Pipeline.__call__).parameters


@pytest.mark.parametrize("place", ["model_index.json", "unet/config.json"])
def test_a_model_that_calls_itself_turbo_is_not_trained_and_is_sampled(tmp_path, place):
    folder = tiny.write_sd(tmp_path / "model")
    tiny.edit(folder / place, _name_or_path="stabilityai/sd-turbo")
    load_adapter(str(folder))
    with pytest.raises(UserError) as caught:
        load_adapter_of(ModelConfig(path=str(folder)))
    assert_one_line(str(caught.value), "model.path: stabilityai/sd-turbo was distilled", "train the model that it was")


def test_a_folder_may_have_any_name(tmp_path):
    folder = tiny.write_sd(tmp_path / "my-turbo")
    tiny.edit(folder / "model_index.json", _name_or_path="someone/turbocharged")
    load_adapter_of(ModelConfig(path=str(folder)))
