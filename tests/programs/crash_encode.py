"""Latents whose encoding is killed again and again, at random moments.

`cd tests && python -m programs.crash_encode FOLDER --processes 2 --trials 10 --seed 0` encodes real digits once in one
process without interruption, then per trial in `--processes`, kills these at random moments, every second time inside a
write, starts them again until they were killed `--kills` times, lets them finish and compares every file. Prints one
line per trial and exits with 1 if any differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from support.launches import Launch

from diffusers_vae import VAE, LatentDataset, encode_images
from diffusers_vae.data import DataConfig, load_data


def encode(folder: Path) -> None:
    """Encode real digits in shards of 100, under torch.distributed if several processes were launched."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = VAE(in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks).eval()
    images, _ = load_data(DataConfig(resolution=8))
    encode_images(vae, images, folder, shard_images=100, batch_size=16)


def checksums(folder: Path) -> dict[str, str]:
    """Checksum of every file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != ".lock"
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "log.txt"
    uninterrupted = options.folder / "reference"
    began = time.monotonic()
    launch = Launch(partial(encode, uninterrupted), log)
    assert launch.wait() == [0], launch.output()
    duration = time.monotonic() - began
    expected = checksums(uninterrupted)
    same, all_struck = 0, 0
    for trial in range(options.trials):
        chance = random.Random(f"{options.seed} {trial}")
        folder = options.folder / f"trial-{trial}"
        struck = []
        while True:
            launch = Launch(partial(encode, folder), log, options.processes)
            if strikes := len(struck) < options.kills:
                goal = len(list(folder.glob("shard-*"))) + chance.randint(0, 5)
                while len(list(folder.glob("shard-*"))) < goal and launch.running:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.05))
                while len(struck) % 2 and not any(folder.glob(".*.partial")) and launch.running:
                    time.sleep(0.0002)
                launch.send(signal.SIGKILL, chance.sample(range(options.processes), options.processes))
            codes = launch.wait()
            if not any(codes):
                break
            assert strikes and -signal.SIGKILL in codes, launch.output()
            struck.append(len(list(folder.glob("shard-*"))))
        found = checksums(folder)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        LatentDataset(folder).verify()
        same, all_struck = same + (not wrong), all_struck + len(struck)
        print(json.dumps({"trial": trial, "killed after shards": struck, "differs": wrong}), flush=True)
    print(f"{same} of {options.trials} identical; encoding takes {duration:.1f} s")
    return int(same < options.trials or not all_struck)


if __name__ == "__main__":
    sys.exit(main())
