"""A folder of results that all ranks write together, whole or not there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from selfnpo_fast.runtime.errors import RunError, one_line
from selfnpo_fast.runtime.folders import begin_aside, finish_aside, remove
from selfnpo_fast.runtime.world import World

Tensors = dict[str, torch.Tensor]


class Writer:
    """Writes the files of one folder; after the first failure nothing more, since all ranks have to go on together."""

    def __init__(self, target: Path, world: World) -> None:
        self.target, self.world, self.error = target, world, None
        self.folder = target
        if world.is_main:
            self._try("folder", lambda: setattr(self, "folder", begin_aside(target)))
        self.folder = Path(world.gather(str(self.folder))[0])
        self._agree()

    def _try(self, name: str, action) -> None:
        try:
            if self.error is None:
                action()
        except (OSError, SafetensorError) as error:
            self.error = f"{name}: {one_line(error)}"

    def save(self, name: str, items: Iterable[tuple[str, torch.Tensor]], *, here: bool, dtype=None, **options) -> None:
        """Write tensors by name where `here`; ranks for which it is not take part in gathering the items alone."""
        tensors = {}
        for key, value in items:
            if here:
                tensors[key] = value.to("cpu", dtype or value.dtype, copy=True).contiguous()
        if here:
            path = self.folder / name
            self._try(name, lambda: (path.parent.mkdir(exist_ok=True), save_file(tensors, path, **options)))

    def run(self, name: str, action) -> None:
        """Do something else to the folder on rank 0."""
        if self.world.is_main:
            self._try(name, action)

    def _agree(self) -> None:
        said = [f"rank {rank}, {text}" for rank, text in enumerate(self.world.gather(self.error)) if text]
        if said:
            if self.world.is_main and self.folder != self.target:
                try:
                    remove(self.folder)
                except OSError:
                    pass  # the next one to be written removes it
            raise RunError(f"{self.target} could not be written ({'; '.join(said)})")

    def finish(self) -> Path:
        """Put the folder into its place. Raises RunError on all ranks where any of them has failed."""
        self._agree()
        self.run("rename", lambda: finish_aside(self.folder, self.target))
        self._agree()
        return self.target
