"""Published networks that judge how alike images look: LPIPS, and the Inception features of the FID."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .images import to_uint8

FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "inception": "weights-inception-2015-12-05-6726825d.pth",
}
"""Names under which torchvision and torch-fidelity publish the weights."""
SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Side in pixels below which nothing is left for the last layer."""


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, 0 for a copy: Zhang et al. 2018, version 0.1, by torchmetrics.

    Args:
        net: whose features are compared.
        weights: folder of the network's published weights, `FILES`; by default torch's cache, to which they are
            downloaded if they are not there.
        setting: what names `weights`, for errors.

    Raises:
        FileNotFoundError: saying which file goes where.
        ValueError: for a file that does not hold these weights.
    """

    def __init__(
        self,
        net: Literal["alex", "vgg", "squeeze"],
        weights: str | Path | None = None,
        setting: str = "evaluation.weights",
    ):
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.name = net
        with _weights_of(net, weights, setting), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's own arguments are called old
            self.net = LearnedPerceptualImagePatchSimilarity(net).net

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Refuse images that the network cannot see."""
        if channels not in (1, 3):
            raise ValueError(f"LPIPS is defined for 3 channels, and 1 is repeated to 3, got {channels}")
        if min(size) < SMALLEST[self.name]:
            raise ValueError(
                f"LPIPS with {self.name} needs sides of at least {SMALLEST[self.name]} pixels, got {size[0]}x{size[1]}"
            )

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Per image (B,), of (B, 1 or 3, H, W) in [-1, 1]; grey is repeated to three channels. Computed in the weights'
        precision, float32, whatever that of the images, under autocast too.
        """
        self.check(images.shape[1], tuple(images.shape[2:]))
        dtype = next(self.net.parameters()).dtype
        images, reconstructions = (given.to(dtype).expand(-1, 3, -1, -1) for given in (images, reconstructions))
        # differences of features of norm 1, squared: of near copies nothing but rounding would be left in 16 bits
        with torch.autocast(images.device.type, enabled=False):
            return self.net(images, reconstructions).flatten()


class PerceptualLoss(nn.Module):
    """LPIPS to train by, of images of any number of channels: 3 as they are; 1 is repeated to 3; of any other number
    each channel is seen by itself as a grey image, and the mean is taken. The reconstructions get gradient, the network
    none. Arguments and errors are those of `LPIPS`.
    """

    def __init__(self, net: Literal["alex", "vgg", "squeeze"], weights: str | Path | None = None):
        super().__init__()
        self.lpips = LPIPS(net, weights, setting="objective.perceptual_weights")

    def check(self, size: tuple[int, int]) -> None:
        """Refuse images that the network cannot see."""
        self.lpips.check(3, size)

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Per image (B,), 0 for a copy, of (B, C, H, W) in [-1, 1]."""
        channels = images.shape[1]
        if channels in (1, 3):
            return self.lpips(images, reconstructions)
        by_channel = self.lpips(*(given.flatten(0, 1).unsqueeze(1) for given in (images, reconstructions)))
        return by_channel.view(-1, channels).mean(1)


class InceptionFeatures(nn.Module):
    """The 2,048 features of which the FID compares mean and covariance: Heusel et al. 2017, with the network that
    they published, as torch-fidelity and torchmetrics run it. `weights` and errors are as for `LPIPS`.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchmetrics.image.fid import FrechetInceptionDistance

        path = None if weights is None else str(Path(weights) / FILES["inception"])
        with _weights_of("inception", weights, "evaluation.weights"):
            self.net = FrechetInceptionDistance(2048, feature_extractor_weights_path=path).inception

    @staticmethod
    def check(channels: int, size: tuple[int, int]) -> None:
        """Refuse images that the network cannot see."""
        if channels not in (1, 3):
            raise ValueError(f"the FID is defined for 3 channels, and 1 is repeated to 3, got {channels}")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 2048) of (B, 1 or 3, H, W) in [-1, 1], which are rounded to 8 bits and scaled to 299x299."""
        self.check(images.shape[1], tuple(images.shape[2:]))
        return self.net(to_uint8(images).expand(-1, 3, -1, -1))


@contextmanager
def _weights_of(net: str, folder: str | Path | None, setting: str) -> Iterator[None]:
    """Within, the published weights are loaded from `folder`, which `setting` names, and what fails names the file."""
    name, before = FILES[net], torch.hub.get_dir()
    usual = Path(before) / "checkpoints"
    path = usual / name if folder is None else Path(folder) / name
    if folder is not None and not path.exists():
        raise FileNotFoundError(f"the weights of {net} are not there: put {name} into {path.parent.resolve()}")
    try:
        if path.exists():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # who loads it does not look
        with tempfile.TemporaryDirectory() as scratch:
            if folder is not None:
                checkpoints = Path(scratch) / "checkpoints"
                checkpoints.mkdir()
                try:
                    os.symlink(path.resolve(), checkpoints / name)
                except OSError:  # not every system lets users make links
                    shutil.copyfile(path, checkpoints / name)
                torch.hub.set_dir(scratch)
            yield
    except ImportError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"the weights of {net} are not there and cannot be downloaded ({error}). Put {name} into {usual}, or into "
            f"a folder that {setting} names"
        ) from error
    except Exception as error:  # whatever a damaged file makes of pickle, zip and state dict
        raise ValueError(f"{path} does not hold the published weights of {net}: {error}") from error
    finally:
        torch.hub.set_dir(before)
