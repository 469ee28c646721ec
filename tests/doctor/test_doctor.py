"""`selfnpo doctor`: its figures against closed form, real objects and a real update."""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import re
import shutil
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from selfnpo_fast import train
from selfnpo_fast.cli import main
from selfnpo_fast.config import (
    DataConfig,
    EngineConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    ReferenceConfig,
    RolloutConfig,
    TrainConfig,
)
from selfnpo_fast.doctor import costs, machines, report
from selfnpo_fast.doctor.machines import measure_this_machine
from selfnpo_fast.doctor.memory_check import replaced_attributes
from selfnpo_fast.doctor.report import (
    VERIFIED,
    changes_to_fit,
    check,
    compare_with_update,
    examine,
    fits,
    format_bytes,
    make_tracer,
)
from selfnpo_fast.doctor.savings import memory_saving_changes
from selfnpo_fast.doctor.tracing import FakeDenoiser, Operations, ParameterCounts
from selfnpo_fast.models import DIGITS, Family, load_adapter
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World, init_world
from selfnpo_fast.training.inputs import load_inputs
from selfnpo_fast.training.methods.self_npo import window_rows
from selfnpo_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
DIGITS_PARAMETERS = 1_077_572
LORA = LoraConfig(rank=4)
FULL = LoraConfig()


