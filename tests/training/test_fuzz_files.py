"""Model folders that are truncated, bit-flipped or hostile: they load, or one line refuses them.

No code of theirs runs. A flip inside the numbers of a tensor looks like training without a hash;
only numbers that are not finite are refused.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from fuzzing import Marked, assert_one_line, assert_refused, call, fuzz, hostile_pickle
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_negatives import load_network

from selfnpo_fast import cli, train
from selfnpo_fast.config import LoraConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import LORA_FILE
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training.lora import add_lora

CPU = torch.device("cpu")
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = {
    "model_index": "model_index.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "vocabulary": "tokenizer/tokenizer.json",
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Path:
    """The same architecture with other weights, as a negative has them."""
    return tiny.write_sd(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def model(whole, tmp_path_factory) -> Path:
    """A copy to damage; `damaged` puts the file back."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(whole, folder)
    return folder


@pytest.fixture(scope="session")
def lora(whole, tmp_path_factory) -> Path:
    """A folder with the LoRA file of a negative model."""
    folder = tmp_path_factory.mktemp("lora")
    network = load_adapter(str(whole)).load_denoiser(torch.float32)
    add_lora(network, LoraConfig(rank=2), 0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)  # a LoRA of zeros, as at the start, is refused
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(network))
    return folder


def load_unet(adapter) -> None:
    assert min(adapter.latent_shape) > 0
    assert all(parameter.isfinite().all() for parameter in adapter.load_denoiser(torch.float32).parameters())


def load_vae(adapter) -> None:
    assert min(adapter.latent_shape) > 0
    assert all(parameter.isfinite().all() for parameter in adapter.vae.parameters())


def load_text(adapter) -> None:
    assert all(row.isfinite().all() for row in adapter.encode_prompts(["a cat"], CPU).values())


def load_schedule(adapter) -> None:
    alpha, sigma = adapter.schedule.alpha_sigma(torch.arange(adapter.schedule.num_train_timesteps))
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()


READERS = {
    "unet": [load_unet],
    "vae": [load_vae],
    "text_encoder": [load_text],
    "tokenizer": [load_text],
    "vocabulary": [load_text],
    "scheduler": [load_schedule],
    "model_index": [load_text, load_schedule],
}
"""What reads each file; a file that loads has to be of use."""


def load_part(folder: Path, part: str) -> None:
    adapter = load_adapter(str(folder))
    for read in READERS[part]:
        read(adapter)


def load_all(folder: Path) -> None:
    for part in READERS:
        load_part(folder, part)


def loads(load: Callable[[], object], named: str) -> bool:
    """Whether `load` succeeds; if not, its error is a UserError of one line that holds `named`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and diffusers, for a config that is odd and loads
        try:
            load()
        except UserError as error:
            # The schedule knows the option's name, but no folder.
            assert_one_line(str(error), *([] if str(error).startswith("prediction_type: ") else [named]))
            return False
    return True


def damaged(path: Path, content: bytes, load: Callable[[], object], named: str) -> bool:
    """`loads` with other content in the file `path`, which is put back."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        return loads(load, named)
    finally:
        path.write_bytes(before)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


SHARES = st.floats(0, 1, exclude_max=True)


def test_the_whole_folder_loads(whole, other, lora):
    load_all(whole)
    load_network(load_adapter(str(whole)), str(other), torch.float32)
    load_network(load_adapter(str(whole)), str(lora), torch.float32)


@pytest.mark.parametrize("part", WEIGHTS)
@fuzz(15)
@given(share=SHARES, longer=st.binary(max_size=20))
def test_truncated_weights(model, part, share, longer):
    """safetensors knows where the last tensor ends: a file with fewer or more bytes is refused."""
    path = model / WEIGHTS[part]
    content = path.read_bytes()
    assert not damaged(path, content[: int(share * len(content))], lambda: load_part(model, part), str(model))
    if longer:
        assert not damaged(path, content + longer, lambda: load_part(model, part), str(model))


def check_header_flip(model: Path, part: str, share: float) -> None:
    path = model / WEIGHTS[part]
    content = path.read_bytes()
    damaged(path, flipped(content, int(share * 8 * header_size(content))), lambda: load_part(model, part), str(model))


@pytest.mark.parametrize("part", WEIGHTS)
@fuzz(20)
@given(share=SHARES)
def test_flips_in_headers(model, part, share):
    check_header_flip(model, part, share)


@pytest.mark.slow
@pytest.mark.parametrize("part", WEIGHTS)
@fuzz(300)
@given(share=SHARES)
def test_many_flips_in_headers(model, part, share):
    check_header_flip(model, part, share)


