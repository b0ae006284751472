"""Published networks that compare images perceptually: LPIPS, and the Inception features of the FID."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import nn

from ..images.ranges import to_uint8
from ..messages import showable
from ..storage import digest_of_file
from ..untrusted import load_pickle, open_regular

FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "inception": "weights-inception-2015-12-05-6726825d.pth",
}
"""File names of the weights that torchvision and torch-fidelity publish."""
SHA256 = {
    "alex": "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    "vgg": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "squeeze": "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
    "inception": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
}
"""Published SHA-256 of each of these files."""
SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}  # smallest side in pixels that leaves the last layer an input

logger = logging.getLogger(__name__)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, 0 for identical images: Zhang et al. 2018, version 0.1, by
    torchmetrics.

    The published weights of `net`, listed in `FILES`, are read from torch's cache, `$TORCH_HOME/hub/checkpoints`, and
    downloaded to it if missing.

    Raises:
        FileNotFoundError: If a file is missing and cannot be downloaded, with the folder to put it into.
        ValueError: If a file does not hold these weights.
    """

    def __init__(self, net: Literal["alex", "vgg", "squeeze"]):
        super().__init__()
        self.name, published = net, _published(net)
        from torchmetrics.functional.image import lpips

        networks: Any = lpips  # private in torchmetrics 1.9, whose public class downloads weights
        with torch.random.fork_rng(devices=[]):  # these random weights are replaced
            self.net: Any = networks._NoTrainLpips(net=net, pnet_rand=True)
        features = self.net.net
        # torchmetrics 1.9 cuts torchvision's `features` into slices, where the layers keep their numbers
        names = {name: re.sub(r"^slices?\.?\d+\.", "features.", name) for name in features.state_dict()}
        try:
            features.load_state_dict({name: published[theirs] for name, theirs in names.items()})
        except (KeyError, RuntimeError, TypeError) as error:
            raise _not_published(net, error) from error

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Raise ValueError for images that the network cannot process."""
        if channels not in (1, 3):
            raise ValueError(f"LPIPS is defined for 3 channels, and 1 is repeated to 3, got {channels}")
        if min(size) < SMALLEST[self.name]:
            raise ValueError(
                f"LPIPS with {self.name} needs sides of at least {SMALLEST[self.name]} pixels, got {size[0]}x{size[1]}"
            )

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Return the distance per image (B,) of images (B, 1 or 3, H, W) in [-1, 1]; grey is repeated to three
        channels. It is computed in float32, the weights' precision, for any dtype of images, under autocast too.
        """
        self.check(images.shape[1], (images.shape[2], images.shape[3]))
        dtype = next(self.net.parameters()).dtype
        images, reconstructions = (given.to(dtype).expand(-1, 3, -1, -1) for given in (images, reconstructions))
        # squared differences of unit-norm features: for near copies, 16 bits would leave only rounding errors
        with torch.autocast(images.device.type, enabled=False):
            return self.net(images, reconstructions).flatten()


class PerceptualLoss(nn.Module):
    """LPIPS as a loss for images of any number of channels: 3, 1 repeated to 3, or otherwise the mean over the channels
    as grey images. Arguments and errors are those of `LPIPS`.
    """

    def __init__(self, net: Literal["alex", "vgg", "squeeze"]):
        super().__init__()
        self.lpips = LPIPS(net)

    def check(self, size: tuple[int, int]) -> None:
        self.lpips.check(3, size)

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Return the loss per image (B,), 0 for identical images (B, C, H, W) in [-1, 1]."""
        channels = images.shape[1]
        if channels in (1, 3):
            return self.lpips(images, reconstructions)
        by_channel = self.lpips(*(given.flatten(0, 1).unsqueeze(1) for given in (images, reconstructions)))
        return by_channel.view(-1, channels).mean(1)


class InceptionFeatures(nn.Module):
    """The 2,048 features whose mean and covariance the FID compares: Heusel et al. 2017, with their network, as run by
    torch-fidelity and torchmetrics. Weights and errors are as for `LPIPS`.
    """

    def __init__(self):
        super().__init__()
        from torchmetrics.image.fid import FrechetInceptionDistance

        content: Any = io.BytesIO()  # torch-fidelity would unpickle any file
        torch.save(_published("inception"), content)
        content.seek(0)
        try:
            self.net = FrechetInceptionDistance(2048, feature_extractor_weights_path=content).inception
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise _not_published("inception", error) from error

    @staticmethod
    def check(channels: int, size: tuple[int, int]) -> None:
        """Raise ValueError for images that the network cannot process."""
        if channels not in (1, 3):
            raise ValueError(f"the FID is defined for 3 channels, and 1 is repeated to 3, got {channels}")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (B, 2048) of images (B, 1 or 3, H, W) in [-1, 1], rounded to 8 bits and scaled to 299x299."""
        self.check(images.shape[1], (images.shape[2], images.shape[3]))
        return self.net(to_uint8(images).expand(-1, 3, -1, -1))


def _published(net: str) -> dict[str, torch.Tensor]:
    """Return the published weights of a network from torch's cache, downloaded if missing. The file is opened once, by
    a reader that executes no code, and only the published file gets its name.
    """
    path = _path(net)
    if not path.exists():
        _download(net, path)
    with open_regular(path) as file:
        digest = digest_of_file(file)
        if digest != SHA256[net]:
            said = "%s is not the published file of %s: its SHA-256 is %s. Its figures cannot be compared with others"
            logger.warning(said, showable(path), net, digest)
        file.seek(0)
        return load_pickle(path, file)


def _path(net: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / FILES[net]


def _not_published(net: str, error: Exception) -> ValueError:
    return ValueError(f"{_path(net)} does not hold the published weights of {net}: {type(error).__name__}: {error}")


def _download(net: str, path: Path) -> None:
    if net == "inception":
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    else:
        named = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[net]
        url = torchvision.models.get_model_weights(named)["IMAGENET1K_V1"].url
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), SHA256[net])
    except (OSError, RuntimeError) as error:  # RuntimeError for a wrong hash
        raise FileNotFoundError(
            f"the weights of {net} are missing and cannot be downloaded ({error}). Put {path.name} into {path.parent}"
        ) from error
