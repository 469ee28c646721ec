"""Loading a negative: saved weights come back, Eq. 7 holds, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_negatives import load_network, merged, moved, output, save_with_diffusers, with_lora

from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives import weights as weights_module
from selfnpo_fast.negatives.fingerprint import base_record, fingerprint, matches
from selfnpo_fast.negatives.load import as_network, load_negative
from selfnpo_fast.negatives.sources import LORA_FILE, RECORD
from selfnpo_fast.negatives.weights import WeightReader, mix, module_weights
from selfnpo_fast.negatives.write import write_lora
from selfnpo_fast.runtime.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(str(tiny.write_sd(tmp_path_factory.mktemp("base"))))


@pytest.fixture
def trained() -> torch.nn.Module:
    torch.manual_seed(7)
    return tiny.unet().eval()


@pytest.fixture(scope="module")
def base(adapter) -> torch.nn.Module:
    return adapter.load_denoiser(torch.float32)


@pytest.fixture(scope="module")
def tuned(base) -> torch.nn.Module:
    """A fine-tune: theta + eta."""
    return moved(base, 11, 0.05)


def assert_eq7(network: torch.nn.Module, theta, positive, delta: dict, alpha: float, beta: float) -> None:
    """The weights are theta + alpha eta + beta delta in float64, rounded to the network's dtype."""
    theta, positive = (dict(module.state_dict()) for module in (theta, positive))
    for name, found in network.state_dict().items():
        t, p, d = theta[name].double(), positive[name].double(), delta.get(name, torch.zeros(())).double()
        expected = t + alpha * (p - t) + beta * d
        # Observed 1.3 float32 roundings of the terms' sum beyond the rounding to the dtype.
        terms = t.abs() + alpha * (p - t).abs() + beta * d.abs()
        slack = 3 * 2**-24 * terms + (torch.finfo(found.dtype).eps / 2) * expected.abs()
        assert ((found.double() - expected).abs() <= slack).all(), name


def test_eq7_in_closed_form():
    theta, positive, delta = (torch.tensor([value], dtype=torch.float64) for value in (2.0, 5.0, -4.0))
    assert mix(theta, positive, delta, 1.0, 1.0).item() == 1.0
    assert mix(theta, positive, delta, 0.5, 0.25).item() == 2.5
    assert mix(theta, positive, None, 0.0, 1.0).item() == 2.0
    assert mix(theta, positive, None, 1.0, 1.0).item() == 5.0


# Full weights


@pytest.mark.parametrize("layout", ["run", "part", "denoiser", "file", "sharded", "variant"])
def test_full_weights_come_back(base, trained, tmp_path, layout, caplog):
    run = tmp_path / "run"
    sources = {"run": run, "denoiser": run / "negative/unet", "file": run / "negative/unet" / WEIGHTS}
    source = sources.get(layout, run / "negative")
    options = {"max_shard_size": "40KB"} if layout == "sharded" else {}
    options |= {"variant": "fp16"} if layout == "variant" else {}
    trained.save_pretrained(run / "negative/unet", **options)
    assert (len(list((run / "negative/unet").glob("*.safetensors"))) > 2) == (layout == "sharded")
    negative = load_negative(base, str(source) if layout != "part" else source)
    assert negative.deltas is None
    assert negative.source == str(source)
    assert not negative.network.training
    assert not any(parameter.requires_grad for parameter in negative.network.parameters())
    assert torch.equal(output(negative.network), output(trained))
    assert bool(caplog.records) == (layout == "variant")


def test_full_weights_take_the_positives_dtype(base, trained, tmp_path):
    trained.save_pretrained(tmp_path / "unet")
    network = load_negative(copy.deepcopy(base).bfloat16(), tmp_path).network
    for name, parameter in network.state_dict().items():
        assert torch.equal(parameter, trained.state_dict()[name].to(torch.bfloat16)), name


