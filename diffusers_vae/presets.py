"""Presets: the settings files of training/configs and the entries of their head comments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .messages import nearest


@dataclass(frozen=True)
class Preset:
    """A settings file of the package."""

    file: Path
    text: str
    head: dict[str, str]
    """Entries of the comment at its top, such as Purpose, Hardware, Time and Expect."""

    @property
    def command(self) -> str:
        """Name of the training command for this preset."""
        return "train-text-to-image" if re.search(r"^vae:", self.text, re.MULTILINE) else "train"


def presets() -> dict[str, Preset]:
    """Return all presets by name, in alphabetical order."""
    return {file.stem: _read(file) for file in sorted(_folder().glob("*.yaml"))}


def find_preset(name: str) -> Preset:
    """Return the preset of that name; ValueError, with the most similar name, if there is none."""
    found = presets()
    if name not in found:
        raise ValueError(
            f"there is no preset {name}.{nearest(name, found)} The presets are {', '.join(found)}; use --config for "
            "your own file"
        )
    return found[name]


def _folder() -> Path:
    """Return training/configs: inside the package if it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside, beside = package / "configs", package.parent / "training" / "configs"
    return inside if inside.is_dir() else beside


def _read(file: Path) -> Preset:
    text = file.read_text(encoding="utf-8")
    head, name = dict[str, str](), ""
    for line in text.partition("\n\n")[0].splitlines():
        if entry := re.match(r"# (\w+): +", line):
            name, line = entry[1], line[entry.end() :]
        head[name] = f"{head.get(name, '')} {line.lstrip('# ')}".strip()
    return Preset(file, text, head)
