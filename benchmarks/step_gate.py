"""The correctness gate of `bench_step.py`: every arm's pairs and forwards against the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.arms.step import ARMS, Arm, Workbench, expected_forwards
from benchmarks.environment import exact_float32
from benchmarks.nets import SMALL, BenchNet
from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.rollout import LockstepDraws, LockstepRollout, PairMaker, Pairs, lockstep_rollout
from selfnpo_fast.runtime.errors import one_line
from selfnpo_kernels import Draw, normal

GATE_BATCH = 2
"""Pairs per minibatch in the correctness gate."""
GRID_STEPS = 5
"""Steps of the gate's grid for networks of full size, for which those of the arms take minutes."""
TOLERANCES = {"cpu": 2e-5, "cuda": 1e-4}
"""Largest difference of float32 pairs that should be equal, relative to their root mean square.

On the CPU the difference is 0. Batches of other sizes, whose sums round differently, come to 2e-6
after 25 steps. cuDNN may choose another algorithm for another batch. The least accurate one for
3x3 convolutions, Winograd's F(4x4, 3x3), has 11 times the rounding of sums in float32: with it in
all convolutions of one side, emulated on a CPU, pairs differ by 4e-6 after 25 steps. The tolerance
for CUDA leaves a factor of 25 for deeper networks and for the kernels of attention. A mistake is
larger: TF32 in the convolutions, emulated as well, comes to 7e-4 and more.
"""


@dataclass
class Gate:
    """What the correctness gate has found; an arm without failures may be timed."""

    tolerance: float = TOLERANCES["cpu"]
    largest_error: float = 0.0
    """Largest difference relative to the root mean square."""
    forwards: dict[str, float] = field(default_factory=dict)
    """Reference forwards per pair by arm, in the minibatch that the gate ran."""
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Failures by arm, a line each."""

    def fail(self, name: str, line: str) -> None:
        """Records one failure of an arm."""
        self.failures.setdefault(name, []).append(line)

    def count(self, name: str, counts: Sequence[int], expected: int, batch: int) -> None:
        """Compares counts of the rows that were forwarded to `expected`: the network's first, if it
        can count them, then the predictor's."""
        self.forwards[name] = counts[0] / batch
        if any(count != expected for count in counts):
            self.fail(name, f"{counts[0]} forwards, {counts[-1]} counted, {expected} expected")

    def compare(self, name: str, what: str, ours: torch.Tensor, truth: torch.Tensor) -> None:
        """Compares tensors of equal shape, integers exactly and others to the tolerance."""
        if not ours.is_floating_point():
            if not torch.equal(ours, truth):
                self.fail(name, f"other {what}")
            return
        error = ((ours - truth).abs().max() / truth.square().mean().sqrt()).item()
        if not error <= self.tolerance:  # NaN fails, too
            self.fail(name, f"{what} differs by {error:.1e}, tolerance {self.tolerance:.0e}")
        else:
            self.largest_error = max(self.largest_error, error)


def gate_of(net: BenchNet, device: torch.device, arms: Sequence[Arm]) -> Gate:
    """The gate of a network on a device, in float32; its networks are gone when it returns.

    Networks of full size walk a grid of `GRID_STEPS`.
    """
    if net.name not in SMALL:
        arms = [shortened(arm, GRID_STEPS) for arm in arms]
    with exact_float32():
        return check_arms(Workbench(net, batch=GATE_BATCH, device=device, dtype=torch.float32), arms)


def shortened(arm: Arm, grid_steps: int) -> Arm:
    """The arm on a grid of so many steps. A rollout that walks part of its grid walks 2 steps."""
    if arm.config is None:
        return arm
    config = arm.config
    k = config.k if config.k is None else (grid_steps if config.k == config.grid_steps else 2)
    return replace(arm, config=replace(config, grid_steps=grid_steps, k=k))


