"""The largest counts and sizes that are taken from a file or a config, each named once.

A bound is far above what a model, a data set or a run needs. A value beyond it is a mistake or an
attack, and would use up memory or time before anything else could notice.
"""

from __future__ import annotations

from selfnpo_fast.runtime.errors import UserError, shortened

MAX_PROMPT_CHARACTERS = 10_000
"""Characters of one prompt or caption, wherever it comes from."""
MAX_LINE_BYTES = 1 << 20
"""Bytes of one line of a text file or table, and of a caption's file."""
MAX_IMAGE_BYTES = 1 << 28
"""Bytes of one encoded picture."""
MAX_VIDEO_FRAMES = 1_000_000
"""Frames of a video that lie in a folder."""
MAX_SHARDS = 100_000
"""Files that one pattern of paths stands for."""
MAX_TAR_HEADER_BYTES = 1 << 20
"""Bytes of a member's name and further facts (pax, GNU) in a tar."""
MAX_TAR_MEMBERS = 10_000_000
"""Members of one tar; shards have some 10,000."""
MAX_NAME_CHARACTERS = 512
"""Characters of a tensor's or layer's name: regular expressions of files run on no longer ones."""
MAX_JSON_BYTES = 64 << 20
"""Bytes of a JSON file."""
MAX_FOLDER_ENTRIES = 100_000
"""Entries of a folder in which a model is looked for."""
MAX_RANK = 4_096
"""Rank of a LoRA that is read."""
MAX_SAMPLE_ID = 1 << 62
"""The id of a sample; a run never comes near it."""
MAX_ROW_BYTES = 1 << 16
"""Bytes of a row of metrics.jsonl; ours have some 500."""
MAX_TENSORS = 50_000
"""Tensors of one weights file; the largest models here have some 3,000."""
MAX_HEADER_BYTES = 16 << 20
"""Bytes of the header of a safetensors file: 50,000 tensors with long names need some 10 MiB."""
MAX_WIDTH = 1_000_000
"""Any whole number in a network's config: channels, features, entries of a vocabulary."""
MAX_LAYERS = 2_000
"""Layers that a network's config may ask for, and entries of one of its lists."""
MAX_TOKENS = 8_192
"""Tokens of one prompt that a tokenizer may ask for."""
MAX_RANKS = 100_000
"""Ranks of a run."""
MAX_UPDATES = 1_000_000_000
"""Optimiser updates of a run."""
MAX_PICTURES = 1_000
"""Pictures in one row of a sample grid."""
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
