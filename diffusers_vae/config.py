"""From YAML files and flags to settings."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ActionConfigFile, ArgumentParser

from .trainer import TrainConfig


def train_parser() -> ArgumentParser:
    """The flags of a training run: `--config FILE.yaml`, one per setting, and `--dry_run`."""
    parser = ArgumentParser(description="Train a KL autoencoder. Later flags and files override earlier ones.")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with settings.")
    parser.add_argument("--dry_run", action="store_true", help="Run every phase once, in seconds, and keep nothing.")
    parser.add_class_arguments(TrainConfig, as_group=False, fail_untyped=True)
    return parser


def parse_train_config(arguments: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The settings, and whether it is a dry run. A wrong key or value ends the process with a message that names it."""
    parser = train_parser()
    parsed = parser.parse_args(arguments)
    try:
        settings = parser.instantiate(parsed).as_dict()
    except ValueError as error:
        parser.error(str(error))
    settings.pop("config")
    dry = settings.pop("dry_run")
    return TrainConfig(**settings), dry
