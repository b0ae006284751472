"""Training sets of precomputed latents, with or without their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data import ImageSet, ReadImages, TrainingSet
from ..latents.dataset import LatentDataset


@dataclass(frozen=True)
class ReadEncoded(ReadImages):
    """Images with the moments of their posteriors, (B, 2 * latent_channels, h, w)."""

    moments: torch.Tensor | None = None

    def blank(self) -> ReadEncoded:
        """Return one blank image with moments of 0."""
        assert self.moments is not None
        return ReadEncoded(**vars(super().blank()), moments=self.moments.new_zeros(1, *self.moments.shape[1:]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return pixels and moments."""
        assert self.moments is not None
        return super().tensors() | {"moments": self.moments}


class ImagesWithLatents(TrainingSet):
    """Images with the moments of their posteriors, for training a decoder alone."""

    def __init__(self, images: ImageSet, latents: LatentDataset):
        self.images, self.latents = images, latents
        self.rows = {index: row for row, index in enumerate(latents.indices.tolist())}

    @property
    def errors(self) -> tuple[str, ...]:
        return self.images.errors

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return self.images.fingerprint()

    def contents(self) -> str | None:
        return self.images.contents()

    def read(self, indices: Sequence[int]) -> ReadEncoded:
        read = self.images.read(indices)
        found = [
            row for row, position in enumerate(read.kept) if indices[position] in self.rows
        ]  # another read them once
        kept, pixels = [read.kept[row] for row in found], read.pixels[found]
        moments = self.latents.moments([self.rows[indices[position]] for position in kept])
        return ReadEncoded(pixels, kept, read.errors, read.stop, read.unreachable, moments)

    def name(self, index: int) -> str:
        return self.images.name(index)


@dataclass(frozen=True)
class ReadLatents:
    """Rows of a latent cache, which are read once their noise is known."""

    indices: Sequence[int]
    latents: LatentDataset
    errors: tuple[str, ...] = ()

    @property
    def kept(self) -> Sequence[int]:
        return range(len(self.indices))

    def checked(self) -> ReadLatents:
        return self

    def blank(self) -> ReadLatents:
        raise AssertionError("encoded latents can be read")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return means of the posteriors."""
        return {"latents": self.latents.latents(self.indices)}


class LatentsAlone(TrainingSet):
    """Latents of a set of images, without unreadable ones, for training a diffusion model."""

    def __init__(self, latents: LatentDataset, images: ImageSet):
        self.latents, self.images = latents, images

    def __len__(self) -> int:
        return len(self.latents)

    def read(self, indices: Sequence[int]) -> ReadLatents:
        return ReadLatents(indices, self.latents)

    def name(self, index: int) -> str:
        return self.images.name(int(self.latents.indices[index]))
