"""Negatives that are hostile, huge or no files at all: one line refuses them, and soon.

Nothing here waits for a pipe, reads a device to its end or runs an expression of a file.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from fuzzing import assert_one_line, assert_refused, call, fuzz
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_negatives import moved, save_with_diffusers, with_lora
from torch import nn

from selfnpo_fast import attach_negative, cli
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives import sources
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.negatives.lora_scaling import Scaling
from selfnpo_fast.negatives.merge import merge
from selfnpo_fast.negatives.sources import LORA_FILE, PEFT_CONFIG, PEFT_FILE, RECORD
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.limits import MAX_HEADER_BYTES, MAX_NAME_CHARACTERS, MAX_RANK, MAX_TENSORS

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
EVIL = "(([a-z._0-9])+)+x"
"""A pattern for which Python's `re` takes longer than the universe has been there."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def network(base) -> nn.Module:
    return load_adapter(str(base)).load_denoiser(torch.float32)


@pytest.fixture(scope="module")
def pipe(base) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base, local_files_only=True)


@pytest.fixture(scope="module")
def whole(base, network, tmp_path_factory) -> Path:
    """One folder with a negative in every form that there is."""
    folder = tmp_path_factory.mktemp("whole")
    moved(network, 1, 0.05).save_pretrained(folder / "full" / "unet", max_shard_size="40KB")
    tiny.scheduler().save_pretrained(folder / "full" / "scheduler")
    record = {"path": str(base), "revision": None, "fingerprint": {}}
    (folder / "full" / RECORD).write_text(json.dumps(record))
    save_with_diffusers(folder / "lora", with_lora(load_adapter(str(base)), 2, None))
    state = load_file(folder / "lora" / LORA_FILE)
    config = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 1}}
    metadata = {"lora_adapter_metadata": json.dumps(config), "selfnpo_base": json.dumps(record)}
    save_file(state, folder / "lora" / LORA_FILE, metadata=metadata)
    (folder / "peft").mkdir()
    peft = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in state.items()}
    save_file(peft, folder / "peft" / PEFT_FILE)
    (folder / "peft" / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": {}}))
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def refused(network: nn.Module, path: object, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_negative(network, path)
    assert_one_line(str(caught.value), *words)
    assert str(caught.value).startswith("negative: ")


def test_the_whole_folder_loads(network, whole):
    for name in ("full", "lora", "peft"):
        load_negative(network, whole / name)


# Sources that are no files


@pytest.mark.parametrize(
    "source",
    [
        "",
        "x\0y",
        "x\0/y",
        "/x\ud800",
        "x/\ud800",
        "~nobody-here/x",
        "n" * 10**6,
        "/" + "n" * 10**5,
        "../..",
        "/",
        "a/b\nc",
    ],
)
def test_odd_names(network, source):
    refused(network, source)


@pytest.mark.parametrize(
    "source", [None, 3, b"x", [], {"unet.conv_in.lora_A.weight": torch.ones(10)}, object()], ids=type
)
def test_odd_types(network, source):
    refused(network, source, "is not possible; expected a folder, a file, a Hub id or a module")


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "socket"])
@pytest.mark.parametrize("name", ["", LORA_FILE, "lora.safetensors", WEIGHTS, "unet/config.json", RECORD])
def test_what_is_no_regular_file(network, whole, kind, name, tmp_path):
    """The source itself, or a file in its folder. A record is left out where it is none."""
    if name in (WEIGHTS, RECORD, "unet/config.json"):
        moved(network, 1, 0.05).save_pretrained(tmp_path / "n" / "unet")
        (tmp_path / "n" / name).unlink(missing_ok=True)
    path = tmp_path / "n" / (name or "x.safetensors")
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "socket": "/dev/tty"}[kind])
    source = tmp_path / "n" if name else path
    if name == RECORD:
        load_negative(network, source)
    else:
        refused(network, source, str(source))