@pytest.fixture(scope="session")
def sd(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> Path:
    return tiny.write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def world() -> World:
    return init_world()


def digits(**sections) -> TrainConfig:
    parts = {"model": ModelConfig(path="digits"), "prompts": PromptConfig(source="digits")} | sections
    return TrainConfig(**{"log": LogConfig(sample_every=-1), **parts})


@functools.cache
def tracer_of(model: str, prompts: int) -> costs.Tracer:
    """One tracer for all tests, so that each network is traced once."""
    return costs.Tracer(load_adapter(model), prompts)


def traced(config: TrainConfig, world_size: int = 1, device: str = "cpu") -> costs.PlannedRun:
    return tracer_of(config.model.path, make_tracer(config).prompts).plan(config, world_size, device)


def tiny_config(sd: Path, **sections) -> TrainConfig:
    parts = {"model": ModelConfig(path=str(sd)), "prompts": PromptConfig(limit=9), "log": LogConfig(sample_every=-1)}
    parts |= {"engine": EngineConfig(batch_size=4), "rollout": RolloutConfig(grid_steps=5)}
    return TrainConfig(**(parts | sections))


# Networks


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_a_quantised_base_takes_what_its_numbers_and_scales_take(kind, sd):
    """Bytes of a weight: 1 and a scale for each output channel, or half and a scale for 64."""
    from selfnpo_fast.models.quantised import quantise, quantised_paths
    from selfnpo_fast.training.lora import add_lora

    adapter = load_adapter(str(sd))
    real = adapter.load_denoiser(torch.bfloat16)
    plain, layers = (
        ParameterCounts.of(real.requires_grad_(True)),
        [real.get_submodule(p) for p in quantised_paths(real)],
    )
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    quantise(real, kind, torch.device("cpu"))
    add_lora(real, LORA, seed=0)
    fake = FakeDenoiser(adapter, torch.bfloat16, LORA, quantization=kind)
    assert fake.parameter_counts == ParameterCounts.of(real)
    if kind == "nf4":
        stored = sum(-(-o * i // 2) + 4 * -(-o * i // 64) for o, i in sizes)
    else:
        stored = sum(o * i + 4 * o for o, i in sizes)
    saved = sum(2 * o * i for o, i in sizes) - stored
    counts = fake.parameter_counts
    assert counts.weight_bytes == plain.weight_bytes + counts.trained_bytes - saved
    assert counts.total == plain.total + counts.trained
    fake.trace_student(2)  # the library's operators know shapes


def test_a_quantised_base_is_proposed_to_lora_runs(sd):
    def proposed(kind: str, rank: int = 4) -> set[str]:
        config = tiny_config(sd, lora=LoraConfig(rank=rank), model=ModelConfig(path=str(sd), quantization=kind))
        changes = memory_saving_changes(config, 1, Family())
        return {option for option, _ in changes if "quantization" in option}

    assert proposed("none") == {"--model.quantization int8", "--model.quantization nf4"}
    assert proposed("int8") == proposed("fp8") == {"--model.quantization nf4"}
    assert proposed("nf4") == proposed("none", 0) == set()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_parameters_and_rows_are_those_of_the_loaded_model(family, lora, dtype, request):
    adapter = load_adapter(str(request.getfixturevalue(family)))
    real = adapter.load_denoiser(dtype)
    if lora.rank:
        from selfnpo_fast.training.lora import add_lora

        add_lora(real, lora, seed=0)
    assert FakeDenoiser(adapter, dtype, lora).parameter_counts == ParameterCounts.of(real)
    rows = adapter.encode_prompts(["a cat", "a dog"], torch.device("cpu"))
    assert {name: tuple(row.shape[1:]) for name, row in rows.items()} == adapter.conditioning_shapes


class OneLayer:
    """An adapter of a single layer, with latents as its only input."""

    latent_shape, conditioning_shapes = (3, 8, 8), {"rows": (5, 7)}
    family = Family()

    def __init__(self, layer) -> None:
        self.layer = layer

    def new_denoiser(self, dtype: torch.dtype) -> nn.Module:
        return self.layer().to(dtype)

    def predict(self, module, x, t, cond, size):
        return module(x.to(next(module.parameters()).dtype))


def test_flops_and_bytes_of_one_convolution():
    """A 3x3 convolution of 3 to 6 channels on 8x8: a multiply-add per weight and output position.

    Its backward pass, for the weights, has as many again.
    """
    batch = 5
    denoiser = FakeDenoiser(OneLayer(lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False)), torch.float32, FULL)
    once = 2 * 64 * 6 * 3 * 9
    x, out, weights = 4 * batch * 3 * 64, 4 * batch * 6 * 64, 4 * 6 * 3 * 9
    inputs = x + 8 * batch + 4 * batch * 35
    assert denoiser.trace_forward(batch).flops == once
    assert denoiser.trace_student(batch).flops == 2 * once, "no gradient of the latents is asked for"
    assert denoiser.trace_forward(batch).peak == inputs + out
    student = denoiser.trace_student(batch)
    assert student.kept == x + out, "timesteps and rows are not needed again"
    assert (student.peak, student.peak_gradients) == (x + 2 * out + weights, 0)
    assert denoiser.trace_student(batch, keep_gradients=False).peak == student.peak


def test_flops_of_attention():
    """The forward pass has two matrix products, the backward pass four, as torch counts them."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            q = (x * self.scale).flatten(2).transpose(1, 2).reshape(len(x), 1, 64, 3)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    product = 2 * 64 * 64 * 3
    denoiser = FakeDenoiser(OneLayer(Attention), torch.float32, FULL)
    assert denoiser.trace_forward(1).flops == 2 * product
    assert denoiser.trace_student(1).flops == 6 * product


def test_live_bytes_follow_storages():
    known = torch.zeros(100)
    with Operations([known]) as live:
        a = torch.zeros(10)
        known.add_(1)
        view = a[2:]
        assert live.now == 40, "neither what is known nor a view is new"
        b = torch.zeros(20)
        del a
        assert live.now == 120, "a view keeps its storage"
        del view
        assert live.now == b.nbytes == 80
    assert live.peak == 120


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_traced_peak_is_that_of_a_real_backward(checkpointing):
    """Against the profiler's records of the same network with real tensors and random weights."""
    adapter = load_adapter("digits")
    traced = FakeDenoiser(adapter, torch.float32, FULL, checkpointing=checkpointing).trace_student(8)
    network = adapter.new_denoiser(torch.float32).train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    gc.collect()  # objects of earlier tests that are freed during the profile would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        rows = {name: torch.zeros(8, *shape) for name, shape in adapter.conditioning_shapes.items()}
        out = adapter.predict(network, torch.zeros(8, *adapter.latent_shape), torch.zeros(8, dtype=torch.int64), rows)
        out.backward(torch.ones_like(out))
    blocks = [e for e in records.profiler.kineto_results.events() if e.name() == "[memory]"]
    blocks = sorted((event.start_ns(), event.nbytes()) for event in blocks)
    real = max(accumulate(size for _, size in blocks))
    assert traced.peak == pytest.approx(real, rel=0.02)


def test_digits_parameters_and_checkpointing():
    adapter = load_adapter("digits")
    plain = FakeDenoiser(adapter, torch.float32, FULL)
    assert plain.parameter_counts.total == plain.parameter_counts.trained == DIGITS_PARAMETERS
    assert plain.parameter_counts.weight_bytes == 4 * DIGITS_PARAMETERS
    saving = FakeDenoiser(adapter, torch.float32, FULL, checkpointing=True)
    before, after = plain.trace_student(16), saving.trace_student(16)
    assert after.kept < before.kept / 2
    assert after.peak < before.peak
    assert 1.2 < after.flops / before.flops < 1.4, "one more forward"
    assert plain.trace_student(32).kept == pytest.approx(2 * before.kept, rel=1e-3)


def test_no_weight_is_loaded(tmp_path, monkeypatch, capsys):
    """The doctor reads a copy of the embedded model that has no weight files and no tokenizer."""
    monkeypatch.setattr(report, "memory_saving_changes", lambda *_: [])  # for speed
    folder = shutil.copytree(DIGITS, tmp_path / "model")
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("tokenizer*.json")]:
        path.unlink()
    words = ["--config", str(ROOT / "configs" / "digits.yaml"), "--model.path", str(folder)]
    assert main(["doctor", *words]) == 0
    out = capsys.readouterr().out
    run = traced(train.parse(["--config", str(ROOT / "configs" / "digits.yaml")]).config, device="cuda")
    peak = costs.memory(run).peak
    assert re.search(rf"peak of an update +{format_bytes(peak)}\n", out), out


SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_SIZE = {
    "SD1.5": ("StableDiffusionPipeline", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "SDXL": ("StableDiffusionXLPipeline", SDXL),
}


@pytest.mark.parametrize(("family", "count"), [("SD1.5", 859_520_964), ("SDXL", 2_567_463_684)])
def test_full_size_networks_from_their_configs(tmp_path, family, count):
    """Parameter counts are the published sizes of the denoisers."""
    pipeline, unet = FULL_SIZE[family]
    parts = {
        "model_index.json": {"_class_name": pipeline},
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, **unet},
        "vae/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]},
        "text_encoder/config.json": {"model_type": "clip_text_model", "hidden_size": 768},
        "text_encoder_2/config.json": {"model_type": "clip_text_model", "hidden_size": 1280, "projection_dim": 1280},
    }
    for name, values in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    denoiser = FakeDenoiser(load_adapter(str(tmp_path), configs_only=True), torch.bfloat16, FULL)
    assert denoiser.parameter_counts.total == count
    assert denoiser.parameter_counts.weight_bytes == 2 * count
    assert denoiser.trace_forward(1).peak < count, "activations of a forward are small next to such weights"


# Closed form


def test_bytes_of_each_engine_against_the_arithmetic():
    """Bytes per trained parameter: 4 + 8 in fp32, 2 + 4 + 8 in bf16.

    ZeRO shards 12 of those in bf16; its stage 1 also has whole float32 gradients.
    """
    count = DIGITS_PARAMETERS

    def resident(world_size: int, device: str = "cuda", **engine) -> dict[str, int]:
        config = digits(engine=EngineConfig(**engine), reference=ReferenceConfig(kind="ema"))
        return costs.memory(traced(config, world_size, device)).resident

    plain = resident(1)
    assert (plain["weights"], plain["moments"], plain["reference"]) == (4 * count, 8 * count, 4 * count)
    assert not {"fp32 masters", "gradients", "EMA masters"} & plain.keys()
    assert resident(4)["moments"] == 8 * count, "ZeRO 0 shares nothing"

    share = count // 4
    half = resident(4, precision="bf16")  # which runs as stage 1
    assert half["weights"] == half["reference"] == 2 * count
    assert (half["EMA masters"], half["gradients"]) == (4 * share, 4 * count)
    assert (half["fp32 masters"], half["moments"]) == (4 * share, 8 * share)

    two = resident(4, precision="bf16", zero_stage=2)
    assert "gradients" not in two
    assert (two["weights"], two["fp32 masters"], two["moments"]) == (2 * count, 4 * share, 8 * share)

    three = resident(4, precision="bf16", zero_stage=3)
    whole = traced(digits()).parameter_counts.persistent
    assert three["weights"] == 2 * share + 2 * whole
    assert three["gradients"] == three["fp32 masters"] == 4 * share
    assert three["reference"] == 2 * count, "the reference is whole on every rank"


def test_moments_of_eight_bits():
    """8-bit moments take two bytes per element, and two float32 scales per 256 elements.

    Small tensors keep float32 moments, unless ZeRO has joined all tensors into one.
    """
    config = digits(optimizer=OptimizerConfig(name="adamw8bit"))
    run = traced(config)
    small = run.parameter_counts.small
    assert 0 < small < DIGITS_PARAMETERS / 5
    large = DIGITS_PARAMETERS - small
    assert costs.memory(run).resident["moments"] == pytest.approx(8 * small + large * (2 + 8 / 256), abs=8)
    flat = costs.memory(traced(replace(config, engine=EngineConfig(zero_stage=2)), 2)).resident["moments"]
    assert flat == pytest.approx(DIGITS_PARAMETERS / 2 * (2 + 8 / 256), abs=8)


def test_buffers():
    rollout = RolloutConfig(pool=3, grid_steps=20)
    config = digits(rollout=rollout, engine=EngineConfig(batch_size=8, accumulation=2))
    run = traced(config)
    resident = costs.memory(run).resident
    latent = 4 * 4 * 8 * 8
    assert resident["slots"] == 3 * 2 * 4 * (2 * latent + 4 * 8) + 4 * 4 * 8
    assert resident["prompt table"] == (run.prompts + 1) * 16 * 64 * 4
    assert resident["coefficient tables"] > 4 * 2 * 21 * 1000
    data = replace(config, rollout=replace(rollout, start="data"), data=DataConfig(source="digits", limit=50))
    resident = costs.memory(traced(data)).resident
    assert resident["latents of real data"] == 50 * latent
    assert resident["slots"] == 3 * 2 * 4 * (latent + 4 * 8) + 4 * 4 * 8


def test_graphs_keep_the_reference_forward_in_a_pool_of_their_own():
    """Without graphs the peak is the larger of the two forwards, with overlap or graphs their sum.

    The pool also holds each group's pairs: two latents, four int64 and one float32 for each.
    """

    def costed(device: str = "cuda", graphs: bool = True, **rollout) -> tuple[costs.PlannedRun, costs.Memory]:
        engine = EngineConfig(batch_size=8, accumulation=2, graphs=graphs)
        run = traced(digits(rollout=RolloutConfig(pool=3, **rollout), engine=engine), device=device)
        return run, costs.memory(run)

    pool = "pool of the CUDA graphs"
    run, graphs = costed()
    _, plain = costed(graphs=False)
    latent, micro, groups = 4 * 4 * 8 * 8, 4, 6
    pairs = micro * (2 * latent + 36)
    assert graphs.resident[pool] == run.reference.peak + groups * pairs
    assert pool not in plain.resident
    # One more forward runs for the comparison, beside copies of the slots' state and of its results.
    state = micro * (2 * latent + 8 * 8)
    assert graphs.phases["capture of a CUDA graph"] == run.reference.peak + 2 * state + pairs
    assert "reference forward" not in graphs.phases
    student = "student forward and backward"
    assert graphs.phases[student] == plain.phases[student] > run.reference.peak
    # What a graph returns is not counted twice.
    returned = plain.resident["pairs"]
    assert "pairs" not in graphs.resident
    assert graphs.peak == plain.peak + graphs.resident[pool] - returned
    _, both = costed(overlap=True)
    _, overlap = costed(graphs=False, overlap=True)
    assert both.peak - overlap.peak == groups * pairs - returned
    # Nothing is captured on a CPU, nor in lockstep mode.
    for _, other in (costed("cpu"), costed(mode="lockstep")):
        assert pool not in other.resident
        assert "reference forward" in other.phases


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        (RolloutConfig(), 1),
        (RolloutConfig(omega=0), 1),
        (RolloutConfig(omega=-5), 2),
        (RolloutConfig(mode="lockstep", stop="fixed"), 26),
        (RolloutConfig(mode="lockstep", stop="fixed", k=5, omega=-3), 12),
        (RolloutConfig(mode="lockstep", k=5), 4),  # 1 to 5 steps, 3 on average, and the target
        (RolloutConfig(mode="lockstep", start="data", k=1), 2),
        (RolloutConfig(mode="lockstep", start="data", k=25), 14),
        (RolloutConfig(mode="lockstep", start="data", k=5), 5.6),
    ],
)
def test_forwards_per_pair_in_closed_form(rollout, expected):
    assert costs.forwards_per_pair(rollout) == pytest.approx(expected)


