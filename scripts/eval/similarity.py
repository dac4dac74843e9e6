"""Similarity of two images: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

WINDOW, SIGMA = 11, 1.5
STABILISERS: Final = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
MOST_PSNR: Final = 100.0
"""The PSNR of equal images, so that means stay finite."""


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Returns the peak signal-to-noise ratio of two images, uint8 [height, width, 3], in dB."""
    error = float(np.square(first.astype(np.float64) - second).mean())
    return min(MOST_PSNR, 10 * np.log10(255**2 / error)) if error else MOST_PSNR


def ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Returns the mean structural similarity of two images, uint8 [height, width, 3], over pixels and channels.

    With the constants and the Gaussian window of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from
    error visibility to structural similarity", 2004; only whole windows count.
    """
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line /= line.sum()

    def smooth(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(values, line[None, None, :, None]), line[None, None, None])

    x, y = (torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[:, None] for picture in (first, second))
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    first, second = STABILISERS
    above = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    return float((above / ((mean_x**2 + mean_y**2 + first) * (variance_x + variance_y + second))).mean())
