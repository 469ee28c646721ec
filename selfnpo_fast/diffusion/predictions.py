"""What a network's raw output p says of the state x = alpha x0 + sigma eps, by prediction type.

flow is a flow model's velocity eps - x0, where alpha + sigma = 1; some networks give its negative,
-flow. The other types are those of models with alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import torch


def output_as_x0_eps(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(n, 4) float64 for noise levels alpha and sigma (n,): x0 = c0 x + c1 p and eps = c2 x + c3 p.

    prediction_type: epsilon, v_prediction, sample, flow or -flow.
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    columns = {
        "epsilon": lambda: (1 / alpha, -sigma / alpha, zero, one),
        "v_prediction": lambda: (alpha, -sigma, sigma, alpha),
        "sample": lambda: (zero, one, 1 / sigma, -alpha / sigma),
        "flow": lambda: (one, -sigma, one, alpha),
        "-flow": lambda: (one, sigma, one, -alpha),
    }
    return torch.stack(columns[prediction_type](), dim=-1)
