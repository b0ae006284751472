"""From YAML files and flags to settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from .trainer import TrainConfig


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


def train_parser() -> ArgumentParser:
    """The flags of a training run: `--config FILE.yaml`, one per setting, and `--dry_run`."""
    parser = new_parser(
        "[--config FILE.yaml] [--SECTION.KEY VALUE ...] [--dry_run]",
        "Train a KL autoencoder. Later flags and files override earlier ones.",
        "accelerate launch training/train_vae.py --config training/configs/mnist-vae.yaml",
        "diffusers-vae train",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with settings.")
    parser.add_argument(
        "--dry_run", action="store_true", help="Read the images, run every other phase once in seconds, keep nothing."
    )
    parser.add_class_arguments(TrainConfig, as_group=False, fail_untyped=True)
    return parser


def parse_train_config(arguments: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The settings, and whether it is a dry run. A wrong key or value ends the process with a message that names it."""
    parser = train_parser()
    try:
        parsed = parser.parse_args(arguments)
        for field in fields(TrainConfig):
            if not isinstance(parsed[field.name], Namespace):
                raise ValueError(f"{field.name} must hold settings, KEY: VALUE, got {parsed[field.name]}")
        settings = parser.instantiate(parsed).as_dict()
        settings.pop("config")
        dry = settings.pop("dry_run")
        return TrainConfig(**settings), dry
    except (ArgumentError, ValueError) as error:
        message = f"error: {error}\n"
        if "Given value: False" in message:
            message += 'YAML reads a bare no or off as false: write "no" in quotes.\n'
        parser.exit(2, message)
