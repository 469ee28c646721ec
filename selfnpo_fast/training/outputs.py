"""What a person can look at during a run: progress bar, metrics.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.folders import write_file
from selfnpo_fast.runtime.limits import MAX_ROW_BYTES
from selfnpo_fast.runtime.screen import progress_bar


def json_row(row: dict) -> dict:
    """A row with null for each number that is not finite: JSON knows neither NaN nor infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class RunOutputs:
    """The files and the progress bar of one run, on rank 0.

    A file that cannot be read or written costs a warning, not the run. TensorBoard's is then given
    up, since its thread has ended; the others are tried again at the next row.
    """

    def __init__(self, folder: Path, update: int, updates: int) -> None:
        """Continue the record in `folder` after update `update` of `updates`.

        What an earlier run recorded beyond that update is dropped.
        """
        self.folder = folder
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet_tensorboard())
        self.writer: Any = None
        with self._warned("metrics.jsonl"):
            _drop_rows_after(folder / "metrics.jsonl", update)
        with self._warned("tensorboard"):
            self.writer = _open_tensorboard(folder / "tensorboard", update)
        self.bar = progress_bar(updates, "update", initial=update)

    def write(self, update: int, row: dict[str, float]) -> None:
        """Add a row of metrics to metrics.jsonl, to TensorBoard and to the progress bar."""
        with self._warned("metrics.jsonl"):
            _append_line(self.folder / "metrics.jsonl", json.dumps(json_row(row)))

        def add_scalars(writer: Any) -> None:
            for key, value in row.items():
                if key != "update":
                    writer.add_scalar(f"train/{key}", value, update)

        self._to_tensorboard(add_scalars)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['pairs_per_second']:.1f} pairs/s")

    def picture(self, update: int, name: str, grid: Image.Image) -> None:
        """Save a grid as `samples/NAME-NNNNNN.png` and in TensorBoard."""
        import numpy as np

        path = self.folder / "samples" / f"{name}-{update:06d}.png"
        with self._warned("samples"):
            path.parent.mkdir(exist_ok=True)
            grid.save(path)
            logger.info("samples (above: base; below: base + negative): %s", path)
        self._to_tensorboard(lambda writer: writer.add_image(name, np.asarray(grid), update, dataformats="HWC"))

    def close(self) -> None:
        """Finish the progress bar and TensorBoard's event file."""
        self.bar.close()
        self._to_tensorboard(lambda writer: writer.close())
        self._quiet.close()

    def _to_tensorboard(self, action: Callable[[Any], None]) -> None:
        """Run `action` on TensorBoard's writer, where there still is one."""
        if self.writer is not None:
            done = False
            with self._warned("tensorboard"):
                action(self.writer)
                done = True
            if not done:
                self.writer = None

    @contextlib.contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """Turns what goes wrong with a file into a warning."""
        try:
            yield
        except (OSError, UserError, MemoryError) as error:
            say_once(f"{self.folder / name} could not be written: {one_line(error)}; training goes on")


def _open_tensorboard(folder: Path, update: int) -> Any:
    """TensorBoard's writer, to which later steps than `update` are unknown."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=update + 1 if update else None)


@contextlib.contextmanager
def _quiet_tensorboard() -> Iterator[None]:
    """Keeps TensorBoard's thread from printing a traceback: its error is raised again at the next
    call of the writer."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__module__.partition(".")[0] != "tensorboard":
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _regular(path: str, flags: int) -> int:
    """Opens a file for `open`; a pipe, of which the opening may wait for ever, is an OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", path)
    return descriptor


def _append_line(path: Path, line: str) -> None:
    """Add a line to a file, or nothing: half a line would spoil the next one. Raises OSError."""
    content = line.encode() + b"\n"
    with open(path, "ab", buffering=0, opener=_regular) as file:
        end = file.tell()
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
