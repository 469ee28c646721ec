"""`x0_loss`, its gradient and its halves against the formulas in float64 numpy."""

from __future__ import annotations

import cases
import exact
import numpy as np
import pytest
import torch
from cases import BF16, F16, F32, F64, UNIT, draw, rows, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import backends, x0_loss

KINDS = ("l2", "huber")
C = 1e-3


def inputs(seed: int, shape, mixture, on: str = "cpu") -> list[torch.Tensor]:
    (pred,) = draw(seed, shape, dtype=mixture.network, on=on)
    x_s, target = draw(seed + 1, shape, shape, dtype=mixture.state, on=on)
    (weight,) = draw(seed + 2, (shape[0],), dtype=F64 if mixture is cases.FLOAT64 else F32, on=on)
    return [pred, x_s, target, weight.abs() + 0.1]


def by_hand(pred, x_s, target, weight, each: np.ndarray, kind: str, c: float) -> dict[str, tuple]:
    """(value, size) of the loss, the samples' losses, the slope and the gradient at pred.

    Roundings are relative to the sizes.
    """
    share = wide(weight).reshape(-1, *[1] * (pred.ndim - 1)) / pred.numel()
    k0, k1 = (exact.column(each, j, pred.ndim) for j in range(2))
    d, size = exact.linear((k0, wide(x_s), wide(x_s)), (k1, wide(pred), wide(pred)), (-1.0, wide(target), wide(target)))
    if kind == "l2":
        value, slope, curvature = d**2, 2 * d, 2.0
    else:
        root = np.sqrt(d**2 + c**2)
        value, slope, curvature = d**2 / (root + c), d / root, c**2 / root**3
    # The rounding of d, `size`, reaches the loss by its slope and the slope by its curvature.
    value_size, slope_size = value + np.abs(slope) * size, np.abs(slope) + curvature * size
    samples, sample_sizes = (a.reshape(len(a), -1).mean(1) for a in (value, value_size))
    return {
        "loss": ((wide(weight) * samples).mean(), (wide(weight) * sample_sizes).mean()),
        "samples": (samples, sample_sizes),
        "slope": (slope, slope_size),
        "gradient": (share * k1 * slope, np.abs(share * k1) * slope_size),
    }


def gradient_by_hand(exact_: dict[str, tuple], pred, weight, each: np.ndarray, upstream: float) -> tuple:
    """(value, size) of `upstream` times the gradient, from the results of `by_hand`."""
    gradient, size = upstream * exact_["gradient"][0], abs(upstream) * exact_["gradient"][1]
    if pred.dtype == F16:
        # The slope is kept in pred's dtype: half a step of it near zero, too, reaches the gradient.
        factor = np.abs(upstream * exact.column(each, 1, pred.ndim)) / pred.numel()
        size = size + factor * np.abs(wide(weight)).reshape(factor.shape) * cases.HALF_SUBNORMAL[F16] / UNIT[F32]
    return gradient, size


def check(backend, mixture, tensors, k, index, kind: str, c: float = C, upstream: float = 1.0) -> None:
    pred, x_s, target, weight = tensors
    pred = pred.clone().requires_grad_()
    loss, samples = x0_loss(pred, x_s, target, k, kind, weight, c, index=index)
    loss.backward(torch.full_like(loss, upstream))
    exact_ = by_hand(pred, x_s, target, weight, rows(k, index, len(pred)), kind, c)
    assert loss.dtype == samples.dtype == (F64 if mixture is cases.FLOAT64 else F32)
    assert not samples.requires_grad
    cases.assert_rounded("x0_loss", backend, mixture, loss, *exact_["loss"])
    cases.assert_rounded("x0_loss", backend, mixture, samples, *exact_["samples"])
    assert pred.grad.dtype == pred.dtype
    gradient, size = gradient_by_hand(exact_, pred, weight, rows(k, index, len(pred)), upstream)
    cases.assert_rounded("x0_loss gradient", backend, mixture, pred.grad, gradient, size, roundings=2)


