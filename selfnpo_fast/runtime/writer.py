"""A folder of results that all ranks write together, whole or not there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from selfnpo_fast.runtime.errors import NotFiniteError, RunError, one_line
from selfnpo_fast.runtime.finite import first_not_finite
from selfnpo_fast.runtime.folders import begin_aside, finish_aside, remove
from selfnpo_fast.runtime.world import World

Tensors = dict[str, torch.Tensor]
NamedTensors = Iterable[tuple[str, torch.Tensor]]
"""(parameter name, whole tensor) pairs, which all ranks have to iterate together."""


class Writer:
    """Writes the files of one folder on all ranks.

    A rank that fails to write a file writes nothing more, but stays in step with the other ranks.
    """

    def __init__(self, target: Path, world: World) -> None:
        """Prepare the folder aside from `target`. Raises RunError on all ranks where that fails."""
        self.target, self.world = target, world
        self.error: str | None = None  # the first failure of this rank
        self.not_finite: str | None = None  # the first tensor of this rank that must not be written
        self.folder = target
        if world.is_main:
            self._try("folder", lambda: setattr(self, "folder", begin_aside(target)))
        self.folder = Path(world.gather(str(self.folder))[0])
        self._agree()

    def _try(self, name: str, action) -> None:
        """Run `action`, unless this rank has failed before, and keep the message of its failure."""
        try:
            if self.error is None and self.not_finite is None:
                action()
        except (OSError, SafetensorError) as error:
            self.error = f"{name}: {one_line(error)}"

    def look(self, name: str, tensors: Tensors) -> None:
        """Look whether tensors of the file `name` are finite; else `finish` raises NotFiniteError.

        From then on this rank writes nothing more.
        """
        found = first_not_finite(tensors.items())
        if found and self.not_finite is None:
            self.not_finite = f"{name}: {found} ({str(tensors[found].dtype).removeprefix('torch.')})"

    def save(self, name: str, items: NamedTensors, *, write: bool, finite: bool = False, dtype=None, **options) -> None:
        """Write tensors, by key, to the safetensors file `name` on ranks where `write` is set.

        All ranks run through `items`, since an item may be gathered from all ranks. `dtype` is that
        of the file, by default each tensor's. With `finite` they are looked at before. `options` go
        to safetensors' `save_file`.
        """
        tensors = {}
        for key, value in items:
            if write:
                tensors[key] = value.to("cpu", dtype or value.dtype, copy=True).contiguous()
        if finite:
            self.look(name, tensors)
        if write:
            path = self.folder / name
            self._try(name, lambda: (path.parent.mkdir(exist_ok=True), save_file(tensors, path, **options)))

    def run(self, name: str, action) -> None:
        """Run `action` on rank 0, as part of writing `name`."""
        if self.world.is_main:
            self._try(name, action)

    def _agree(self) -> None:
        """Raise on all ranks where any rank has failed; the folder is deleted then."""
        outcomes = self.world.gather((self.error, self.not_finite))
        failures = [f"rank {rank}, {text}" for rank, (text, _) in enumerate(outcomes) if text]
        not_finite = [text for _, text in outcomes if text]
        if not (failures or not_finite):
            return
        if self.world.is_main and self.folder != self.target:
            try:
                remove(self.folder)
            except OSError:
                pass  # the next folder that is written here removes it
        if not_finite:
            raise NotFiniteError(f"{self.target} is not written: its values are not finite ({not_finite[0]})")
        raise RunError(f"{self.target} could not be written ({'; '.join(failures)})")

    def finish(self) -> Path:
        """Rename the folder to its target, which is returned.

        Raises RunError on all ranks where any rank has failed, and NotFiniteError where a rank has
        looked at tensors that are not finite.
        """
        self._agree()
        self.run("rename", lambda: finish_aside(self.folder, self.target))
        self._agree()
        return self.target