def original_names(names: list[str]) -> dict[str, str]:
    """The original name by diffusers' name, for two blocks of one layer each.

    The names are copied from the original code.
    """
    outer = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    outer |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    inner |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    blocks = {"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op"}
    blocks |= {"down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1"}
    blocks |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    blocks |= {"mid_block.resnets.1": "middle_block.2"}
    for i in range(2):
        blocks |= {
            f"up_blocks.0.resnets.{i}": f"output_blocks.{i}.0",
            f"up_blocks.0.attentions.{i}": f"output_blocks.{i}.1",
        }
        blocks |= {f"up_blocks.1.resnets.{i}": f"output_blocks.{i + 2}.0"}
    blocks["up_blocks.0.upsamplers.0.conv"] = "output_blocks.1.2.conv"
    originals = {}
    for name in names:
        prefix = next(p for p in (*outer, *blocks) if name.startswith(f"{p}."))
        suffix = name.removeprefix(f"{prefix}.")
        if ".resnets." in prefix:
            part, _, leaf = suffix.rpartition(".")
            suffix = f"{inner[part]}.{leaf}"
        originals[name] = f"model.diffusion_model.{(outer | blocks)[prefix]}.{suffix}"
    return originals


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_checkpoint_of_the_original_code(base, tuned, trained, adapter, tmp_path, alpha):
    names = original_names(list(trained.state_dict()))
    state = {names[name]: value for name, value in trained.state_dict().items()}
    state |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    options = {"alpha": alpha, "base": adapter.path} if alpha != 1 else {}
    network = load_negative(tuned if options else base, tmp_path / "model.safetensors", **options).network
    delta = {name: value - base.state_dict()[name] for name, value in trained.state_dict().items()}
    if options:
        assert_eq7(network, base, tuned, delta, alpha, 1.0)
    else:
        assert torch.equal(output(network), output(trained))
    save_file(state | {"model.diffusion_model.input_blocks.9.0.x": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"^negative: .*more.safetensors .*input_blocks.9.0.x"):
        load_negative(base, tmp_path / "more.safetensors")
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, tmp_path / "fewer.safetensors")
    with pytest.raises(UserError, match=r"^negative: .*conv_out.weight has shape None, the model has \(4, 8, 3, 3\)"):
        load_negative(base, tmp_path / "fewer.safetensors")


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.8, 1.0), (0.0, 0.5), (0.3, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_of_full_weights(base, tuned, trained, adapter, tmp_path, alpha, beta, dtype):
    trained.save_pretrained(tmp_path / "unet")
    positive = copy.deepcopy(tuned).to(dtype)
    before = {name: value.clone() for name, value in positive.state_dict().items()}
    if beta == 0:
        with pytest.raises(UserError, match="equals the positive model"):
            load_negative(positive, tmp_path, alpha=alpha, beta=beta, base=adapter.path)
        return
    network = load_negative(positive, tmp_path, alpha=alpha, beta=beta, base=adapter.path).network
    delta = {name: value.double() - base.state_dict()[name].double() for name, value in trained.state_dict().items()}
    assert {value.dtype for value in network.state_dict().values()} == {dtype}
    assert_eq7(network, base, positive, delta, alpha, beta)
    assert all(torch.equal(value, before[name]) for name, value in positive.state_dict().items())


def test_the_positive_is_the_base_where_none_is_given(base, tuned, trained, tmp_path):
    trained.save_pretrained(tmp_path / "unet")
    delta = {name: value - base.state_dict()[name] for name, value in trained.state_dict().items()}
    assert_eq7(load_negative(base, tmp_path, beta=0.25).network, base, base, delta, 1.0, 0.25)
    # At alpha 0 full weights are unchanged, next to any positive.
    assert torch.equal(output(load_negative(tuned, tmp_path, alpha=0).network), output(trained))
    with pytest.raises(UserError, match=r"^alpha: 0.5 needs the base model"):
        load_negative(base, tmp_path, alpha=0.5)


def test_alpha_and_beta_have_the_papers_range(base, trained, tmp_path):
    trained.save_pretrained(tmp_path / "unet")
    for name in ("alpha", "beta"):
        for value in (-0.1, 1.1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=rf"^{name}: {value} is not possible; expected 0 to 1"):
                load_negative(base, tmp_path, **{name: value})


def test_a_module_is_taken_over(base, tuned, trained, adapter):
    assert load_negative(base, trained).network is trained
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    delta = {name: value - base.state_dict()[name] for name, value in trained.state_dict().items()}
    mixed = load_negative(tuned, trained, alpha=0.5, base=adapter.path)
    assert_eq7(mixed.network, base, tuned, delta, 0.5, 1.0)
    assert load_negative(tuned, mixed).network is mixed.network
    for network, message in (
        (base, "is the positive model itself"),
        (copy.deepcopy(base), "equals the positive model"),
        (torch.nn.Linear(2, 2), "which is a UNet2DConditionModel"),
        (tiny.unet(layers_per_block=2), "its layers_per_block is 2, the model's 1"),
        (tiny.unet(attention_head_dim=2), "its attention_head_dim is 2, the model's 4"),
    ):
        with pytest.raises(UserError, match=message):
            load_negative(base, network)


# One tensor at a time


class Resident:
    """Bytes of the tensors that a reader has given and that are still alive, now and at most.

    A view counts with its storage.
    """

    def __init__(self) -> None:
        self.now, self.most = 0, 0

    def watch(self, weights: WeightReader) -> WeightReader:
        def read(name: str) -> torch.Tensor:
            tensor = weights.read(name).clone()
            size = tensor.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(tensor.untyped_storage(), self._gone, size)
            return tensor

        return WeightReader(weights.source, weights.shapes, read)

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sources_are_read_one_tensor_at_a_time(base, tuned, trained, adapter, tmp_path, monkeypatch, kind):
    if kind == "full":
        trained.save_pretrained(tmp_path / "unet")
    else:
        save_with_diffusers(tmp_path, with_lora(adapter, 2, None))
    resident, real = Resident(), weights_module.file_weights
    for module in ("weights", "load"):
        target = f"selfnpo_fast.negatives.{module}.file_weights"
        monkeypatch.setattr(target, lambda *args: resident.watch(real(*args)))
    load_negative(tuned, tmp_path, alpha=0.5, base=adapter.path)
    sources = 2 if kind == "full" else 1
    largest = max(4 * value.numel() for value in base.state_dict().values())
    assert resident.now == 0
    assert 0 < resident.most <= sources * largest
    assert resident.most < 0.2 * sum(4 * value.numel() for value in base.state_dict().values())


# LoRA


@pytest.mark.parametrize("layout", ["run", "part", "file"])
@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (2, 6.0), (3, 1.0)])
def test_our_lora_comes_back_with_its_scale(adapter, base, tmp_path, rank, alpha, layout):
    network = with_lora(adapter, rank, alpha)
    folder = tmp_path / "run" / "negative"
    folder.mkdir(parents=True)
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    write_lora(folder, network, weights, adapter, base_record("b", None, module_weights(base, "b")))
    source = {"run": folder.parent, "part": folder, "file": folder / LORA_FILE}[layout]
    negative = load_negative(base, source)
    assert negative.network is None
    assert {delta.scale for delta in negative.deltas.values()} == {(alpha or rank) / rank}
    expected = output(merged(adapter, network, (alpha or rank) / rank))
    found = output(as_network(base, negative))
    # Observed 3e-6: two products instead of one.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(output(base), expected, atol=1e-3)
    pipe = StableDiffusionPipeline.from_pretrained(adapter.path)
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_lora_takes_the_positives_dtype_and_beta(adapter, base, tmp_path):
    save_with_diffusers(tmp_path, with_lora(adapter, 2, None))
    positive = copy.deepcopy(base).bfloat16()
    half, whole = (load_negative(positive, tmp_path, beta=beta).deltas for beta in (0.5, 1.0))
    for path, delta in half.items():
        assert {delta.down.dtype, delta.up.dtype} == {torch.bfloat16}
        assert delta.scale == 0.5 * whole[path].scale
    with pytest.raises(UserError, match=r"^beta: 0 leaves nothing"):
        load_negative(base, tmp_path, beta=0)
    assert {value.dtype for value in load_network(adapter, tmp_path, torch.bfloat16).state_dict().values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.6, 0.5)])
