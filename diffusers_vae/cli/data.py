"""`data`: what is in a set, before a training."""

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
    """What is in a data set."""
    parser = command_parser(
        "data",
        "DATA [--out FILE] [--data.KEY VALUE ...]",
        "Look at a data set before a training: how many images there are, of which sizes and kinds, which files cannot "
        "be read, are the same, or show hardly anything; the statistics of their channels; a contact sheet of them as "
        "a training sees them; and the command that we would begin with.",
        "diffusers-vae data photos/ --data.channels 3 --data.resolution 64",
    )
    parser.add_argument("images", metavar="DATA", help=IMAGES)
    parser.add_argument("--out", type=str, default="contact-sheet.png", help="The picture.")
    parser.add_argument(
        "--max_images", type=PositiveInt, default=2000, help="So many training images, at most, are decoded."
    )
    parser.add_section("data", DataConfig, skip={"crops", "on_bad_image", "num_workers", *NOT_MEASURED})
    parsed = complete(parser, read_data_flags(parser, arguments))
    path = picture_path(parsed)
    root = Path(parsed.data.root).resolve()
    known = path.name in OWN_PICTURES  # which are left out of a set
    if parsed.data.name in PLACED and path.resolve().is_relative_to(root) and not known:
        raise ValueError(f"--out would be an image of the set; give it another place than {root}")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = look(parsed.data, parsed.max_images, True)
    print(look_table(found))
    with whole_file(path) as partial:
        save_signed(contact_sheet(to_model_range(found.shown), parsed.data.described), partial)
    choice = recommended(found, replace(parsed.data, channels=len(found.mean)))
    flags = [f"--{name} {shlex.quote(value)}" for name, value in choice.settings.items()]
    print(showable(f"picture       {path}"))
    print("begin with:\n")
    print(showable(f"diffusers-vae train --preset {choice.preset} {' '.join(flags)}".rstrip()))
    return 0