@cases.over_grid(kind=KINDS)
def test_values_and_gradients(backend, mixture, shape, kind):
    """Under a loss scale, too, without which float16 has few of the gradient's digits."""
    on = cases.device(backend)
    tensors = inputs(1, shape, mixture, on)
    for (k, index), upstream in zip(cases.tables(4, shape[0], 2, on), (1.0, -0.37, 65536.0), strict=True):
        if mixture.network == F16 and upstream == 65536.0 and np.prod(shape) < 100:
            upstream = 64.0  # larger gradients of so few elements do not fit
        check(backend, mixture, tensors, k, index, kind, upstream=upstream)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    tensors = inputs(5, cases.VIDEO, cases.FLOAT64)
    for k, index in cases.tables(6, cases.VIDEO[0], 2):
        check("reference", cases.FLOAT64, tensors, k.double(), index, kind, upstream=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    pred, x_s, target, weight = inputs(7, (2, 3, 2, 2), cases.FLOAT64)
    (k,) = draw(8, (2, 2), dtype=F64)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: x0_loss(p, x_s, target, k, kind, weight, 0.3)[0], (pred,))


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    seed=st.integers(0, 2**31),
    mixture=st.sampled_from(cases.EVERY_MIXTURE),
    kind=st.sampled_from(KINDS),
    c=st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_any_shape_and_mixture(name, shape, seed, mixture, kind, c):
    tensors = inputs(seed, shape, mixture)
    with backends.use(name):
        for k, index in cases.tables(seed + 3, shape[0], 2):
            check(name, mixture, tensors, k, index, kind, c, upstream=8.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixture", cases.MIXTURES, ids=lambda mixture: mixture.name)
def test_the_slope_of_the_raw_op(backend, mixture, kind):
    """The slope is in pred's dtype; without it nothing is allocated."""
    on, shape = cases.device(backend), (3, 67)
    pred, x_s, target, weight = inputs(9, shape, mixture, on)
    (k,) = draw(10, (3, 2), on=on)
    loss, samples, slope = torch.ops.selfnpo.x0_loss(pred, x_s, target, k, None, weight, kind, C, True)
    assert slope.dtype == pred.dtype
    exact_ = by_hand(pred, x_s, target, weight, rows(k, None, 3), kind, C)
    cases.assert_rounded("x0_loss gradient", backend, mixture, slope, *exact_["slope"])
    other = torch.ops.selfnpo.x0_loss(pred, x_s, target, k, None, weight, kind, C, False)
    assert torch.equal(other[0], loss)
    assert torch.equal(other[1], samples)
    assert other[2].numel() == 0


def test_there_is_no_second_derivative(backend):
    """Silence would be a wrong answer: the slope is kept as a number."""
    on, shape = cases.device(backend), (2, 67)
    pred, x_s, target, weight = inputs(17, shape, cases.FLOAT32, on)
    (k,) = draw(18, (2, 2), on=on)
    pred.requires_grad_()
    loss, _ = x0_loss(pred, x_s, target, k, "l2", weight)
    with pytest.raises(RuntimeError, match="x0_loss: has no second derivative"):
        torch.autograd.grad(loss, pred, create_graph=True)
    first = torch.autograd.grad(loss, pred, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, pred)[0])


def test_only_pred_has_a_gradient(backend):
    on, shape = cases.device(backend), (2, 67)
    pred, x_s, target, weight = inputs(11, shape, cases.FLOAT32, on)
    (k,) = draw(12, (2, 2), on=on)
    assert not x0_loss(pred, x_s, target, k, "l2", weight)[0].requires_grad
    pred.requires_grad_()
    with torch.no_grad():
        assert not x0_loss(pred, x_s, target, k, "l2", weight)[0].requires_grad
    loss, samples = x0_loss(pred, x_s, target, k, "l2", weight)
    assert loss.requires_grad
    assert not samples.requires_grad
    (2 * loss).backward()
    once = pred.grad.clone()
    (2 * x0_loss(pred, x_s, target, k, "l2", weight)[0]).backward()
    assert torch.equal(pred.grad, 2 * once)


def test_pseudo_huber_is_the_paper_authors(backend):
    """At d = 0 nothing, far from it |d| - c, near it d^2 / 2c, with slopes 0, sign(d) and d / c."""
    on = cases.device(backend)
    ones, zero, identity = torch.ones(1, device=on), torch.zeros(1, 1, device=on), torch.tensor([[0.0, 1.0]], device=on)

    def at(d: float) -> tuple[float, float]:
        pred = torch.full((1, 1), d, device=on, requires_grad=True)
        loss = x0_loss(pred, zero, zero, identity, "huber", ones, C)[0]
        loss.backward()
        return loss.item(), pred.grad.item()

    assert at(0.0) == (0, 0)
    assert at(-5.0) == pytest.approx((5 - C, -1), rel=1e-6)
    assert at(1e-5) == pytest.approx((1e-10 / (2 * C), 1e-5 / C), rel=1e-4)
    assert at(1e-8) == pytest.approx((1e-16 / (2 * C), 1e-8 / C), rel=1e-6)


def test_a_weight_of_0_silences_a_sample(backend):
    on, shape = cases.device(backend), (3, 67)
    pred, x_s, target, weight = inputs(13, shape, cases.Mixture("bf16", BF16, BF16), on)
    (k,) = draw(14, (3, 2), on=on)
    weight[1] = 0
    pred.requires_grad_()
    loss, samples = x0_loss(pred, x_s, target, k, "l2", weight)
    loss.backward()
    assert torch.equal(pred.grad[1], torch.zeros_like(pred.grad[1]))
    assert samples[1] > 0
    assert loss.item() == pytest.approx((samples * weight).mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_twice_is_the_same(backend, kind):
    on, shape = cases.device(backend), cases.large(backend)
    tensors = inputs(15, shape, cases.FLOAT32, on)
    (k,) = draw(16, (1, 2), on=on)
    pred, *others, weight = tensors
    pred.requires_grad_()

    def call() -> tuple[torch.Tensor, ...]:
        loss, samples = x0_loss(pred, *others, k, kind, weight)
        return loss, samples, *torch.autograd.grad(loss, pred)

    cases.assert_repeatable(call)
