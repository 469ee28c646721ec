"""`selfnpo correlate`: how similar the predictions are, and the variance of guidance."""

from __future__ import annotations

from dataclasses import dataclass

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.limits import check_count, check_seeds
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.runtime.screen import show


@dataclass(kw_only=True)
class CorrelateOptions:
    """Correlate the predictions of positive and negative, with the variance of guidance.

    With --base a value of alpha is recommended.
    """

    model: str = "digits"
    """The positive: `digits`, a folder in diffusers format, or a Hub id."""
    negative: str | None = None
    """The negative model: a run's output folder, full weights or a LoRA."""
    base: str | None = None
    """The model that the negative was trained from, if the positive is a fine-tune of it."""
    alpha: float = 1.0
    """Eq. 7: share of the positive's change from the base that the negative takes over, 0 to 1;
    other than 1 needs --base."""
    beta: float = 1.0
    """Eq. 7: share of the negative's change from the base, 0 to 1."""
    prompts: str = "shipped"
    """A file of prompts, `digits` or `shipped`."""
    limit: int = 4
    """Use at most this many of `prompts`."""
    guidance_scale: float = 7.5
    """guidance_scale as in diffusers (omega + 1)."""
    steps: int = 8
    """Number of timesteps to measure at."""
    seed: int = 0
    """Seed of the noise of the first prompt; the next prompts have the next seeds."""


def run(argv: list[str]) -> None:
    """`selfnpo correlate` with the words that follow it."""
    correlate(parse_options(CorrelateOptions, argv, "selfnpo correlate"))


def correlate(options: CorrelateOptions) -> None:
    """Measure the correlation and print it. Raises UserError for bad options."""
    import torch

    from selfnpo_fast.data.prompts import read_prompts
    from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
    from selfnpo_fast.guidance.correlation import alphas_of, correlation
    from selfnpo_fast.models import load_adapter
    from selfnpo_fast.negatives.experts import is_own_base
    from selfnpo_fast.negatives.load import load_negative

    if options.negative is None:
        raise UserError("negative: none given; expected --negative")
    for name in ("limit", "steps"):
        check_count(name, getattr(options, name))
    check_seeds(options.seed, options.limit)
    texts = read_prompts(options.prompts, limit=options.limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = load_adapter(options.model)
    adapter.check_steps(options.steps)
    positive = adapter.load_denoiser(torch.float32).to(device)
    shared = {"beta": options.beta}
    schedule = ScheduleFacts.of(adapter.schedule, options.model)
    negative = load_negative(
        positive, options.negative, alpha=options.alpha, base=options.base, schedule=schedule, **shared
    )
    rows, empty = adapter.encode_prompts(texts, device), adapter.encode_empty(device)
    alphas = None
    # A positive that is its own base has no change for alpha to share.
    if options.base is not None and not is_own_base(positive, options.base):
        alphas = alphas_of(positive, options.negative, options.base, **shared)
    scale, steps = options.guidance_scale, options.steps
    report = correlation(
        adapter, positive, negative, rows, empty, guidance_scale=scale, steps=steps, seed=options.seed, alphas=alphas
    )
    show(report)
    if alphas is None:
        show(
            "alpha has no effect: the positive is the base" if options.base else "alpha: give --base for a choice of it"
        )
