"""What a training run will need: memory per rank, FLOPs per update, sizes of files.

Everything is computed and nothing is measured.

Activations and FLOPs come from tracing the networks without their weights (`tracing.py`). What
DeepSpeed, the optimiser and the reference hold follows from their code in closed form.
`selfnpo doctor` prints these figures; `selfnpo doctor --verify` compares them with a real update.

Sizes are in bytes. One multiplication and one addition are two FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from selfnpo_fast.config import RolloutConfig, TrainConfig
from selfnpo_fast.doctor.expert_rows import rows_per_pair
from selfnpo_fast.doctor.host_memory import move_to_host
from selfnpo_fast.doctor.tracing import FakeDenoiser, ForwardTrace, ParameterCounts, StudentTrace
from selfnpo_fast.models import Adapter, Size
from selfnpo_fast.models.host_table import window_size
from selfnpo_fast.models.size import AskedSize
from selfnpo_fast.rollout.continuous import fill_width
from selfnpo_fast.rollout.pairs import forwards_per_state
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.training.engine import deepspeed_config, zero_stage
from selfnpo_fast.training.inputs import table_on_host
from selfnpo_fast.training.methods.self_npo import window_rows

GIB = 2**30
DEEPSPEED_BUCKET = 500_000_000
"""Elements of DeepSpeed's default reduce_bucket_size, and of its plain all-reduce (ZeRO 0)."""
MAX_LIVE = 1_000_000_000
"""Elements of ZeRO 3's stage3_max_live_parameters and stage3_max_reuse_distance.

Up to this number nothing that was gathered is released early.
"""

REFERENCE_FORWARD = "reference forward"
STUDENT_PASSES = "student forward and backward"
GRADIENT_REDUCTION = "gradient reduction"
OPTIMISER_STEP = "optimiser step"
GRAPH_CAPTURE = "capture of a CUDA graph"
"""The phases of an update in order, by the names that the report prints. The last one belongs to
the first updates, in the place of the reference's forward, which is a replay in later ones."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A config on a number of ranks, with what tracing has found about its networks."""

    config: TrainConfig
    """Of the whole run."""
    world_size: int
    """Number of ranks."""
    device: str
    """Device type, "cuda" or "cpu": optimisers and communication need different memory on each."""
    denoiser: FakeDenoiser
    """Weights that have only shapes."""
    student: StudentTrace
    """Of one micro-batch."""
    reference: ForwardTrace
    """Of a micro-batch. Where guidance needs both branches, it has two rows per sample."""
    latent_elements: int
    """Elements of one sample's latents."""
    row_elements: int
    """Elements of one prompt's conditioning."""
    prompts: int
    """Number of prompts, or of images where rollouts start from real data."""
    timesteps: int
    """Training timesteps of the noise schedule."""

    @property
    def parameter_counts(self) -> ParameterCounts:
        """The student's parameters."""
        return self.denoiser.parameter_counts

    @property
    def micro_batch(self) -> int:
        """Pairs per rank and micro-batch."""
        return self.config.engine.micro_batch(self.world_size)


