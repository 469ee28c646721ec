"""Short training runs in this process, and an action within one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import crash
import pytest

from selfnpo_fast import train
from selfnpo_fast.training.trainer import Trainer

CASE = {"ranks": 1, "zero": 0, "reference": "ema", "mode": "continuous", "lora": 0}


def run(model: Path, output: Path, *more: str, **changes) -> int:
    """Train CASE with these changes and more words; the exit code."""
    return train.main([*crash.words(CASE | changes, model, output), *more])


def at_update(monkeypatch: pytest.MonkeyPatch, update: int, action: Callable[[Trainer], None]) -> None:
    """Call `action(trainer)` after this update, before anything is saved."""
    original = Trainer.train_update

    def train_update(self, recorder):
        original(self, recorder)
        if self.update == update:
            action(self)

    monkeypatch.setattr(Trainer, "train_update", train_update)