@pytest.mark.parametrize("part", WEIGHTS)
@fuzz(10)
@given(share=SHARES)
def test_flips_in_tensors(model, part, share):
    """The weights are still numbers, or they are refused."""
    path = model / WEIGHTS[part]
    content = path.read_bytes()
    start = 8 * header_size(content)
    bit = start + int(share * (8 * len(content) - start))
    damaged(path, flipped(content, bit), lambda: load_part(model, part), str(model))


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(model, part, value):
    path = model / WEIGHTS[part]
    before = path.read_bytes()
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = value
    save_file(weights, path, metadata={"format": "pt"})
    content = path.read_bytes()
    path.write_bytes(before)
    assert not damaged(path, content, lambda: load_part(model, part), f"{name} is not finite")


def check_json_damage(model: Path, name: str, share: float, cut: bool, junk: bytes) -> None:
    """A flip of one bit, a cut, and junk in the middle.

    A single bit changes one digit at most: larger numbers could ask for layers without end.
    """
    path = model / CONFIGS[name]
    content = path.read_bytes()
    bit = int(share * 8 * len(content))
    damaged(path, flipped(content, bit), lambda: load_part(model, name), str(model))
    if cut:
        end = bit // 8
        damaged(path, content[:end], lambda: load_part(model, name), str(model))
        if not junk.strip().isdigit():
            damaged(path, content[:end] + junk + content[end:], lambda: load_part(model, name), str(model))


JUNK = st.sampled_from([b"\0", b"\xff", b'"', b"{", b"}", b",", b"null", b"[]", b"-", b" ", b'"a": 1,'])


@pytest.mark.parametrize("name", CONFIGS)
@fuzz(15)
@given(share=SHARES, cut=st.booleans(), junk=JUNK)
def test_damaged_json(model, name, share, cut, junk):
    check_json_damage(model, name, share, cut, junk)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@fuzz(80)
@given(share=SHARES, cut=st.booleans(), junk=JUNK)
def test_much_damaged_json(model, name, share, cut, junk):
    check_json_damage(model, name, share, cut, junk)


