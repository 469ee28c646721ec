"""`selfnpo doctor` on transformer families: real updates of tiny pipelines, and what it proposes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_transformers

from selfnpo_fast.cli import main
from selfnpo_fast.config import (
    EngineConfig,
    LogConfig,
    ModelConfig,
    PromptConfig,
    RolloutConfig,
    TrainConfig,
)
from selfnpo_fast.doctor import machines
from selfnpo_fast.doctor.report import _changes, changes_to_fit, fits, make_tracer
from selfnpo_fast.models import load_adapter
from selfnpo_fast.models.size import Size

ROOT = Path(__file__).parents[2]
WRITE = {
    "sd3": tiny_transformers.write_sd3,
    "cogvideox": tiny_transformers.write_cogvideox,
    "wan": tiny_transformers.write_wan,
}
SIZE = {"sd3": {}, "cogvideox": {}, "wan": {"height": 32, "width": 64, "frames": 9}}
"""Of the tiny models, where the pipeline's own size is a large one."""
LORA = {"sd3": 4, "cogvideox": 0, "wan": 4}
"""Full weights and LoRA both run; which of them for which family is of no account."""


@pytest.fixture(scope="module", params=WRITE)
def tiny_model(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, WRITE[request.param](tmp_path_factory.mktemp(request.param))


def config(name: str, model: Path, **engine) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path=str(model), **SIZE[name]),
        prompts=PromptConfig(limit=8),
        rollout=RolloutConfig(grid_steps=5, pool=1),
        log=LogConfig(sample_every=-1),
        engine=EngineConfig(batch_size=4, **engine),
    )


def test_its_memory_is_that_of_a_real_update(tiny_model, capsys):
    """Through the command, within its usual tolerance of 10%."""
    name, model = tiny_model
    words = ["--config", str(ROOT / "configs" / "digits.yaml"), "--model.path", str(model)]
    words += [word for side, value in SIZE[name].items() for word in (f"--model.{side}", str(value))]
    words += ["--prompts.source", "shipped", "--prompts.limit", "8", "--rollout.grid_steps", "5", "--rollout.pool", "1"]
    words += ["--engine.batch_size", "4", "--engine.gradient_checkpointing", "true", "--lora.rank", str(LORA[name])]
    assert main(["doctor", "--verify", *words]) == 0, capsys.readouterr().out
    assert "within 10%" in capsys.readouterr().out


def test_fewer_frames_and_smaller_ones_are_proposed_for_videos_alone_and_last(tiny_model):
    name, model = tiny_model
    chosen = config(name, model)
    tracer = make_tracer(chosen)
    words = [options for options, _ in _changes(tracer, chosen, 1)]
    sized = [options for options in words if "--model.frames" in options or "--model.height" in options]
    assert words[len(words) - len(sized) :] == sized, "last"
    if name == "sd3":
        assert sized == []
    for options, changed in _changes(tracer, chosen, 1):
        if options in sized:  # a run of these options is possible, and has fewer latents
            size = tracer.size_of(changed)
            load_adapter(str(model), height=size.height, width=size.width, frames=size.frames)
            assert tracer.plan(changed, 1, "cuda").latent_elements < tracer.plan(chosen, 1, "cuda").latent_elements


@pytest.mark.parametrize(("name", "step"), [("cogvideox", 8), ("wan", 4)])
def test_half_of_the_frames_and_half_of_the_sides(name, step, tmp_path):
    adapter = load_adapter(str(WRITE[name](tmp_path)), **SIZE[name], configs_only=True)
    clip = Size(480, 720, 6 * step + 1)
    frames, sides = adapter.smaller_sizes(clip)
    assert frames == Size(480, 720, 3 * step + 1)
    assert (sides.height, sides.frames) == (240, clip.frames)
    assert sides.width % adapter.vae_scale == 0 and 340 < sides.width <= 360
    for size in (frames, sides):
        adapter.latent_shape_of(size)
    assert adapter.smaller_sizes(Size(240, 352, step + 1)) == [], "no picture, and nothing that shows little"


@pytest.mark.slow  # many traces
def test_a_clip_that_does_not_fit_is_made_smaller(tmp_path):
    """Where every other change has been made; here no card is large enough."""
    chosen = config("wan", WRITE["wan"](tmp_path), graphs=False, gradient_checkpointing=True)
    tracer = make_tracer(chosen)
    run = tracer.plan(chosen, 1, "cuda")
    options, memory = changes_to_fit(tracer, run, 1e-6)
    assert not fits(memory, 1e-6)
    assert options.index("--model.frames 5") > max(options.index(o) for o in options if o.startswith("--lora"))


@pytest.mark.parametrize(
    ("name", "units", "clock", "tensor_clock", "fused", "bus"),
    [
        ("A100 SXM 80 GB", 108 * 64, 1.41e9, 1.41e9, 108 * 1024, 5120 * 3.186e9),
        ("H100 SXM 80 GB", 132 * 128, 1.98e9, 1.83e9, 132 * 2048, 5120 * 5.234e9),
        ("RTX 4090 24 GB", 128 * 128, 2.52e9, 2.52e9, 128 * 256, 384 * 21e9),
    ],
)
def test_a_card_s_rates_are_its_units_times_its_clock(name, units, clock, tensor_clock, fused, bus):
    """Multiply-adds a clock of all units, and bits of the bus a second, as the makers' papers have
    them."""
    (card,) = [card for card in machines.GPUS if card.name == name]
    assert card.flops["fp32"] == pytest.approx(2 * units * clock, rel=0.01)
    assert card.flops["bf16"] == card.flops["fp16"] == pytest.approx(2 * fused * tensor_clock, rel=0.01)
    assert card.bandwidth == pytest.approx(bus / 8, rel=0.01)