class Tracer:
    """Plans runs of one model; configs with equal networks and inputs share traces."""

    def __init__(self, adapter: Adapter, prompts: int) -> None:
        self.adapter, self.prompts = adapter, prompts
        self._denoisers: dict[tuple, FakeDenoiser] = {}
        self._students: dict[tuple, StudentTrace] = {}
        self._references: dict[tuple, ForwardTrace] = {}

    def plan(self, config: TrainConfig, world_size: int, device: str) -> PlannedRun:
        """Traces a config on `world_size` ranks of device type `device`.

        Raises UserError where the ranks cannot share the batch, or LoRA does not fit the model.
        """
        engine = config.engine
        micro = engine.micro_batch(world_size)
        # Everything that changes the network itself.
        kind, lora = config.model.quantization, config.lora
        denoiser_key = (engine.precision, engine.gradient_checkpointing, kind, lora.rank, tuple(lora.targets))
        if denoiser_key not in self._denoisers:
            self._denoisers[denoiser_key] = FakeDenoiser(
                self.adapter,
                DTYPES[engine.precision],
                lora,
                checkpointing=engine.gradient_checkpointing,
                quantization=kind,
            )
        denoiser = self._denoisers[denoiser_key]
        # Everything that changes the sizes of its inputs, or the life of its gradients.
        size, omega, keep_gradients = self.size_of(config), config.rollout.omega, keeps_gradients(config)
        student_key = (*denoiser_key, micro, size, keep_gradients)
        if student_key not in self._students:
            self._students[student_key] = denoiser.trace_student(micro, keep_gradients=keep_gradients, size=size)
        rows, one_row = micro * forwards_per_state(omega), omega == -1
        reference_key = (*denoiser_key, rows, size, one_row)
        if reference_key not in self._references:
            self._references[reference_key] = denoiser.trace_forward(rows, one_row=one_row, size=size)
        return PlannedRun(
            config=config,
            world_size=world_size,
            device=device,
            denoiser=denoiser,
            student=self._students[student_key],
            reference=self._references[reference_key],
            latent_elements=math.prod(self.adapter.latent_shape_of(size, "model.")),
            row_elements=sum(math.prod(shape) for shape in self.adapter.conditioning_shapes.values()),
            prompts=self.prompts,
            timesteps=self.adapter.schedule.num_train_timesteps,
        )

    def size_of(self, config: TrainConfig) -> Size:
        """The size of what a config trains on."""
        model = config.model
        return self.adapter.size_of(AskedSize(model.resolution, model.height, model.width, model.frames))


def forwards_per_pair(rollout: RolloutConfig) -> float:
    """Expected reference forwards per training pair in the long run.

    A continuous rollout makes a pair of every state. A lockstep sample runs its DDIM steps and one
    more evaluation, which gives the target. From noise it runs k steps, or a uniform number from 1
    to k. From data it starts at a uniform grid index i < N and runs min(k, i + 1) steps.
    """
    if rollout.mode == "continuous":
        return forwards_per_state(rollout.omega)
    k = rollout.max_steps
    if rollout.start == "noise" and rollout.stop == "fixed":
        return forwards_per_state(rollout.omega) * (k + 1)
    n = rollout.grid_steps
    steps = sum(min(k, i + 1) for i in range(n)) / n if rollout.start == "data" else (k + 1) / 2
    return forwards_per_state(rollout.omega) * (steps + 1)


