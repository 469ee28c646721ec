"""What a person can look at during a run: progress bar, metrics.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import one_line
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.folders import write_file
from selfnpo_fast.runtime.limits import MAX_ROW_BYTES


def json_row(row: dict) -> dict:
    """A row with null for each number that is not finite: JSON knows neither NaN nor infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class RunOutputs:
    """The files and the progress bar of one run, on rank 0.

    Once the run has begun, a file that cannot be written costs a warning, not the run.
    """

    def __init__(self, folder: Path, update: int, updates: int) -> None:
        """Continue the record in `folder` after update `update` of `updates`.

        What an earlier run recorded beyond that update is dropped. Raises OSError.
        """
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.folder = folder
        _drop_rows_after(folder / "metrics.jsonl", update)
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=update + 1 if update else None)
        self.bar = tqdm(total=updates, initial=update, unit="update", dynamic_ncols=True)

    def write(self, update: int, row: dict[str, float]) -> None:
        """Add a row of metrics to metrics.jsonl, to TensorBoard and to the progress bar."""
        self._try(lambda: self._write(update, row))

    def _write(self, update: int, row: dict[str, float]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_row(row)) + "\n")
        for key, value in row.items():
            if key != "update":
                self.writer.add_scalar(f"train/{key}", value, update)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['pairs_per_second']:.1f} pairs/s")

    def picture(self, update: int, name: str, grid: Image.Image) -> None:
        """Save a grid as `samples/NAME-NNNNNN.png` and in TensorBoard."""
        import numpy as np

        path = self.folder / "samples" / f"{name}-{update:06d}.png"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
            self.writer.add_image(name, np.asarray(grid), update, dataformats="HWC")
            logger.info("samples (above: base; below: base + negative): %s", path)

        self._try(write)

    def close(self) -> None:
        """Finish the progress bar and TensorBoard's event file."""
        self.bar.close()
        self._try(self.writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        """Run `action`; an OSError becomes a warning."""
        try:
            action()
        except OSError as error:
            logger.warning("the record in %s could not be written: %s; training goes on", self.folder, one_line(error))


def _drop_rows_after(path: Path, update: int) -> None:
    """Keep the rows of metrics.jsonl up to `update`.

    The run that wrote the later rows was killed before it saved a checkpoint. What is no row is
    left out: one line says so, unless it is the last row alone, which a kill may have cut.

    Raises UserError where the file cannot be read.
    """
    if not path.exists():
        return
    kept, bad = [], []
    with open_regular(path, path.name) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES), b""), 1):
            try:
                if json.loads(line.decode("utf-8"))["update"] <= update:
                    kept.append(line.decode("utf-8").rstrip("\n") + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                bad.append(number)
    if bad and bad != [number]:
        logger.warning(
            "%s: %d lines that are no rows of metrics are left out, the first is line %d", path, len(bad), bad[0]
        )
    write_file(path, "".join(kept))
