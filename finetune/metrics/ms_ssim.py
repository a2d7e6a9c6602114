"""MS-SSIM as a distance, for images of any size from 7 pixels on; it needs no weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Source: Wang et al. 2003, section 3.2; the exponents of the finest scale to the coarsest.
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2  # for values from 0 to 1
LARGE = 161  # pixels from which on five scales fit a window of 11


def ms_ssim_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return 1 - MS-SSIM of images `[N, C, H, W]` in [-1, 1] as `[N]`, exactly 0 for equal images.

    As many of the five scales as fit the window, with the first exponents rescaled to a sum of 1; the window
    has 7 pixels below 161, else 11. Channels are averaged. Source: Wang et al. 2003, "Multiscale structural
    similarity for image quality assessment", equation 7.
    """
    size = min(a.shape[2:])
    window = 11 if size >= LARGE else 7
    scales = sum(size > (window - 1) * 2**scale for scale in range(len(WEIGHTS)))
    offsets = torch.arange(window, device=a.device, dtype=torch.float32) - window // 2
    taps = torch.exp(-0.5 * (offsets / SIGMA).square())
    taps = taps / taps.sum()
    x, y = (a.float() + 1) / 2, (b.float() + 1) / 2
    similarity = x.new_ones(x.shape[:2])
    for scale, weight in enumerate(WEIGHTS[:scales]):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        contrast, full = dissimilarities(x, y, taps)
        part = 1 - (full if scale == scales - 1 else contrast)
        # Negative for inverted structure: a power of it is not a number.
        similarity = similarity * part.clamp_min(1e-6) ** (weight / sum(WEIGHTS[:scales]))
    return 1 - similarity.mean(dim=1)


def dissimilarities(
    x: torch.Tensor, y: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 - contrast·structure and 1 - SSIM as `[N, C]`: exactly 0 for equal images, unlike 1 - mean."""

    def blurred(img: torch.Tensor) -> torch.Tensor:
        channels = img.shape[1]
        for shape in ([1, -1], [-1, 1]):
            img = F.conv2d(img, taps.reshape(1, 1, *shape).expand(channels, -1, -1, -1), groups=channels)
        return img

    mean_x, mean_y = blurred(x), blurred(y)
    covariance = blurred(x * y) - mean_x * mean_y
    variances = blurred(x * x) - mean_x * mean_x + (blurred(y * y) - mean_y * mean_y)
    contrast = (2 * covariance + C2) / (variances + C2)
    ssim = contrast * (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    return (1 - contrast).mean(dim=[2, 3]), (1 - ssim).mean(dim=[2, 3])
