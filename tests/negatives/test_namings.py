"""Files of other programs: their names lead to the right layers, their formats are named when they
are refused."""

from __future__ import annotations

import json
import re

import bitsandbytes
import pytest
import tiny
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from fuzzing import assert_one_line
from safetensors.torch import save_file
from torch import nn

from selfnpo_fast.models import family_of
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.negatives.lora_files import read_lora
from selfnpo_fast.negatives.merge import merge
from selfnpo_fast.negatives.names import layer_paths
from selfnpo_fast.runtime.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def small(kind: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny.unet() if kind == "sd" else tiny.sdxl_unet(layers_per_block=2)


def empty(kind: str) -> UNet2DConditionModel:
    """SD1.5's or SDXL's network without memory for weights."""
    with init_empty_weights():
        return UNet2DConditionModel(cross_attention_dim=768) if kind == "sd" else UNet2DConditionModel(**SDXL)


def updates(network: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) of rank 2 for every Linear and Conv2d layer, by its path."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            shape = tuple(layer.weight.shape)
            down = torch.randn(2, *shape[1:], generator=generator)
            found[path] = down, torch.randn(shape[0], 2, *(1,) * (len(shape) - 2), generator=generator)
    return found


def original(network: nn.Module) -> dict[str, str]:
    """The original path of every module."""
    return family_of(network).original_paths([path for path, _ in network.named_modules() if path])


# Names


@pytest.mark.parametrize("network", [small("sd"), small("sdxl"), tiny.unet(layers_per_block=(1, 2))])
def test_original_names_are_diffusers_own(network):
    """diffusers' converter takes the original names back to ours."""
    paths = original(network)
    names = {name: f"{paths[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in network.state_dict()}
    keys = [f"model.diffusion_model.{name}" for name in names.values()]
    assert len(set(keys)) == len(names)
    config = dict(network.config)
    if isinstance(config["layers_per_block"], tuple):
        assert names["up_blocks.1.resnets.1.conv1.bias"] == "output_blocks.4.0.in_layers.2.bias"
        return  # the converter knows one number of layers
    back = convert_ldm_unet_checkpoint({key: key for key in keys}, config)
    assert back == {name: f"model.diffusion_model.{original}" for name, original in names.items()}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_layer_of_the_real_networks_goes_by_one_name_of_each_kind(kind):
    network = empty(kind)
    paths = original(network)
    table = layer_paths(network)
    for path, _ in network.named_modules():
        if path:
            assert table[path] == table[f"lora_unet_{path.replace('.', '_')}"] == path
    for path, name in paths.items():
        assert table[name] == table[f"lora_unet_{name.replace('.', '_')}"] == path
    assert table["lora_unet_add_embedding_linear_1" if kind == "sdxl" else "lora_unet_conv_in"]


NAMINGS = {
    "kohya": ("lora_unet_{folded}", "lora_down", "lora_up"),
    "kohya, original blocks": ("lora_unet_{folded_original}", "lora_down", "lora_up"),
    "OneTrainer": ("unet.{path}", "lora_down", "lora_up"),
    "ComfyUI": ("diffusion_model.{original}", "lora_A", "lora_B"),
    "whole model": ("model.diffusion_model.{original}", "lora_down", "lora_up"),
    "DataParallel": ("module.{path}", "lora_A", "lora_B"),
    "torch.compile": ("unet._orig_mod.{path}", "lora_A", "lora_B"),
    "PEFT with an adapter's name": ("{path}", "lora_A.default", "lora_B.default"),
    "diffusers of 2023": ("unet.{path}", "lora.down", "lora.up"),
    "diffusers' lora_linear_layer": ("unet.{path}", "lora_linear_layer.down", "lora_linear_layer.up"),
}


def named(network: nn.Module, naming: str) -> dict[str, torch.Tensor]:
    """A file's tensors; alpha is 1 on every layer, or 3 for every second."""
    paths, state = original(network), {}
    layer, down, up = NAMINGS[naming]
    for i, (path, factors) in enumerate(updates(network).items()):
        name = layer.format(
            path=path,
            original=paths[path],
            folded=path.replace(".", "_"),
            folded_original=paths[path].replace(".", "_"),
        )
        state |= {f"{name}.{down}.weight": factors[0], f"{name}.{up}.weight": factors[1]}
        state[f"{name}.alpha"] = torch.tensor(1.0 if i % 2 else 3.0)
    return state


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_of_every_layer(kind, naming):
    network = small(kind)
    found = read_lora(named(network, naming), network)
    expected = updates(network)
    assert found.keys() == expected.keys()
    for i, (path, (down, up)) in enumerate(expected.items()):
        assert torch.equal(found[path].down, down)
        assert torch.equal(found[path].up, up)
        assert found[path].scale == (0.5 if i % 2 else 1.5)


def by_diffusers(state: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """(layer and factor, tensor) after diffusers' own conversion of kohya's names."""
    state = _maybe_map_sgm_blocks_to_diffusers(dict(state), network.config)
    state, _ = _convert_non_diffusers_lora_to_diffusers(state)
    return {key.removeprefix("unet."): value for key, value in convert_unet_state_dict_to_peft(state).items()}


@pytest.mark.parametrize("naming", ["kohya", "kohya, original blocks"])
def test_kohyas_names_are_diffusers_own(naming):
    """SDXL in its original blocks, SD1.x in diffusers' blocks, as sd-scripts writes them.

    diffusers 0.42 itself folds add_embedding's two layers of the other naming into one.
    """
    network = small("sd" if naming == "kohya" else "sdxl")
    state = {key: value for key, value in named(network, naming).items()}
    found = read_lora(state, network)
    converted = by_diffusers(state, network)
    assert len(converted) == 2 * len(found)
    for path, delta in found.items():
        assert torch.equal(converted[f"{path}.lora_A.weight"], delta.down)
        assert torch.equal(converted[f"{path}.lora_B.weight"], delta.up)


def test_onetrainers_embeddings_are_left_out(caplog):
    network = small("sdxl")
    state = named(network, "OneTrainer")
    expected = read_lora(state, network)
    bundle = {"bundle_emb.token.clip_l": torch.zeros(1, 16), "bundle_emb.token.clip_g": torch.zeros(1, 16)}
    found = read_lora(state | bundle, network)
    assert found.keys() == expected.keys()
    assert "2 weights for text encoders (bundle_emb.token.clip_l, ...)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_dtypes_of_files(dtype, tmp_path):
    network = small("sd")
    state = {key: value.to(dtype) if "alpha" not in key else value for key, value in named(network, "kohya").items()}
    path = tmp_path / "lora.safetensors"
    save_file(state, path)
    for found in (read_lora(path, network), read_lora(state, network), load_negative(network, path).deltas):
        for layer, (down, up) in updates(network).items():
            assert torch.equal(found[layer].down.float(), down.to(dtype).float())
            assert torch.equal(found[layer].up.float(), up.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_full_weights_in_float8(dtype, tmp_path):
    state = {name: value.to(dtype) for name, value in tiny.unet().state_dict().items()}
    save_file(state, tmp_path / "n.safetensors")
    found = load_negative(small("sd"), tmp_path / "n.safetensors").network.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in state.items())


def test_a_positive_that_is_cast_to_float8(tmp_path):
    """No operation that float8 lacks is asked of it."""
    positive = small("sd").to(torch.float8_e4m3fn)
    state = {name: value.float() * 2 for name, value in positive.state_dict().items()}
    save_file(state, tmp_path / "n.safetensors")
    found = load_negative(positive, tmp_path / "n.safetensors").network.state_dict()
    assert all(torch.equal(found[name].float(), value) for name, value in state.items())
    other = tiny.unet()
    other.load_state_dict(state)
    assert load_negative(positive, other).network is other
    save_file({name: value.float() for name, value in positive.state_dict().items()}, tmp_path / "same.safetensors")
    with pytest.raises(UserError, match="equals the positive model"):
        load_negative(positive, tmp_path / "same.safetensors")


# Full weights


@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize(
    "prefix", ["", "unet.", "diffusion_model.", "model.diffusion_model.", "module.", "_orig_mod.", "unet._orig_mod."]
)
def test_full_weights_behind_prefixes(names, prefix, tmp_path):
    network, other, path = small("sd"), tiny.unet(), tmp_path / "n.safetensors"
    paths, state = original(network), {}
    for name, value in other.state_dict().items():
        module, _, leaf = name.rpartition(".")
        state[f"{prefix}{name if names == 'diffusers' else f'{paths[module]}.{leaf}'}"] = value
    beside = (
        {"first_stage_model.x": torch.ones(1), "vae.x": torch.ones(1)} if "unet" in prefix or "diff" in prefix else {}
    )
    save_file(state | beside, path)
    found = load_negative(network, path).network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
    # One name that belongs nowhere, and one weight under two names.
    save_file(state | {f"{prefix}nowhere.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"^negative: .* does not fit the model: nowhere.weight has shape"):
        load_negative(network, path)
    again = f"{prefix}conv_in.weight" if names == "original" else f"{prefix}input_blocks.0.0.weight"
    save_file(state | {again: torch.ones(8, 4, 3, 3)}, path)
    with pytest.raises(UserError, match=r"^negative: .* holds conv_in.weight twice, as .* and as ") as caught:
        load_negative(network, path)
    assert_one_line(str(caught.value))


def test_several_files_in_a_folder_are_listed(tmp_path):
    state = named(small("sd"), "kohya")
    for i in range(7):
        save_file(state, tmp_path / f"style-{i}.safetensors")
    with pytest.raises(UserError, match="7 safetensors files, of which one is to be named") as caught:
        load_negative(small("sd"), tmp_path)
    assert_one_line(str(caught.value), "'style-0.safetensors', 'style-1.safetensors'", ", ...")
    assert load_negative(small("sd"), tmp_path / "style-0.safetensors").deltas


# Formats that are refused by name

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FOLDED = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
FORMS = {
    "DoRA": [f"{FOLDED}.dora_scale", f"{LAYER}.lora_magnitude_vector"],
    "LoHa": [f"{FOLDED}.hada_w1_a", f"{LAYER}.hada_w2_b"],
    "LoKr": [f"{FOLDED}.lokr_w1", f"{LAYER}.lokr_w2"],
    "OFT": [f"{FOLDED}.oft_blocks", f"base_model.model.{LAYER}.oft_R"],
    "BOFT": [f"base_model.model.{LAYER}.boft_R"],
    r"\(IA\)3": [f"base_model.model.{LAYER}.ia3_l", f"{FOLDED}.on_input"],
    "GLoRA": [f"{FOLDED}.a1.weight", f"{FOLDED}.b2.weight"],
    "VeRA": ["base_model.vera_A", f"base_model.model.{LAYER}.vera_lambda_b"],
    "LyCORIS of full differences": [f"{FOLDED}.diff", f"{LAYER}.diff_b", f"diffusion_model.{LAYER}.set_weight"],
    "LoCon with a core tensor": [f"{FOLDED}.lora_mid.weight"],
    "LoRA with biases": [f"{LAYER}.lora_B.bias"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alone", [False, True])
def test_forms_are_refused_by_name(form, alone, tmp_path):
    """Also where every key of the file is of that form, so that nothing else marks an update."""
    for key in FORMS[form]:
        state = {key: torch.ones(2, 2)} | ({} if alone else named(small("sd"), "kohya"))
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=rf"^negative: .* is a {form} \(.*, which is not supported") as caught:
            load_negative(small("sd"), tmp_path / "x.safetensors")
        assert_one_line(str(caught.value))


@pytest.mark.parametrize("kind", ["LOHA", "BOFT", "IA3", "x\ny", ["LORA"], 3])
def test_pefts_config_names_the_form(kind, tmp_path):
    state = {
        f"base_model.model.{path}.lora_{factor}.weight": value
        for path, (down, up) in updates(small("sd")).items()
        for factor, value in (("A", down), ("B", up))
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "lora_alpha": 1}))
    with pytest.raises(UserError, match=rf"is a {re.escape(repr(kind))} of PEFT, which is not supported") as caught:
        load_negative(small("sd"), tmp_path)
    assert_one_line(str(caught.value))


QUANTISED = {
    "bitsandbytes, 4 bit": ["conv_in.weight.absmax", "conv_in.weight.quant_state.bitsandbytes__nf4"],
    "bitsandbytes, 8 bit": ["time_embedding.linear_1.SCB"],
    "torchao": ["time_embedding.linear_1._weight_qdata"],
    "quanto": ["time_embedding.linear_1.weight._data"],
    "GPTQ, AWQ or SVDQuant": ["time_embedding.linear_1.qweight"],
    "scaled float8": ["scaled_fp8", "time_embedding.linear_1.scale_weight"],
}


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_weights_are_refused_by_name(form, tmp_path):
    for key in QUANTISED[form]:
        state = tiny.unet().state_dict() | {key: torch.zeros(4, dtype=torch.uint8)}
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=rf"^negative: .* is quantised \({form}\)") as caught:
            load_negative(small("sd"), tmp_path / "x.safetensors")
        assert_one_line(str(caught.value))


def test_a_config_says_how_weights_are_quantised(tmp_path):
    tiny.unet().save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    said = {"quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(UserError, match=r"^negative: .* is quantised \(torchao\)"):
        load_negative(small("sd"), tmp_path)
    with pytest.raises(UserError, match=r"^base: .* is quantised \(torchao\)"):
        merge(tmp_path, tmp_path / "x", tmp_path / "merged")


@pytest.mark.parametrize("place", ["file", "folder", "renamed"])
def test_gguf_is_refused_by_name(place, tmp_path):
    path = tmp_path / ("n.safetensors" if place == "renamed" else "n.gguf")
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    with pytest.raises(UserError, match=r"^negative: .*(GGUF|n\.gguf' is quantised)") as caught:
        load_negative(small("sd"), tmp_path if place == "folder" else path)
    assert_one_line(str(caught.value))


@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_a_quantised_network_is_refused_by_name(kind, which, tmp_path):
    quantised = small("sd")
    old = quantised.time_embedding.linear_1
    cls = bitsandbytes.nn.Linear4bit if kind == "4 bit" else bitsandbytes.nn.Linear8bitLt
    layer = cls(old.in_features, old.out_features)
    layer.load_state_dict(old.state_dict())
    quantised.time_embedding.linear_1 = layer
    save_file(named(small("sd"), "kohya"), tmp_path / "lora.safetensors")
    if which == "positive":
        with pytest.raises(UserError, match=r"^model: the UNet2DConditionModel is quantised \(bitsandbytes\), and its"):
            load_negative(quantised, tmp_path / "lora.safetensors", alpha=0.5)
    else:
        with pytest.raises(UserError, match=r"^negative: the UNet2DConditionModel is quantised \(bitsandbytes\)"):
            load_negative(small("sd"), quantised)


@pytest.mark.parametrize(
    ("module", "form"),
    [("diffusers.quantizers.gguf.utils", "GGUF"), ("optimum.quanto.q", "quanto")],
)
def test_other_libraries_tensors_are_known_by_their_module(module, form, tmp_path):
    """gguf and quanto are not installed here: a class stands in for their tensors'."""
    quantised = small("sd")
    kind = type("Tensor", (nn.Parameter,), {"__module__": module})
    layer = quantised.time_embedding.linear_1
    layer.weight = kind(layer.weight.detach())
    save_file(named(small("sd"), "kohya"), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=rf"^model: the UNet2DConditionModel is quantised \({form}\)"):
        load_negative(quantised, tmp_path / "lora.safetensors")


def test_a_lora_of_whole_numbers_is_quantised(tmp_path):
    state = named(small("sd"), "kohya")
    key = f"{FOLDED}.lora_down.weight"
    save_file(state | {key: state[key].to(torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"is quantised: {key} is stored as I8"):
        load_negative(small("sd"), tmp_path / "x.safetensors")
