"""Resumable stages: a stage saves its state now and then, and a later run goes on from there."""

from __future__ import annotations

import time
from pathlib import Path

import torch


class Progress:
    """Saves and restores the parts (network, optimiser, ...) of one stage in `work/<name>.pt`.

    A part is anything with `state_dict` and `load_state_dict`. `every` is the number of steps
    between two states.
    """

    def __init__(self, work: Path, name: str, every: int = 200) -> None:
        self.path, self.name, self.every = work / f"{name}.pt", name, every
        self.started = time.time()

    def restore(self, *parts) -> int:
        """Loads the parts in place where a state was saved; returns the step to go on from."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        print(f"{self.name}: going on from step {state['step']}", flush=True)
        return state["step"]

    def save(self, step: int, total: int, loss: torch.Tensor, *parts) -> None:
        """Prints the loss and saves the parts: each `every` steps, and after step `total`."""
        done = step + 1
        if done % self.every and done != total:
            return
        # Renamed when whole, so that an interrupted program leaves the last state.
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": done, "parts": [part.state_dict() for part in parts]}, temporary)
        temporary.rename(self.path)
        seconds = time.time() - self.started
        print(f"{self.name}: {done}/{total} loss {loss.item():.4f} {seconds:.0f} s", flush=True)
