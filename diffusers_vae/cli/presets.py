"""`presets`: lists the presets of the package."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence

from ..presets import Preset, find_preset, presets


def run_presets(arguments: Sequence[str]) -> int:
    """List the presets, or print one of them."""
    parser = argparse.ArgumentParser(
        prog="diffusers-vae presets",
        usage="%(prog)s [NAME] [--debug]",
        description="List the presets with purpose, hardware and expected figures, or print the YAML file of one.",
        epilog="example: diffusers-vae presets digits",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="Preset to print; without it, all are listed.")
    if name := parser.parse_args(arguments).name:
        print(find_preset(name).text, end="")
    else:
        width = min(100, shutil.get_terminal_size().columns)
        print("\n\n".join(_entry(name, preset, width) for name, preset in presets().items()))
        print("\nTrain with one: diffusers-vae train --preset NAME. Print its settings: diffusers-vae presets NAME.")
    return 0


def _entry(name: str, preset: Preset, width: int) -> str:
    title = name if preset.command == "train" else f"{name} (diffusers-vae {preset.command})"
    rows = {
        "purpose": _first_sentence(preset.head["Purpose"]),
        "hardware": f"{_first_sentence(preset.head['Hardware'])} Time: {_first_sentence(preset.head['Time'])}",
        "figure": _first_sentence(preset.head["Expect"]),
    }
    lines = [title]
    for label, text in rows.items():
        lines += textwrap.wrap(f"{label:<10}{text}", width, initial_indent="  ", subsequent_indent=" " * 12)
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    """Return the first sentence of `text`, or two if the first only states that nothing was run."""
    sentences = re.split(r"(?<=\.)\s+", text)
    return " ".join(sentences[: 2 if sentences[0].startswith("not run") else 1])
