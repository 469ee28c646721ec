"""`selfnpo export`: makes a negative model of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable
from selfnpo_fast.runtime.locks import only_writer
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.runtime.screen import show


@dataclass(kw_only=True)
class ExportOptions:
    """Write the negative model of a checkpoint, as the run itself would have at that update."""

    checkpoint: str | None = None
    """A checkpoint, such as runs/sdxl/checkpoints/update-0000250, or a run's output folder, whose
    newest one is taken."""
    output: str | None = None
    """A new or empty folder for the network or the LoRA file."""
    model: str | None = None
    """The base, where it is no longer at the run's model.path: a diffusers folder or a Hub id."""


def run(argv: list[str]) -> None:
    """`selfnpo export` with the words that follow it. Raises UserError for bad options."""
    from selfnpo_fast.training.export import export

    options = parse_options(ExportOptions, argv, "selfnpo export")
    if options.checkpoint is None:
        raise UserError("checkpoint: none given; expected --checkpoint")
    if options.output is None:
        raise UserError("output: none given; expected --output")
    with only_writer(check_writable(options.output)):
        folder = export(options.checkpoint, options.output, model=options.model)
    show(f"negative model: {folder}")
