"""torch.compile where the configuration asks for it: the same training, to rounding."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import tiny
import tiny_networks
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from selfnpo_fast import train
from selfnpo_fast.models import StableDiffusionAdapter
from selfnpo_fast.runtime.compiling import compile_blocks, compiled

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
CONFIG = Path(__file__).parents[2] / "configs" / "sd15.yaml"


def test_off_is_off():
    network = tiny.unet()
    assert compiled(network.forward, "off") == network.forward
    assert compile_blocks(network, BLOCKS, "off") == 0
    assert not any(module._compiled_call_impl for module in network.modules())


@torch.no_grad()
def test_a_channels_last_network_is_compiled_once():
    """Its outputs are copied, which is counted: not in compiled code, which a count would change."""
    torch.compiler.reset()
    network = torch.nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    adapter, seen = StableDiffusionAdapter("none"), CompileCounter()

    def denoiser(x, t, return_dict):
        return (network(x.contiguous(memory_format=torch.channels_last)),)

    denoiser.dtype = torch.float32
    predict = torch.compile(lambda x, t: adapter.predict(denoiser, x, t, {}), fullgraph=True, backend=seen)
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2)
    for _ in range(12):  # torch gives up at the ninth time that it compiles a function
        out = predict(x, t)
    assert out.is_contiguous()
    torch.testing.assert_close(out, network(x).contiguous())
    assert seen.frame_count == 1
    adapter.predict(denoiser, x, t, {})
    assert adapter.layout_copies == 1


def test_blocks_keep_their_parameters_and_names():
    network = tiny.unet()
    names = [name for name, _ in network.named_parameters()]
    kinds = [type(module).__name__ for module in network.modules()]
    expected = kinds.count("BasicTransformerBlock") + kinds.count("ResnetBlock2D")
    assert compile_blocks(network, BLOCKS, "default") == expected > 3
    assert [name for name, _ in network.named_parameters()] == names


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [("cogvideox", "CogVideoXBlock"), ("sd3", "JointTransformerBlock")])
def test_blocks_that_diffusers_does_not_list(name, kind, monkeypatch, caplog):
    """`_no_split_modules` says what they are; what stands in no list, as a patch embedding, is none
    of them. They are whole graphs, and compute what the plain network does."""
    torch.compiler.reset()
    network, inputs = tiny_networks.new(name)
    (expected,) = network(**inputs)
    original, seen = torch.compile, CompileCounter()

    def counting(call, *, fullgraph, dynamic, **_):
        return original(call, fullgraph=fullgraph, dynamic=dynamic, backend=seen)

    monkeypatch.setattr(torch, "compile", counting)
    assert compile_blocks(network, (), "default") == 2
    assert len([line for line in caplog.messages if f"compiled: 2 {kind}" in line and "Embed" not in line]) == 1
    (out,) = network(**inputs)
    assert 1 <= seen.frame_count <= 2, "the blocks' graphs"
    torch.testing.assert_close(out, expected)


def test_blocks_that_diffusers_lists(caplog):
    network, _ = tiny_networks.new("wan")
    assert compile_blocks(network, (), "default") == 2
    assert not [line for line in caplog.messages if "lists no repeated blocks" in line]


def test_blocks_for_training_run_plain_without_gradients(monkeypatch):
    network = tiny.unet()
    calls = []

    def counted(call, *, recompile_limit, **_):
        return lambda *a, **k: (calls.append(0), call(*a, **k))[1]

    monkeypatch.setattr(torch, "compile", counted)
    compile_blocks(network, BLOCKS, "default", training=True)
    given = torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 12, tiny.WIDTH)
    with torch.no_grad():
        network(*given)
    assert not calls
    network(*given)
    assert len(calls) > 3


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("older", [False, True])
def test_blocks_of_one_kind_may_have_many_shapes(older, monkeypatch, caplog):
    """More than the 8 that torch allows; an older torch.compile takes no limit of its own."""
    torch.compiler.reset()
    original, seen = torch.compile, CompileCounter()

    def newer_compile(call, *, recompile_limit, mode, **settings):
        if "recompile_limit" in inspect.signature(original).parameters:
            settings["recompile_limit"] = recompile_limit
        else:  # this torch is an older one
            torch._dynamo.config.recompile_limit = recompile_limit
        return original(call, **settings, backend=seen)

    def older_compile(call, *, fullgraph, dynamic, mode):
        return original(call, fullgraph=fullgraph, dynamic=dynamic, backend=seen)

    monkeypatch.setattr(torch, "compile", older_compile if older else newer_compile)
    network = torch.nn.Sequential(Doubling(), Doubling())
    with torch._dynamo.config.patch(recompile_limit=8):
        for _ in range(2):
            assert compile_blocks(network, ("Doubling",), "default") == 2
        for size in range(2, 13):
            x = torch.randn(size)
            assert torch.equal(network(x), 4 * x)
    assert seen.frame_count >= 11, "a graph for each shape"
    assert len([line for line in caplog.messages if "64 shapes" in line]) == older


RECIPES = {
    "continuous": ["--rollout.mode", "continuous"],
    "lockstep": ["--rollout.mode", "lockstep"],
    "continuous, lora": ["--rollout.mode", "continuous", "--lora.rank", "2"],
    "lockstep, lora": [
        *["--rollout.mode", "lockstep", "--lora.rank", "2", "--lora.targets", "[to_q, conv1]"],
        *["--engine.gradient_checkpointing", "true"],
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_compiled_run_learns_the_same(recipe, tmp_path):
    """Rollout as one graph, the student's blocks compiled, forward and backward, by inductor."""
    model = tiny.write_sd(tmp_path / "model", **tiny.SHALLOW)
    rows, names = [], []
    for choice in ("off", "default"):
        output = tmp_path / choice
        words = ["--model.path", str(model), "--output", str(output), "--updates", "4", "--engine.compile", choice]
        words += [*recipe, "--rollout.grid_steps", "5", "--engine.batch_size", "4"]
        words += ["--prompts.limit", "8", "--rollout.overlap", "true", "--engine.precision", "fp32"]
        words += ["--engine.zero_stage", "0", "--optimizer.name", "adamw", "--optimizer.lr", "1e-4"]
        words += ["--log.every", "1", "--log.sample_every", "-1", "--log.checkpoint_every", "0"]
        assert train.main(["--config", str(CONFIG), *words]) == 0
        (weights,) = (output / "negative").rglob("*.safetensors")
        names.append(load_file(weights).keys())
        rows.append([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert names[0] == names[1]
    assert len(rows[0]) == 4
    for plain, fast in zip(*rows, strict=True):
        assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
