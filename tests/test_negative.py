"""Loading a negative model: what was saved comes back, and what does not fit is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from selfnpo_fast.checkpoint import _write_lora
from selfnpo_fast.config import LoraConfig
from selfnpo_fast.errors import UserError
from selfnpo_fast.guidance.negative import LORA_FILE, load_negative, locate_negative
from selfnpo_fast.lora import add_lora
from selfnpo_fast.models import load_adapter

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(str(tiny.write_sd(tmp_path_factory.mktemp("base"))))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return x, torch.tensor([100, 700]), torch.randn(2, 12, tiny.WIDTH, generator=generator)


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    return network(*inputs()).sample


def with_lora(adapter, rank: int, alpha: float | None, targets: list[str] | None = None) -> torch.nn.Module:
    """The base with low-rank updates that do something."""
    network = adapter.load_denoiser(torch.float32)
    add_lora(network, LoraConfig(rank=rank, alpha=alpha, targets=targets or ["to_q", "to_k", "to_v", "to_out.0"]), 0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def save_with_diffusers(folder: Path, network: torch.nn.Module) -> None:
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(network))


def merged(adapter, network: torch.nn.Module, scale: float) -> torch.nn.Module:
    """The base with scale * B A added to its weights."""
    base = adapter.load_denoiser(torch.float32)
    lora = {name: value for name, value in network.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        for name, down in lora.items():
            up = dict(network.named_parameters())[name.replace("lora_A", "lora_B")]
            base.get_submodule(name.split(".lora_A")[0]).weight += scale * up @ down
    return base


@pytest.fixture
def trained() -> torch.nn.Module:
    torch.manual_seed(7)
    return tiny.unet().eval()


@pytest.mark.parametrize("layout", ["run", "part"])
def test_full_weights_come_back(adapter, trained, tmp_path, layout):
    run = tmp_path / "run"
    trained.save_pretrained(run / "negative" / "unet")
    given = run if layout == "run" else run / "negative"
    assert locate_negative(str(given), "unet") == run / "negative"
    negative = load_negative(adapter, str(given), torch.float32)
    assert not negative.training
    assert torch.equal(output(negative), output(trained))
    assert not torch.allclose(output(negative), output(adapter.load_denoiser(torch.float32)), atol=1e-3)


def test_full_weights_take_the_asked_precision(adapter, trained, tmp_path):
    trained.save_pretrained(tmp_path / "unet")
    negative = load_negative(adapter, str(tmp_path), torch.bfloat16)
    saved = dict(trained.named_parameters())
    for name, parameter in negative.named_parameters():
        assert torch.equal(parameter, saved[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("layout", ["run", "part"])
@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (2, 6.0), (3, 1.0)])
def test_our_lora_comes_back_with_its_scale(adapter, tmp_path, rank, alpha, layout):
    network = with_lora(adapter, rank, alpha)
    folder = tmp_path / "run" / "negative"
    folder.mkdir(parents=True)
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    _write_lora(folder, network, weights, adapter)
    negative = load_negative(adapter, str(folder.parent if layout == "run" else folder), torch.float32)
    assert not negative.training
    expected = output(merged(adapter, network, (alpha or rank) / rank))
    # Observed 3e-6: two products instead of one.
    torch.testing.assert_close(output(negative), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(output(adapter.load_denoiser(torch.float32)), expected, atol=1e-3)


def test_a_lora_that_diffusers_wrote_comes_back(adapter, tmp_path):
    network = with_lora(adapter, 2, None)
    save_with_diffusers(tmp_path, network)
    expected = output(merged(adapter, network, 1.0))
    negative = load_negative(adapter, str(tmp_path), torch.float32)
    torch.testing.assert_close(output(negative), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_lora_takes_the_asked_precision(adapter, tmp_path):
    save_with_diffusers(tmp_path, with_lora(adapter, 2, None))
    negative = load_negative(adapter, str(tmp_path), torch.bfloat16)
    assert {parameter.dtype for parameter in negative.parameters()} == {torch.bfloat16}


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
    return "cannot load unet from"


def without_weights(adapter, folder: Path) -> str:
    tiny.unet().save_config(folder / "unet")
    return "cannot load unet from"


def broken_config(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet")
    (folder / "unet" / "config.json").write_text("{")
    return "cannot load unet from"


def missing_tensor(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet")
    weights = load_file(folder / "unet" / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    return "conv_in.weight"


def pickled(adapter, folder: Path) -> str:
    tiny.unet().save_pretrained(folder / "unet", safe_serialization=False)
    return "cannot load unet from"


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
    return "cannot load|matches no layer"


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
    return "cannot load"


MISTAKES = [
    empty,
    other_shapes,
    more_layers,
    truncated,
    without_weights,
    broken_config,
    missing_tensor,
    pickled,
    truncated_lora,
    renamed_layers,
    lora_of_another_network,
    lora_of_the_text_encoder,
    lora_of_other_width,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_what_does_not_fit_is_refused_in_one_line(adapter, tmp_path, mistake):
    folder = tmp_path / "negative"
    folder.mkdir()
    expected = mistake(adapter, folder)
    with pytest.raises(UserError, match=expected) as caught:
        load_negative(adapter, str(tmp_path), torch.float32)
    message = str(caught.value)
    assert message.startswith("negative: ")
    assert str(tmp_path) in message
    assert "\n" not in message


def test_a_missing_folder_is_named(adapter, tmp_path):
    with pytest.raises(UserError, match=f"^negative: no such folder: {tmp_path}/nowhere; "):
        load_negative(adapter, str(tmp_path / "nowhere"), torch.float32)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"^negative: no such folder: "):
        load_negative(adapter, str(file), torch.float32)


def test_one_wrong_tensor_is_enough(adapter, tmp_path):
    """Same names throughout, one shape other than the base's."""
    shutil.copytree(Path(adapter.path) / "unet", tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"out_channels": 8}))
    weights = load_file(tmp_path / "unet" / WEIGHTS)
    weights |= {name: torch.cat([weights[name]] * 2) for name in ("conv_out.weight", "conv_out.bias")}
    save_file(weights, tmp_path / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^negative: .*conv_out.bias has shape \(8,\), the model has \(4,\)"):
        load_negative(adapter, str(tmp_path), torch.float32)
