"""The `selfnpo` command: train, doctor, sample, evaluate, correlate, merge."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from selfnpo_fast.runtime.console import quiet_libraries, setup_logging
from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.folders import check_writable

USAGE = """usage: selfnpo COMMAND [options]

  train      make a negative model of a diffusion model          selfnpo train --config configs/digits.yaml
  doctor     say what a config will cost, loading nothing        selfnpo doctor --config configs/sd15_fast.yaml
  sample     draw pictures with a negative model                 selfnpo sample --negative runs/digits --prompt "..."
  evaluate   compare base and base + negative on digits          selfnpo evaluate --negative runs/digits
  correlate  say how alike positive and negative predict         selfnpo correlate --model M --negative N [--base B]
  merge      write theta + alpha eta + beta delta as a network   selfnpo merge --base B --negative N --output FOLDER

`selfnpo COMMAND --help` lists the options. guidance_scale everywhere is diffusers' (the paper's omega + 1).
"""

FULL_IMAGES = 1120
FULL_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(kw_only=True)
class SampleOptions:
    """Draw pictures, with or without a negative model."""

    model: str = "digits"
    """`digits`, a folder in diffusers format, or a Hub id."""
    negative: str | None = None
    """A training run's folder, a diffusers folder, a Hub id or a safetensors file, full weights or LoRA; else none."""
    alpha: float = 1.0
    """Eq. 7: how much of what the model has learned beyond `base` the negative has, too."""
    beta: float = 1.0
    """Eq. 7: strength of the negative's own weights."""
    base: str | None = None
    """The model that both the model and the negative come from, for alpha below 1 or a fine-tuned model."""
    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """A file of prompts (.txt, .jsonl, .csv, .parquet), `digits` or `shipped`."""
    limit: int = 64
    """Use at most this many of `prompts`."""
    images_per_prompt: int = 1
    """Pictures of each prompt, with consecutive seeds."""
    seed: int = 0
    """Seed of the first picture; the next ones count up."""
    steps: int = 20
    """Solver steps."""
    guidance_scale: float = 3.0
    """diffusers' guidance_scale (omega + 1)."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM or Euler."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: empty, or the same as the positive's."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    guidance_rescale: float = 0.0
    """0 to 1: diffusers' guidance_rescale."""
    resolution: int | None = None
    """Picture height and width; the model's own by default."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks."""
    batch_size: int = 16
    """Pictures per forward."""
    output: str = "samples"
    """Folder for the PNG files and grid.png."""


@dataclass(kw_only=True)
class EvaluateOptions:
    """Compare plain guidance with a negative model on the embedded digits model, over a sweep of guidance scales."""

    model: str = "digits"
    """A pipeline that draws the digits domain."""
    negative: list[str] = field(default_factory=list)
    negative_prompt: list[Literal["empty", "same"]] = field(default_factory=lambda: ["empty"])
    images: int = 96
    """Pictures per arm and scale."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.5, 2.0, 3.0])
    steps: int = 10
    """Solver steps."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM or Euler."""
    batch_size: int = 64
    """Pictures per forward."""
    seed: int = 0
    """Chooses prompts and noise."""
    full: bool = False
    brief: bool = False
    output: str = "runs/report"
    """Folder for report.json, report.md, the plots and the grid."""


LIST_HELP = {
    "guidance_interval": "shares of the steps between which guidance acts, two numbers from 0 to 1",
    "negative": "one or more runs' output folders (or their negative/ parts)",
    "negative_prompt": "prompts of the negative branch, empty and/or same; each is an arm of its own",
    "guidance_scales": "diffusers' guidance_scale (omega + 1) of all arms",
    "full": "1,120 pictures per arm and ten scales instead",
    "brief": "print the comparison in brief alone",
}


