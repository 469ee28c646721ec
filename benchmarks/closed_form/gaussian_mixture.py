"""A denoiser without a network: a Gaussian mixture whose posterior mean is known in closed form.

Everything is float64. Shape letters: B samples, M components, `...` the latent axes, D the product
of the latent axes. The noising is x_t = alpha x_0 + sigma eps, where alpha and sigma are numbers or
(B,), and alpha may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.diffusion.levels import Levels


def _column(value: torch.Tensor | float) -> torch.Tensor:
    """A value (B,) or a number, as float64 of shape (B, 1, 1) or (1, 1, 1)."""
    return torch.as_tensor(value, dtype=torch.float64).view(-1, 1, 1)


@dataclass(frozen=True)
class GaussianMixture:
    """M Gaussians with diagonal covariances.

    The weights are arguments of the methods, so that a prompt can be a set of weights.
    """

    means: torch.Tensor
    """(M, ...) float64."""
    variances: torch.Tensor
    """(M, ...) float64, the diagonals of the covariances."""

    def sample(self, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draws x_0, (B, ...) float64: one for each row of weights (B, M)."""
        component = torch.multinomial(weights, 1, generator=generator)[:, 0]
        mean, variance = self.means[component], self.variances[component]
        return mean + variance.sqrt() * torch.randn(mean.shape, dtype=torch.float64, generator=generator)

    def _log_joint(self, x, weights, alpha, sigma) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log p(x_t, component), up to the Gaussians' constant, with the parts it is made of.

        Returns three float64 tensors:
        the log densities (B, M),
        the differences of x_t and the components' means (B, M, D),
        the components' variances at x_t (B or 1, M, D).
        """
        alpha, sigma = _column(alpha), _column(sigma)
        variance = alpha.square() * self.variances.flatten(1) + sigma.square()
        gap = x.double().flatten(1)[:, None] - alpha * self.means.flatten(1)
        log_joint = weights.double().log() - 0.5 * (gap.square() / variance + variance.log()).sum(-1)
        return log_joint, gap, variance

    def log_density(self, x: torch.Tensor, weights: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """log p_t at x, (B,) float64, up to a constant.

        x is (B, ...), weights (B, M).
        """
        return self._log_joint(x, weights, alpha, sigma)[0].logsumexp(1)

    def posterior_mean(self, x: torch.Tensor, weights: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """E[x_0 | x_t = x], the exact x_{t->0}: (B, ...) float64.

        x is (B, ...), weights (B, M).
        """
        log_joint, gap, variance = self._log_joint(x, weights, alpha, sigma)
        per_component = self.means.flatten(1) + _column(alpha) * self.variances.flatten(1) / variance * gap
        return (log_joint.softmax(1)[..., None] * per_component).sum(1).view(x.shape)

    def moments(self, weights: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and covariance (D, D) of p_t, both float64, for weights (M,)."""
        weights, means = weights.double(), alpha * self.means.flatten(1)
        mean = weights @ means
        within = torch.diag(weights @ (alpha**2 * self.variances.flatten(1) + sigma**2))
        return mean, within + (weights[:, None] * (means - mean)).T @ (means - mean)


@dataclass(frozen=True)
class ExactDenoiser:
    """The raw output of a perfect network, in the prediction of its levels.

    It serves as `predict` of a GuidedPredictor. The conditioning `cond["weights"]` (B, M) holds the
    weights of the components, one row per sample.
    """

    mixture: GaussianMixture
    schedule: Levels

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        """The output, (B, ...) float64, at states x (B, ...) and timesteps t (B,)."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0 = self.mixture.posterior_mean(x, cond["weights"], alpha, sigma)
        alpha, sigma = (value.view(-1, *[1] * (x.ndim - 1)) for value in (alpha, sigma))
        # Where there is no noise, as at a flow's cleanest level, the network's guess of it is its mean.
        eps = torch.where(sigma == 0, 0.0, (x.double() - alpha * x0) / sigma.clamp(min=1e-300))
        outputs = {
            "sample": x0,
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "flow": eps - x0,
            "-flow": x0 - eps,
        }
        return outputs[self.schedule.prediction]