def test_mixtures_with_a_lora(adapter, base, tuned, tmp_path, alpha, beta):
    network = with_lora(adapter, 2, 6.0)
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    write_lora(tmp_path, network, weights, adapter, base_record("b", None, module_weights(base, "b")))
    mixed = load_negative(tuned, tmp_path, alpha=alpha, beta=beta, base=adapter.path)
    whole = merged(adapter, network, 3.0).state_dict()
    delta = {name: whole[name].double() - value.double() for name, value in base.state_dict().items()}
    for name, found in mixed.network.state_dict().items():
        t, p = base.state_dict()[name].double(), tuned.state_dict()[name].double()
        expected = t + alpha * (p - t) + beta * delta[name]
        # Observed 5e-7: delta is up to 10.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
    with pytest.raises(UserError, match=r"^alpha: 0.5 needs the base model"):
        load_negative(tuned, tmp_path, alpha=0.5)


def test_adapters_on_the_positive(adapter, base, trained, tmp_path):
    """A LoRA goes on top of them; what needs the positive's own weights is refused."""
    save_with_diffusers(tmp_path / "lora", with_lora(adapter, 2, None))
    trained.save_pretrained(tmp_path / "full/unet")
    positive = with_lora(adapter, 3, None)
    assert (
        load_negative(positive, tmp_path / "lora").deltas.keys() == load_negative(base, tmp_path / "lora").deltas.keys()
    )
    assert torch.equal(output(load_negative(positive, tmp_path / "full", alpha=0).network), output(trained))
    for source, alpha in (("lora", 0.5), ("full", 1.0), ("full", 0.5)):
        with pytest.raises(UserError, match=r"^alpha: .*fuse and unload"):
            load_negative(positive, tmp_path / source, alpha=alpha, base=adapter.path)


