"""The arms of `bench_step.py`: the authors' schedule of network calls, and ours."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.arms.pairs import finished_pairs
from benchmarks.environment import synchronize
from benchmarks.nets import BenchNet
from selfnpo_fast.config import LossConfig, OptimizerConfig, RolloutConfig
from selfnpo_fast.models import family_of
from selfnpo_fast.rollout import ContinuousRollout, Grid, GuidedPredictor, LockstepRollout, PairMaker, Pairs
from selfnpo_fast.runtime.capture import Capture, CudaGraphs, capture_of, no_capture
from selfnpo_fast.runtime.compiling import compile_blocks
from selfnpo_fast.training.engine import make_optimizer
from selfnpo_fast.training.moving_reference import MovingReference
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import affine_noise, guided_step

SEED = 0
ITEMS = 64
"""Number of prompts, and of images for rollouts from data."""


class UnbatchedPredictor(GuidedPredictor):
    """Calls the network as the authors do: both branches at every w, in two calls."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor):
        """`(pos, neg)`, each (B, ...), for states x (B, ...), timesteps t (B,) and table rows (B,).

        At w = -1 nothing uses pos.
        """
        self.forwards += 2 * len(x)
        pos = self.predict(x, t, self.table.gather(rows))
        return pos, self.predict(x, t, self.table.empty(len(x)))


class ReleasedRollout(LockstepRollout):
    """The authors' loop: K steps and one evaluation for every batch.

    It makes all K steps even where every sample has passed grid index 0.
    """

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        """The pairs of the next micro-batch."""
        maker, grid, predictor = self.maker, self.maker.grid, self.maker.predictor
        ids = torch.arange(self.next_id, self.next_id + self.batch)
        self.next_id += self.stride
        # The start of every sample: noise, or data with noise added.
        draws, ids = self.draws(ids), ids.to(maker.device)
        latents, rows, index = maker.start_latents(ids), maker.rows(ids), draws.start_index.to(maker.device)
        x = draws.noise if latents is None else affine_noise(latents, grid.start, draws.noise, index=index + 1)
        # K steps of the whole batch; samples that have passed index 0 stay where they are.
        for _ in range(maker.config.max_steps):
            pos, neg = predictor(x, grid.timestep(index), rows)
            moved, _ = guided_step(pos, neg, x, grid.step, index=index + 1)
            x = torch.where((index >= 0).view(-1, *[1] * (x.ndim - 1)), moved, x)
            index = (index - 1).clamp(min=-1)
        # One more evaluation gives the target.
        pos, neg = predictor(x, grid.timestep(index), rows)
        _, target = guided_step(pos, neg, x, grid.step, index=index + 1)
        # Eq. 16 from the last state, with the draws of our lockstep mode.
        return finished_pairs(maker, x, index, target, ids)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make pairs, or one of the floors, which make none."""

    name: str
    """Name in the results."""
    label: str
    """Name in table and chart."""
    config: RolloutConfig | None = None
    """None for the floors."""
    rollout: type[LockstepRollout] | type[ContinuousRollout] | None = None
    predictor: type[GuidedPredictor] = GuidedPredictor
    forwards: int = 0
    """Reference forwards per update of a floor."""
    graphs: bool = False
    """Whether the rollout's step is a CUDA graph. Only continuous rollouts have such a step."""

    @property
    def warm_up(self) -> int:
        """Minibatches before the first that counts: in them a step is captured and replayed once."""
        return CudaGraphs.WARM_UP + 1 if self.graphs else 0

    @property
    def forwards_per_state(self) -> int:
        """Rows that the reference forwards to evaluate one sample: 1, or 2 for both branches."""
        both = issubclass(self.predictor, UnbatchedPredictor) or self.config.omega not in (-1, 0)
        return 2 if both else 1


K5 = RolloutConfig(mode="lockstep", start="data", k=5, omega=-1.0)
FULL = RolloutConfig(mode="lockstep", start="noise", stop="fixed", k=25, omega=-1.0)
CONTINUOUS, FORWARD, FLOOR = "continuous", "floor_forward", "floor"
NOISE = {"mode": "continuous", "start": "noise"}
RELEASED = {"rollout": ReleasedRollout, "predictor": UnbatchedPredictor}
ARMS = (
    Arm(name="released", label="authors' schedule as released", config=K5, **RELEASED),
    Arm(name="released_live", label="the same, no dead branches", config=K5, rollout=ReleasedRollout),
    Arm(name="full", label="full simulation, calls as released", config=FULL, **RELEASED),
    Arm(name="full_live", label="the same, no dead branches", config=FULL, rollout=ReleasedRollout),
    Arm(name="lockstep", label="our lockstep mode", config=K5, rollout=LockstepRollout),
    Arm(name=CONTINUOUS, label="continuous", config=RolloutConfig(omega=-1.0, **NOISE), rollout=ContinuousRollout),
    Arm(
        name="continuous_graphs",
        label="continuous, as a CUDA graph",
        config=RolloutConfig(omega=-1.0, **NOISE),
        rollout=ContinuousRollout,
        graphs=True,
    ),
    Arm(name="continuous_w5", label="continuous", config=RolloutConfig(omega=-5.0, **NOISE), rollout=ContinuousRollout),
    Arm(name=FORWARD, label="floor: one reference forward and the student", forwards=1),
    Arm(name=FLOOR, label="floor: the student alone"),
)


