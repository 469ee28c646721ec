"""The reference operations against their formulas written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import Draw, NoiseKey, affine_noise, draw_id, ema_update, guided_step, normal, x0_loss

IMAGE, VIDEO = (3, 4, 5, 7), (2, 3, 4, 5, 3)  # B, C, H, W and B, F, C, H, W
LOW = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
HALF_SUBNORMAL = 2.0**-25  # half a step of float16 near zero

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=30, deadline=None)


def draw(seed: int, *sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def column(k: torch.Tensor, j: int, rank: int) -> np.ndarray:
    return wide(k)[:, j].reshape(-1, *[1] * (rank - 1))


def assert_rounded(out: torch.Tensor, exact: np.ndarray, terms: np.ndarray, arithmetic: torch.dtype) -> None:
    """`out` is `exact` rounded once to its dtype, after a few roundings of `arithmetic` on terms of this size."""
    bound = UNIT[out.dtype] * np.abs(exact) + 8 * UNIT[arithmetic] * terms
    if out.dtype == torch.float16:
        bound = bound + HALF_SUBNORMAL
    excess = np.abs(wide(out) - exact) - bound
    assert excess.max() <= 0, f"off by {excess.max():.3g} more than rounding allows"


def check_affine(x: torch.Tensor, k: torch.Tensor, noise: torch.Tensor, arithmetic: torch.dtype) -> None:
    out = affine_noise(x, k, noise)
    assert out.dtype == x.dtype
    signal, disturbance = column(k, 0, x.ndim) * wide(x), column(k, 1, x.ndim) * wide(noise)
    assert_rounded(out, signal + disturbance, np.abs(signal) + np.abs(disturbance), arithmetic)


def check_step(
    pos: torch.Tensor, neg: torch.Tensor, x: torch.Tensor, w: float, k: torch.Tensor, arithmetic: torch.dtype
) -> None:
    results = guided_step(pos, neg, x, w, k)
    p = (1 + w) * wide(pos) - w * wide(neg)
    size = (1 + abs(w)) * np.abs(wide(pos)) + abs(w) * np.abs(wide(neg))
    for out, i, j in zip(results, (2, 0), (3, 1), strict=True):
        assert out.dtype == x.dtype
        a, b = column(k, i, x.ndim), column(k, j, x.ndim)
        assert_rounded(out, a * wide(x) + b * p, np.abs(a * wide(x)) + np.abs(b) * size, arithmetic)


@quick
@given(shape=shapes, seed=seeds)
def test_affine_noise(shape, seed):
    x, noise, k = draw(seed, shape, shape, (shape[0], 2))
    check_affine(x, k, noise, torch.float32)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_affine_noise_rounds_once(dtype, shape):
    (x,) = draw(1, shape, dtype=dtype)
    noise, k = draw(2, shape, (shape[0], 2))
    check_affine(x, k, noise, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_affine_noise_draws_the_normals_of_its_key(shape, dtype):
    (x,) = draw(3, shape, dtype=dtype)
    (k,) = draw(4, (shape[0], 2))
    key = NoiseKey(5, torch.arange(shape[0]) + 2**40, draw_id(Draw.RENOISE, torch.arange(shape[0])))
    out = affine_noise(x, k, key)
    assert torch.equal(out, affine_noise(x, k, normal(key, shape[1:])))
    assert not torch.equal(out, affine_noise(x, k, NoiseKey(6, key.sample_ids, key.draws)))


@quick
@given(shape=shapes, seed=seeds, w=st.floats(-8, 8, width=32))
def test_guided_step(shape, seed, w):
    pos, neg, x, k = draw(seed, shape, shape, shape, (shape[0], 4))
    check_step(pos, neg, x, w, k, torch.float32)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_guided_step_rounds_once(dtype, shape):
    pos, neg, x = draw(7, shape, shape, shape, dtype=dtype)
    (k,) = draw(8, (shape[0], 4))
    check_step(pos, neg, x, 2.5, k, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", LOW)
def test_guided_step_keeps_a_float32_state_beside_low_precision_outputs(dtype):
    pos, neg = draw(9, IMAGE, IMAGE, dtype=dtype)
    x, k = draw(10, IMAGE, (IMAGE[0], 4))
    check_step(pos, neg, x, 4.0, k, torch.float32)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_one_network_suffices_at_w_0_and_minus_1(shape):
    pos, neg, x, k = draw(11, shape, shape, shape, (shape[0], 4))
    for results, p in ((guided_step(pos, None, x, 0.0, k), pos), (guided_step(None, neg, x, -1.0, k), neg)):
        for out, i, j in zip(results, (2, 0), (3, 1), strict=True):
            a, b = column(k, i, x.ndim) * wide(x), column(k, j, x.ndim) * wide(p)
            assert_rounded(out, a + b, np.abs(a) + np.abs(b), torch.float32)


def loss_by_hand(pred, x_s, target, k, kind: str, weight, c: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss, its value per sample, and its gradient at pred."""
    rank = pred.ndim
    k1 = column(k, 1, rank)
    d = column(k, 0, rank) * wide(x_s) + k1 * wide(pred) - wide(target)
    value = d**2 if kind == "l2" else np.sqrt(d**2 + c**2) - c
    slope = 2 * d if kind == "l2" else d / np.sqrt(d**2 + c**2)
    per_sample = value.reshape(len(value), -1).mean(1)
    share = wide(weight).reshape(-1, *[1] * (rank - 1)) / pred.numel()
    return float((wide(weight) * per_sample).mean()), per_sample, share * k1 * slope


