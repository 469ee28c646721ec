"""What host memory keeps: the optimiser, or the frozen blocks of a LoRA run."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_networks
import torch
from runs import run
from safetensors.torch import load_file

from selfnpo_fast.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig, RolloutConfig, TrainConfig
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training.engine import deepspeed_config, make_optimizer
from selfnpo_fast.training.lora import add_average, add_lora
from selfnpo_fast.training.offload import offload_blocks, offloadable

BLOCKS = {"offload": "blocks", "graphs": False, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (weights,) = folder.rglob("*.safetensors")
    return load_file(weights)


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        ("optimizer.name", {"engine": {"offload": "optimizer", "zero_stage": 1}, "optimizer": {"name": "adamw8bit"}}),
        ("engine.zero_stage", {"engine": {"offload": "optimizer"}}),
        ("lora.rank", {"engine": BLOCKS}),
        ("engine.graphs", {"engine": BLOCKS | {"graphs": True}, "lora": {"rank": 2}}),
        ("engine.compile", {"engine": BLOCKS | {"compile": "max"}, "lora": {"rank": 2}}),
        ("rollout.overlap", {"engine": BLOCKS, "lora": {"rank": 2}, "rollout": {"overlap": True}}),
        ("model.quantization", {"engine": BLOCKS, "lora": {"rank": 2}, "model": {"quantization": "nf4"}}),
        ("engine.gradient_checkpointing", {"engine": BLOCKS | {"gradient_checkpointing": False}, "lora": {"rank": 2}}),
    ],
)
def test_what_does_not_go_together_is_one_line(field, sections):
    kinds = {"engine": EngineConfig, "optimizer": OptimizerConfig, "lora": LoraConfig, "rollout": RolloutConfig}
    kinds["model"] = ModelConfig
    with pytest.raises(UserError, match=rf"^{field}: .* with engine\.offload") as caught:
        TrainConfig(**{name: kinds[name](**fields) for name, fields in sections.items()})
    assert "\n" not in str(caught.value)


def test_deepspeed_is_told():
    for stage, precision in ((1, "fp32"), (0, "bf16"), (3, "fp32")):
        config = TrainConfig(engine=EngineConfig(offload="optimizer", zero_stage=stage, precision=precision))
        assert deepspeed_config(config, 1, 10)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in deepspeed_config(TrainConfig(), 1, 10)["zero_optimization"]


def test_an_optimiser_that_cannot_be_compiled_is_one_line(monkeypatch):
    from deepspeed.ops import adam

    def fail(*_, **__):
        raise RuntimeError("Unable to JIT load the cpu_adam op\ndue to ninja not being installed.")

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", fail)
    with pytest.raises(UserError, match=r"^engine.offload: optimizer: .*ninja not being.* install ninja and a C\+\+"):
        make_optimizer(OptimizerConfig(), on_host=True)([torch.nn.Parameter(torch.zeros(2))])


def lora_network(name: str) -> tuple[torch.nn.Module, tuple[str, ...], Callable]:
    """(network with a LoRA that is not 0, its blocks' names, a forward)."""
    torch.manual_seed(0)
    if name == "unet":
        network, names = tiny.unet(), ("BasicTransformerBlock", "ResnetBlock2D")
        x, t, rows = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, tiny.WIDTH)
        inputs = {"sample": x, "timestep": t, "encoder_hidden_states": rows, "return_dict": False}
    else:
        (network, inputs), names = tiny_networks.new(name), ()
    add_lora(network.eval(), LoraConfig(rank=2, targets=["to_q", "to_out.0"]), seed=1)
    for path, parameter in network.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter)
    add_average(network)
    network.enable_gradient_checkpointing()
    return network, names, lambda: network(**inputs)[0]


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_blocks_compute_with_copies_that_go(name):
    """Output and gradients of the plain network; after each pass no copy is left, also where
    recomputation stops early."""
    network, names, forward = lora_network(name)
    expected = forward()
    expected.square().sum().backward()
    trained = {path: p for path, p in network.named_parameters() if p.requires_grad}
    gradients = {path: p.grad.clone() for path, p in trained.items()}
    for p in trained.values():
        p.grad = None
    before = dict(network.named_parameters())
    blocks = offloadable(network, names)
    assert offload_blocks(network, names, torch.device("cpu")) == sum(
        p.nbytes for frozen in blocks.values() for _, _, p in frozen
    )
    ours = {id(p) for frozen in blocks.values() for _, _, p in frozen}
    assert ours and not any(id(p) in ours for path, p in before.items() if "lora_" in path)
    copies = []
    for frozen in blocks.values():
        owner, kind, parameter = frozen[0]
        owner.register_forward_hook(
            lambda owner, *_, kind=kind, p=parameter: copies.append(
                (getattr(owner, kind).data_ptr() != p.data_ptr(), weakref.ref(getattr(owner, kind)))
            )
        )
    out = forward()
    assert torch.equal(out, expected)
    out.square().sum().backward()
    for path, gradient in gradients.items():
        assert torch.equal(trained[path].grad, gradient), path
    assert dict(network.named_parameters()) == before, "the parameters themselves"
    del out
    assert all(is_copy for is_copy, _ in copies) and len(copies) > len(blocks)
    assert not any(copy() is not None for _, copy in copies)


