"""`selfnpo doctor`: what a config will cost, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.options import parse_with_config
from selfnpo_fast.runtime.screen import show
from selfnpo_fast.train import DEFAULT_CONFIG


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Print memory per rank, FLOPs, time and file sizes of a config.

    They are computed from the config files of the model; no weights are loaded.
    """

    memory_gib: float | None = None
    """Memory of a GPU in GiB: does the run fit, and what would make it fit? By default 16, 24, 40
    and 80."""
    world_size: int = 1
    """Number of ranks (GPUs)."""
    verify: bool = False
    """Compare the memory model with one real update on this machine, of the config that is named or
    else of digits and of half an SD1.5. The exit code is 1 if the peak is off by more than 10%."""

    def __post_init__(self) -> None:
        if self.memory_gib is not None and not 0 < self.memory_gib < 2**20:
            raise UserError(f"memory_gib: {self.memory_gib:g} is not possible; expected GiB of a card, such as 24")
        if not 1 <= self.world_size <= 2**16:
            raise UserError(f"world_size: {self.world_size} is not possible; expected 1 to 65536 ranks")


def run(argv: list[str]) -> None:
    """`selfnpo doctor` with the words that follow it.

    Raises UserError for bad options, and RunError where --verify finds the memory model off.
    """
    from selfnpo_fast.doctor.report import VERIFIED, check, examine

    parsed = parse_with_config(DoctorOptions, TrainConfig, argv, "selfnpo doctor", DEFAULT_CONFIG)
    options = parsed.options
    if not options.verify:
        show(examine(parsed.config, memory_gib=options.memory_gib, world_size=options.world_size))
        return
    table, holds = check([parsed.config] if parsed.config_named else VERIFIED)
    show(table)
    if not holds:
        raise RunError("the memory model is off by more than 10%")
