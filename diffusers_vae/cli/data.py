"""`data`: inspects a data set before training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse.typing import PositiveInt

from ..data import OWN_PICTURES, PLACED, DataConfig, look, recommended
from ..images.grid import save_signed
from ..images.ranges import to_model_range
from ..messages import showable
from ..reports.pages import contact_sheet
from ..reports.tables import look_table
from ..storage import whole_file
from .arguments import complete, picture_path, read_data_flags
from .measuring import NOT_MEASURED
from .parser import IMAGES, command_parser


def run_data(arguments: Sequence[str]) -> int:
    """Inspect a data set."""
    parser = command_parser(
        "data",
        "DATA [--out FILE] [--data.KEY VALUE ...]",
        "Inspect a data set before training. Reports the number of images, their sizes and formats, files that are "
        "unreadable, duplicate or nearly constant, and the statistics of the channels. Writes a contact sheet of the "
        "images as training reads them, and prints a training command to start with.",
        "diffusers-vae data photos/ --data.channels 3 --data.resolution 64",
    )
    parser.add_argument("images", metavar="DATA", help=IMAGES)
    parser.add_argument("--out", type=str, default="contact-sheet.png", help="File for the contact sheet.")
    parser.add_argument(
        "--max_images", type=PositiveInt, default=2000, help="Maximum number of training images to decode."
    )
    parser.add_section("data", DataConfig, skip={"crops", "on_bad_image", "num_workers", *NOT_MEASURED})
    parsed = complete(parser, read_data_flags(parser, arguments))
    path = picture_path(parsed)
    root = Path(parsed.data.root).resolve()
    ignored = path.name in OWN_PICTURES  # never read as an image of a set
    if parsed.data.name in PLACED and path.resolve().is_relative_to(root) and not ignored:
        raise ValueError(f"--out must lie outside of {root}, or it would be read as an image of the set")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = look(parsed.data, parsed.max_images, True)
    print(look_table(found))
    with whole_file(path) as partial:
        save_signed(contact_sheet(to_model_range(found.shown), parsed.data.described), partial)
    choice = recommended(found, replace(parsed.data, channels=len(found.mean)))
    flags = [f"--{name} {shlex.quote(value)}" for name, value in choice.settings.items()]
    print(showable(f"picture       {path}"))
    print("start with:\n")
    print(showable(f"diffusers-vae train --preset {choice.preset} {' '.join(flags)}".rstrip()))
    return 0
