"""The largest counts and sizes that are taken from a file or a config, each named once.

A bound is far above what a model, a data set or a run needs. A value beyond it is a mistake or an
attack, and would use up memory or time before anything else could notice.
"""

from __future__ import annotations

from selfnpo_fast.runtime.errors import UserError, shortened

MAX_PROMPT_CHARACTERS = 10_000
"""Characters of one prompt or caption, wherever it comes from."""
MAX_NAME_CHARACTERS = 512
"""Characters of a tensor's or layer's name: regular expressions of files run on no longer ones."""
MAX_JSON_BYTES = 64 << 20
"""Bytes of a JSON file."""
MAX_TENSORS = 50_000
"""Tensors of one weights file; the largest models here have some 3,000."""
MAX_TOKENS = 8_192
"""Tokens of one prompt that a tokenizer may ask for."""
MAX_COUNT = 1_000_000
"""Intervals, pictures per prompt, steps and other small counts of a config or command line."""
MAX_ARMS = 1_000
"""Guidance scales, and negatives, of one evaluation."""


def check_count(field: str, value: int, least: int = 1, most: int = MAX_COUNT) -> None:
    """Raise UserError that names `field` where `value` is no integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{field}: {shortened(value)} is not possible; expected an integer from {least} to {most:,}")


def check_seeds(first: int, count: int) -> None:
    """Raise UserError where one of `count` seeds from `first` on is not in 0 to 2^63 - 1."""
    if first < 0 or first + count > 2**63:
        raise UserError(f"seed: {shortened(first)} is not possible; expected 0 to 2^63 - {count}")
