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
    """Height and width of images that the model was made for."""
    size = model.config.get("image_size") or model.config.get("sample_size") or 32
    return (size, size) if isinstance(size, int) else tuple(size)


MODEL = "Folder of a model, of a run or of a pipeline, or a repository on the Hub."


@contextmanager
def refusing(parser: ArgumentParser, note: str = "") -> Generator[None]:
    """End the process with an error's message, and `note`, where a setting is wrong."""
    try:
        yield
    except (ArgumentError, ValueError) as error:
        parser.exit(2, message(f"error: {error}{note}") + "\n")


def read_flags(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """The settings that `arguments` state, without defaults; a wrong one ends the process."""
    with refusing(parser):
        return parser.parse_args(arguments, defaults=False)


def complete(
    parser: Parser, given: Namespace, known: Mapping[str, Any] | None = None, file: Path | None = None
) -> Namespace:
    """The settings: as `given` by flags, else as `known` by their full names, from `file`, else their defaults; a wrong
    one ends the process.
    """
    with refusing(parser, f"\nSettings that are not given as flags are those of {file}." if file else ""):
        return parser.complete(given, known)


def parse(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """The settings; a wrong one ends the process."""
    return complete(parser, read_flags(parser, arguments))


def read_data_flags(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """The settings that `arguments` state, DATA among them as settings of the data; a wrong one ends the process."""
    given = read_flags(parser, arguments)
    stated = {"root": given.images} if "data.name" in given else data_settings(given.images)
    given.update(Namespace(**stated), "data")
    return given


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
    default: Any = PartialState(cpu=not torch.accelerator.is_available())
    device = parsed.device or default.device
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device must be one that torch can use here, got {device}: {error}") from error
    return device


def load(parsed: Namespace, source: str) -> ModelMixin:
    """Load the model `source`, in the dtype and on the device that were asked for."""
    device = device_of(parsed)
    dtype = getattr(torch, parsed.get("dtype", "float32"))
    model = Source(source, parsed.subfolder, parsed.revision).model(dtype).to(device)
    if model.device.type == "cuda":
        from ..models.fast import fast  # and Triton

        fast(model)
    return model


@torch.no_grad()
def latent_shape(model: ModelMixin) -> tuple[int, ...]:
    """Return channels, height and width of the latents of an image of the model's size."""
    nothing = copy.deepcopy(model).to("meta")  # shapes alone: an image of full size may take long
    blank = torch.zeros(1, model.config.in_channels, *size_of(model), device="meta")
    return tuple(encode(nothing, blank).mean.shape[1:])
