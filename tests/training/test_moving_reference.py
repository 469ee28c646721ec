"""The reference against a float64 recurrence: moving in full precision in any dtype, or frozen."""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.moving_reference import MovingReference, Reference


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2)).to(dtype)


def drift(student: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def masters(reference: MovingReference) -> dict[str, torch.Tensor]:
    return {name: value for name, value in reference.state_dict() if name not in ("version", "updates")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_average_follows_the_recurrence(dtype, decay):
    student, module = network(dtype), network(dtype)
    reference = MovingReference(module, student.named_parameters(), decay)
    exact = {name: parameter.detach().double() for name, parameter in student.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 31):
        drift(student, generator)
        reference.update()
        for name, parameter in student.named_parameters():
            exact[name] = decay * exact[name] + (1 - decay) * parameter.detach().double()
        assert reference.version == step
    shadows = dict(reference.module.named_parameters())
    for name, master in masters(reference).items():
        assert master.dtype == torch.float32
        # Observed 1.4e-7; 30 roundings to float32 of values up to 4.
        torch.testing.assert_close(master.double(), exact[name], rtol=0, atol=30 * 2.0**-24 * 4)
        assert shadows[name].dtype == dtype
        assert torch.equal(shadows[name], master.to(dtype))


def test_average_moves_where_one_kept_in_bf16_would_stand_still():
    student, module = network(torch.bfloat16), network(torch.bfloat16)
    with torch.no_grad():
        for parameter in (*student.parameters(), *module.parameters()):
            parameter.fill_(1.0)
    reference = MovingReference(module, student.named_parameters(), 0.999)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1.25)
    still = torch.ones((), dtype=torch.bfloat16)
    for _ in range(1000):
        reference.update()
        still = (0.999 * still.float() + 0.001 * 1.25).bfloat16()
    assert still == 1
    expected = 1.25 - 0.25 * 0.999**1000
    for master, shadow in zip(masters(reference).values(), reference.module.parameters(), strict=True):
        assert master.flatten()[0].item() == pytest.approx(expected, abs=1000 * 2.0**-24)
        assert shadow.flatten()[0].item() == pytest.approx(expected, rel=2.0**-8)


def test_only_the_named_parameters_move():
    student, module = network(), network()
    live = {name: parameter for name, parameter in student.named_parameters() if name.startswith("2.")}
    reference = MovingReference(module, live.items(), 0.5)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    drift(student, torch.Generator().manual_seed(2))
    reference.update()
    assert set(masters(reference)) == set(live) == {"2.weight", "2.bias"}
    for name, parameter in module.named_parameters():
        if name in live:
            torch.testing.assert_close(parameter, (before[name] + live[name].detach()) / 2)
        else:
            assert torch.equal(parameter, before[name])


def test_every_parameter_is_read_while_it_is_whole():
    """Under ZeRO 3 a parameter holds its values only inside `gather`."""
    student, module = network(), network()
    drift(student, torch.Generator().manual_seed(3))
    exact = [parameter.detach().double() for parameter in student.parameters()]
    start = [parameter.detach().double() for parameter in module.parameters()]
    hidden = {id(parameter): parameter.data.clone() for parameter in student.parameters()}
    open_at_once = []

    @contextmanager
    def gather(parameters):
        open_at_once.append(len(parameters))
        for parameter in parameters:
            parameter.data = hidden[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.full_like(parameter, torch.nan)

    for parameter in student.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    reference = MovingReference(module, student.named_parameters(), 0.75, gather)
    reference.update()
    for parameter, a, b in zip(module.parameters(), start, exact, strict=True):
        torch.testing.assert_close(parameter.double(), 0.75 * a + 0.25 * b, rtol=0, atol=1e-6)
    assert open_at_once == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_average_goes_on_bit_for_bit(dtype):
    def moved(reference, student, seed, updates):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(updates):
            drift(student, generator)
            reference.update()

    student = network(dtype)
    first = MovingReference(network(dtype), student.named_parameters(), 0.99)
    moved(first, student, 4, 5)
    saved = {name: value.clone() for name, value in first.state_dict()}
    weights = {name: value.clone() for name, value in student.state_dict().items()}

    other_student = network(dtype, seed=9)
    second = MovingReference(network(dtype, seed=8), other_student.named_parameters(), 0.99)
    second.load_state_dict(saved)
    other_student.load_state_dict(weights)
    assert second.version == 5
    x = torch.ones(1, 3, dtype=dtype)
    assert torch.equal(second.module(x), first.module(x))
    moved(first, student, 5, 5)
    moved(second, other_student, 5, 5)
    for name, value in first.state_dict():
        assert torch.equal(dict(second.state_dict())[name], value), name
    assert torch.equal(second.module(x), first.module(x))


def test_frozen_reference_never_moves():
    student, module = network(), network()
    reference = Reference(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drift(student, torch.Generator().manual_seed(6))
    for _ in range(3):
        reference.update()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert reference.version == 0
    assert dict(reference.state_dict()) == {}


def test_moving_reference_carries_no_gradient():
    student, module = network(), network()
    reference = MovingReference(module, student.named_parameters(), 0.9)
    student(torch.ones(1, 3)).sum().backward()
    reference.update()
    assert not reference.module(torch.ones(1, 3)).requires_grad
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_few_updates_with_that_power_of_the_decay(dtype):
    student, generator = network(dtype), torch.Generator().manual_seed(1)
    reference = MovingReference(network(dtype), student.named_parameters(), 0.9, every=3)
    exact = {name: parameter.detach().double() for name, parameter in student.named_parameters()}
    for step in range(1, 11):
        drift(student, generator)
        reference.update()
        if step % 3 == 0:
            for name, parameter in student.named_parameters():
                exact[name] = 0.9**3 * exact[name] + (1 - 0.9**3) * parameter.detach().double()
        assert reference.version == step // 3
        for name, master in masters(reference).items():
            torch.testing.assert_close(master.double(), exact[name], rtol=0, atol=10 * 2.0**-24 * 4)


def test_the_rest_of_a_period_is_saved():
    student = network()
    first = MovingReference(network(), student.named_parameters(), 0.9, every=3)
    second = MovingReference(network(seed=5), student.named_parameters(), 0.9, every=3)
    for _ in range(4):
        first.update()
    second.load_state_dict(dict(first.state_dict()))
    for _ in range(2):
        assert second.version == first.version == 1
        first.update()
        second.update()
    assert second.version == first.version == 2


def some_updates(world: World) -> tuple[MovingReference, int]:
    """A bf16 average after five updates, and the number of master elements that this rank keeps."""
    student, module = network(torch.bfloat16), network(torch.bfloat16)
    reference = MovingReference(module, student.named_parameters(), 0.9, world=world)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        drift(student, generator)
        reference.update()
    return reference, sum(master.numel() for master in reference._master.values())


def rank_of_two(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), torch.distributed.new_group(backend="gloo"))
    reference, kept = some_updates(world)
    saved = {name: value.contiguous() for name, value in reference.state_dict()}
    shadows = {f"shadow.{name}": p.detach().clone() for name, p in reference.module.named_parameters()}
    reference.load_state_dict(saved)  # which rewrites the shadows
    again = {f"again.{name}": p.detach().clone() for name, p in reference.module.named_parameters()}
    save_file(saved | shadows | again | {"kept": torch.tensor(kept)}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_masters_are_shared_out_among_ranks(tmp_path: Path):
    """Two ranks hold every master once between them.

    Masters and shadows are bit for bit those of one rank.
    """
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    single, whole = some_updates(World(0, 1, torch.device("cpu")))
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    kept = [int(tensors["kept"]) for tensors in found]
    assert sum(kept) == whole
    assert max(kept) < whole
    shadows = dict(single.module.named_parameters())
    for tensors in found:
        for name, value in single.state_dict():
            assert torch.equal(tensors[name], value), name
        for name, shadow in shadows.items():
            assert torch.equal(tensors[f"shadow.{name}"], shadow), name
            assert torch.equal(tensors[f"again.{name}"], shadow), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channels_last_reference_follows_a_row_major_student(dtype):
    def convolution(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Conv2d(3, 5, 3).to(dtype)

    averages = []
    for order in (torch.contiguous_format, torch.channels_last):
        student, module = convolution(1), convolution(2).to(memory_format=order)
        reference = MovingReference(module, student.named_parameters(), 0.5)
        reference.update()
        assert module.weight.is_contiguous(memory_format=order)
        averages.append(dict(reference.state_dict()))
    for name, value in averages[0].items():
        assert torch.equal(averages[1][name], value), name
