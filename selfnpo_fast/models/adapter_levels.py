"""What an adapter knows of noise levels: the scheduler, the times that a network is given, and which
denoiser owns a level.

Shape letter: B samples.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from selfnpo_fast.diffusion.flow_levels import shift_mu
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models import parts
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.folder import ModelFolder, loading
from selfnpo_fast.models.size import Size
from selfnpo_fast.runtime.errors import UserError


class HasLevels:
    """The part of `base.Adapter` that is about noise levels."""

    family: Family
    path: str
    index: dict
    folder: ModelFolder
    boundary: float | None
    denoiser_names: tuple[str, ...]
    trained_denoisers: tuple[str, ...]
    _expert: str | None
    _at_device: dict[tuple, Any]

    @property
    def scheduler(self) -> Any:
        """The model's diffusers scheduler, as it is configured; callers do not change it."""
        return self._scheduler

    @functools.cached_property
    def scheduler_config(self) -> dict:
        """The scheduler's config, from which solvers for sampling are made."""
        return dict(self._scheduler.config)

    @functools.cached_property
    def _scheduler(self) -> Any:
        config = self.folder.json("scheduler/scheduler_config.json")
        entry = self.index.get("scheduler")
        # The class that the index names goes before that of the config, as in diffusers.
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else config.get("_class_name")
        # On the CPU also where networks are being made on another device.
        with loading(self.path, "scheduler"), torch.device("cpu"):
            return parts.load_scheduler(name, config)

    @functools.cached_property
    def schedule(self) -> Levels:
        """Noise levels and prediction type, read from the pipeline's scheduler instance.

        Raises UserError for options that make a solver step non-linear in the network's output.
        """
        for option in ("clip_sample", "thresholding"):
            if self.scheduler_config.get(option):
                raise UserError(
                    f"model.path: {self.path}: the scheduler's {option} is true, and a clipped step is not linear; set "
                    "it to false in scheduler/scheduler_config.json"
                )
        with loading(self.path, "scheduler"):
            schedule = self.family.levels(self._scheduler, self.tokens())
            schedule.check()
            return schedule

    def time_of(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is given as time at noise levels t int64, in `family.time_dtype`."""
        key = ("time", t.device)
        if key not in self._at_device:
            time = self.schedule.time
            whole = self.family.time_dtype == torch.int64
            same = whole and torch.equal(time, torch.arange(len(time), dtype=time.dtype))
            self._at_device[key] = None if same else time.to(self.family.time_dtype).to(t.device)
        table = self._at_device[key]
        return t if table is None else table[t]

    def tokens(self, size: Size | None = None) -> int | None:
        """The number of tokens of a latent in the denoiser, where noise levels depend on it
        (dynamic shifting); `size` is by default the adapter's."""
        return None

    def check_steps(self, steps: int, field: str = "steps") -> None:
        """UserError that names `field` where the model has too few timesteps for `steps` solver
        steps."""
        most = self.schedule.num_train_timesteps
        if not 1 <= steps < most:
            expected = f"expected 1 to {most - 1} of the model's {most} timesteps"
            raise UserError(f"{field}: {steps} is not possible; {expected}")

    def set_timesteps(self, scheduler: Any, steps: int, size: Size) -> None:
        """Choose the timesteps of `steps` solver steps, for pictures or videos of a size, as the
        family's pipelines do.

        A scheduler whose shift depends on the size (dynamic shifting) is given its mu, by `tokens`.
        """
        if scheduler.config.get("use_dynamic_shifting"):
            scheduler.set_timesteps(steps, mu=shift_mu(scheduler.config, self.tokens(size)))
        else:
            scheduler.set_timesteps(steps)

    def expert(self, t: torch.Tensor) -> torch.Tensor:
        """Which of `denoiser_names` owns each noise level, by its place there: int64 like the levels
        t, which are of any shape."""
        if self.boundary is None:
            return torch.zeros_like(t)
        return (self.time_of(t) < self.boundary).long()

    @property
    def trained_levels(self) -> range:
        """The noise levels of the denoisers that are trained. Raises UserError where there is none."""
        levels = torch.arange(self.schedule.num_train_timesteps)
        owners = [self.denoiser_names.index(name) for name in self.trained_denoisers]
        own = levels[torch.isin(self.expert(levels), torch.tensor(owners))]
        if not len(own):
            raise UserError(
                f"model.expert: {self._expert} has no noise level: the boundary of {self.path} is {self.boundary:g} of "
                f"{len(levels)} timesteps"
            )
        return range(int(own[0]), int(own[-1]) + 1)
