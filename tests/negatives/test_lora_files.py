"""LoRA files in every naming give PEFT's updates; damaged and unsupported files are refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from fuzzing import assert_one_line, fuzz
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from selfnpo_fast.negatives.lora_files import read_lora
from selfnpo_fast.negatives.sources import LORA_FILE
from selfnpo_fast.runtime.errors import UserError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"]
EVERYWHERE += ["conv_in", "conv_out", "time_emb_proj", "linear_1", "downsamplers.0.conv"]


def unet(kind: str = "sd") -> UNet2DConditionModel:
    torch.manual_seed(0)
    if kind == "sd":
        return tiny.unet()
    changes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    return tiny.unet(projection_class_embeddings_input_dim=tiny.WIDTH + 48, attention_head_dim=(2, 4), **changes)


def with_peft(network: nn.Module, targets=ATTENTION, **config) -> nn.Module:
    """The network under a PEFT adapter whose factors are both random."""
    network.add_adapter(LoraConfig(target_modules=targets, **({"r": 2, "lora_alpha": 2} | config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def peft_deltas(network: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """What PEFT adds to each layer's weight."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.get_delta_weight(adapter).detach() for name, layer in layers.items()}


def assert_deltas(found, expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(delta.delta(), expected[path], rtol=1e-5, atol=1e-6)
        assert expected[path].abs().max() > 0.1


def loaded_by_diffusers(network: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The updates after diffusers' own loader and PEFT's injection."""
    state, alphas = StableDiffusionPipeline.lora_state_dict(dict(state), unet_config=network.config)
    network.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="x")
    return peft_deltas(network, "x")


def peft_state(kind: str = "sd", targets=ATTENTION, **config) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(with_peft(unet(kind), targets, **config))
    return {f"unet.{key}": value.detach() for key, value in state.items()}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
def test_peft_naming(kind, targets, tmp_path):
    state = peft_state(kind, targets, rank_pattern={"to_k": 3, "to_v": 1})
    save_file(state, tmp_path / "lora.safetensors")
    network = unet(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = read_lora(tmp_path / "lora.safetensors", network)
    assert {delta.rank for delta in found.values()} == {1, 2, 3}
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert not hasattr(network, "peft_config")
    assert_deltas(found, loaded_by_diffusers(network, state))
    assert_deltas(read_lora({key.removeprefix("unet."): value for key, value in state.items()}, unet(kind)), {
        path: delta.delta() for path, delta in found.items()
    })  # fmt: skip


CONFIGS = [
    {"lora_alpha": 6},
    {"lora_alpha": 6, "use_rslora": True},
    {"lora_alpha": 3, "alpha_pattern": {"to_k": 5, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 7}},
    {"lora_alpha": 3, "alpha_pattern": {"attn2.*to_q": 4}, "rank_pattern": {"to_v": 4}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(config))
@pytest.mark.parametrize("naming", ["diffusers' metadata", "PEFT's config"])
def test_scales_of_a_peft_config(config, naming, tmp_path):
    network = with_peft(unet(), **config)
    if naming == "PEFT's config":
        network.peft_config["default"].save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        state = get_peft_model_state_dict(network)
        save_file({f"base_model.model.{key}": value.detach() for key, value in state.items()}, path)
    else:
        path = tmp_path / LORA_FILE
        metadata = network.peft_config["default"].to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])
        state = get_peft_model_state_dict(network)
        StableDiffusionPipeline.save_lora_weights(tmp_path, state, unet_lora_adapter_metadata=metadata)
    found = read_lora(path, unet())
    assert_deltas(found, peft_deltas(network, "default"))
    assert {delta.scale for delta in found.values()} != {1.0}
    if naming == "PEFT's config":
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(UserError, match=r"^negative: .* without its adapter_config.json"):
            read_lora(path, unet())


def old_name(key: str) -> str:
    """diffusers' names of 2023: layers of an attention belong to its processor."""
    key = re.sub(r"\.to_out\.0\.lora_A", ".processor.to_out_lora.down", key)
    key = re.sub(r"\.to_out\.0\.lora_B", ".processor.to_out_lora.up", key)
    return re.sub(
        r"\.to_([qkv])\.lora_([AB])",
        lambda m: f".processor.to_{m[1]}_lora.{'down' if m[2] == 'A' else 'up'}",
        key,
    )


@pytest.mark.parametrize("style", ["processor", "lora.down"])
def test_old_diffusers_naming(style):
    state = peft_state(targets=ATTENTION)
    expected = {path: delta.delta() for path, delta in read_lora(state, unet()).items()}
    if style == "processor":
        renamed = {old_name(key): value for key, value in state.items()}
    else:
        renamed = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for key, v in state.items()}
    assert not any("lora_A" in key for key in renamed)
    assert_deltas(read_lora(renamed, unet()), expected)


def kohya_state(kind: str, targets, alphas=(1.0, 2.0, 3.0, 4.0, 5.0)) -> dict[str, torch.Tensor]:
    """The layers take turns in alphas; the rank is 2."""
    state = convert_state_dict_to_kohya(peft_state(kind, targets))
    keys = sorted(key for key in state if key.endswith(".alpha"))
    return state | {key: torch.tensor(alphas[i % len(alphas)]) for i, key in enumerate(keys)}


KOHYA = [target for target in EVERYWHERE if target != "linear_1"]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("targets", [ATTENTION, KOHYA], ids=["attention", "everywhere"])
def test_kohya_naming(kind, targets):
    state = kohya_state(kind, targets)
    found = read_lora(state, unet(kind))
    assert {delta.scale for delta in found.values()} == {0.5, 1.0, 1.5, 2.0, 2.5}
    for path, delta in found.items():
        key = f"lora_unet_{path.replace('.', '_')}"
        assert delta.scale == state[f"{key}.alpha"].item() / 2
        assert torch.equal(delta.down, state[f"{key}.lora_down.weight"])
        assert torch.equal(delta.up, state[f"{key}.lora_up.weight"])
    # diffusers 0.42 loses alphas of single attention layers: it warns, and takes the commonest.
    state = kohya_state(kind, targets, [3.0])
    assert_deltas(read_lora(state, unet(kind)), loaded_by_diffusers(unet(kind), state))


ORIGINAL_BLOCKS = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}
"""Of a network of two blocks with one layer each."""


