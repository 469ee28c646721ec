"""What common shapes do not reach in Triton's kernels: 64-bit indices and the longest loops.

The values of the variants, in the interpreter or on a GPU; test_aot.py reads their machine code.
"""

from __future__ import annotations

import dataclasses
import importlib

import cases
import pytest
import torch
import triton
from cases import F32, draw

from selfnpo_kernels import NoiseKey, affine_noise, backends, guidance_rescale, guided_step, normal, x0_loss

FILES = ("affine_noise", "guidance_rescale", "guided_step", "normal", "tdft_step", "x0_loss")
ON = cases.device("triton")
pytestmark = pytest.mark.gpu_core


def module(name: str):
    return importlib.import_module(f"selfnpo_kernels.triton.{name}")


@pytest.fixture
def wide(monkeypatch) -> list[bool]:
    """Makes every launch compute its indices in 64 bits; collects what the plans had chosen."""
    asked = []
    plan = module("common").plan

    def with_wide_indices(*arguments, **options):
        chosen = plan(*arguments, **options)
        asked.append(chosen.WIDE)
        return dataclasses.replace(chosen, WIDE=True)

    for name in FILES:
        monkeypatch.setattr(module(name), "plan", with_wide_indices)
    return asked


def test_the_compiler_is_chosen_where_there_is_a_gpu():
    """Else a run on a GPU would say nothing about compiled kernels."""
    assert importlib.import_module("selfnpo_kernels.triton").interpreted() != cases.COMPILED


def some_calls() -> list[torch.Tensor]:
    shape = (3, 1100)
    x, pos, neg = draw(1, shape, shape, shape, on=ON)
    k8, k2 = draw(2, (5, 8), (5, 2), on=ON)
    index, key = torch.tensor([4, 0, 2], device=ON), cases.key(3, ON)
    scale = guidance_rescale(pos, neg, k8, 0.7, index=index)
    stepped = guided_step(pos, neg, x, k8, index=index, scale=scale, x0_prev=x, x0_prev2=x, noise=key)
    pred = pos.clone().requires_grad_()
    loss, samples = x0_loss(pred, x, neg, k2, "huber", torch.ones(3, device=ON), index=index)
    loss.backward()
    return [scale, *stepped, affine_noise(x, k2, key, index=index), normal(key, (1100,)), samples, pred.grad]


def test_64_bit_indices(wide):
    with backends.use("triton"):
        found = some_calls()
    assert len(wide) == 6
    assert not any(wide)
    wide.clear()
    with backends.use("reference"):
        expected = some_calls()
    assert not wide
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_64_bit_indices_of_a_rollout(wide):
    """By the tests of the op itself, which compute every slot in float64."""
    import test_tdft_step

    with backends.use("triton"):
        for start in test_tdft_step.STARTS:
            test_tdft_step.test_one_step("triton", cases.FLOAT32, cases.IMAGE, start)
    assert wide


def test_more_samples_and_blocks_than_a_tile():
    """x0_loss_sum_kernel: 10 samples of 7 blocks, 4 samples and 2 blocks at a time."""
    samples, blocks = 10, 7
    (partial,), (weight,) = draw(3, (samples, blocks), on=ON), draw(4, (samples,), on=ON)
    loss, per_sample = torch.full((), torch.nan, device=ON), torch.full((samples,), torch.nan, device=ON)
    module("x0_loss").x0_loss_sum_kernel[(1,)](
        loss, per_sample, partial, weight, samples, blocks, 50.0, TILE=4, WIDTH=2
    )
    torch.testing.assert_close(per_sample, partial.sum(1) / 50)
    torch.testing.assert_close(loss, (partial.sum(1) / 50 * weight).mean())


def test_more_blocks_than_a_load():
    """guidance_rescale_kernel: a row of 9 elements in blocks of 2, 2 blocks at a time.

    The last block is half empty.
    """
    rows, n, block = 3, 9, 2
    pos, p = draw(5, (rows, n), (rows, n), on=ON)
    blocks = triton.cdiv(n, block)
    partial = torch.zeros(rows, blocks, 4, dtype=F32, device=ON)
    for b in range(blocks):
        for column, values in ((0, pos), (2, p)):
            part = values[:, b * block : (b + 1) * block]
            partial[:, b, column] = part.mean(1)
            partial[:, b, column + 1] = part.var(1, correction=0) * part.shape[1]
    scale = torch.full((rows,), torch.nan, device=ON)
    module("guidance_rescale").guidance_rescale_kernel[(rows,)](
        scale, partial, blocks, 0.7, 0.3, N=n, BLOCK=block, WIDTH=2
    )
    torch.testing.assert_close(scale, 0.7 * pos.std(1) / p.std(1) + 0.3)


def test_a_sample_too_large_is_refused():
    plan = module("common").plan
    assert plan((1, 2**31 - 1)).WIDE
    with pytest.raises(ValueError, match="2147483648 elements; expected fewer than 2"):
        plan((1, 2**31))


def test_one_draw_key_for_all_and_none():
    """A key without a draw tensor, in 64 bits of id."""
    ids = torch.tensor([2**40, -7], device=ON)
    with backends.use("triton"):
        found = normal(NoiseKey(2**63 - 1, ids, 3), (70,))
    with backends.use("reference"):
        torch.testing.assert_close(found, normal(NoiseKey(2**63 - 1, ids, 3), (70,)), rtol=1e-5, atol=1e-5)