def startup_forwards(run: PlannedRun) -> int:
    """Upper bound on the reference forwards of all ranks that fill a continuous rollout's slots.

    A run fills its slots once: about (grid_steps + 1) / 2 forwards for each from noise, and never
    more than grid_steps for each, in whole batches. Lockstep mode has none, so it needs 0 forwards.
    """
    rollout = run.config.rollout
    if rollout.mode == "lockstep":
        return 0
    width, groups = fill_width(run.micro_batch), slots_per_rank(run) // run.micro_batch
    forwards = -(-run.micro_batch * rollout.grid_steps // width)
    return forwards_per_state(rollout.omega) * run.world_size * groups * forwards * width


def slots_per_rank(run: PlannedRun) -> int:
    """Number of slots of one rank in continuous mode."""
    return run.micro_batch * run.config.rollout.pool * run.config.engine.accumulation


@dataclass(frozen=True)
class UpdateFlops:
    """FLOPs of one update over all ranks."""

    reference: float
    """Of its forwards."""
    student: float
    """Of its forwards and backwards, recomputation included."""

    @property
    def total(self) -> float:
        """FLOPs of reference and student together."""
        return self.reference + self.student


def update_flops(run: PlannedRun) -> UpdateFlops:
    """FLOPs of the networks in one update.

    The fused operations between the networks are left out: they take less than a thousandth of it.
    """
    batch, rollout = run.config.engine.batch_size, run.config.rollout
    forwards = batch * forwards_per_pair(rollout)
    rows = batch * rows_per_pair(run.denoiser.adapter, rollout, run.micro_batch)
    return UpdateFlops(reference=forwards * run.reference.flops, student=rows * run.student.flops)


@dataclass(frozen=True)
class Memory:
    """Memory of one rank in an update."""

    resident: dict[str, int]
    """Bytes that live all the time, by what holds them."""
    phases: dict[str, int]
    """Bytes that each phase of an update adds to the resident ones."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes of host memory that `engine.offload` takes for this rank, by what holds them."""

    @property
    def total_at_rest(self) -> int:
        """Bytes that live between updates."""
        return sum(self.resident.values())

    @property
    def peak(self) -> int:
        """Most bytes that live at once in an update."""
        return self.total_at_rest + max(self.phases.values())


def keeps_gradients(config: TrainConfig) -> bool:
    """Whether the gradients of all parameters gather during a backward pass.

    ZeRO 2 and 3 move each gradient into a bucket when it is complete. With several micro-batches
    the gradients of the first one stay, and those of the later ones are added to them in place.
    """
    return zero_stage(config) < 2 and config.engine.accumulation == 1


def uses_graphs(run: PlannedRun) -> bool:
    """Whether the rollout's steps are captured as CUDA graphs; those of two experts are not."""
    config, one = run.config, run.denoiser.adapter.boundary is None
    return run.device == "cuda" and config.engine.graphs and config.rollout.mode == "continuous" and one


def memory(run: PlannedRun) -> Memory:
    """Memory of one rank in a steady update, and in the captures before it.

    A reference forward without graphs takes its temporary memory from the allocator, which gives
    the same blocks to the student's passes afterwards: the peak is the larger of the two. Overlap
    runs the reference on a stream of its own, whose blocks no other stream is given, and a graph
    keeps its temporary memory in a private pool (`runtime.capture.CudaGraphs`): there the two add
    up. With graphs it makes no difference to the memory whether they overlap.

    The allocator's fragmentation, the workspaces of libraries and what CUDA keeps of a graph's
    launches are left out.
    """
    config, counts = run.config, run.parameter_counts
    ema = config.reference.kind == "ema"
    # The reference is a copy of the trained weights. A frozen reference under LoRA is the base
    # network itself, and costs nothing.
    reference = counts.trained_bytes if ema or not config.lora.rank else 0
    # A float32 average needs no master; otherwise each rank holds the float32 masters of its shard.
    has_masters = ema and config.engine.precision != "fp32"
    masters = 4 * math.ceil(counts.trained / run.world_size) if has_masters else 0
    resident, phases = _engine_memory(run)
    host = move_to_host(run, resident)
    if uses_graphs(run):
        del phases[REFERENCE_FORWARD]
        pool, phases[GRAPH_CAPTURE] = _graph_memory(run)
        resident["pool of the CUDA graphs"] = pool
    elif config.rollout.overlap:  # the reference runs at the same time as every other phase
        phases = {name: size + run.reference.peak for name, size in phases.items() if name != REFERENCE_FORWARD}
    resident |= {"reference": reference, "EMA masters": masters, **_rollout_buffers(run)}
    return Memory({name: size for name, size in resident.items() if size}, phases, host)


def _graph_memory(run: PlannedRun) -> tuple[int, int]:
    """Bytes of the graphs' pool, and those that a capture adds to it for a moment.

    The graphs of all groups share the pool, since they run in turn: it holds the temporary memory
    of one forward, and the pairs of every group, which the next replay overwrites. Before a capture
    the step runs as it is, beside copies of its state before and after it and of its results, with
    which the first replay is compared.
    """
    latent, micro = 4 * run.latent_elements, run.micro_batch
    pairs = micro * (2 * latent + 4 * 8 + 4)  # x_s and target; s, t, row and sample id; weight
    latents_per_slot = 2 if run.config.rollout.start == "noise" else 1
    state = micro * (latents_per_slot * latent + 2 * 4 * 8)  # the slots' tensors, and the table of their next state
    groups = slots_per_rank(run) // micro
    return run.reference.peak + groups * pairs, run.reference.peak + 2 * state + pairs


def _moment_bytes(run: PlannedRun, shard: int) -> int:
    """Bytes of both Adam moments of `shard` elements.

    8-bit moments have one float32 scale per 256 elements each. Small tensors keep float32 moments,
    except under ZeRO, which hands the optimiser one flat tensor.
    """
    if run.config.optimizer.name == "adamw":
        return 8 * shard
    float32 = run.parameter_counts.small if zero_stage(run.config) == 0 else 0
    return 8 * float32 + (shard - float32) * 2 + 8 * math.ceil((shard - float32) / 256)


def _step_scratch(run: PlannedRun, shard: int) -> int:
    """Bytes of the optimiser's temporary tensors during a step.

    torch's fused AdamW needs none, nor does the 8-bit AdamW of bitsandbytes on GPUs. On CPUs the
    latter works on five float32 copies of a tensor.
    """
    if run.config.optimizer.name == "adamw" or run.device == "cuda":
        return 0
    return 5 * 4 * (run.parameter_counts.largest_trained if zero_stage(run.config) == 0 else shard)


def _engine_memory(run: PlannedRun) -> tuple[dict[str, int], dict[str, int]]:
    """Resident bytes of DeepSpeed's engine, and the bytes that each phase adds, both by name.

    The formulas were read off the code of DeepSpeed 0.19.8's runtime.
    """
    config, counts, world = run.config, run.parameter_counts, run.world_size
    stage, precision = zero_stage(config), config.engine.precision
    on_host = config.engine.offload == "optimizer"
    zero = deepspeed_config(config, world, counts.trained)["zero_optimization"]
    bucket = int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET))
    shard = math.ceil(counts.trained / (world if stage else 1))
    gradients = counts.trained_bytes
    width = counts.trained_bytes // counts.trained  # bytes of a weight, and of its gradient
    in_bucket = width * min(counts.trained, bucket)
    scratch = _step_scratch(run, shard)
    resident = {"weights": counts.weight_bytes, "moments": _moment_bytes(run, shard)}
    # Each branch sets what the backward pass, the reduction and the step add, and `carried`: the
    # gradients that live from one micro-batch to the next.
    if stage == 0:  # whole gradients, and their copy in the flat tensor of the all-reduce
        flat = width * min(counts.trained, DEEPSPEED_BUCKET + counts.largest_trained)
        backward, reduction, step, carried = 0, gradients + flat, gradients + scratch, gradients
    elif stage == 1 and precision == "bf16" and not on_host:  # BF16_Optimizer: whole float32 gradients on every rank
        resident |= {"fp32 masters": 4 * shard, "gradients": 4 * counts.trained}
        backward, reduction, step, carried = 0, gradients + 2 * counts.trained, gradients + scratch, gradients
    elif stage < 3:
        resident["fp32 masters"] = 4 * shard
        # With overlap_comm, on GPUs, a second bucket fills while the first is reduced.
        buckets = width * bucket * (2 if run.device == "cuda" else 1)
        float32_gradients = 4 * shard if precision == "bf16" and not on_host else 0
        whole_gradients = gradients if stage == 1 else 0
        carried = whole_gradients or (float32_gradients or width * shard)
        backward = buckets  # the shard's float32 gradients grow while activations are freed
        reduction = buckets + max(whole_gradients, in_bucket) + float32_gradients
        # The shard's float32 gradients; where gradients were float32 before, those still live, too.
        step = (4 if precision == "bf16" else 8) * shard + scratch
        if on_host:  # where the shard's float32 gradients are; one of them at a time is on the device
            resident["fp32 gradients"], step = 4 * shard, 4 * counts.largest_trained
    else:  # weights are gathered layer by layer
        gathered = width * min(counts.trained, MAX_LIVE) if world > 1 else 0
        resident["weights"] = counts.weight_bytes - width * (counts.trained - shard - counts.persistent)
        resident["fp32 masters"] = 0 if precision == "fp32" else 4 * shard
        resident["gradients"] = (4 if precision == "bf16" else width) * shard
        resident["buckets"] = width * bucket
        backward, reduction, step, carried = gathered, gathered + in_bucket, 4 * shard + scratch, 0
        if on_host:
            resident["fp32 gradients"], resident["gradients"] = 4 * shard, 0
            resident["fp32 masters"], step = 4 * shard, 4 * counts.largest_trained
    if config.engine.accumulation == 1:
        carried = 0
    phases = {
        REFERENCE_FORWARD: run.reference.peak,  # all micro-batches' pairs come before the first gradient
        STUDENT_PASSES: backward + carried + run.student.peak,
        GRADIENT_REDUCTION: reduction,
        OPTIMISER_STEP: step,
    }
    return resident, phases


