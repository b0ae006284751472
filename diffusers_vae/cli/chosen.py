"""`train DATA`: chooses the preset and the settings that suit the images."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from jsonargparse import Namespace

from ..data import IN_MEMORY, DataConfig, look, recommended
from ..messages import showable
from ..presets import find_preset
from ..processes import on_main
from ..settings import read_settings
from ..silence import GROUP_TIMEOUT
from .parser import WRONG, Training, Words, flags_given, training_parser

LOOKED_AT = 500
"""Number of training images to decode before choosing."""
FINE_TUNING_RATE = "1e-4"
"""Learning rate for a pretrained model, as in the presets for fine-tuning."""


def choose(training: Training, arguments: Sequence[str]) -> tuple[list[str], str]:
    """Return flags that suit the images of DATA, and lines that state each flag with its reason. Flags that are in
    `arguments` are left out.

    With `--preset`, or with `--data` instead of DATA, only the folder of the run is chosen, after the images;
    with both, nothing is. Without a preset, if that folder holds a run, the run continues with its settings. All
    processes call this function, and only the main process reads the images.

    Raises:
        FileNotFoundError: when DATA does not exist.
        ValueError: when the images cannot be read.
    """
    words = Words(arguments)
    looks_up = any(flag.startswith(("-h", "--help", "--print_config")) for flag in words.flags)
    if training.command != "train" or len(words.images) > 1 or looks_up:
        return [], ""
    parser, presets, words.presets = training_parser(training), words.presets, []
    try:
        stated = parser.parse_args(flags_given(training, words), defaults=False)
        data = parser.complete(stated).data
    except WRONG:  # reported when all settings are read
        return [], ""
    folder = data.run_folder + "-fine-tuned" * bool(stated.get("model.pretrained"))
    if not words.images:
        return ([] if presets else [f"--run.output_dir={folder}"]), ""
    folder = stated.get("run.output_dir") or folder
    PartialState(cpu=not torch.accelerator.is_available(), timeout=GROUP_TIMEOUT)
    return on_main(lambda: _decide(stated, data, folder, bool(presets)))


def _decide(stated: Namespace, data: DataConfig, folder: str, has_preset: bool) -> tuple[list[str], str]:
    if has_preset:
        return [f"--run.output_dir={folder}"], ""
    with suppress(OSError, ValueError):  # wrong settings are reported when the run is opened
        begun = Path(folder) / "config.yaml"
        read_settings(begun)
        return [f"--config={begun}"], showable(
            f"{folder} holds a run: continuing it with its settings, except for those given as flags"
        )
    found = look(data, LOOKED_AT, True, duplicates=False)
    choice = recommended(found, data)
    settings = choice.settings | {"run.output_dir": folder} | _instead(stated, choice.preset)
    if stated.get("data.crops") is not None:
        settings.pop("data.fit", None)
    settings = {name: value for name, value in settings.items() if name not in stated}
    images = str(data.name) if data.name in IN_MEMORY else data.location
    rows = [("preset", choice.preset), ("data", images), *settings.items()]
    reasons = choice.reasons | {"run.output_dir": "named after the images", "data": "the images"}
    lines = [f"chosen for {found.parts['training']:,} training images; your own flags take precedence:"]
    lines += [f"  {f'--{name} {shlex.quote(value)}':<42} {reasons.get(name, '')}".rstrip() for name, value in rows]
    preset = find_preset(choice.preset).file
    flags = [f"--config={preset}", *(f"--{name}={value}" for name, value in settings.items())]
    return flags, "\n".join(map(showable, lines))


def _instead(stated: Namespace, preset: str) -> dict[str, str]:
    """Return settings that must replace those of the preset because of the `stated` ones."""
    instead = {}
    if "data.fit" in stated:
        instead["data.crops"] = "null"
    if stated.get("model.pretrained"):
        instead["optimizer.learning_rate"] = FINE_TUNING_RATE
    if stated.get("model.pretrained") or stated.get("model.architecture") == "mlp":
        shape = read_settings(find_preset(preset).file)["model"]
        instead |= {f"model.{name}": "null" for name in shape if name != "architecture"}
    return instead
