"""One training run: pairs from the reference, the student's update, the reference's move, and the record of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.data.real_images import load_real_data
from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig, check_steps
from selfnpo_fast.models import StableDiffusionAdapter, load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.negatives.fingerprint import base_record
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.negatives.write import save_negative
from selfnpo_fast.rollout import (
    ContinuousRollout,
    CudaGraphs,
    Grid,
    GuidedPredictor,
    LockstepRollout,
    OverlappedProducer,
    PairMaker,
    Pairs,
    Producer,
    no_capture,
)
from selfnpo_fast.runtime.compiling import compile_blocks
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import RunError
from selfnpo_fast.runtime.images import image_grid
from selfnpo_fast.runtime.profiling import region
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.checkpoint import load_checkpoint, newest_whole, save_checkpoint
from selfnpo_fast.training.engine import StudentEngine
from selfnpo_fast.training.lifecycle import StopRequest
from selfnpo_fast.training.lora import Variant, Weights, add_average, add_lora, checkpoint_gradients
from selfnpo_fast.training.moving_reference import MovingReference, Reference
from selfnpo_fast.training.objective import Objective
from selfnpo_fast.training.recorder import Recorder


@dataclass(frozen=True)
class Inputs:
    """All that a run reads; made and checked before anything is written."""

    adapter: StableDiffusionAdapter
    table: ConditioningTable
    prompts: list[str]
    latents: torch.Tensor | None
    student: nn.Module
    base: dict
    """What the negative model's files say of the base (`guidance.fingerprint`)."""


def load_inputs(config: TrainConfig, world: World) -> Inputs:
    """Read model, prompts and data. Raises UserError for every mistake a user can make in them."""
    model = config.model
    config.engine.micro_batch(world.size)
    adapter = load_adapter(model.path, revision=model.revision, variant=model.variant, resolution=model.resolution)
    Grid.build(adapter.schedule, config.rollout.grid_steps, torch.device("cpu"), w=config.rollout.w)
    if config.log.sample_every >= 0:
        check_steps(adapter, config.log.sample_steps, "log.sample_steps")
    latents = None
    if config.rollout.start == "data":
        data = load_real_data(config, adapter, world)
        prompts, latents = data.captions, data.latents
    else:
        prompts = read_prompts(config.prompts.source, column=config.prompts.column, limit=config.prompts.limit)
    distinct = list(dict.fromkeys(prompts))
    rows = adapter.encode_prompts(distinct, world.device)
    if len(distinct) < len(prompts):
        place = {prompt: i for i, prompt in enumerate(distinct)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=world.device)
        rows = {name: value[index] for name, value in rows.items()}
    dtype = DTYPES[config.engine.precision]
    table = ConditioningTable.build(adapter.encode_empty(world.device), rows, dtype)
    student = adapter.load_denoiser(dtype).to(world.device)
    base = base_record(model.path, model.revision, module_weights(student, model.path))
    return Inputs(adapter, table, prompts, latents, student, base)


def _split(student: nn.Module, config: TrainConfig) -> tuple[nn.Module | Variant, dict[str, nn.Parameter] | None]:
    """Make `student` trainable; the reference beside it, and its parameters by the names of those they follow (None:
    the same names).

    With full weights the reference is a copy. With LoRA it is the same network, called with other low-rank weights or
    none; dropout would meet it as well, and stays off.
    """
    if not config.lora.rank:
        reference = copy.deepcopy(student).requires_grad_(False).eval()
        student.requires_grad_(True).train()
        return reference, None
    add_lora(student.eval(), config.lora, config.seed)
    if config.reference.kind == "frozen":
        return Variant(student, Weights.OFF), {}
    return Variant(student, Weights.AVERAGE), add_average(student)


