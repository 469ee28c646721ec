"""Rollouts on the levels of flows and of CogVideoX, and `rollout.s_shift`, in closed form.

The denoiser is exact, as in test_closed_form.py; nothing is learned.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from gaussian_mixture import (
    CPU,
    DIMS,
    GAUSSIAN,
    MIXTURE,
    ONE,
    PROMPT_WEIGHTS,
    SHAPE,
    STEPS,
    TABLE,
    config,
    make_maker,
    make_rollout,
    rollout_of_no_steps,
    z_scores,
)

from selfnpo_fast.config import LossConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.rollout.grid import moved_levels
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

COUNT = 30_000
COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
SCHEDULERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "-flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True),
    "cogvideox": lambda: CogVideoXDDIMScheduler(**COGVIDEOX),
}
PLACES = [(-1, 300), (3, 600), (8, 999)]


def numbers(kind: str, level: int) -> tuple[float, float]:
    """alpha and sigma of a level, by the definition of each."""
    if kind == "cogvideox":
        a = float(SCHEDULERS[kind]().alphas_cumprod[level])
        return a**0.5, (1 - a) ** 0.5
    share = (level + 1) / 1000 if level else 0.0
    sigma = 3 * share / (1 + 2 * share)
    return 1 - sigma, sigma


@pytest.mark.parametrize(("index", "s"), PLACES)
@pytest.mark.parametrize("kind", ["flow", "cogvideox"])
def test_eq16_has_the_marginal_of_the_forward_process(kind, index, s):
    """All 72 moments within 4.5 standard errors of closed form."""
    x_s, _ = rollout_of_no_steps(index, s, COUNT, "from_x_t", theirs=SCHEDULERS[kind]())
    mean, covariance = MIXTURE.moments(PROMPT_WEIGHTS.mean(0), *numbers(kind, s))
    centred = x_s - mean
    products = centred[:, :, None] * centred[:, None]
    assert z_scores(x_s, mean).abs().max() < 4.5
    assert z_scores(products, covariance).abs().max() < 4.5


def test_eq15_has_not():
    """Observed |z| from 9 up, where the moments under Eq. 16 have at most 4.5."""
    x_s, _ = rollout_of_no_steps(3, 420, COUNT, "naive", theirs=SCHEDULERS["flow"]())
    mean, covariance = MIXTURE.moments(PROMPT_WEIGHTS.mean(0), *numbers("flow", 420))
    centred = x_s - mean
    assert z_scores(centred[:, :, None] * centred[:, None], covariance).abs().max() > 7


@pytest.mark.parametrize(("index", "s"), PLACES)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_minimiser_is_the_true_denoiser(kind, index, s):
    """Over affine maps of x_s, for a Gaussian: all 72 coefficients within 5 standard errors."""
    x_s, target = rollout_of_no_steps(index, s, COUNT, "from_x_t", GAUSSIAN, ONE, SCHEDULERS[kind]())
    design = torch.cat([x_s, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    fit = torch.linalg.lstsq(design, target).solution
    residual = (target - design @ fit).square().sum(0) / (COUNT - DIMS - 1)
    error = (torch.linalg.inv(design.T @ design).diag()[:, None] * residual).sqrt()
    alpha, sigma = numbers(kind, s)
    mean, variance = GAUSSIAN.means.flatten(), GAUSSIAN.variances.flatten()
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    truth = torch.cat([torch.diag(gain), (mean - gain * alpha * mean)[None]])
    assert ((fit - truth) / error.clamp(min=1e-12)).abs().max() < 5


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("start", ["noise", "data"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_nothing_divides_by_0(kind, start, mode):
    """Rollouts through alpha = 0, and at a flow's sigma = 0; losses and gradients are finite, and the
    true denoiser's loss at pure noise is the distance to the mean."""
    top = 0
    for w in (-3.0, -1.0, 0.0):
        maker = make_maker(config(mode=mode, start=start, k=STEPS, omega=w), SCHEDULERS[kind]())
        objective = Objective.build(LossConfig(), maker.grid.schedule, CPU)
        rollout = make_rollout(maker, batch=100)
        for _ in range(8):
            pairs = rollout.next_pairs()
            rows = TABLE.gather(pairs.rows)
            pred = maker.predictor.predict(pairs.x_s, pairs.s, rows).requires_grad_()
            loss, per_pair = objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)
            loss.backward()
            for value in (pairs.x_s, pairs.target, per_pair, pred.grad):
                assert value.isfinite().all()
            noisiest = pairs.s == 999
            top += int(noisiest.sum())
            mean = (rows["weights"].double() @ MIXTURE.means.flatten(1)).view(-1, *SHAPE)
            expected = (mean - pairs.target).square().flatten(1).mean(1)
            torch.testing.assert_close(per_pair[noisiest].double(), expected[noisiest].double(), rtol=1e-4, atol=1e-5)
    assert top > 0


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_both_signs_of_a_flow_give_the_same_pairs(mode):
    one, other = (make_rollout(make_maker(config(mode=mode), SCHEDULERS[kind]())) for kind in ("flow", "-flow"))
    for _ in range(15):
        first, second = one.next_pairs(), other.next_pairs()
        assert torch.equal(first.s, second.s)
        torch.testing.assert_close(first.x_s, second.x_s, rtol=0, atol=1e-5)
        torch.testing.assert_close(first.target, second.target, rtol=0, atol=1e-5)