def parse_options(cls: type, argv: list[str], prog: str):
    """An instance of the options dataclass `cls` from `--name value` words. Raises UserError for what cannot be.

    Flags need no value and lists take several words: `--brief`, `--negative runs/a runs/b`.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    kinds, defaults = get_type_hints(cls), cls()
    flags = {name for name, kind in kinds.items() if kind is bool}
    lists = {name: get_args(kind)[0] for name, kind in kinds.items() if get_origin(kind) is list}
    parser = ArgumentParser(prog=prog, description=cls.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(cls, skip=flags | lists.keys(), fail_untyped=True)
    for name, kind in lists.items():
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=getattr(defaults, name), help=LIST_HELP[name])
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=LIST_HELP[name])
    try:
        return cls(**vars(parser.instantiate(parser.parse_args(argv))))
    except (ArgumentError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(one_line(error, 500)) from error


def check_seeds(seeds: list[int]) -> None:
    """UserError where a seed does not fit."""
    if seeds[0] < 0 or seeds[-1] >= 2**63:
        raise UserError(f"seed: {seeds[0]} is not possible; expected 0 to 2^63 - {len(seeds)}")


def check_request(adapter, steps: int) -> None:
    """UserError where the model cannot draw this."""
    from selfnpo_fast.guidance.sampler import check_steps

    check_steps(adapter, steps)
    _ = adapter.latent_shape  # complains about the resolution


def sample(options: SampleOptions) -> None:
    """Write one PNG per picture and grid.png; everything is checked before the folder is made."""
    import torch

    from selfnpo_fast.data.prompts import read_prompts
    from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
    from selfnpo_fast.models import load_adapter
    from selfnpo_fast.negatives.load import load_negative
    from selfnpo_fast.runtime.images import image_grid, to_pil
    from selfnpo_fast.runtime.world import DTYPES

    folder = check_writable(options.output)
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("prompt: give either --prompt TEXT or --prompts FILE")
    if options.images_per_prompt < 1:
        raise UserError(f"images_per_prompt: {options.images_per_prompt} is not possible; expected at least 1")
    settings = SamplerConfig(
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        solver=options.solver,
        negative_prompt=options.negative_prompt,
        batch_size=options.batch_size,
        guidance_interval=options.guidance_interval,
        guidance_rescale=options.guidance_rescale,
    )
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts, limit=options.limit)
    prompts = [text for text in texts for _ in range(options.images_per_prompt)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[options.precision]
    adapter = load_adapter(options.model, resolution=options.resolution)
    denoiser = adapter.load_denoiser(dtype).to(device)
    negative = None
    if options.negative is not None:
        negative = load_negative(
            denoiser, options.negative, alpha=options.alpha, beta=options.beta, base=options.base,
            denoiser_name=adapter.denoiser_name,
        )  # fmt: skip
    rows, empty = adapter.encode_prompts(prompts, device), adapter.encode_empty(device)
    seeds = [options.seed + i for i in range(len(prompts))]
    check_seeds(seeds)
    check_request(adapter, settings.steps)
    with _bar(len(seeds), "image") as done:
        images = GuidedSampler(adapter, denoiser, negative).images(rows, empty, seeds, settings, done)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, seed) in enumerate(zip(to_pil(images, least_side=0), seeds, strict=True)):
        picture.save(folder / f"{i:04d}-seed{seed}.png")
    columns = options.images_per_prompt if options.images_per_prompt > 1 else min(len(images), 8)
    image_grid(images, columns).save(folder / "grid.png")
    print(f"{len(images)} images at guidance_scale {options.guidance_scale:g}; grid: {folder / 'grid.png'}")


def _bar(total: int, unit: str):
    """A progress bar as a context manager that gives the callback `done(count)`."""
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def run():
        with tqdm(total=total, unit=unit, dynamic_ncols=True) as bar:
            yield lambda count: bar.update(count - bar.n)

    return run()


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
    check_request(adapter, options.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = adapter.load_denoiser(torch.float32).to(device)
    arms = {"base": (GuidedSampler(adapter, denoiser), "empty")}
    for path in options.negative:
        negative = load_negative(denoiser, path, denoiser_name=adapter.denoiser_name)
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
    from dataclasses import asdict

    written = report.write_report(results, folder, asdict(options))
    print(report.brief(results))
    if not options.brief:
        print(f"report: {written['report.md']}")
    print(f"grid: {written['grid.png']}")


def _train(argv: list[str]) -> None:
    from selfnpo_fast.train import train

    train(argv)


DOCTOR_HELP = """usage: selfnpo doctor [--memory_gib GIB] [--world_size RANKS] [--verify] [options of selfnpo train]

Prints memory per rank, FLOPs, time and file sizes of a config, computed from the model's config files alone.

  --memory_gib GIB     a card's memory: does it fit, and what would make it fit (default: 16, 24, 40 and 80)
  --world_size RANKS   GPUs (default: 1)
  --verify             hold the memory model against one real update on this machine, of the config that is named or
                       else of digits and half an SD1.5; exit code 1 where the peak is off by more than 10%
"""


def doctor(argv: list[str]) -> None:
    """Print what a config will cost; with --verify, RunError where the memory model is off."""
    from selfnpo_fast.doctor.report import VERIFIED, check, examine, split_options
    from selfnpo_fast.train import parse

    if "-h" in argv or "--help" in argv:
        print(DOCTOR_HELP)
    options, words = split_options(argv)
    if not options.verify:
        print(examine(parse(words).config, options))
        return
    table, holds = check([parse(words).config] if words else VERIFIED)
    print(table)
    if not holds:
        raise RunError("the memory model is off by more than 10%")


def _merge(argv: list[str]) -> None:
    from selfnpo_fast.negatives.merge import MergeOptions, merge_command

    merge_command(parse_options(MergeOptions, argv, "selfnpo merge"))


def _correlate(argv: list[str]) -> None:
    from selfnpo_fast.guidance.correlation import CorrelateOptions, correlate_command

    correlate_command(parse_options(CorrelateOptions, argv, "selfnpo correlate"))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "doctor": doctor,
    "sample": lambda argv: sample(parse_options(SampleOptions, argv, "selfnpo sample")),
    "evaluate": lambda argv: evaluate(parse_options(EvaluateOptions, argv, "selfnpo evaluate")),
    "correlate": _correlate,
    "merge": _merge,
}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 after one line about bad input, 1 after one about a run that cannot go on."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    quiet_libraries()
    setup_logging(0)
    try:
        COMMANDS[argv[0]](argv[1:])
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
