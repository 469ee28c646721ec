"""What a training run will need: memory of a rank, work per update, time, files. Computed, not measured.

Networks are traced without their weights (`tracing.py`); what DeepSpeed, the optimiser and the reference hold follows
from their code in closed form. `selfnpo doctor` prints all this, `selfnpo doctor --verify` holds it against a real
update. Sizes are bytes, times seconds, one multiplication and addition two FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from selfnpo_fast.config import RolloutConfig, TrainConfig
from selfnpo_fast.doctor.tracing import FakeDenoiser, Network, Student
from selfnpo_fast.models import StableDiffusionAdapter
from selfnpo_fast.rollout.pairs import forwards_per_state
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.training.engine import deepspeed_config, zero_stage

GIB = 2**30
REFERENCE = "reference forward"
DEEPSPEED_BUCKET = 500_000_000
"""Elements: DeepSpeed's default reduce_bucket_size, and the bucket of its plain all-reduce (ZeRO 0)."""
MAX_LIVE = 1_000_000_000
"""Elements: ZeRO 3's stage3_max_live_parameters and max_reuse_distance; up to it nothing gathered is released early."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A config on a number of ranks, and what was traced of its networks."""

    config: TrainConfig
    world_size: int
    device: str  # "cuda" or "cpu": optimisers and communication need other memory there
    denoiser: FakeDenoiser
    student: Student  # one micro-batch
    reference_peak: int  # bytes of one call: of a micro-batch, twice that where guidance needs both branches
    latent_elements: int
    row_elements: int  # of one prompt's conditioning
    prompts: int
    timesteps: int

    @property
    def network(self) -> Network:
        """The student's parameters."""
        return self.denoiser.network

    @property
    def micro_batch(self) -> int:
        """Pairs per rank and micro-batch."""
        return self.config.engine.micro_batch(self.world_size)


class Tracer:
    """Traces configs of one model; those that differ in what no network sees share their traces."""

    def __init__(self, adapter: StableDiffusionAdapter, prompts: int) -> None:
        self.adapter, self.prompts = adapter, prompts
        self._denoisers: dict[tuple, FakeDenoiser] = {}
        self._traces: dict[tuple, tuple[Student, int]] = {}

    def run(self, config: TrainConfig, world_size: int, device: str) -> Run:
        """The run's numbers. Raises UserError where batch and ranks, or LoRA and model, do not fit."""
        engine = config.engine
        micro = engine.micro_batch(world_size)
        kind = (engine.precision, engine.gradient_checkpointing, config.lora.rank, tuple(config.lora.targets))
        if kind not in self._denoisers:
            self._denoisers[kind] = FakeDenoiser(
                self.adapter, DTYPES[engine.precision], config.lora, checkpointing=engine.gradient_checkpointing
            )
        denoiser = self._denoisers[kind]
        key = (
            *kind,
            micro,
            forwards_per_state(config.rollout.omega),
            config.rollout.omega == -1,
            keeps_gradients(config),
        )
        if key not in self._traces:
            rows = micro * forwards_per_state(config.rollout.omega)
            self._traces[key] = (
                denoiser.student(micro, keep_gradients=keeps_gradients(config)),
                denoiser.forward_peak(rows, one_row=config.rollout.omega == -1),
            )
        student, reference_peak = self._traces[key]
        return Run(
            config=config,
            world_size=world_size,
            device=device,
            denoiser=denoiser,
            student=student,
            reference_peak=reference_peak,
            latent_elements=math.prod(self.adapter.latent_shape),
            row_elements=sum(math.prod(shape) for shape in self.adapter.conditioning_shapes.values()),
            prompts=self.prompts,
            timesteps=self.adapter.schedule.num_train_timesteps,
        )


