"""How close reconstructions come to images, one value per image or one of two sets; intervals."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from ..images.ranges import to_unit_range


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,), dB, of (B, C, H, W) in [-1, 1]; reconstructions are clamped, not rounded.

    At most 100 dB, a mean squared error of 1e-10 of the squared range: an exact copy would make every mean infinite.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # here, since it loads matplotlib

    ratio = peak_signal_noise_ratio(
        reconstructions.clamp(-1, 1), images, data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    return ratio.clamp(max=100.0)


def ssim(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Structural similarity (B,), at most 1, of (B, C, H, W) in [-1, 1] with sides of at least 6; Wang et al. 2004,
    with their Gaussian window of 11 pixels and std 1.5, on pixels in [0, 1]: it compares means, which have no zero in
    model range. Reconstructions are clamped, not rounded.

    As in torchmetrics, images are padded by reflection, 5 pixels on each side, without repeating the edge, and the mean
    is over windows at all pixels and channels. Wang et al. and scikit-image leave out windows that cross the border,
    which gives other values.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # here, since it loads matplotlib

    pixels, reconstructed = to_unit_range(images), to_unit_range(reconstructions.clamp(-1, 1))
    similarity = structural_similarity_index_measure(reconstructed, pixels, data_range=1.0, reduction="none")
    return cast(torch.Tensor, similarity).view(len(images))


def frechet_distance(of_images: torch.Tensor, of_reconstructions: torch.Tensor) -> float:
    """Between normals with mean and covariance of the features (N, F): Heusel et al. 2017, equation 6; with those of
    Inception it is the FID, of reconstructions the rFID. Below some 10,000 images, it comes out too large.

    The trace of the root of the product of the covariances is the sum of the singular values of the product of their
    factors, exact for any N. The eigenvalues of the product itself, which other code takes, are of no full rank for N
    below F + 1, and were seen to be off by 0.5 % for 100 images. Rounded to 6 decimals, the digits that do not depend
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
    """95 % confidence interval of the mean of `values` (N,), N at least 2: mean ± t s / √N, with the 0.975 quantile t
    of Student's t distribution with N - 1 degrees of freedom and the sample std s. For normal values it covers the mean
    in 95 % of samples, whatever N.
    """
    from scipy.special import stdtrit  # here, since latents can be encoded and read without it

    mean, count = values.mean(), len(values)
    half = stdtrit(count - 1, 0.975) * values.std(ddof=1) / count**0.5
    return float(mean - half), float(mean + half)
