"""Parse YAML files and flags to settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import (
    SUPPRESS,
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from ..data import IN_MEMORY, DataConfig, kind_at
from ..engine.step import RunResult
from ..fields import alternatives, example_of, in_words, is_whole, shown
from ..messages import message, nearest
from ..presets import find_preset
from ..settings import REMOVED, Settings, read_settings, refuse_removed
from ..tasks import autoencoder, text_to_image
from ..tasks.autoencoder_config import TrainConfig
from ..tasks.text_to_image_config import TextToImageConfig


class SettingsFile(ActionConfigFile):
    """Action of `--config FILE.yaml`. Values such as 1e4 and 64x64 are read as in flags."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for section, settings in read_settings(Path(values)).items():
            for name, value in settings.items():
                namespace[f"{section}.{name}"] = as_meant(parser.kind(f"{section}.{name}"), value)


class HelpFormatter(DefaultHelpFormatter):
    """Prints each flag on one line, with its type and its default unless that is null, and its text below. (Overrides
    private methods of jsonargparse 4.53, which prints Python types.)
    """

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **options | {"max_help_position": 8})

    def _get_type_str(self, action: Any) -> None:
        return None

    def _get_help_string(self, action: Any) -> str:
        return super()._get_help_string(action).replace(" (default: %(default)s)", "")

    def _format_action_invocation(self, action: Any) -> str:
        text = super()._format_action_invocation(action)
        stated = action.option_strings and action.nargs != 0 and action.default not in (None, SUPPRESS)
        return f"{text} (default: {shown(action.default)})" if stated else text

    def _get_default_metavar_for_optional(self, action: Any) -> str:
        kinds = alternatives(getattr(action, "_typehint", None) or action.type)
        return "|".join(_metavar(kind) for kind in kinds) if kinds != (None,) else "VALUE"


def _metavar(kind: Any) -> str:
    """Return the name of a type as shown in help."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return "LIST"
    return {float: "NUMBER", bool: "{true,false}", NoneType: "null"}.get(kind, "INTEGER" if is_whole(kind) else "TEXT")


class Parser(ArgumentParser):
    """Accepts common notations: 1e4 for a whole number, 64x64 and 0,255 for [64, 64] and [0, 255]. Errors state what a
    setting must be, with an example.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.sections: dict[str, type] = {}

    def add_section(self, name: str, kind: type, skip: Iterable[str] = (), default: Any = None) -> None:
        """Add a flag for each setting of the dataclass `kind`. For data settings, also add `--data`."""
        self.sections[name] = kind
        self.add_class_arguments(kind, name, default=default, skip={*skip})
        for action in self._actions:  # (jsonargparse 4.53 adds --data as a path of a settings file)
            if action.dest == name:
                metavar, text = ("NAME|FOLDER", IMAGES) if kind is DataConfig else (None, SUPPRESS)
                action.metavar, action.help = metavar, text

    def kind(self, name: str) -> Any:
        """Return the type of a flag or setting, str if it is not typed. (Attributes as in jsonargparse 4.53.)"""
        kinds = (getattr(action, "_typehint", action.type) for action in self._actions if action.dest == name)
        return next(kinds, None) or str

    def parse_args(self, args: Sequence[str] = (), *arguments: Any, **options: Any) -> Namespace:
        words = [part for word in args for part in (["--data", word[7:]] if word.startswith("--data=") else [word])]
        for index in range(len(words) - 1, 0, -1):
            if words[index - 1] == "--data" and "data" in self.sections and not words[index].startswith("{"):
                stated = data_settings(words[index])
                words[index - 1 : index + 1] = [f"--data.{name}={value}" for name, value in stated.items()]
        for index, word in enumerate(words):
            name, equals, value = word.partition("=")
            if equals and word.startswith("--"):
                words[index] = f"{name}={self._written(name, value)}"
            elif index and words[index - 1].startswith("--"):
                words[index] = self._written(words[index - 1], word)
        return super().parse_args(words, *arguments, **options)

    def complete(self, given: Namespace, stored: Mapping[str, Any] | None = None) -> Namespace:
        """Return all settings: `given` by flags, else `stored`, with full names as keys, else default. Each section is
        a dataclass.

        Raises:
            ValueError: if a setting has a wrong value; the message names it.
        """
        parsed = self.parse_object(given, Namespace(stored or {}))
        for section, kind in self.sections.items():
            if not isinstance(parsed[section], Namespace):
                raise ValueError(f"{section} must hold settings, KEY: VALUE, got {parsed[section]}")
            kinds = get_type_hints(kind)
            for name, value in vars(parsed[section]).items():
                if value is None and name in kinds and NoneType not in get_args(kinds[name]):
                    raise ValueError(f"{section}.{name} must have a value, got null: leave it out for its default")
        for name in REMOVED:
            if name in parsed:
                refuse_removed(name, parsed.pop(name))
        for section, kind in self.sections.items():
            parsed[section] = kind(**vars(parsed[section]))
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise self._in_words(message) from ex

    def _written(self, flag: str, text: str) -> str:
        value = as_meant(self.kind(flag.removeprefix("--")), text)
        return text if value is text else json.dumps(value)

    def _in_words(self, text: str) -> Exception:
        """Return an error about a value without Python types, and others with a similar flag if one is unknown."""
        if unknown := re.search(r"(?i)unrecognized arguments: --([^\s=]+)|'(.*)' does not accept option '(.*?)'", text):
            flag, section, option = unknown.groups()
            names = [action.dest for action in self._actions if action.help != SUPPRESS]
            similar = nearest((flag or f"{section}.{option}").replace("-", "_"), names)
            return ArgumentError(None, text if text.endswith("?") else text + f".{similar}" * bool(similar))
        keys = re.findall(r'Parser key "(.*?)"', text)
        given = re.findall(r"(?:Given|Got) value: (.*)", text) or re.findall(r"Not of type .*: .*?(-?\d+|'.*')", text)
        if not (keys and given):
            return ArgumentError(None, text)
        key = keys[-1]  # the innermost, of a section in JSON
        kind, default = self.kind(key), self.get_defaults().get(key)
        name = key if "." in key else f"--{key}"
        example = example_of(kind) if default is None or isinstance(default, (list, tuple)) else shown(default)
        value = "null" if given[-1] == "None" else given[-1].strip("'")
        return ValueError(f"{name} must be {in_words(kind)}, got {value}: for example, --{key} {example}")


NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def as_meant(kind: Any, value: Any) -> Any:
    """Convert a value from YAML or a flag to the type of its setting, if its meaning is clear; otherwise return it
    unchanged.
    """
    kinds = alternatives(kind)
    if any(map(is_whole, kinds)) and float not in kinds:
        with suppress(ValueError, OverflowError):
            if isinstance(value, float) or (isinstance(value, str) and not value.strip("+-").isdigit()):
                number = float(value)
                return int(number) if number == int(number) else value
    lists = [option for option in kinds if get_origin(option) is tuple]
    if lists and isinstance(value, str):
        of = get_args(lists[0])[0]
        if get_origin(of) is Literal:
            names = [name for name in re.split(r"[,\s]+", value) if name]
            return names if names and set(names) <= set(get_args(of)) else value
        if of in (int, float) and re.fullmatch(rf"\(?{NUMBER}(?:(?:\s*[x,]\s*|\s+){NUMBER})*,?\)?", value.strip()):
            numbers = [as_meant(int, float(number)) for number in re.findall(NUMBER, value)]
            return numbers if len(numbers) > 1 or (of not in kinds and get_args(lists[0])[1] is ...) else value
    return value


IMAGES = "Name as in data.name, folder or archive of images, array (.npy, .npz), Parquet file, or data set on the Hub."


def data_settings(value: str) -> dict[str, str]:
    """Return the data settings for the name of a set, a local path or a Hub repository."""
    return {"name": value} if value in IN_MEMORY else {"name": kind_at(value), "root": value}