def test_deltas_of_another_positive_are_checked_again(adapter, base, tmp_path):
    save_with_diffusers(tmp_path, with_lora(adapter, 2, None))
    negative = load_negative(base, tmp_path)
    assert load_negative(tiny.unet(), negative).deltas.keys() == negative.deltas.keys()
    with pytest.raises(UserError, match=r"^negative: .*does not fit the model"):
        load_negative(tiny.unet(cross_attention_dim=32), negative)


# The base it was trained from


def with_record(folder: Path, trained: torch.nn.Module, base: torch.nn.Module) -> Path:
    trained.save_pretrained(folder / "negative/unet")
    record = base_record("some/base", None, module_weights(base, "base"))
    (folder / "negative" / RECORD).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])
def test_a_fingerprint_survives_casts_and_knows_a_fine_tune(base, dtypes):
    first, second = (copy.deepcopy(base).to(dtype) for dtype in dtypes)
    saved = json.loads(json.dumps(fingerprint(module_weights(first, ""))))
    assert matches(saved, module_weights(second, ""))
    std = sum(value.std().item() for value in base.parameters() if value.ndim > 1) / 100
    assert not matches(saved, module_weights(moved(second, 3, 0.05 * std), ""))
    assert not matches(saved, module_weights(tiny.unet(block_out_channels=(8, 32)), ""))


def test_another_base_is_refused_unless_base_or_alpha_is_given(base, tuned, trained, adapter, tmp_path):
    run = with_record(tmp_path, trained, base)
    load_negative(copy.deepcopy(base).bfloat16(), run)
    with pytest.raises(
        UserError, match=r"was trained from some/base, and the positive model has other weights"
    ) as caught:
        load_negative(tuned, run)
    assert "base='some/base'" in str(caught.value) and "alpha=0" in str(caught.value)
    assert torch.equal(output(load_negative(tuned, run, alpha=0).network), output(trained))
    load_negative(tuned, run, base=adapter.path)
    tuned.save_pretrained(tmp_path / "other/unet")
    with pytest.raises(UserError, match=r"was trained from some/base, and base .*other has other weights"):
        load_negative(tuned, run, base=tmp_path / "other")
    (run / "negative" / RECORD).write_text('{"path": "x", "fingerprint": {"conv_in.weight": 3}}')
    with pytest.raises(UserError, match="its record of the base is damaged"):
        load_negative(base, run)


def test_a_lora_on_a_fine_tune_is_a_warning(adapter, base, tuned, tmp_path, caplog):
    network = with_lora(adapter, 2, None)
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    write_lora(tmp_path, network, weights, adapter, base_record("some/base", None, module_weights(base, "")))
    with caplog.at_level(logging.WARNING):
        load_negative(base, tmp_path)
        assert not caplog.records
        load_negative(tuned, tmp_path)
    assert "was trained from some/base, and the positive model has other weights" in caplog.text


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that makes a repository in huggingface_hub's cache; there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def write(repository: str) -> Path:
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs/main").write_text("0" * 40)
        folder = root / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        return folder

    return write


