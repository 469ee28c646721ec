"""`affine_noise` against its formula in float64 numpy."""

from __future__ import annotations

import cases
import exact
import pytest
import torch
from cases import F16, F32, F64, draw, rows, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import affine_noise, backends, normal


def check(backend, mixture, x, k, index, noise) -> None:
    out = affine_noise(x, k, noise, index=index)
    assert out.dtype == x.dtype
    each = rows(k, index, len(x))
    k0, k1 = (exact.column(each, j, x.ndim) for j in range(2))
    terms = exact.linear((k0, wide(x), wide(x)), (k1, *cases.noise_terms(noise, x.shape)))
    cases.assert_rounded("affine_noise", backend, mixture, out, *terms)


@cases.over_grid(noise=("given", "drawn"))
def test_values(backend, mixture, shape, noise):
    on = cases.device(backend)
    (x,), (given_,) = draw(1, shape, dtype=mixture.state, on=on), draw(2, shape, dtype=mixture.network, on=on)
    before = x.clone()
    for i, (k, index) in enumerate(cases.tables(3, shape[0], 2, on)):
        drawn = cases.key(shape[0], on, per_sample=i != 0)
        check(backend, mixture, x, k, index, given_ if noise == "given" else drawn)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [cases.IMAGE, cases.VIDEO])
def test_float64(shape):
    x, noise, k = draw(4, shape, shape, (shape[0], 2), dtype=F64)
    check("reference", cases.FLOAT64, x, k, None, noise)
    check("reference", cases.FLOAT64, x, k, None, cases.key(shape[0]))


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    seed=st.integers(0, 2**31),
    mixture=st.sampled_from(cases.EVERY_MIXTURE),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    keyed=st.booleans(),
)
def test_any_shape_mixture_and_size(name, shape, seed, mixture, scale, keyed):
    x = (draw(seed, shape)[0] * scale).to(mixture.state)
    noise = cases.key(shape[0], seed=seed * 2**33) if keyed else draw(seed + 1, shape, dtype=mixture.network)[0]
    with backends.use(name):
        for k, index in cases.tables(seed, shape[0], 2):
            check(name, mixture, x, k, index, noise)


def test_the_key_gives_the_normals_of_its_key(backend):
    """Drawn inside or given as a tensor: the same to the rounding of a fused multiply."""
    on = cases.device(backend)
    (x,), (k,) = draw(5, (3, 2, 35), on=on), draw(6, (3, 2), on=on)
    drawn = affine_noise(x, k, cases.key(3, on))
    torch.testing.assert_close(drawn, affine_noise(x, k, normal(cases.key(3, on), x.shape[1:])), rtol=0, atol=1e-6)
    assert (drawn - affine_noise(x, k, cases.key(3, on, seed=cases.SEED + 1))).abs().max() > 0.1


def test_coefficients_0_and_1_leave_x_as_it_is(backend):
    on = cases.device(backend)
    one = torch.tensor([[1.0, 0.0]], device=on)
    for dtype in (F32, F16):
        (x,) = draw(7, (2, 3, 67), dtype=dtype, on=on)
        assert torch.equal(affine_noise(x, one, cases.key(2, on)), x)


def test_the_same_call_twice_is_the_same(backend):
    on, shape = cases.device(backend), cases.large(backend)
    (x,), (k,) = draw(8, shape, on=on), draw(9, (1, 2), on=on)
    cases.assert_repeatable(lambda: (affine_noise(x, k, cases.key(len(x), on)),))
