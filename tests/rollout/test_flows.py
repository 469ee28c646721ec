"""Rollouts on the levels of flows and of CogVideoX, and `rollout.s_shift`, in closed form.

The denoiser is exact, as in test_closed_form.py; nothing is learned.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler
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
    randn,
    rng,
    rollout_of_no_steps,
    z_scores,
)
from scipy import stats

from benchmarks.arms.pairs import finished_pairs
from benchmarks.closed_form.gaussian_mixture import ExactDenoiser, GaussianMixture
from selfnpo_fast.config import LossConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.diffusion.schedulers import FLOW_CLASSES, SOLVERS, new_scheduler
from selfnpo_fast.diffusion.solvers import solver_steps
from selfnpo_fast.rollout.grid import Grid, moved_levels
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

COUNT = 30_000
COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SCHEDULERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow, shift 3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "-flow, shift 3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True),
    "cogvideox": lambda: CogVideoXDDIMScheduler(**COGVIDEOX, snr_shift_scale=1.0),
    "cogvideox, snr_shift 3": lambda: CogVideoXDDIMScheduler(**COGVIDEOX, snr_shift_scale=3.0),
}
PLACES = [(-1, 300), (3, 600), (8, 999)]


def numbers(kind: str, levels: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of levels, float64, by the definition of each."""
    levels = torch.as_tensor(levels)
    if "cogvideox" in kind:
        a = SCHEDULERS[kind]().alphas_cumprod[levels].double()
        return a.sqrt(), (1 - a).sqrt()
    shift = 3 if "3" in kind else 1
    share = torch.where(levels == 0, 0.0, (levels + 1) / 1000).double()
    sigma = shift * share / (1 + (shift - 1) * share)
    return 1 - sigma, sigma


@pytest.mark.parametrize(("index", "s"), PLACES)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_eq16_has_the_marginal_of_the_forward_process(kind, index, s):
    """All 72 moments within 4.5 standard errors of closed form."""
    x_s, _ = rollout_of_no_steps(index, s, COUNT, "from_x_t", theirs=SCHEDULERS[kind]())
    mean, covariance = MIXTURE.moments(PROMPT_WEIGHTS.mean(0), *map(float, numbers(kind, s)))
    centred = x_s - mean
    products = centred[:, :, None] * centred[:, None]
    assert z_scores(x_s, mean).abs().max() < 4.5
    assert z_scores(products, covariance).abs().max() < 4.5


@pytest.mark.parametrize(("index", "s"), [(1, 220), (2, 320)])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_eq15_has_not_but_a_variance_of_its_own(kind, index, s):
    """Of a Gaussian of variance v. The estimate has alpha_t^2 v^2 / (alpha_t^2 v + sigma_t^2) of v,
    so Eq. 15 has that much of alpha_s^2 v besides sigma_s^2: 31 to 37 standard errors too little in
    one dimension at these levels, by this closed form. x_s has it within 4.5."""
    x_s, _ = rollout_of_no_steps(index, s, COUNT, "naive", GAUSSIAN, ONE, SCHEDULERS[kind]())
    mean, v = GAUSSIAN.means.flatten(), GAUSSIAN.variances.flatten()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = numbers(kind, 100 * index + 99), numbers(kind, s)
    squares = (x_s - alpha_s * mean).square()
    of_estimate = alpha_t**2 * v**2 / (alpha_t**2 * v + sigma_t**2)
    assert z_scores(squares, alpha_s**2 * of_estimate + sigma_s**2).abs().max() < 4.5
    assert z_scores(squares, alpha_s**2 * v + sigma_s**2).min() < -20


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


