"""How long a user waits before anything happens: for an import and for `--help`, beside an import of stock diffusers,
and for `--dry_run`, beside `accelerate launch` of a script that does nothing. Each in a process of its own, in turn.

    python benchmarks/startup.py --rounds 10 --out startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side import LAUNCH
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable]
COMMAND_LINE, TRAINING = [*PYTHON, "-m", "diffusers_vae.cli"], [str(ROOT / "training" / "train_vae.py")]


def commands(scratch: Path) -> dict[str, tuple[list[str], str | None]]:
    """What is timed, by its name in the table: a command, and the name of the one that it is compared with."""
    nothing = scratch / "nothing.py"
    nothing.touch()
    dry = ["--dry_run", "--run.output_dir", str(scratch / "run")]
    imports = {
        "import torch, diffusers": None,
        "import torch, diffusers, diffusers_vae": "import torch, diffusers",
        "from diffusers import AutoencoderKL": None,
        "from diffusers_vae import VAE": "from diffusers import AutoencoderKL",
        "from diffusers_vae import *": "from diffusers import AutoencoderKL",
    }
    return {
        **{code: ([*PYTHON, "-c", code], base) for code, base in imports.items()},
        "diffusers-vae --help": ([*COMMAND_LINE, "--help"], None),
        "diffusers-vae evaluate --help": ([*COMMAND_LINE, "evaluate", "--help"], "from diffusers import AutoencoderKL"),
        "training/train_vae.py --help": ([*PYTHON, *TRAINING, "--help"], "from diffusers import AutoencoderKL"),
        "accelerate launch nothing.py": ([*LAUNCH, str(nothing)], None),
        "accelerate launch training/train_vae.py --dry_run": (
            [*LAUNCH, *TRAINING, *dry],
            "accelerate launch nothing.py",
        ),
    }


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall-clock seconds that `command` took, and seconds on the processor, user and system."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    after = os.times()
    used = sum(getattr(after, name) - getattr(before, name) for name in ("children_user", "children_system"))
    return time.perf_counter() - start, used


def table(figures: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, figures))
    lines = [f"{'':<{width}}  wall s   CPU s   CPU, times that of"]
    for name, figure in figures.items():
        ratio = f"{figure['cpu_ratio']:>6.3f}   {figure['against']}" if figure["against"] else ""
        lines.append(f"{name:<{width}}  {figure['wall']:>6.2f}  {figure['cpu']:>6.2f}  {ratio}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="Times that each is run, after one that is not counted.")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="Of the lines, those that hold one of these texts.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures and all seconds.")
    settings = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        chosen = commands(Path(scratch))
        if settings.only:
            named = {name for name in chosen if any(text in name for text in settings.only)}
            named |= {chosen[name][1] for name in named}  # with what they are compared with
            chosen = {name: command for name, command in chosen.items() if name in named}
        taken = {name: [] for name in chosen}
        for number in tqdm(range(settings.rounds + 1), unit="round"):
            for name, (command, _) in chosen.items():
                took = seconds(command)
                if number:  # before, files were read from the disk and compiled
                    taken[name].append(took)
    figures = {}
    for name, (_, against) in chosen.items():
        (wall, cpu), base = zip(*taken[name], strict=True), against and taken[against]
        figures[name] = {
            "wall": median(wall),
            "cpu": median(cpu),
            "against": against,
            "cpu_ratio": base and median(ours / theirs for ours, (_, theirs) in zip(cpu, base, strict=True)),
            "wall_ratio": base and median(ours / theirs for ours, (theirs, _) in zip(wall, base, strict=True)),
            "seconds": taken[name],
        }
    print(table(figures))
    if settings.out:
        packages = ("diffusers-vae", "torch", "diffusers", "transformers", "peft", "accelerate")
        record = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "rounds": settings.rounds,
            "figures": figures,
        }
        settings.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
