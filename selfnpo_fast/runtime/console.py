"""What a person sees: our own lines, and none of the chatter of the libraries underneath."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

logger = logging.getLogger("selfnpo")

_CHATTY = ("DeepSpeed", "bitsandbytes", "diffusers", "transformers", "datasets", "torch.distributed", "peft", "httpx")


def quiet_libraries() -> None:
    """Raise the log level of the libraries we build on to errors; called by commands, never on import.

    Set SELFNPO_VERBOSE=1 to see everything.
    """
    if os.environ.get("SELFNPO_VERBOSE") == "1":
        return
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger")  # DeepSpeed's use of old collectives
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    # DeepSpeed logs its guess of the accelerator on import; on a machine with a GPU the guess is left to it.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Read by transformers and diffusers when they set up their own handlers.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def setup_logging(rank: int, log_file: Path | None = None) -> None:
    """Our logger: plain lines on standard error (rank 0), and the same with time stamps in `log_file`."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.addHandler(screen)
    if log_file is not None and rank == 0:
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.handleError = lambda record: None  # a full disk: the screen still has the line
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