RECORDED = {
    "continuous": ("--rollout.omega", "-1"),
    "continuous, both branches": ("--rollout.omega", "-3"),
    "lockstep from noise": ("--rollout.mode", "lockstep", "--rollout.k", "3"),
    "lockstep, fixed": ("--rollout.mode", "lockstep", "--rollout.k", "3", "--rollout.stop", "fixed"),
    "lockstep from data": (
        *("--rollout.mode", "lockstep", "--rollout.k", "3"),
        *("--rollout.start", "data", "--data.source", "digits"),
    ),
}


@pytest.mark.parametrize("words", RECORDED.values(), ids=RECORDED)
def test_forwards_per_pair_and_files_against_a_run(tmp_path, words):
    argv = [
        *("--config", str(ROOT / "configs" / "digits.yaml"), "--output", str(tmp_path / "run"), "--updates", "12"),
        *("--engine.batch_size", "2", "--rollout.pool", "1", "--rollout.grid_steps", "5"),
        *("--log.every", "1", "--log.sample_every", "-1", *words),
    ]
    assert train.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    used = [row["reference_forwards_per_pair"] for row in rows[1:]]  # the first update also fills the slots
    run = traced(train.parse(argv).config)
    expected = costs.forwards_per_pair(run.config.rollout)
    varies = "lockstep" in words and "fixed" not in words
    assert sum(used) / len(used) == pytest.approx(expected, rel=0.15 if varies else 1e-6)
    first = rows[0]["reference_forwards_per_pair"] * 2
    most = run.config.rollout.max_steps + 1 if varies else expected
    assert first <= costs.startup_forwards(run) + 2 * most

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert costs.checkpoint_bytes(run) == pytest.approx(size(checkpoint), rel=0.02)
    assert costs.negative_bytes(run) == pytest.approx(size(tmp_path / "run" / "negative"), rel=0.02)


