"""`reconstruct` and `sample`: images through a model, to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from ..evaluation.reconstruct import image_files, reconstruct_files
from ..images.grid import save_signed
from ..messages import showable
from ..models import Source
from ..reports.pictures import sample_picture
from ..storage import whole_file
from .arguments import MODEL, add_loading, latent_shape, load, parse, picture_path
from .parser import command_parser


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
    stated = Source(parsed.model, parsed.subfolder, parsed.revision).value_range()
    files, over = image_files(parsed.images), f" over {stated}" if stated else ""
    found = reconstruct_files(model, files, Path(parsed.out), stated, parsed.seed)
    for path, figure in tqdm(found, total=len(files), unit="img", disable=len(files) == 1):
        tqdm.write(f"{showable(path)}  PSNR {figure:.2f} dB{over}")
    return 0


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