def test_a_folder_with_very_many_entries(network, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FOLDER_ENTRIES", 20)
    for i in range(25):
        (tmp_path / f"{i}.png").touch()
    refused(network, tmp_path, "has more than 20 entries in it; name the folder or file of the model itself")


def test_shards_in_a_loop_of_links(network, copy):
    shard = sorted((copy / "full" / "unet").glob("*-of-*"))[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(network, copy / "full", f"{shard.name} is missing")


# Headers


def write_header(path: Path, header: object, content: int = 0) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(content))
    return path


def entry(shape: object = (0,), offsets: object = (0, 0), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "tensors; expected at most": {f"{i}": entry() for i in range(MAX_TENSORS + 1)},
    "characters; expected at most": {"x" * (MAX_NAME_CHARACTERS + 1): entry()},
    "no JSON object": [1],
    "is no shape and dtype": {"x": 3},
    "is no shape and dtype ": {"x": entry(shape=["a"])},
    "is no shape and dtype  ": {"x": entry(dtype=["F32"])},
    "its metadata is no table": {"__metadata__": {"a": 1}},
    "its metadata is no table ": {"__metadata__": [1]},
    "recursion": DEEP.encode(),
    "cannot load": {"lora_\udfff": entry()},
    "cannot load ": {"lora": entry(shape=[10**12, 10**12], offsets=[0, 10])},
    "cannot load  ": {"lora": entry(shape=[-1])},
    "cannot load   ": {"lora": entry(dtype="F33")},
    "cannot load    ": b"\xff\xfe",
    "cannot load     ": b"1" * 5000,
    "cannot load      ": {"lora": entry(offsets=[10**30, 10**31])},
}


@pytest.mark.parametrize("message", HEADERS)
def test_headers(network, tmp_path, message):
    refused(network, write_header(tmp_path / "x.safetensors", HEADERS[message]), message.strip())


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_of_many_bytes_is_not_read(network, tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
    refused(network, tmp_path / "x.safetensors", f"its header has {size:,} bytes; expected at most")


@pytest.mark.parametrize("letter", ["\0", "\n", "\x1b[2J", "\u202e", "é", " "])
def test_odd_letters_in_names(network, whole, tmp_path, letter):
    state = load_file(whole / "lora" / LORA_FILE)
    key = f"unet.conv{letter}in.lora_A.weight"
    save_file(state | {key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    refused(network, tmp_path / "x.safetensors", "does not fit the model")
    state = moved(network, 1, 0.05).state_dict()
    save_file(state | {f"a{letter}b" + "c" * 500: torch.ones(2)}, tmp_path / "y.safetensors")
    refused(network, tmp_path / "y.safetensors", "does not fit the model")


def test_a_weight_in_two_shards(network, copy):
    first, second = sorted((copy / "full" / "unet").glob("*-of-*"))[:2]
    name = min(load_file(first))
    save_file(load_file(second) | {name: torch.ones(1)}, second)
    refused(network, copy / "full", f"holds {name} in two files")


def test_a_sparse_file_is_not_read(network, tmp_path):
    """Many zeros that take no room on the disk, as the factors of a huge rank."""
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    rank = 10**7
    assert rank > MAX_RANK
    names = {f"{layer}.lora_A.weight": [rank, 16], f"{layer}.lora_B.weight": [16, rank]}
    header, end = {}, 0
    for name, shape in names.items():
        header[name] = entry(shape, [end, end + 64 * rank])
        end += 64 * rank
    path = write_header(tmp_path / "x.safetensors", header)
    os.truncate(path, path.stat().st_size + end)
    refused(network, path, f"has rank {rank:,}; expected at most {MAX_RANK:,}")


# JSON next to the weights, and in them

JSON_FILES = [
    "full/unet/config.json", "full/scheduler/scheduler_config.json", f"full/{RECORD}",
    "full/unet/diffusion_pytorch_model.safetensors.index.json", f"peft/{PEFT_CONFIG}",
]  # fmt: skip
TEXTS = {
    "deep": DEEP,
    "half deep": '{"_class_name": ' + "[" * 900 + "]" * 900 + "}",
    "a long number": '{"a": ' + "9" * 5000 + "}",
    "no UTF-8": None,
    "a list": "[]",
    "nothing": "",
    "null": "null",
    "cut": '{"a": ',
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_json_files(network, copy, name, text):
    content = TEXTS[text]
    (copy / name).write_bytes(b'{"a": "\xff"}' if content is None else content.encode())
    folder = copy / name.partition("/")[0]
    if text == "half deep" and "scheduler" in name:
        load_negative(network, folder)  # a scheduler of an unknown class is said, and not compared
    else:
        refused(network, folder)


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "selfnpo_base"])
@pytest.mark.parametrize("text", [DEEP, "[]", "{", "9" * 5000, '{"unet.r": ' + "[" * 900 + "]" * 900 + "}"])
def test_metadata(network, whole, tmp_path, key, text):
    save_file(load_file(whole / "lora" / LORA_FILE), tmp_path / "x.safetensors", metadata={key: text})
    refused(network, tmp_path / "x.safetensors", str(tmp_path))


# What a config may hold: any value in place of any other

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("x" * 2000)
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("name", [*JSON_FILES, "metadata", "record"])
@fuzz(15)
@given(data=st.data())
def test_values_of_other_kinds(network, whole, tmp_path_factory, name, data):
    """One value is replaced, or one is added, at any depth: the negative loads or one line refuses
    it."""
    folder = tmp_path_factory.mktemp("values") / "copy"
    shutil.copytree(whole, folder)
    in_lora = name in ("metadata", "record")
    part = "lora" if in_lora else name.partition("/")[0]
    if in_lora:
        config = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 1}, "unet.use_rslora": False}
        facts = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "zero_terminal_snr": False}
        shape = {"shape": [8, 4, 3, 3], "values": [0.0] * 16}
        record = {
            "path": "x",
            "fingerprint": {"conv_in.weight": shape},
            "schedule": facts | {"alphas_cumprod": [0.5] * 33},
        }
        values = config if name == "metadata" else record
    else:
        values = json.loads((folder / name).read_text())
    place = values
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [
            value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, dict | list)
        ]
        place = data.draw(st.sampled_from(inner)) if inner else place
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = data.draw(st.sampled_from(keys)) if keys else None
    value = data.draw(VALUES)
    if key is not None:
        place[key] = value
    if in_lora:
        text = {"lora_adapter_metadata": json.dumps(config), "selfnpo_base": json.dumps(record)}
        state = load_file(folder / "lora" / LORA_FILE)
        save_file(state, folder / "lora" / LORA_FILE, metadata={key: text[key] for key in text})
    else:
        (folder / name).write_text(json.dumps(values))
    try:
        load_negative(network, folder / part)
    except UserError as error:
        assert_one_line(str(error))