def mixed_batch(rollout: LockstepRollout, k: int) -> int:
    """The first sample id whose minibatch has samples that arrive early and samples that do not.

    A sample arrives early if it passes grid index 0 before K steps.
    """
    start = rollout.draws(torch.arange(512)).start_index
    batches = start.unfold(0, rollout.batch, 1)
    return int(((batches.amin(1) < k - 1) & (batches.amax(1) >= k - 1)).nonzero()[0])


def check_arms(bench: Workbench, arms: Sequence[Arm] = ARMS) -> Gate:
    """Compares every arm's forwards and pairs with the right ones; one that raises has failed.

    The right number of forwards is `expected_forwards`. Lockstep arms have to give the pairs of the
    project's lockstep mode. Continuous pairs at w = -1 have to lie on the lockstep trajectory of
    their sample. The workbench has to be in float32.
    """
    gate, truths = Gate(TOLERANCES[bench.device.type]), {}
    for arm in arms:
        if arm.config is None:
            gate.forwards[arm.name] = float(arm.forwards)
            continue
        try:
            _check(bench, arm, gate, truths)
        except Exception as error:  # whatever an arm raises: the others are still to be compared
            gate.fail(arm.name, one_line(f"{type(error).__name__}: {error}"))
    return gate


def _check(bench: Workbench, arm: Arm, gate: Gate, truths: dict[str, Pairs]) -> None:
    """Compares one minibatch of an arm; `truths` keeps the pairs of lockstep mode by config."""
    rollout, continuous = bench.prepared(arm), arm.config.mode == "continuous"
    if continuous:
        rollout.next_pairs()  # the pairs before an arm's own first step may hide what it does to states
    elif arm.config.start == "data":
        rollout.next_id = mixed_batch(rollout, arm.config.max_steps)
    first_id = None if continuous else rollout.next_id
    # One minibatch, with both counts of its forwards. A replay runs no Python that counts rows.
    predictor = rollout.maker.predictor
    expected, network, counter = expected_forwards(arm, rollout), bench.forwards, predictor.forwards
    pairs = rollout.next_pairs()
    counts = [bench.forwards - network, predictor.forwards - counter][1 if arm.graphs else 0 :]
    gate.count(arm.name, counts, expected, bench.batch)
    # Its pairs against those of lockstep rollouts of the same samples.
    if not continuous:
        key = repr(arm.config)
        if key not in truths:
            truths[key] = lockstep_pairs(bench, arm.config, first_id)
        for name in ("sample_ids", "t", "s", "rows", "x_s", "target"):
            gate.compare(arm.name, name, getattr(pairs, name), getattr(truths[key], name))
    elif arm.config.omega == -1:
        x_s, target = on_trajectory(rollout.maker, pairs)
        gate.compare(arm.name, "x_s", pairs.x_s, x_s)
        gate.compare(arm.name, "target", pairs.target, target)


def lockstep_pairs(bench: Workbench, config: RolloutConfig, first_id: int) -> Pairs:
    """One minibatch of the project's lockstep mode, from sample id `first_id` on."""
    rollout = bench.rollout(Arm(name="truth", label="", config=config, rollout=LockstepRollout))
    rollout.next_id = first_id
    return rollout.next_pairs()


def on_trajectory(maker: PairMaker, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """x_s and target, each (B, ...), of lockstep rollouts that end at the pairs' timesteps.

    The rollouts start from noise and have the samples and the s of `pairs`.
    """
    grid, ids = maker.grid, pairs.sample_ids
    index = torch.searchsorted(grid.timesteps, pairs.t) - 1
    draws = LockstepDraws(
        start_index=torch.full_like(ids, grid.steps - 1).cpu(),
        steps=(grid.steps - 1 - index).cpu(),
        noise=normal(maker.key(Draw.START_NOISE, ids), maker.latent_shape),
        s=pairs.s,
        renoise=normal(maker.key(Draw.RENOISE, ids, index), maker.latent_shape),
    )
    out = lockstep_rollout(maker.predictor, grid, draws, None, maker.rows(ids))
    # Continuous mode's target at t = 0 is the final x.
    ended = (pairs.t == 0).view(-1, *[1] * (out.x_t.ndim - 1))
    return out.x_s, torch.where(ended, out.x_t, out.target)