def test_hub_ids(adapter, base, trained, hub, caplog):
    folder = hub("some/negatives")
    save_with_diffusers(folder, with_lora(adapter, 2, None))
    trained.save_pretrained(folder / "full/unet")
    tiny.scheduler("v_prediction").save_pretrained(folder / "full/scheduler")
    (folder / "unused.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert load_negative(base, "some/negatives").deltas
    assert "the Hub was not reached" in caplog.text
    assert load_negative(base, f"some/negatives/{LORA_FILE}").deltas
    for name in ("some/negatives/full", "some/negatives/full/unet"):
        loaded = load_negative(base, name)
        assert torch.equal(output(loaded.network), output(trained))
        assert loaded.schedule.prediction_type == "v_prediction"
    for name, message in (
        ("some/other", "no such folder or file: some/other, and it was not found on the Hub"),
        ("some/negatives/nothing.safetensors", "has no file nothing.safetensors"),
        ("some/negatives/folder", "holds neither"),
        ("some/negatives/weights.ckpt", "is a pickle"),
    ):
        with pytest.raises(UserError, match=rf"^negative: .*{message}") as caught:
            load_negative(base, name)
        assert "\n" not in str(caught.value)


# What does not fit


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(adapter, folder: Path) -> str:
    return "holds neither unet/config.json nor"


def other_shapes(adapter, folder: Path) -> str:
    tiny.unet(block_out_channels=(8, 32)).save_pretrained(folder / "unet")
    return "does not fit the model: .* has shape .*, the model has"


def more_layers(adapter, folder: Path) -> str:
    tiny.unet(layers_per_block=2).save_pretrained(folder / "unet")
    return "does not fit the model: .* has shape .*, the model has None"


def truncated(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet")
    truncate(folder / "unet" / WEIGHTS)
    return "cannot load "


def without_weights(adapter, folder: Path) -> str:
    tiny.unet().save_config(folder / "unet")
    return "cannot load negative/unet from"


def broken_config(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet")
    (folder / "unet" / "config.json").write_text("{")
    return "cannot load config.json from"


def another_class(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "UNet3DConditionModel"}))
    return "it is a UNet3DConditionModel, the model a UNet2DConditionModel"


def other_heads(adapter, folder: Path) -> str:
    tiny.unet(attention_head_dim=2).save_pretrained(folder / "unet")
    return "its attention_head_dim is 2, the model's 4"


def equal_to_the_positive(adapter, folder: Path) -> str:
    adapter.load_denoiser(torch.float32).save_pretrained(folder / "unet")
    return "equals the positive model"


def not_finite(adapter, folder: Path) -> str:
    network = tiny.unet()
    network.conv_out.weight.data[0, 0, 0, 0] = float("nan")
    network.save_pretrained(folder / "unet")
    return "conv_out.weight is not finite"


def hostile_index(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet", max_shard_size="40KB")
    path = folder / "unet" / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps({"weight_map": {"conv_in.weight": "../x.bin"}}))
    return "cannot load negative/unet from .* names files that are not safetensors"


def missing_shard(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet", max_shard_size="40KB")
    sorted((folder / "unet").glob("*.safetensors"))[0].unlink()
    return "is missing"


def missing_tensor(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet")
    weights = load_file(folder / "unet" / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    return "conv_in.weight"


def pickled(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet", safe_serialization=False)
    return "cannot load negative/unet from"


def truncated_lora(adapter, folder: Path) -> str:
    save_with_diffusers(folder, with_lora(adapter, 2, None))
    truncate(folder / LORA_FILE)
    return "cannot load"


def renamed_layers(adapter, folder: Path) -> str:
    save_with_diffusers(folder, with_lora(adapter, 2, None))
    weights = load_file(folder / LORA_FILE)
    save_file({n.replace("down_blocks.1", "down_blocks.7"): w for n, w in weights.items()}, folder / LORA_FILE)
    return "down_blocks.7"


def lora_of_another_network(adapter, folder: Path) -> str:
    save_with_diffusers(folder, with_lora(adapter, 2, None))
    weights = load_file(folder / LORA_FILE)
    save_file({n.replace("unet.", "unet.transformer_", 1): w for n, w in weights.items()}, folder / LORA_FILE)
    return "matches no layer"


def lora_of_the_text_encoder(adapter, folder: Path) -> str:
    save_with_diffusers(folder, with_lora(adapter, 2, None))
    weights = load_file(folder / LORA_FILE)
    save_file({n.replace("unet.", "text_encoder.", 1): w for n, w in weights.items()}, folder / LORA_FILE)
    return "matches no layer"


def lora_of_other_width(adapter, folder: Path) -> str:
    save_with_diffusers(folder, with_lora(adapter, 2, None))
    weights = load_file(folder / LORA_FILE)
    weights = {name: w.repeat(1, 2) if ".lora_A." in name else w for name, w in weights.items()}
    save_file(weights, folder / LORA_FILE)
    return "does not fit the model: .* has shape .*, its LoRA"


MISTAKES = [
    empty,
    other_shapes,
    more_layers,
    truncated,
    without_weights,
    broken_config,
    another_class,
    other_heads,
    equal_to_the_positive,
    not_finite,
    hostile_index,
    missing_shard,
    missing_tensor,
    pickled,
    truncated_lora,
    renamed_layers,
    lora_of_another_network,
    lora_of_the_text_encoder,
    lora_of_other_width,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_what_does_not_fit_is_refused_in_one_line(adapter, base, tmp_path, mistake):
    folder = tmp_path / "negative"
    folder.mkdir()
    expected = mistake(adapter, folder)
    with pytest.raises(UserError, match=expected) as caught:
        load_negative(base, str(tmp_path))
    message = str(caught.value)
    assert message.startswith("negative: ")
    assert str(tmp_path) in message
    assert "\n" not in message


def test_a_missing_folder_is_named(base, tmp_path):
    with pytest.raises(UserError, match=f"^negative: no such folder or file: {tmp_path}/nowhere; "):
        load_negative(base, str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^negative: cannot load {tmp_path}/file: "):
        load_negative(base, str(tmp_path / "file"))


def test_one_wrong_tensor_is_enough(adapter, base, tmp_path):
    """Same names throughout, one shape other than the base's."""
    shutil.copytree(Path(adapter.path) / "unet", tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"out_channels": 8}))
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    weights |= {name: torch.cat([weights[name]] * 2) for name in ("conv_out.weight", "conv_out.bias")}
    save_file(weights, tmp_path / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^negative: .*conv_out.bias has shape \(8,\), the model has \(4,\)"):
        load_negative(base, tmp_path)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_damaged_base_is_named(base, tuned, trained, adapter, tmp_path, alpha):
    trained.save_pretrained(tmp_path / "unet")
    for name in (str(tmp_path / "nothing"), str(tmp_path / "base.ckpt")):
        with pytest.raises(UserError, match=r"^base: "):
            load_negative(tuned, tmp_path, alpha=alpha, base=name)
    save_with_diffusers(tmp_path / "lora", with_lora(adapter, 2, None))
    with pytest.raises(UserError, match=r"^base: .* is a LoRA"):
        load_negative(tuned, tmp_path, alpha=alpha, base=tmp_path / "lora")


def test_a_pickle_is_refused_by_its_name(base, tmp_path):
    """The file does not even exist: nothing can have been read."""
    for suffix in ("bin", "pt", "ckpt", "PTH"):
        with pytest.raises(UserError, match=rf"^negative: cannot load .*\.{suffix}: it is a pickle"):
            load_negative(base, tmp_path / f"weights.{suffix}")


def test_importing_it_is_light():
    """A LoRA in any naming is read without PEFT and bitsandbytes, which PEFT imports.

    diffusers' UNet imports both, so the test has a class of that name.
    """
    code = """
import sys, torch
from torch import nn
import selfnpo_fast.negatives.load as negative
from selfnpo_fast.negatives.lora_files import read_lora
UNet2DConditionModel = type("UNet2DConditionModel", (nn.Sequential,), {})  # a family goes by its class's name
model = UNet2DConditionModel(nn.Linear(4, 3))
state = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(3, 2)}
for naming in ("unet.0.{}.weight", "base"):
    if naming != "base":
        found = read_lora({naming.format(key): value for key, value in state.items()}, model)
    else:
        kohya = {"lora_A": "lora_down", "lora_B": "lora_up"}
        found = read_lora({f"lora_unet_0.{kohya[key]}.weight": value for key, value in state.items()}, model)
    assert found["0"].delta().tolist() == [[2.0] * 4] * 3
print([name for name in ("peft", "bitsandbytes", "deepspeed", "gradio") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
