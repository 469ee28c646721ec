"""Sample grids of a run: pictures of the base above pictures of base + negative."""

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
    """A grid of pictures on prompts spread evenly over all prompts.

    base       the network as it was before training
    engine     the student, which is the negative
    prompts    prompt i belongs to row i + 1 of `table`

    All ranks draw the grid together, since ZeRO 3 needs all of them.
    """
    # Row 0 of the table is the empty prompt.
    count = min(log.sample_prompts, table.prompts)
    index = torch.arange(count, device=engine.device) * (table.prompts // count) + 1
    rows, empty = table.gather(index), table.empty(1)
    texts = [prompts[i - 1] for i in index.tolist()]
    settings = SamplerConfig(
        steps=log.sample_steps, guidance_scale=log.sample_guidance_scale, negative_prompt=log.negative_prompt
    )
    negatives = [None, Negative("the student", network=engine)]
    network = engine.module
    training = network.training
    network.eval()
    samplers = [GuidedSampler(adapter, base, negative) for negative in negatives]
    pictures = [sampler.images(rows, empty, range(count), settings) for sampler in samplers]
    network.train(training)
    captions = [f"{name}: {text}" for name in ("base", "base + negative") for text in texts]
    return image_grid(torch.cat(pictures), count, captions)
