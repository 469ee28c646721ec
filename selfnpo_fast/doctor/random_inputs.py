"""A run's inputs in their real sizes and dtypes with random values, for which no weights are read."""

from __future__ import annotations

import torch

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.conditioning import ConditioningTable, Row
from selfnpo_fast.models.host_table import HostRows, HostTable
from selfnpo_fast.models.quantised import quantise
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.inputs import Inputs, table_on_host


def random_inputs(config: TrainConfig, adapter: Adapter, prompts: int, world: World) -> Inputs:
    """What a trainer is built from, with a denoiser of the real class whose weights are random.

    adapter    of a model whose configs are enough (`load_adapter(configs_only=True)`)
    prompts    number of prompts, or of images where rollouts start from real data

    Everything is made on the device of `world` and depends on the config's seed and that device's
    type alone. The generators of torch are left as they were. The inputs have no record, so a
    trainer of them writes no checkpoint.
    """
    dtype, device = DTYPES[config.engine.precision], world.device

    def rows(count: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(count, *shape, device=device) for name, shape in adapter.conditioning_shapes.items()}

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        # Layers draw their weights where they are made: a CPU would take a minute for SDXL's.
        with device:
            student = adapter.new_denoiser(dtype)
        if config.model.quantization != "none":
            quantise(student, config.model.quantization, device)
        table = ConditioningTable.build(rows(1), rows(prompts), dtype)
        if table_on_host(config, adapter.conditioning_shapes, prompts):
            table = _host_table(table, prompts, device)
        latents = torch.randn(prompts, *adapter.latent_shape) if config.rollout.start == "data" else None
    return Inputs(adapter, table, [""] * prompts, latents, student, base={})


def _host_table(table: ConditioningTable, prompts: int, device: torch.device) -> HostTable:
    """The same rows in host memory."""
    facts = {name: Row(shape=tuple(value.shape[1:])) for name, value in table.rows.items()}
    tensors = {name: value.cpu() for name, value in table.rows.items()}
    return HostTable(HostRows(facts=facts, tensors=tensors, lengths={}), range(1, prompts + 1), device)
