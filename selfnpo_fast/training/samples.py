"""Sample grids of a run: pictures of the base above pictures of base + negative.

Of videos a row is a video, and shows some of its frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import nn

from selfnpo_fast.config import LogConfig
from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig, SamplingCancelled
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import RunError, one_line
from selfnpo_fast.runtime.images import frame_grid, image_grid, shown_frames
from selfnpo_fast.runtime.stopping import asked_to_stop
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.engine import StudentEngine


class SampleGrids:
    """Draws the grids of a run, on prompts spread evenly over all prompts.

    Rank 0 draws. With ZeRO 3 a forward of the student needs all ranks, which make the latents
    together.

    A grid that cannot be drawn costs a warning: the model's folder is gone, or memory does not
    suffice. Only an error inside the networks under ZeRO 3 is raised, since other ranks may wait
    there. A grid under way ends where the run is asked to stop.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[[], Callable],
        engine: StudentEngine,
        table: ConditioningTable,
        prompts: list[str],
        log: LogConfig,
        world: World,
    ) -> None:
        """Nothing is drawn yet.

        base       returns the network as it was before training
        engine     the student, which is the negative
        prompts    prompt i belongs to row i + 1 of `table`
        """
        self.adapter, self.base, self.engine, self.table, self.world = adapter, base, engine, table, world
        # Row 0 of the table is the empty prompt.
        self.count = min(log.sample_prompts, table.prompts)
        self.indices = [i * (table.prompts // self.count) + 1 for i in range(self.count)]
        self.texts = [prompts[i - 1] for i in self.indices]
        self.settings = SamplerConfig(
            steps=log.sample_steps,
            guidance_scale=log.sample_guidance_scale,
            negative_prompt=log.negative_prompt,
            batch_size=1 if adapter.family.draws_videos else SamplerConfig.batch_size,
        )
        self._of_base: torch.Tensor | None = None
        """The latents of the base's pictures, which stay the same: they are drawn once."""

    def draw(self) -> Image.Image | None:
        """A grid, on rank 0; all ranks take part. None on other ranks, and where there is none."""
        together = self.engine.stage == 3
        if not (together or self.world.is_main):
            return None
        failures: list[str] = []
        base = latents = grid = None
        with noted(failures):
            base = self.base()
        # Where all ranks draw, none begins unless all can.
        if together:
            failures = [line for of_rank in self.world.gather(failures) for line in of_rank]
        if not failures:
            # Ranks that draw together have the same latents, and all say that they are not finite.
            with noted(failures, RunError if together else Exception):
                latents = self._latents(base)
        if latents is not None and self.world.is_main:
            with noted(failures):
                grid = self._grid(latents)
        for line in failures[:1]:
            say_once(f"the sample grid could not be drawn: {line}; training goes on (log.sample_every: -1 draws none)")
        return grid

    def _latents(self, base: Callable) -> torch.Tensor | None:
        """The latents (2 N, ...) of base and base + negative for N prompts; None in a stop."""
        together, network = self.engine.stage == 3, self.engine.module
        cancelled = (lambda: self.world.any(asked_to_stop())) if together else asked_to_stop
        negative = Negative("the student", network=self.engine if together else network)
        prompts, empty = self.table.fetch(torch.tensor(self.indices)), self.table.empty(1)

        def row(negative: Negative | None) -> torch.Tensor:
            # Without graphs: their memory comes on top of training's, for a few steps. Under ZeRO 3 a
            # forward gathers weights, which a replay would not.
            sampler = GuidedSampler(self.adapter, base, negative, graphs=False)
            return sampler.latents(prompts, empty, range(self.count), self.settings, cancelled=cancelled)

        with evaluating(network), contextlib.suppress(SamplingCancelled):
            if self._of_base is None:
                self._of_base = row(None)
            return torch.cat([self._of_base, row(negative)])
        return None

    def _grid(self, latents: torch.Tensor) -> Image.Image:
        """The page of pictures with their captions."""
        captions = [f"{name}: {text}" for name in ("base", "base + negative") for text in self.texts]
        if not self.adapter.family.draws_videos:
            return image_grid(self.adapter.decode(latents).cpu(), self.count, captions)
        # A prompt's video of the base above its video of base + negative; one is decoded at a time.
        indices = shown_frames(self.adapter.size.frames)
        order = [row for i in range(self.count) for row in (i, self.count + i)]
        frames = [self.adapter.decode(latents[i : i + 1])[:, indices].cpu() for i in order]
        return frame_grid(torch.cat(frames), indices, [captions[i] for i in order])


@contextlib.contextmanager
def noted(failures: list[str], kind: type[Exception] = Exception) -> Iterator[None]:
    """Adds the line of an error of a kind to `failures`. A grid is a side product: none is worth a
    run."""
    try:
        yield
    except kind as error:
        failures.append(one_line(error))


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Puts the network into evaluation mode inside it."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
