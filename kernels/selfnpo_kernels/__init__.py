"""Fused operations of truncated diffusion fine-tuning and negative guidance.

The package needs no other package than torch. `ops.py` describes the functions; `backends.py`
chooses what serves a call: Triton on CUDA, a C++ extension on CPUs, plain PyTorch elsewhere.
"""

from selfnpo_kernels import backends
from selfnpo_kernels.ops import (
    TdftRules,
    TdftTables,
    affine_noise,
    ema_update,
    guidance_rescale,
    guided_step,
    normal,
    tdft_step,
    x0_loss,
)
from selfnpo_kernels.rng import Draw, NoiseKey, draw_id, permute, philox, randint, uniform

__all__ = [
    "Draw",
    "NoiseKey",
    "TdftRules",
    "TdftTables",
    "affine_noise",
    "backends",
    "draw_id",
    "ema_update",
    "guidance_rescale",
    "guided_step",
    "normal",
    "permute",
    "philox",
    "randint",
    "tdft_step",
    "uniform",
    "x0_loss",
]
