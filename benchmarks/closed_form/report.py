"""Measures errors of real rollouts that the closed form does not bound. Nothing in it is a proof.

    python -m benchmarks.closed_form.report            # ten minutes on one core; into results/
    python -m benchmarks.closed_form.report --quick    # one minute; rougher, into build/

The full run needs 5 GB of memory. It has four parts:

1. Solver bias: DDIM from exact p_T, compared with the exact marginals of a Gaussian mixture.
2. Start bias: the same from N(0, I), with so many steps that the solver's bias is small.
3. The reference's move: live slots of a training run, compared with a replay of the same samples by
   the current EMA.
4. The correlation of gradients k updates apart, for pools of 1, 4 and 25 slots per pair.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

import torch

from benchmarks.closed_form.measurements import COMPONENTS, CPU, DIMS, WINDOW, measure
from benchmarks.environment import RESULTS, ROOT, describe
from selfnpo_fast.runtime.console import quiet_libraries


def cell(value: dict[str, float], digits: int = 3) -> str:
    """A mean and its standard error as text: mean ± error."""
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def marginal_table(first: str, arms: dict[str, dict]) -> str:
    """The tables of parts 1 and 2: one row per arm and level."""
    names = ("mean_shift", "variance", "energy")
    rows = [
        [arm, t, *(cell(errors[name], 4 if name == "energy" else 3) for name in names)]
        for arm, levels in arms.items()
        for t, errors in levels.items()
        if t in ("799", "399", "0")
    ]
    return markdown([first, "t", "shift of the mean", "total variance, relative", "energy distance"], rows)


def move_table(rows: list[dict]) -> str:
    """The table of part 3: every fourth grid index."""
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
    """The table of part 4: one row per pool."""
    lags = [k for k in (1, 2, 3, 4, 5, 8, 10, 25) if k <= result["settings"]["lag"]["lags"]]
    rows = [
        [pool, *(cell(arm["lags"][k - 1], 2) for k in lags), cell(arm["variance_inflation"], 2)]
        for pool, arm in result["lag_correlation"].items()
    ]
    return markdown(["pool", *(f"k = {k}" for k in lags), f"variance of the mean of {WINDOW}"], rows)


def report(result: dict) -> str:
    """The text of closed_form.md."""
    settings, machine = result["settings"], result["environment"]
    commit = str(machine["git_commit"])[:9] + (" with changes" if machine["git_dirty"] else "")
    train, lag = settings["train"], settings["lag"]
    solver, start = result["solver_bias"], result["start_bias"]
    oldest, pools = result["reference_move"][-1], result["lag_correlation"]
    lag_of_pool = ", ".join(
        f"{cell(arm['lags'][int(P) - 1], 2)} (P = {P})" for P, arm in pools.items() if int(P) <= lag["lags"]
    )
    return f"""# Rollouts against closed form: measurements

Made by `python -m benchmarks.closed_form.report` on {machine["date"]}: torch {machine["torch"]}, {machine["threads"]}
thread of {machine["cpu"]}, commit {commit};
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
from the same samples one grid step on; at that lag the correlation is {lag_of_pool}.
The last column is the variance of the mean of {WINDOW} consecutive gradients relative to independent ones, from lags 1
to {WINDOW - 1}; longer windows meet more of the lags that are multiples of P.

{lag_table(result)}"""


def main() -> None:
    """Runs the command line: measures, prints the page, and writes it next to its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trajectories, updates and seeds; written to build/")
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
