"""torch.compile where the configuration asks for it: the same training, to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from selfnpo_fast import train
from selfnpo_fast.compiling import compile_blocks, compiled

CONFIG = Path(__file__).parents[1] / "configs" / "sd15_fast.yaml"


def test_off_is_off():
    network = tiny.unet()
    assert compiled(network.forward, "off") == network.forward
    assert compile_blocks(network, "off") == 0
    assert not any(module._compiled_call_impl for module in network.modules())


def test_blocks_keep_their_parameters_and_names():
    network = tiny.unet()
    names = [name for name, _ in network.named_parameters()]
    kinds = [type(module).__name__ for module in network.modules()]
    expected = kinds.count("BasicTransformerBlock") + kinds.count("ResnetBlock2D")
    assert compile_blocks(network, "default") == expected > 3
    assert [name for name, _ in network.named_parameters()] == names


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
def test_a_compiled_run_learns_the_same(mode, tmp_path):
    """Rollout as one graph, the student's blocks compiled, forward and backward, by inductor."""
    model = tiny.write_sd(tmp_path / "model")
    losses, weights = [], []
    for choice in ("off", "default"):
        output = tmp_path / choice
        words = ["--model.path", str(model), "--output", str(output), "--updates", "3", "--engine.compile", choice]
        words += ["--rollout.mode", mode, "--rollout.grid_steps", "5", "--engine.batch_size", "4", "--prompts.limit", "8"]
        words += ["--engine.precision", "fp32", "--engine.zero_stage", "0", "--optimizer.name", "adamw", "--log.every"]
        words += ["1", "--log.sample_every", "-1", "--log.checkpoint_every", "0", "--rollout.overlap", "true"]
        assert train.main(["--config", str(CONFIG), *words]) == 0
        weights.append(load_file(output / "negative/unet/diffusion_pytorch_model.safetensors"))
        losses.append((output / "metrics.jsonl").read_text().count("loss"))
    assert losses[0] == losses[1]
    plain, fast = weights
    assert plain.keys() == fast.keys(), "compiled blocks keep their names"
    for key, value in plain.items():
        # Observed 1e-7; three updates at a rate of 1e-6.
        torch.testing.assert_close(fast[key], value, rtol=0, atol=1e-5)
