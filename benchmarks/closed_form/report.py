"""What the closed form does not promise about real rollouts, measured; every number is a measurement, not a proof.

    python -m benchmarks.closed_form.report            # ten minutes on one core, 5 GB; writes into results/
    python -m benchmarks.closed_form.report --quick    # a minute, other and rougher numbers, written to build/

1. solver bias: DDIM from exact p_T, against the exact marginals of a Gaussian mixture
2. start bias: the same from N(0, I), with so many steps that the solver's share is small
3. the reference's move: live slots of a training run against a replay of the same samples by the current EMA
4. the correlation of gradients k updates apart, for pools of 1, 4 and 25 slots per pair
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from benchmarks.closed_form.gaussian_mixture import ExactDenoiser, GaussianMixture
from benchmarks.environment import RESULTS, ROOT, describe
from selfnpo_fast.config import LossConfig, RolloutConfig
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.diffusion.schedule import NoiseSchedule
from selfnpo_fast.models import StableDiffusionAdapter, load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import ContinuousRollout, Grid, GuidedPredictor, PairMaker, walk
from selfnpo_fast.runtime.console import quiet_libraries
from selfnpo_fast.training.moving_reference import MovingReference
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import Draw, normal

CPU = torch.device("cpu")
SHAPE, DIMS, COMPONENTS = (4, 2, 2), 16, 4
LEVELS = (799, 599, 399, 199, 0)  # on the grids of 10, 25, 50, 100 and 1000 steps alike
GRID_STEPS = 25
WINDOW = 10


def mixture() -> GaussianMixture:
    """Four Gaussians about a mean of 0.5 per dimension, so that a start at N(0, I) has something to miss."""
    generator = torch.Generator().manual_seed(0)
    means = 0.5 + 0.8 * torch.randn(COMPONENTS, *SHAPE, dtype=torch.float64, generator=generator)
    variances = 0.05 + 0.3 * torch.rand(COMPONENTS, *SHAPE, dtype=torch.float64, generator=generator)
    return GaussianMixture(means, variances)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| from x, y (n, D); 0 on average where they are alike."""
    n = len(x)
    inside = (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / (n * (n - 1))
    return (2 * torch.cdist(x, y).mean() - inside).item()


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean over replicates and its standard error."""
    data = torch.tensor(values, dtype=torch.float64)
    return {"mean": data.mean().item(), "error": (data.std() / len(data) ** 0.5).item()}


def exact_states(truth: GaussianMixture, schedule: NoiseSchedule, t: int, count: int, generator) -> torch.Tensor:
    """count draws (count, *SHAPE) float64 of p_t."""
    weights = torch.full((count, COMPONENTS), 1 / COMPONENTS)
    x0 = truth.sample(weights, generator)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t))
    return alpha * x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=generator)


def marginal_errors(
    x: torch.Tensor, truth: GaussianMixture, schedule: NoiseSchedule, t: int, replicates: int, generator
) -> dict[str, dict[str, float]]:
    """How x (count, *SHAPE) differs from p_t: the mean along the true mean's direction, the total variance relative to
    the true one, and the energy distance to fresh draws; each over `replicates` equal parts of x.
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
    """The errors at every level of DDIM rollouts with the exact denoiser; start is `p_T` or `noise`."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
    )
    truth, schedule = mixture(), NoiseSchedule.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(1)
    grid = Grid.build(schedule, grid_steps, CPU, omega=0.0)
    rows = {"weights": torch.full((1, COMPONENTS), 1 / COMPONENTS)}
    predictor = GuidedPredictor(ExactDenoiser(truth, schedule), ConditioningTable.build(rows, rows), omega=0)
    if start == "noise":
        x = torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)
    else:
        x = exact_states(truth, schedule, 999, count, generator)
    index, prompt, out = torch.full((count,), grid_steps - 1), torch.ones(count, dtype=torch.int64), {}
    for t in LEVELS:
        stop = torch.full((count,), (t + 1) * grid_steps // 1000 - 1)
        x, index = walk(predictor, grid, x, index, stop, prompt), stop
        out[str(t)] = marginal_errors(x, truth, schedule, t, replicates, generator)
    return out


def training_parts(batch: int, pool: int, seed: int, reference):
    """A continuous rollout of the digits model from noise at w = -1; with table and adapter."""
    adapter = load_adapter("digits")
    prompts = read_prompts("digits")[:512]
    table = ConditioningTable.build(adapter.encode_empty(CPU), adapter.encode_prompts(prompts, CPU))
    setting = RolloutConfig(grid_steps=GRID_STEPS, omega=-1.0, pool=pool)
    maker = PairMaker(
        GuidedPredictor(lambda x, t, cond: adapter.predict(reference, x, t, cond), table, setting.omega),
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


def pair_loss(adapter: StableDiffusionAdapter, table: ConditioningTable, student, pairs) -> torch.Tensor:
    """Eq. 17 of one micro-batch."""
    objective = Objective.build(LossConfig(), adapter.schedule, CPU)
    pred = adapter.predict(student, pairs.x_s, pairs.s, table.gather(pairs.rows))
    return objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)[0]


def replay(rollout: ContinuousRollout, adapter: StableDiffusionAdapter, network) -> torch.Tensor:
    """The states that the live slots would be in, had `network` walked them from their start noise."""
    maker = rollout.maker
    predictor = GuidedPredictor(
        lambda x, t, cond: adapter.predict(network, x, t, cond), maker.predictor.table, maker.config.omega
    )
    ids, index = rollout.ids.flatten(), rollout.index.flatten()
    noise = normal(maker.key(Draw.START_NOISE, ids), maker.latent_shape)
    return walk(predictor, maker.grid, noise, torch.full_like(index, GRID_STEPS - 1), index, maker.rows(ids))


def reference_move(updates: int, every: int, batch: int, pool: int, decay: float) -> list[dict]:
    """Train; every `every` updates from 2 `every` on, compare all live slots with replays; one row per grid index.

    `every` should be no multiple of a life (25 pool updates), or each slot is met at the same index every time.
    """
    load = load_adapter("digits").load_denoiser
    student, original = load(torch.float32).requires_grad_(True), load(torch.float32).requires_grad_(False)
    reference = MovingReference(load(torch.float32), student.named_parameters(), decay)
    adapter, table, rollout = training_parts(batch, pool, 0, reference.module)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0)
    index, live, current, first = [], [], [], []
    for update in range(1, updates + 1):
        optimizer.zero_grad()
        pair_loss(adapter, table, student, rollout.next_pairs()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        reference.update()
        if update % every == 0 and update >= 2 * every:
            index.append(rollout.index.flatten())
            live.append(rollout.x.flatten(0, 1).flatten(1).clone())
            current.append(replay(rollout, adapter, reference.module).flatten(1))
            first.append(replay(rollout, adapter, original).flatten(1))
    at, live, current, first = (torch.cat(parts) for parts in (index, live, current, first))
    rows = []
    for i in range(GRID_STEPS - 1, -1, -1):
        a, b, c = (states[at == i] for states in (live, current, first))
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
    """Gradients (count, parameters) float32 of consecutive minibatches; student and reference are the digits model."""
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
    """Correlation of gradients k minibatches apart, k = 1..lags, and how much it inflates the variance of the mean of
    `WINDOW` consecutive gradients; mean and standard error over seeds.

    The mean gradient is taken off with two estimates from runs of their own, one for each factor of a product, so that
    their errors cancel on average.
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
    """All four measurements with their settings."""
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


def cell(value: dict[str, float], digits: int = 3) -> str:
    """Mean ± standard error."""
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def marginal_table(first: str, arms: dict[str, dict]) -> str:
    """One row per arm and level."""
    names = ("mean_shift", "variance", "energy")
    rows = [
        [arm, t, *(cell(errors[name], 4 if name == "energy" else 3) for name in names)]
        for arm, levels in arms.items()
        for t, errors in levels.items()
        if t in ("799", "399", "0")
    ]
    return markdown([first, "t", "shift of the mean", "total variance, relative", "energy distance"], rows)


def move_table(rows: list[dict]) -> str:
    """Every fourth grid index."""
    lines = [
        [
            str(row["t"]),
            str(row["age_in_updates"]),
            str(row["slots"]),
            *(f"{row[arm][name]:.3f}" for name in ("mean", "std") for arm in ("live", "replay_by_current_ema")),
            cell(row["mean_difference"], 4),
            cell(row["std_difference"], 4),
            cell(row["distance_to_current"], 4),
            cell(row["distance_current_to_original"], 4),
        ]
        for row in rows[::4]
    ]
    header = ["t", "age", "slots", "mean live", "replay", "std live", "replay", "mean: live - replay"]
    return markdown([*header, "std: live - replay", "live to replay", "replay to original"], lines)


def lag_table(result: dict) -> str:
    """One row per pool."""
    shown = [k for k in (1, 2, 3, 4, 5, 8, 10, 25) if k <= result["settings"]["lag"]["lags"]]
    rows = [
        [pool, *(cell(arm["lags"][k - 1], 2) for k in shown), cell(arm["variance_inflation"], 2)]
        for pool, arm in result["lag_correlation"].items()
    ]
    return markdown(["pool", *(f"k = {k}" for k in shown), f"variance of the mean of {WINDOW}"], rows)


def report(result: dict) -> str:
    """The page of closed_form.md."""
    settings, where = result["settings"], result["environment"]
    train, lag = settings["train"], settings["lag"]
    solver, start = result["solver_bias"], result["start_bias"]
    oldest, pools = result["reference_move"][-1], result["lag_correlation"]
    own_lag = ", ".join(
        f"{cell(arm['lags'][int(P) - 1], 2)} (P = {P})" for P, arm in pools.items() if int(P) <= lag["lags"]
    )
    return f"""# Rollouts against closed form: measurements

Made by `python -m benchmarks.closed_form.report` on {where["date"]}: torch {where["torch"]}, {where["threads"]}
thread of {where["cpu"]}, commit {str(where["git_commit"])[:9]}{" with changes" if where["git_dirty"] else ""};
{sum(result["seconds"].values()) / 60:.0f} minutes. Everything is seeded. ± is one standard error. The proofs are in
tests/rollout/test_closed_form.py; nothing here is one.

Parts 1 and 2 use the exact denoiser of a Gaussian mixture ({DIMS} dimensions, {COMPONENTS} components, mean about 0.5
per dimension, Stable Diffusion's noise schedule): {settings["count"]:,} trajectories in {settings["replicates"]}
replicates, at timestep t against the exact p_t. *Shift of the mean* is along the true mean's direction; *total
variance, relative* is measured / true - 1; the energy distance is unbiased, so that it falls on both sides of 0 where
there is no difference. All arms are compared with the same draws. Other mixtures give other sizes.

## 1. Solver bias: DDIM started from exact p_T

At t = 0 the total variance is off by {cell(solver["10"]["0"]["variance"])} with 10 steps,
{cell(solver["25"]["0"]["variance"])} with 25 and {cell(solver["100"]["0"]["variance"])} with 100.

{marginal_table("steps", solver)}
## 2. Start bias: N(0, I) in place of p_T

{settings["fine_steps"]} DDIM steps. At t = 0 the mean is off by {cell(start["noise"]["0"]["mean_shift"])} when started
from noise, by {cell(start["p_T"]["0"]["mean_shift"])} from exact p_T. At zero terminal SNR p_T is N(0, I) and the
start adds nothing: measured {cell(start["noise_zero_terminal_snr"]["0"]["mean_shift"])}.

{marginal_table("start", start)}
## 3. The reference's move along a slot's life

The digits model trained from noise at w = -1 with half of the prompts empty, batch {train["batch"]}, for
{train["updates"]} updates (EMA decay {train["decay"]}, pool {train["pool"]}).
Every {train["every"]} updates all live slots are compared with a replay from the same start noise by the EMA of that
moment. *Age* is the number of updates since the slot's start; the last two columns are rms distances per sample over
the rms of the replayed states, *replay to original* being how far the EMA has
moved the trajectory since training began. At t = {oldest["t"]} a live state is
{cell(oldest["distance_to_current"], 4)} from its replay, the replay
{cell(oldest["distance_current_to_original"], 4)} from the original's. All indices are in the JSON.

{move_table(result["reference_move"])}
## 4. Correlation of gradients k updates apart

Student and reference both stay the digits model, so that only the pairs differ; batch {lag["batch"]}, {lag["count"]}
consecutive minibatches, {lag["seeds"]} seeds. The mean gradient is taken off. In a pool of P, minibatches P apart come
from the same samples one grid step on; at that lag the correlation is {own_lag}.
The last column is the variance of the mean of {WINDOW} consecutive gradients relative to independent ones, from lags 1
to {WINDOW - 1}; longer windows meet more of the lags that are multiples of P.

{lag_table(result)}"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller everything, written to build/")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    environment = describe(CPU)
    result = {"environment": environment, **measure(arguments.quick)}
    folder: Path = ROOT / "build" if arguments.quick else RESULTS
    folder.mkdir(exist_ok=True)
    (folder / "closed_form.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "closed_form.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
