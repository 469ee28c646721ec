"""Where the scale of a LoRA's updates comes from: alpha, and PEFT's patterns for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from selfnpo_fast.runtime.errors import one_line, shortened
from selfnpo_fast.runtime.limits import MAX_NAME_CHARACTERS

_MOST_WILDCARDS = 256
"""Patterns with a wildcard of one file: each is held against every layer."""
_WILDCARD = ".*"
_PIECE = re.compile(r"[\w.-]*")


@dataclass(frozen=True)
class Scaling:
    """alpha of each layer."""

    alphas: dict[str, float]
    """alpha by the path of the layer."""
    alpha: float | None = None
    """alpha of all other layers; None: equal to the rank."""
    rank_stabilised: bool = False
    """Whether alpha is divided by the root of the rank (rsLoRA) instead of the rank."""

    def scale(self, layer: str, rank: int) -> float:
        """The factor of the product up down. Raises ValueError where it is not finite."""
        alpha = self.alphas.get(layer, self.alpha)
        if alpha is None:
            return 1.0
        if not math.isfinite(alpha):
            raise ValueError(f"is damaged: alpha of {layer} is not finite")
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    @classmethod
    def of_config(cls, config: dict, layers: Iterable[str]) -> Scaling:
        """The scaling of a PEFT LoraConfig: its lora_alpha, alpha_pattern and use_rslora.

        Raises ValueError for a form that is not supported, and for a config that is not readable.
        """
        kind = config.get("peft_type") or "LORA"
        if kind != "LORA":
            raise ValueError(f"is a {shortened(kind)} of PEFT, which is not supported; give a plain LoRA")
        if config.get("use_dora") or config.get("lora_bias"):
            form = "DoRA" if config.get("use_dora") else "LoRA with biases"
            raise ValueError(f"is a {form}, which is not supported; give a plain LoRA")
        alpha, pattern = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        if not isinstance(alpha, int | float) or not isinstance(pattern, dict):
            raise ValueError(
                f"says lora_alpha {shortened(alpha)}, alpha_pattern {shortened(pattern)} of itself: expected a number, "
                "a table"
            )
        try:
            return cls(_by_pattern(pattern, layers), float(alpha), bool(config.get("use_rslora")))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"has an alpha that is not readable: {one_line(error)}") from error


def _by_pattern(pattern: dict, layers: Iterable[str]) -> dict[str, float]:
    """alpha by layer, of PEFT's alpha_pattern, where the first key that matches counts.

    PEFT takes a key for a regular expression of the end of a layer's path, after a dot. Here a key
    is a name; `.*` in it stands for any letters, `^` before it for the path's start. No other
    regular expression is run, since one may take for ever. Raises ValueError for one.
    """
    keys = list(pattern)
    names: dict[str, int] = {}
    wild: list[tuple[int, bool, list[str]]] = []
    for i, key in enumerate(keys):
        anchored = key.startswith("^")
        pieces = key.removeprefix("^").removesuffix("$").split(_WILDCARD)
        pieces = [piece.replace("\\.", ".") for piece in pieces]
        if len(key) > MAX_NAME_CHARACTERS or not all(_PIECE.fullmatch(piece) for piece in pieces):
            raise ValueError(
                f"has an alpha_pattern that is not readable: {shortened(key)}; expected names of layers, in which .* "
                "may stand for any letters"
            )
        if len(pieces) == 1:
            names.setdefault(f"^{pieces[0]}" if anchored else pieces[0], i)
        else:
            wild.append((i, anchored, pieces))
    if len(wild) > _MOST_WILDCARDS:
        raise ValueError(f"has an alpha_pattern with {len(wild):,} wildcards; expected at most {_MOST_WILDCARDS}")
    alphas = {}
    for layer in layers:
        ends = [layer, *(layer[i + 1 :] for i, letter in enumerate(layer) if letter == ".")]
        found = [names[end] for end in (f"^{layer}", *ends) if end in names]
        found += [
            i for i, anchored, pieces in wild if any(_matches(end, pieces) for end in ends[: 1 if anchored else None])
        ]
        if found:
            alphas[layer] = float(pattern[keys[min(found)]])
    return alphas


def _matches(name: str, pieces: list[str]) -> bool:
    """Whether the name consists of these pieces in this order, with anything between them."""
    first, *middle, last = pieces
    if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
        return False
    position, end = len(first), len(name) - len(last)
    for piece in middle:
        position = name.find(piece, position, end)
        if position < 0:
            return False
        position += len(piece)
    return True