# Real objects


def real(world: World, tmp_path: Path, config: TrainConfig) -> Trainer:
    from selfnpo_fast.training.recorder import Recorder

    trainer = Trainer(config, load_inputs(config, world), world, tmp_path)
    trainer.train_update(Recorder(config, world, 1000))
    return trainer


def storages(tensors) -> int:
    """Bytes of the storages under the tensors, each storage counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(("lora", "reference"), [(0, "ema"), (4, "ema"), (4, "frozen")])
def test_bytes_are_those_of_a_real_trainer(world, tmp_path, sd, optimizer, lora, reference):
    sections = {"lora": LoraConfig(rank=lora), "reference": ReferenceConfig(kind=reference)}
    config = tiny_config(sd, optimizer=OptimizerConfig(name=optimizer), **sections)
    trainer, resident = real(world, tmp_path, config), costs.memory(traced(config)).resident
    ours, theirs = storages(trainer.engine.module.parameters()), storages(trainer.reference.module.parameters())
    assert ("reference" in resident) == (reference == "ema"), "the base under low-rank weights is no copy"
    both = storages([*trainer.engine.module.parameters(), *trainer.reference.module.parameters()])
    # With LoRA they are one network, which holds the average as well.
    assert (ours, theirs) == ((both, both) if lora else (resident["weights"], resident["reference"]))
    assert both == resident["weights"] + resident.get("reference", 0)
    state = trainer.engine.engine.basic_optimizer.state.values()
    held = [v for s in state for name, v in s.items() if isinstance(v, torch.Tensor) and "qmap" not in name]
    assert resident["moments"] == pytest.approx(storages(v for v in held if v.ndim), abs=8)
    assert resident["prompt table"] == storages(trainer.table.rows.values())
    assert "prompts of the next pairs" not in resident
    rollout = trainer.producer.rollout
    assert resident["slots"] == storages([rollout.x, rollout.final, rollout.slots, rollout._next_slots])
    tables = rollout.tables
    held = [tables.step, tables.start, tables.renoise, tables.timesteps, tables.weight, trainer.method.objective.k]
    assert resident["coefficient tables"] == storages(held)


def test_prompts_on_the_host_take_the_bytes_of_the_next_pairs(world, tmp_path, sd):
    prompts = PromptConfig(limit=40, device_mib=0, store=str(tmp_path / "store"))
    config = tiny_config(sd, prompts=prompts)
    table = load_inputs(config, world).table
    table.reserve(window_rows(config, 1))
    run = traced(config)
    resident = costs.memory(run).resident
    assert "prompt table" not in resident
    places = 8 * (40 + 1)
    assert resident["prompts of the next pairs"] == storages(table.rows.values()) + places
    on_device = replace(config, prompts=PromptConfig(limit=40))
    assert costs.memory(traced(on_device)).resident["prompt table"] == costs.prompt_table_bytes(run)
    assert costs.prompts_on_host(run)
    assert not costs.prompts_on_host(traced(on_device))
    assert "of text embeddings, at most, in prompts.store" in examine(config)


# The report


def test_report_says_what_fits_and_what_would(sd, capsys):
    words = ["--config", str(ROOT / "configs" / "digits.yaml"), "--model.path", str(sd), "--engine.batch_size", "8"]
    words += ["--engine.graphs", "false", "--prompts.device_mib", "0"]
    assert main(["doctor", *words, "--memory_gib", "0.002", "--world_size", "2"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "computed, not measured",
        "8 pairs (ranks x micro-batches x pairs: 2 x 1 x 4)",
        "cards: 0.002 GiB does not fit",
        "--engine.gradient_checkpointing true",
        "--optimizer.name adamw8bit",
        "to fit 0.002 GiB: --engine.gradient_checkpointing true needs",
        "A100 SXM 80 GB",
        "H100 SXM 80 GB",
        "this machine",
    ):
        assert expected in out, out


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_rank_is_proposed_with_the_rate_and_the_layers_of_the_family(name, request):
    """They are those of the family's shipped config, and what is proposed can be trained."""
    from selfnpo_fast.training.lora import add_lora

    config = tiny_config(request.getfixturevalue(name))
    adapter = load_adapter(config.model.path)
    ((words, changed),) = [change for change in memory_saving_changes(config, 2, adapter.family) if "lora" in change[0]]
    family = {"sd": "sd15", "sdxl": "sdxl"}[name]
    shipped = train.parse(["--config", str(ROOT / "configs" / f"{family}_lora.yaml")]).config
    assert changed.optimizer.lr == shipped.optimizer.lr == 1e-4, "peers use 2e-5 to 2e-4"
    assert changed.lora == shipped.lora
    assert words.split()[::2] == ["--lora.rank", "--optimizer.lr", "--lora.targets"]
    full = train.parse(["--config", str(ROOT / "configs" / f"{family}.yaml"), *words.split()]).config
    assert (full.optimizer.lr, full.lora) == (shipped.optimizer.lr, shipped.lora)
    denoiser = adapter.new_denoiser(torch.float32)
    add_lora(denoiser, changed.lora, seed=0)
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    for target in changed.lora.targets:
        assert any(f".{target}.lora_A." in name for name in trained), target


