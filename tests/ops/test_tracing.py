"""The ops under opcheck, torch.compile and FakeTensorMode: one graph, nothing read by the host."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import lives
import pytest
import torch
from cases import BF16, F16, F32, draw
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from selfnpo_kernels import (
    NoiseKey,
    affine_noise,
    backends,
    ema_update,
    guidance_rescale,
    guided_step,
    normal,
    ops,
    tdft_step,
    x0_loss,
)
from selfnpo_kernels.schemas import SCHEMAS

SHAPE = (3, 2, 5)
SLOTS = torch.tensor([[0, 1, 2], [9, 10, 11], [0, 1, 1], [1, 1, 1]])
NO_KEY = (0, None, 0, None)
KEY = (5, torch.arange(3), 2, None)
DRAWN = (-5, torch.arange(3), 0, torch.arange(3))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """No poisoned memory in this file: inductor allocates buffers that it does not fill."""
    yield


def tdft_arguments(start: str, branches: str = "both", dtype=F32) -> tuple:
    world = lives.make_world(1, SHAPE, steps=4, w=1.0, start=start)
    (pos, neg), (x, final) = draw(1, SHAPE, SHAPE, dtype=dtype), draw(2, SHAPE, SHAPE)
    t, r = world.tables, world.rules
    return (
        pos if branches != "neg" else None, neg if branches != "pos" else None, x, final if start == "noise" else None,
        SLOTS, torch.zeros_like(SLOTS), t.step, t.start, t.renoise, t.timesteps, t.weight, world.latents,
        r.num_prompts, r.stride, r.max_steps, r.seed, 0.5, start == "noise", start == "data",
    )  # fmt: skip


def opcheck_cases() -> list:
    """(op, positional arguments) of the raw ops."""
    pos, neg, x, noise = draw(3, SHAPE, SHAPE, SHAPE, SHAPE)
    (k2, k8), (some2,), index = draw(4, (3, 2), (3, 8)), draw(5, (4, 2)), torch.tensor([3, 0, 1])
    one8, weight, scale = k8[:1].clone(), torch.ones(3), torch.ones(3)
    video = draw(6, (2, 2, 3, 2, 2))[0]
    graded = pos.clone().requires_grad_()
    return [
        ("normal", (torch.arange(3), (2, 5), 3, 0, None, F32)),
        ("normal", (torch.arange(3), (7,), -3, 0, torch.arange(3), BF16)),
        ("affine_noise", (x, k2, None, noise, *NO_KEY)),
        ("affine_noise", (x.half(), some2, index, None, *KEY)),
        ("affine_noise", (video, k2[:1].clone(), None, None, 5, torch.arange(2), 0, torch.arange(2))),
        ("guidance_rescale", (pos, neg, k8, None, 0.7)),
        ("guidance_rescale", (pos.bfloat16(), neg.bfloat16(), k8, index % 3, 1.0)),
        ("guided_step", (pos, neg, x, k8, None, None, None, None, None, *NO_KEY)),
        ("guided_step", (pos.bfloat16(), None, x, k8, index % 3, scale, x, noise, noise, *NO_KEY)),
        ("guided_step", (None, neg, x, one8, None, None, None, None, None, *DRAWN)),
        ("tdft_step", tdft_arguments("noise")),
        ("tdft_step", tdft_arguments("noise", "neg", BF16)),
        ("tdft_step", tdft_arguments("data", "pos")),
        ("x0_loss", (graded, x, noise, k2, None, weight, "l2", 1e-3, True)),
        ("x0_loss", (graded.detach().half(), x, noise, some2, index, weight, "huber", 1e-3, True)),
        ("x0_loss", (pos, x, noise, k2, None, weight, "huber", 1e-3, False)),
        ("x0_loss_backward", (pos, k2, None, weight, torch.tensor(2.0))),
        ("x0_loss_backward", (pos.bfloat16(), some2, index, weight, torch.tensor(2.0))),
        ("ema_update", ([x.clone(), k2.clone()], [noise, k2 + 1], [], 0.9)),
        ("ema_update", ([x.clone()], [noise.bfloat16()], [noise.bfloat16().clone()], 0.9)),
    ]


OPCHECKS = [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(opcheck_cases())]


def test_every_op_is_checked():
    assert {case[0] for case in opcheck_cases()} == set(SCHEMAS)


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize(("op", "arguments"), OPCHECKS)
def test_opcheck(op, arguments, name):
    with backends.use(name):
        torch.library.opcheck(getattr(torch.ops.selfnpo, op).default, arguments)


def test_fake_shapes_and_dtypes_are_the_real_ones(backend):
    """Traced results have the shapes, dtypes, devices and strides of real ones."""
    for op, arguments in opcheck_cases():
        function = getattr(torch.ops.selfnpo, op)
        arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(cases.device(backend)), arguments)
        with torch.no_grad():
            real = function(*arguments)
            with FakeTensorMode() as mode:
                traced = function(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for a, b in zip(flat(real), flat(traced), strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_draws_and_seeds_do_not_compile_again():
    """Each step of a sampler has another draw id, which makes two graphs at most.

    The first graph takes the integers for constants.
    """
    x, pos, k = *draw(9, SHAPE, SHAPE), torch.ones(1, 8)
    graphs = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=graphs, fullgraph=True)
    def step(i: int):
        return guided_step(pos, None, x, k, noise=NoiseKey(3 + i, torch.arange(3), 16 * i + 5))[0]

    for i in range(12):
        assert torch.equal(step(i), guided_step(pos, None, x, k, noise=NoiseKey(3 + i, torch.arange(3), 16 * i + 5))[0])
    assert graphs.frame_count <= 2


def flat(results) -> list[torch.Tensor]:
    return [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)


# A training step and a sampler step that use every op


def step_inputs(on: str = "cpu", network=F32) -> dict[str, torch.Tensor]:
    x, final, master = draw(7, SHAPE, SHAPE, SHAPE, on=on)
    scale = torch.nn.Parameter(torch.ones(SHAPE[1:], device=on))
    world = lives.make_world(2, SHAPE, steps=4, w=-3.0, start="noise", on=on)
    slots = SLOTS.to(on)
    return {
        "x": x, "final": final, "slots": slots, "next_slots": torch.zeros_like(slots), "scale": scale,
        "master": master, "shadow": master.to(network), "k2": draw(8, (5, 2), on=on)[0], "world": world,
    }  # fmt: skip


def whole_step(x, final, slots, next_slots, scale, master, shadow, k2, world) -> tuple[torch.Tensor, ...]:
    """Every op once; the `networks` are tanh, the student's weight is `scale`."""
    ids = slots[1]
    key = NoiseKey(3, ids, 16 + slots[0])
    with torch.no_grad():
        pos, neg = torch.tanh(x), torch.tanh(0.5 * x)
        target, x_s, pairs, weight = tdft_step(
            pos, neg, x, final, slots, next_slots, world.tables, world.rules, world.latents
        )
        started = affine_noise(normal(key, SHAPE[1:]), k2, key, index=slots[2])
        factor = guidance_rescale(pos, neg, world.tables.step, 0.7, index=slots[0])
        stepped = guided_step(
            pos, neg, started, world.tables.step, index=slots[0], scale=factor, x0_prev=target, x0_prev2=x_s, noise=key
        )
    loss, samples = x0_loss(torch.tanh(x_s) * scale, x_s, target, k2, "huber", weight, index=slots[2])
    ema_update([master], [target], [shadow], 0.9)
    return loss, samples, target, x_s, pairs, *stepped


