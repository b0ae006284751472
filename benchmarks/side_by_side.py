"""What the scripts beside this file have in common: a stock model, and other programs timed by their progress bars."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

BAR = re.compile(rb"(\d+)/(\d+) \[[^\]]*(?:img/s|s/img)")
MEMORY = re.compile(r"at most ([\d,]+) MiB of memory")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
"""`accelerate launch`, also where it is not on the PATH."""


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


def follow(command: list[str], images: int, stop: int | None = None) -> tuple[list[tuple[float, int]], str]:
    """Run a program and return the seconds at which its bar of training on `images` images showed which count, and all
    that it printed. A run that has come to `stop` images is asked to end there.
    """
    marks: list[tuple[float, int]] = []
    text, stopped = b"", False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while chunk := process.stdout.read1():
            now = time.perf_counter()
            text += chunk
            for done, of in BAR.findall(chunk):
                if int(of) == images and not stopped and (not marks or int(done) > marks[-1][1]):
                    marks.append((now, int(done)))
            if stop and not stopped and len(moved(marks)) > 1 and marks[-1][1] >= stop:
                stopped = True
                process.send_signal(signal.SIGTERM)
    printed = text.decode(errors="replace")
    if process.returncode and not stopped:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed[-2000:]}")
    if len(moved(marks)) < 2:
        raise SystemExit(f"{' '.join(command)} showed too few steps of {images:,} images to time:\n{printed[-2000:]}")
    return marks, printed


def moved(marks: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """The marks after the first step."""
    return [mark for mark in marks if mark[1] > 0]


def summary_of(printed: str) -> str:
    """The line of a run that says what is trained, and how."""
    return next((line.strip() for line in printed.splitlines() if "parameters" in line), "")


def memory_of(printed: str) -> float:
    """GiB that a program said it used at most."""
    return float(MEMORY.findall(printed)[-1].replace(",", "")) / 1024


def speed(marks: list[tuple[float, int]]) -> float:
    """Images/s without the first step, which sets much up."""
    (start, first), *_, (end, last) = moved(marks)
    return (last - first) / max(end - start, 1e-3)


def write(path: str, measured: dict) -> None:
    """All figures as JSON, with the command and what it ran on."""
    about = {"command": sys.argv, "python": platform.python_version(), "torch": torch.__version__}
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(about | {"measured": measured}, indent=2) + "\n")
    os.replace(partial, path)
