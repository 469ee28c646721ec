"""LoRA runs on a base that is stored in 8 or 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from bitsandbytes import functional as bnb
from runs import at_update, run
from safetensors.torch import load_file
from test_lora import output, randomise
from torch import nn
from torchao.quantization import Float8Tensor

from selfnpo_fast.config import EngineConfig, LoraConfig, ModelConfig, TrainConfig
from selfnpo_fast.models import family_of, load_adapter
from selfnpo_fast.models.quantised import LIBRARIES, QuantisedLinear, quantise, quantised_paths
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training.lora import LoraWeights, add_lora, checkpoint_gradients

pytestmark = pytest.mark.usefixtures("plain_linear")

CPU = torch.device("cpu")
KINDS = list(LIBRARIES)


def by_library(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the library's own functions round it."""
    if kind == "int8":
        return bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(weight.half())[:2])
    if kind == "nf4":
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    return Float8Tensor.from_hp(weight).dequantize()


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """A quantised network, and one that holds the same rounded weights in float32."""
    torch.manual_seed(0)
    network = tiny.unet().requires_grad_(False)
    rounded = copy.deepcopy(network)
    for path in quantised_paths(network):
        weight = rounded.get_submodule(path).weight
        weight.data = by_library(kind, weight.data)
    quantise(network, kind, CPU)
    return network, rounded


def with_lora(network: nn.Module) -> nn.Module:
    add_lora(network, LoraConfig(rank=2, targets=["to_q", "to_v", "proj_in", "ff.net.2", "conv1"]), seed=3)
    randomise(network)
    with torch.no_grad():  # smaller than the base's weights, so that no rounding is magnified
        for parameter in network.parameters():
            parameter.mul_(0.1 if parameter.requires_grad else 1)
    return network


def loss_and_gradients(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output(network).square().mean()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_dequantised_base(kind):
    """Loss and gradients to 1e-5, with checkpointing, in training and evaluation mode alike."""
    network, rounded = map(with_lora, pair(kind))
    base = output(network, LoraWeights.OFF)
    torch.testing.assert_close(base, output(rounded, LoraWeights.OFF), rtol=0, atol=1e-5 * base.abs().max().item())
    expected, gradients = loss_and_gradients(rounded)
    for prepare in (lambda: None, network.train, lambda: checkpoint_gradients(network, family_of(network))):
        prepare()
        loss, found = loss_and_gradients(network)
        assert abs(loss - expected) <= 1e-5 * expected
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_weights_size_waits_for_the_backward_pass(kind):
    network, saved = with_lora(pair(kind)[0]), []
    sizes = {layer.in_features * layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)}
    stored = {buffer.data_ptr() for buffer in network.buffers()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    layer = next(m for m in network.modules() if isinstance(m, QuantisedLinear) and m.in_features != m.out_features)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert saved
    assert all(tensor.data_ptr() in stored for tensor in saved if tensor.numel() in sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_reaches_neither_numbers_nor_scales(kind):
    network, _ = pair(kind)
    before = {name: layer.dequantised(torch.float32) for name, layer in quantised(network).items()}
    network.to(torch.bfloat16)
    for name, layer in quantised(network).items():
        assert torch.equal(layer.dequantised(torch.float32), before[name])
        assert torch.equal(layer.dequantised(torch.bfloat16), before[name].bfloat16())  # rounded once
    add_lora(network, LoraConfig(rank=2), seed=0)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert output(network).dtype == torch.bfloat16


def quantised(network: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}


def test_only_linear_layers_of_blocks_are_quantised():
    network, linear = tiny.unet(), nn.Linear
    paths = quantised_paths(network)
    assert {p for p in paths if "attentions" in p} == {
        name for name, layer in network.named_modules() if "attentions" in name and isinstance(layer, linear)
    }
    assert not [path for path in paths if "time_embedding" in path or path.startswith("conv")]
    network._skip_layerwise_casting_patterns, network._keep_in_fp32_modules = ["to_q$"], ["to_out"]
    assert set(paths) - set(quantised_paths(network)) == {p for p in paths if p.endswith("to_q") or "to_out" in p}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_cannot_be_stored_is_refused(kind):
    network = tiny.unet()
    network.get_submodule(quantised_paths(network)[0]).weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match=rf"^model\.quantization: .* has weights that are too large for {kind}"):
        quantise(network, kind, CPU)
    with pytest.raises(UserError, match=r"^model\.quantization: the blocks of a Conv2d have no Linear layer"):
        quantise(nn.Conv2d(1, 1, 1), kind, CPU)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(UserError, match=r"^model\.quantization: fp8 needs torchao: .*selfnpo-fast\[quant\]") as caught:
        quantise(tiny.unet(), "fp8", CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "is not possible with full weights"),
        (
            {"lora": LoraConfig(rank=4), "engine": EngineConfig(zero_stage=3)},
            "is not possible with engine.zero_stage 3",
        ),
    ],
)
def test_runs_that_a_quantised_base_cannot_serve_are_refused(sections, message):
    with pytest.raises(UserError, match=rf"^model\.quantization: 'nf4' {message}"):
        TrainConfig(model=ModelConfig(quantization="nf4"), **sections)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("sd"))


def words(kind: str, updates: int) -> list[str]:
    return ["--model.quantization", kind, "--updates", str(updates), "--log.checkpoint_every", "2"]


@pytest.mark.parametrize(("kind", "precision"), [("nf4", "fp32"), ("int8", "bf16"), ("fp8", "fp32")])
def test_a_run_resumes_and_its_negative_is_a_lora_of_the_original(
    kind, precision, model, tmp_path, caplog, monkeypatch
):
    more = ["--engine.precision", precision]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(model, whole, *words(kind, 4), *more, lora=2) == 0
    assert run(model, parts, *words(kind, 2), *more, lora=2) == 0
    assert run(model, parts, *words("none", 4), *more, "--resume", lora=2) == 2  # another recipe
    held = []

    def look(trainer) -> None:
        module, network = trainer.engine.engine.module, trainer.engine.module
        trained = {id(p) for p in network.parameters() if p.requires_grad}
        held.append({id(p) for p in module.parameters()} == trained and not list(module.buffers()))
        held.append(bool(quantised(network)))

    at_update(monkeypatch, 4, look)
    assert run(model, parts, *words(kind, 4), *more, "--resume", lora=2) == 0
    assert held == [True, True]  # DeepSpeed has the trained parameters and nothing else
    one, two = (load_file(folder / "negative" / "pytorch_lora_weights.safetensors") for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    caplog.clear()
    negative = load_negative(load_adapter(str(model)).load_denoiser(torch.float32), whole)
    assert negative.deltas and not caplog.records  # trained from this very base, by its fingerprint


def test_the_engine_holds_the_whole_network_of_full_weights(model, tmp_path, monkeypatch):
    held = []
    at_update(monkeypatch, 1, lambda trainer: held.append(list(trainer.engine.engine.module.children())))
    at_module = []
    at_update(monkeypatch, 1, lambda trainer: at_module.append(trainer.engine.module))
    assert run(model, tmp_path / "run", "--updates", "1") == 0
    assert held[-1] == at_module[-1:]