def check_loss(tensors: list[torch.Tensor], kind: str, c: float, rtol: float) -> None:
    pred, x_s, target, k, weight = tensors
    pred = pred.clone().requires_grad_()
    loss, per_sample = x0_loss(pred, x_s, target, k, kind, weight, c)
    loss.backward()
    value, each, gradient = loss_by_hand(pred, x_s, target, k, kind, weight, c)
    assert loss.dtype == per_sample.dtype == (torch.float64 if pred.dtype == torch.float64 else torch.float32)
    assert not per_sample.requires_grad
    assert loss.item() == pytest.approx(value, rel=rtol)
    np.testing.assert_allclose(wide(per_sample), each, rtol=rtol)
    assert pred.grad.dtype == pred.dtype
    # Relative to the largest: an element near d = 0 is the difference of two larger numbers.
    scale = np.abs(gradient).max()
    if pred.dtype in LOW:
        assert (np.abs(wide(pred.grad) - gradient) <= UNIT[pred.dtype] * np.abs(gradient) + rtol * scale).all()
    else:
        np.testing.assert_allclose(wide(pred.grad), gradient, atol=rtol * scale, rtol=rtol)


def loss_inputs(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    pred, x_s, target = draw(seed, shape, shape, shape, dtype=dtype)
    k, weight = draw(seed + 1, (shape[0], 2), (shape[0],))
    return [pred, x_s, target, k, weight.abs() + 0.1]


@pytest.mark.parametrize("kind", ["l2", "huber"])
@quick
@given(shape=shapes, seed=seeds)
def test_x0_loss_and_its_gradient(kind, shape, seed):
    # The largest gaps come of single elements near d = 0, where d itself is a difference of rounded terms; hence c 0.1.
    check_loss(loss_inputs(seed, shape, torch.float64), kind, 0.1, rtol=1e-7)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("kind", ["l2", "huber"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_x0_loss_works_in_float32(dtype, kind, shape):
    # Observed 1.4e-7 for the losses, 9e-7 for the gradient.
    check_loss(loss_inputs(12, shape, dtype), kind, 1e-1, rtol=2e-6)


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_x0_loss_gradcheck(kind):
    pred, x_s, target, k, weight = (tensor.double() for tensor in loss_inputs(14, (2, 3, 2, 2), torch.float64))
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: x0_loss(p, x_s, target, k, kind, weight, 0.3)[0], (pred,))


def test_pseudo_huber_is_the_paper_authors():
    """At d = 0 nothing, far from it |d| - c, near it d^2 / 2c."""
    ones, zero = torch.ones(1), torch.zeros(1, 1)
    identity = torch.tensor([[0.0, 1.0]], dtype=torch.float64)

    def at(d: float) -> float:
        pred = torch.full((1, 1), d, dtype=torch.float64)
        return x0_loss(pred, zero, zero, identity, "huber", ones, 1e-3)[0].item()

    assert at(0.0) == 0
    assert at(-5.0) == pytest.approx(5 - 1e-3, rel=1e-6)
    assert at(1e-5) == pytest.approx(1e-10 / 2e-3, rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.9999])
@quick
@given(shape=shapes, seed=seeds)
def test_ema_update(decay, shape, seed):
    master, live = draw(seed, shape, shape)
    before, address = wide(master).copy(), master.data_ptr()
    ema_update(master, live, None, decay)
    kept, added = decay * before, (1 - decay) * wide(live)
    assert_rounded(master, kept + added, np.abs(before) + np.abs(wide(live)), torch.float32)
    assert master.data_ptr() == address


@pytest.mark.parametrize("dtype", LOW)
def test_ema_update_moves_the_master_where_its_shadow_cannot_see_it(dtype):
    master, live = torch.ones(5), torch.full((5,), 1.125, dtype=dtype)
    shadow = master.to(dtype)
    ema_update(master, live, shadow, 0.9999)
    torch.testing.assert_close(master, torch.full((5,), 1 + 0.125e-4), rtol=2.0**-23, atol=0)
    assert torch.equal(shadow, torch.ones(5, dtype=dtype))
    for _ in range(19_999):
        ema_update(master, live, shadow, 0.9999)
    expected = 1.125 - 0.125 * math.exp(20_000 * math.log1p(-1e-4))
    # Observed 6e-6; each of 20,000 steps rounds by up to 2^-24.
    assert master[0].item() == pytest.approx(expected, abs=20_000 * 2.0**-24)
    assert torch.equal(shadow, master.to(dtype))
    assert shadow[0] > 1.09


def test_ema_update_takes_a_parameter_and_leaves_no_graph():
    master, live = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    ema_update(master, live, None, 0.75)
    assert torch.equal(master.detach(), torch.full((3,), 0.25))
    assert master.grad_fn is None
    assert torch.equal(live.detach(), torch.ones(3))
