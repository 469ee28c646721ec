"""Every choice of a training run, typed and documented.

YAML and `--section.field value` fill these dataclasses. A value that cannot work raises UserError
with the name of its field, before anything is loaded or written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.fields import check, check_fields
from selfnpo_fast.runtime.limits import MAX_PICTURES, MAX_UPDATES, check_count


@dataclass(kw_only=True)
class ModelConfig:
    """The model to make a negative of."""

    path: str = "digits"
    """`digits` (the embedded model), a folder in diffusers format, or a Hub id."""
    revision: str | None = None
    """Hub revision."""
    variant: str | None = None
    """Weight variant such as fp16."""
    resolution: int | None = None
    """Picture height and width in pixels; by default those that the model was trained for."""
    height: int | None = None
    """Picture height in pixels where it differs from the width; `model.width` belongs to it."""
    width: int | None = None
    """Picture width in pixels; `model.height` belongs to it."""
    frames: int | None = None
    """Frames of a video; by default those that the model was made for, and 1 of a picture."""
    expert: Literal["high", "low", "both"] | None = None
    """Which denoisers of a model with two are trained: that of high noise levels, that of low ones,
    or both, which is the default. No value for a model with one."""
    vae_tiling: bool = False
    """Whether the autoencoder works in tiles whose seams are blended (diffusers' enable_tiling), in
    sample grids and where data is encoded: less memory at large sizes, slightly other latents."""
    vae_slicing: bool = False
    """Whether the autoencoder takes the pictures of a batch one by one (diffusers'
    enable_slicing)."""
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none"
    """How the frozen base of a LoRA run is stored: in the run's precision, or the Linear layers of
    its blocks in 8 bits (int8 by bitsandbytes, fp8 by torchao) or in 4 (nf4 by bitsandbytes)."""

    def __post_init__(self) -> None:
        check_fields("model.", self)
        for name in ("resolution", "height", "width", "frames"):
            value = getattr(self, name)
            check(value is None or 1 <= value <= 2**14, f"model.{name}", value, "1 to 16384")
        if self.resolution is not None and (self.height is not None or self.width is not None):
            given = "height" if self.height is not None else "width"
            raise UserError(f"model.{given}: {getattr(self, given)} is given beside model.resolution; leave one out")
        for one, other in (("height", "width"), ("width", "height")):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise UserError(f"model.{other}: missing beside model.{one}; give both, or model.resolution")


@dataclass(kw_only=True)
class RolloutConfig:
    """How the reference makes training pairs."""

    mode: Literal["lockstep", "continuous"] = "continuous"
    """lockstep: the paper's; continuous: every state of every trajectory gives a pair."""
    start: Literal["noise", "data"] = "noise"
    """From pure noise (Eq. 13) or from noised real data (Eq. 14)."""
    grid_steps: int = 25
    """Steps of the DDIM grid; a divisor of the number of training timesteps of the model."""
    k: int | None = None
    """Most steps of a rollout in lockstep mode or from data; by default grid_steps. That default,
    from noise with `stop: fixed`, is the full-simulation baseline of the paper. Continuous rollouts
    from noise always run to the end.
    """
    omega: float = -1.0
    """Guidance of the rollouts, as in the paper: p = p_cond + omega (p_cond - p_uncond);
    guidance_scale - 1."""
    stop: Literal["uniform", "fixed"] = "uniform"
    """Lockstep from noise: stop after a number of steps that is uniform in 1..k for each sample, or
    always after k."""
    noising: Literal["from_x_t", "naive"] = "from_x_t"
    """Eq. 16, or the naive truncation of Eq. 15."""
    pool: int = 4
    """Continuous: slots per training pair of an update. 1/pool of the slots advance per update."""
    branches: Literal["auto", "batched", "split"] = "auto"
    """Where omega needs both outputs: conditional and unconditional as one batch, as two, or as a
    short measurement finds faster. The two ways differ in the last bits, so name one of them where
    two runs have to be equal."""
    overlap: bool = False
    """Make the pairs of the next update while the student learns from those of the present one.
    The reference is then one update older; a frozen reference makes the same pairs either way."""
    pair_weight: Literal["uniform", "lockstep"] = "uniform"
    """Continuous: weigh all pairs equally, or weigh noise levels as often as lockstep mode with the
    same start, stop and k sees them."""
    s_shift: float = 1.0
    """Moves the noise level s of the student's input, which is uniform in the levels above t: a share
    u of the levels becomes shift u / (1 + (shift - 1) u). More than 1 is noisier. A flow's own shift
    does the same: 3, 5 and 8 leave 25, 36 and 47% of its levels above a noise share of 0.9, and an
    s_shift of 1/3, 1/5 and 1/8 gives the noise share itself a uniform distribution."""

    def __post_init__(self) -> None:
        check_fields("rollout.", self)
        check_count("rollout.grid_steps", self.grid_steps, 2)
        check(
            1 <= self.max_steps <= self.grid_steps, "rollout.k", self.k, f"1 to rollout.grid_steps ({self.grid_steps})"
        )
        runs_through = self.mode == "continuous" and self.start == "noise" and self.pair_weight == "uniform"
        check(
            not runs_through or self.max_steps == self.grid_steps,
            "rollout.k",
            self.k,
            "no value: continuous rollouts from noise run to the end (k counts in lockstep mode or from data)",
        )
        check(
            self.mode == "continuous" or self.pair_weight == "uniform",
            "rollout.pair_weight",
            self.pair_weight,
            "'uniform' in lockstep mode",
        )
        check(1 <= self.pool <= 2**10, "rollout.pool", self.pool, "1 to 1024")
        check(0.01 <= self.s_shift <= 100, "rollout.s_shift", self.s_shift, "between 0.01 and 100 (1 moves nothing)")
        check(
            abs(self.omega) <= 100,
            "rollout.omega",
            self.omega,
            "between -100 and 100 (-1 is the paper's choice for SD1.5)",
        )

    @property
    def max_steps(self) -> int:
        """k, or grid_steps where k is not given."""
        return self.grid_steps if self.k is None else self.k


@dataclass(kw_only=True)
class LossConfig:
    """The distance between the student's x0 and the target."""

    kind: Literal["l2", "huber"] = "l2"
    """l2: Eq. 17; huber: the pseudo-Huber loss of the authors' code."""
    c: float = 1e-3
    """Width of the pseudo-Huber loss."""

    def __post_init__(self) -> None:
        check_fields("loss.", self)
        check(self.c >= 1e-12, "loss.c", self.c, "1e-12 or more (1e-3 is the authors')")


@dataclass(kw_only=True)
class ReferenceConfig:
    """The model that runs the rollouts."""

    kind: Literal["frozen", "ema"] = "ema"
    """frozen: the original model, as in the paper; ema: a moving average of the student, as in the
    authors' code."""
    decay: float = 0.999
    """Decay of the moving average per update."""
    every: int = 1
    """Updates between two moves of the average. A move uses decay ** every."""

    def __post_init__(self) -> None:
        check_fields("reference.", self)
        check(0 <= self.decay < 1, "reference.decay", self.decay, "at least 0 and below 1")
        check_count("reference.every", self.every)


@dataclass(kw_only=True)
class PromptConfig:
    """The prompts that the pairs are conditioned on."""

    source: str = "shipped"
    """`shipped` or `digits`, the prompts of the package; a .txt, .jsonl, .csv or .parquet file; the
    id of a Hugging Face dataset; or a folder or tars of captioned images, as in data.source."""
    column: str = "prompt"
    """The column that holds the prompts in .jsonl, .csv and .parquet files and in datasets;
    captions of images are found without it."""
    limit: int = 8192
    """Use at most this many prompts."""
    device_mib: int = 256
    """Text embeddings of at most this many MiB stay on the device. Larger ones are encoded into
    `store` once, and what the next pairs need is copied to the device ahead of time."""
    store: str | None = None
    """Folder that keeps large text embeddings for later runs; by default `embeddings` in the parent
    folder of the output folder."""
    dropout: float = 0.0
    """Share of the pairs with which the student sees the empty prompt."""
    shuffled: bool = False
    """A control experiment: the student sees the prompt of another sample than the rollout saw."""

    def __post_init__(self) -> None:
        check_fields("prompts.", self)
        check(self.limit >= 1, "prompts.limit", self.limit, "at least 1")
        check_count("prompts.device_mib", self.device_mib, 0)
        check(0 <= self.dropout <= 1, "prompts.dropout", self.dropout, "between 0 and 1")


@dataclass(kw_only=True)
class DataConfig:
    """Real images for `rollout.start: data`; their captions replace the prompts of a source."""

    source: str | None = None
    """`digits`; a folder of images, with its sub-folders, with metadata.jsonl (`file_name`, `text`)
    or with a .txt or .caption file for each image; webdataset tars or parquet files with encoded
    images: a file, a folder of them, or a pattern such as data/{000..012}.tar; or the id of a
    Hugging Face dataset such as owner/name:split. For a model of videos: an .mp4 file, or a folder
    of them or of folders of numbered pictures, which are the frames of one."""
    column: str | None = None
    """The column or JSON key that holds the captions; by default `text` in tables and datasets, and
    `caption` in the .json members of tars. Of a list of captions the first is used."""
    on_bad: Literal["stop", "skip"] = "stop"
    """If an image or its caption cannot be used: stop, or go on without it. Either way a line says
    what is left out of a source."""
    stride: int = 1
    """Of a video every so many frames one is taken, from the first on; the rest is left out."""
    limit: int = 8192
    """Use at most this many images; their latents are held in memory."""
    store: str | None = None
    """Folder that keeps encoded images for later runs; by default `latents` in the parent folder of
    the output folder."""

    def __post_init__(self) -> None:
        check_fields("data.", self)
        check(self.limit >= 1, "data.limit", self.limit, "at least 1")
        check_count("data.stride", self.stride)


@dataclass(kw_only=True)
class OptimizerConfig:
    """The student's optimiser."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """The AdamW of torch, or the 8-bit AdamW of bitsandbytes."""
    lr: float = 1e-6
    """Constant learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay per update of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-3
    """Decoupled weight decay."""
    warmup: int = 0
    """Updates over which the learning rate rises linearly."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    max_skipped: int = 20
    """Stop after this many skipped updates in a row; 0 for never. An update is skipped if its loss
    or gradient is not finite."""

    def __post_init__(self) -> None:
        check_fields("optimizer.", self)
        check(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        check(self.eps > 0, "optimizer.eps", self.eps, "a positive number")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        check_count("optimizer.warmup", self.warmup, 0, MAX_UPDATES)
        check(self.clip >= 0, "optimizer.clip", self.clip, "0 or more")
        check_count("optimizer.max_skipped", self.max_skipped, 0)


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank training; rank 0 trains all weights."""

    rank: int = 0
    """Rank of the update; 0 for full weights."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; by default alpha = rank."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Names of the layers that get an update."""

    def __post_init__(self) -> None:
        check_fields("lora.", self)
        check(0 <= self.rank <= 2**12, "lora.rank", self.rank, "0 (full weights) to 4096")
        check(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
        check(self.rank == 0 or bool(self.targets), "lora.targets", self.targets, "at least one layer name")


@dataclass(kw_only=True)
class EngineConfig:
    """Precision, memory and the shape of an update."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and activations; with bf16 and fp16 the optimiser keeps master weights in fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of DeepSpeed."""
    batch_size: int = 64
    """Training pairs per update, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches per rank and update."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: Literal["off", "default", "max"] = "off"
    """torch.compile for the blocks of the student and for the step of continuous rollouts. max
    compiles with max-autotune."""
    attention: Literal["auto", "sdpa", "flash", "xformers"] = "auto"
    """Kernels of the attention layers of student and reference. auto leaves the layers as diffusers
    makes them; sdpa is torch's attention, which chooses a kernel at each call; flash its
    FlashAttention kernel and no other; xformers that of the package. A line says how many layers
    compute with the choice."""
    offload: Literal["none", "optimizer", "blocks"] = "none"
    """What host memory keeps. optimizer: moments and fp32 masters, which DeepSpeed's CPUAdam moves
    there (ZeRO 1 to 3); blocks: the frozen weights of the blocks of a LoRA run, of which each block
    has its own on the device only while it computes."""
    graphs: bool = True
    """On a GPU, capture the step of continuous rollouts as a CUDA graph."""
    tf32: bool = True
    """On a GPU, let fp32 training multiply and convolve in TF32 (10 bits of mantissa), and let
    cuDNN choose the fastest algorithms by trying them. false keeps float32 throughout."""
    channels_last: bool = False
    """Convolve in channels_last order, which GPUs prefer in half precision. The weights are kept in
    it, except for trained ones under ZeRO 1 to 3, whose flat buffers are row-major: there the
    convolutions of the student get their inputs in it."""

    def __post_init__(self) -> None:
        check_fields("engine.", self)
        check(1 <= self.batch_size <= 2**20, "engine.batch_size", self.batch_size, "1 to 1048576")
        check(1 <= self.accumulation <= 2**20, "engine.accumulation", self.accumulation, "1 to 1048576")

    def check_shares(self, world_size: int) -> None:
        """UserError where ranks and accumulation steps cannot share an update's pairs."""
        self.micro_batch(world_size)

    def micro_batch(self, world_size: int) -> int:
        """Pairs per rank and micro-batch. Raises UserError where they do not come out whole."""
        parts = world_size * self.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"engine.batch_size: {self.batch_size} cannot be shared by {world_size} ranks x "
                f"{self.accumulation} accumulation steps; use a multiple of {parts}"
            )
        return self.batch_size // parts


@dataclass(kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Updates between two lines of metrics, and between two checks for skipped updates."""
    sample_every: int = 0
    """Updates between two grids of samples with and without the negative model; 0 for one grid at
    the end, -1 for none."""
    sample_prompts: int = 8
    """Pictures per row of a sample grid; of a model of videos, prompts with two rows of frames."""
    sample_steps: int = 20
    """DPM-Solver++ steps of the sample grids."""
    sample_guidance_scale: float = 3.0
    """guidance_scale of the sample grids, as in diffusers (omega + 1)."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch in the sample grids: empty, or the same as the positive's."""
    checkpoint_every: int = 0
    """Updates between two checkpoints; 0 for none before the end."""
    export_every: int = 0
    """Updates between two exports of the negative so far into `negative/`, each with a grid and a
    line that says how far it moves guidance; 0 for none before the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """If a checkpoint or an export cannot be written, as on a full disk: warn and try again at the
    next one, or stop. A state that is not finite stops the run always."""
    spike: float = 5.0
    """Report an update whose loss is this many times the median of the last 100; 0 for none."""

    def __post_init__(self) -> None:
        check_fields("log.", self)
        check_count("log.every", self.every)
        check_count("log.sample_every", self.sample_every, -1)
        check_count("log.sample_prompts", self.sample_prompts, 1, MAX_PICTURES)
        check_count("log.sample_steps", self.sample_steps)
        scale = self.sample_guidance_scale
        check(1 <= scale <= 1000, "log.sample_guidance_scale", scale, "a number from 1 to 1000")
        check_count("log.checkpoint_every", self.checkpoint_every, 0)
        check_count("log.export_every", self.export_every, 0)
        check_count("log.keep", self.keep)
        check(self.spike == 0 or self.spike > 1, "log.spike", self.spike, "0 (off) or more than 1")


@dataclass(kw_only=True)
class TrainConfig:
    """One Self-NPO training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to make a negative of."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the reference makes pairs."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Distance between the student's x0 and the target."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Who runs the rollouts."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """What the pairs are conditioned on."""
    data: DataConfig = field(default_factory=DataConfig)
    """Real images, for rollout.start data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The student's optimiser."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank training."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Precision, memory and the shape of an update."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while training."""
    method: str = "self_npo"
    """How pairs are made and what the student learns from them: the name of a method in
    training/methods."""
    updates: int = 1000
    """Optimiser updates."""
    seed: int = 0
    """Seed of every random draw, 0 to 2^63 - 1."""
    output: str = "runs/selfnpo"
    """Folder that receives the negative model, config, metrics, logs and checkpoints."""

    def __post_init__(self) -> None:
        check_fields("", self)
        check_count("updates", self.updates, 1, MAX_UPDATES)
        check(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        if self.model.quantization != "none":
            self._check_quantised()
        check(
            self.lora.rank == 0 or self.engine.zero_stage < 3,
            "engine.zero_stage",
            self.engine.zero_stage,
            "0, 1 or 2 with lora.rank: student and reference share one backbone, which ZeRO 3 would take apart",
        )
        self._check_offload()
        if self.rollout.start == "data" and not self.data.source:
            raise UserError(
                "data.source: none given, but rollout.start is 'data'; name a folder of captioned images, or train "
                "from prompts only with configs/sd15.yaml"
            )

    def _check_quantised(self) -> None:
        """Raise UserError where a quantised base cannot be trained on."""
        kind = self.model.quantization
        if not self.lora.rank:
            raise UserError(
                f"model.quantization: {kind!r} is not possible with full weights, which are trained and cannot be "
                "stored in 8 or 4 bits; give lora.rank, or 'none'"
            )
        if self.engine.zero_stage == 3:
            raise UserError(
                f"model.quantization: {kind!r} is not possible with engine.zero_stage 3, which would take the stored "
                "base apart; use 0, 1 or 2"
            )

    def _check_offload(self) -> None:
        """UserError for a choice that the offload does not go with."""
        engine = self.engine
        if engine.offload == "optimizer":
            name, stage = self.optimizer.name, engine.zero_stage
            expected = "'adamw' with engine.offload optimizer, which keeps its float32 moments in host memory"
            check(name == "adamw", "optimizer.name", name, expected)
            expected = "1, 2 or 3 with engine.offload optimizer"
            check(stage > 0 or engine.precision != "fp32", "engine.zero_stage", stage, expected)
        elif engine.offload == "blocks":
            check(self.lora.rank > 0, "lora.rank", self.lora.rank, "1 or more with engine.offload blocks")
            kind, expected = (
                self.model.quantization,
                "none with engine.offload blocks, which moves no quantised weights",
            )
            check(kind == "none", "model.quantization", kind, expected)
            choices: tuple[tuple[str, object, object], ...] = (
                ("engine.graphs", engine.graphs, False),
                ("engine.compile", engine.compile, "off"),
                ("rollout.overlap", self.rollout.overlap, False),
                ("engine.gradient_checkpointing", engine.gradient_checkpointing, True),
            )
            for field, value, wanted in choices:
                expected = f"{str(wanted).lower()} with engine.offload blocks"
                check(value == wanted, field, value, expected)
