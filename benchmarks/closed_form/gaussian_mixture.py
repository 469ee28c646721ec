"""A denoiser without a network: a Gaussian mixture whose posterior mean is known in closed form, in float64.

Shape letters: B samples, M components; `...` the latent axes, D their product. alpha and sigma are (B,) or numbers,
x_t = alpha x_0 + sigma eps; alpha = 0 is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion.schedule import NoiseSchedule


def _column(value: torch.Tensor | float) -> torch.Tensor:
    """(B,) or a number -> (B, 1, 1) or (1, 1, 1) float64."""
    return torch.as_tensor(value, dtype=torch.float64).view(-1, 1, 1)


@dataclass(frozen=True)
class GaussianMixture:
    """M Gaussians with diagonal covariance; their weights are arguments, so that a prompt can be a set of weights."""

    means: torch.Tensor  # (M, ...) float64
    variances: torch.Tensor  # (M, ...) float64

    def sample(self, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x_0 (B, ...) float64, one for each row of weights (B, M)."""
        component = torch.multinomial(weights, 1, generator=generator)[:, 0]
        mean, variance = self.means[component], self.variances[component]
        return mean + variance.sqrt() * torch.randn(mean.shape, dtype=torch.float64, generator=generator)

    def _log_joint(self, x, weights, alpha, sigma) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log p(x_t, component) (B, M) without the Gaussians' constant; x_t - mean and variances (B or 1, M, D)."""
        alpha, sigma = _column(alpha), _column(sigma)
        variance = alpha.square() * self.variances.flatten(1) + sigma.square()
        gap = x.double().flatten(1)[:, None] - alpha * self.means.flatten(1)
        log_joint = weights.double().log() - 0.5 * (gap.square() / variance + variance.log()).sum(-1)
        return log_joint, gap, variance

    def log_density(self, x: torch.Tensor, weights: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """log p_t (B,) at x (B, ...), up to a constant that is the same everywhere; weights (B, M)."""
        return self._log_joint(x, weights, alpha, sigma)[0].logsumexp(1)

    def posterior_mean(self, x: torch.Tensor, weights: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """E[x_0 | x_t = x] (B, ...) float64, the exact x_{t->0}; weights (B, M)."""
        log_joint, gap, variance = self._log_joint(x, weights, alpha, sigma)
        per_component = self.means.flatten(1) + _column(alpha) * self.variances.flatten(1) / variance * gap
        return (log_joint.softmax(1)[..., None] * per_component).sum(1).view(x.shape)

    def moments(self, weights: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and covariance (D, D) of p_t for weights (M,)."""
        weights, means = weights.double(), alpha * self.means.flatten(1)
        mean = weights @ means
        within = torch.diag(weights @ (alpha**2 * self.variances.flatten(1) + sigma**2))
        return mean, within + (weights[:, None] * (means - mean)).T @ (means - mean)


@dataclass(frozen=True)
class ExactDenoiser:
    """The raw network output that a perfect network would give, for the schedule's prediction type.

    Serves as `predict` of a GuidedPredictor; the prompt is its row of component weights, `cond["weights"]` (B, M).
    """

    mixture: GaussianMixture
    schedule: NoiseSchedule

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        """Output (B, ...) float64 at states x (B, ...) and timesteps t (B,)."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0 = self.mixture.posterior_mean(x, cond["weights"], alpha, sigma)
        if self.schedule.prediction_type == "sample":
            return x0
        alpha, sigma = (value.view(-1, *[1] * (x.ndim - 1)) for value in (alpha, sigma))
        eps = (x.double() - alpha * x0) / sigma
        return eps if self.schedule.prediction_type == "epsilon" else alpha * eps - sigma * x0
