"""Low-rank layers whose weights are an argument of the call."""

from __future__ import annotations

import functools
import itertools
import threading

import pytest
import tiny
import torch
from peft import LoraConfig as PeftConfig
from torch import nn

from selfnpo_fast.config import LoraConfig, ReferenceConfig, TrainConfig
from selfnpo_fast.models import family_of
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.training.lora import (
    LoraCall,
    LoraLinear,
    LoraWeights,
    Variant,
    add_average,
    add_lora,
    checkpoint_gradients,
)
from selfnpo_fast.training.moving_reference import MovingReference
from selfnpo_fast.training.trainer import _split

DEVICE = "cpu"


def unet(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return tiny.unet(**changes)


def student(network: nn.Module | None = None, **changes) -> nn.Module:
    network = network or unet()
    add_lora(network, LoraConfig(**({"rank": 2} | changes)), seed=3)
    return network


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, rows = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, tiny.WIDTH, generator=generator)
    return x.to(DEVICE), torch.tensor([100, 700], device=DEVICE), rows.to(DEVICE)


def output(network: nn.Module, weights: LoraWeights | None = None) -> torch.Tensor:
    chosen, (x, t, rows) = {} if weights is None else {"low_rank": weights}, inputs()
    return network(x.to(network.dtype), t, rows.to(network.dtype), **chosen).sample


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


def test_lora_is_seeded_and_leaves_the_global_generator_as_it_was():
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


def outputs(network: nn.Module) -> dict[LoraWeights, torch.Tensor]:
    with torch.no_grad():
        return {weights: output(network, weights) for weights in LoraWeights}


def apart(network: nn.Module) -> dict[str, nn.Parameter]:
    """Live and average weights that differ from each other and from nothing."""
    average = add_average(network)
    randomise(network)
    with torch.no_grad():
        for parameter in average.values():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return average


def test_targets_that_can_have_no_update_are_named():
    with pytest.raises(UserError, match=r"^lora\.targets: .*conv is a Conv2d; expected Linear layers and ungrouped"):
        network = unet()
        network.mid_block.conv = nn.Conv2d(4, 4, 3, groups=2)
        add_lora(network, LoraConfig(rank=2, targets=["conv"]), 0)


TARGETS = {"linear": ["to_q", "to_v", "ff.net.2"], "conv": ["conv1", "conv_shortcut", "downsamplers.0.conv"]}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_live_weights_and_their_gradients_are_those_of_peft(targets):
    ours, theirs = student(targets=targets, alpha=3.0).double(), unet()
    theirs.requires_grad_(False)
    theirs.add_adapter(PeftConfig(r=2, lora_alpha=3.0, target_modules=targets), adapter_name="default")
    theirs.double()
    randomise(ours)
    assert theirs.load_state_dict(ours.state_dict()).missing_keys == []
    assert any("conv" in name for name, p in ours.named_parameters() if p.requires_grad) == ("conv1" in targets)
    torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=1e-9)
    for network in (ours, theirs):
        output(network).square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(expected) > 5
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (name not in expected), name
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_call_chooses_its_weights(targets):
    network = student(targets=targets, alpha=1.0).double()
    average = apart(network)
    out, live = outputs(network), {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert torch.equal(out[LoraWeights.OFF], output(unet().double()))
    assert torch.equal(out[LoraWeights.LIVE], output(network))
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(average[name])
    assert torch.equal(out[LoraWeights.AVERAGE], output(network)), "the average as live weights"
    assert min((out[a] - out[b]).abs().max() for a, b in itertools.combinations(LoraWeights, 2)) > 1e-2


def test_a_call_that_fails_leaves_no_choice_behind():
    network = student()
    apart(network)
    expected = output(network)
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 12, 1), low_rank=LoraWeights.OFF)
    assert torch.equal(output(network), expected)


