"""Pictures of the digits report: drawn once, cached under a work folder.

The cases of a report are the 560 prompts, once for each training seed. Every arm draws the same
prompts from the same noise; an arm has one negative per training seed, and each negative draws one
block of 560.
"""

from __future__ import annotations

from pathlib import Path

import torch

from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.scoring.digits.cases import make_cases
from selfnpo_fast.scoring.results import Case

STEPS = 10
"""Solver steps of every picture."""
PROMPTS = 560
"""Prompts of the digits domain; the pictures of one block."""
BASE = "base"
"""The arm of plain guidance."""


class Painter:
    """A `scoring.sweep.Generate` for arms that are added one by one.

    `runs` is the number of training runs of an arm; `seed` chooses the prompts' order and the
    pictures' noise.
    """

    def __init__(self, work: Path, runs: int, seed: int) -> None:
        self.folder = work / f"pictures-seed{seed}"
        self.adapter = load_adapter("digits")
        self.base = self.adapter.load_denoiser(torch.float32)
        self.cases: list[Case] = make_cases(PROMPTS * runs, seed)
        self.case_of_seed = {case.seed: i for i, case in enumerate(self.cases)}
        cpu = torch.device("cpu")
        distinct = sorted({case.prompt for case in self.cases})
        index_of = {prompt: i for i, prompt in enumerate(distinct)}
        self.prompt_index = torch.tensor([index_of[case.prompt] for case in self.cases])
        self.table = self.adapter.encode_prompts(distinct, cpu)
        self.empty = self.adapter.encode_empty(cpu)
        self.arms: dict[str, tuple[list[Path], str]] = {BASE: ([], "empty")}
        self.cache: dict[tuple[str, float], torch.Tensor] = {}

    def add(self, arm: str, negatives: list[Path], prompt: str) -> None:
        """Adds an arm: one negative per training run, under the `empty` or the `same` prompt."""
        self.arms[arm] = (negatives, prompt)

    def all_of(self, arm: str, scale: float) -> torch.Tensor:
        """All pictures (N, 3, 32, 32) float32 of an arm at a scale."""
        if scale == 1:
            arm = BASE  # at guidance scale 1 no arm uses its negative
        if (arm, scale) not in self.cache:
            negatives, prompt = self.arms[arm]
            settings = SamplerConfig(steps=STEPS, guidance_scale=scale, negative_prompt=prompt)
            blocks = [
                self._block(block, folder, arm, settings)
                for block, folder in enumerate(negatives or [None] * (len(self.cases) // PROMPTS))
            ]
            self.cache[arm, scale] = torch.cat(blocks)
        return self.cache[arm, scale].float() / 127.5 - 1

    def _block(self, block: int, negative: Path | None, arm: str, settings: SamplerConfig) -> torch.Tensor:
        """The pictures (560, 3, 32, 32) uint8 of one training run, from the cache or drawn."""
        file = self.folder / arm.replace(" ", "-") / f"{settings.guidance_scale:g}-{block}.pt"
        if not file.exists():
            part = slice(block * PROMPTS, (block + 1) * PROMPTS)
            rows = {key: value[self.prompt_index[part]] for key, value in self.table.items()}
            loaded = load_negative(self.base, negative) if negative is not None else None
            seeds = [case.seed for case in self.cases[part]]
            images = GuidedSampler(self.adapter, self.base, loaded).images(rows, self.empty, seeds, settings)
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when whole, so that an interrupted program leaves no part of a file.
            temporary = file.with_suffix(".tmp")
            torch.save(((images + 1) * 127.5).round().byte(), temporary)
            temporary.rename(file)
        return torch.load(file, weights_only=True)

    def __call__(self, arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        """The pictures (N, 3, 32, 32) float32 of the cases with these seeds, of their prompts."""
        return self.all_of(arm, guidance_scale)[[self.case_of_seed[seed] for seed in seeds]]
