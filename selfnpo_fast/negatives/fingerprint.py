"""Which base a negative model was trained from: some weights of the base itself, noted in the negative's files.

A sum or a hash would change when weights are cast. Single weights move by at most 2^-9 of themselves in bfloat16 and
2^-11 in float16, but by more than that in any fine-tune worth the name.
"""

from __future__ import annotations

import torch

from selfnpo_fast.negatives.weights import WeightReader

TOLERANCE = 2**-7
"""Largest ratio |a - b| / |a| over a tensor's noted values: two casts to bfloat16 are below 2^-8."""
_TENSORS, _VALUES = 32, 16
_SUBNORMAL = 2**-24
"""float16 moves what is below 2^-14 by up to this much."""


def fingerprint(weights: WeightReader) -> dict[str, dict]:
    """By name: shape and 16 values, evenly spaced, of 32 evenly chosen matrices and kernels; fit for JSON."""
    names = sorted(name for name, shape in weights.shapes.items() if len(shape) > 1)
    count = min(_TENSORS, len(names))
    chosen = [names[i * len(names) // count] for i in range(count)]
    return {name: {"shape": list(weights.shapes[name]), "values": _values(weights.read(name))} for name in chosen}


def _values(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    places = torch.arange(_VALUES, device=flat.device) * len(flat) // _VALUES
    return flat[places].double().tolist()


def matches(saved: dict[str, dict], weights: WeightReader) -> bool:
    """Whether the weights are those whose fingerprint was saved, casts aside. ValueError for what is no fingerprint."""
    try:
        for name, entry in saved.items():
            if weights.shapes.get(name) != tuple(entry["shape"]):
                return False
            noted = torch.tensor(entry["values"], dtype=torch.float64)
            found = torch.tensor(_values(weights.read(name)), dtype=torch.float64)
            slack = TOLERANCE * noted.norm() + _SUBNORMAL * len(noted) ** 0.5
            if not (found - noted).norm() <= slack:
                return False
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"no fingerprint: {error}") from error
    return True


def base_record(path: str, revision: str | None, weights: WeightReader) -> dict:
    """What a negative model says of its base: where it was read from, and its fingerprint."""
    return {"path": path, "revision": revision, "fingerprint": fingerprint(weights)}
