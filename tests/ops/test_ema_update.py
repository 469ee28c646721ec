"""`ema_update` against its formula in float64 numpy and against closed form."""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import torch
from cases import BF16, F16, F32, F64, draw, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import backends, ema_update

LOW = (BF16, F16)


def check(backend, mixture, masters, live, shadows, decay: float) -> None:
    before, addresses = [wide(m) for m in masters], [m.data_ptr() for m in masters]
    kept = [p.clone() for p in live]
    ema_update(masters, live, shadows, decay)
    for i, (master, new) in enumerate(zip(masters, live, strict=True)):
        exact = decay * before[i] + (1 - decay) * wide(new)
        # The step is small where the decay is near 1. Its rounding has to be as small; that of the
        # master comes on top.
        terms = np.abs(exact) + (1 - decay) * (np.abs(before[i]) + np.abs(wide(new)))
        cases.assert_rounded("ema_update", backend, mixture, master, exact, terms)
        assert torch.equal(new, kept[i])
        assert master.data_ptr() == addresses[i]
        if shadows:
            assert torch.equal(shadows[i], master.to(shadows[i].dtype))


def parameters(seed: int, shapes, mixture, on: str = "cpu") -> tuple[list, list, list]:
    """(masters, live, shadows) of a mixture: networks in its low precision, the masters float32."""
    wide_ = F64 if mixture is cases.FLOAT64 else F32
    masters = draw(seed, *shapes, dtype=wide_, on=on)
    live = draw(seed + 1, *shapes, dtype=mixture.network, on=on)
    return masters, live, [torch.full_like(p, float("nan")) for p in live]


@cases.over_grid(decay=(0.0, 0.5, 0.999, 0.9999, 1.0))
def test_values(backend, mixture, shape, decay):
    masters, live, shadows = parameters(1, (shape,), mixture, cases.device(backend))
    check(backend, mixture, masters, live, shadows, decay)
    check(backend, mixture, masters, live, [], decay)


@pytest.mark.parametrize("mixture", cases.MIXTURES, ids=lambda mixture: mixture.name)
def test_lists(backend, mixture):
    """Of any ranks and sizes, 0 dimensions included."""
    shapes = ((), (1,), (5,), (3, 4, 2, 2), (67, 3), (8, 16))
    masters, live, shadows = parameters(2, shapes, mixture, cases.device(backend))
    check(backend, mixture, masters, live, shadows, 0.9)


def test_float64():
    check("reference", cases.FLOAT64, *parameters(3, ((3, 4), (5,)), cases.FLOAT64), 0.9)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    mixture=st.sampled_from(cases.EVERY_MIXTURE),
    decay=st.floats(0, 1),
)
def test_any_shapes_and_decay(name, shapes, seed, mixture, decay):
    with backends.use(name):
        check(name, mixture, *parameters(seed, shapes, mixture), decay)


def test_an_empty_list(backend):
    ema_update([], [], [], 0.9)


def test_an_empty_tensor(backend):
    on = cases.device(backend)
    masters, live, shadows = parameters(4, ((0, 3), (2, 3)), cases.MIXTURES[1], on)
    check(backend, cases.MIXTURES[1], masters, live, shadows, 0.9)


def test_channels_last(backend):
    """The update follows the order of memory, which all three tensors share."""
    mixture = cases.MIXTURES[1]
    tensors = parameters(5, ((3, 5, 2, 7),), mixture, cases.device(backend))
    masters, live, shadows = ([t.to(memory_format=torch.channels_last) for t in group] for group in tensors)
    check(backend, mixture, masters, live, shadows, 0.9)
    assert masters[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_views_into_flat_buffers(backend, offset):
    """Unaligned views, like those of master shards; memory outside them stays the same."""
    on, sizes = cases.device(backend), (67, 1, 33, 128)
    flat = [draw(6, (300,), on=on)[0], *draw(7, (300,), (300,), dtype=BF16, on=on)]
    kept = [t.clone() for t in flat]
    starts = [offset + sum(sizes[:i]) + i for i in range(len(sizes))]
    views = [[t[a : a + n] for a, n in zip(starts, sizes, strict=True)] for t in flat]
    check(backend, cases.MIXTURES[1], *views, 0.9)
    outside = torch.ones(300, dtype=torch.bool, device=on)
    for a, n in zip(starts, sizes, strict=True):
        outside[a : a + n] = False
    for now, before in zip(flat, kept, strict=True):
        assert torch.equal(now[outside], before[outside])


@pytest.mark.parametrize("dtype", LOW)
def test_the_master_moves_where_its_shadow_cannot_see_it(backend, dtype):
    """The first update is 1.25e-5, a hundredth of a bfloat16 step; many follow the closed form."""
    on, steps = cases.device(backend), 100 if backend == "triton" else 20_000
    master, live = torch.ones(5, device=on), torch.full((5,), 1.125, dtype=dtype, device=on)
    shadow = master.to(dtype)
    ema_update([master], [live], [shadow], 0.9999)
    torch.testing.assert_close(master, torch.full_like(master, 1 + 0.125e-4), rtol=2.0**-23, atol=0)
    assert torch.equal(shadow, torch.ones_like(shadow))
    for _ in range(steps - 1):
        ema_update([master], [live], [shadow], 0.9999)
    expected = 1.125 - 0.125 * math.exp(steps * math.log1p(-1e-4))
    # Observed 6e-6 after 20,000 steps, 4e-6 after 100; a decay rounded to float32 would be off by
    # 1.6e-5.
    assert master[0].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(shadow, master.to(dtype))
    if steps == 20_000:
        assert shadow[0] > 1.09


def test_autograd_sees_what_is_overwritten(backend):
    """A pending backward that saved a master must not use its new values in silence."""
    on = cases.device(backend)
    master, shadow, weight = (torch.ones(5, device=on) for _ in range(3))
    weight.requires_grad_()
    for saved in (master, shadow):
        out = (weight * saved).sum()
        ema_update([master], [torch.zeros(5, device=on)], [shadow], 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_parameters_have_no_graph(backend):
    on = cases.device(backend)
    master = torch.nn.Parameter(torch.zeros(3, device=on))
    live = torch.nn.Parameter(torch.ones(3, device=on))
    ema_update([master], [live], [], 0.75)
    assert torch.equal(master.detach(), torch.full((3,), 0.25, device=on))
    assert master.grad_fn is None
    assert torch.equal(live.detach(), torch.ones(3, device=on))


def test_the_same_call_twice_is_the_same(backend):
    on, shape = cases.device(backend), cases.large(backend)
    masters, live, shadows = parameters(8, (shape, (7,)), cases.MIXTURES[1], on)

    def call() -> tuple[torch.Tensor, ...]:
        fresh = [m.clone() for m in masters]
        ema_update(fresh, live, shadows, 0.99)
        return *fresh, *(s.clone() for s in shadows)

    cases.assert_repeatable(call)
