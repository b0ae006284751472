"""`reconstruct` and `sample`: images through a model, to files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from ..data import ARCHIVES, IMAGE_SUFFIXES, Files, FileStore, left_out, no_image
from ..evaluation.evaluate import EvaluationConfig, reconstruct
from ..evaluation.metrics import psnr
from ..images.files import read_image
from ..images.grid import to_pil
from ..images.ranges import ValueRange, to_model_range
from ..images.raw_files import WRITTEN, FileKind, read_values, write_values
from ..messages import problem_list, showable
from ..models import Source, compression_ratio
from ..models.stock import ModelMixin
from ..reports.pages import save_signed
from ..reports.pictures import sample_picture
from ..storage import whole_file
from .arguments import MODEL, add_loading, latent_shape, load, parse, picture_path
from .parser import command_parser

logger = logging.getLogger(__name__)


def run_reconstruct(arguments: Sequence[str]) -> int:
    """Image files through the model."""
    parser = command_parser(
        "reconstruct",
        "MODEL IMAGE [IMAGE ...] [--out FOLDER]",
        "Encode and decode image files at their own size, and write what comes back as PNG files. A model that was "
        "trained with data.value_range, or with other channels than 1 and 3, reads files as they are and writes the "
        "kind, depth and range that came in. Sides that the model cannot take are padded with the border's pixels, and "
        "cut again. Files that cannot be read are named, and the others done.",
        "diffusers-vae reconstruct runs/mine photo.jpg more-photos/ --out reconstructions",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("images", nargs="+", help="Image files, or folders and archives of them.")
    add_loading(parser)
    parser.add_argument("--out", type=str, default="reconstructions", help="Folder for the files.")
    parser.add_argument("--seed", type=int | None, default=None, help="Decode a draw of this seed, not the mode.")
    parsed = parse(parser, arguments)
    model = load(parsed, parsed.model)
    files, out, failed, written = _image_files(parsed.images), Path(parsed.out), [], set()
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() in (file.resolve().parent for file, _ in files):
        raise ValueError(f"--out must be another folder than that of the images, got {out.resolve()}")
    channels = model.config.in_channels
    stated = Source(parsed.model, parsed.subfolder, parsed.revision).value_range()
    config = EvaluationConfig(
        reconstruction="mode" if parsed.seed is None else "sample", seed=parsed.seed or 0, round_to_8_bit=stated is None
    )
    for index, (file, content) in enumerate(tqdm(files, unit="img", disable=len(files) == 1)):
        try:
            kind = None
            if stated or channels not in (1, 3) or file.suffix.lower() == ".npy":
                pixels, kind = _as_it_is(file, channels, stated, content)
            else:
                pixels = read_image(file, channels, content=content)
            images = to_model_range(pixels[None].to(model.device))
            with torch.no_grad():
                reconstruction = _at_any_size(model, images, index, config)
            values = kind and (stated or EIGHT_BITS).from_model_range(reconstruction[0], kind.dtype)
        except ValueError as error:
            failed.append(str(error))
            continue
        path = out / (file.name if kind and kind.format in WRITTEN else f"{file.stem}.png")
        if path in written:  # of two folders
            path = out / f"{file.stem}-{index}{path.suffix}"
        written.add(path)
        with whole_file(path) as partial:
            if kind:
                write_values(partial, values, kind)
            else:
                save_signed(to_pil(reconstruction, 1).convert("L" if channels == 1 else "RGB"), partial)
        over = f" over {stated}" if stated else ""
        tqdm.write(f"{showable(path)}  PSNR {psnr(images, reconstruction).item():.2f} dB{over}")
    if failed:
        listed = "\n".join(map(showable, failed))
        raise ValueError(f"{len(failed)} of {len(files)} images could not be reconstructed:\n{listed}")
    return 0


EIGHT_BITS = ValueRange(0, 255)
Content = Callable[[], BinaryIO] | None
"""Opens an image file in an archive."""


def _as_it_is(file: Path, channels: int, stated: ValueRange | None, content: Content) -> tuple[torch.Tensor, FileKind]:
    """Pixels (C, H, W) in [0, 1] of a file, and its kind; ValueError naming it when its values are not in the range."""
    values, kind = read_values(file, channels, content)
    try:
        if not stated and values.dtype != np.uint8:
            raise ValueError(f"values must have 8 bits, as those that the model was trained on, got {values.dtype}")
        return (stated or EIGHT_BITS).to_unit(values), kind
    except ValueError as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error


def _image_files(names: Sequence[str]) -> list[tuple[Path, Content]]:
    """The image files that are named, and those below the folders and in the archives that are, as sets list them."""
    listed: list[tuple[Path, Content]] = []
    for name in names:
        path = Path(name)
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


def _at_any_size(model: ModelMixin, images: torch.Tensor, index: int, config: EvaluationConfig) -> torch.Tensor:
    height, width = images.shape[-2:]
    ratio = _compression(model)
    padding = (0, -width % ratio, 0, -height % ratio)
    padded = torch.nn.functional.pad(images, padding, mode="replicate")
    return reconstruct(model, padded, [index], config)[..., :height, :width]


def _compression(model: ModelMixin) -> int:
    """By what the sides of images must be divisible."""
    names = ("block_out_channels", "down_block_out_channels", "ch_mult")
    widths = next((model.config[name] for name in names if name in model.config), (1,))
    return compression_ratio(widths)


def run_sample(arguments: Sequence[str]) -> int:
    """Draws from the prior."""
    parser = command_parser(
        "sample",
        "MODEL [--count N] [--out FILE]",
        "Decode draws from the prior N(0, I) into one picture. Models with spatial latents need a diffusion model for "
        "whole images.",
        "diffusers-vae sample runs/mnist-mlp-z20 --count 64 --out samples.png",
    )
    parser.add_argument("model", help=MODEL)
    add_loading(parser)
    parser.add_argument("--count", type=PositiveInt, default=64, help="How many.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws.")
    parser.add_argument("--out", type=str, default="samples.png", help="The picture.")
    parsed = parse(parser, arguments)
    path = picture_path(parsed)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = load(parsed, parsed.model)
    with whole_file(path) as partial:
        save_signed(sample_picture(model, latent_shape(model), 16, parsed.seed, parsed.count), partial)
    print(showable(f"picture     {path}"))
    return 0
