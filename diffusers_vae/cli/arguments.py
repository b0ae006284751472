"""Arguments that several commands take."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ..data import IMAGE_SUFFIXES
from ..messages import message
from ..models import Source, encode
from ..models.stock import ModelMixin
from .parser import Parser, data_settings


def size_of(model: ModelMixin) -> tuple[int, int]:
    """Return the height and width of the images that the model was made for."""
    size = model.config.get("image_size") or model.config.get("sample_size") or 32
    return (size, size) if isinstance(size, int) else tuple(size)


MODEL = "Folder of a model, run or pipeline, or Hub repository."


@contextmanager
def refusing(parser: ArgumentParser, note: str = "") -> Generator[None]:
    """If a setting is wrong, print the error and `note`, and exit with code 2."""
    try:
        yield
    except (ArgumentError, ValueError) as error:
        parser.exit(2, message(f"error: {error}{note}") + "\n")


def read_flags(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """Return the settings given in `arguments`, without defaults. A wrong one ends the process."""
    with refusing(parser):
        return parser.parse_args(arguments, defaults=False)


def complete(
    parser: Parser, given: Namespace, stored: Mapping[str, Any] | None = None, file: Path | None = None
) -> Namespace:
    """Return all settings: `given` by flags, else `stored` in `file`, with full names as keys, else default. A wrong
    one ends the process.
    """
    with refusing(parser, f"\nSettings without a flag come from {file}." if file else ""):
        return parser.complete(given, stored)


def parse(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """Return all settings. A wrong one ends the process."""
    return complete(parser, read_flags(parser, arguments))


def read_data_flags(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """Return the settings given in `arguments`, with DATA as settings of the data. A wrong one ends the process."""
    given = read_flags(parser, arguments)
    stated = {"root": given.images} if "data.name" in given else data_settings(given.images)
    given.update(Namespace(**stated), "data")
    return given


def picture_path(parsed: Namespace) -> Path:
    """Return the path of --out; ValueError if it has no suffix of a picture format."""
    path = Path(parsed.out)
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix != ".npy"]
    if path.suffix.lower() not in pictures:
        raise ValueError(f"--out must be a picture, {', '.join(pictures)}, got {path}")
    return path


def add_source(parser: ArgumentParser) -> None:
    """Add the flags that locate a model within its repository."""
    parser.add_argument(
        "--subfolder", type=str | None, default=None, help="Subfolder of the folder or repository that holds the model."
    )
    parser.add_argument(
        "--revision", type=str | None, default=None, help="Branch, tag or commit of the Hub repository; null: main."
    )


def add_loading(parser: ArgumentParser) -> None:
    """Add the flags that determine how a model is loaded."""
    add_source(parser)
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Dtype of the weights."
    )
    add_device(parser)


def add_device(parser: ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        type=str | None,
        default=None,
        help="Device, such as cuda:1; null: a GPU if there is one, else the CPU.",
    )


def device_of(parsed: Namespace) -> torch.device | str:
    """Return the device of --device, by default a GPU if there is one; ValueError if torch cannot use it."""
    default: Any = PartialState(cpu=not torch.accelerator.is_available())
    device = parsed.device or default.device
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device must be one that torch can use on this machine, got {device}: {error}") from error
    return device


def load(parsed: Namespace, source: str) -> ModelMixin:
    """Load the model `source` in the dtype of --dtype, on the device of --device."""
    device = device_of(parsed)
    dtype = getattr(torch, parsed.get("dtype", "float32"))
    model = Source(source, parsed.subfolder, parsed.revision).model(dtype).to(device)
    if model.device.type == "cuda":
        from ..models.fast import fast  # imports Triton

        fast(model)
    return model


@torch.no_grad()
def latent_shape(model: ModelMixin) -> tuple[int, ...]:
    """Return (channels, height, width) of the latents of an image of the model's size."""
    shapes_only = copy.deepcopy(model).to("meta")  # computing an image of full size may take long
    blank = torch.zeros(1, model.config.in_channels, *size_of(model), device="meta")
    return tuple(encode(shapes_only, blank).mean.shape[1:])
