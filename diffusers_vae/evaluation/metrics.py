"""Metrics of reconstructions against images, per image or per pair of sets, and confidence intervals."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from ..images.ranges import to_unit_range


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of images (B, C, H, W) in [-1, 1]; reconstructions are clamped,
    not rounded.

    It is at most 100 dB, a mean squared error of 1e-10 of the squared range: an exact copy would make every mean
    infinite.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # late: it loads matplotlib

    ratio = peak_signal_noise_ratio(
        reconstructions.clamp(-1, 1), images, data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=100.0)


def ssim(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity (B,), at most 1, of images (B, C, H, W) in [-1, 1] with sides of at least 6:
    Wang et al. 2004, with their Gaussian window of 11 pixels and std 1.5. It is computed on pixels in [0, 1], because
    it compares means, which have no zero in model range. Reconstructions are clamped, not rounded.

    As in torchmetrics, images are padded by reflection, 5 pixels on each side, without repeating the edge, and the mean
    is over windows at all pixels and channels. Wang et al. and scikit-image omit windows that cross the border, which
    gives other values.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # late: it loads matplotlib

    pixels, reconstructed = to_unit_range(images), to_unit_range(reconstructions.clamp(-1, 1))
    similarity = structural_similarity_index_measure(reconstructed, pixels, data_range=1.0, reduction="none")
    return cast(torch.Tensor, similarity).view(len(images))


def frechet_distance(of_images: torch.Tensor, of_reconstructions: torch.Tensor) -> float:
    """Return the distance between normal distributions with mean and covariance of the features (N, F): Heusel et al.
    2017, equation 6. With Inception features it is the FID, for reconstructions the rFID. Below about 10,000 images, it
    is biased upwards.

    The trace of the root of the product of the covariances is the sum of the singular values of the product of their
    factors, exact for any N. The eigenvalues of the product itself, which other code uses, are rank-deficient for N
    below F + 1, and were 0.5 % off for 100 images. The result is rounded to 6 decimals, the digits that do not depend
    on how sums are rounded.
    """
    means, factors, traces = [], [], 0.0
    for features in (of_images.double().cpu(), of_reconstructions.double().cpu()):
        count, size = features.shape
        means.append(features.mean(0))
        factor = (features - means[-1]) / (count - 1) ** 0.5
        if count > size:
            values, vectors = torch.linalg.eigh(factor.T @ factor)
            factor = (vectors * values.clamp(min=0).sqrt()).T
        factors.append(factor)
        traces += (factor**2).sum().item()
    both = torch.linalg.svdvals(factors[0] @ factors[1].T).sum().item()
    return round(((means[0] - means[1]) ** 2).sum().item() + traces - 2 * both, 6)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of `values` (N,), N at least 2: mean ± t s / √N, with the 0.975
    quantile t of Student's t distribution with N - 1 degrees of freedom and the sample std s. For normal values it
    covers the mean in 95 % of samples, for any N.
    """
    from scipy.special import stdtrit  # imported late, because encoding and reading latents work without it

    mean, count = values.mean(), len(values)
    half = stdtrit(count - 1, 0.975) * values.std(ddof=1) / count**0.5
    return float(mean - half), float(mean + half)
