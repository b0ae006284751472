"""Arguments that several commands take."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ..data import IMAGE_SUFFIXES, DataConfig
from ..evaluation.evaluate import EvaluationConfig
from ..losses.objective import ObjectiveConfig
from ..messages import message
from ..models import Source, encode
from ..models.stock import ModelMixin
from .parser import data_flags, new_parser, refuse_null

logger = logging.getLogger(__name__)


def size_of(model: ModelMixin) -> tuple[int, int]:
    """Height and width of images that the model was made for."""
    size = model.config.get("image_size") or model.config.get("sample_size") or 32
    return (size, size) if isinstance(size, int) else tuple(size)


IMAGES = "A set, as in data.name, a folder or archive of images, an array (.npy, .npz), Parquet, or a set on the Hub."
MODEL = "Folder of a model, of a run or of a pipeline, or a repository on the Hub."


def command_parser(command: str, usage: str, description: str, example: str) -> ArgumentParser:
    """Return the parser of the command `diffusers-vae COMMAND`, without flags yet."""
    return new_parser(usage, description, example, f"diffusers-vae {command}")


def parse(parser: ArgumentParser, arguments: Sequence[str], file: Path | None = None) -> Namespace:
    """The settings; a wrong one ends the process. `file` holds those that are not given as flags."""
    try:
        parsed = parser.parse_args(arguments)
        for section, kind in (("data", DataConfig), ("objective", ObjectiveConfig), ("evaluation", EvaluationConfig)):
            if section in parsed:
                refuse_null(parsed[section], section, kind)
        return parser.instantiate(parsed)
    except (ArgumentError, ValueError) as error:
        source = f"\nSettings that are not given as flags are those of {file}." if file else ""
        parser.exit(2, message(f"error: {error}{source}") + "\n")


def parse_data(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The settings, and what DATA adds to them."""
    try:
        images = parser.parse_args([*ANY_DATA, *arguments]).images
    except (ArgumentError, ValueError) as error:
        parser.exit(2, message(f"error: {error}") + "\n")
    named = any(argument.partition("=")[0] == "--data.name" for argument in arguments)
    place = ["--data.root", images] if named else data_flags(images)
    return parse(parser, [*arguments, *place]), place


def picture_path(parsed: Namespace) -> Path:
    """Where --out says that a picture goes."""
    path = Path(parsed.out)
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix != ".npy"]
    if path.suffix.lower() not in pictures:
        raise ValueError(f"--out must be a picture, {', '.join(pictures)}, got {path}")
    return path


def add_source(parser: ArgumentParser) -> None:
    """Add the flags that name a model within its repository."""
    parser.add_argument("--subfolder", type=str | None, default=None, help="Where in a repository the model lies.")
    parser.add_argument("--revision", type=str | None, default=None, help="Of a repository.")


def add_loading(parser: ArgumentParser) -> None:
    """Add the flags by which a model is loaded."""
    add_source(parser)
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Of the weights."
    )
    add_device(parser)


def add_device(parser: ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", type=str | None, default=None, help="By default a GPU, if there is one.")


def device_of(parsed: Namespace) -> torch.device | str:
    """Return the device that was asked for, by default a GPU if there is one; ValueError if torch cannot use it."""
    device = parsed.device or PartialState(cpu=not torch.accelerator.is_available()).device
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device must be one that torch can use here, got {device}: {error}") from error
    return device


def load(parsed: Namespace, source: str) -> ModelMixin:
    """Load the model `source`, in the dtype and on the device that were asked for."""
    device = device_of(parsed)
    dtype = getattr(torch, parsed.get("dtype", "float32"))
    return Source(source, parsed.subfolder, parsed.revision).model(dtype).to(device)


ANY_DATA = ["--data.name", "folder"]
"""Before a first look at the arguments: of a folder, anything may be asked for."""


@torch.no_grad()
def latent_shape(model: ModelMixin) -> tuple[int, ...]:
    """Return channels, height and width of the latents of an image of the model's size."""
    nothing = copy.deepcopy(model).to("meta")  # shapes alone: an image of full size may take long
    blank = torch.zeros(1, model.config.in_channels, *size_of(model), device="meta")
    return tuple(encode(nothing, blank).mean.shape[1:])
