"""Training that notes which images each step had, for launches of one or several processes."""

import hashlib
import os
import signal
from pathlib import Path

import torch
from support.runs import fit_with

from diffusers_vae.data import Read
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep

Steps = dict[int, list[list[str]]]
"""For each step, by the images seen before it, the checksums of the images of each process."""


def checksums(read: Read) -> list[str]:
    """SHA-256 of the pixels of each image."""
    return [hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest() for pixels in read.pixels]


class Noting(AutoencoderStep):
    """Notes images in seen-RANK.txt beside `run.output_dir`, a line per image: the images seen before its step, and its
    checksum. Every process kills itself before the step that begins at `die_at` images.
    """

    die_at: int | None = None

    def begin(self, images_seen: int, total_images: int, learning_rate: float) -> dict[str, float]:
        self.images_seen = images_seen
        if images_seen == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().begin(images_seen, total_images, learning_rate)

    def batch(self, read: Read, inputs: dict[str, torch.Tensor]):
        with open(Path(self.config.run.output_dir).parent / f"seen-{self.accelerator.process_index}.txt", "a") as file:
            file.writelines(f"{self.images_seen} {checksum}\n" for checksum in checksums(read))
        return super().batch(read, inputs)


def train(config: TrainConfig, die_at: int | None = None) -> None:
    """Train on images that are read on demand."""
    fit_with(config, 0, type("Dying", (Noting,), {"die_at": die_at}))


def noted(folder: Path) -> Steps:
    """The steps that the processes of a run in `folder` have noted."""
    steps: Steps = {}
    files = sorted(folder.glob("seen-*.txt"))
    for rank, file in enumerate(files):
        for line in file.read_text().splitlines():
            seen, checksum = line.split()
            steps.setdefault(int(seen), [[] for _ in files])[rank].append(checksum)
    return steps
