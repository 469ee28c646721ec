"""The operations in plain PyTorch: the oracle that every kernel is held against.

Arithmetic is float32, or float64 where an input is float64; results come in the dtype of the state they continue.
Shape letters: B samples; `...` the latent axes, any rank. Coefficients `k` are (B, n), one row per sample.
"""

from __future__ import annotations

import torch

from selfnpo_kernels.rng import NoiseKey, normal


def _wide(*tensors: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _column(k: torch.Tensor, j: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Column j of (B, n) shaped to broadcast over (B, ...)."""
    return k[:, j].to(dtype).view(-1, *[1] * (like.ndim - 1))


def affine_noise(x: torch.Tensor, k: torch.Tensor, noise: torch.Tensor | NoiseKey) -> torch.Tensor:
    """k0 x + k1 noise: forward diffusion, and the re-noising of Eq. 16.

    x (B, ...); k (B, 2); noise (B, ...) or the key of the normals to draw. Returns (B, ...) in x's dtype.
    """
    if isinstance(noise, NoiseKey):
        noise = normal(noise, tuple(x.shape[1:]))
    dtype = _wide(x, noise)
    return (_column(k, 0, x, dtype) * x.to(dtype) + _column(k, 1, x, dtype) * noise.to(dtype)).to(x.dtype)


def guided_step(
    pos: torch.Tensor | None, neg: torch.Tensor | None, x: torch.Tensor, w: float, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classifier-free guidance p = pos + w (pos - neg), then x0 = k0 x + k1 p and x_next = k2 x + k3 p.

    pos, neg (B, ...) raw network outputs; w = 0 needs no neg, w = -1 no pos. x (B, ...); k (B, 4).
    Returns `(x_next, x0)`, each (B, ...) in x's dtype.
    """
    dtype = _wide(x, pos, neg)
    if w == 0:
        p = pos.to(dtype)
    elif w == -1:
        p = neg.to(dtype)
    else:
        p = pos.to(dtype) + w * (pos.to(dtype) - neg.to(dtype))
    wide_x = x.to(dtype)
    k0, k1, k2, k3 = (_column(k, j, x, dtype) for j in range(4))
    return (k2 * wide_x + k3 * p).to(x.dtype), (k0 * wide_x + k1 * p).to(x.dtype)


def x0_loss(
    pred: torch.Tensor,
    x_s: torch.Tensor,
    target: torch.Tensor,
    k: torch.Tensor,
    kind: str,
    weight: torch.Tensor,
    c: float = 1e-3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of Eq. 17 on the student's x0 = k0 x_s + k1 pred.

    pred, x_s, target (B, ...); k (B, 2); weight (B,). `kind` "l2" is the mean square (Eq. 17), "huber" the authors'
    pseudo-Huber mean(sqrt(d^2 + c^2) - c). Returns the weighted mean over the batch, a scalar that carries gradients
    to `pred`, and the unweighted loss per sample (B,), detached.
    """
    dtype = _wide(pred, x_s, target)
    x0 = _column(k, 0, x_s, dtype) * x_s.to(dtype) + _column(k, 1, x_s, dtype) * pred.to(dtype)
    difference = (x0 - target.to(dtype)).flatten(1)
    square = difference.square()
    per_sample = (square if kind == "l2" else (square + c * c).sqrt() - c).mean(1)
    return (per_sample * weight.to(dtype)).mean(), per_sample.detach()


@torch.no_grad()
def ema_update(master: torch.Tensor, live: torch.Tensor, shadow: torch.Tensor | None, decay: float) -> None:
    """master <- decay master + (1 - decay) live, in place; a shadow of lower precision gets a copy."""
    master.lerp_(live.to(master.dtype), 1 - decay)
    if shadow is not None:
        shadow.copy_(master)