def forwards_per_pair(rollout: RolloutConfig) -> float:
    """Reference forwards per training pair in the long run, expected over what is drawn.

    A continuous rollout makes a pair of every state. A lockstep sample runs its own steps, and one more evaluation
    gives the target: from noise k steps or a uniform 1..k, from data min(k, i + 1) from its uniform grid index i < N.
    """
    if rollout.mode == "continuous":
        return forwards_per_state(rollout.omega)
    k = rollout.max_steps
    if rollout.start == "noise" and rollout.stop == "fixed":
        return forwards_per_state(rollout.omega) * (k + 1)
    n = rollout.grid_steps
    steps = sum(min(k, i + 1) for i in range(n)) / n if rollout.start == "data" else (k + 1) / 2
    return forwards_per_state(rollout.omega) * (steps + 1)


def startup_forwards(run: Run) -> int:
    """Most reference forwards, over all ranks, that fill the slots of a continuous rollout once per run."""
    rollout = run.config.rollout
    return (
        0
        if rollout.mode == "lockstep"
        else forwards_per_state(rollout.omega) * slots(run) * run.world_size * rollout.grid_steps
    )


def slots(run: Run) -> int:
    """Slots of one rank."""
    return run.micro_batch * run.config.rollout.pool * run.config.engine.accumulation


@dataclass(frozen=True)
class Work:
    """FLOPs of one update over all ranks."""

    reference: float
    student: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.reference + self.student


def work(run: Run) -> Work:
    """Network FLOPs of one update; the fused operations between them do less than a thousandth as many."""
    batch = run.config.engine.batch_size
    forwards = batch * forwards_per_pair(run.config.rollout)
    return Work(reference=forwards * run.denoiser.forward_flops, student=batch * run.denoiser.student_flops)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what lives all the time, and what each phase of an update adds."""

    rest: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """The most that an update needs."""
        return sum(self.rest.values()) + max(self.phases.values())


def keeps_gradients(config: TrainConfig) -> bool:
    """Whether whole gradients pile up in a backward: ZeRO 2 and 3 move them into a bucket as they come, and after the
    first micro-batch of several there is room for all of them."""
    return zero_stage(config) < 2 and config.engine.accumulation == 1


def memory(run: Run) -> Memory:
    """Peak memory of one rank in a steady update, without the allocator's fragmentation or libraries' workspaces."""
    config, network = run.config, run.network
    ema = config.reference.kind == "ema"
    # A copy of what is trained, but none where it is the base under low-rank weights; float32 is its own master.
    copied = network.trained_bytes if ema or not config.lora.rank else 0
    apart = ema and config.engine.precision != "fp32"
    masters = 4 * math.ceil(network.trained / run.world_size) if apart else 0  # each on one rank
    rest, phases = _engine(run)
    if config.rollout.overlap:  # the reference runs beside all the rest
        phases = {name: size + run.reference_peak for name, size in phases.items() if name != REFERENCE}
    rest |= {"reference": copied, "EMA masters": masters, **_buffers(run)}
    return Memory({name: size for name, size in rest.items() if size}, phases)


def _moments(run: Run, share: int) -> int:
    """Both moments of a rank's share, in bytes; 8-bit ones have a float32 scale per 256 elements each."""
    if run.config.optimizer.name == "adamw":
        return 8 * share
    floats = run.network.small if zero_stage(run.config) == 0 else 0  # ZeRO hands over one flat tensor
    return 8 * floats + (share - floats) * 2 + 8 * math.ceil((share - floats) / 256)


def _step_copies(run: Run, share: int) -> int:
    """What the optimiser needs for itself during a step, in bytes.

    torch's fused AdamW needs nothing, nor does the 8-bit AdamW of bitsandbytes on GPUs; on CPUs that works on five
    float32 copies of a tensor.
    """
    if run.config.optimizer.name == "adamw" or run.device == "cuda":
        return 0
    return 5 * 4 * (run.network.largest_trained if zero_stage(run.config) == 0 else share)