@pytest.mark.slow
def test_changes_lead_to_a_config_that_fits(sd):
    config = tiny_config(sd)
    tracer = make_tracer(config)
    run = tracer.plan(config, 1, "cuda")
    for words, changed in memory_saving_changes(config, 1, tracer.adapter.family):
        found = train.parse(["--config", str(ROOT / "configs" / "digits.yaml"), *words.split()]).config
        for option in words.split()[::2]:
            section, _, name = option.removeprefix("--").partition(".")
            assert getattr(getattr(changed, section), name) == getattr(getattr(found, section), name), words
    before = costs.memory(run)
    card = before.peak / costs.GIB / 2
    assert not fits(before, card)
    words, after = changes_to_fit(tracer, run, card)
    assert fits(after, card)
    assert words
    words, least = changes_to_fit(tracer, run, 1e-6)
    assert not fits(least, 1e-6)
    assert least.peak <= after.peak


class SmallCard(TorchDispatchMode):
    """A card on which a tensor of more than `most` bytes does not fit; notes what is convolved."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.convolved = most, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.nbytes > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if func is torch.ops.aten.convolution.default:
            self.convolved.append(tuple(args[0].shape))
        return out


class FakeGpu:
    """The meta device, which computes nothing, as a GPU; every look at the clock is 1 ms later."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waits, clock = 0, iter(range(10**9))
        patch.setattr(machines.time, "perf_counter", lambda: next(clock) / 1e3)
        patch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self, device=None) -> None:
        self.waits += 1

    def measured(self, precision: str, most: float) -> tuple[machines.Machine, set]:
        with SmallCard(most) as card:
            machine = measure_this_machine(precision, device=torch.device("meta"), kind="cuda")
        return machine, set(card.convolved)


