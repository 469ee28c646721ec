"""Random configs: valid ones train, broken ones give one line and leave no folder, hostile ones run nothing."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import tiny
import torch
import yaml
from fuzzing import assert_one_line, assert_refused, call, fuzz, hostile_pickle
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from selfnpo_fast import train
from selfnpo_fast.config import TrainConfig, load_yaml
from selfnpo_fast.errors import UserError
from selfnpo_fast.guidance.negative import load_negative
from selfnpo_fast.models import load_adapter

SECTIONS = {name: kind for name, kind in get_type_hints(TrainConfig).items() if hasattr(kind, "__dataclass_fields__")}
FIELDS: dict[tuple[str, ...], Any] = {
    path: kind
    for name, section in get_type_hints(TrainConfig).items()
    for path, kind in (
        [((name, field), kind) for field, kind in get_type_hints(section).items()]
        if name in SECTIONS
        else [((name,), section)]
    )
}
"""(section, field) or (field,) -> type, for every field that there is."""
NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A folder with a minimal model, prompts and captioned images."""
    folder = tmp_path_factory.mktemp("fuzz")
    tiny.write_sd(folder / "model")
    (folder / "prompts.txt").write_text("a cat\na blue dog\na cat\ntwo birds\n")
    (folder / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (80, 64), (60 * i, 100, 200)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"picture {i}")
    return folder


def fresh(base: Path) -> Path:
    """An output folder that is not there yet: examples share the fixtures of their test."""
    return base / f"run-{next(NUMBERS)}"


def nested(path: tuple[str, ...], value: object) -> dict:
    for name in reversed(path):
        value = {name: value}
    return value


# Valid configs


def positive(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda value: float(f"{value:.4g}"))