def _engine(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """What DeepSpeed holds all the time, and what each phase adds (read from DeepSpeed 0.19.8's runtime)."""
    config, network, world = run.config, run.network, run.world_size
    stage, precision = zero_stage(config), config.engine.precision
    several = config.engine.accumulation > 1
    zero = deepspeed_config(config, world, network.trained)["zero_optimization"]
    bucket = int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET))
    share = math.ceil(network.trained / (world if stage else 1))
    width = network.trained_bytes // network.trained  # of a weight and its gradient
    gradients = network.trained_bytes
    rest = {"weights": network.weight_bytes, "moments": _moments(run, share)}
    step = _step_copies(run, share)
    in_bucket = width * min(network.trained, bucket)
    if stage == 0:
        flat = width * min(network.trained, DEEPSPEED_BUCKET + network.largest_trained)
        backward, reduction, step, carried = 0, gradients + flat, gradients + step, gradients
    elif stage == 1 and precision == "bf16":  # DeepSpeed's BF16_Optimizer: whole float32 gradients on every rank
        rest |= {"fp32 masters": 4 * share, "gradients": 4 * network.trained}
        backward, reduction, step, carried = 0, gradients + 2 * network.trained, gradients + step, gradients
    elif stage < 3:
        rest["fp32 masters"] = 4 * share
        # A second bucket fills while the first is reduced: overlap_comm, which the engine asks for on GPUs.
        buckets = width * bucket * (2 if run.device == "cuda" else 1)
        own = 4 * share if precision == "bf16" else 0
        kept = gradients if stage == 1 else 0
        carried = kept or (own or width * share)
        backward = buckets  # float32 gradients of the share gather while activations go
        reduction = buckets + max(kept, in_bucket) + own
        # Float32 gradients of the share; where they were float32 before, those still live.
        step = (4 if precision == "bf16" else 8) * share + step
    else:
        gathered = width * min(network.trained, MAX_LIVE) if world > 1 else 0
        rest["weights"] = network.weight_bytes - width * (network.trained - share - network.persistent)
        rest["fp32 masters"] = 0 if precision == "fp32" else 4 * share
        rest["gradients"] = (4 if precision == "bf16" else width) * share
        rest["buckets"] = width * bucket
        backward, reduction, step, carried = gathered, gathered + in_bucket, 4 * share + step, 0
    carried = carried if several else 0
    phases = {
        REFERENCE: run.reference_peak,  # the pairs of all micro-batches come before the first gradient
        "student forward and backward": backward + carried + run.student.peak,
        "gradient reduction": reduction,
        "optimiser step": step,
    }
    return rest, phases


def _buffers(run: Run) -> dict[str, int]:
    """Slots, pairs, tables: what the rollout and the loss hold."""
    rollout, micro, latent = run.config.rollout, run.micro_batch, 4 * run.latent_elements
    width = DTYPES[run.config.engine.precision].itemsize
    states = rollout.grid_steps + 1
    out = {
        "prompt table": (run.prompts + 1) * run.row_elements * width,
        # Guided steps, starts, timesteps; Eq. 16 for every (state, s); weights by state; the loss's x0 by s.
        "coefficient tables": 4 * (7 * states + 2 * states + 2 * states * run.timesteps + 2 * run.timesteps)
        + 8 * states
        + 4 * states,
        # x_s, target; s, t, row, sample id, weight; of all micro-batches, with overlap in two sets of buffers besides.
        "pairs": (3 if rollout.overlap else 1) * run.config.engine.accumulation * micro * (2 * latent + 5 * 8),
    }
    if rollout.mode == "continuous":
        states_held = 2 if rollout.start == "noise" else 1  # x, and where the sample before it ended
        out["slots"] = slots(run) * (states_held * latent + 4 * 8) + micro * 4 * 8
        out["latents of real data"] = run.prompts * latent if rollout.start == "data" else 0
    return out


def checkpoint_bytes(run: Run) -> int:
    """One checkpoint of all ranks: float32 weights, moments, masters of a moving reference, rollout slots."""
    trained = run.network.trained
    moments = 8 * trained if run.config.optimizer.name == "adamw" else run.world_size * _moments(
        run, math.ceil(trained / (run.world_size if zero_stage(run.config) else 1))
    )  # fmt: skip
    masters = 4 * trained if run.config.reference.kind == "ema" else 0
    return 4 * trained + moments + masters + run.world_size * _buffers(run).get("slots", 0)