def assert_compiled_as_eager(compiled) -> None:
    """Results, the gradient, and everything that is overwritten."""
    eager, traced = step_inputs(), step_inputs()
    expected, found = whole_step(**eager), compiled(**traced)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    expected[0].backward()
    found[0].backward()
    torch.testing.assert_close(traced["scale"].grad, eager["scale"].grad, rtol=1e-5, atol=1e-6)
    assert eager["scale"].grad.abs().max() > 1e-4
    untouched = step_inputs()
    for name in ("x", "final", "next_slots", "master", "shadow"):
        torch.testing.assert_close(traced[name], eager[name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(traced[name], untouched[name]), name
    assert torch.equal(traced["slots"], untouched["slots"])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_over_every_op(compiler):
    torch.compiler.reset()
    assert_compiled_as_eager(torch.compile(whole_step, fullgraph=True, backend=compiler))


def test_a_batch_that_changes_is_no_new_op():
    """Compiled with dynamic shapes, one graph serves every batch."""
    torch.compiler.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, k: affine_noise(x, k, x), fullgraph=True, dynamic=True, backend=counting)
    for batch in (3, 5, 8):
        x, k = draw(9, (batch, 7), (batch, 2))
        assert torch.equal(compiled(x, k), affine_noise(x, k, x))
    assert len(graphs) == 1


@pytest.mark.parametrize("network", [F32, BF16, F16])
def test_a_step_on_fake_cuda_tensors_asks_nothing_of_the_host(network):
    """Any .item() and any branch on a value raises in this mode."""
    mode = FakeTensorMode()

    def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    pos, neg = map(on_cuda, draw(10, SHAPE, SHAPE, dtype=network))
    x, final, master, k2 = map(on_cuda, draw(11, SHAPE, SHAPE, SHAPE, (5, 2)))
    world, slots = lives.make_world(2, SHAPE, steps=4, w=-3.0, start="noise"), on_cuda(SLOTS)
    tables = {name: on_cuda(tensor) for name, tensor in vars(world.tables).items()}
    with mode, torch.no_grad():
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        next_slots = torch.empty_like(slots)
        target, x_s, pairs, weight = tdft_step(
            pos, neg, x, final, slots, next_slots, ops.TdftTables(**tables), world.rules
        )
        index, ids, left, _ = slots.unbind()
        key = NoiseKey(3, ids, 16 + index)
        started = affine_noise(normal(key, SHAPE[1:]), k2, key, index=left)
        factor = guidance_rescale(pos, neg, tables["step"], 0.7, index=index)
        stepped = guided_step(pos, neg, started, tables["step"], index=index, scale=factor, x0_prev=target, noise=key)
        loss, samples, slope = torch.ops.selfnpo.x0_loss(pos, x_s, target, k2, left, weight, "huber", 1e-3, True)
        gradient = torch.ops.selfnpo.x0_loss_backward(slope, k2, left, weight, loss)
        shadow = target.to(network)
        ema_update([master], [target], [shadow], 0.9)
    for tensor in (target, x_s, pairs, weight, *stepped, loss, samples, slope, gradient, shadow):
        assert tensor.device.type == "cuda"
    assert gradient.dtype == network
    assert loss.shape == ()
