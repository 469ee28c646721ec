"""`guidance_rescale` against its formula in float64 numpy and against diffusers."""

from __future__ import annotations

import cases
import exact
import numpy as np
import pytest
import torch
from cases import F32, F64, draw, rows, wide
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import backends, guidance_rescale, guided_step

PHIS = (0.0, 0.3, 0.7, 1.0)


def check(backend, mixture, pos, neg, k, phi, index=None) -> None:
    out = guidance_rescale(pos, neg, k, phi, index=index)
    assert out.dtype == (F64 if mixture is cases.FLOAT64 else F32)
    p, size = exact.guided(wide(pos), wide(neg), rows(k, index, len(pos)))
    flat = [a.reshape(len(pos), -1) for a in (wide(pos), p, size)]
    ratio = flat[0].std(1, ddof=1) / flat[1].std(1, ddof=1)
    # Elements round independently of each other: their error, relative to the deviation, falls with
    # the root of their number.
    noise = np.sqrt((flat[2] ** 2).mean(1) / flat[0].shape[1]) / flat[1].std(1, ddof=1)
    cases.assert_rounded("guidance_rescale", backend, mixture, out, phi * ratio + 1 - phi, 1 + ratio * (1 + noise))


def some_tables(seed: int, batch: int, on: str):
    """Only w is read."""
    for k, index in cases.tables(seed, batch, 8, on):
        k[:, :6] = k[:, 7:] = float("nan")
        k[:, 6] *= 4
        yield k, index


@cases.over_grid(least=2)
def test_values(backend, mixture, shape):
    on = cases.device(backend)
    pos, neg = draw(1, shape, shape, dtype=mixture.network, on=on)
    for phi, (k, index) in zip(PHIS[1:], some_tables(2, shape[0], on), strict=True):
        check(backend, mixture, pos, neg, k, phi, index)


def test_float64():
    pos, neg, k = draw(3, cases.IMAGE, cases.IMAGE, (3, 8), dtype=F64)
    check("reference", cases.FLOAT64, pos, neg, k, 0.7)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_a_large_mean_does_not_drown_the_deviation(backend, offset):
    """The sum of squares less the square of the sum would lose 7 and 20 of the 24 bits."""
    on, shape = cases.device(backend), (3, 4, 33)
    pos, neg = draw(4, shape, shape, on=on)
    for k, index in some_tables(5, shape[0], on):
        check(backend, cases.FLOAT32, pos + offset, neg + offset, k, 1.0, index)
        check(backend, cases.FLOAT32, pos + offset, neg - offset, k, 1.0, index)


def test_an_outlier_does_not_drown_the_deviation(backend):
    """At any position of the outlier: no single element may stand for the mean."""
    on, shape = cases.device(backend), (3, 2085)
    pos, neg = draw(14, shape, shape, on=on)
    pos[0, 0], pos[1, 7], pos[2, -1] = 1000.0, -1000.0, 1000.0
    for k, index in some_tables(15, shape[0], on):
        check(backend, cases.FLOAT32, pos, neg, k, 1.0, index)


@pytest.mark.parametrize("phi", PHIS)
def test_diffusers(backend, phi):
    """The scale, and p of `guided_step` under it, are those of rescale_noise_cfg."""
    on, shape, w = cases.device(backend), (4, 3, 5, 7), 6.5
    pos, neg, x = draw(6, shape, shape, shape, on=on)
    k = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, w, 0.0]], device=on)
    scale = guidance_rescale(pos, neg, k, phi)
    theirs = rescale_noise_cfg(neg + (w + 1) * (pos - neg), pos, guidance_rescale=phi)
    # Observed 1.9e-6.
    torch.testing.assert_close(guided_step(pos, neg, x, k, scale=scale)[0], theirs, rtol=1e-6, atol=1e-5)
    if phi == 0:
        assert torch.equal(scale, torch.ones_like(scale))


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(2, 9), min_size=2, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
    mixture=st.sampled_from(cases.EVERY_MIXTURE),
    phi=st.floats(0, 1),
)
def test_any_shape_and_mixture(name, shape, seed, mixture, phi):
    pos, neg = draw(seed, shape, shape, dtype=mixture.network)
    with backends.use(name):
        for k, index in some_tables(seed + 1, shape[0], "cpu"):
            check(name, mixture, pos, neg, k, phi, index)


def test_the_same_call_twice_is_the_same(backend):
    on, shape = cases.device(backend), cases.large(backend)
    pos, neg = draw(7, shape, shape, on=on)
    (k,) = draw(8, (1, 8), on=on)
    cases.assert_repeatable(lambda: (guidance_rescale(pos, neg, k, 0.7),))