def command_parser(command: str, usage: str, description: str, example: str) -> Parser:
    """Return the parser of `diffusers-vae COMMAND`, without flags. The help of a setting is the docstring of its
    field.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return Parser(
        prog=f"diffusers-vae {command}",
        usage=f"%(prog)s {usage} [--debug]",
        description=description,
        epilog=f"example: {example}",
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


@dataclass(frozen=True)
class Training:
    """Settings and functions of a training command."""

    command: str
    """Name of the command."""
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
            "diffusers-vae train photos/ --run.epochs 4",
            TrainConfig,
            autoencoder.train,
            autoencoder.dry_run,
        ),
        Training(
            "train-text-to-image",
            "Train a text-to-image model on the latents of a trained autoencoder (--vae MODEL), and save it as a stock "
            "StableDiffusionPipeline.",
            "diffusers-vae train-text-to-image --vae runs/digits",
            TextToImageConfig,
            text_to_image.train,
            text_to_image.dry_run,
        ),
    )
}


@cache  # reading the docstrings of the fields takes a third of a second
def training_parser(training: Training) -> Parser:
    """Return the parser of a training command: `--preset`, `--config`, `--dry_run`, and a flag per setting."""
    looks = training.command == "train"
    parser = command_parser(
        training.command,
        "[DATA] " * looks + "[--preset NAME] [--config FILE.yaml] [--SECTION.KEY VALUE ...] [--dry_run]",
        f"{training.description} Flags override --config, which overrides --preset, which overrides the defaults.",
        training.example,
    )
    if looks:
        parser.add_argument(
            "images",
            nargs="?",
            default=SUPPRESS,
            metavar="DATA",
            help="Images to train on, as for --data; also chooses a preset, channels and resolution that suit them.",
        )
    parser.add_argument(
        "--preset",
        default=SUPPRESS,
        metavar="NAME",
        help="Preset to start from; `diffusers-vae presets` lists all.",
    )
    parser.add_argument("--config", action=SettingsFile, metavar="FILE.yaml", help="YAML file with settings.")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Read the images and run every other phase briefly, without keeping any file.",
    )
    kinds = get_type_hints(training.settings)
    for section in fields(training.settings):
        made = None if section.default_factory is MISSING else section.default_factory()
        parser.add_section(section.name, kinds[section.name], default=made)
    for name, (default, advice) in REMOVED.items():
        if advice and name.partition(".")[0] in kinds:
            parser.add_argument(f"--{name}", type=Any, default=default, help=SUPPRESS)
    return parser


class Words:
    """Arguments of a training command by kind: DATA, names of presets, paths of settings files, and other flags."""

    WITHOUT_VALUE = ("-h", "--help", "--print_config", "--dry_run")

    def __init__(self, arguments: Sequence[str]):
        self.images: list[str] = []
        self.presets: list[str] = []
        self.files: list[str] = []
        self.flags: list[str] = []
        words = [*arguments]
        while words:
            name, equals, value = words.pop(0).partition("=")
            if not name.startswith("-"):
                self.images.append(name + equals + value)
                continue
            if not equals and name not in self.WITHOUT_VALUE and words and not words[0].startswith("--"):
                equals, value = "=", words.pop(0)
            kind = {"--preset": self.presets, "--config": self.files}.get(name)
            if kind is None or not equals:
                self.flags.append(name + equals + value)
            else:
                kind.append(value)


def parse_settings(training: Training, arguments: Sequence[str], chosen: Sequence[str] = ()) -> tuple[Settings, bool]:
    """Return the settings, and whether this is a dry run. A wrong key or value ends the process with a message that
    names it and its file. `chosen` flags override presets only.
    """
    words = Words(arguments)
    try:
        return _parse(training, words, chosen)
    except WRONG as error:
        text = f"error: {error}"
        for path in words.files:
            if path not in text:
                try:
                    _parse(training, Words(["--config", path]))
                except WRONG as of_file:
                    text += f"\nThis is in {path}." if str(of_file) == str(error) else ""
        if "got False" in text:
            text += '\nYAML reads an unquoted no or off as false: write "no" in quotes.'
        training_parser(training).exit(2, message(text) + "\n")


WRONG = (ArgumentError, OSError, ValueError)
"""Errors raised by wrong settings."""


def flags_given(training: Training, words: Words, chosen: Sequence[str] = ()) -> list[str]:
    """Return `words` as flags of the parser, in ascending order of precedence."""
    presets = {name: find_preset(name) for name in words.presets}
    for name, preset in presets.items():
        if preset.command != training.command:
            raise ValueError(f"the preset {name} is for diffusers-vae {preset.command}")
    if len(words.images) > (training.command == "train"):
        raise ArgumentError(None, f"unrecognized arguments: {' '.join(words.images)}")
    files = [*(str(preset.file) for preset in presets.values()), *words.files]
    stated = [f"--config={file}" for file in files]
    return [
        *stated[: len(presets)],
        *chosen,
        *stated[len(presets) :],
        *(f"--data={images}" for images in words.images),
        *words.flags,
    ]


def _parse(training: Training, words: Words, chosen: Sequence[str] = ()) -> tuple[Settings, bool]:
    parser = training_parser(training)
    given = parser.parse_args(flags_given(training, words, chosen))  # with defaults, for --print_config
    parsed = parser.complete(given)
    return training.settings(**{name: parsed[name] for name in parser.sections}), parsed.dry_run