def test_kohya_naming_of_sdxls_original_blocks():
    state = kohya_state("sdxl", [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"])
    expected = {path: delta.delta() for path, delta in read_lora(state, unet("sdxl")).items()}
    renamed = {}
    for key, value in state.items():
        block = next(name for name in ORIGINAL_BLOCKS if f"lora_unet_{name}_" in key)
        renamed[key.replace(block, ORIGINAL_BLOCKS[block])] = value
    assert_deltas(read_lora(renamed, unet("sdxl")), expected)
    with pytest.raises(UserError, match=r"holds one factor of .* twice, as lora_unet_down_blocks_.* and as lora_unet_"):
        read_lora(state | renamed, unet("sdxl"))


def test_weights_of_text_encoders_are_a_warning(caplog):
    state = kohya_state("sd", ATTENTION)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    extra = {f"{text}.lora_down.weight": torch.ones(2, 16), f"{text}.lora_up.weight": torch.ones(16, 2)}
    expected = {path: delta.delta() for path, delta in read_lora(state, unet()).items()}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert_deltas(read_lora(state | extra | {f"{text}.alpha": torch.tensor(1.0)}, unet()), expected)
    assert "3 weights for text encoders" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(UserError, match="matches no layer of the model: it holds nothing for the denoiser"):
        read_lora(extra, unet())


# Files that are refused

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"

FORMS = {
    "DoRA": {f"{LAYER}.lora_magnitude_vector": torch.ones(16)},
    "DoRA ": {f"{KOHYA_LAYER}.dora_scale": torch.ones(16)},
    "LoHa": {f"{KOHYA_LAYER}.hada_w1_a": torch.ones(16, 2)},
    "LoKr": {f"{KOHYA_LAYER}.lokr_w1": torch.ones(2, 2)},
    "OFT": {f"{KOHYA_LAYER}.oft_blocks": torch.ones(2, 2)},
    "LoCon with a core tensor": {f"{KOHYA_LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
    "LyCORIS of full differences": {f"{KOHYA_LAYER}.diff": torch.ones(16, 16)},
    "Control-LoRA": {"lora_controlnet": torch.ones(1)},
    "LoRA with biases": {f"{LAYER}.lora_B.bias": torch.ones(16)},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_named(form):
    state = peft_state() if any("unet." in key for key in FORMS[form]) else kohya_state("sd", ATTENTION)
    with pytest.raises(UserError, match=rf"^negative: .* is a {form.strip()} \(.*not supported"):
        read_lora(state | FORMS[form], unet())


def both(layer: str, *shape: int) -> dict[str, torch.Tensor]:
    return {f"unet.{layer}.lora_{part}.weight": torch.ones(shape) for part in "AB"}


def change(edit) -> dict[str, torch.Tensor]:
    state = peft_state()
    edit(state)
    return state


BROKEN = {
    "is not that of a LoRA": lambda s: s.update({"unet.conv_in.weight": torch.ones(1)}),
    "the key clip.x is not that of a LoRA": lambda s: s.update({"clip.x": torch.ones(1)}),
    "it has no down_blocks.7": lambda s: s.update(both("down_blocks.7", 2, 2)),
    "a GroupNorm": lambda s: s.update(both("conv_norm_out", 8, 8)),
    "has only one of its two factors": lambda s: s.pop(f"{LAYER}.lora_B.weight"),
    r"to_q has shape \(16, 16\), its LoRA \(16, 2\) by \(2, 17\)": lambda s: s.update(
        {f"{LAYER}.lora_A.weight": torch.ones(2, 17)}
    ),
    r"its LoRA \(16, 3\) by \(2, 16\)": lambda s: s.update({f"{LAYER}.lora_B.weight": torch.ones(16, 3)}),
    r"its LoRA \(16, 0\) by \(0, 16\)": lambda s: s.update(
        {f"{LAYER}.lora_A.weight": torch.ones(0, 16), f"{LAYER}.lora_B.weight": torch.ones(16, 0)}
    ),
    "lora_A.weight is not finite": lambda s: s[f"{LAYER}.lora_A.weight"].fill_(float("nan")),
    "changes nothing: all its updates are zero": lambda s: [v.zero_() for k, v in s.items() if "lora_B" in k],
    "has an alpha but no LoRA for conv_in": lambda s: s.update({"unet.conv_in.alpha": torch.tensor(1.0)}),
    "alpha is not a single number": lambda s: s.update({f"{LAYER}.alpha": torch.ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_refused(message, tmp_path):
    state = change(BROKEN[message])
    path = tmp_path / "lora.safetensors"
    save_file({key: value.clone() for key, value in state.items()}, path)
    with pytest.raises(UserError, match=rf"^negative: {path}.*{message}") as caught:
        read_lora(path, unet())
    assert_one_line(str(caught.value))


def test_broken_kohya_files_are_refused():
    state = kohya_state("sd", ATTENTION)
    for extra, message in (
        ({"lora_unet_nowhere.lora_down.weight": torch.ones(2, 2), "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)},
         "it has no lora_unet_nowhere"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)}, "conv_in"),
        ({f"{KOHYA_LAYER}.mystery": torch.ones(2)}, "mystery"),
        ({f"{KOHYA_LAYER}.alpha": torch.ones(2)}, "not a single number"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^negative: the state dict .*{message}") as caught:
            read_lora(state | extra, unet())
        assert_one_line(str(caught.value))


def test_zero_layers_next_to_others_are_taken():
    state = change(lambda s: s[f"{LAYER}.lora_B.weight"].zero_())
    assert not read_lora(state, unet())[LAYER.removeprefix("unet.")].delta().any()


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 2}', '{"unet.lora_alpha": "x"}', '{"unet.use_dora": true}',
                                   '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 3}}', "9" * 5000])  # fmt: skip
def test_odd_metadata_is_refused(text, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(peft_state(), path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=rf"^negative: .*{path}") as caught:
        read_lora(path, unet())
    assert_one_line(str(caught.value))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = {"peft": folder / "peft.safetensors", "kohya": folder / "kohya.safetensors"}
    save_file(peft_state(), paths["peft"])
    save_file(kohya_state("sd", ATTENTION), paths["kohya"])
    return paths


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return unet()


@pytest.mark.parametrize("naming", ["peft", "kohya"])
@fuzz(40)
@given(data=st.data())
def test_damaged_keys_and_shapes(files, network, naming, data):
    """A file with one key renamed, dropped or reshaped is always refused."""
    state = load_file(files[naming])
    key = data.draw(st.sampled_from(sorted(state)))
    damage = data.draw(st.sampled_from(["drop", "rename", "reshape"]))
    if damage == "drop" and key.endswith(".alpha"):
        damage = "rename"  # a file without an alpha is one whose alpha is the rank
    value = state.pop(key)
    if damage == "rename":
        position = data.draw(st.integers(0, len(key) - 1))
        letter = data.draw(st.sampled_from("xz9-"))
        renamed = key[:position] + letter + key[position + 1 :]
        state[renamed if renamed != key else key + letter] = value
    elif damage == "reshape":
        state[key] = torch.cat([value.reshape(-1)] * 2).reshape(2 * max(1, len(value.shape) and len(value)), -1)
    with pytest.raises(UserError) as caught:
        read_lora(state, network)
    assert_one_line(str(caught.value))


@fuzz(20)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(files, network, tmp_path_factory, share):
    content = files["peft"].read_bytes()
    path = tmp_path_factory.mktemp("cut") / "lora.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"^negative: cannot load {path}: ") as caught:
        read_lora(path, network)
    assert_one_line(str(caught.value))


def test_pickles_are_refused_by_name(tmp_path):
    for suffix in ("bin", "pt", "ckpt"):
        with pytest.raises(UserError, match=r"^negative: cannot load .* it is a pickle"):
            read_lora(tmp_path / f"lora.{suffix}", unet())


def test_a_peft_config_next_to_the_file_has_to_be_json(tmp_path):
    state = get_peft_model_state_dict(with_peft(unet()))
    save_file({f"base_model.model.{key}": v.detach() for key, v in state.items()}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"^negative: cannot load adapter_config.json from .*a.safetensors"):
        read_lora(tmp_path / "a.safetensors", unet())
