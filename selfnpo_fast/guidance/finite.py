"""The look at what a sampler has drawn: numbers that are not finite make black pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from selfnpo_fast.runtime.errors import RunError


def check_finite(
    result: torch.Tensor,
    latents: torch.Tensor,
    seeds: Sequence[int],
    scale: str,
    networks: Mapping[str, object],
) -> None:
    """Raise RunError where the result of a call is not finite; the host waits for the device once.

    `networks` are those that computed the result, by name, of which a damaged one is named; `scale`
    is guidance_scale in words.

    Shapes:
    - result: (N, ...), the pictures or the latents of N seeds.
    - latents: (N, ...), those that the result was made from.
    """
    if torch.stack(result.aminmax()).isfinite().all():
        return
    # Only now look closer: what went wrong first, and is it a network's weights?
    what, values, mend = "latents", latents, "take a lower guidance_scale, a weaker negative, or networks in float32"
    if latents.isfinite().all():
        what, values = "pictures", result
        mend = "the latents are finite: take an autoencoder in float32, and look at its scaling_factor"
    bad = values.flatten(1).isfinite().all(1).logical_not().nonzero().flatten().tolist()
    for name, network in networks.items():
        weight = _damaged(network)
        if weight is not None:
            mend = f"the weights are damaged: {weight} of the {name} is not finite"
            break
    raise RunError(
        f"{what}: {len(bad)} of {len(seeds)} are not finite at guidance_scale {scale}, the first is that of "
        f"seed {seeds[bad[0]]}; {mend}"
    )


def _damaged(network: object) -> str | None:
    """The first weight of a network that is not finite; None where there is none."""
    if not isinstance(network, nn.Module):
        return None
    weights = (*network.named_parameters(), *network.named_buffers())
    return next((name for name, weight in weights if not weight.isfinite().all()), None)