def loss_gradient(kind: str, number: int, shift: float) -> torch.Tensor:
    """Gradient (48,) of the product's loss on 500 pairs, at a mixture denoiser whose means and
    log-variances are off the truth by `shift`.

    The pairs have random (t, s) and prompts, and an x_t that is drawn from p_t.
    """
    maker = make_maker(config(), SCHEDULERS[kind]())
    ids = torch.arange(500) + number * 500
    index = torch.randint(-1, STEPS - 1, (500,), generator=rng(100 + number))
    rows = TABLE.rows["weights"][maker.rows(ids)]
    alpha, sigma = numbers(kind, maker.grid.timestep(index))
    a, b = (value.view(-1, 1, 1, 1) for value in (alpha, sigma))
    x_t = a * MIXTURE.sample(rows, rng(1000 + number)) + b * randn(500, *SHAPE, seed=2000 + number)
    pairs = finished_pairs(maker, x_t, index, MIXTURE.posterior_mean(x_t, rows, alpha, sigma), ids)
    means = (MIXTURE.means + shift * randn(3, *SHAPE, seed=41)).requires_grad_()
    logs = (MIXTURE.variances.log() + shift * randn(3, *SHAPE, seed=42)).requires_grad_()
    schedule = maker.grid.schedule
    student = ExactDenoiser(GaussianMixture(means, logs.exp()), schedule)
    pred = student(pairs.x_s, pairs.s, TABLE.gather(pairs.rows))
    loss, _ = Objective.build(LossConfig(), schedule, CPU)(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, (means, logs))])


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_gradient_vanishes_at_the_true_denoiser(kind):
    """Over all (t, s) and prompts, for 48 parameters of a mixture, from the raw output on.

    Largest |z| observed: 2.9 at the truth, and from 48 up elsewhere.
    """
    for shift in (0.0, 0.3):
        z = z_scores(torch.stack([loss_gradient(kind, number, shift) for number in range(40)]), 0.0).abs().max()
        assert z > 20 if shift else z < 4.5


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_table_is_finite(kind):
    """Those of a rollout, under both noisings and a moved s, of the loss, and of every solver."""
    scheduler = SCHEDULERS[kind]()
    levels = Levels.of(scheduler)
    assert levels.alpha[-1] == 0
    for noising, s_shift in itertools.product(("from_x_t", "naive"), (1.0, 5.0)):
        grid = Grid.build(levels, STEPS, CPU, omega=-3.0, noising=noising, s_shift=s_shift)
        for table in (grid.step, grid.start, grid.renoise, grid.drawn_renoise()):
            assert table.isfinite().all()
        # From pure noise, at the last grid index, Eq. 16 leads nowhere; to it, everything is new.
        if noising == "from_x_t":
            assert (grid.renoise[-1] == 0).all()
            assert torch.equal(grid.renoise[:-1, -1], torch.tensor([0.0, 1.0]).expand(STEPS, 2))
    k = Objective.build(LossConfig(), levels, CPU).k
    assert k.isfinite().all()
    assert k[-1].tolist() == {"v_prediction": [0, -1], "flow": [1, -1], "-flow": [1, 1]}[levels.prediction]
    solvers = {"-flow": ["own"], "flow": ["own", *FLOW_CLASSES]}.get(levels.prediction, [*SOLVERS])
    made = [new_scheduler(solver, scheduler) for solver in solvers]
    if "cogvideox" in kind:
        made.append(CogVideoXDPMScheduler.from_config(scheduler.config))
    for each, steps in itertools.product(made, (1, 2, 10, 25, 50)):
        each.set_timesteps(steps)
        assert solver_steps(each).k.float().isfinite().all(), (type(each), steps)


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
    one, other = (
        make_rollout(make_maker(config(mode=mode), SCHEDULERS[kind]())) for kind in ("flow, shift 3", "-flow, shift 3")
    )
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


@pytest.mark.parametrize(("shift", "share"), [(3.0, 0.25), (5.0, 0.36), (8.0, 0.47)])
def test_a_moved_s_lies_where_a_shifted_flow_has_its_levels(shift, share):
    """s above sigma 0.9, of pairs at t = 0: a share 1 - u, where 0.9 = shift u / (1 + (shift - 1) u).

    A flow of that shift has as many without a moved s, and 10% with the inverse one. The two shifts
    multiply.
    """
    exact, twice = (1 - 0.9 / (k - (k - 1) * 0.9) for k in (shift, 2 * shift))
    assert exact == pytest.approx(share, abs=0.005)
    cases = ((1.0, shift, exact), (shift, 1.0, exact), (shift, 1 / shift, 0.1), (2.0, shift, twice))
    for flow, s_shift, expected in cases:
        levels = Levels.of(FlowMatchEulerDiscreteScheduler(shift=flow))
        s = moved_levels(torch.zeros(1, dtype=torch.int64), 1000, s_shift)[0, 1:]
        assert (levels.sigma[s] > 0.9).double().mean().item() == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("kind", ["flow", "cogvideox"])
def test_pairs_have_the_distribution_of_a_moved_s(kind, mode):
    """The closed form of s above t is uniform in its own distribution function; 2,000 pairs of a
    rollout are, and those of a rollout without a shift are not."""
    shift, outcomes = 5.0, []
    for s_shift in (shift, 1.0):
        maker = make_maker(config(mode=mode, s_shift=s_shift), SCHEDULERS[kind]())
        rollout = make_rollout(maker, batch=500)
        pairs = [rollout.next_pairs() for _ in range(4)]
        s, t = (torch.cat([getattr(each, name) for each in pairs]).double() for name in ("s", "t"))
        share, lowest = ((x / 1000) / (shift - (shift - 1) * x / 1000) for x in (s + 0.5, t + 1))
        outcomes.append(stats.kstest(((share - lowest) / (1 - lowest)).numpy(), "uniform").pvalue)
    assert outcomes[0] > 0.01
    assert outcomes[1] < 1e-20


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_a_moved_s_is_used_whole(mode):
    """s of a pair depends on its sample and t alone, x_s has the noise of that s, and more than 1 is
    noisier."""
    plain, shifted = (
        make_rollout(make_maker(config(mode=mode, s_shift=k), SCHEDULERS["flow, shift 3"]())) for k in (1.0, 4.0)
    )
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
    one, other = (make_maker(config(), SCHEDULERS["flow, shift 3"]()) for _ in range(2))
    other.latent_shape = shape
    flat, video = make_rollout(one), make_rollout(other)
    for _ in range(6):
        first, second = flat.next_pairs(), video.next_pairs()
        assert second.x_s.shape == (8, *shape)
        assert torch.equal(first.x_s.flatten(1), second.x_s.flatten(1))
        assert torch.equal(first.target.flatten(1), second.target.flatten(1))
