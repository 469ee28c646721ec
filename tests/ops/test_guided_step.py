"""`guided_step` against its formulas in float64 numpy."""

from __future__ import annotations

import cases
import exact
import pytest
import torch
from cases import BF16, F16, F32, F64, draw, rows, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import backends, guided_step, normal

BRANCHES = ("both", "pos", "neg")


def outputs(seed: int, shape, dtype, branches: str, on: str = "cpu") -> tuple[torch.Tensor | None, torch.Tensor | None]:
    pos, neg = draw(seed, shape, shape, dtype=dtype, on=on)
    return pos if branches != "neg" else None, neg if branches != "pos" else None


def check(backend, mixture, pos, neg, x, k, index=None, *, scale=None, noise=None, **previous) -> None:
    results = guided_step(pos, neg, x, k, index=index, scale=scale, noise=noise, **previous)
    each = rows(k, index, len(x))
    k0, k1, k2, k3, k4, k5, _, k7 = (exact.column(each, j, x.ndim) for j in range(8))
    p, state = exact.guided(wide(pos), wide(neg), each, wide(scale)), (wide(x), wide(x))
    x0_terms, x_next = [(k0, *state), (k1, *p)], [(k2, *state), (k3, *p)]
    x_next += [({"x0_prev": k4, "x0_prev2": k7}[name], wide(x0), wide(x0)) for name, x0 in previous.items()]
    if noise is not None:
        x_next.append((k5, *cases.noise_terms(noise, x.shape)))
    for out, terms in zip(results, (x_next, x0_terms), strict=True):
        assert out.dtype == x.dtype
        cases.assert_rounded("guided_step", backend, mixture, out, *exact.linear(*terms))


def extras(seed: int, shape, mixture, on: str = "cpu") -> list[dict]:
    """No optional argument, each by itself, and several; what is kept of two steps comes in pairs."""
    (scale,), states = draw(seed, (shape[0],), on=on), draw(seed + 1, shape, shape, dtype=mixture.state, on=on)
    previous = dict(zip(("x0_prev", "x0_prev2"), states, strict=True))
    (noise,) = draw(seed + 2, shape, dtype=mixture.network, on=on)
    key = cases.key(shape[0], on)
    return [
        {},
        {"scale": scale},
        previous,
        {"noise": noise},
        {"scale": scale, "x0_prev": states[0], "noise": key},
    ]


@cases.over_grid(branches=BRANCHES)
def test_values(backend, mixture, shape, branches):
    """All optional arguments, with each way to give coefficients in turn."""
    on = cases.device(backend)
    (x,) = draw(1, shape, dtype=mixture.state, on=on)
    before, ways = x.clone(), list(cases.tables(2, shape[0], 8, on))
    pos, neg = outputs(3, shape, mixture.network, branches, on)
    for i, extra in enumerate(extras(4, shape, mixture, on), start=BRANCHES.index(branches)):
        check(backend, mixture, pos, neg, x, *ways[i % 3], **extra)
    assert torch.equal(x, before)


@pytest.mark.parametrize("branches", BRANCHES)
def test_float64(branches):
    shape = cases.IMAGE
    x, k = draw(7, shape, (shape[0], 8), dtype=F64)
    pos, neg = outputs(8, shape, F64, branches)
    for extra in extras(9, shape, cases.FLOAT64):
        check("reference", cases.FLOAT64, pos, neg, x, k, **extra)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    seed=st.integers(0, 2**31),
    mixture=st.sampled_from(cases.EVERY_MIXTURE),
    branches=st.sampled_from(BRANCHES),
    w=st.floats(-8, 8, width=32),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_any_shape_mixture_and_guidance(name, shape, seed, mixture, branches, w, scale):
    x = (draw(seed, shape)[0] * scale).to(mixture.state)
    pos, neg = outputs(seed + 1, shape, mixture.network, branches)
    with backends.use(name):
        chosen = extras(seed + 2, shape, mixture)[2:]
        for (k, index), extra in zip(cases.tables(seed, shape[0], 8), chosen, strict=True):
            k[:, 6] = w
            check(name, mixture, pos, neg, x, k, index, **extra)


def table(*row: float, on: str) -> torch.Tensor:
    return torch.tensor([row], device=on)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_identity_row_leaves_x_as_it_is(backend, dtype):
    """Slots that wait in lockstep rollouts get this row."""
    on, shape = cases.device(backend), (2, 3, 67)
    (x,) = draw(10, shape, dtype=dtype, on=on)
    pos, neg = outputs(11, shape, F32, "both", on)
    k = table(0.7, -0.3, 1.0, 0.0, 0.0, 0.0, 4.0, 0.0, on=on)
    assert torch.equal(guided_step(pos, neg, x, k)[0], x)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_guidance_0_is_the_positive_branch(backend, dtype):
    on, shape = cases.device(backend), (2, 3, 67)
    (x,), (k,) = draw(12, shape, on=on), draw(13, (2, 8), on=on)
    pos, neg = outputs(14, shape, dtype, "both", on)
    without = guided_step(pos, None, x, k)
    k[:, 6] = 0
    for a, b in zip(guided_step(pos, neg, x, k), without, strict=True):
        assert torch.equal(a, b)


def test_one_branch_takes_no_guidance(backend):
    """For any w: only the negative branch is as w = -1, only the positive one as w = 0."""
    on, shape = cases.device(backend), (2, 67)
    (x,), (k,) = draw(15, shape, on=on), draw(16, (2, 8), on=on)
    pos, neg = outputs(17, shape, F32, "both", on)
    other = k.clone()
    other[:, 6] = float("nan")
    for branches in ((pos, None), (None, neg)):
        for a, b in zip(guided_step(*branches, x, k), guided_step(*branches, x, other), strict=True):
            assert torch.equal(a, b)


def test_the_key_gives_the_normals_of_its_key(backend):
    on, shape = cases.device(backend), (3, 2, 35)
    (x,), (k,) = draw(18, shape, on=on), draw(19, (3, 8), on=on)
    pos, neg = outputs(20, shape, F32, "both", on)
    drawn = guided_step(pos, neg, x, k, noise=cases.key(3, on))
    given_ = guided_step(pos, neg, x, k, noise=normal(cases.key(3, on), shape[1:]))
    torch.testing.assert_close(drawn[0], given_[0], rtol=0, atol=2e-6)
    assert torch.equal(drawn[1], given_[1])


def test_the_same_call_twice_is_the_same(backend):
    on, shape = cases.device(backend), cases.large(backend)
    (x,), (k,) = draw(21, shape, on=on), draw(22, (1, 8), on=on)
    pos, neg = outputs(23, shape, BF16, "both", on)
    cases.assert_repeatable(lambda: guided_step(pos, neg, x, k, noise=cases.key(len(x), on)))
