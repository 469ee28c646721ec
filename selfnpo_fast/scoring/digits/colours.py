"""Colours of digit pictures: whether ink and background are the ones that were asked for.

Shape letters: N pictures, P pixels, C colours of a palette.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from selfnpo_fast.scoring.digits.domain import Label, digits_domain

BORDER = 2
"""Pixels of the outer ring's width. Digits are padded by more, so the ring is background."""
INK_SHARE = 1 / 64
"""Share of the pixels taken for ink: 16 of 32 x 32.

The thinnest "one" of the test split has as many pixels near full ink."""


def background_colour(images: torch.Tensor) -> torch.Tensor:
    """Median colour of the outer ring, (N, 3) in 0..1, of images (N, 3, H, W) in [-1, 1]."""
    ring = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    return (images[:, :, ring].median(dim=2).values + 1) / 2


def ink_colour(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Mean colour of the pixels that are farthest from the background, (N, 3) in 0..1.

    `images`: (N, 3, H, W) in [-1, 1].
    `background`: (N, 3) in 0..1.

    The edges of a stroke are mixtures of ink and background. Mixtures lie on the straight line
    between the two in RGB, so that the pixels farthest along the line are the pure ink. The Lab
    colour space bends that line, and tells these palettes apart less surely under noise.
    """
    pixels_NP3 = (images.flatten(2).transpose(1, 2) + 1) / 2
    distance_NP = (pixels_NP3 - background[:, None]).norm(dim=2)
    farthest = distance_NP.topk(max(1, round(INK_SHARE * distance_NP.shape[1])), dim=1).indices
    return pixels_NP3.gather(1, farthest[:, :, None].expand(-1, -1, 3)).mean(dim=1)


def match_colours(images: torch.Tensor, labels: Sequence[Label]) -> torch.Tensor:
    """(N,) bool: background and ink of images (N, 3, H, W) are both what the N labels ask for.

    A picture whose "ink" is nearer to its background than to any ink of the palette is blank and
    matches nothing.
    """
    domain = digits_domain()
    background_N3 = background_colour(images)
    ink_N3 = ink_colour(images, background_N3)
    to_backgrounds_NC = torch.cdist(background_N3, domain.background_rgb.to(images.device))
    to_inks_NC = torch.cdist(ink_N3, domain.ink_rgb.to(images.device))
    asked_background = torch.tensor([label.background for label in labels], device=images.device)
    asked_ink = torch.tensor([label.ink for label in labels], device=images.device)
    drawn = (ink_N3 - background_N3).norm(dim=1) > to_inks_NC.amin(dim=1)
    return drawn & (to_backgrounds_NC.argmin(dim=1) == asked_background) & (to_inks_NC.argmin(dim=1) == asked_ink)
