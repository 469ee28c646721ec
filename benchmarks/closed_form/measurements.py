"""The four measurements of `report.py`."""

from __future__ import annotations

import time

import torch
from diffusers import DDIMScheduler

from benchmarks.closed_form.gaussian_mixture import ExactDenoiser, GaussianMixture
from selfnpo_fast.config import LossConfig, RolloutConfig
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models import Adapter, load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import ContinuousRollout, Grid, GuidedPredictor, PairMaker, walk
from selfnpo_fast.training.moving_reference import MovingReference
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import Draw, normal

CPU = torch.device("cpu")
SHAPE, DIMS, COMPONENTS = (4, 2, 2), 16, 4
"""The mixture's latents, their number of elements, and its Gaussians."""
LEVELS = (799, 599, 399, 199, 0)
"""Timesteps that the grids of 10, 25, 50, 100 and 1000 steps have in common."""
GRID_STEPS = 25
WINDOW = 10
"""Consecutive gradients whose mean part 4 looks at."""


def mixture() -> GaussianMixture:
    """Four Gaussians with a mean of about 0.5 per dimension.

    The mean is not 0, so that p_T differs from N(0, I).
    """
    generator = torch.Generator().manual_seed(0)
    means = 0.5 + 0.8 * torch.randn(COMPONENTS, *SHAPE, dtype=torch.float64, generator=generator)
    variances = 0.05 + 0.3 * torch.rand(COMPONENTS, *SHAPE, dtype=torch.float64, generator=generator)
    return GaussianMixture(means, variances)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| from x and y, both (n, D).

    It is 0 on average where x and y have the same distribution.
    """
    n = len(x)
    inside = (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / (n * (n - 1))
    return (2 * torch.cdist(x, y).mean() - inside).item()


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean over the replicates, and its standard error."""
    data = torch.tensor(values, dtype=torch.float64)
    return {"mean": data.mean().item(), "error": (data.std() / len(data) ** 0.5).item()}


def exact_states(truth: GaussianMixture, schedule: Levels, t: int, count: int, generator) -> torch.Tensor:
    """`count` draws of p_t, (count, *SHAPE) float64."""
    weights = torch.full((count, COMPONENTS), 1 / COMPONENTS)
    x0 = truth.sample(weights, generator)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t))
    return alpha * x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=generator)


def marginal_errors(
    x: torch.Tensor, truth: GaussianMixture, schedule: Levels, t: int, replicates: int, generator
) -> dict[str, dict[str, float]]:
    """How x (count, *SHAPE) differs from p_t, with mean and standard error over equal parts of x.

    "mean_shift" is the shift of the mean along the direction of the true mean, "variance" the total
    variance relative to the true one, minus 1, and "energy" the energy distance to fresh draws.
    """
    alpha, sigma = (float(value) for value in schedule.alpha_sigma(torch.tensor(t)))
    mean, covariance = truth.moments(torch.full((COMPONENTS,), 1 / COMPONENTS), alpha, sigma)
    direction = truth.means.mean(0).flatten()
    direction = direction / direction.norm()
    fresh = exact_states(truth, schedule, t, len(x), generator).flatten(1)
    out: dict[str, list[float]] = {"mean_shift": [], "variance": [], "energy": []}
    for ours, theirs in zip(x.flatten(1).chunk(replicates), fresh.chunk(replicates), strict=True):
        out["mean_shift"].append(((ours.mean(0) - mean) @ direction).item())
        out["variance"].append((ours.var(0).sum() / covariance.trace() - 1).item())
        out["energy"].append(energy_distance(ours, theirs))
    return {name: mean_and_error(values) for name, values in out.items()}


