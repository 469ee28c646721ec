"""Where the text embeddings of a run come from and lie: encoders alone and in the run's dtype, on the
device or in a store."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from selfnpo_fast import train
from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
from selfnpo_fast.models import load_adapter, text
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.input_record import InputRecord
from selfnpo_fast.training.inputs import load_inputs
from selfnpo_fast.training.methods.base import MethodInputs

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)
SMALL = {
    "updates": 3, "engine.batch_size": 4, "engine.accumulation": 2, "rollout.grid_steps": 2, "rollout.pool": 1,
    "rollout.overlap": "true", "log.every": 1, "log.sample_every": -1, "prompts.limit": 70, "prompts.dropout": 0.2,
    "prompts.shuffled": "true", "rollout.omega": -3, "rollout.branches": "batched",
}  # fmt: skip


def words(output: Path, *more: str) -> list[str]:
    return [
        "--output",
        str(output),
        *(word for key, value in SMALL.items() for word in (f"--{key}", str(value))),
        *more,
    ]


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_has_the_same_bits_with_a_store_and_goes_on_with_or_without(tmp_path):
    host, run = ("--prompts.device_mib", "0"), tmp_path / "run"
    assert train.main(words(tmp_path / "device")) == 0
    expected = losses(tmp_path / "device")
    assert train.main(words(run, "--updates", "1", *host)) == 0
    [store] = (tmp_path / "embeddings").iterdir()
    written = store.stat().st_mtime_ns
    assert losses(run) == expected[:1]
    assert train.main(words(run, "--updates", "2", "--resume")) == 0
    assert losses(run) == expected[:2]
    assert train.main(words(run, "--resume", *host)) == 0
    assert losses(run) == expected
    assert [(path, path.stat().st_mtime_ns) for path in (tmp_path / "embeddings").iterdir()] == [(store, written)]


def test_encoders_are_in_the_run_s_dtype_and_in_bfloat16_on_a_gpu():
    assert text.encoder_dtype(CPU, torch.float32) == torch.float32
    assert text.encoder_dtype(CPU, torch.bfloat16) == torch.bfloat16
    assert text.encoder_dtype(torch.device("cuda", 1), torch.float32) == torch.bfloat16
    adapter = load_adapter("digits")
    with adapter.text_encoders(CPU, torch.bfloat16) as encoders:
        assert encoders.rows(["a"])["encoder_hidden_states"].dtype == torch.bfloat16
    with adapter.text_encoders(CPU) as encoders:
        exact = encoders.rows(["a"])["encoder_hidden_states"]
    assert exact.dtype == torch.float32
    rounded = adapter.encode_prompts(["a"], CPU, torch.bfloat16)["encoder_hidden_states"]
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_encoders_are_alone(tmp_path, monkeypatch):
    """Neither the denoiser nor the autoencoder that has encoded the pictures is there beside them."""
    Image.new("RGB", (32, 32), (80, 40, 200)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a red handwritten zero on a white background")

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (AutoencoderKL, UNet2DConditionModel) for thing in gc.get_objects())

    seen, load = [], text.text_pipeline
    monkeypatch.setattr(text, "text_pipeline", lambda *given: seen.append(alive()) or load(*given))
    before = alive()
    more = ("--rollout.start", "data", "--data.source", str(tmp_path), "--prompts.shuffled", "false")
    inputs = load_inputs(train.parse(words(tmp_path / "run", *more)).config, WORLD)
    assert seen == [before]
    assert len(inputs.latents) == 1
    assert inputs.adapter.decode(inputs.latents).shape == (1, 3, 32, 32), "it is loaded again"


def test_a_record_knows_the_encoder_in_another_dtype(tmp_path):
    """A run that goes on on another device has encoders in another dtype; another encoder is told."""
    config = train.parse(words(tmp_path / "run")).config
    inputs = load_inputs(config, WORLD)
    saved = inputs.record.values

    def record(table: ConditioningTable, encoder: torch.dtype) -> InputRecord:
        method_inputs = MethodInputs(inputs.prompts)
        schedule, weights = (
            ScheduleFacts.of(inputs.adapter.schedule, "digits"),
            module_weights(inputs.student, "digits"),
        )
        named = ((name, weights.read(name)) for name in weights.shapes)
        return InputRecord(method_inputs, table, schedule, named, commit=None, encoder=encoder)

    rounded = ConditioningTable.encode(inputs.adapter, inputs.prompts, CPU, torch.float32, torch.bfloat16)
    moved = {name: value.roll(1, -1) for name, value in rounded.rows.items()}
    for table, encoder, right in (
        (rounded, torch.bfloat16, True),
        (inputs.table, torch.float32, True),
        (ConditioningTable(moved), torch.bfloat16, False),
        (ConditioningTable(moved), torch.float32, False),
    ):
        now = record(table, encoder)
        if right:
            now.refuse_changed(saved, tmp_path)
        else:
            with pytest.raises(UserError, match="the base's text encoders have changed"):
                now.refuse_changed(saved, tmp_path)
