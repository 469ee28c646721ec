"""Sample grids of a run: the base above base + negative, on the first prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from selfnpo_fast.config import LogConfig
from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.images import image_grid
from selfnpo_fast.training.engine import StudentEngine


def sample_grid(
    adapter: Adapter,
    base: Callable,
    engine: StudentEngine,
    table: ConditioningTable,
    prompts: list[str],
    log: LogConfig,
) -> Image.Image:
    """A grid of base above base + negative; all ranks draw, since ZeRO 3 needs them all.

    `base` is the network that was to be made worse, `engine` holds the negative as it is now.
    """
    # Prompts spread evenly over the table; row 0 is the empty one.
    index = torch.arange(min(log.sample_prompts, table.prompts), device=engine.device)
    index = index * (table.prompts // len(index)) + 1
    settings = SamplerConfig(
        steps=log.sample_steps, guidance_scale=log.sample_guidance_scale, negative_prompt=log.negative_prompt
    )
    rows, empty = table.gather(index), table.empty(1)
    texts = [prompts[i - 1] for i in index.tolist()]
    student = Negative("the student", network=engine)
    network = engine.module
    training = network.training
    network.eval()
    samplers = [GuidedSampler(adapter, base, negative) for negative in (None, student)]
    arms = [sampler.images(rows, empty, range(len(index)), settings) for sampler in samplers]
    network.train(training)
    captions = [f"{name}: {text}" for name in ("base", "base + negative") for text in texts]
    return image_grid(torch.cat(arms), len(index), captions)