def _rollout_buffers(run: PlannedRun) -> dict[str, int]:
    """Bytes of the tensors that the rollout and the loss keep, by name."""
    rollout, micro, accumulation = run.config.rollout, run.micro_batch, run.config.engine.accumulation
    latent = 4 * run.latent_elements
    width = DTYPES[run.config.engine.precision].itemsize
    states = rollout.grid_steps + 1
    out = {
        **_prompt_rows(run, width),
        # float32: 8 coefficients of the guided step and 2 of the start per state, 2 of Eq. 16 per
        # state and s, 2 of the loss per s. Then int64 timesteps and float32 weights per state.
        "coefficient tables": 4 * (8 * states + 2 * states + 2 * states * run.timesteps + 2 * run.timesteps)
        + 8 * states
        + 4 * states,
        # x_s and target; s, t, row, sample id and weight. Overlap keeps two sets of buffers; what a
        # graph returns lies in its pool.
        "pairs": (2 * rollout.overlap + (not uses_graphs(run))) * accumulation * micro * (2 * latent + 5 * 8),
    }
    if rollout.mode == "continuous":
        latents_per_slot = 2 if rollout.start == "noise" else 1  # x, and the previous sample's final x
        out["slots"] = slots_per_rank(run) * (latents_per_slot * latent + 4 * 8) + micro * 4 * 8
        out["latents of real data"] = run.prompts * latent if rollout.start == "data" else 0
    return out


