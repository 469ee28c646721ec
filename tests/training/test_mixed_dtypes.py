"""Full weights of a network that keeps some layers in float32 in a bfloat16 model, as Wan does."""

from __future__ import annotations

from pathlib import Path

import crash
import pytest
import tiny_transformers
import torch
from runs import CASE
from safetensors.torch import load_file

from selfnpo_fast import train
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative

ONE = ["--model.height", "32", "--model.width", "48", "--model.frames", "5", "--updates", "1"]
ONE += ["--log.checkpoint_every", "1", "--optimizer.warmup", "0", "--engine.precision"]


def first_moment(output: Path) -> torch.Tensor:
    """A tenth of the first update's gradient, of all weights."""
    moments = load_file(output / "checkpoints" / "update-0000001" / "exp_avg.safetensors")
    return torch.cat([moments[name].flatten().double() for name in sorted(moments)])


@pytest.mark.slow
def test_zero_3_trains_it_as_zero_1_does(tmp_path):
    """One update on two ranks: both gradients are that of float32 up to what bfloat16 rounds.

    Observed 5% with ZeRO 1 and 2% with ZeRO 3, whose linear layers add the bias apart.
    """
    model = tiny_transformers.write_wan(tmp_path / "model")
    base = load_adapter(str(model), height=32, width=48, frames=5).load_denoiser(torch.bfloat16)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16, torch.float32}
    words = {zero: crash.words(CASE | {"zero": zero}, model, tmp_path / f"run{zero}") for zero in (0, 1, 3)}
    assert train.main([*words[0], *ONE, "fp32"]) == 0
    truth = first_moment(tmp_path / "run0")
    for zero in (1, 3):
        logs = tmp_path / f"logs{zero}"
        logs.mkdir()
        processes = crash.start(2, [*words[zero], *ONE, "bf16"], logs)
        assert crash.finish(processes, logs) == [0, 0], crash.tail(logs)
        assert (first_moment(tmp_path / f"run{zero}") - truth).norm() < 0.12 * truth.norm()
        assert "11 of 69 trained tensors, which the model keeps in float32, are bf16 in the student" in crash.tail(logs)
        assert load_negative(base, tmp_path / f"run{zero}").network is not None