def test_a_run_with_its_blocks_on_the_host(model, tmp_path):
    """The same metrics and the same negative, in bits; a network without blocks is refused."""
    words = ["--updates", "2", "--log.every", "1", "--engine.graphs", "false", "--log.sample_every", "0"]
    words += ["--engine.gradient_checkpointing", "true", "--log.sample_steps", "2", "--log.sample_prompts", "1"]
    for choice in ("none", "blocks"):
        assert run(model, tmp_path / choice, *words, "--engine.offload", choice, lora=2) == 0
    for plain, offloaded in zip(rows(tmp_path / "none"), rows(tmp_path / "blocks"), strict=True):
        assert (offloaded["loss"], offloaded["grad_norm"]) == (plain["loss"], plain["grad_norm"])
    expected, got = tensors(tmp_path / "none" / "negative"), tensors(tmp_path / "blocks" / "negative")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    with pytest.raises(UserError, match=r"^engine.offload: blocks finds no repeated block in Linear; use none$"):
        offload_blocks(torch.nn.Linear(2, 2), (), torch.device("cpu"))


@pytest.mark.slow  # DeepSpeed compiles the optimiser at its first use, which takes minutes
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_the_optimiser_on_the_host_is_adamw(stage, precision, model, tmp_path):
    """Six updates, their checkpoints, a resumed run, and the negative model."""
    words = ["--updates", "6", "--log.keep", "9", "--engine.precision", precision, "--log.every", "1"]
    assert run(model, tmp_path / "device", *words, zero=stage) == 0
    words += ["--engine.offload", "optimizer"]
    assert run(model, tmp_path / "host", *words, zero=stage) == 0
    loose = {"rel": 1e-3} if precision == "fp32" else {"rel": 0.05}
    for device, host in zip(rows(tmp_path / "device"), rows(tmp_path / "host"), strict=True):
        assert host["loss"] == pytest.approx(device["loss"], **loose)
        assert host["skipped"] == 0
    checkpoints = tmp_path / "device" / "checkpoints", tmp_path / "host" / "checkpoints"
    first = [folder / "update-0000002" for folder in checkpoints]
    for name in ("student", "exp_avg", "exp_avg_sq"):
        device, host = (load_file(folder / f"{name}.safetensors") for folder in first)
        assert device.keys() == host.keys()
        for key, value in device.items():
            scale = float(value.abs().max())
            atol, rtol = (1e-5, 1e-3) if precision == "fp32" else (0.05, 0.1)
            torch.testing.assert_close(host[key], value, atol=atol * scale, rtol=rtol)
    # A run that is resumed ends in the same bits.
    shutil.copytree(tmp_path / "host", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "negative")
    for late in ("update-0000004", "update-0000006"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / late)
    assert run(model, tmp_path / "resumed", *words, "--resume", zero=stage) == 0
    expected, got = tensors(tmp_path / "host" / "negative"), tensors(tmp_path / "resumed" / "negative")
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
