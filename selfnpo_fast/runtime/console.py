"""What a person sees of a run: the lines of our log, without the chatter of the libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from selfnpo_fast.runtime.errors import one_line
from selfnpo_fast.runtime.screen import printable, safe

logger = logging.getLogger("selfnpo")

_CHATTY = (
    "DeepSpeed",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "httpx",
    "peft",
    "torch.distributed",
    "torch.utils._pytree",  # of what torchao registers
    "torchao",
    "transformers",
)


def quiet_libraries() -> None:
    """Let the libraries that we build on log errors only, unless SELFNPO_VERBOSE is 1.

    Commands call this. An import of the package does not.
    """
    if os.environ.get("SELFNPO_VERBOSE") == "1":
        return
    # DeepSpeed calls collectives of which torch warns.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    # DeepSpeed logs its guess of the accelerator on import; on a machine with a GPU the guess is
    # left to it.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # transformers and diffusers read these when they set up their handlers.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class _Lines(logging.Formatter):
    """Formats each record as one line: what is no visible character is escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def setup_logging(rank: int, log_file: Path | None = None) -> None:
    """Set up our logger: plain lines on standard error, and the same with times in `log_file`.

    Rank 0 logs all lines. Other ranks log errors only, to standard error, and name themselves.
    """
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    screen = logging.StreamHandler(safe(sys.stderr))
    screen.setFormatter(_Lines("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.addHandler(screen)
    if log_file is not None and rank == 0:
        try:
            file = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            logger.warning("%s could not be written: %s; the lines are on the screen alone", log_file, one_line(error))
            return
        file.handleError = lambda record: None  # on a full disk the screen still has the line
        file.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


_said: set[str] = set()


def say_once(message: str, *, level: int = logging.WARNING) -> None:
    """Log a line unless this process has logged the same line before."""
    if message not in _said:
        _said.add(message)
        logger.log(level, "%s", message)
