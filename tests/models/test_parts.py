"""The files of a model's parts: which are taken, from a folder and from a Hub repository alike, and
which are refused with one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from fuzzing import assert_one_line
from safetensors.torch import load_file, save_file

from selfnpo_fast.models import load_adapter
from selfnpo_fast.runtime import console
from selfnpo_fast.runtime.errors import UserError

CPU = torch.device("cpu")
UNET, VAE, TEXT, TEXT_2 = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
)
SHA = "0123456789" * 4


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {"sd": tiny.write_sd(folder / "sd"), "sdxl": tiny.write_sdxl(folder / "sdxl")}


@pytest.fixture(params=["folder", "Hub"])
def place(request, tmp_path, monkeypatch):
    """Copies a pipeline to a place of the test's own: gives the folder of its files, and the path
    by which a user names it."""

    def put(source: Path) -> tuple[Path, str]:
        if request.param == "folder":
            shutil.copytree(source, tmp_path / "model")
            return tmp_path / "model", str(tmp_path / "model")
        repository = tmp_path / "hub" / "models--org--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(SHA)
        shutil.copytree(source, repository / "snapshots" / SHA)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return repository / "snapshots" / SHA, "org/name"

    return put


@pytest.fixture
def said(monkeypatch, caplog):
    """The lines said so far, with none said before."""
    monkeypatch.setattr(console, "_said", set())
    return lambda word: [record.getMessage() for record in caplog.records if word in record.getMessage()]


def read_all(path: str, **options) -> dict[str, torch.Tensor]:
    """All that an adapter loads, as numbers."""
    adapter = load_adapter(path, **options)
    tensors = dict(adapter.load_denoiser(torch.float32).state_dict())
    tensors |= {f"vae.{name}": value for name, value in adapter.vae.state_dict().items()}
    return tensors | adapter.encode_prompts(["a cat"], CPU)


def rename_keys(path: Path, rename) -> None:
    tensors = {rename(name): value for name, value in load_file(path).items() if rename(name) is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(path: str, *words: str, **options) -> str:
    """The one line by which a model is refused."""
    with pytest.raises(UserError) as refused:
        read_all(path, **options)
    assert_one_line(str(refused.value), "model.path", *words)
    return str(refused.value)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_is_loaded_is_what_diffusers_loads(written, place, family):
    root, path = place(written[family])
    cls = StableDiffusionPipeline if family == "sd" else StableDiffusionXLPipeline
    pipe = cls.from_pretrained(root, torch_dtype=torch.float32)
    expected = dict(pipe.unet.state_dict()) | {f"vae.{name}": value for name, value in pipe.vae.state_dict().items()}
    encoded = pipe.encode_prompt(["a cat"], device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    expected["encoder_hidden_states"] = encoded[0]
    if family == "sdxl":
        expected["text_embeds"] = encoded[2]
    found = read_all(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert load_adapter(path).folder.commit == (SHA if path == "org/name" else None)


def test_a_revision_is_the_commit_that_it_names(written, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, sha, family in (("main", SHA, "sd"), ("v2", SHA[::-1], "sdxl")):
        (repository / "refs" / revision).write_text(sha)
        shutil.copytree(written[family], repository / "snapshots" / sha)
    assert load_adapter("org/name").folder.commit == SHA
    other = load_adapter("org/name", revision="v2")
    assert other.folder.commit == SHA[::-1]
    assert "text_embeds" in other.conditioning_shapes
    for missing in (("org/name", "v3"), ("org/nothing", None)):
        with pytest.raises(UserError, match=rf"^model.path: {missing[0]} was not found on the Hub"):
            load_adapter(missing[0], revision=missing[1])


@pytest.mark.parametrize("file", [UNET, VAE, TEXT, TEXT_2])
@pytest.mark.parametrize("damage", ["lacks one", "another prefix", "another shape"])
def test_missing_keys_are_named(written, place, file, damage):
    root, path = place(written["sdxl"])
    tensors = load_file(root / file)
    last = sorted(tensors)[-1]
    if damage == "lacks one":
        rename_keys(root / file, lambda name: None if name == last else name)
    elif damage == "another prefix":
        rename_keys(root / file, lambda name: f"other.{name}")
    else:
        tensors[last] = tensors[last].new_zeros(*tensors[last].shape, 2)
        save_file(tensors, root / file, metadata={"format": "pt"})
    part = file.partition("/")[0].replace("_", " ")
    refusal(path, f"cannot load {part}", last if damage != "another prefix" else f"and {len(tensors) - 1} more")


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "unet"])
@pytest.mark.parametrize("entry", [[None, None], None, "absent"])
def test_a_part_that_is_null_is_named(written, place, part, entry):
    root, path = place(written["sd"])
    tiny.edit(root / "model_index.json", **{part: entry})
    if entry == "absent":
        index = json.loads((root / "model_index.json").read_text())
        del index[part]
        (root / "model_index.json").write_text(json.dumps(index))
    refusal(path, f"has no {part}", "all of its parts")


def test_a_model_without_tokenizer_is_refused(written, place):
    root, path = place(written["sd"])
    (root / "tokenizer" / "tokenizer.json").unlink()
    refusal(path, "cannot load tokenizer", "vocab.json")  # transformers makes an empty one, without a word
    shutil.rmtree(root / "tokenizer")
    refusal(path, "has no tokenizer")


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("text_encoder", ["diffusers", "StableDiffusionPipeline"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("unet", ["diffusers", "UNetMotionModel"]),
        ("scheduler", ["diffusers", "StableDiffusionPipeline"]),
        ("scheduler", ["diffusers", ["DDIMScheduler"]]),
    ],
)
def test_a_part_has_to_be_of_a_class_of_the_family(written, place, part, entry):
    root, path = place(written["sd"])
    tiny.edit(root / "model_index.json", **{part: entry})
    read = load_adapter if part != "scheduler" else lambda path: load_adapter(path).schedule
    with pytest.raises(UserError) as refused:
        read(path)
    assert_one_line(str(refused.value), part, str(entry[1]))


def test_a_pipeline_inside_of_a_part_is_not_opened(written, place):
    """Diffusers would load a whole pipeline there, with pickles where it finds them."""
    root, path = place(written["sd"])
    shutil.copytree(root, root / "nested")
    shutil.rmtree(root / "text_encoder")
    (root / "nested").rename(root / "text_encoder")
    tiny.edit(root / "model_index.json", text_encoder=["diffusers", "StableDiffusionPipeline"])
    refusal(path, "has a StableDiffusionPipeline as text_encoder", "CLIPTextModel")


def test_taesd_is_refused(written, place):
    root, path = place(written["sd"])
    shutil.rmtree(root / "vae")
    blocks = {"encoder_block_out_channels": (4,), "decoder_block_out_channels": (4,)}
    layers = {"num_encoder_blocks": (1,), "num_decoder_blocks": (1,)}
    AutoencoderTiny(**blocks, **layers).save_pretrained(root / "vae")
    refusal(path, "vae", "AutoencoderTiny", "AutoencoderKL")


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_pickles_are_not_read_wherever_from(written, place, file):
    root, path = place(written["sd"])
    tensors = load_file(root / file)
    (root / file).unlink()
    torch.save(tensors, (root / file).with_suffix(".bin"))
    name = Path(file).with_suffix(".bin").name
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    (root / f"{file}.index.json").write_text(json.dumps(index))
    refusal(path, "not safetensors")
    (root / f"{file}.index.json").unlink()
    refusal(path, "pickled weights are not read")


def test_a_text_encoder_s_config_names_no_file_to_load(written, place):
    """`transformers_weights` names a file and adapter_config.json a model, which transformers
    reads."""
    root, path = place(written["sd"])
    expected = read_all(path)
    torch.save({}, root / "text_encoder" / "other.bin")
    tiny.edit(root / "text_encoder" / "config.json", transformers_weights="other.bin", attn_implementation="org/kernel")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/other"}
    (root / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))
    found = read_all(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def to_variant(root: Path, file: str, variant: str) -> None:
    (root / file).rename(root / file.replace(".safetensors", f".{variant}.safetensors"))


def test_a_variant_of_some_parts(written, place, said):
    """As diffusers loads it: the variant where a part has it, plain weights elsewhere."""
    root, path = place(written["sd"])
    expected = read_all(path)
    to_variant(root, UNET, "fp16")
    (root / UNET).write_bytes((root / VAE).read_bytes())  # the plain weights are others
    assert "conv_in.weight" in StableDiffusionPipeline.from_pretrained(root, variant="fp16").unet.state_dict()
    for _ in range(2):
        found = read_all(path, variant="fp16")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(said("has no fp16 variant; its plain weights are taken")) == 2  # vae and text encoder, once each


def test_a_sole_variant_is_taken(written, place, said):
    root, path = place(written["sd"])
    expected = read_all(path)
    for file in (UNET, VAE, TEXT):
        to_variant(root, file, "fp16")
    found = read_all(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(said("has only the fp16 variant")) == 3


def test_a_variant_that_no_part_has_is_refused(written, place):
    _, path = place(written["sd"])
    refusal(path, "there is no bf16 variant (there is: plain weights)", variant="bf16")


def test_shards_are_loaded(written, place):
    root, path = place(written["sd"])
    expected = read_all(path)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors = load_file(root / part / f"{stem}.safetensors")
        (root / part / f"{stem}.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            share = {name: tensors[name] for name in names if weight_map[name] == file}
            save_file(share, root / part / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (root / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        # A list of pickles beside it is somebody else's.
        (root / part / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    found = read_all(path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    (root / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    refusal(path, "model-00002-of-00002.safetensors", "no such file")


READ = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", UNET, TEXT)
READ_LATER = ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("name", READ + READ_LATER)
def test_pipes_are_not_waited_for(written, tmp_path, name):
    shutil.copytree(written["sd"], tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    os.mkfifo(tmp_path / "model" / name)
    with pytest.raises(UserError, match="no regular file"):
        load_adapter(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "path", ["a\0b", "./a\0b", "/tmp/\ud800", "org/\ud800", "org/na me", "x" * 5000, "./" + "y/" * 3000]
)
def test_odd_paths_are_refused(path):
    with pytest.raises(UserError, match=r"^model\.path: "):
        load_adapter(path)
