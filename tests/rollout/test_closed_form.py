"""Rollouts and objective against closed form, with the exact denoiser of a Gaussian mixture.

Nothing is learned here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
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
    exact_batch,
    forward_process,
    make_maker,
    make_rollout,
    randn,
    rng,
    rollout_of_no_steps,
    scheduler,
    scheduler_x0,
    z_scores,
)
from scipy import stats

from benchmarks.closed_form.gaussian_mixture import ExactDenoiser, GaussianMixture
from selfnpo_fast.config import LossConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.rollout import LockstepRollout, lockstep_rollout
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import Draw, NoiseKey, backends, draw_id, normal

# The oracle itself


def test_oracle_density_is_torchs():
    """Against torch.distributions at 50 points of p_t; observed 8e-15."""
    alpha, sigma, w = 0.6, 0.8, PROMPT_WEIGHTS[2].double()
    parts = torch.distributions.Normal(
        alpha * MIXTURE.means.flatten(1), (alpha**2 * MIXTURE.variances.flatten(1) + sigma**2).sqrt()
    )
    theirs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(w), torch.distributions.Independent(parts, 1)
    )
    x = randn(50, *SHAPE)
    ours = MIXTURE.log_density(x, w.expand(50, 3), alpha, sigma)
    known = theirs.log_prob(x.flatten(1))
    torch.testing.assert_close(ours - ours[0], known - known[0], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("t", [0, 399, 999])
def test_oracle_posterior_mean_obeys_tweedie(t):
    """E[x_0 | x_t] = (x_t + sigma^2 grad log p_t) / alpha, gradient by autograd; observed 4e-14."""
    a = scheduler().alphas_cumprod[t].double()
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    x = randn(20, *SHAPE).requires_grad_()
    weights = PROMPT_WEIGHTS[torch.arange(20) % 4]
    (score,) = torch.autograd.grad(MIXTURE.log_density(x, weights, alpha, sigma).sum(), x)
    expected = ((x + sigma**2 * score) / alpha).detach()
    torch.testing.assert_close(MIXTURE.posterior_mean(x.detach(), weights, alpha, sigma), expected, rtol=0, atol=1e-10)


def test_oracle_posterior_mean_is_the_mean_of_weighted_draws():
    """x_0 drawn from the mixture and weighted by p(x_t | x_0), without any closed form.

    Largest |z| observed: 1.8.
    """
    alpha, sigma, count = 0.4, 0.916515139, 200_000
    x0 = MIXTURE.sample(PROMPT_WEIGHTS[1].expand(count, 3), rng(5)).flatten(1)
    x = randn(1, *SHAPE, seed=4)
    share = (-(x.flatten() - alpha * x0).square().sum(1) / (2 * sigma**2)).softmax(0)[:, None]
    estimate = (share * x0).sum(0)
    error = (share.square() * (x0 - estimate).square()).sum(0).sqrt()
    exact = MIXTURE.posterior_mean(x, PROMPT_WEIGHTS[1:2], alpha, sigma).flatten()
    assert ((estimate - exact).abs() < 5 * error).all()
    assert error.max() < 0.01


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_oracle_speaks_every_prediction_type(prediction_type):
    """diffusers turns its output back into the posterior mean.

    Observed 1e-6, since diffusers' schedule is float32.
    """
    theirs = scheduler(prediction_type)
    theirs.set_timesteps(STEPS)
    x, weights = randn(6, *SHAPE), PROMPT_WEIGHTS[torch.arange(6) % 4]
    denoiser = ExactDenoiser(MIXTURE, Levels.of(theirs))
    for t in (99, 999):
        output = denoiser(x, torch.full((6,), t), {"weights": weights})
        a = theirs.alphas_cumprod[t].double()
        exact = MIXTURE.posterior_mean(x, weights, a.sqrt(), (1 - a).sqrt())
        torch.testing.assert_close(theirs.step(output, t, x).pred_original_sample, exact, rtol=1e-5, atol=1e-5)


# Theorem 1: the distribution of x_s

COUNT = 50_000


def two_sample_p(ours: torch.Tensor, s: int) -> float:
    """Smallest p of Kolmogorov-Smirnov tests on 8 random directions, times 8.

    The other sample is of the true forward process.
    """
    x0 = MIXTURE.sample(PROMPT_WEIGHTS.mean(0).expand(COUNT, 3), rng(21))
    true = forward_process(x0, s, seed=22).flatten(1)
    directions = randn(DIMS, 8, seed=23)
    pairs = zip((ours @ directions).T.numpy(), (true @ directions).T.numpy(), strict=True)
    return 8 * min(stats.ks_2samp(a, b, method="asymp").pvalue for a, b in pairs)


def moment_deviation(ours: torch.Tensor, s: int) -> float:
    """Largest |z| of mean and covariance against the exact ones of p_s."""
    a = float(scheduler().alphas_cumprod[s])
    mean, covariance = MIXTURE.moments(PROMPT_WEIGHTS.mean(0), a**0.5, (1 - a) ** 0.5)
    centred = ours - mean
    products = centred[:, :, None] * centred[:, None]
    return max(z_scores(ours, mean).abs().max().item(), z_scores(products, covariance).abs().max().item())


@pytest.mark.parametrize(("index", "s"), [(-1, 300), (3, 400), (3, 600), (6, 750), (8, 999)])
def test_eq16_has_the_marginal_of_the_forward_process(index, s):
    """All 72 moments within 4.5 standard errors of closed form (at most 2.5).

    Two-sample p observed from 0.09 up.
    """
    x_s, _ = rollout_of_no_steps(index, s, COUNT, "from_x_t")
    assert moment_deviation(x_s, s) < 4.5
    assert two_sample_p(x_s, s) > 0.01


@pytest.mark.parametrize(("index", "s"), [(3, 400), (4, 520), (5, 600)])
def test_eq15_has_not(index, s):
    """Both tests refuse the same draws and sample size; observed |z| from 25, p at most 3e-14."""
    x_s, _ = rollout_of_no_steps(index, s, COUNT, "naive")
    assert moment_deviation(x_s, s) > 20
    assert two_sample_p(x_s, s) < 1e-10


def uniform_p(pairs) -> float:
    """Smallest p times 8 over 8 random directions.

    x_s is put through the exact distribution function of its p_s, given its prompt. The result is
    uniform if the marginal is right.
    """
    directions = randn(DIMS, 8, seed=31)
    a = scheduler().alphas_cumprod[pairs.s].double()[:, None, None]
    mean = a.sqrt() * (MIXTURE.means.flatten(1) @ directions)
    spread = (a * (MIXTURE.variances.flatten(1) @ directions**2) + (1 - a) * directions.square().sum(0)).sqrt()
    below = torch.special.ndtr(((pairs.x_s.flatten(1).double() @ directions)[:, None] - mean) / spread)
    cdf = (below * TABLE.rows["weights"][pairs.rows][..., None]).sum(1)
    folded = (2 * cdf - 1).abs()  # what a narrower distribution changes most
    return 8 * min(stats.kstest(column.numpy(), "uniform").pvalue for column in folded.T)


def test_every_level_and_prompt_has_its_own_marginal():
    """Over 100,000 pairs at all (t, s) and prompts, as continuous rollouts mix them.

    Observed p is 1.1 for Eq. 16 and 3e-12 for Eq. 15, although most pairs have s far above t, where
    the two agree.
    """
    assert uniform_p(exact_batch(make_maker(config()), 100_000, 0)[0]) > 0.01
    assert uniform_p(exact_batch(make_maker(config(noising="naive")), 100_000, 0)[0]) < 1e-8


# Theorems 2 and 3: the minimiser and the gradient of Eq. 17


def affine_deviation(index: int, s: int, noising: str) -> torch.Tensor:
    """|z| (9, 8) of the least-squares affine map x_s -> target, against the true denoiser."""
    x_s, target = rollout_of_no_steps(index, s, COUNT, noising, GAUSSIAN, ONE)
    design = torch.cat([x_s, torch.ones(COUNT, 1, dtype=torch.float64)], 1)
    fit = torch.linalg.lstsq(design, target).solution
    residual = (target - design @ fit).square().sum(0) / (COUNT - DIMS - 1)
    error = (torch.linalg.inv(design.T @ design).diag()[:, None] * residual).sqrt()
    a = scheduler().alphas_cumprod[s].double()
    mean, variance = GAUSSIAN.means.flatten(), GAUSSIAN.variances.flatten()
    gain = a.sqrt() * variance / (a * variance + 1 - a)
    truth = torch.cat([torch.diag(gain), (mean - gain * a.sqrt() * mean)[None]])
    return ((fit - truth) / error).abs()


@pytest.mark.parametrize(("index", "s"), [(-1, 300), (3, 400), (3, 600), (6, 750), (8, 999)])
def test_minimiser_over_affine_maps_is_the_true_denoiser(index, s):
    """All 72 coefficients within 5 standard errors; observed at most 4.0."""
    assert affine_deviation(index, s, "from_x_t").max() < 5


@pytest.mark.parametrize(("index", "s"), [(3, 400), (3, 600), (6, 750)])
def test_minimiser_under_eq15_is_another(index, s):
    """Observed largest |z| from 107 up."""
    assert affine_deviation(index, s, "naive").max() > 50


def loss_gradient(pairs, target: torch.Tensor, schedule: Levels, shift: float) -> torch.Tensor:
    """Gradient (48,) of the product's objective by the parameters of a mixture denoiser.

    They are all means and log-variances, and off the truth by `shift`.
    """
    means = (MIXTURE.means + shift * randn(3, *SHAPE, seed=41)).requires_grad_()
    logs = (MIXTURE.variances.log() + shift * randn(3, *SHAPE, seed=42)).requires_grad_()
    student = ExactDenoiser(GaussianMixture(means, logs.exp()), schedule)
    pred = student(pairs.x_s, pairs.s, TABLE.gather(pairs.rows))
    loss, _ = Objective.build(LossConfig(), schedule, CPU)(pred, pairs.x_s, pairs.s, target, pairs.weight)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, (means, logs))])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_of_the_true_denoiser_is_eq17(prediction_type):
    """The mean square of E[x_0 | x_s] - x_{t->0} for every prediction type; within 1e-6."""
    pairs, _ = exact_batch(make_maker(config()), 500, 0)
    schedule = Levels.of(scheduler(prediction_type))
    pred = ExactDenoiser(MIXTURE, schedule)(pairs.x_s, pairs.s, TABLE.gather(pairs.rows))
    weight = torch.rand(500, generator=rng(1))
    loss, per_pair = Objective.build(LossConfig(), schedule, CPU)(pred, pairs.x_s, pairs.s, pairs.target, weight)
    a = scheduler().alphas_cumprod[pairs.s].double()
    mean = MIXTURE.posterior_mean(pairs.x_s, TABLE.rows["weights"][pairs.rows], a.sqrt(), (1 - a).sqrt())
    exact = (mean - pairs.target).square().flatten(1).mean(1)
    torch.testing.assert_close(per_pair, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, (weight * exact).mean(), rtol=0, atol=1e-5)


def batches(noising: str):
    """40 batches of 1,000 exact pairs with their x_0, and the schedule."""
    maker = make_maker(config(noising=noising))
    for number in range(40):
        yield *exact_batch(maker, 1000, number), maker.grid.schedule


@pytest.mark.parametrize("noising", ["from_x_t", "naive"])
def test_gradient_of_eq17_vanishes_at_the_true_denoiser(noising):
    """Over random (t, s, prompt), for 48 parameters of a mixture.

    Largest |z| observed: 3.0 under Eq. 16, and 18 under Eq. 15.
    """
    z = z_scores(torch.stack([loss_gradient(p, p.target, schedule, 0.0) for p, _, schedule in batches(noising)]), 0.0)
    assert z.abs().max() < 4.5 if noising == "from_x_t" else z.abs().max() > 10


@pytest.mark.parametrize("noising", ["from_x_t", "naive"])
def test_gradient_of_eq17_is_that_of_diffusion_training(noising):
    """At a wrong denoiser, where the gradient's |z| is 77, the mean gradient is that of two others.

    Theorem 2: with the target E[x_0 | x_s] at the same x_s. Theorem 3: with ordinary training on
    x_0, whose x_s diffusers draws. Largest |z| of the differences: 2.6 and 2.1; under Eq. 15, 20
    and 13.
    """
    ours, posterior, ordinary = [], [], []
    for number, (pairs, x0, schedule) in enumerate(batches(noising)):
        a = scheduler().alphas_cumprod[pairs.s].double()
        mean = MIXTURE.posterior_mean(pairs.x_s, TABLE.rows["weights"][pairs.rows], a.sqrt(), (1 - a).sqrt())
        x_s = scheduler().add_noise(x0, randn(*x0.shape, seed=3000 + number), pairs.s)
        ours.append(loss_gradient(pairs, pairs.target, schedule, 0.3))
        posterior.append(loss_gradient(pairs, mean, schedule, 0.3))
        ordinary.append(loss_gradient(replace(pairs, x_s=x_s), x0, schedule, 0.3))
    ours = torch.stack(ours)
    assert z_scores(ours, 0.0).abs().max() > 50
    for other in (posterior, ordinary):
        z = z_scores(ours - torch.stack(other), 0.0).abs().max()
        assert z < 4.5 if noising == "from_x_t" else z > 7


# t' = T and t = 1: the baseline


def baseline(maker, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """diffusers' full simulation from the samples' noise: x by timestep, and x_0 under -1."""
    theirs, states = scheduler(), {}
    theirs.set_timesteps(STEPS)
    x, cond = normal(NoiseKey(3, ids, draw_id(Draw.START_NOISE)), SHAPE), TABLE.gather(maker.rows(ids))
    denoiser = maker.predictor.predict
    for t in theirs.timesteps:
        states[int(t)] = x
        x = theirs.step(denoiser(x, t.expand(len(x)), cond), t, x).prev_sample
    states[0] = x
    last = DDIMScheduler.from_config(scheduler().config, set_alpha_to_one=True)
    last.set_timesteps(STEPS)
    states[-1] = last.step(denoiser(x, torch.zeros(len(x), dtype=torch.int64), cond), 0, x).prev_sample
    return states


def test_full_rollout_is_the_baseline():
    """The paper's t = 1, the least noisy level, is timestep 0 of diffusers' table.

    diffusers' DDIM with set_alpha_to_one=False ends there. One more step to alpha = 1 is the
    Tweedie estimate, x_{1->0} = x_0. So the target is the baseline's x_0 (observed error 1e-6), and
    the x_s of Eq. 15 is the baseline's Eq. 11 (1e-6). That of Eq. 16 differs from it by 0.12 of the
    noise that timestep 0 still has at s (sigma_0 = 0.029).
    """
    for noising in ("from_x_t", "naive"):
        maker = make_maker(config(mode="lockstep", stop="fixed", k=STEPS, noising=noising))
        pairs = make_rollout(maker, batch=64).next_pairs()
        x0 = baseline(maker, pairs.sample_ids)[-1]
        assert (pairs.t == 0).all()
        torch.testing.assert_close(pairs.target, x0.float(), rtol=0, atol=1e-5)
        noise = normal(NoiseKey(3, pairs.sample_ids, draw_id(Draw.RENOISE, -1)), SHAPE)
        theirs = scheduler().add_noise(x0, noise, pairs.s).float()
        if noising == "naive":
            torch.testing.assert_close(pairs.x_s, theirs, rtol=0, atol=1e-5)
        else:
            a = scheduler().alphas_cumprod
            left = (a[pairs.s] / a[0] * (1 - a[0])).sqrt()  # of timestep 0's noise at s
            difference = (pairs.x_s - theirs).square().mean((1, 2, 3)).sqrt()
            assert (difference < 0.5 * left).all()


@pytest.mark.parametrize("k", [1, 4, STEPS - 1, STEPS])
def test_lockstep_states_are_the_baselines(k):
    """x_t and the estimate after k steps, down to the last grid index (k = 9) and t = 0 (k = 10).

    Observed 2e-6.
    """
    maker = make_maker(config(mode="lockstep", stop="fixed", k=k))
    ids = torch.arange(32)
    draws = LockstepRollout(maker, batch=32, rank=0, world_size=1).draws(ids)
    out = lockstep_rollout(maker.predictor, maker.grid, draws, None, maker.rows(ids))
    t = 999 - 100 * k if k < STEPS else 0
    assert (out.t == t).all()
    x = baseline(maker, ids)[t]
    torch.testing.assert_close(out.x_t, x.float(), rtol=0, atol=1e-5)
    level = torch.full((32,), t)
    estimate = scheduler_x0(x, maker.predictor(x, level, maker.rows(ids))[0], level)
    torch.testing.assert_close(out.target, estimate.float(), rtol=0, atol=2e-5)


# Continuous against lockstep


def test_continuous_visits_every_grid_index_equally_often():
    """Exactly so over N calls of every group.

    The reference's forwards are at 999 ... 99, and the pairs at 899 ... 99 and 0.
    """
    rollout = make_rollout(make_maker(config()), batch=8, groups=3)
    rollout.fill()
    predict, forwards, pairs = rollout.maker.predictor.predict, [], []

    def recorded(x, t, cond):
        forwards.append(t)
        return predict(x, t, cond)

    rollout.maker.predictor.predict = recorded
    for _ in range(2 * STEPS * 3):
        pairs.append(rollout.next_pairs().t)
    grid = [100 * i - 1 for i in range(1, STEPS + 1)]
    for seen, levels in ((forwards, grid), (pairs, [0, *grid[:-1]])):
        values, counts = torch.cat(seen).unique(return_counts=True)
        assert values.tolist() == levels
        assert counts.tolist() == [2 * 8 * 3] * STEPS


@pytest.fixture
def one_backend():
    """All draws by the reference: noise of another backend would differ in its last bits.

    The float64 denoiser's steps run there in any case.
    """
    with backends.use("reference"):
        yield


@pytest.mark.usefixtures("one_backend")
def test_continuous_trajectories_are_the_lockstep_ones():
    """x_t, target, s and x_s of each sample at each index, over several lives.

    Observed 0 (bit-equal).
    """
    maker = make_maker(config())
    rollout = make_rollout(maker, batch=8, groups=3)
    lockstep = LockstepRollout(maker, batch=8, rank=0, world_size=1)
    rollout.fill()
    seen = set()
    for call in range(3 * STEPS * 3):
        x_t, index = rollout.x[call % 3].clone(), rollout.index[call % 3].clone()
        pairs = rollout.next_pairs()
        ids, stop = pairs.sample_ids, torch.where(pairs.t == 0, -1, pairs.t // 100)
        steps = STEPS - 1 - stop
        noise = normal(maker.key(Draw.RENOISE, ids, stop), SHAPE)
        draws = replace(lockstep.draws(ids), steps=steps, s=maker.draw_s(ids, stop), renoise=noise)
        out = lockstep_rollout(maker.predictor, maker.grid, draws, None, maker.rows(ids))
        assert torch.equal(out.t, pairs.t)
        # A slot at the last index holds the start of a sample; its pair is the end of another.
        inside = pairs.t > 0
        assert torch.equal(index[inside], stop[inside])
        torch.testing.assert_close(x_t[inside], out.x_t[inside], rtol=0, atol=1e-6)
        torch.testing.assert_close(pairs.x_s, out.x_s, rtol=0, atol=1e-6)
        # At t = 0 the continuous target is the finished x, which one more estimate would move by
        # sigma_0.
        torch.testing.assert_close(pairs.target[inside], out.target[inside], rtol=0, atol=1e-6)
        torch.testing.assert_close(pairs.target[~inside], out.x_t[~inside], rtol=0, atol=1e-6)
        seen |= set(zip(ids.tolist(), pairs.t.tolist(), strict=True))
    assert len(seen) == 3 * STEPS * 3 * 8


# The joint histogram of (t, s)

BINS = 5


def joint_histogram(rollout, calls: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and summed weights (N + 1, BINS) of pairs, by t and by the bin of s between t and T.

    Row 0 is t = 0.
    """
    counts, weights = torch.zeros(2, (STEPS + 1) * BINS, dtype=torch.float64)
    for _ in range(calls):
        pairs = rollout.next_pairs()
        row = torch.where(pairs.t == 0, 0, pairs.t // 100 + 1)
        cell = row * BINS + (pairs.s - pairs.t - 1) * BINS // (999 - pairs.t)
        counts += cell.bincount(minlength=len(counts))
        weights.index_add_(0, cell, pairs.weight.double())
    return counts.view(-1, BINS), weights.view(-1, BINS)


def expected_joint(levels: list[int]) -> torch.Tensor:
    """(N + 1, BINS): t as often as its grid index is in `levels`, s uniform in {t + 1, ..., 999}.

    Index -1 is t = 0.
    """
    out = torch.zeros(STEPS + 1, BINS, dtype=torch.float64)
    for index in levels:
        t = 0 if index == -1 else 100 * index + 99
        for s in range(t + 1, 1000):
            out[index + 1, (s - t - 1) * BINS // (999 - t)] += 1 / (999 - t)
    return out / out.sum()


def lockstep_levels(start: str, stop: str, k: int) -> list[int]:
    """Where each equally likely lockstep rollout stops."""
    if start == "data":
        return [max(first - k, -1) for first in range(STEPS)]
    return [STEPS - 1 - steps for steps in (range(1, k + 1) if stop == "uniform" else [k])]


def continuous_levels(start: str, k: int) -> list[int]:
    """Every state of every equally likely life of a slot.

    From noise each sample has N states; from data it has its start and the k steps below.
    """
    if start == "noise":
        return list(range(-1, STEPS - 1))
    return [index for first in range(STEPS - 1) for index in range(max(first - k, -1), first + 1)]


CASES = [("noise", "uniform", STEPS), ("noise", "uniform", 4), ("noise", "fixed", 6), ("data", "uniform", 3)]


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] * counts.sum()
    return stats.chisquare(counts[possible].numpy(), wanted.numpy()).pvalue


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lockstep_histogram(case):
    start, stop, k = case
    setting = config(mode="lockstep", start=start, stop=stop, k=k)
    counts, _ = joint_histogram(make_rollout(make_maker(setting), batch=1000), 20)
    assert chi_square_p(counts, expected_joint(lockstep_levels(*case))) > 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_continuous_histogram_and_its_lockstep_weights(case):
    """Each of 20,000 slots gives one pair, so that pairs are independent.

    The counts are compared with the closed form of continuous mode by chi-square. The weights are
    compared with that of lockstep mode and with a real lockstep run, within 4.5 standard errors per
    cell.
    """
    start, stop, k = case
    setting = config(start=start, stop=stop, k=k, pair_weight="lockstep")
    counts, weights = joint_histogram(make_rollout(make_maker(setting), batch=1000, groups=20), 20)
    total = counts.sum()
    ours, theirs = expected_joint(continuous_levels(start, k)), expected_joint(lockstep_levels(*case))
    assert chi_square_p(counts, ours) > 0.01
    per_pair = (theirs / ours.clamp(min=1e-12)).where(ours > 0, 0)
    error = per_pair * (ours * (1 - ours) / total).sqrt()
    assert ((weights / total - theirs).abs() <= 4.5 * error).all()
    lockstep = config(mode="lockstep", start=start, stop=stop, k=k)
    measured, _ = joint_histogram(make_rollout(make_maker(lockstep, seed=5), batch=1000), 20)
    both = (error**2 + theirs * (1 - theirs) / total).sqrt()
    assert ((weights - measured).abs() / total <= 4.5 * both).all()


# Parameterisations and zero terminal SNR


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_every_prediction_type_gives_the_same_pairs(mode, zero_snr):
    """One score in every prediction type gives equal pairs over 30 micro-batches; within 3e-6."""
    types = ["v_prediction", "sample"] if zero_snr else ["epsilon", "v_prediction", "sample"]
    rollouts = [
        make_rollout(make_maker(config(mode=mode), scheduler(name, rescale_betas_zero_snr=zero_snr))) for name in types
    ]
    for _ in range(30):
        first, *others = [rollout.next_pairs() for rollout in rollouts]
        for other in others:
            assert torch.equal(first.s, other.s)
            torch.testing.assert_close(first.x_s, other.x_s, rtol=0, atol=2e-5)
            torch.testing.assert_close(first.target, other.target, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["l2", "huber"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
@pytest.mark.parametrize("start", ["noise", "data"])
def test_zero_terminal_snr_is_finite(start, mode, prediction_type, kind):
    """Rollouts through alpha = 0, pairs with s = 999 among them, their losses and gradients."""
    theirs = scheduler(prediction_type, rescale_betas_zero_snr=True)
    assert theirs.alphas_cumprod[-1] == 0
    top = 0
    for w in (-3.0, -1.0, 0.0):
        maker = make_maker(config(mode=mode, start=start, k=STEPS, omega=w), theirs)
        objective = Objective.build(LossConfig(kind=kind), maker.grid.schedule, CPU)
        rollout = make_rollout(maker, batch=200)
        for _ in range(12):
            pairs = rollout.next_pairs()
            top += int((pairs.s == 999).sum())
            pred = maker.predictor.predict(pairs.x_s, pairs.s, TABLE.gather(pairs.rows)).requires_grad_()
            loss, per_pair = objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)
            loss.backward()
            for value in (pairs.x_s, pairs.target, per_pair, pred.grad):
                assert value.isfinite().all()
    assert top > 0
