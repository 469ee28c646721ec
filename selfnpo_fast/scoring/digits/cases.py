"""The cases of a sweep over the embedded digits' prompts."""

from __future__ import annotations

import numpy as np

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.limits import check_count
from selfnpo_fast.scoring.digits.domain import Domain, digits_domain
from selfnpo_fast.scoring.results import Case

SEEDS_PER_RUN = 10**6
"""The most cases of a sweep: their seeds are seed x SEEDS_PER_RUN and the numbers after it."""


def make_cases(n: int, seed: int = 0, domain: Domain | None = None) -> list[Case]:
    """n cases over all prompts of a domain, the digits by default.

    The prompts come in a shuffled order that repeats when it is used up. Seeds differ between
    cases, and fewer cases are the first of more. Raises UserError for an n or seed out of range.
    """
    if not 1 <= n <= SEEDS_PER_RUN:
        raise UserError(f"cases: {n} is not possible; give a number from 1 to {SEEDS_PER_RUN}")
    check_count("seed", seed, least=0, most=2**63 // SEEDS_PER_RUN - 1)
    domain = domain or digits_domain()
    labels = domain.labels()
    order = np.random.default_rng(seed).permutation(len(labels))
    asked = [labels[order[i % len(order)]] for i in range(n)]
    return [
        Case(domain.prompt(label), seed * SEEDS_PER_RUN + i, domain.is_held_out(label)) for i, label in enumerate(asked)
    ]