def negative_bytes(run: Run) -> int:
    """The negative model on disk: the whole network, or the low-rank weights, in the precision of the run."""
    elements = run.network.trained if run.config.lora.rank else run.network.total
    return elements * DTYPES[run.config.engine.precision].itemsize


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Something to train on; `source` says where its numbers come from."""

    name: str
    flops: dict[str, float]  # FLOP/s by precision
    bandwidth: float  # bytes/s of its memory
    utilisation: float  # share of `flops` that the networks are assumed to reach
    source: str
    gpu: bool = True


UTILISATION = 0.35
"""Assumed for UNets of Stable Diffusion's size in PyTorch; nothing here was measured on a GPU."""

GPUS = (
    Machine(
        name="A100 SXM 80 GB",
        flops={"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12},
        bandwidth=2039e9,
        utilisation=UTILISATION,
        source="NVIDIA A100 data sheet, dense; fp32 without TF32",
    ),
    Machine(
        name="H100 SXM 80 GB",
        flops={"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
        bandwidth=3350e9,
        utilisation=UTILISATION,
        source="NVIDIA H100 data sheet, dense; fp32 without TF32",
    ),
)


def update_seconds(run: Run, machine: Machine) -> float | None:
    """Seconds of one update, or None where the machine has no figure for this precision.

    Networks at the assumed share of the peak, then optimiser and EMA at the memory's full bandwidth. Communication
    between ranks, host work and data loading are not in it, and nothing overlaps.
    """
    peak = machine.flops.get(run.config.engine.precision)
    if peak is None:
        return None
    networks = work(run).total / run.world_size / (peak * machine.utilisation)
    return networks + _update_traffic(run) / machine.bandwidth


def _update_traffic(run: Run) -> float:
    """Bytes that optimiser and EMA read and write on a rank."""
    config, trained = run.config, run.network.trained
    share = trained / (run.world_size if zero_stage(config) else 1)
    width = DTYPES[config.engine.precision].itemsize
    moments = 8 if config.optimizer.name == "adamw" else 2
    step = share * (2 * 4 + 4 + 2 * moments + (width if width < 4 else 0))  # master, gradient, moments, weight
    average = trained * (2 * 4 + width + (width if width < 4 else 0)) if config.reference.kind == "ema" else 0
    return step + average


def levers(config: TrainConfig, world_size: int) -> list[tuple[str, TrainConfig]]:
    """Changes that save memory, gentlest first, each as (what to set, the changed config)."""
    engine = config.engine
    out = []

    def offer(words: str, **sections) -> None:
        parts = {name: replace(getattr(config, name), **fields) for name, fields in sections.items()}
        out.append((words, replace(config, **parts)))

    if not engine.gradient_checkpointing:
        offer("--engine.gradient_checkpointing true", engine={"gradient_checkpointing": True})
    if engine.precision == "fp32":
        offer("--engine.precision bf16", engine={"precision": "bf16"})
    if config.optimizer.name == "adamw":
        offer("--optimizer.name adamw8bit", optimizer={"name": "adamw8bit"})
    highest = 2 if config.lora.rank else 3
    for stage in range(zero_stage(config) + 1, highest + 1 if world_size > 1 else 0):
        offer(f"--engine.zero_stage {stage}", engine={"zero_stage": stage})
    micro = engine.micro_batch(world_size)
    for divisor in sorted({divisor for divisor in (2, micro) if divisor > 1 and micro % divisor == 0}):
        steps = engine.accumulation * divisor
        offer(f"--engine.accumulation {steps}", engine={"accumulation": steps})
    if config.rollout.mode == "continuous" and config.rollout.pool > 1:
        offer("--rollout.pool 1", rollout={"pool": 1})
    if not config.lora.rank:
        offer("--lora.rank 16", lora={"rank": 16}, engine={"zero_stage": min(engine.zero_stage, 2)})
    return out
