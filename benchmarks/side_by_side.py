"""What the scripts beside this file have in common: a stock model, and other programs timed by their progress bars."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

BAR = re.compile(rb"(\d+)/(\d+) \[[^\]]*img/s")


def stock_vae(channels: int, block_out_channels: Sequence[int], **settings: Any) -> AutoencoderKL:
    """A stock autoencoder with random weights, in stock's blocks for as many levels as there are widths."""
    blocks = len(block_out_channels)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=block_out_channels,
        **settings,
    )


def follow(command: list[str], images: int) -> tuple[list[tuple[float, int]], str]:
    """When the bar of training on so many images stood at which, and the line that says what is trained, and how."""
    marks: list[tuple[float, int]] = []
    text = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while chunk := process.stdout.read1():
            now = time.perf_counter()
            text += chunk
            for done, of in BAR.findall(chunk):
                if int(of) == images and (not marks or int(done) > marks[-1][1]):
                    marks.append((now, int(done)))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text.decode(errors='replace')[-2000:]}")
    summaries = [line.strip() for line in text.decode(errors="replace").splitlines() if "parameters" in line]
    return marks, summaries[0] if summaries else ""


def speed(marks: list[tuple[float, int]]) -> float:
    """Images/s without the first step, which sets much up."""
    (start, first), (end, last) = next(mark for mark in marks if mark[1] > 0), marks[-1]
    return (last - first) / (end - start)


def write(path: str, measured: dict) -> None:
    """All figures as JSON, with the command and what it ran on."""
    about = {"command": sys.argv, "python": platform.python_version(), "torch": torch.__version__}
    Path(path).write_text(json.dumps(about | {"measured": measured}, indent=2) + "\n")