class Workbench:
    """One network as student and as reference, with everything that an arm needs.

    `forwards` counts the rows that the reference has forwarded, but for those of replays: a CUDA
    graph runs no Python.
    """

    def __init__(
        self,
        net: BenchNet,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        compile: str = "off",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock  # seconds, by which everything is timed
        self.net, self.batch, self.device, self.dtype, self.compile = net, batch, device, dtype, compile
        self.reference = self._network().requires_grad_(False).eval()
        self.cond = net.table(ITEMS, dtype, device)
        self.latents = net.latents(ITEMS, device)
        self.objective = Objective.build(LossConfig(), net.schedule, device)
        self.forwards = 0
        self._starts: dict[int, tuple[Pairs, dict[str, torch.Tensor]]] = {}

    def _network(self) -> torch.nn.Module:
        network = self.net.network(self.dtype, self.device)
        compile_blocks(network, family_of(network).repeated_blocks, self.compile)
        return network

    @functools.cached_property
    def student(self) -> torch.nn.Module:
        """The network that learns, with the weights of the reference; made at its first use."""
        return self._network().train().requires_grad_(True)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        self.forwards += len(x)
        return self.net.predict(self.reference, x, t, cond)

    def rollout(self, arm: Arm, capture: Capture = no_capture) -> LockstepRollout | ContinuousRollout:
        """A new rollout of the arm, which starts at sample id 0; `capture` is for a continuous one."""
        maker = PairMaker(
            arm.predictor(self._predict, self.cond, arm.config.omega, "batched"),
            Grid.build(self.net.schedule, arm.config.grid_steps, self.device, omega=arm.config.omega),
            arm.config,
            latent_shape=self.net.latent_shape,
            num_prompts=ITEMS,
            latents=self.latents if arm.config.start == "data" else None,
            seed=SEED,
            dropout=0.0,
            device=self.device,
        )
        settings = {"batch": self.batch, "rank": 0, "world_size": 1}
        if arm.config.mode == "continuous":
            settings |= {"groups": 1, "capture": capture}
        return arm.rollout(maker, **settings)

    def start(self, grid_steps: int = K5.grid_steps) -> tuple[Pairs, dict[str, torch.Tensor]]:
        """Pairs of a continuous rollout at w = -1, and its state after them.

        Filling slots takes as long as a whole trajectory, so all continuous arms start from here.
        """
        if grid_steps not in self._starts:
            config = RolloutConfig(omega=-1.0, grid_steps=grid_steps, **NOISE)
            rollout = self.rollout(Arm(name="start", label="", config=config, rollout=ContinuousRollout))
            self._starts[grid_steps] = (rollout.next_pairs(), rollout.state_dict())
        return self._starts[grid_steps]

    def prepared(self, arm: Arm) -> LockstepRollout | ContinuousRollout:
        """A rollout of the arm whose slots are full and whose step, with CUDA graphs, is captured.

        Raises RuntimeError where the step is not captured: its time would not be that of the arm.
        """
        capture = capture_of(self.device, arm.graphs, f"arm {arm.name}", self.dtype)
        rollout = self.rollout(arm, capture)
        if arm.config.mode == "continuous":
            rollout.load_state_dict(self.start(arm.config.grid_steps)[1])
        for _ in range(arm.warm_up):
            rollout.next_pairs()
        reason = getattr(capture, "reason", None)
        if reason is not None:
            raise RuntimeError(f"its step runs without a CUDA graph: {reason}")
        return rollout

    @torch.no_grad()
    def forward(self, pairs: Pairs) -> None:
        """One unconditional forward of the reference on the pairs' x_s."""
        self._predict(pairs.x_s, pairs.s, self.cond.empty(len(pairs.s)))

    def update_seconds(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of an AdamW step and of a move of the average, in `rounds` rounds each.

        They depend on neither arm nor batch. As in training, AdamW moves float32 masters by float32
        gradients whatever the precision, and the average keeps float32 masters.
        """
        trained = list(self.student.named_parameters())
        masters = [p.detach().float().clone().requires_grad_(True) for _, p in trained]
        for master in masters:
            master.grad = torch.ones_like(master)
        optimizer = make_optimizer(OptimizerConfig())(masters)
        moving, seconds = MovingReference(self.reference, trained, 0.999), {"optimiser": [], "ema": []}
        for _ in range(rounds + 1):
            for name, move in (("optimiser", optimizer.step), ("ema", moving.update)):
                synchronize(self.device)
                start = self.clock()
                move()
                synchronize(self.device)
                seconds[name].append(self.clock() - start)
        return {name: values[1:] for name, values in seconds.items()}

    def step(self, pairs: Pairs) -> torch.Tensor:
        """Student forward, loss and backward of one minibatch; gradients add to those present.

        Returns the loss, a scalar without gradient.
        """
        pred = self.net.predict(self.student, pairs.x_s, pairs.s, self.cond.gather(pairs.rows))
        loss, _ = self.objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)
        loss.backward()
        return loss.detach()


def expected_forwards(arm: Arm, rollout: LockstepRollout | ContinuousRollout) -> int:
    """Rows that the reference has to forward for the rollout's next minibatch, in closed form.

    Our lockstep mode leaves out samples that have arrived at t = 0. A sample costs the steps from
    its start index, at most K, and one evaluation for the target. Nobody counts the rows of a
    replayed CUDA graph: for an arm with graphs this number is all there is.
    """
    batch, k = rollout.batch, arm.config.max_steps
    if arm.config.mode == "continuous":
        return batch * arm.forwards_per_state
    steps = batch * k
    if not isinstance(rollout, ReleasedRollout):
        start = rollout.draws(torch.arange(rollout.next_id, rollout.next_id + batch)).start_index
        steps = int((start + 1).clamp(max=k).sum())
    return (steps + batch) * arm.forwards_per_state
