"""Random configs: valid ones train, broken ones give one line and leave no folder, hostile ones run
nothing."""

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
from tiny_negatives import load_network

from selfnpo_fast import train
from selfnpo_fast.config import TrainConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.plain_yaml import load_yaml

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
            "omega": pick(-1.0, 0.0, draw(st.floats(-6, 6))),
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
    """Two updates: exit code 0, finite metrics, and a negative model that loads and answers with
    finite numbers."""
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
    # No loss is written for an update whose pairs all weigh 0.
    weightless = config["rollout"]["pair_weight"] == "lockstep"
    assert all(row["loss"] >= 0 if row["loss"] is not None else weightless for row in rows)
    assert all(row["reference_forwards_per_pair"] > 0 for row in rows)
    negative = load_network(load_adapter(str(model)), str(output), torch.float32)
    assert all(parameter.isfinite().all() for parameter in negative.parameters())
    stored = yaml.safe_load((output / "config.yaml").read_text())
    for name in SECTIONS:
        asked = {field: value for field, value in config[name].items() if value is not None}
        assert asked.items() <= stored[name].items()


@pytest.mark.slow
@fuzz(60)
@given(config=valid_configs())
def test_valid_configs_train(base, config):
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


@pytest.mark.parametrize("value", [10**9 + 1, 2**62])
def test_counts_that_nothing_can_need_are_refused(value):
    """Tables of `log.every` rows, and grids of `log.sample_prompts` pictures, would eat the memory."""
    bounded = [("log", f"{name}every") for name in ("", "sample_", "checkpoint_")]
    bounded += [("log", "keep"), ("log", "sample_prompts"), ("log", "sample_steps"), ("rollout", "grid_steps")]
    bounded += [("rollout", "pool"), ("reference", "every"), ("optimizer", "warmup"), ("optimizer", "max_skipped")]
    bounded += [("engine", "batch_size"), ("engine", "accumulation"), ("lora", "rank")]
    for section, name in bounded:
        with pytest.raises(UserError, match=rf"^{section}\.{name}: {value} is not possible; expected "):
            SECTIONS[section](**{name: value})
    with pytest.raises(UserError, match=rf"^updates: {value} is not possible; expected an integer from 1 to 1,000,000"):
        TrainConfig(updates=value)
    with pytest.raises(UserError, match=r"^log.sample_guidance_scale: 1e.38 is not possible"):
        SECTIONS["log"](sample_guidance_scale=1e38)


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
        return [*none, 3, math.nan, "", "x", {}, {"a": 1}, [{"a": 1}], [None], [[]], ["a\0b"]]
    assert plain == tuple[float, float]
    return [*none, 3, "x", [], [0.1], [0.1, 0.2, 0.3], {}, [math.nan, 0.5], [0.5, math.inf], ["a", "b"], [None, 0.5]]


