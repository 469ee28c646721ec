"""Pipelines that call their denoiser once for each branch, or have two denoisers: what is said and
refused."""

from __future__ import annotations

import logging

import diffusers
import pytest
import stock
import tiny_pipelines
import torch
from safetensors.torch import save_file

from selfnpo_fast import attach_negative
from selfnpo_fast.models import adapter_of, load_adapter
from selfnpo_fast.models.call_rules import Branch, DenoiserCall, TwoCalls
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime import console
from selfnpo_fast.runtime.errors import UserError


def lora(network) -> Negative:
    return Negative(source="a LoRA", deltas=stock.low_rank(network))


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None}, "give negative_prompt=' '"),
        ({"true_cfg_scale": 1.0}, "give true_cfg_scale above 1"),
        (
            {"true_cfg_scale": None, "negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None},
            "give true_cfg_scale above 1 and negative_prompt=' '",
        ),
    ],
)
def test_a_call_that_runs_no_guidance_says_so_once_with_the_mend(changes, mend, caplog, monkeypatch):
    monkeypatch.setattr(console, "_said", set())
    pipe = tiny_pipelines.build("FluxPipeline")
    with attach_negative(pipe, lora(pipe.transformer)), caplog.at_level(logging.WARNING, logger="selfnpo"):
        for _ in range(2):
            tiny_pipelines.draw(pipe, "FluxPipeline", **changes)
    (record,) = caplog.records
    assert record.getMessage() == f"negative: guidance is off in this call, and the negative is not used: {mend}"


def test_one_tensor_as_both_prompts_is_told_apart_by_the_context():
    case, words = "FluxPipeline", tiny_pipelines.text(True, 7)
    pipe = tiny_pipelines.build(case)
    both = {"prompt_embeds": words, "negative_prompt_embeds": words}
    apart = {"prompt_embeds": words, "negative_prompt_embeds": words.clone()}
    with attach_negative(pipe, lora(pipe.transformer)):
        for _ in range(2):
            assert torch.equal(tiny_pipelines.draw(pipe, case, **both), tiny_pipelines.draw(pipe, case, **apart))


def test_one_tensor_as_both_prompts_is_refused_where_no_context_tells():
    case, words = "FluxImg2ImgPipeline", tiny_pipelines.text(False, 7)
    pipe = tiny_pipelines.build(case)
    expected = r"^negative_prompt_embeds: it is the same tensor .* give negative_prompt_embeds\.clone\(\)$"
    with attach_negative(pipe, lora(pipe.transformer)), pytest.raises(UserError, match=expected):
        tiny_pipelines.draw(pipe, case, prompt_embeds=words, negative_prompt_embeds=words)


def test_a_text_that_was_replaced_on_its_way_is_refused():
    rule = TwoCalls(guided_local="on")
    words, other = torch.zeros(1), torch.ones(1)
    local = {"on": True, "prompt_embeds": words, "negative_prompt_embeds": other}

    def branch(given, context=None):
        return rule.branch(DenoiserCall(None, local, {"encoder_hidden_states": given}, lambda: context))

    assert (branch(words), branch(other)) == (Branch.POSITIVE, Branch.NEGATIVE)
    assert branch(words.clone(), "uncond") is Branch.NEGATIVE
    with pytest.raises(UserError, match="encoder_hidden_states was replaced"):
        branch(words.clone())