def test_threads_choose_each_for_itself():
    network = student()
    apart(network)
    expected, wrong = outputs(network), []

    def work(weights: LoraWeights) -> None:
        for _ in range(20):
            with torch.no_grad():  # grad mode belongs to a thread
                if not torch.equal(output(network, weights), expected[weights]):
                    wrong.append(weights)

    threads = [threading.Thread(target=work, args=(weights,)) for weights in LoraWeights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_compiles_as_one_graph_with_its_choice():
    network = student(unet(**tiny.SHALLOW), targets=["to_q", "conv1"])
    apart(network)
    expected, given = outputs(network), inputs()

    @functools.partial(torch.compile, fullgraph=True, backend="eager")
    def call(chosen: LoraWeights) -> torch.Tensor:
        return network(*given, low_rank=chosen).sample

    with torch.no_grad():
        for chosen in (*LoraWeights, *LoraWeights):
            torch.testing.assert_close(call(chosen), expected[chosen], rtol=0, atol=1e-5)
            assert torch.equal(output(network), expected[LoraWeights.LIVE])


def gradients(network: nn.Module, between) -> dict[str, torch.Tensor]:
    """Those of the live weights; `between` runs after the forward and before the backward pass."""
    loss = output(network).square().mean()
    between()
    loss.backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


@pytest.mark.parametrize("backward_in", ["this thread", "another", pytest.param("a GPU's", marks=pytest.mark.gpu)])
def test_recomputed_activations_are_those_of_the_call(backward_in, monkeypatch):
    """In any thread in which autograd recomputes (a second one on a GPU), after any other call."""
    network = student(targets=["to_q", "to_v", "conv1"])
    apart(network)
    if backward_in == "a GPU's":
        monkeypatch.setitem(globals(), "DEVICE", "cuda")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else weights' gradients differ in a bit
        network.cuda()
    expected = gradients(network, lambda: None)
    checkpoint_gradients(network, family_of(network))
    counted, forward = [], LoraLinear.forward
    seen = lambda layer, x: (counted.append(layer.call.weights), forward(layer, x))[1]  # noqa: E731
    monkeypatch.setattr(LoraLinear, "forward", seen)
    call = next(part.call for part in network.modules() if isinstance(part, LoraLinear))
    left: list[LoraWeights] = []
    if backward_in == "another":
        monkeypatch.setattr(torch.Tensor, "backward", in_another_thread(torch.Tensor.backward, call, left))

    def meanwhile() -> None:
        with torch.no_grad():
            output(network, LoraWeights.AVERAGE)
        call.weights = LoraWeights.OFF  # the recomputation has to set and restore it, in any thread

    found = gradients(network, meanwhile)
    assert call.weights is LoraWeights.OFF
    assert left == [LoraWeights.OFF] * (backward_in == "another")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    layers = len(counted) // 3
    assert counted == [*[LoraWeights.LIVE] * layers, *[LoraWeights.AVERAGE] * layers, *[LoraWeights.LIVE] * layers], (
        "the forward, the call in between, and the recomputation"
    )


def in_another_thread(function, call: LoraCall, left: list[LoraWeights]):
    """`function` in a thread whose call has other weights; those it has afterwards go to `left`."""

    def work(*arguments) -> None:
        call.weights = LoraWeights.OFF
        function(*arguments)
        left.append(call.weights)

    def run(*arguments) -> None:
        thread = threading.Thread(target=work, args=arguments)
        thread.start()
        thread.join()

    return run


def test_the_average_is_a_second_set_of_weights_that_nobody_trains():
    network = student()
    randomise(network)
    live = {name: p for name, p in network.named_parameters() if p.requires_grad}
    average = add_average(network)
    assert average.keys() == live.keys()
    for name, parameter in average.items():
        assert torch.equal(parameter, live[name])
        assert parameter.data_ptr() != live[name].data_ptr()
    assert {name for name, p in network.named_parameters() if p.requires_grad} == live.keys()
    with torch.no_grad():
        before = output(network, LoraWeights.AVERAGE)
    step(network)
    with torch.no_grad():
        assert torch.equal(output(network, LoraWeights.AVERAGE), before)
        assert (output(network) - before).abs().max() > 1e-3


def test_an_average_next_to_the_live_weights_follows_them():
    network = student()
    randomise(network)
    average = add_average(network)
    others = {name: p.clone() for name, p in network.named_parameters() if "lora" not in name}
    live = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    start = {name: parameter.detach().clone() for name, parameter in live}
    moving = MovingReference(Variant(network, LoraWeights.AVERAGE), live, 0.5, average=average)
    step(network)
    moving.update()
    for name, parameter in live:
        torch.testing.assert_close(average[name], (start[name] + parameter.detach()) / 2, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(average[name], start[name]) for name, _ in live)
    parameters = dict(network.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in others.items())


def split(**sections) -> tuple[nn.Module, nn.Module | Variant, dict | None]:
    network = unet()
    return network, *_split(network, TrainConfig(**sections))


def test_full_weights_have_a_reference_of_their_own_that_is_frozen():
    network, reference, average = split()
    assert average is None
    assert network.training
    assert not reference.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in reference.parameters()}
    before = output(reference)
    assert not before.requires_grad
    assert torch.equal(before, output(unet()))
    step(network)
    assert torch.equal(output(reference), before)
    assert (output(network) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "weights"), [("ema", LoraWeights.AVERAGE), ("frozen", LoraWeights.OFF)])
def test_lora_has_its_reference_in_the_same_network(kind, weights):
    network, reference, average = split(lora=LoraConfig(rank=2), reference=ReferenceConfig(kind=kind))
    assert reference.network is network
    assert reference.weights is weights
    assert not network.training, "dropout would meet the reference"
    live = {name for name, p in network.named_parameters() if p.requires_grad}
    assert live
    assert average.keys() == (live if kind == "ema" else set())
    x, t, rows = inputs()
    with torch.no_grad():
        before = reference(x, t, rows).sample
        randomise(network)
        assert torch.equal(reference(x, t, rows).sample, before)
        assert (output(network) - before).abs().max() > 1e-3