def prompt_table_bytes(run: PlannedRun) -> int:
    """Bytes of the text embeddings of all prompts, wherever they lie."""
    return (run.prompts + 1) * run.row_elements * DTYPES[run.config.engine.precision].itemsize


def prompts_on_host(run: PlannedRun) -> bool:
    """Whether the text embeddings stay on the host (`prompts.device_mib`)."""
    return table_on_host(run.config, {"row": (run.row_elements,)}, run.prompts)


def _prompt_rows(run: PlannedRun, width: int) -> dict[str, int]:
    """Bytes of the text embeddings on the device, by name: of all, or of those of the next pairs
    and int64 places of all."""
    if not prompts_on_host(run):
        return {"prompt table": prompt_table_bytes(run)}
    window = window_size(window_rows(run.config, run.world_size), run.prompts)
    return {"prompts of the next pairs": window * run.row_elements * width + 8 * (run.prompts + 1)}


def checkpoint_bytes(run: PlannedRun) -> int:
    """Bytes of one checkpoint of all ranks.

    It holds float32 weights, moments, the masters of a moving reference and the rollout's slots.
    """
    trained = run.parameter_counts.trained
    if run.config.optimizer.name == "adamw":
        moments = 8 * trained
    else:
        shard = math.ceil(trained / (run.world_size if zero_stage(run.config) else 1))
        moments = run.world_size * _moment_bytes(run, shard)
    masters = 4 * trained if run.config.reference.kind == "ema" else 0
    return 4 * trained + moments + masters + run.world_size * _rollout_buffers(run).get("slots", 0)


def negative_bytes(run: PlannedRun) -> int:
    """Bytes of the negative model on disk: what is trained, in the run's precision."""
    return run.parameter_counts.trained * DTYPES[run.config.engine.precision].itemsize