@pytest.mark.parametrize("case", ["FluxPipeline", "WanPipeline", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_fused_projections_are_refused_next_to_a_lora(case, order):
    pipe = tiny_pipelines.build(case)
    negative = lora(pipe.transformer)
    if order == "before":
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(UserError, match="projections are fused"):
            attach_negative(pipe, negative)
        return
    with attach_negative(pipe, negative):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(UserError, match="projections are fused"):
            tiny_pipelines.draw(pipe, case)


def test_a_second_network_keeps_the_layers_in_float32_that_the_denoiser_keeps(tmp_path):
    """Wan's first parameter is float32 in a bfloat16 network."""
    pipe = tiny_pipelines.build("WanPipeline")
    network = stock.merged(pipe.transformer, stock.low_rank(pipe.transformer))
    pipe.transformer.save_pretrained(tmp_path / "positive")
    pipe.transformer = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "positive", torch_dtype=torch.bfloat16
    )
    dtypes = {name: value.dtype for name, value in pipe.transformer.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    with attach_negative(pipe, network):
        assert {name: value.dtype for name, value in network.named_parameters()} == dtypes
        assert tiny_pipelines.draw(pipe, "WanPipeline").isfinite().all()


@pytest.mark.parametrize(
    ("case", "layer"),
    [("ZImagePipeline", "cap_embedder.1"), ("CogVideoXImageToVideoPipeline", "ofs_embedding.linear_1")],
)
def test_a_layer_without_rows_for_each_branch_is_refused(case, layer):
    pipe = tiny_pipelines.build(case)
    deltas = {layer: stock.low_rank(pipe.transformer)[layer]}
    with pytest.raises(UserError, match=rf"^negative: the LoRA changes {layer}, whose input has no rows"):
        attach_negative(pipe, Negative(source="a LoRA", deltas=deltas))
    assert not pipe.transformer._forward_pre_hooks


def test_two_denoisers_need_a_name_for_each_negative():
    case = "WanPipeline two experts"
    pipe = tiny_pipelines.build(case)
    negative = lora(pipe.transformer_2)
    with pytest.raises(
        UserError, match=r"has transformer and transformer_2; say which one .*'transformer_2': \.\.\.}$"
    ):
        attach_negative(pipe, negative)
    with pytest.raises(UserError, match="'unet' is no denoiser of the pipeline; it has transformer and transformer_2"):
        attach_negative(pipe, {"unet": negative})
    plain = tiny_pipelines.draw(pipe, case)
    network = stock.merged(pipe.transformer_2, negative.deltas)
    expected = tiny_pipelines.build(case)
    expected.transformer_2 = tiny_pipelines.RowByRow(pipe.transformer_2, network)
    theirs = tiny_pipelines.draw(expected, case)
    with attach_negative(pipe, {"transformer_2": negative}):
        ours = tiny_pipelines.draw(pipe, case)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * theirs.abs().max().item())
    assert not torch.equal(ours, plain)


def test_a_pipeline_with_the_second_expert_alone_takes_a_negative():
    """Wan's low-noise expert is drawn with by itself: the first denoiser is None."""
    pipe = tiny_pipelines.build("WanPipeline two experts")
    alone = diffusers.WanPipeline(**{**pipe.components, "transformer": None}, boundary_ratio=1.0)
    with attach_negative(alone, lora(alone.transformer_2)) as handle:
        assert handle.attached
        assert alone.transformer_2._forward_pre_hooks
    assert not alone.transformer_2._forward_pre_hooks


def test_a_folder_and_a_lora_file_are_read_for_such_a_denoiser(tmp_path):
    pipe = tiny_pipelines.build("FluxPipeline")
    deltas = stock.low_rank(pipe.transformer)
    stock.merged(pipe.transformer, deltas).save_pretrained(tmp_path / "transformer")
    layers = {f"transformer.{path}.lora_A.weight": delta.down for path, delta in deltas.items()}
    layers |= {f"transformer.{path}.lora_B.weight": delta.up * delta.scale for path, delta in deltas.items()}
    save_file({key: value.contiguous() for key, value in layers.items()}, tmp_path / "lora.safetensors")
    drawn = []
    for source in (tmp_path, tmp_path / "lora.safetensors"):
        with attach_negative(pipe, source):
            drawn.append(tiny_pipelines.draw(pipe, "FluxPipeline"))
    torch.testing.assert_close(*drawn, rtol=0, atol=3e-6 * drawn[0].abs().max().item())


def test_what_only_takes_a_negative_is_neither_loaded_nor_sampled_from(tmp_path):
    takes = "takes a negative by attach_negative and is neither trained nor sampled"
    with pytest.raises(UserError, match=rf"FluxPipeline is not supported, which is refused: .*; it {takes}"):
        adapter_of(tiny_pipelines.build("FluxPipeline"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        UserError,
        match=rf"is a FluxPipeline, which is refused: .*; it {takes}; supported are StableDiffusionPipeline, ",
    ):
        load_adapter(str(tmp_path))
