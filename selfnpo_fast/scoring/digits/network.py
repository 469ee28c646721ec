"""The small network behind the digits measures: one trunk, a digit head and a realness head.

Shape letters: B batch, D feature width.
"""

from __future__ import annotations

import torch
from torch import nn


class DigitScorer(nn.Module):
    """Reads an RGB picture of a digit.

    `width` is the number of channels of the first layers, `features` the feature width D.
    benchmarks/digits_model fits the network on real digits only.
    """

    def __init__(self, width: int = 32, features: int = 64) -> None:
        super().__init__()

        def block(cin: int, cout: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.SiLU())

        self.trunk = nn.Sequential(
            block(3, width, 1),
            block(width, width, 2),
            block(width, 2 * width, 1),
            block(2 * width, 2 * width, 2),
            block(2 * width, 2 * width, 1),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 16, features),
            nn.SiLU(),
        )
        self.digit = nn.Linear(features, 10)
        self.realness = nn.Linear(features, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(features, digit_logits, realness_logit)`, float32.

        `images`: (B, 3, 32, 32) float32 in [-1, 1].
        `features`: (B, D).
        `digit_logits`: (B, 10), before the softmax.
        `realness_logit`: (B,), before the sigmoid.
        """
        features_BD = self.trunk(images)
        return features_BD, self.digit(features_BD), self.realness(features_BD).squeeze(1)
