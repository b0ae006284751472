"""What training on a stream takes of memory.

`python tests/programs/memory.py OUTPUT_DIR ROOT EPOCHS [ROOT EPOCHS ...]` trains on the stream of Parquet files below
each ROOT in turn and prints, as JSON, for each the images seen and the bytes that the process and its workers take
together then, every 20 steps. It is a process of its own, since one that is forked shares memory with others.
"""

import argparse
import json
import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.runs import fit_with

from diffusers_vae.data import DataConfig
from diffusers_vae.engine.config import RunConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep

BATCH = 50


def own_memory(process: int) -> int:
    """Bytes of a process that no file holds; what it shares with others of its kind, in equal parts."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


class Measured(AutoencoderStep):
    """Looks at the memory every `every` steps."""

    every, found = 20, ()

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.step_number = 0

    def begin(self, images_seen, total_images, learning_rate):
        self.step_number += 1
        if self.step_number % self.every == 0:
            main = psutil.Process()
            used = sum(own_memory(process.pid) for process in (main, *main.children(recursive=True)))
            self.found.append((images_seen, used))
        return super().begin(images_seen, total_images, learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("sets", nargs="+", metavar="ROOT EPOCHS")
    parser.add_argument("--every", type=int, default=20, help="Steps between two looks.")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--shuffle_buffer", type=int, default=1000)
    options = parser.parse_args()
    data = {name: getattr(options, name) for name in ("resolution", "channels", "shuffle_buffer")}
    found = []
    for root, epochs in zip(options.sets[::2], options.sets[1::2], strict=True):
        config = TrainConfig(
            data=DataConfig(name="datasets", root=root, streaming=True, num_workers=2, **data),
            model=ModelConfig(architecture="mlp", hidden_dim=16),
            objective=ObjectiveConfig(scale=0.5),
            run=RunConfig(
                output_dir=str(options.output_dir / str(len(found))),
                epochs=int(epochs),
                batch_size=BATCH,
                checkpoint_every=10**9,
                log_every=10 * BATCH,
                tracker=None,
                mixed_precision="no",
            ),
        )
        Measured.every, Measured.found = options.every, []
        fit_with(config, step=Measured)
        found.append(Measured.found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
