"""`selfnpo evaluate`: plain guidance against a negative model on the embedded digits model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable, writing
from selfnpo_fast.runtime.limits import MAX_ARMS, check_count
from selfnpo_fast.runtime.locks import only_writer
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.runtime.screen import progress_bar, show

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from selfnpo_fast.commands.drawn import DrawnPictures
    from selfnpo_fast.guidance.sampler import GuidedSampler
    from selfnpo_fast.models import Adapter

BASELINE = "base"
"""The arm of plain guidance."""
FULL_IMAGES = 1120
"""Pictures per arm and scale with --full: every prompt of the digits twice."""
FULL_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""Guidance scales with --full."""


@dataclass(kw_only=True)
class EvaluateOptions:
    """Compare plain guidance with a negative model on the embedded digits, over guidance scales."""

    model: str = "digits"
    """A pipeline that draws the digits domain."""
    negative: list[str] = field(default_factory=list)
    """One or more runs' output folders (or their negative/ parts)."""
    negative_prompt: list[Literal["empty", "same"]] = field(default_factory=lambda: ["empty"])
    """Prompts of the negative branch, empty and/or same; each makes another arm."""
    images: int = 96
    """Pictures per arm and scale."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.5, 2.0, 3.0])
    """diffusers' guidance_scale (omega + 1) of all arms."""
    steps: int = 10
    """Solver steps."""
    solver: Literal["dpm++", "ddim", "euler", "unipc"] = "dpm++"
    """DPM-Solver++(2M), DDIM, Euler or UniPC of second order."""
    batch_size: int = 64
    """Pictures per forward."""
    seed: int = 0
    """Chooses prompts and noise."""
    full: bool = False
    """1,120 pictures per arm and ten scales instead."""
    brief: bool = False
    """Print only the brief comparison."""
    output: str = "runs/report"
    """Folder for report.json, report.md, the plots and the grid."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to make pictures."""

    sampler: GuidedSampler
    """Draws with the arm's negative, or without any."""
    negative_prompt: Literal["empty", "same"]
    """Prompt of the unconditional or negative branch."""
    digest: str
    """Of the weights of model and negative (`drawn.digest`)."""


def run(argv: list[str]) -> None:
    """`selfnpo evaluate` with the words that follow it."""
    evaluate(parse_options(EvaluateOptions, argv, "selfnpo evaluate"))


def evaluate(options: EvaluateOptions) -> None:
    """Sweeps guidance scales, scores the pictures, writes the report and prints it in brief.

    Raises UserError for mistakes in the options, before anything is written, and RunError where the
    report cannot be written.
    """
    folder = check_writable(options.output)
    with only_writer(folder):
        _evaluate(options, folder)


def _evaluate(options: EvaluateOptions, folder: Path) -> None:
    """`evaluate`, into a folder to which no other command writes."""
    import torch

    from selfnpo_fast.commands.drawn import DrawnPictures
    from selfnpo_fast.models import load_adapter
    from selfnpo_fast.scoring import report, sweep
    from selfnpo_fast.scoring.digits.cases import make_cases
    from selfnpo_fast.scoring.digits.measures import digits_measures
    from selfnpo_fast.scoring.digits.scorer import FittedScorer

    # Options that are wrong by themselves are refused before the networks are read.
    if options.full:
        options.images, options.guidance_scales = FULL_IMAGES, list(FULL_SCALES)
    _check_sampling(options)
    adapter = load_adapter(options.model)
    if adapter.family.draws_videos:
        raise UserError(f"model: {options.model} draws videos, and pictures are scored; selfnpo sample draws videos")
    adapter.check_steps(options.steps)
    adapter.check_size()
    # Arms, cases and measures are made and checked before any picture is drawn.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arms = _load_arms(options, adapter, device)
    cases, scales = make_cases(options.images, options.seed), options.guidance_scales
    measures = digits_measures(FittedScorer.load())
    sweep.check_sweep(cases, list(arms), scales, BASELINE, measures)
    kept = DrawnPictures(folder)
    drawing = _Drawing(options, arms, adapter, device, [case.prompt for case in cases], kept)
    if kept:
        logger.info("using the pictures that an earlier evaluation has left in %s", kept.folder)
    # Draw, measure and write.
    total = len(arms) * len(scales) * len(cases)
    try:
        with progress_bar(total, "image") as drawing.progress:
            results = sweep.evaluate(drawing, cases, list(arms), scales, measures, baseline=BASELINE)
        with writing(folder):
            written = report.write_report(results, folder, asdict(options))
    except BaseException:  # also Ctrl-C
        if kept:
            logger.info("what was drawn is kept in %s, and the same command does not draw it again", kept.folder)
        raise
    kept.remove()
    show(report.brief(results))
    if not options.brief:
        show(f"report: {written['report.md']}")
    show(f"grid: {written['grid.png']}")


