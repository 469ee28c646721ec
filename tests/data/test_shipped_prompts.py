"""The prompts that the package ships: many, distinct, varied, cleanly typed."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from selfnpo_fast.data.prompts import ASSETS, read_prompts


@pytest.fixture(scope="module")
def shipped() -> list[str]:
    return read_prompts("shipped")


def test_shipped_prompts_are_many_and_distinct(shipped):
    assert len(shipped) >= 2000
    bare = Counter(re.sub(r"[^a-z0-9 ]", "", prompt.lower()) for prompt in shipped)
    assert bare.most_common(1)[0][1] == 1
    assert (ASSETS / "prompts.txt").read_text(encoding="ascii").splitlines() == shipped


def test_shipped_prompts_have_every_length(shipped):
    words = Counter(min(len(prompt.split()) // 10, 4) for prompt in shipped)
    assert max(len(prompt.split()) for prompt in shipped) <= 60
    assert min(len(prompt.split()) for prompt in shipped) == 2
    assert all(words[tens] >= 40 for tens in range(4))


def test_shipped_prompts_open_in_many_ways(shipped):
    for length, share in ((1, 0.5), (2, 0.02), (3, 0.01)):
        openings = Counter(tuple(prompt.lower().split()[:length]) for prompt in shipped)
        opening, count = openings.most_common(1)[0]
        assert count < share * len(shipped), f"{count} of {len(shipped)} prompts open with {' '.join(opening)!r}"


def test_shipped_prompts_are_no_near_copies(shipped):
    """No two share more than 80% of their distinct words."""
    bags = [frozenset(re.findall(r"[a-z']+", prompt.lower())) for prompt in shipped]
    close = [
        (shipped[i], shipped[j])
        for i, a in enumerate(bags)
        for j in range(i)
        if len(a & (b := bags[j])) > 0.8 * len(a | b)
    ]
    assert not close


def test_shipped_prompts_say_a_and_an(shipped):
    wrong = re.compile(r"\ba (?!one-seat|uni[a-z]*\b)[aeiou]|\ban (?!hourglass)[^aeiou]", re.IGNORECASE)
    assert not [prompt for prompt in shipped if wrong.search(prompt)]


def test_shipped_prompts_are_cleanly_typed(shipped):
    wrong = re.compile(r"\b([a-z]+) \1\b|  | [,.;:]|[,.;:]{2}|[^\w .,;:'?/-]|[,;:-]$", re.IGNORECASE)
    assert not [prompt for prompt in shipped if wrong.search(prompt)]
