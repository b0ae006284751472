"""`reconstruct` and `sample`: write what a model decodes to files."""

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
    """Encode and decode image files."""
    parser = command_parser(
        "reconstruct",
        "MODEL IMAGE [IMAGE ...] [--out FOLDER]",
        "Encode and decode image files at their original size, and write the reconstructions as PNG files. A model "
        "that was trained with data.value_range, or with a number of channels other than 1 and 3, reads files "
        "unconverted and writes the format, depth and range of the input. Sides that the model cannot take are padded "
        "with border pixels and cropped again. Unreadable files are skipped and reported.",
        "diffusers-vae reconstruct runs/mine photo.jpg more-photos/ --out reconstructions",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("images", nargs="+", help="Image files, or folders and archives of them.")
    add_loading(parser)
    parser.add_argument("--out", type=str, default="reconstructions", help="Folder for the reconstructions.")
    parser.add_argument(
        "--seed", type=int | None, default=None, help="Seed of a posterior sample to decode; null: decode the mode."
    )
    parsed = parse(parser, arguments)
    model = load(parsed, parsed.model)
    stated = Source(parsed.model, parsed.subfolder, parsed.revision).value_range()
    files, over = image_files(parsed.images), f" over {stated}" if stated else ""
    found = reconstruct_files(model, files, Path(parsed.out), stated, parsed.seed)
    for path, figure in tqdm(found, total=len(files), unit="img", disable=len(files) == 1):
        tqdm.write(f"{showable(path)}  PSNR {figure:.2f} dB{over}")
    return 0


def run_sample(arguments: Sequence[str]) -> int:
    """Decode samples from the prior."""
    parser = command_parser(
        "sample",
        "MODEL [--count N] [--out FILE]",
        "Decode samples from the prior N(0, I) and write them as one picture. Models with spatial latents need a "
        "diffusion model to generate coherent images.",
        "diffusers-vae sample runs/mnist-mlp-z20 --count 64 --out samples.png",
    )
    parser.add_argument("model", help=MODEL)
    add_loading(parser)
    parser.add_argument("--count", type=PositiveInt, default=64, help="Number of samples.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument("--out", type=str, default="samples.png", help="File for the picture.")
    parsed = parse(parser, arguments)
    path = picture_path(parsed)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = load(parsed, parsed.model)
    with whole_file(path) as partial:
        save_signed(sample_picture(model, latent_shape(model), 16, parsed.seed, parsed.count), partial)
    print(showable(f"picture     {path}"))
    return 0
