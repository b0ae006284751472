"""From YAML files and flags to settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ..data import IN_MEMORY, kind_at
from ..engine.step import RunResult
from ..fields import alternatives, example_of, in_words, is_whole, shown
from ..messages import message
from ..settings import REMOVED, Settings, read_settings, refuse_removed, to_plain_yaml
from ..tasks import autoencoder, text_to_image
from ..tasks.autoencoder_config import TrainConfig
from ..tasks.text_to_image_config import TextToImageConfig


class Parser(ArgumentParser):
    """Takes values as people write them: 1e4 for a whole number, 64x64 and 0,255 for [64, 64] and [0, 255]. Errors say
    what a setting must be, with an example.
    """

    def kind(self, name: str) -> Any:
        """Return the type of a flag or setting, a text where there is none. (Names seen in jsonargparse 4.53.)"""
        kinds = (getattr(action, "_typehint", action.type) for action in self._actions if action.dest == name)
        return next(kinds, None) or str

    def parse_args(self, args: Sequence[str] = (), *arguments: Any, **options: Any) -> Namespace:
        words = list(args)
        for place, word in enumerate(words):
            name, equals, value = word.partition("=")
            if equals and word.startswith("--"):
                words[place] = f"{name}={self._written(name, value)}"
            elif place and words[place - 1].startswith("--"):
                words[place] = self._written(words[place - 1], word)
        try:
            return super().parse_args(words, *arguments, **options)
        except ArgumentError as error:
            raise self._in_words(error) from error

    def _written(self, flag: str, text: str) -> str:
        value = as_meant(self.kind(flag.removeprefix("--")), text)
        return text if value is text else json.dumps(value)

    def _in_words(self, error: ArgumentError) -> Exception:
        """The error without types of Python, where it is about a value."""
        text = str(error)
        keys = re.findall(r'Parser key "(.*?)"', text)
        given = re.findall(r"(?:Given|Got) value: (.*)", text) or re.findall(r"Not of type .*: .*?(-?\d+|'.*')", text)
        if not (keys and given):
            return error
        key = keys[-1]  # the innermost, of a section in JSON
        kind, default = self.kind(key), self.get_defaults().get(key)
        name = key if "." in key else f"--{key}"
        example = example_of(kind) if default is None or isinstance(default, (list, tuple)) else shown(default)
        value = "null" if given[-1] == "None" else given[-1].strip("'")
        return ValueError(f"{name} must be {in_words(kind)}, got {value}: for example, --{key} {example}")


NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def as_meant(kind: Any, value: Any) -> Any:
    """`value` of a setting of that type, as it was read or as text, in the form that the type asks for, if it is clear
    what is meant; else itself.
    """
    kinds = alternatives(kind)
    if any(map(is_whole, kinds)) and float not in kinds:
        with suppress(ValueError, OverflowError):
            if isinstance(value, float) or (isinstance(value, str) and not value.strip("+-").isdigit()):
                number = float(value)
                return int(number) if number == int(number) else value
    lists = [own for own in kinds if get_origin(own) is tuple]
    if lists and isinstance(value, str):
        of = get_args(lists[0])[0]
        if get_origin(of) is Literal:
            names = [name for name in re.split(r"[,\s]+", value) if name]
            return names if names and set(names) <= set(get_args(of)) else value
        if of in (int, float) and re.fullmatch(rf"\(?{NUMBER}(?:(?:\s*[x,]\s*|\s+){NUMBER})*,?\)?", value.strip()):
            numbers = [as_meant(int, float(number)) for number in re.findall(NUMBER, value)]
            return numbers if len(numbers) > 1 or (of not in kinds and get_args(lists[0])[1] is ...) else value
    return value


def with_data(arguments: Sequence[str]) -> list[str]:
    """`--data NAME` and `--data FOLDER` written out; settings in JSON or in a YAML file stay."""
    words = [part for argument in arguments for part in _halves(argument, "--data")]
    for place in [place for place, word in enumerate(words[:-1]) if word == "--data"][::-1]:
        if not words[place + 1].startswith("{"):
            words[place : place + 2] = data_flags(words[place + 1])
    return words


def data_flags(value: str) -> list[str]:
    """What the name of a set, a place on this machine or one on the Hub stands for."""
    if value in IN_MEMORY:
        return ["--data.name", value]
    return ["--data.name", kind_at(value), "--data.root", value]


def _halves(argument: str, flag: str) -> list[str]:
    return [flag, argument.removeprefix(f"{flag}=")] if argument.startswith(f"{flag}=") else [argument]


def new_parser(usage: str, description: str, example: str, prog: str | None = None) -> Parser:
    """Without flags yet; it describes those of a dataclass by the texts under its fields."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return Parser(
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
    train: Callable[..., RunResult | None]
    dry_run: Callable[..., tuple[RunResult, bool, float | None] | None]


TRAININGS = {
    training.command: training
    for training in (
        Training(
            "train",
            "Train a KL autoencoder.",
            "accelerate launch -m diffusers_vae.cli train --run.output_dir runs/digits",
            TrainConfig,
            autoencoder.train,
            autoencoder.dry_run,
        ),
        Training(
            "train-text-to-image",
            "Train a text-to-image model on the latents of a trained autoencoder (--vae MODEL), and save it as a stock "
            "StableDiffusionPipeline.",
            "accelerate launch -m diffusers_vae.cli train-text-to-image --vae runs/digits",
            TextToImageConfig,
            text_to_image.train,
            text_to_image.dry_run,
        ),
    )
}


@cache  # it takes a third of a second to read the texts under the fields
def training_parser(training: Training) -> Parser:
    """The flags of a training run: `--config FILE.yaml`, one per setting, and `--dry_run`."""
    parser = new_parser(
        "[--config FILE.yaml] [--data NAME|FOLDER] [--SECTION.KEY VALUE ...] [--dry_run]",
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
        if "got False" in text:
            text += '\nYAML reads a bare no or off as false: write "no" in quotes.'
        training_parser(training).exit(2, message(text) + "\n")


WRONG = (ArgumentError, OSError, ValueError)
"""Errors that wrong settings raise."""


def _parse(training: Training, arguments: Sequence[str]) -> tuple[Settings, bool]:
    parser = training_parser(training)
    parsed = parser.parse_args(_with_files(with_data(arguments), parser))
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


def _with_files(arguments: Sequence[str], parser: Parser) -> list[str]:
    """The arguments with what the files hold that `--config` names: jsonargparse would read them with YAML's traps, and
    any amount of it.
    """
    words = [part for argument in arguments for part in _halves(argument, "--config")]
    for place in [place for place, word in enumerate(words[:-1]) if word == "--config"]:
        sections = read_settings(Path(words[place + 1]))
        for name, section in sections.items():
            for key, value in section.items():
                section[key] = as_meant(parser.kind(f"{name}.{key}"), value)
        words[place + 1] = to_plain_yaml(sections)
    return words


def _config_files(arguments: Sequence[str]) -> list[Path]:
    """Those that `--config` names, in either form."""
    named = [following for argument, following in pairwise(arguments) if argument == "--config"]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return [Path(name) for name in named + joined]
