"""The fingerprint of a base model: some of its weights, noted in the files of its negative.

A sum or a hash would change when weights are cast. A single weight moves by at most 2^-9 of its
size when it is cast to bfloat16, and by at most 2^-11 when it is cast to float16. Any real
fine-tune moves weights by more.
"""

from __future__ import annotations

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.experts import networks_of
from selfnpo_fast.negatives.weights import WeightReader, module_weights

DENOISER = "denoiser"
"""The key of a record that names one of two experts."""
TOLERANCE = 2**-7
"""Largest ratio |a - b| / |a| over a tensor's values: two casts to bfloat16 stay below 2^-8."""
_TENSORS, _VALUES = 32, 16
_SUBNORMAL = 2**-24
"""A cast to float16 moves values below 2^-14 by up to this much."""


def fingerprint(weights: WeightReader) -> dict[str, dict]:
    """Shape and 16 evenly spaced values, by name, of 32 evenly chosen matrices and kernels.

    JSON can hold the result.
    """
    names = sorted(name for name, shape in weights.shapes.items() if len(shape) > 1)
    count = min(_TENSORS, len(names))
    chosen = [names[i * len(names) // count] for i in range(count)]
    return {name: {"shape": list(weights.shapes[name]), "values": _values(weights.read(name))} for name in chosen}


def _values(tensor: torch.Tensor) -> list[float]:
    """16 evenly spaced elements of a tensor of any shape."""
    flat = tensor.detach().flatten()
    index = torch.arange(_VALUES, device=flat.device) * len(flat) // _VALUES
    return flat[index].double().tolist()


def matches(saved: dict[str, dict], weights: WeightReader, tolerance: float = TOLERANCE) -> bool:
    """Whether `saved` is the fingerprint of these weights, up to casts by default.

    Raises ValueError where `saved` is no fingerprint.
    """
    try:
        for name, entry in saved.items():
            if weights.shapes.get(name) != tuple(entry["shape"]):
                return False
            if not isinstance(entry["values"], list) or not all(isinstance(v, int | float) for v in entry["values"]):
                raise TypeError("its values are no numbers")
            expected = torch.tensor(entry["values"], dtype=torch.float64)
            values = torch.tensor(_values(weights.read(name)), dtype=torch.float64)
            slack = tolerance * expected.norm() + _SUBNORMAL * len(expected) ** 0.5
            if not (values - expected).norm() <= slack:  # also where a value is not finite
                return False
    except (TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no fingerprint: {error}") from error
    return True


def base_records(
    adapter: Adapter, denoiser: nn.Module, path: str, revision: str | None, schedule: ScheduleFacts
) -> dict[str, dict]:
    """`base_record` of each denoiser of a model by its name; of two experts each says which it is."""
    parts = dict(zip(adapter.denoiser_names, networks_of(denoiser).values(), strict=True))
    records = {
        name: base_record(path, revision, module_weights(network, path), schedule) for name, network in parts.items()
    }
    return records if len(records) == 1 else {name: record | {DENOISER: name} for name, record in records.items()}


def base_record(path: str, revision: str | None, weights: WeightReader, schedule: ScheduleFacts | None = None) -> dict:
    """What a negative's files record of its base: path, revision, fingerprint and schedule."""
    record = {"path": path, "revision": revision, "fingerprint": fingerprint(weights)}
    return record if schedule is None else record | {"schedule": schedule.record()}
