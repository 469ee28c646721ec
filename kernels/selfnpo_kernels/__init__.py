"""Fused operations of truncated diffusion fine-tuning and negative guidance.

Importable alone: needs torch only. The functions here are the public contract; this version serves them all from the
pure-PyTorch reference in `reference.py`.
"""

from selfnpo_kernels.reference import affine_noise, ema_update, guided_step, x0_loss
from selfnpo_kernels.rng import Draw, NoiseKey, draw_id, normal, permute, philox, randint, uniform

__all__ = [
    "Draw",
    "NoiseKey",
    "affine_noise",
    "draw_id",
    "ema_update",
    "guided_step",
    "normal",
    "permute",
    "philox",
    "randint",
    "uniform",
    "x0_loss",
]