SHAPES = [b"", b"[]", b"3", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{", b"9" * 5000]
VALUES = [None, True, "", "x", "0", -1, 0, 0.5, float("nan"), float("inf"), [], [[]], {}, {"a": 1}, [None, None]]


@pytest.mark.parametrize("name", CONFIGS)
@fuzz(20)
@given(data=st.data())
def test_json_with_other_values(model, name, data):
    """One entry of another type, or out of its range; or the whole file."""
    path = model / CONFIGS[name]
    value = data.draw(st.sampled_from(VALUES))
    content = json.loads(path.read_text())
    key = data.draw(st.sampled_from([None, *content]))
    content = value if key is None else content | {key: value}
    damaged(path, json.dumps(content).encode(), lambda: load_part(model, name), str(model))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("content", SHAPES)
def test_json_of_other_shapes(model, name, content):
    damaged(model / CONFIGS[name], content, lambda: load_part(model, name), str(model))


@pytest.mark.parametrize("change", [{"beta_end": 8.5}, {"beta_start": -1.0, "beta_schedule": "linear"}])
def test_noise_levels_out_of_range(model, change):
    """Betas above 1 or below 0, for which alphas_cumprod is no share of the variance."""
    path = model / CONFIGS["scheduler"]
    content = json.dumps(json.loads(path.read_text()) | change).encode()
    assert not damaged(path, content, lambda: load_part(model, "scheduler"), "outside of 0 to 1")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_lora_files(whole, lora, share, damage):
    path = lora / LORA_FILE
    content = path.read_bytes()
    offset = int(share * header_size(content))
    changed = content[: int(share * len(content))] if damage == "cut" else flipped(content, 8 * offset + 1)
    adapter = load_adapter(str(whole))
    loaded = damaged(path, changed, lambda: load_network(adapter, str(lora), torch.float32), str(lora))
    assert not (loaded and damage == "cut")


@pytest.mark.parametrize("name", [WEIGHTS["unet"], CONFIGS["unet"]])
@fuzz(25)
@given(share=SHARES, bit=st.booleans())
def test_damaged_negative_folders(whole, other, name, share, bit):
    path = other / name
    content = path.read_bytes()
    size = header_size(content) if name.endswith("safetensors") else len(content)
    offset = int(share * size)
    changed = flipped(content, 8 * offset + bit) if bit else content[:offset]
    adapter = load_adapter(str(whole))
    damaged(path, changed, lambda: load_network(adapter, str(other), torch.float32), str(other))


# Hostile folders

CODE = "import os\nos.mkdir({marker!r})\nclass MyUNet: pass\nclass StableDiffusionPipeline: pass\n"


@pytest.fixture
def hostile(whole, tmp_path, monkeypatch) -> Path:
    """A copy of the model with modules that make `tmp_path/marker` when they are imported.

    Its folder is on the path.
    """
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    code = CODE.format(marker=str(tmp_path / "marker"))
    for folder_of_part in ("", *(f"{part}/" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))):
        for name in ("hostile_module", "my_unet", "pipeline", "my_pipeline"):
            (folder / f"{folder_of_part}{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    ran = [name for name in ("hostile_module", "my_unet", "my_pipeline") if sys.modules.pop(name, None)]
    assert not ran
    assert not (tmp_path / "marker").exists()


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused_by_commands(folder: Path, *words: str) -> None:
    """`train` and `sample` refuse the folder as their model."""
    output = folder.parent / "output"
    ends = ["--output", str(output)]
    config = ["--config", str(train.DEFAULT_CONFIG)]
    assert_refused(*call(train.main, [*config, "--model.path", str(folder), *ends]), *words)
    assert_refused(*call(cli.main, ["sample", "--model", str(folder), "--prompt", "a", *ends]), *words)
    assert not output.exists()


def pickled(folder: Path, name: str) -> None:
    """A file in torch's format, as a .bin is, around an object that makes the marker."""
    torch.save({"conv_in.weight": Marked(folder.parent / "marker")}, folder / name)


BIN = {"unet": "diffusion_pytorch_model.bin", "vae": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}


def test_the_trap_works(tmp_path):
    (tmp_path / "model").mkdir()
    pickled(tmp_path / "model", "x.bin")
    torch.load(tmp_path / "model" / "x.bin", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_pickle_next_to_the_weights_is_not_read(hostile, part):
    pickled(hostile, f"{part}/{BIN[part]}")
    load_all(hostile)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("raw", [False, True])
def test_a_pickle_in_place_of_the_weights_is_refused(hostile, part, raw):
    """As the only .bin, and under the name of the safetensors; a bare pickle or torch's."""
    (hostile / WEIGHTS[part]).unlink()
    for name in (f"{part}/{BIN[part]}", WEIGHTS[part]):
        pickled(hostile, name)
        if raw:
            (hostile / name).write_bytes(hostile_pickle(hostile.parent / "marker"))
        refused_by_commands(hostile, f"cannot load {part.replace('_', ' ')}")


@pytest.mark.parametrize("honest", [False, True])
@pytest.mark.parametrize("part", WEIGHTS)
def test_shards_may_not_be_pickles(hostile, part, honest):
    """A list of shards that names a .bin is refused, also where the pickle holds only weights."""
    path = hostile / WEIGHTS[part]
    weights = load_file(path)
    path.unlink()
    torch.save(weights, path.with_name("x.bin"))
    if not honest:
        pickled(hostile, f"{part}/x.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "x.bin")}
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))
    assert not loads(lambda: load_all(hostile), "not safetensors")


@pytest.mark.parametrize(
    "part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "surprise"]
)
@pytest.mark.parametrize(
    "entry", [["hostile_module", "MyUNet"], ["my_unet", "MyUNet"], ["os", "mkdir"], ["unet.my_unet", "A"]]
)
def test_model_index_names_no_code_for_a_part(hostile, part, entry):
    edit(hostile / "model_index.json", **{part: entry})
    assert not loads(lambda: load_adapter(str(hostile)), "names code of its own")


@pytest.mark.parametrize(
    "name",
    ["MyPipeline", "hostile_module", ["my_pipeline", "StableDiffusionPipeline"], ["pipeline", "A"], {"a": 1}, 3, None],
)
def test_model_index_names_no_pipeline_code(hostile, name):
    edit(hostile / "model_index.json", _class_name=name)
    refused_by_commands(hostile, "supported are StableDiffusionPipeline")


def test_commands_refuse_code_in_one_line(hostile):
    edit(hostile / "model_index.json", unet=["hostile_module", "MyUNet"])
    refused_by_commands(hostile, "names code of its own for unet")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize("key", ["_class_name", "auto_map", "custom_pipeline", "architectures", "tokenizer_class"])
def test_configs_of_parts_run_no_code(hostile, part, key):
    """The adapters choose the classes: those that a part's config names are refused or ignored."""
    auto = {name: "hostile_module.MyUNet" for name in ("AutoModel", "AutoConfig", "AutoTokenizer")}
    values = {"auto_map": auto, "architectures": ["hostile_module.MyUNet"]}
    edit(hostile / CONFIGS[part], **{key: values.get(key, "hostile_module.MyUNet")}, trust_remote_code=True)
    loads(lambda: load_all(hostile), str(hostile))


@pytest.mark.parametrize("damage", ["bin", "named safetensors", "lora", "index"])
def test_hostile_negatives_are_refused(hostile, whole, damage):
    weights = hostile / WEIGHTS["unet"]
    weights.unlink()
    if damage == "bin":
        pickled(hostile, f"unet/{BIN['unet']}")
    elif damage == "named safetensors":
        pickled(hostile, WEIGHTS["unet"])
    elif damage == "lora":
        pickled(hostile, LORA_FILE)
    else:
        pickled(hostile, "unet/x.bin")
        index = {"metadata": {}, "weight_map": {"conv_in.weight": "x.bin"}}
        weights.with_name(weights.name + ".index.json").write_text(json.dumps(index))
    output = hostile.parent / "output"
    words = ["sample", "--model", str(whole), "--negative", str(hostile), "--prompt", "a", "--output", str(output)]
    code, error = call(cli.main, words)
    assert_refused(code, error, "negative: cannot load")
    assert not output.exists()
