"""Two denoisers as one network: which of them computes which samples."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_transformers
import torch

from selfnpo_fast.models import load_adapter
from selfnpo_fast.models.experts import Experts
from selfnpo_fast.runtime.errors import UserError

SIZE = {"height": 32, "width": 48, "frames": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_transformers.write_wan(tmp_path_factory.mktemp("wan"), experts=2)


def inputs(adapter, batch: int) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(1)
    rows = {name: torch.randn(batch, *shape) for name, shape in adapter.conditioning_shapes.items()}
    return torch.randn(batch, *adapter.latent_shape), rows


def count_calls(experts: Experts) -> list[tuple[str, int]]:
    """What each denoiser is called with from now on: its name and its samples."""
    calls: list[tuple[str, int]] = []
    for name, network in experts.networks.items():
        network.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, len(args[0]))))
    return calls


def test_each_sample_is_computed_by_the_denoiser_of_its_time(model):
    """Against each network called alone with all samples; a batch on one side is one call."""
    adapter = load_adapter(str(model), **SIZE)
    denoiser = adapter.load_denoiser(torch.float32)
    alone = dict(denoiser.networks)
    x, rows = inputs(adapter, 5)
    t = torch.tensor([875.0, 874.9, 10.0, 999.0, 0.0])
    with torch.no_grad():
        truth = {name: adapter.predict(network, x, t, rows) for name, network in alone.items()}
        calls = count_calls(denoiser)
        found = adapter.predict(denoiser, x, t, rows)
        assert calls == [("transformer", 2), ("transformer_2", 3)]
        high = (t >= 875).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(found, torch.where(high, *truth.values()), rtol=0, atol=1e-5)
        assert (truth["transformer"] - truth["transformer_2"]).abs().min(0).values.max() > 1e-3
        calls.clear()
        for side, name in ((t >= 875, "transformer"), (t < 875, "transformer_2")):
            part = {key: value[side] for key, value in rows.items()}
            assert torch.equal(adapter.predict(denoiser, x[side], t[side], part), found[side])
            assert calls.pop() == (name, int(side.sum())) and not calls


def test_levels_are_owned_as_they_are_routed(model):
    """`Adapter.expert` says what the network does at every level."""
    adapter = load_adapter(str(model), **SIZE)
    levels = torch.arange(1000)
    owners = adapter.expert(levels.view(10, 100))
    assert owners.shape == (10, 100)
    denoiser = adapter.new_denoiser(torch.float32)
    assert denoiser._sides(adapter.time_of(levels), 1000) == owners.flatten().tolist()


@pytest.mark.parametrize("expert", ["high", "low", "both"])
def test_gradients_reach_what_is_trained_and_nothing_else(model, expert):
    """Loss and gradients are those of the denoisers called apart, and every trained one has some."""
    adapter = load_adapter(str(model), expert=expert, **SIZE)
    denoiser = adapter.load_denoiser(torch.float32).requires_grad_(True)
    denoiser.train_only(adapter.trained_denoisers)
    x, rows = inputs(adapter, 4)
    names = list(denoiser.names)
    for times in ([990.0, 20.0, 900.0, 3.0], [900.0] * 4, [3.0] * 4):
        t = torch.tensor(times)
        owner = [names[int(time < 875)] for time in times]
        weight = torch.tensor([float(name in adapter.trained_denoisers) for name in owner])
        losses = adapter.predict(denoiser, x, t, rows).square().flatten(1).mean(1)
        denoiser.zero_grad()
        (losses * weight).sum().backward()
        for name in names:
            network = denoiser.get_submodule(name)
            own = [i for i, each in enumerate(owner) if each == name]
            if name not in adapter.trained_denoisers:
                assert all(p.grad is None for p in network.parameters())
                assert not losses[own].any()
                continue
            found = [p.grad for p in network.parameters()]
            assert all(grad is not None for grad in found)
            if not own:
                assert not any(grad.any() for grad in found)
                continue
            part = {key: value[own] for key, value in rows.items()}
            truth = adapter.predict(network, x[own], t[own], part).square().flatten(1).mean(1)
            torch.testing.assert_close(losses[own], truth, rtol=1e-5, atol=1e-6)
            for grad, expected in zip(found, torch.autograd.grad(truth.sum(), network.parameters()), strict=True):
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_two_configs_that_differ_are_refused(model, tmp_path):
    folder = tiny_transformers.write_wan(tmp_path / "model", experts=2)
    tiny.edit(folder / "transformer_2" / "config.json", num_layers=1)
    expected = r"^model\.path: .*: the num_layers of its transformer is 2 and that of its transformer_2 1; give two"
    with pytest.raises(UserError, match=expected):
        load_adapter(str(folder), **SIZE)


@pytest.mark.parametrize(
    ("experts", "expert", "message"), [(2, "middle", "expected high, low or both"), (1, "low", "")]
)
def test_a_wrong_expert_is_one_line(tmp_path, experts, expert, message):
    folder = tiny_transformers.write_wan(tmp_path / "model", experts=experts)
    with pytest.raises(UserError, match=rf"^model\.expert: '{expert}' is not possible; .*{message}") as caught:
        load_adapter(str(folder), expert=expert, **SIZE)
    assert "\n" not in str(caught.value)


def test_a_boundary_above_all_levels_leaves_the_high_expert_nothing(tmp_path):
    folder = tiny_transformers.write_wan(tmp_path / "model", experts=2, boundary=0.875)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flow_shift": 1.0}))
    low = load_adapter(str(folder), expert="low", **SIZE)
    assert low.trained_levels == range(0, 874)  # u = sigma = (level + 1) / 1000 below .875
    tiny.edit(folder / "model_index.json", boundary_ratio=0.9999)
    high = load_adapter(str(folder), expert="high", **SIZE)
    assert high.trained_levels == range(999, 1000)