@st.composite
def valid_configs(draw) -> dict:
    """A config that TrainConfig takes, for two updates of the minimal model on a CPU."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    mode, start, grid_steps = pick("lockstep", "continuous"), pick("noise", "noise", "data"), pick(2, 4, 5)
    pair_weight = pick("uniform", "lockstep") if mode == "continuous" else "uniform"
    runs_through = mode == "continuous" and start == "noise" and pair_weight == "uniform"
    rank = pick(0, 0, 1, 3)
    accumulation = pick(1, 1, 2)
    return {
        "rollout": {
            "mode": mode,
            "start": start,
            "grid_steps": grid_steps,
            "k": None if runs_through else draw(st.none() | st.integers(1, grid_steps)),
            "w": pick(-1.0, 0.0, draw(st.floats(-6, 6))),
            "stop": pick("uniform", "fixed"),
            "noising": pick("from_x_t", "naive"),
            "pool": pick(1, 2, 3),
            "pair_weight": pair_weight,
        },
        "loss": {"kind": pick("l2", "huber"), "c": draw(positive(1e-4, 1))},
        "reference": {"kind": pick("frozen", "ema"), "decay": draw(st.floats(0, 1, exclude_max=True))},
        "prompts": {
            "dropout": pick(0.0, 1.0, draw(st.floats(0, 1))),
            "limit": pick(1, 3, 100),
            "shuffled": draw(st.booleans()),
        },
        "data": {"limit": pick(2, 100)},
        "optimizer": {
            "name": pick("adamw", "adamw8bit"),
            "lr": draw(positive(1e-6, 1e-3)),
            "betas": [draw(st.floats(0, 0.99)), draw(st.floats(0, 0.999))],
            "eps": draw(positive(1e-8, 1e-3)),
            "weight_decay": draw(st.floats(0, 0.1)),
            "warmup": pick(0, 1, 5),
            "clip": pick(0.0, 0.5, 1.0),
            "max_skipped": pick(0, 20),
        },
        "lora": {
            "rank": rank,
            "alpha": draw(st.none() | positive(0.1, 8)),
            "targets": draw(st.lists(st.sampled_from(["to_q", "to_k", "to_v", "to_out.0"]), min_size=1, unique=True)),
        },
        "engine": {
            "precision": pick("fp32", "bf16"),
            "zero_stage": pick(0, 1, 2, *([] if rank else [3])),
            "batch_size": accumulation * pick(1, 2, 3),
            "accumulation": accumulation,
            "gradient_checkpointing": draw(st.booleans()),
        },
        "log": {
            "every": pick(1, 2, 10),
            "sample_every": pick(-1, -1, 0, 1),
            "sample_prompts": pick(1, 8),
            "sample_steps": pick(1, 2),
            "sample_guidance_scale": pick(1.0, 3.0),
            "negative_prompt": pick("empty", "same"),
            "checkpoint_every": pick(0, 1, 2),
            "keep": pick(1, 2),
            "on_save_error": pick("continue", "stop"),
            "spike": pick(0.0, 5.0),
        },
        "updates": 2,
        "seed": draw(st.integers(0, 2**63 - 1)),
    }  # fmt: skip


def run_valid(base: Path, config: dict) -> None:
    """Two updates: exit code 0, finite metrics, and a negative model that loads and answers with finite numbers."""
    output = fresh(base)
    path = output.with_suffix(".yaml")
    model = base / "model"
    places = {"model": {"path": str(model)}, "output": str(output)}
    config = config | places | {
        "prompts": config["prompts"] | {"source": str(base / "prompts.txt")},
        "data": config["data"] | {"source": str(base / "images")},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    code, error = call(train.main, ["--config", str(path)])
    assert code == 0, error
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["update"] == 2
    numbers = [value for row in rows for value in row.values() if isinstance(value, (int, float))]
    assert all(math.isfinite(value) for value in numbers)
    assert all(row["loss"] >= 0 and row["reference_forwards_per_pair"] > 0 for row in rows)
    negative = load_negative(load_adapter(str(model)), str(output), torch.float32)
    assert all(parameter.isfinite().all() for parameter in negative.parameters())
    stored = yaml.safe_load((output / "config.yaml").read_text())
    for name in config:
        assert stored[name] == config[name] or config[name].items() <= stored[name].items(), name


@fuzz(16)
@given(config=valid_configs())
def test_valid_configs_train(base, config):
    run_valid(base, config)


@pytest.mark.slow
@fuzz(90)
@given(config=valid_configs())
def test_many_valid_configs_train(base, config):
    run_valid(base, config)


@fuzz(3)
@given(config=valid_configs())
def test_fp16_is_refused_without_a_gpu(base, config):
    if torch.cuda.is_available():
        pytest.skip("fp16 trains here")
    output = fresh(base)
    path = output.with_suffix(".yaml")
    config["engine"]["precision"], config["rollout"]["start"], config["rollout"]["k"] = "fp16", "noise", None
    path.write_text(yaml.safe_dump(config))
    words = ["--model.path", str(base / "model"), "--prompts.source", str(base / "prompts.txt")]
    code, error = call(train.main, ["--config", str(path), "--output", str(output), *words])
    assert_refused(code, error, "engine.precision: fp16 needs a GPU")
    assert not output.exists()


# Broken configs


def refuse(base: Path, content: str | bytes, *expected: str, words: tuple[str, ...] = ()) -> None:
    """`train` says one line with the `expected` parts about a config file, and makes no folder.

    The model named last is not there: nothing is trained by a config that gets past its checks.
    """
    output = fresh(base)
    path = output.with_suffix(".yaml")
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    last = ["--output", str(output), "--model.path", str(base / "nowhere")]
    ordered = [*last, *words] if expected else [*words, *last]
    code, error = call(train.main, ["--config", str(path), *ordered])
    assert_refused(code, error, *expected)
    assert not output.exists()
    path.unlink()


def broken_values(kind: Any) -> list:
    """Values that no field of a type takes."""
    kinds = get_args(kind) if get_origin(kind) is not Literal else ()
    none = [] if NoneType in kinds else [None]
    plain = next((k for k in kinds if k is not NoneType), kind) if NoneType in kinds else kind
    if plain is bool:
        return [*none, 3, -1, 0.5, "maybe", "", [], {}, math.nan]
    if plain is int:
        return [*none, True, 1.5, math.nan, math.inf, -(10**30), 10**30, 10**400, "", "fast", [], {}, [1], {"a": 1}]
    if plain is float:
        return [*none, True, math.nan, math.inf, -math.inf, 10**400, "", "fast", [], {}, [1.0], {"a": 1}]
    if plain is str:
        return [*none, "", "  ", "a\0b", "a\nb", [], {}, ["a"], {"a": 1}]
    if get_origin(plain) is Literal:
        return [*none, True, -1, 10**30, 0.5, math.nan, "", "sideways", [], {}, [get_args(plain)[0]]]
    if get_origin(plain) is list:
        return [*none, 3, math.nan, "", "x", {}, {"a": 1}, [1], [None], [[]], ["a\0b"]]
    assert plain == tuple[float, float]
    return [*none, 3, "x", [], [0.1], [0.1, 0.2, 0.3], {}, [math.nan, 0.5], [0.5, math.inf], ["a", "b"], [None, 0.5]]


OUT_OF_RANGE = {
    "model.resolution": [0, -1, 2**14 + 1],
    "rollout.grid_steps": [-1, 0, 1],
    "rollout.k": [-1, 0, 26],
    "rollout.pool": [-1, 0, 10**9],
    "rollout.w": [-101.0, 1e30],
    "loss.c": [0.0, -1.0],
    "reference.decay": [-0.1, 1.0],
    "prompts.limit": [0, -1],
    "prompts.dropout": [-0.1, 1.1],
    "data.limit": [0, -1],
    "optimizer.lr": [0.0, -1.0],
    "optimizer.betas": [[1.0, 0.5], [0.5, -0.1]],
    "optimizer.eps": [0.0, -1.0],
    "optimizer.weight_decay": [-1.0],
    "optimizer.warmup": [-1],
    "optimizer.clip": [-1.0],
    "optimizer.max_skipped": [-1],
    "lora.rank": [-1, 10**9],
    "lora.alpha": [0.0, -1.0],
    "engine.batch_size": [0, -1, 10**9],
    "engine.accumulation": [0, -1, 10**9],
    "log.every": [0],
    "log.sample_every": [-2],
    "log.sample_prompts": [0],
    "log.sample_steps": [0, -1],
    "log.sample_guidance_scale": [0.5, -3.0],
    "log.checkpoint_every": [-1],
    "log.keep": [0],
    "log.spike": [0.5, 1.0, -2.0],
    "updates": [0, -1],
    "seed": [-1, 2**63],
}


@st.composite
def broken_fields(draw) -> tuple[tuple[str, ...], object]:
    path = draw(st.sampled_from(sorted(FIELDS)))
    return path, draw(st.sampled_from(broken_values(FIELDS[path]) + OUT_OF_RANGE.get(".".join(path), [])))


@pytest.mark.parametrize("name", [".".join(path) for path in FIELDS])
def test_no_field_takes_a_broken_value_from_a_file(base, name):
    """Every field against every broken value of its type; the line names the section or the field."""
    path = tuple(name.split("."))
    for value in broken_values(FIELDS[path]) + OUT_OF_RANGE.get(name, []):
        text = yaml.safe_dump(nested(path, value))
        with pytest.raises(UserError) as caught:
            train.parse(["--config", _written(base, text)])
        assert_one_line(str(caught.value))