def trajectory_errors(grid_steps: int, start: str, count: int, replicates: int, zero_snr: bool = False) -> dict:
    """`marginal_errors` of DDIM rollouts with the exact denoiser, by level.

    `start` is "p_T" or "noise", which is N(0, I). With `zero_snr` the schedule has zero terminal
    SNR.
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
    )
    truth, schedule = mixture(), Levels.of(scheduler)
    generator = torch.Generator().manual_seed(1)
    # At w = 0 the predictor uses the conditional branch, whose prompt has even weights.
    grid = Grid.build(schedule, grid_steps, CPU, omega=0.0)
    rows = {"weights": torch.full((1, COMPONENTS), 1 / COMPONENTS)}
    predictor = GuidedPredictor(ExactDenoiser(truth, schedule), ConditioningTable.build(rows, rows), omega=0)
    if start == "noise":
        x = torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)
    else:
        x = exact_states(truth, schedule, 999, count, generator)
    # One walk down the grid, with a stop at every level.
    index, prompt, out = torch.full((count,), grid_steps - 1), torch.ones(count, dtype=torch.int64), {}
    for t in LEVELS:
        stop = torch.full((count,), (t + 1) * grid_steps // 1000 - 1)
        x, index = walk(predictor, grid, x, index, stop, prompt), stop
        out[str(t)] = marginal_errors(x, truth, schedule, t, replicates, generator)
    return out


def training_parts(batch: int, pool: int, seed: int, reference):
    """Adapter, conditioning table and a continuous rollout of the digits model.

    The rollout starts from noise, has w = -1, and calls the network `reference`.
    """
    adapter = load_adapter("digits")
    prompts = read_prompts("digits")[:512]
    table = ConditioningTable.build(adapter.encode_empty(CPU), adapter.encode_prompts(prompts, CPU))
    setting = RolloutConfig(grid_steps=GRID_STEPS, omega=-1.0, pool=pool)
    maker = PairMaker(
        GuidedPredictor(lambda x, t, cond: adapter.predict_level(reference, x, t, cond), table, setting.omega),
        Grid.build(adapter.schedule, GRID_STEPS, CPU, omega=setting.omega),
        setting,
        latent_shape=adapter.latent_shape,
        num_prompts=len(prompts),
        latents=None,
        seed=seed,
        dropout=0.5,
        device=CPU,
    )
    return adapter, table, ContinuousRollout(maker, batch=batch, groups=pool, rank=0, world_size=1)


def pair_loss(adapter: Adapter, table: ConditioningTable, student, pairs) -> torch.Tensor:
    """The loss (Eq. 17) of one micro-batch, a scalar with gradient."""
    objective = Objective.build(LossConfig(), adapter.schedule, CPU)
    pred = adapter.predict_level(student, pairs.x_s, pairs.s, table.gather(pairs.rows))
    return objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)[0]


def replay(rollout: ContinuousRollout, adapter: Adapter, network) -> torch.Tensor:
    """The states of all slots, (slots, ...), if `network` had walked them from their start noise.

    A live slot was walked by the reference, which moved in the meantime.
    """
    maker = rollout.maker
    predictor = GuidedPredictor(
        lambda x, t, cond: adapter.predict_level(network, x, t, cond), maker.predictor.table, maker.config.omega
    )
    ids, index = rollout.ids.flatten(), rollout.index.flatten()
    noise = normal(maker.key(Draw.START_NOISE, ids), maker.latent_shape)
    return walk(predictor, maker.grid, noise, torch.full_like(index, GRID_STEPS - 1), index, maker.rows(ids))


def reference_move(updates: int, every: int, batch: int, pool: int, decay: float) -> list[dict]:
    """Trains, and compares live slots with replays; one row per grid index.

    All slots are compared after every `every` updates, from 2 `every` updates on. `every` should
    not be a multiple of a slot's life (25 `pool` updates): each slot would be at the same index
    each time.
    """
    load = load_adapter("digits").load_denoiser
    student, original = load(torch.float32).requires_grad_(True), load(torch.float32).requires_grad_(False)
    reference = MovingReference(load(torch.float32), student.named_parameters(), decay)
    adapter, table, rollout = training_parts(batch, pool, 0, reference.module)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    # Grid indices and states of all slots: live, replayed by the current EMA, and by the original.
    indices, live, current, first = [], [], [], []
    for update in range(1, updates + 1):
        optimizer.zero_grad()
        pair_loss(adapter, table, student, rollout.next_pairs()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        reference.update()
        if update % every == 0 and update >= 2 * every:
            indices.append(rollout.index.flatten())
            live.append(rollout.x.flatten(0, 1).flatten(1).clone())
            current.append(replay(rollout, adapter, reference.module).flatten(1))
            first.append(replay(rollout, adapter, original).flatten(1))
    indices, live, current, first = (torch.cat(parts) for parts in (indices, live, current, first))
    rows = []
    for i in range(GRID_STEPS - 1, -1, -1):
        # Live states, replays by the current EMA and by the original, each (slots at index i, D).
        a, b, c = (states[indices == i] for states in (live, current, first))
        scale = b.square().mean().sqrt()
        rows.append(
            {
                "index": i,
                "t": int(rollout.maker.grid.timestep(torch.tensor(i))),
                "age_in_updates": (GRID_STEPS - 1 - i) * pool,
                "slots": len(a),
                "live": {"mean": a.mean().item(), "std": a.std().item()},
                "replay_by_current_ema": {"mean": b.mean().item(), "std": b.std().item()},
                "replay_by_original": {"mean": c.mean().item(), "std": c.std().item()},
                "mean_difference": mean_and_error((a.mean(1) - b.mean(1)).tolist()),
                "std_difference": mean_and_error((a.std(1) - b.std(1)).tolist()),
                "distance_to_current": mean_and_error(((a - b).square().mean(1).sqrt() / scale).tolist()),
                "distance_current_to_original": mean_and_error(((b - c).square().mean(1).sqrt() / scale).tolist()),
            }
        )
    return rows


def gradients(batch: int, pool: int, seed: int, count: int) -> torch.Tensor:
    """Gradients of `count` consecutive minibatches, (count, parameters) float32.

    Student and reference are the digits model, and neither moves.
    """
    student = load_adapter("digits").load_denoiser(torch.float32)
    reference = load_adapter("digits").load_denoiser(torch.float32).requires_grad_(False)
    adapter, table, rollout = training_parts(batch, pool, seed, reference)
    parameters = list(student.requires_grad_(True).parameters())
    out = torch.empty(count, sum(p.numel() for p in parameters))
    for row in out:
        parts = torch.autograd.grad(pair_loss(adapter, table, student, rollout.next_pairs()), parameters)
        torch.cat([part.flatten() for part in parts], out=row)
    return out


def lag_correlations(pools: tuple[int, ...], lags: int, batch: int, count: int, seeds: int) -> dict:
    """Correlation of gradients k minibatches apart, k = 1..lags, by pool.

    "variance_inflation" is how much the correlation raises the variance of the mean of WINDOW
    consecutive gradients. Both have mean and standard error over the seeds.

    The mean gradient is subtracted. Two estimates of it come from two separate runs, one for each
    factor of a product, so that their errors cancel on average.
    """
    means = [gradients(batch, max(pools), 100 + i, count).mean(0) for i in range(2)]
    out = {}
    for pool in pools:
        rho = []
        for seed in range(seeds):
            g = gradients(batch, pool, seed, count)
            left, right = g - means[0], g - means[1]
            products = left @ right.T
            products = (products + products.T) / 2
            # Products k off the diagonal belong to gradients k minibatches apart.
            rho.append([(products.diagonal(k).mean() / products.diagonal().mean()).item() for k in range(1, lags + 1)])
        inflation = [
            1 + 2 * sum((1 - k / WINDOW) * value for k, value in enumerate(run[: WINDOW - 1], 1)) for run in rho
        ]
        out[str(pool)] = {
            "lags": [mean_and_error([run[k] for run in rho]) for k in range(lags)],
            "variance_inflation": mean_and_error(inflation),
        }
    return out


def measure(quick: bool) -> dict:
    """Runs all four measurements; returns their results with settings and seconds."""
    count, replicates = (2000, 4) if quick else (20_000, 10)
    train = {"updates": 36, "every": 12, "batch": 32, "pool": 4, "decay": 0.999}
    lag = {"pools": (1, 4, 25), "lags": 30, "batch": 16, "count": 120, "seeds": 4}
    if quick:
        lag |= {"lags": 10, "batch": 4, "count": 20, "seeds": 2}
    else:
        train |= {"updates": 448, "every": 112, "batch": 32}
    fine = 100 if quick else 1000
    parts = {
        "solver_bias": lambda: {str(n): trajectory_errors(n, "p_T", count, replicates) for n in (10, 25, 50, 100)},
        "start_bias": lambda: {
            "p_T": trajectory_errors(fine, "p_T", count, replicates),
            "noise": trajectory_errors(fine, "noise", count, replicates),
            "noise_zero_terminal_snr": trajectory_errors(fine, "noise", count, replicates, zero_snr=True),
        },
        "reference_move": lambda: reference_move(**train),
        "lag_correlation": lambda: lag_correlations(**lag),
    }
    out: dict = {
        "settings": {"count": count, "replicates": replicates, "fine_steps": fine, "train": train, "lag": lag},
        "seconds": {},
    }
    for name, part in parts.items():
        begin = time.perf_counter()
        out[name] = part()
        out["seconds"][name] = round(time.perf_counter() - begin, 1)
        print(f"{name}: {out['seconds'][name]} s", flush=True)
    return out
