"""What `engine.offload` moves from the device to host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfnpo_fast.doctor.costs import PlannedRun

OPTIMISER_STATE = ("moments", "fp32 masters", "fp32 gradients")
"""What DeepSpeed's CPUAdam keeps in host memory."""


def move_to_host(run: PlannedRun, resident: dict[str, int]) -> dict[str, int]:
    """Take off `resident` what `engine.offload` keeps in host memory, and return it by name.

    Of frozen blocks the largest counts as resident besides: one computes at a time, and with
    gradient checkpointing autograd keeps the weights of no other. On a CPU, host memory is the
    device's, and the optimiser's state stays in `resident`.
    """
    offload = run.config.engine.offload
    if offload == "optimizer" and run.device == "cuda":
        return {name: resident.pop(name) for name in OPTIMISER_STATE if name in resident}
    if offload == "blocks":
        sizes = run.denoiser.frozen_blocks
        frozen = sum(sizes)
        resident["block that computes"] = max(sizes, default=0)
        if run.device == "cuda":
            resident["weights"] -= frozen
            return {"frozen blocks": frozen}
    return {}