OUT_OF_RANGE = {
    "model.resolution": [0, -1, 2**14 + 1],
    "model.frames": [0, -1, 2**14 + 1],
    "rollout.s_shift": [0.0, -1.0, 1e-3, 101.0],
    "rollout.grid_steps": [-1, 0, 1],
    "rollout.k": [-1, 0, 26],
    "rollout.pool": [-1, 0, 10**9],
    "rollout.omega": [-101.0, 1e30],
    "loss.c": [0.0, -1.0],
    "reference.decay": [-0.1, 1.0],
    "prompts.limit": [0, -1],
    "prompts.dropout": [-0.1, 1.1],
    "data.limit": [0, -1],
    "data.stride": [0, -1],
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


@pytest.mark.parametrize("name", [".".join(path) for path in FIELDS])
def test_no_field_takes_a_broken_value_from_a_file(base, name):
    """Every field against every broken value of its type; all but what fits no float at all name
    the field."""
    path = tuple(name.split("."))
    file = fresh(base).with_suffix(".yaml")
    for value in broken_values(FIELDS[path]) + OUT_OF_RANGE.get(name, []):
        file.write_text(yaml.safe_dump(nested(path, value)))
        with pytest.raises(UserError) as caught:
            train.parse(["--config", str(file)])
        assert_one_line(str(caught.value), *([] if value == 10**400 else [name]))


@st.composite
def broken_fields(draw, texts: bool = True) -> tuple[str, object]:
    paths = [path for path, kind in FIELDS.items() if texts or str not in (kind, *get_args(kind))]
    path = draw(st.sampled_from(paths))
    name = ".".join(path)
    return name, draw(st.sampled_from(broken_values(FIELDS[path]) + OUT_OF_RANGE.get(name, [])))


@fuzz(50)
@given(broken=broken_fields())
def test_broken_files_get_one_line_and_no_folder(base, broken):
    name, value = broken
    if name in ("output", "model.path"):
        return  # which `refuse` gives on the command line; the test above has them
    refuse(base, yaml.safe_dump(nested(tuple(name.split(".")), value)), *([] if value == 10**400 else [name]))


@fuzz(50)
@given(broken=broken_fields(texts=False))
def test_broken_words_get_one_line_and_no_folder(base, broken):
    """As `--section.field value`, where text fields take any word."""
    name, value = broken
    word = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")
    refuse(base, "updates: 1\n", *([] if value == 10**400 else [name]), words=(f"--{name}={word.strip()}",))


KEYS = st.text(st.characters(exclude_characters=".+_", exclude_categories=["Cs", "Nd"]), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@fuzz(40)
@given(key=KEYS, value=ANYTHING, section=st.sampled_from(["", *SECTIONS]), deeper=st.integers(0, 2))
def test_unknown_keys_at_any_depth(base, key, value, section, deeper):
    known = get_type_hints(SECTIONS[section]) if section else get_type_hints(TrainConfig)
    if key in known or (not section and key in ("config", "resume", "overwrite", "replay_step")):
        return
    path = (*([section] if section else []), key, *["deeper"] * deeper)
    refuse(base, yaml.safe_dump(nested(path, value), allow_unicode=True))


@fuzz(40)
@given(field=st.sampled_from(sorted(FIELDS)), again=st.booleans())
def test_repeated_keys(base, field, again):
    """The same line twice, or the same section twice."""
    if len(field) == 1:
        text = f"{field[0]}: 1\n" * 2
    elif again:
        text = f"{field[0]}:\n  {field[1]}: 1\n" * 2
    else:
        text = f"{field[0]}: {{{field[1]}: 1, {field[1]}: 2}}\n"
    refuse(base, text, "is there twice", field[-1] if len(field) == 1 or not again else field[0])


WHOLE = yaml.safe_dump(yaml.safe_load((train.CONFIGS / "sd15.yaml").read_text())).encode()


@fuzz(80)
@given(cut=st.integers(0, len(WHOLE)), place=st.integers(0, 8 * len(WHOLE) - 1), junk=st.binary(max_size=8))
def test_damaged_config_files(base, cut, place, junk):
    """A flipped bit and bytes put in between: one line names what is wrong."""
    damaged = bytearray(WHOLE)
    damaged[place // 8] ^= 1 << place % 8
    refuse(base, bytes(damaged[:cut]) + junk + bytes(damaged[cut:]))


@fuzz(60)
@given(content=st.binary(max_size=200) | st.text("[]{}:-,?!&*#|>'\"%@` \t\nab1.", max_size=60))
def test_any_bytes_as_a_config(base, content):
    refuse(base, content)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "3", "- a\n- b\n", "a: [", "model: {path: a", "model:\n\tpath: x\n", "a: 1\n---\nb: 2\n", "\0"),
        *("[" * 100_000, "[" * 30 + "]" * 30, "{a: " * 100_000, "- " * 100_000, "? " * 5000, "a:\n" + " " * 10**6),
        *("x" * 200_000, "a: " + "x" * 2_000_000, f"updates: {'9' * 5000}", "resume: [1]", "overwrite: {}"),
        *("model: []", "model: 3", "model: null", "rollout: ''", "lora: [[]]", "__path__: x", "model: {__path__: x}"),
        *("null: 1", "1: 2", "{[1]: 2}", "? {a: b}\n: c\n", "'': 1", "<<: {updates: 1}", "\x1b[31m: 1", '"\\e[31m": 1'),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_shapes_that_no_config_has(base, content):
    refuse(base, content)


# Hostile configs

MODULE = """
import os
os.mkdir({marker!r})
class Evil:
    def __init__(self, *args, **kwargs):
        os.mkdir({marker!r} + "-made")
"""


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A path that hostile code would make; `hostile_module` is importable and does, too."""
    marker = tmp_path / "marker"
    (tmp_path / "hostile_module.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield marker
    ran = sys.modules.pop("hostile_module", None) is not None or marker.exists()
    assert not ran


def test_the_marker_would_tell(tmp_path):
    """The traps of this file work: unpickling and YAML's own unsafe loader do make the marker."""
    pickle.loads(hostile_pickle(tmp_path / "pickled"))
    yaml.load(f"!!python/object/apply:os.mkdir [{tmp_path / 'yaml'}]", yaml.UnsafeLoader)
    assert (tmp_path / "pickled").is_dir()
    assert (tmp_path / "yaml").is_dir()


HOSTILE = [
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/new:os.mkdir [{marker}]",
    "!!python/name:hostile_module.Evil",
    "!!python/module:hostile_module",
    "!!python/object:hostile_module.Evil {{}}",
    "{{class_path: hostile_module.Evil}}",
    "{{class_path: hostile_module.Evil, init_args: {{a: 1}}}}",
    "{{class_path: os.mkdir, init_args: {{path: {marker}}}}}",
    "{{init_args: {{path: {marker}}}}}",
    "&a [*a]",
    "&a {{b: *a}}",
    "&a 3",
    "*a",
    "!custom 3",
    "!!binary aGVsbG8=",
    "!!timestamp x",
    "hostile_module.Evil",
]
PLACES = ["{}", "updates: {}", "model: {}", "model: {{path: {}}}", "optimizer: {{lr: {}}}", "lora: {{targets: [{}]}}",
          "config: {}", "surprise: {}", "? {}\n: 1"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_config_names_no_code(base, marker, place, hostile):
    refuse(base, place.format(hostile.format(marker=marker)))


@pytest.mark.parametrize("name", ["model", "optimizer", "loss", "updates", "lora.targets", "reference"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_words_name_no_code(base, marker, name, hostile):
    refuse(base, "updates: 1\n", words=(f"--{name}={hostile.format(marker=marker)}",))


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_words_give_a_section_no_class(base, marker, name):
    for key in ("class_path", "__class__", "init_args.path"):
        refuse(base, "updates: 1\n", key.split(".")[0], words=(f"--{name}.{key}=hostile_module.Evil",))


def test_config_may_be_a_pickle_or_another_folder(base, marker):
    refuse(base, hostile_pickle(marker))
    refuse(base, pickle.dumps({"updates": 1}, protocol=0))
    for path in (base, base / "nowhere.yaml", base / "model" / "unet" / "diffusion_pytorch_model.safetensors"):
        assert_refused(*call(train.main, ["--config", str(path), "--output", str(fresh(base))]))


def test_yaml_is_read_as_written():
    """What is plain comes through as PyYAML's safe loader has it; all shipped configs do."""
    for path in train.CONFIGS.glob("*.yaml"):
        text = path.read_text()
        assert load_yaml(text) == yaml.safe_load(text)


@fuzz(200)
@example(text="a: 1\na: 2", value={})
@given(text=st.text("[]{}:-,?!&*# \nab1", max_size=30), value=st.dictionaries(KEYS.filter(bool), ANYTHING, max_size=4))
def test_plain_yaml_or_refusal(text, value):
    try:
        load_yaml(text)
    except (UserError, yaml.YAMLError):
        pass
    dumped = yaml.safe_dump(value)
    if "&id" not in dumped:
        loaded = load_yaml(dumped)
        assert yaml.safe_dump(loaded) == dumped
