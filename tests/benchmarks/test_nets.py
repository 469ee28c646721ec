"""The networks of the benchmarks: their sizes, their random weights, and what `--net` names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.nets import CONFIGS, NETS, SMALL, TRANSFORMERS, UNETS, BenchNet, chosen, sd15_small
from selfnpo_fast.models import load_adapter
from tests.helpers import tiny

CPU, META = torch.device("cpu"), torch.device("meta")
SDXL_ROWS = {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}
COGVIDEOX_ROWS = {"encoder_hidden_states": (226, 4096)}
SD35_ROWS = {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}


@pytest.mark.parametrize(
    ("name", "parameters", "latent", "rows"),
    [
        ("digits", 1_077_572, (4, 8, 8), {"encoder_hidden_states": (16, 64)}),
        ("sd15_small", 79_865_604, (4, 32, 32), {"encoder_hidden_states": (77, 768)}),
        ("sd15", 859_520_964, (4, 64, 64), {"encoder_hidden_states": (77, 768)}),
        ("sdxl", 2_567_463_684, (4, 128, 128), SDXL_ROWS),
        ("cogvideox_small", 66_000_064, (3, 16, 16, 24), COGVIDEOX_ROWS),
        ("cogvideox_5b", 5_570_283_072, (3, 16, 60, 90), COGVIDEOX_ROWS),
        ("sd35_small", 97_696_064, (16, 32, 32), SD35_ROWS),
        ("sd35_medium", 2_243_171_520, (16, 128, 128), SD35_ROWS),
        ("wan21_1_3b", 1_418_996_800, (16, 5, 60, 104), {"encoder_hidden_states": (512, 4096)}),
    ],
)
def test_networks_have_the_stated_size_and_can_be_called(name, parameters, latent, rows):
    net = NETS[name]()
    table = net.table(5, torch.bfloat16, CPU)
    assert {key: (tuple(value.shape), value.dtype) for key, value in table.rows.items()} == {
        key: ((6, *shape), torch.bfloat16) for key, shape in rows.items()
    }
    device = CPU if name == "digits" else META
    network = net.network(torch.bfloat16, device)
    assert sum(p.numel() for p in network.parameters()) == parameters
    cond = {key: value.to(device) for key, value in table.gather(torch.tensor([1, 0, 3])).items()}
    x = net.latents(3, CPU).to(device)
    out = net.predict(network, x, torch.tensor([0, 5, 999], device=device), cond)
    assert out.shape == x.shape == (3, *latent)
    assert (x.dtype, out.dtype) == (torch.float32, torch.bfloat16)


def test_sizes_of_sdxl_are_those_of_its_pictures():
    sizes = NETS["sdxl"]().table(2, torch.bfloat16, CPU).rows["time_ids"]
    assert sizes.tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 3


def test_sd15_small_has_the_widths_and_the_noise_levels_of_sd15():
    """Layer shapes as in SD1.5's state dict; alphas from the scaled-linear formula in float64."""
    net = sd15_small()
    shapes = {name: tuple(p.shape) for name, p in net.network(device=META).named_parameters()}
    assert shapes["conv_in.weight"] == (320, 4, 3, 3)
    assert shapes["time_embedding.linear_1.weight"] == (1280, 320)
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert shapes["down_blocks.1.resnets.0.conv1.weight"] == (640, 320, 3, 3)
    assert "down_blocks.0.attentions.1.proj_in.weight" not in shapes
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    observed = net.schedule.alphas_cumprod.numpy()
    np.testing.assert_allclose(observed, np.cumprod(1 - betas), rtol=5e-6)  # 9e-7 seen: diffusers multiplies in float32
    assert net.schedule.prediction == "epsilon"


@pytest.mark.parametrize(
    ("name", "published", "prediction"),
    [("cogvideox_small", "cogvideox_5b", "v_prediction"), ("sd35_small", "sd35_medium", "flow")],
)
def test_narrow_transformers_have_the_blocks_and_the_noise_levels_of_published_ones(name, published, prediction):
    """All layers of a block are there; a vector of one head and a row of text are as wide."""
    small, large = NETS[name](), NETS[published]()
    ours, theirs = (net.network(device=META).state_dict() for net in (small, large))
    assert ours.keys() < theirs.keys()
    assert {key.partition(".")[0] for key in ours} == {key.partition(".")[0] for key in theirs}
    heads = [key for key in ours if "attn" in key and "norm_" in key and ours[key].ndim == 1]
    assert heads
    assert all(ours[key].shape == theirs[key].shape == (64,) for key in heads)
    assert small.adapter.conditioning_shapes == large.adapter.conditioning_shapes
    for levels in (small.schedule, large.schedule):
        assert levels.prediction == prediction
        assert levels.alpha[-1] == 0
    assert torch.equal(small.schedule.sigma, large.schedule.sigma)


def random_net(folder) -> BenchNet:
    """A tiny SDXL as a network without weights."""
    return BenchNet(name="tiny", adapter=load_adapter(str(tiny.write_sdxl(folder)), configs_only=True))


def test_random_weights_are_the_same_each_time(tmp_path):
    net = random_net(tmp_path)
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    one = net.network().state_dict()
    assert torch.equal(torch.rand(3), drawn), "the caller's random numbers go on undisturbed"
    two = net.network().state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


class Allocations(TorchDispatchMode):
    """Notes dtype and device of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() > 1:
            self.seen.add((out.dtype, out.device.type))
        return out


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_random_weights_are_made_in_their_dtype_on_their_device(tmp_path, device):
    """No copy in float32, and none on the host: SDXL's would take 10 GB of either."""
    net = random_net(tmp_path)
    with Allocations() as allocations:
        network = net.network(torch.bfloat16, device)
    assert allocations.seen == {(torch.bfloat16, device.type)}
    assert {(p.dtype, p.device.type) for p in network.parameters()} == allocations.seen
    assert not network.training
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["tiny", "sd15_small"])
@torch.no_grad()
def test_random_networks_give_finite_bf16(tmp_path, name):
    net = random_net(tmp_path) if name == "tiny" else sd15_small()
    x = net.latents(2, CPU)[:, :, :8, :8]
    cond = net.table(2, torch.bfloat16, CPU).gather(torch.tensor([0, 2]))
    out = net.predict(net.network(torch.bfloat16), x, torch.tensor([0, 999]), cond)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert 0.01 < out.float().std() < 10


def test_all_networks_are_those_that_a_cpu_can_run():
    assert chosen("all") == chosen(None) == SMALL == ("digits", "sd15_small")
    assert chosen("transformers") == TRANSFORMERS == ("cogvideox_small", "sd35_small")
    folders = {path.parent.name for path in CONFIGS.glob("*/unet")}
    assert folders | {"digits", "sd15_small"} == set(UNETS)
    assert chosen(None, quick=True) == ("digits",)
    for name in NETS:
        assert chosen(name, quick=True) == (name,)
