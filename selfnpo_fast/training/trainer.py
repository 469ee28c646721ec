"""One training run: pairs of the reference, updates of the student, and moves of the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.negatives.write import save_negative
from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.attention import set_attention
from selfnpo_fast.runtime.compiling import compile_blocks
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import NotFiniteError, RunError, UserError
from selfnpo_fast.runtime.profiling import region
from selfnpo_fast.runtime.stopping import Stopped, StopRequest, check_stop
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.change import GuidedChange
from selfnpo_fast.training.checkpoint import Generators, Parts, load_checkpoint, save_checkpoint
from selfnpo_fast.training.engine import StudentEngine, allow_tf32
from selfnpo_fast.training.engine_state import (
    EngineCounters,
    Moment,
    NativeMoments,
    StudentWeights,
    loss_scale,
    moment_names,
)
from selfnpo_fast.training.inputs import Inputs
from selfnpo_fast.training.lora import LoraWeights, Variant, add_average, checkpoint_gradients, make_trainable
from selfnpo_fast.training.methods import find_method
from selfnpo_fast.training.moving_reference import MovingReference, Reference
from selfnpo_fast.training.offload import offload_blocks
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.resumable import MOMENTS, newest_good, update_of
from selfnpo_fast.training.samples import SampleGrids


def _split(
    student: nn.Module, names: Iterable[str], config: TrainConfig
) -> tuple[nn.Module | Variant, dict[str, nn.Parameter] | None]:
    """Make `student` trainable, of two experts those with `names`, and make the reference.

    With full weights the reference is a copy of the student, and shares with it what is not trained.
    With LoRA it is the same network, called with other low-rank weights or with none. Dropout would
    act on the reference too, and stays off.

    Returns the reference, and the parameters that follow the student's, by the names of those; None
    where both have the same names.
    """
    make_trainable(student.eval(), names, config.lora, config.seed)
    if not config.lora.rank:
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        reference = copy.deepcopy(student, shared).requires_grad_(False).eval()
        student.train()
        return reference, None
    if config.reference.kind == "frozen":
        return Variant(student, LoraWeights.OFF), {}
    return Variant(student, LoraWeights.AVERAGE), add_average(student)


def _to_channels_last(parameters: Iterable[nn.Parameter]) -> None:
    """Give the weights of 2D convolutions the channels_last memory format."""
    for p in parameters:
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


def _feed_channels_last(network: nn.Module, row_major: set[int]) -> None:
    """Give 2D convolutions whose weights have to stay row-major their inputs in channels_last.

    torch convolves in channels_last where the input or the weights have that order, and puts the
    other one into it. The input is put into it at every convolution, not once at the network's:
    on a GPU, group norm returns row-major tensors.

    row_major    the `id` of each parameter that stays as it is
    """

    def reorder(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = inputs
        return x.contiguous(memory_format=torch.channels_last), *others

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and id(module.weight) in row_major:
            module.register_forward_pre_hook(reorder)


class Trainer:
    """The parts of a run, and its loop `run`. The method makes the pairs and knows their loss."""

    def __init__(self, config: TrainConfig, inputs: Inputs, world: World, output: Path) -> None:
        """All parts of a run that writes to the folder `output`; all ranks take part."""
        self.config, self.world, self.output = config, world, output
        allow_tf32(config, world.device)
        self.adapter, self.table, self.prompts = inputs.adapter, inputs.table, inputs.prompts
        self.base, self.record = inputs.base, inputs.record
        self.update = 0  # updates made so far
        self.saved: Path | None = None  # the newest checkpoint that this run has written or continued from
        student, family = inputs.student, self.adapter.family
        # Before the reference becomes a copy of it.
        set_attention(student, config.engine.attention, threads=config.rollout.overlap)
        # Split off the reference before DeepSpeed touches the student.
        reference, average = _split(student, self.adapter.trained_denoisers, config)
        # Prepare the student's blocks, and hand the student to DeepSpeed.
        if config.engine.gradient_checkpointing:
            checkpoint_gradients(student, family)
        compile_blocks(student, family.repeated_blocks, config.engine.compile, training=True)
        self.engine = StudentEngine(config, student, world)
        # Only now, since DeepSpeed broadcasts no other parameters than row-major ones. The trained
        # parameters stay row-major where ZeRO keeps them in flat buffers.
        if config.engine.channels_last:
            trained = {id(p) for p in student.parameters() if p.requires_grad}
            flat = trained if self.engine.stage else set()
            _to_channels_last(p for p in (*student.parameters(), *reference.parameters()) if id(p) not in flat)
            _feed_channels_last(student, flat)
        # After DeepSpeed, too, which takes all parameters to the device.
        if config.engine.offload == "blocks":
            offload_blocks(student, family.repeated_blocks, world.device)
        # Build the reference, the method and its producer of pairs.
        self.reference = self._make_reference(reference, average)
        self.method = find_method(config.method)(config, self.adapter, self.table, world)
        self.producer = self.method.make_producer(self.reference, inputs.latents)
        self.grids = SampleGrids(self.adapter, self._base, self.engine, self.table, self.prompts, config.log, world)
        steps = config.rollout.grid_steps
        self.change = GuidedChange(self.adapter, self._base, self.engine, self.table, config.log, steps, world)
        self._loaded_base: nn.Module | None = None

    def _make_reference(self, network: nn.Module | Variant, average: dict[str, nn.Parameter] | None) -> Reference:
        """The frozen or moving reference of the config over what `_split` has returned."""
        config = self.config.reference
        if config.kind == "frozen":
            return Reference(network)
        return MovingReference(
            network,
            self.engine.trainable,
            config.decay,
            self.engine.gather if self.engine.stage == 3 else None,
            average=average,
            every=config.every,
            world=self.world,
        )

    def predict(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        """The student's raw output (B, ...).

        x       (B, ...), states
        t       (B,) int64, their noise levels
        cond    their conditioning rows, (B, ...) by name
        """
        return self.adapter.predict_level(self.engine, x, t, cond)

    def pair_loss(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one micro-batch, a scalar with gradient, and the loss of each pair (B,)."""
        loss, per_pair = self.method.pair_loss(self.predict, pairs)
        # A loss that is not finite may have finite gradients. They become NaN here, so that every
        # ZeRO stage skips the update.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan), per_pair

    def train_update(self, recorder: Recorder) -> None:
        """One optimiser update, and one move of the reference. The device is asked for no value."""
        # The pairs of all micro-batches.
        with region("waiting"):
            update_pairs = self.producer.take()
        # Loss and gradients of each micro-batch; the last step also moves the weights.
        for pairs in update_pairs.micro_batches:
            with region("student forward"):
                loss, per_pair = self.pair_loss(pairs)
            with region("backward"):
                self.engine.backward(loss)
            with region("optimiser"):
                norm, applied = self.engine.step()
            recorder.add(pairs, per_pair)
        # The reference moves once it has made the pairs in flight. It also moves after a skipped
        # update: to tell one, the host would have to wait for the device.
        with region("waiting"):
            self.producer.settle()
        with region("EMA"):
            self.reference.update()
        # The record of the update.
        self.update += 1
        recorder.close_update(norm, applied, update_pairs.forwards)

    def run(self, recorder: Recorder, stop: StopRequest) -> Path | None:
        """Train up to the configured number of updates, then write the negative model.

        Returns the folder of the negative model. A request to stop is honoured after the present
        update: the run writes a checkpoint, and returns None.

        Raises RunError where too many updates in a row were skipped, where weights, moments or
        reference are not finite when they are to be saved, and where the negative model or, with
        `log.on_save_error: stop`, a checkpoint could not be written.
        """
        try:
            return self._run(recorder, stop)
        except NotFiniteError as error:
            # No later update makes such a state finite again.
            raise RunError(
                f"{error} after update {self.update}; the newest finite checkpoint is {self._newest_good()}; start "
                "again with a lower optimizer.lr, or look at the pairs of an update with --replay-step"
            ) from error

    def _run(self, recorder: Recorder, stop: StopRequest) -> Path | None:
        """`run`, whose NotFiniteError names no checkpoint yet."""
        log = self.config.log
        while self.update < self.config.updates:
            # One update, unless any rank was asked to stop before it, or while it fills its slots.
            try:
                check_stop("between two updates")
                self.train_update(recorder)
            except Stopped:
                return self._stop_early(recorder, stop)
            last = self.update == self.config.updates
            # Metrics.
            if self.update % log.every == 0 or last:
                recorder.flush(self.update, self.engine.lr)
                self._report_skips(recorder)
            # A checkpoint.
            if last or (log.checkpoint_every and self.update % log.checkpoint_every == 0):
                self._try_to_save(recorder)
            # The negative so far, and pictures.
            exports = not last and log.export_every > 0 and self.update % log.export_every == 0
            draws = not last and log.sample_every > 0 and self.update % log.sample_every == 0
            if exports:
                self._go_on_without(self.save_negative, "the export before it is untouched")
            if exports or draws:
                self.look(recorder, at_change=exports)
        # The result comes first: a grid that does not fit into memory must not cost it.
        folder = self.save_negative()
        self.look(recorder, at_change=True)
        return folder

    def save_negative(self) -> Path:
        """Write the student as the negative model; all ranks take part. Returns its folder.

        Raises RunError on all ranks where it could not be written.
        """
        return save_negative(
            self.output / "negative",
            self.engine.module,
            self.engine.full_weights(),
            self.engine.frozen_weights(),
            self.adapter,
            DTYPES[self.config.engine.precision],
            self.world,
            lora=self.config.lora.rank > 0,
            base=self.base,
        )

    def _stop_early(self, recorder: Recorder, stop: StopRequest) -> None:
        """Write a checkpoint, and log where the run has stopped."""
        saved = "nothing to save yet"
        if self.update:
            saved = f"checkpoint {self.save_checkpoint(recorder)}"
        logger.warning("%s: stopped after update %d; %s; go on with --resume", stop.signal, self.update, saved)

    def _report_skips(self, recorder: Recorder) -> None:
        """Warn of the skipped updates of the last flush.

        Raises RunError where `optimizer.max_skipped` of them came in a row.
        """
        for skip in recorder.skips.last:
            scaler = loss_scale(self.engine)
            scale = f"; the loss scale is {scaler['cur_scale']:g} now" if scaler else ""
            logger.warning(
                "update %d skipped: its loss or gradient is not finite (%d in a row, %d in all)%s",
                skip.update, skip.in_a_row, skip.in_all, scale,
            )  # fmt: skip
            if skip.in_a_row == self.config.optimizer.max_skipped:
                raise RunError(
                    f"{skip.in_a_row} updates in a row had a loss or gradient that is not finite "
                    f"(optimizer.max_skipped); the newest finite checkpoint is {self._newest_good()}; lower "
                    f"optimizer.lr, or look at the pairs with --replay-step {skip.update}"
                )

    def _newest_good(self) -> str:
        """The newest checkpoint that is whole and finite, for a message; all ranks take part."""

        def look() -> str:
            try:
                return str(newest_good(self.output / "checkpoints") or "none: none was written")
            except UserError as error:
                return f"none: {error}"

        return self.world.on_main(look)

    def _try_to_save(self, recorder: Recorder) -> None:
        """Write a checkpoint; a failure is a warning or an error, as `log.on_save_error` says."""
        self._go_on_without(lambda: self.save_checkpoint(recorder), "older checkpoints are untouched")

    def _go_on_without(self, write: Callable[[], Path], kept: str) -> None:
        """Write what the run can do without; a failure is a warning that says what is `kept`, or an
        error, as `log.on_save_error` says.

        A state that is not finite is an error always.
        """
        try:
            write()
        except NotFiniteError:
            raise
        except RunError as error:
            if self.config.log.on_save_error == "stop":
                raise
            logger.warning("%s; %s, training goes on (log.on_save_error)", error, kept)

    def look(self, recorder: Recorder, *, at_change: bool) -> None:
        """Record a grid of pictures, base above base + negative, and, `at_change`, how far the
        negative moves guidance; all ranks take part.

        With `log.sample_every: -1` there is no grid, and no base is loaded for the measurement.
        """
        config = self.config
        grid = self.grids.draw() if config.log.sample_every >= 0 else None
        if at_change and (config.log.sample_every >= 0 or config.lora.rank or config.reference.kind == "frozen"):
            self.change.report()
        if self._loaded_base is not None:
            self._loaded_base.to("cpu")  # until the next grid
        if grid is not None:
            recorder.picture(self.update, "samples", grid)
        recorder.restart_clock()

    def _base(self) -> nn.Module | Variant:
        """The base model: the network without low-rank weights, or the frozen reference.

        Where every network of the run has moved, it is loaded for the first grid, and kept in host
        memory after that.
        """
        if self.config.lora.rank:
            return Variant(self.engine.module, LoraWeights.OFF)
        if self.config.reference.kind == "frozen":
            return self.reference.module
        if self._loaded_base is None:
            self._loaded_base = self.adapter.load_denoiser(DTYPES[self.config.engine.precision]).to(self.world.device)
            set_attention(self._loaded_base, self.config.engine.attention, say=False)
        return self._loaded_base.to(self.world.device)

    def _parts(self, recorder: Recorder) -> Parts:
        """All of the run that a checkpoint holds."""
        counters = EngineCounters(self.engine)
        moments = {key: Moment(self.engine, key, counters) for key in moment_names(self.engine)}
        return Parts(
            whole={"student": StudentWeights(self.engine), **moments, "reference": self.reference},
            by_rank={
                "method": self.method,
                "recorder": recorder.metrics,
                "rng": Generators(self.world),
                MOMENTS: NativeMoments(self.engine),
            },
            counters={"engine": counters, "recorder": recorder.counters},
        )

    def save_checkpoint(self, recorder: Recorder) -> Path:
        """Write a checkpoint of the present state; all ranks take part. Returns its folder.

        A state that has its checkpoint already is not written again. Raises RunError on all ranks
        where it could not be written.
        """
        saved, folder = self.saved, self.output / "checkpoints"
        if saved and update_of(saved) == self.update and self.world.on_main(saved.is_dir):
            return saved
        parts, inputs = self._parts(recorder), self.record and self.record.values
        self.saved = save_checkpoint(folder, self.update, parts, self.config, self.world, inputs)
        recorder.restart_clock()
        return self.saved

    def resume(self, path: Path, recorder: Recorder) -> None:
        """Continue from a checkpoint of the same recipe, as `newest_checkpoint` has found it.

        Raises UserError where it cannot be read, or is no state of this run.
        """
        self.update, self.saved = load_checkpoint(path, self._parts(recorder), self.world), path
        # The sums have room for the updates between two flushes.
        pending, most = recorder.metrics.pending, self.update % self.config.log.every
        if pending > most:
            raise UserError(
                f"{path} does not fit this run: {pending} updates are pending, of {most} since the last row"
            )
        logger.info("resumed from %s", path)