# rollout.s_shift


@pytest.mark.parametrize("shift", [1.0, 1 / 8, 1 / 3, 2.0, 8.0])
def test_s_keeps_its_range_and_order(shift):
    timesteps = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, 11) * 100 - 1])
    moved = moved_levels(timesteps, 1000, shift)
    for t, row in zip(timesteps.tolist()[:-1], moved, strict=False):
        assert row[t + 1 :].min() > t
        assert row[t + 1 :].max() <= 999
        assert (row[t + 1 :].diff() >= 0).all()
    if shift == 1:
        assert torch.equal(moved, torch.arange(1000).expand(11, -1))


@pytest.mark.parametrize("shift", [3.0, 8.0])
def test_the_inverse_of_a_flows_shift_makes_its_noise_uniform(shift):
    """sigma at s is uniform above sigma at t, whatever t is."""
    levels = Levels.of(FlowMatchEulerDiscreteScheduler(shift=shift))
    timesteps = torch.cat([torch.zeros(1, dtype=torch.int64), levels.grid(10)])[:-1]
    moved = moved_levels(timesteps, 1000, 1 / shift)
    for t, row in zip(timesteps, moved, strict=True):
        found = levels.sigma[row[t + 1 :]]
        part = torch.arange(1, len(found) + 1, dtype=torch.float64) / len(found)
        low = levels.sigma[t] if t else 0.0
        # A level of a shifted flow is up to `shift` / 1000 wide in sigma.
        torch.testing.assert_close(found, low + (1 - low) * part, rtol=0, atol=2.5 * shift / 1000)


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_a_moved_s_is_used_whole(mode):
    """s of a pair depends on its sample and t alone, x_s has the noise of that s, and more than 1 is
    noisier."""
    plain, shifted = (make_rollout(make_maker(config(mode=mode, s_shift=k), SCHEDULERS["flow"]())) for k in (1.0, 4.0))
    shifted.fill()
    noisier = 0
    for call in range(20):
        index = shifted.index[call % 3].clone() if mode == "continuous" else None
        x_t = shifted.x[call % 3].clone() if mode == "continuous" else None
        before, after = plain.next_pairs(), shifted.next_pairs()
        assert torch.equal(before.t, after.t)
        assert (after.s >= before.s).all()
        noisier += int((after.s - before.s).sum())
        maker = shifted.maker
        at = torch.searchsorted(maker.grid.timesteps, after.t) - 1
        assert torch.equal(maker.draw_s(after.sample_ids, at), after.s)
        if mode == "lockstep":
            continue
        # At t = 0 the finished sample, which is the target, gives the pair.
        ended = (index == STEPS - 1).view(-1, 1, 1, 1)
        x_t = torch.where(ended, after.target, x_t).double()
        sigma_t, sigma_s = maker.grid.schedule.sigma[after.t], maker.grid.schedule.sigma[after.s]
        ratio = (1 - sigma_s) / (1 - sigma_t)
        added = (sigma_s.square() - (ratio * sigma_t).square()).sqrt()
        noise = normal(NoiseKey(3, after.sample_ids, draw_id(Draw.RENOISE, at)), SHAPE)
        r, c = (value.view(-1, 1, 1, 1) for value in (ratio, added))
        torch.testing.assert_close(after.x_s.double(), r * x_t + c * noise, rtol=0, atol=1e-5)
    assert noisier > 20 * 8 * 50


def test_a_video_latent_walks_like_a_flat_one():
    """States are of any rank: (F, C, H, W) gives the numbers of one long axis of the same size."""
    shape = (2, 2, 1, 2)
    one, other = (make_maker(config(), SCHEDULERS["flow"]()) for _ in range(2))
    other.latent_shape = shape
    flat, video = make_rollout(one), make_rollout(other)
    for _ in range(6):
        first, second = flat.next_pairs(), video.next_pairs()
        assert second.x_s.shape == (8, *shape)
        assert torch.equal(first.x_s.flatten(1), second.x_s.flatten(1))
        assert torch.equal(first.target.flatten(1), second.target.flatten(1))
