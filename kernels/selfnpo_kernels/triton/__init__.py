"""The operations as Triton kernels: a launcher for each op, with the arguments of its schema.

Importing this package imports triton, and decides whether the kernels are compiled or interpreted
(TRITON_INTERPRET=1). Each file holds a kernel and its launcher. `aot.py` compiles all kernels on a
machine without a GPU.
"""

from selfnpo_kernels.triton.affine_noise import affine_noise
from selfnpo_kernels.triton.common import interpreted
from selfnpo_kernels.triton.ema_update import ema_update
from selfnpo_kernels.triton.guidance_rescale import guidance_rescale
from selfnpo_kernels.triton.guided_step import guided_step
from selfnpo_kernels.triton.normal import normal
from selfnpo_kernels.triton.tdft_step import tdft_step
from selfnpo_kernels.triton.x0_loss import x0_loss, x0_loss_backward

__all__ = [
    "affine_noise",
    "ema_update",
    "guidance_rescale",
    "guided_step",
    "interpreted",
    "normal",
    "tdft_step",
    "x0_loss",
    "x0_loss_backward",
]
