"""Rollouts with the exact denoiser of a fixed Gaussian mixture, for the tests in closed form.

Eight dimensions, three components, four prompts; grid timesteps 99, 199, ..., 999.
"""

from __future__ import annotations

import tiny
import torch

from benchmarks.arms.pairs import finished_pairs
from benchmarks.closed_form.gaussian_mixture import ExactDenoiser, GaussianMixture
from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import (
    ContinuousRollout,
    Grid,
    GuidedPredictor,
    LockstepDraws,
    LockstepRollout,
    PairMaker,
    lockstep_rollout,
)

CPU = torch.device("cpu")
SHAPE, DIMS, STEPS = (2, 2, 2), 8, 10
PROMPT_WEIGHTS = torch.tensor([[4, 2, 2], [2, 4, 2], [1, 1, 6], [1, 5, 2]]) / 8  # a prompt is a set of weights


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


MIXTURE = GaussianMixture(randn(3, *SHAPE, seed=1), 0.1 + 0.4 * randn(3, *SHAPE, seed=2).square())
GAUSSIAN = GaussianMixture(MIXTURE.means[:1], MIXTURE.variances[:1])
TABLE = ConditioningTable.build({"weights": PROMPT_WEIGHTS.mean(0, keepdim=True)}, {"weights": PROMPT_WEIGHTS})
ONE = ConditioningTable.build({"weights": torch.ones(1, 1)}, {"weights": torch.ones(4, 1)})


def scheduler(prediction_type: str = "epsilon", **changes):
    return tiny.scheduler(prediction_type, **({"timestep_spacing": "trailing"} | changes))


def config(**changes) -> RolloutConfig:
    return RolloutConfig(**({"grid_steps": STEPS, "mode": "continuous", "omega": 0.0} | changes))


def make_maker(
    setting: RolloutConfig, theirs=None, mixture=MIXTURE, table=TABLE, seed: int = 3, levels=None
) -> PairMaker:
    """The product's pair maker with the exact denoiser; `levels` are the s that pairs may have.

    Rollouts from data start at 4 images, one of each prompt.
    """
    schedule = Levels.of(theirs or scheduler())
    data = mixture.sample(table.rows["weights"][1:], rng(7)).float() if setting.start == "data" else None
    return PairMaker(
        GuidedPredictor(ExactDenoiser(mixture, schedule), table, setting.omega),
        Grid.build(
            schedule, setting.grid_steps, CPU, omega=setting.omega, noising=setting.noising, s_shift=setting.s_shift,
            levels=levels,
        ),
        setting,
        latent_shape=SHAPE,
        num_prompts=4,
        latents=data,
        seed=seed,
        dropout=0.0,
        device=CPU,
    )  # fmt: skip


def make_rollout(maker: PairMaker, batch: int = 8, groups: int = 3):
    shard = {"batch": batch, "rank": 0, "world_size": 1}
    if maker.config.mode == "lockstep":
        return LockstepRollout(maker, **shard)
    return ContinuousRollout(maker, groups=groups, **shard)


def forward_process(x0: torch.Tensor, t: int, seed: int) -> torch.Tensor:
    """x_t of the true forward process, by diffusers."""
    return scheduler().add_noise(x0, randn(*x0.shape, seed=seed), torch.full((len(x0),), t))


def rollout_of_no_steps(index: int, s: int, count: int, noising: str, mixture=MIXTURE, table=TABLE, theirs=None):
    """The product's (x_s, target), where x_t is drawn exactly from p_t.

    The rollout starts at noised exact data and walks zero steps.
    """
    maker = make_maker(config(noising=noising), theirs, mixture=mixture, table=table)
    rows = torch.randint(1, 5, (count,), generator=rng(11))
    draws = LockstepDraws(
        start_index=torch.full((count,), index),
        steps=torch.zeros(count, dtype=torch.int64),
        noise=randn(count, *SHAPE, seed=12),
        s=torch.full((count,), s),
        renoise=randn(count, *SHAPE, seed=13),
    )
    latents = mixture.sample(table.rows["weights"][rows], rng(14))
    out = lockstep_rollout(maker.predictor, maker.grid, draws, latents, rows)
    return out.x_s.flatten(1), out.target.flatten(1)


def exact_batch(maker: PairMaker, batch: int, number: int):
    """Pairs at random (t, s), and their x_0.

    They are finished as in continuous rollouts, but x_t is drawn exactly from p_t.
    """
    ids = torch.arange(batch) + number * batch
    index = torch.randint(-1, STEPS - 1, (batch,), generator=rng(100 + number))
    rows, t = maker.rows(ids), maker.grid.timestep(index)
    x0 = maker.predictor.predict.mixture.sample(maker.predictor.table.rows["weights"][rows], rng(1000 + number))
    x_t = scheduler().add_noise(x0, randn(*x0.shape, seed=2000 + number), t)
    pos, _ = maker.predictor(x_t, t, rows)
    return finished_pairs(maker, x_t, index, scheduler_x0(x_t, pos, t), ids), x0


def scheduler_x0(x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The estimate of x_0 from a noise prediction, by diffusers' schedule."""
    a = scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x - (1 - a).sqrt() * eps) / a.sqrt()


def z_scores(samples: torch.Tensor, truth: torch.Tensor | float) -> torch.Tensor:
    """Deviation of the mean of samples (n, ...) from `truth` in standard errors."""
    return (samples.mean(0) - truth) / (samples.std(0) / len(samples) ** 0.5)