def _check_sampling(options: EvaluateOptions) -> None:
    """Raises UserError for counts that are not possible, for scales that a sampler refuses, and for
    such as draw the same: a sampler draws the positive alone at every scale up to 1."""
    from selfnpo_fast.guidance.sampler import SamplerConfig
    from selfnpo_fast.scoring.digits.cases import SEEDS_PER_RUN

    for name in ("images", "steps", "batch_size"):
        check_count(name, getattr(options, name))
    check_count("seed", options.seed, least=0, most=2**63 // SEEDS_PER_RUN - 1)
    for name in ("guidance_scales", "negative"):
        if len(getattr(options, name)) > MAX_ARMS:
            raise UserError(f"{name}: {len(getattr(options, name)):,} are too many; give at most {MAX_ARMS}")
    for scale in options.guidance_scales:
        if scale < 1:
            raise UserError(f"guidance_scales: {scale} is not possible; expected at least 1, which is no guidance")
        SamplerConfig(steps=options.steps, guidance_scale=scale, batch_size=options.batch_size)


def _load_arms(options: EvaluateOptions, adapter: Adapter, device: torch.device) -> dict[str, Arm]:
    """The baseline, and an arm for every negative under every kind of negative prompt, by name.

    Raises UserError where a negative does not load or two share a name.
    """
    import torch

    from selfnpo_fast.commands.drawn import digest, digest_of
    from selfnpo_fast.guidance.sampler import GuidedSampler
    from selfnpo_fast.negatives.load import load_negative

    denoiser = adapter.load_denoiser(torch.float32).to(device)
    positive = digest(denoiser.state_dict())
    arms = {BASELINE: Arm(sampler=GuidedSampler(adapter, denoiser), negative_prompt="empty", digest=positive)}
    for path in options.negative:
        negative = load_negative(denoiser, path)
        sampler, weights = GuidedSampler(adapter, denoiser, negative), digest(positive, digest_of(negative))
        label = "negative" if len(options.negative) == 1 else Path(path).name
        for prompt in options.negative_prompt:
            suffix = "" if prompt == "empty" else ", same prompt"
            arms[f"{BASELINE} + {label}{suffix}"] = Arm(sampler=sampler, negative_prompt=prompt, digest=weights)
    if len(arms) != 1 + len(options.negative) * len(options.negative_prompt):
        raise UserError(f"negative: {options.negative} share a folder name; give folders of distinct names")
    return arms


class _Drawing:
    """Draws the pictures of all arms and moves a progress bar; a `scoring.sweep.Generate`.

    Each prompt is encoded once. Pictures that are kept are not drawn again.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        arms: dict[str, Arm],
        adapter: Adapter,
        device: torch.device,
        prompts: Sequence[str],
        kept: DrawnPictures,
    ) -> None:
        from selfnpo_fast.commands.drawn import digest

        self.options, self.arms, self.device, self.kept = options, arms, device, kept
        self.progress: tqdm
        """The bar of the running sweep; set by the caller."""
        distinct = sorted(set(prompts))
        self.index_of_prompt = {prompt: i for i, prompt in enumerate(distinct)}
        self.table, self.empty = adapter.encode_branches(distinct, device)
        self.model = digest(self.table, self.empty, adapter.schedule.identity(), adapter.vae_sha256)
        """The digest of all parts of the model but the denoiser that the pictures depend on."""

    def __call__(self, arm: str, guidance_scale: float, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        """Pictures (N, 3, H, W) float32 in [-1, 1] of one arm at one scale."""
        import torch

        from selfnpo_fast.commands.drawn import digest
        from selfnpo_fast.guidance.sampler import SamplerConfig

        settings = SamplerConfig(
            steps=self.options.steps,
            guidance_scale=guidance_scale,
            solver=self.options.solver,
            negative_prompt=self.arms[arm].negative_prompt,
            batch_size=self.options.batch_size,
        )
        key = digest(self.model, self.arms[arm].digest, settings, prompts, seeds)
        images = self.kept.get(key)
        if images is not None:
            self.progress.update(len(images))
            return images
        index = torch.tensor([self.index_of_prompt[prompt] for prompt in prompts], device=self.device)
        rows = {name: value[index] for name, value in self.table.items()}
        before = self.progress.n

        def on_progress(count: int) -> None:
            self.progress.update(before + count - self.progress.n)

        images = self.arms[arm].sampler.images(rows, self.empty, seeds, settings, on_progress)
        self.kept.keep(key, images)
        return images