@pytest.mark.parametrize(
    ("most", "batch", "copied"), [(math.inf, 64, 2**30), (64 * 320 * 64**2 * 2 - 1, 32, 2**27)], ids=["large", "small"]
)
def test_this_machine_is_measured_at_the_size_of_an_update_on_a_gpu(monkeypatch, most, batch, copied):
    """A kernel of a tiny batch would take less time than its launch. Where a tensor does not fit,
    its size is halved until it does."""
    gpu = FakeGpu(monkeypatch)
    machine, convolved = gpu.measured("bf16", most)
    assert convolved == {(batch, 320, 64, 64)}
    # One multiply-add per weight and output position, in 1 ms; a copy reads and writes.
    assert machine.flops["bf16"] == pytest.approx(2 * batch * 64**2 * 9 * 320**2 / 1e-3)
    assert machine.bandwidth == pytest.approx(2 * copied / 1e-3)
    assert machine.gpu
    assert f"batch {batch}," in machine.source
    assert gpu.waits >= 16, "before and after each call"


def test_this_machine_that_has_no_room_has_no_rates(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "selfnpo"):
        machine, _ = FakeGpu(monkeypatch).measured("bf16", 1000)
    assert machine is None
    assert "this machine: not measured" in caplog.text


MISTAKES = {
    "memory": (["--memory_gib", "0"], "memory_gib: 0 is not possible"),
    "memory, no number": (["--memory_gib", "big"], 'Parser key "memory_gib": '),
    "ranks": (["--world_size", "0"], "world_size: 0 is not possible"),
    "batch": (["--world_size", "3"], "engine.batch_size: 64 cannot be shared by 3 ranks"),
    "lora": (["--lora.rank", "4", "--lora.targets", "[nowhere]"], r"lora.targets: \['nowhere'\] match no layer"),
    "model": (["--model.path", "./nowhere"], "model.path: no such folder"),
    "option": (["--colour", "red"], ".*colour"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(capfd, words, expected):
    assert main(["doctor", "--config", str(ROOT / "configs" / "digits.yaml"), *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: {expected}.*\n", err), err


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--help"])
    assert caught.value.code == 0
    assert "--memory_gib" in capsys.readouterr().out


def test_a_folder_without_configs_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        examine(digits(model=ModelConfig(path=str(tmp_path))))


# A real update

SHORT = RolloutConfig(grid_steps=5, pool=1)
SMALL = ["--engine.batch_size", "32", "--rollout.grid_steps", "5", "--rollout.pool", "1"]


def test_verify_on_digits(capsys):
    assert main(["doctor", "--verify", "--config", str(ROOT / "configs" / "digits.yaml"), *SMALL]) == 0
    out = capsys.readouterr().out
    assert re.search(r"peak: [+-]\d+\.\d%, within 10%", out), out
    assert "student forward and backward" in out


@pytest.mark.parametrize(("factor", "status"), [(1.09, 0), (0.92, 0), (1.12, 1), (0.88, 1)])
def test_verify_leaves_with_one_beyond_a_tenth(sd, monkeypatch, capsys, factor, status):
    def measured(config, adapter, prompts, world) -> dict[str, int]:
        memory = costs.memory(traced(config))
        names = ("at rest", "reference forward", "student forward and backward", "optimiser step")
        return dict.fromkeys(names, 1) | {"peak": round(memory.peak / factor)}

    monkeypatch.setattr("selfnpo_fast.doctor.report.measure", measured)
    words = ["--config", str(ROOT / "configs" / "digits.yaml"), "--model.path", str(sd)]
    assert main(["doctor", "--verify", *words]) == status
    assert ("NOT within 10%" in capsys.readouterr().out) == bool(status)


class Backend:
    """An object whose `wait` comes from its class."""

    def __init__(self) -> None:
        self.name = "gloo"

    def wait(self) -> str:
        return "real"


def test_replaced_attributes_are_restored_after_an_error():
    backend = Backend()
    with pytest.raises(ZeroDivisionError), replaced_attributes(backend, {"name": "none", "wait": lambda: "replaced"}):
        assert (backend.name, backend.wait()) == ("none", "replaced")
        raise ZeroDivisionError
    assert vars(backend) == {"name": "gloo"}, "what the class has is not left on the instance"
    assert backend.wait() == "real"


def test_an_attribute_that_is_missing_is_not_replaced():
    backend = Backend()
    with pytest.raises(AttributeError, match="all_reduce"):
        with replaced_attributes(backend, {"name": "none", "all_reduce": print}):
            pytest.fail("entered")
    assert vars(backend) == {"name": "gloo"}


def test_verify_is_for_one_rank(monkeypatch, capsys):
    monkeypatch.setattr("selfnpo_fast.doctor.report.init_world", lambda: World(0, 2, torch.device("cpu")))
    assert main(["doctor", "--verify", "--config", str(ROOT / "configs" / "digits.yaml")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: --verify: it holds one rank")


ENGINES = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "bf16": {"precision": "bf16", "batch_size": 8},
    "bf16, ZeRO 2": {"precision": "bf16", "zero_stage": 2, "batch_size": 8},
    "bf16, ZeRO 3": {"precision": "bf16", "zero_stage": 3, "batch_size": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"accumulation": 2},
}


def near(config: TrainConfig, error: float = 0.01) -> None:
    """Asserts that the peak is within 1%, and then that every part is within 2% or a mebibyte.

    The largest error of the peak that was seen is 0.4%. In bf16 with ZeRO 3 the model is 6% too
    high: DeepSpeed holds 2 MiB less at rest than the model says.
    """
    found = compare_with_update(config)
    assert abs(found.error) < error, found
    for name, measured in found.measured.items():
        if error == 0.01:
            assert found.computed[name] == pytest.approx(measured, rel=0.02, abs=2**20), (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_verify_on_digits_with_every_engine(engine):
    error = 0.1 if engine.get("zero_stage") == 3 and engine.get("precision") == "bf16" else 0.01
    near(digits(engine=EngineConfig(**{"batch_size": 32, **engine}), rollout=SHORT), error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerConfig(name="adamw8bit")},
        {"lora": LORA},
        {"rollout": RolloutConfig(mode="lockstep", omega=-3, k=3)},
        {"reference": ReferenceConfig(kind="frozen")},
    ],
    ids=["adamw8bit", "lora", "lockstep", "frozen"],
)
def test_verify_on_digits_with_other_choices(changes):
    near(digits(**{"rollout": SHORT, **changes}))


@pytest.mark.slow
def test_verify_on_both_networks():
    table, holds = check(VERIFIED)
    assert holds, table
    assert "sd15_small" in table
