"""Reconstruction of image files of any size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..data import ARCHIVES, IMAGE_SUFFIXES, Files, FileStore, left_out, no_image
from ..images.files import read_image
from ..images.grid import save_signed, to_pil
from ..images.ranges import ValueRange, to_model_range
from ..images.raw_files import WRITTEN, FileKind, read_values, write_values
from ..messages import problem_list, showable
from ..models import compression_ratio
from ..models.stock import ModelMixin
from ..storage import whole_file
from .evaluate import EvaluationConfig, reconstruct
from .metrics import psnr

logger = logging.getLogger(__name__)

EIGHT_BITS = ValueRange(0, 255)
ImageFile = tuple[Path, Callable[[], BinaryIO] | None]
"""Path of an image file and, for one in an archive, a function that opens it."""


def image_files(names: Sequence[str | Path]) -> list[ImageFile]:
    """Return image files: those that are named, and those in named folders and archives, as sets list them.

    Raises:
        FileNotFoundError: If one does not exist, or a folder or archive holds no image.
    """
    listed: list[ImageFile] = []
    for path in map(Path, names):
        if path.is_dir() or path.suffix.lower() in ARCHIVES:
            files = Files(path)
            below = files.below(path)
            images = [file for file in below if file.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                raise FileNotFoundError(no_image(files, [path], below))
            if ignored := left_out(files, below):
                logger.warning("%d files look like images and are left out:\n%s", len(ignored), problem_list(ignored))
            store = FileStore(path, images, files.members)
            listed += [(file, store.opener(row, True)) for row, file in enumerate(images)]
        elif path.exists():
            listed.append((path, None))
        else:
            raise FileNotFoundError(f"there is no image {path.resolve()}")
    return listed


@torch.no_grad()
def reconstruct_files(
    model: ModelMixin,
    files: Sequence[ImageFile],
    out: Path,
    value_range: ValueRange | None = None,
    seed: int | None = None,
) -> Iterator[tuple[Path, float]]:
    """Encode and decode image files at their original size, and write the reconstructions into the folder `out`: as
    PNG, or in the kind, depth and range of the file if the model reads files without conversion (with a `value_range`,
    or with other channels than 1 and 3). Sides that the model cannot take are padded with border pixels and cropped
    again.

    Args:
        model: Any KL autoencoder, on the device to use.
        files: Files as listed by `image_files`.
        out: Folder to create, other than those of the files.
        value_range: Value range that the model was trained with; None for 8-bit images.
        seed: Seed of a sample from each posterior; None decodes its mode.

    Yields:
        Path of each reconstruction and its PSNR in dB.

    Raises:
        ValueError: At the end, naming files that cannot be read; at the start, if `out` is the folder of a file.
    """
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() in (file.resolve().parent for file, _ in files):
        raise ValueError(f"--out must be another folder than the images', got {out.resolve()}")
    channels, failed, written = model.config.in_channels, list[str](), set[Path]()
    config = EvaluationConfig(
        reconstruction="mode" if seed is None else "sample", seed=seed or 0, round_to_8_bit=value_range is None
    )
    for index, (file, content) in enumerate(files):
        kind = values = None
        try:
            pixels, kind = read_pixels(model, file, value_range, content)
            images = to_model_range(pixels[None].to(model.device))
            reconstruction = _at_any_size(model, images, index, config)
            if kind:
                values = (value_range or EIGHT_BITS).from_model_range(reconstruction[0], kind.dtype)
        except ValueError as error:
            failed.append(str(error))
            continue
        path = out / (file.name if kind and kind.format in WRITTEN else f"{file.stem}.png")
        if path in written:  # files of two folders may have one name
            path = out / f"{file.stem}-{index}{path.suffix}"
        written.add(path)
        with whole_file(path) as partial:
            if kind and values is not None:
                write_values(partial, values, kind)
            else:
                save_signed(to_pil(reconstruction, 1).convert("L" if channels == 1 else "RGB"), partial)
        yield path, psnr(images, reconstruction).item()
    if failed:
        listed = "\n".join(map(showable, failed))
        raise ValueError(f"{len(failed)} of {len(files)} images could not be reconstructed:\n{listed}")


def read_pixels(
    model: ModelMixin, file: Path, value_range: ValueRange | None, content: Callable[[], BinaryIO] | None = None
) -> tuple[torch.Tensor, FileKind | None]:
    """Read an image file for `model`: uint8 pixels (C, H, W), or float pixels in [0, 1] and the file's kind where the
    model reads files without conversion, as in `reconstruct_files`.

    Raises:
        ValueError: naming the file, when it cannot be read or its values are outside of the range.
    """
    channels = model.config.in_channels
    if value_range or channels not in (1, 3) or file.suffix.lower() == ".npy":
        return _as_it_is(file, content, channels, value_range)
    return read_image(file, channels, content=content), None


def _as_it_is(
    file: Path, content: Callable[[], BinaryIO] | None, channels: int, value_range: ValueRange | None
) -> tuple[torch.Tensor, FileKind]:
    """Return pixels (C, H, W) in [0, 1] of a file, and its kind; ValueError naming it if values are out of range."""
    values, kind = read_values(file, channels, content)
    try:
        if not value_range and values.dtype != np.uint8:
            raise ValueError(f"values must have 8 bits, like those that the model was trained on, got {values.dtype}")
        return (value_range or EIGHT_BITS).to_unit(values), kind
    except ValueError as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error


def padded(model: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """Pad images (B, C, H, W) at the bottom and the right with the pixels of the border, to the next sides that the
    model can halve as often as it does.
    """
    height, width = images.shape[-2:]
    names = ("block_out_channels", "down_block_out_channels", "ch_mult")
    ratio = compression_ratio(next((model.config[name] for name in names if name in model.config), (1,)))
    return torch.nn.functional.pad(images, (0, -width % ratio, 0, -height % ratio), mode="replicate")


def _at_any_size(model: ModelMixin, images: torch.Tensor, index: int, config: EvaluationConfig) -> torch.Tensor:
    height, width = images.shape[-2:]
    return reconstruct(model, padded(model, images), [index], config)[..., :height, :width]
