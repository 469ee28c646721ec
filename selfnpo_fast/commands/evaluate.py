"""`selfnpo evaluate`: plain guidance against a negative model on the embedded digits model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable
from selfnpo_fast.runtime.options import parse_options

FULL_IMAGES = 1120
FULL_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(kw_only=True)
class EvaluateOptions:
    """Compare plain guidance with a negative model on the embedded digits model, over a sweep of guidance scales."""

    model: str = "digits"
    """A pipeline that draws the digits domain."""
    negative: list[str] = field(default_factory=list)
    """One or more runs' output folders (or their negative/ parts)."""
    negative_prompt: list[Literal["empty", "same"]] = field(default_factory=lambda: ["empty"])
    """Prompts of the negative branch, empty and/or same; each is an arm of its own."""
    images: int = 96
    """Pictures per arm and scale."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.5, 2.0, 3.0])
    """diffusers' guidance_scale (omega + 1) of all arms."""
    steps: int = 10
    """Solver steps."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM or Euler."""
    batch_size: int = 64
    """Pictures per forward."""
    seed: int = 0
    """Chooses prompts and noise."""
    full: bool = False
    """1,120 pictures per arm and ten scales instead."""
    brief: bool = False
    """Print the comparison in brief alone."""
    output: str = "runs/report"
    """Folder for report.json, report.md, the plots and the grid."""


def run(argv: list[str]) -> None:
    """The command with its words."""
    evaluate(parse_options(EvaluateOptions, argv, "selfnpo evaluate"))


def evaluate(options: EvaluateOptions) -> None:
    """Sweep, score, write the report and print it in brief."""
    import torch

    from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
    from selfnpo_fast.models import load_adapter
    from selfnpo_fast.negatives.load import load_negative
    from selfnpo_fast.scoring import report, sweep
    from selfnpo_fast.scoring.digits.scorers import DigitsScorers

    folder = check_writable(options.output)
    if options.full:
        options.images, options.guidance_scales = FULL_IMAGES, list(FULL_SCALES)
    for scale in options.guidance_scales:
        SamplerConfig(steps=options.steps, guidance_scale=scale, batch_size=options.batch_size)
    adapter = load_adapter(options.model)
    adapter.check_steps(options.steps)
    adapter.check_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = adapter.load_denoiser(torch.float32).to(device)
    arms = {"base": (GuidedSampler(adapter, denoiser), "empty")}
    for path in options.negative:
        negative = load_negative(denoiser, path)
        sampler = GuidedSampler(adapter, denoiser, negative)
        label = "negative" if len(options.negative) == 1 else Path(path).name
        for prompt in options.negative_prompt:
            suffix = "" if prompt == "empty" else ", same prompt"
            arms[f"base + {label}{suffix}"] = (sampler, prompt)
    if len(arms) != 1 + len(options.negative) * len(options.negative_prompt):
        raise UserError(f"negative: {options.negative} share a folder name; give folders of distinct names")
    cases = sweep.make_cases(options.images, options.seed)
    sweep.check_sweep(cases, list(arms), options.guidance_scales, "base", 5)
    distinct = sorted({case.prompt for case in cases})
    place = {prompt: i for i, prompt in enumerate(distinct)}
    table, empty = adapter.encode_prompts(distinct, device), adapter.encode_empty(device)

    def generate(arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        """Pictures of one arm at one scale (`scoring.evaluate.Generate`)."""
        sampler, negative_prompt = arms[arm]
        settings = SamplerConfig(
            steps=options.steps,
            guidance_scale=guidance_scale,
            solver=options.solver,
            negative_prompt=negative_prompt,
            batch_size=options.batch_size,
        )
        index = torch.tensor([place[prompt] for prompt in prompts], device=device)
        rows = {name: value[index] for name, value in table.items()}
        before = drawn.n

        def done(count: int) -> None:
            drawn.update(before + count - drawn.n)

        return sampler.images(rows, empty, seeds, settings, done)

    from tqdm import tqdm

    scorers = DigitsScorers.load()
    total = len(arms) * len(options.guidance_scales) * len(cases)
    with tqdm(total=total, unit="image", dynamic_ncols=True) as drawn:
        results = sweep.evaluate(generate, cases, list(arms), options.guidance_scales, scorers)
    folder.mkdir(parents=True, exist_ok=True)
    written = report.write_report(results, folder, asdict(options))
    print(report.brief(results))
    if not options.brief:
        print(f"report: {written['report.md']}")
    print(f"grid: {written['grid.png']}")
