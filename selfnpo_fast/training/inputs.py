"""All that a run reads: its model, prompts and data, checked before anything is written.

Shape letter: N prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.data.prompts import fingerprint
from selfnpo_fast.data.text_store import stored_text
from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
from selfnpo_fast.models import Adapter, load_adapter_of
from selfnpo_fast.models.conditioning import ConditioningTable, table_bytes, unique_rows
from selfnpo_fast.models.host_table import HostRows, HostTable
from selfnpo_fast.models.quantised import quantise
from selfnpo_fast.models.text import encoder_dtype
from selfnpo_fast.negatives.fingerprint import base_records
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.input_record import InputRecord
from selfnpo_fast.training.methods import find_method
from selfnpo_fast.training.resumable import read_state


@dataclass(frozen=True)
class Inputs:
    """What a trainer is built from."""

    adapter: Adapter
    """Loads and calls the parts of the model."""
    table: ConditioningTable
    """The conditioning of the empty prompt and of all prompts."""
    prompts: list[str]
    """N prompts; row i + 1 of the table belongs to prompt i."""
    latents: torch.Tensor | None
    """(N, ...) float32 scaled latents of real data; None without data."""
    student: nn.Module
    """The base model's denoiser on this rank's device, in the precision of training or, as
    `model.quantization` says, quantised."""
    base: Mapping[str, dict]
    """The record of the base for the negative model's files (`negatives.fingerprint`), of each
    denoiser by its name."""
    record: InputRecord | None = None
    """What checkpoints record of all this; on rank 0 alone, which writes it."""

    def refuse_changed(self, checkpoint: Path, world: World) -> None:
        """UserError on all ranks where these are not the inputs that a checkpoint records."""

        def look() -> None:
            assert self.record is not None, "rank 0 has it"
            self.record.refuse_changed(read_state(checkpoint).get("inputs"), checkpoint)

        world.on_main(look)


def load_inputs(config: TrainConfig, world: World) -> Inputs:
    """Read model, prompts and data. Raises UserError for every mistake a user can make in them."""
    model = config.model
    config.engine.check_shares(world.size)
    method = find_method(config.method)
    adapter = load_adapter_of(model)
    if config.log.sample_every >= 0:
        adapter.check_steps(config.log.sample_steps, "log.sample_steps")
    inputs = method.read_inputs(config, adapter, world)
    _refuse_different(inputs.prompts, world)
    dtype = DTYPES[config.engine.precision]
    # The text encoders come alone: the autoencoder of `read_inputs` goes, and the denoiser comes after.
    adapter.drop_autoencoder()
    table = prompt_table(config, adapter, inputs.prompts, world)
    # A base that is to be quantised stays in host memory until its weights are recorded.
    quantised = model.quantization != "none"
    student = adapter.load_denoiser(dtype).to("cpu" if quantised else world.device)
    weights = module_weights(student, model.path)
    schedule = ScheduleFacts.of(adapter.schedule, model.path)
    commit = adapter.folder.commit
    base = base_records(adapter, student, model.path, commit or model.revision, schedule)
    record = None
    if world.is_main:
        named = ((name, weights.read(name)) for name in weights.shapes)
        encoder = encoder_dtype(world.device, dtype)
        record = InputRecord(inputs, table, schedule, named, commit=commit, encoder=encoder)
    if quantised:
        quantise(student, model.quantization, world.device)
    return Inputs(adapter, table, inputs.prompts, inputs.latents, student, base, record)


def prompt_table(config: TrainConfig, adapter: Adapter, prompts: list[str], world: World) -> ConditioningTable:
    """The text embeddings of `prompts` on the device, or where they are larger than
    `prompts.device_mib` in a store on the disk (`data.text_store`).

    All ranks take part. Raises UserError on all ranks for a damaged store, and RunError on all
    ranks where the disk is full.
    """
    dtype = DTYPES[config.engine.precision]
    encoder = encoder_dtype(world.device, dtype)
    if not table_on_host(config, adapter.conditioning_shapes, len(prompts)):
        return ConditioningTable.encode(adapter, prompts, world.device, dtype, encoder)
    root = config.prompts.store or str(Path(config.output).expanduser().absolute().parent / "embeddings")
    distinct, index = unique_rows(prompts)
    tensors, lengths = stored_text(distinct, root, adapter, dtype=dtype, encoder_dtype=encoder, world=world)
    rows = HostRows(facts=adapter.conditioning_rows, tensors=tensors, lengths=lengths)
    return HostTable(rows, [i + 1 for i in index], world.device)


def table_on_host(config: TrainConfig, shapes: Mapping[str, tuple[int, ...]], prompts: int) -> bool:
    """Whether the text embeddings of that many prompts, of `conditioning_shapes`, stay on the
    host."""
    size = table_bytes(shapes, prompts + 1, DTYPES[config.engine.precision])
    return size > config.prompts.device_mib << 20


def _refuse_different(prompts: list[str], world: World) -> None:
    """Raises UserError on all ranks where hosts have read different prompts.

    Ranks would train on other pairs than one rank does, and encode in another number of rounds.
    """
    if len(set(world.gather(fingerprint(prompts)))) > 1:
        raise UserError("prompts.source: not all ranks have read the same prompts; give all hosts the same files")