@fuzz(25)
@given(data=st.data())
def test_flipped_and_cut_files(base, network, pipe, whole, tmp_path_factory, data):
    """Any bytes of any file: loading and merging give the same kind of answer."""
    folder = tmp_path_factory.mktemp("bytes")
    shutil.copytree(whole, folder / "copy")
    part = data.draw(st.sampled_from(["full", "lora", "peft"]))
    files = sorted(path for path in (folder / "copy" / part).rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, head - 1))
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0')))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    for door in (
        lambda: load_negative(network, folder / "copy" / part),
        lambda: merge(base, folder / "copy" / part, folder / "merged"),
        lambda: attach_negative(pipe, folder / "copy" / part).detach(),
    ):
        try:
            door()
        except UserError as error:
            assert_one_line(str(error))
    assert not list(folder.glob(".writing-*"))


# Patterns


def peft_scales(patterns: dict[str, float]) -> dict[str, float]:
    """The scale of each layer by PEFT's own reading of alpha_pattern."""
    network = tiny.unet()
    targets = ["to_q", "to_k", "to_out.0", "conv1"]
    network.add_adapter(LoraConfig(target_modules=targets, r=1, lora_alpha=1, alpha_pattern=patterns))
    return {name: m.scaling["default"] for name, m in network.named_modules() if isinstance(m, LoraLayer)}


