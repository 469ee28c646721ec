"""Low-rank layers and networks that share a backbone."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.errors import UserError
from selfnpo_fast.lora import add_lora, share_frozen
from selfnpo_fast.moving_reference import MovingReference


def unet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.unet()


def student(**changes) -> nn.Module:
    network = unet()
    add_lora(network, LoraConfig(**({"rank": 2} | changes)), seed=3)
    return network


def output(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(network.dtype)
    rows = torch.randn(2, 12, tiny.WIDTH, generator=generator).to(network.dtype)
    return network(x, torch.tensor([100, 700]), rows).sample


def randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def step(network: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    output(network).square().mean().backward()
    optimizer.step()


def test_lora_starts_as_nothing():
    assert torch.equal(output(student()), output(unet()))


def test_lora_freezes_all_but_the_updates_of_its_targets():
    network = student(targets=["to_q", "to_out.0"])
    layers = {name for name, _ in unet().named_modules() if name.endswith(("to_q", "to_out.0"))}
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert layers
    assert trained == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}


def test_lora_is_seeded_and_leaves_the_global_generator_alone():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        network = unet()
        torch.manual_seed(50)
        add_lora(network, LoraConfig(rank=2), seed)
        assert torch.initial_seed() == 50
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(50)))
        return {name: parameter for name, parameter in network.named_parameters() if "lora_A" in name}

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(2, None, 1.0), (2, 8.0, 4.0), (4, 1.0, 0.25)])
def test_lora_scale_is_alpha_over_rank(rank, alpha, scale):
    network, merged = student(rank=rank, alpha=alpha), unet().double()
    randomise(network)
    network.double()
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name in [name for name in parameters if "lora_A" in name]:
            layer = merged.get_submodule(name.split(".lora_A")[0])
            layer.weight += scale * parameters[name.replace("lora_A", "lora_B")] @ parameters[name]
        expected = output(merged)
        # Time embeddings stay float32 in diffusers, equally in both.
        torch.testing.assert_close(output(network), expected, rtol=0, atol=1e-9)
        assert not torch.allclose(output(unet().double()), expected, atol=1e-3)


def test_targets_that_match_nothing_are_named():
    with pytest.raises(UserError, match=r"^lora\.targets: \['no_such_layer'\] match no layer") as caught:
        student(targets=["no_such_layer"])
    assert "\n" not in str(caught.value)


def addresses(network: nn.Module, trainable: bool) -> dict[str, int]:
    return {
        name: parameter.data_ptr()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad == trainable
    }


@pytest.mark.parametrize("lora", [True, False])
def test_share_frozen_shares_the_frozen_and_clones_the_trained(lora):
    network = student() if lora else unet().requires_grad_(True)
    if lora:
        randomise(network)
    frozen, trained = addresses(network, False), addresses(network, True)
    reference = share_frozen(network)
    copied = {name: parameter.data_ptr() for name, parameter in reference.named_parameters()}
    assert bool(frozen) == lora
    assert trained
    assert {name: copied[name] for name in frozen} == frozen
    assert not {copied[name] for name in trained} & {*frozen.values(), *trained.values()}
    assert copied.keys() == frozen.keys() | trained.keys()
    assert torch.equal(output(reference), output(network))
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    # The original keeps what it trains.
    assert addresses(network, True) == trained


def test_share_frozen_shares_buffers_and_keeps_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("table", torch.arange(3.0))

    network = Tied()
    copied = share_frozen(network)
    assert copied.table.data_ptr() == network.table.data_ptr()
    assert copied.first.weight is copied.second.weight
    assert copied.first.weight.data_ptr() != network.first.weight.data_ptr()


@pytest.mark.parametrize("lora", [True, False])
def test_a_step_of_the_student_does_not_move_the_reference(lora):
    network = student() if lora else unet().requires_grad_(True)
    if lora:
        randomise(network)
    reference = share_frozen(network)
    with torch.no_grad():
        before = output(reference)
    step(network)
    with torch.no_grad():
        assert torch.equal(output(reference), before)
        assert (output(network) - before).abs().max() > 1e-3


def test_an_average_over_a_shared_backbone_follows_the_student():
    network = student()
    randomise(network)
    reference = share_frozen(network)
    backbone = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    live = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    start = {name: parameter.detach().clone() for name, parameter in live}
    moving = MovingReference(reference, live, 0.5)
    step(network)
    moving.update()
    parameters = dict(reference.named_parameters())
    for name, parameter in live:
        torch.testing.assert_close(parameters[name], (start[name] + parameter.detach()) / 2, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(parameters[name], start[name]) for name, _ in live)
    assert all(torch.equal(parameters[name], value) for name, value in backbone.items())