def _to_channels_last(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


class Trainer:
    """Holds the parts of a run; `run` is the loop."""

    def __init__(self, config: TrainConfig, inputs: Inputs, world: World, output: Path) -> None:
        self.config, self.world, self.output = config, world, output
        self.adapter, self.table, self.prompts = inputs.adapter, inputs.table, inputs.prompts
        self.base = inputs.base
        student = inputs.student
        reference, average = _split(student, config)  # before DeepSpeed touches the student
        if config.engine.gradient_checkpointing:
            checkpoint_gradients(student)
        compile_blocks(student, config.engine.compile, training=True)
        self.engine = StudentEngine(config, student, world)
        if config.engine.channels_last:  # not before: DeepSpeed broadcasts row-major parameters alone
            trained = {id(p) for p in student.parameters() if p.requires_grad}
            flat = trained if self.engine.stage else set()
            _to_channels_last(p for p in (*student.parameters(), *reference.parameters()) if id(p) not in flat)
        if config.reference.kind == "ema":
            self.reference: Reference = MovingReference(
                reference,
                self.engine.trainable,
                config.reference.decay,
                self.engine.gather if self.engine.stage == 3 else None,
                average=average,
                every=config.reference.every,
                world=world,
            )
        else:
            self.reference = Reference(reference)
        self.objective = Objective.build(config.loss, self.adapter.schedule, world.device)
        self.producer = self._make_producer(inputs.latents)
        self.update = 0

    def _make_producer(self, latents: torch.Tensor | None) -> Producer:
        config, world = self.config, self.world
        predictor = GuidedPredictor(
            lambda x, t, cond: self.adapter.predict(self.reference.module, x, t, cond),
            self.table,
            config.rollout.w,
            config.rollout.branches,
        )
        grid = Grid.build(
            self.adapter.schedule,
            config.rollout.grid_steps,
            world.device,
            w=config.rollout.w,
            noising=config.rollout.noising,
        )
        maker = PairMaker(
            predictor,
            grid,
            config.rollout,
            latent_shape=self.adapter.latent_shape,
            items=self.table.prompts,
            latents=latents,
            seed=config.seed,
            dropout=config.prompts.dropout,
            shuffled=config.prompts.shuffled,
            device=world.device,
        )
        place = {"batch": config.engine.micro_batch(world.size), "rank": world.rank, "world_size": world.size}
        if config.rollout.mode == "lockstep":
            rollout = LockstepRollout(maker, **place)
        else:
            groups, compile = config.rollout.pool * config.engine.accumulation, config.engine.compile
            graphs = compile != "off" and world.device.type == "cuda"
            capture = CudaGraphs(world.device) if graphs else no_capture
            rollout = ContinuousRollout(maker, groups=groups, compile=compile, capture=capture, **place)
        made = rollout, predictor, config.engine.accumulation, lambda: self.reference.version
        return OverlappedProducer(*made, device=world.device) if config.rollout.overlap else Producer(*made)

    def pair_loss(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch (scalar with gradient) and per pair (B,)."""
        pred = self.adapter.predict(self.engine, pairs.x_s, pairs.s, self.table.gather(pairs.rows))
        loss, per_pair = self.objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)
        # A loss that is not finite may still have finite gradients: poison them, and every ZeRO stage skips the update.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan), per_pair

    def train_update(self, recorder: Recorder) -> None:
        """One optimiser update: pairs, loss, backward, step for every micro-batch, then the reference moves."""
        with region("waiting"):
            made = self.producer.take()
        for pairs in made.micro_batches:
            with region("student forward"):
                loss, per_pair = self.pair_loss(pairs)
            with region("backward"):
                self.engine.backward(loss)
            with region("optimiser"):
                norm, applied = self.engine.step()
            recorder.add(pairs, per_pair)
        with region("waiting"):
            self.producer.settle()
        with region("EMA"):  # also after a skipped update: whether it was one need not be known here
            self.reference.update()
        self.update += 1
        recorder.close_update(norm, applied, made.forwards)

    def run(self, recorder: Recorder, stop: StopRequest) -> Path | None:
        """Train to the configured number of updates, then write a checkpoint and the negative model; its folder.

        A request to stop is honoured after the present update, with a checkpoint; the result is None then.
        """
        log = self.config.log
        while self.update < self.config.updates:
            if self.world.any(stop.signal is not None):
                return self._stop_early(recorder, stop)
            self.train_update(recorder)
            last = self.update == self.config.updates
            if self.update % log.every == 0 or last:
                recorder.flush(self.update, self.engine.lr)
                self._report_skips(recorder)
            if last or (log.checkpoint_every and self.update % log.checkpoint_every == 0):
                self._try_to_save(recorder)
            if not last and log.sample_every > 0 and self.update % log.sample_every == 0:
                self.draw_samples(recorder)
        # Weights first: a grid that does not fit into memory must not cost the run its result.
        dtype = DTYPES[self.config.engine.precision]
        lora = self.config.lora.rank > 0
        folder = save_negative(
            self.output / "negative",
            self.engine.module,
            self.engine.full_weights(),
            self.engine.frozen_weights(),
            self.adapter,
            dtype,
            self.world,
            lora=lora,
            base=self.base,
        )
        if log.sample_every >= 0:
            self.draw_samples(recorder)
        return folder

    def _stop_early(self, recorder: Recorder, stop: StopRequest) -> None:
        saved = "nothing to save yet"
        if self.update:
            saved = f"checkpoint {self.save_checkpoint(recorder)}"
        logger.warning("%s: stopped after update %d; %s; go on with --resume", stop.signal, self.update, saved)

    def _report_skips(self, recorder: Recorder) -> None:
        for skip in recorder.skips:
            scale = f"; the loss scale is {self.engine.loss_scale:g} now" if self.engine.loss_scale else ""
            logger.warning(
                "update %d skipped: its loss or gradient is not finite (%d in a row, %d in all)%s",
                skip.update, skip.in_a_row, skip.in_all, scale,
            )  # fmt: skip
            if skip.in_a_row == self.config.optimizer.max_skipped:
                last = newest_whole(self.output / "checkpoints")
                raise RunError(
                    f"{skip.in_a_row} updates in a row had a loss or gradient that is not finite "
                    f"(optimizer.max_skipped); the last good checkpoint is {last or 'none: none was written'}; lower "
                    f"optimizer.lr, or look at the pairs with --replay-step {skip.update}"
                )

    def _try_to_save(self, recorder: Recorder) -> None:
        try:
            self.save_checkpoint(recorder)
        except RunError as error:
            if self.config.log.on_save_error == "stop":
                raise
            logger.warning("%s; older checkpoints are untouched, training goes on (log.on_save_error)", error)

    def draw_samples(self, recorder: Recorder) -> None:
        """A grid of base above base + negative on the first prompts; all ranks draw, since ZeRO 3 needs them all."""
        log = self.config.log
        index = torch.arange(min(log.sample_prompts, self.table.prompts), device=self.world.device)
        index = index * (self.table.prompts // len(index)) + 1
        base = self._base()
        settings = SamplerConfig(
            steps=log.sample_steps, guidance_scale=log.sample_guidance_scale, negative_prompt=log.negative_prompt
        )
        prompts, empty = self.table.gather(index), self.table.empty(1)
        texts = [self.prompts[i - 1] for i in index.tolist()]
        student = Negative("the student", network=self.engine)
        network = self.engine.module
        training = network.training
        network.eval()
        samplers = [GuidedSampler(self.adapter, base, negative) for negative in (None, student)]
        arms = [sampler.images(prompts, empty, range(len(index)), settings) for sampler in samplers]
        network.train(training)
        captions = [f"{name}: {text}" for name in ("base", "base + negative") for text in texts]
        recorder.picture(self.update, "samples", image_grid(torch.cat(arms), len(index), captions))
        recorder.restart_clock()

    def _base(self) -> nn.Module | Variant:
        """What was to be made worse: the network without its low-rank weights, or one that is loaded anew, since
        whatever is here has moved."""
        if self.config.lora.rank:
            return Variant(self.engine.module, Weights.OFF)
        return self.adapter.load_denoiser(DTYPES[self.config.engine.precision]).to(self.world.device)

    def save_checkpoint(self, recorder: Recorder) -> Path:
        """Write a checkpoint of the present state; all ranks take part. Raises RunError on all of them."""
        path = save_checkpoint(
            self.output / "checkpoints",
            self.update,
            engine=self.engine,
            reference=self.reference,
            own={"rollout": self.producer.state_dict(), "recorder": recorder.state_dict()},
            counters={"recorder": recorder.counters()},
            config=self.config,
            world=self.world,
        )
        recorder.restart_clock()
        return path

    def resume(self, path: Path, recorder: Recorder) -> None:
        """Go on from a checkpoint of the same recipe (`newest_checkpoint` has compared them)."""
        state = load_checkpoint(
            path,
            engine=self.engine,
            reference=self.reference,
            rollout=self.producer,
            recorder=recorder,
            world=self.world,
        )
        recorder.load_counters(state["recorder"])
        self.update = state["update"]
        logger.info("resumed from %s", path)
