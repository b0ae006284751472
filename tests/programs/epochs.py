"""Runs that note which images each step had.

`cd tests && python -m programs.epochs FOLDER JSON` runs what is in the file JSON, by name the settings of `DataConfig`,
each four times, over two epochs and a part of the third: by two processes with two workers each; again so, but killed
within the second epoch, and continued; and by one process. FOLDER/NAME/WAY has the run and, in seen-RANK.txt, a line
per image and step: the images seen before, and a checksum of its pixels.
"""

import hashlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import datasets  # noqa: F401  what a run imports late, so that every fork has it
import pyarrow.parquet  # noqa: F401
from support.launches import Launch

from diffusers_vae.data import DataConfig
from diffusers_vae.evaluation import EvaluationConfig
from diffusers_vae.loop import RunConfig, run_task
from diffusers_vae.models import ModelConfig
from diffusers_vae.objective import ObjectiveConfig
from diffusers_vae.trainer import AutoencoderTask, TrainConfig

BATCH = 8
EPOCHS = 2
PART = 20
"""Images of the last epoch."""


class Noting(AutoencoderTask):
    """The same, noting its images; `die_at` so many images, every process kills itself."""

    def __init__(self, config: TrainConfig, die_at: int | None = None):
        super().__init__(config, memory_limit=0)
        self.die_at = die_at

    def begin_step(self, images_seen, total_images, learning_rate):
        self.seen = images_seen
        if self.die_at is not None and images_seen >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().begin_step(images_seen, total_images, learning_rate)

    def step(self, model, read, draws):
        sums = [hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest() for pixels in read.pixels]
        with open(Path(self.config.run.output_dir).parent / f"seen-{self.accelerator.process_index}.txt", "a") as file:
            file.writelines(f"{self.seen} {checksum}\n" for checksum in sums)
        return super().step(model, read, draws)


def config_of(settings: dict, output_dir: Path, images: int) -> TrainConfig:
    run = RunConfig(
        output_dir=str(output_dir),
        epochs=EPOCHS + 1,
        max_images=images,
        batch_size=BATCH,
        checkpoint_every=3 * BATCH,
        log_every=BATCH,
        tracker=None,
        mixed_precision="no",
    )
    return TrainConfig(
        data=DataConfig(**settings, num_workers=2),
        model=ModelConfig(block_out_channels=(8, 8), norm_num_groups=4),
        objective=ObjectiveConfig(scale=0.5),
        run=run,
        evaluation=EvaluationConfig(max_images=8),
    )


def run(config: TrainConfig, die_at: int | None) -> None:
    run_task(Noting(config, die_at))


def main(folder: Path, sources: Path) -> int:
    for name, settings in json.loads(sources.read_text()).items():
        images = settings.pop("images")
        total = EPOCHS * images + PART
        for way, processes, dies in (("whole", 2, None), ("killed", 2, images + images // 2), ("alone", 1, None)):
            place = folder / name / way
            place.mkdir(parents=True)
            config = config_of(settings, place / "run", total)
            for die_at in (dies, None) if dies else (None,):
                codes = Launch(partial(run, config, die_at), place / "log", processes).wait()
                if any(codes) != bool(die_at):
                    print(name, way, codes, (place / "log").read_text())
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