PATTERNS = [
    {"to_k": 5, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 7},
    {"attn2.*to_q": 4, "to_q": 3},
    {"to_q": 3, "attn2.*to_q": 4},
    {"^down_blocks.0.resnets.0.conv1": 2, "^to_q": 9},
    {r"attn1\.to_q": 2, r"attn1\.to_out\.0$": 6, ".*": 8},
    {"down_blocks.*attn1.*to_q": 2, "^up_blocks.*": 3, "resnets.*conv1": 4},
    {"q": 2, "o_q": 3, "": 4, "attn": 5},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_are_pefts(patterns):
    expected = peft_scales(patterns)
    scaling = Scaling.of_config({"lora_alpha": 1, "alpha_pattern": patterns}, expected)
    assert {layer: scaling.scale(layer, 1) for layer in expected} == expected


@pytest.mark.parametrize(
    "pattern",
    [EVIL, "(x+x+)+y", "(to_q|to_k)", "[a-z]+", "a|b", "x{1,9999}", "(?:.*)*", "x" * 600, "\n", "a b", "to_q+", "\\"],
)
@pytest.mark.parametrize("place", ["metadata", "adapter_config"])
def test_other_expressions_are_not_run(network, copy, pattern, place):
    if place == "metadata":
        text = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
        path = copy / "lora" / LORA_FILE
        save_file(load_file(path), path, metadata={"lora_adapter_metadata": text})
        refused(network, copy / "lora", "alpha_pattern that is not readable", "expected names of layers")
    else:
        (copy / "peft" / PEFT_CONFIG).write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": {pattern: 1}}))
        refused(network, copy / "peft", "alpha_pattern that is not readable")


def test_patterns_are_counted(network, copy):
    many = {f"a.*{i}": 1 for i in range(300)}
    (copy / "peft" / PEFT_CONFIG).write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": many}))
    refused(network, copy / "peft", "with 300 wildcards; expected at most 256")


def test_other_patterns_of_a_config_are_not_read(network, copy):
    """rank_pattern and target_modules may be any expressions: shapes say the ranks."""
    config = {"lora_alpha": 2, "rank_pattern": {EVIL: 3}, "target_modules": EVIL, "exclude_modules": EVIL}
    (copy / "peft" / PEFT_CONFIG).write_text(json.dumps(config | {"layers_pattern": EVIL}))
    assert load_negative(network, copy / "peft").deltas


# Commands


@pytest.mark.parametrize("command", ["sample", "correlate", "merge", "evaluate"])
@pytest.mark.parametrize("damage", ["pipe", "deep", "tensors", "evil", "missing"])
def test_commands(base, copy, tmp_path, command, damage):
    path = copy / "lora" / LORA_FILE
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "deep":
        save_file(load_file(path), path, metadata={"selfnpo_base": DEEP})
    elif damage == "tensors":
        write_header(path, HEADERS["tensors; expected at most"])
    elif damage == "evil":
        text = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {EVIL: 1}})
        save_file(load_file(path), path, metadata={"lora_adapter_metadata": text})
    source, output = copy / "nowhere" if damage == "missing" else copy / "lora", str(tmp_path / "output")
    words = {
        "sample": ["--model", str(base), "--prompt", "a", "--output", output],
        "correlate": ["--model", str(base)],
        "merge": ["--base", str(base), "--output", output],
        "evaluate": ["--output", output],
    }[command]
    code, error = call(cli.main, [command, "--negative", str(source), *words])
    assert_refused(code, error, "negative: ", str(source))
    assert not Path(output).exists()
