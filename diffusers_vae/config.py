"""From YAML files and flags to settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from .loop import Task
from .messages import message
from .settings import REMOVED, Settings, read_settings, refuse_removed
from .text_to_image import TextToImageConfig, TextToImageTask
from .trainer import AutoencoderTask, TrainConfig


def new_parser(usage: str, description: str, example: str, prog: str | None = None) -> ArgumentParser:
    """Without flags yet; it describes those of a dataclass by the texts under its fields."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(
        prog=prog,
        usage=f"%(prog)s {usage} [--debug]",
        description=description,
        epilog=f"example: {example}",
        exit_on_error=False,
        allow_abbrev=False,
    )


@dataclass(frozen=True)
class Training:
    """What one of the training commands reads and does."""

    command: str
    """Of diffusers-vae."""
    description: str
    example: str
    settings: type[Settings]
    task: type[Task]


TRAININGS = {
    training.command: training
    for training in (
        Training(
            "train",
            "Train a KL autoencoder.",
            "accelerate launch training/train_vae.py --config training/configs/mnist-vae.yaml",
            TrainConfig,
            AutoencoderTask,
        ),
        Training(
            "train-text-to-image",
            "Train a text-to-image model on the latents of a trained autoencoder (--vae MODEL), and save it as a stock "
            "StableDiffusionPipeline.",
            "accelerate launch training/train_text_to_image.py --config training/configs/mnist-t2i.yaml",
            TextToImageConfig,
            TextToImageTask,
        ),
    )
}


@cache  # it takes a third of a second to read the texts under the fields
def training_parser(training: Training) -> ArgumentParser:
    """The flags of a training run: `--config FILE.yaml`, one per setting, and `--dry_run`."""
    parser = new_parser(
        "[--config FILE.yaml] [--SECTION.KEY VALUE ...] [--dry_run]",
        f"{training.description} Later flags and files override earlier ones.",
        training.example,
        f"diffusers-vae {training.command}",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with settings.")
    parser.add_argument(
        "--dry_run", action="store_true", help="Read the images, run every other phase once in seconds, keep nothing."
    )
    parser.add_class_arguments(training.settings, as_group=False, fail_untyped=True)
    for name in _removed(training):  # not shown in --help
        parser.add_argument(f"--{name}", type=Any, default=REMOVED[name][0], help=SUPPRESS)
    return parser


def _removed(training: Training) -> list[str]:
    """Names of the removed settings in the sections of this training that are refused at another value than the old
    default.
    """
    sections = get_type_hints(training.settings)
    return [name for name, (_, advice) in REMOVED.items() if advice and name.partition(".")[0] in sections]


def parse_settings(training: Training, arguments: Sequence[str]) -> tuple[Settings, bool]:
    """The settings, and whether it is a dry run. A wrong key or value ends the process with a message that names it
    and the file that it is in.
    """
    try:
        return _parse(training, arguments)
    except WRONG as error:
        text = f"error: {error}"
        for path in _config_files(arguments):
            if str(path) not in text and _error_of(training, path) == str(error):
                text += f"\nThis is in {path}."
        if "Given value: False" in text:
            text += '\nYAML reads a bare no or off as false: write "no" in quotes.'
        training_parser(training).exit(2, message(text) + "\n")


WRONG = (ArgumentError, OSError, ValueError)
"""Errors that wrong settings raise."""


def _parse(training: Training, arguments: Sequence[str]) -> tuple[Settings, bool]:
    parser = training_parser(training)
    for path in _config_files(arguments):
        read_settings(path)  # jsonargparse would read it with YAML's traps, and any amount of it
    parsed = parser.parse_args(arguments)
    for section, kind in get_type_hints(training.settings).items():
        if not isinstance(parsed[section], Namespace):
            raise ValueError(f"{section} must hold settings, KEY: VALUE, got {parsed[section]}")
        refuse_null(parsed[section], section, kind)
    for name in _removed(training):
        refuse_removed(name, parsed.pop(name))
    settings = parser.instantiate(parsed).as_dict()
    settings.pop("config")
    dry = settings.pop("dry_run")
    return training.settings(**settings), dry


def refuse_null(settings: Namespace, section: str, kind: type) -> None:
    """Raise ValueError naming a setting of the dataclass `kind` that is null and must not be, which jsonargparse
    accepts.
    """
    kinds = get_type_hints(kind)
    for option in fields(kind):
        if option.name in settings and settings[option.name] is None and NoneType not in get_args(kinds[option.name]):
            raise ValueError(f"{section}.{option.name} must have a value, got null: leave it out for its default")


def _error_of(training: Training, path: Path) -> str | None:
    """What is wrong with the settings in one file, without flags and other files."""
    try:
        _parse(training, ["--config", str(path)])
    except WRONG as error:
        return str(error)
    return None


def _config_files(arguments: Sequence[str]) -> list[Path]:
    """Those that `--config` names, in either form."""
    named = [following for argument, following in pairwise(arguments) if argument == "--config"]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return [Path(name) for name in named + joined]
