"""Latents whose encoding is killed again and again: a program, since a process that has computed must not be forked.

`python tests/crash_encode.py FOLDER --processes 2 --trials 10 --seed 0` encodes real digits once in one process without
interruption, then per trial in `--processes`, kills these at random moments, every second time inside a write, starts
them again until they were killed `--kills` times, lets them finish and compares every file. Prints one line per trial
and exits with 1 if any differs.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from crash import running, wait

from diffusers_vae import VAE, LatentDataset, encode_images
from diffusers_vae.data import DataConfig, load_data


def encode(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = VAE(in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks).eval()
    images, _ = load_data(DataConfig(resolution=8))
    encode_images(vae, images, folder, shard_images=100, batch_size=16)


def start(folder: Path, processes: int, log: Path) -> list[int]:
    """The process ids of one launch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        process = os.fork()
        if process:
            ids.append(process)
            continue
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            if processes > 1:
                address = f"tcp://localhost:{port}"
                torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
            encode(folder)
            code = 0
        except BaseException:
            logging.exception("rank %d", rank)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return ids


def left_behind(folder: Path) -> dict[str, str]:
    """Checksum of every file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != ".lock"
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "log.txt"
    whole = options.folder / "reference"
    began = time.monotonic()
    codes = wait(start(whole, 1, log))
    assert codes == [0], log.read_text()
    duration = time.monotonic() - began
    expected = left_behind(whole)
    same = 0
    for trial in range(options.trials):
        chance = random.Random(f"{options.seed} {trial}")
        folder = options.folder / f"trial-{trial}"
        struck = []
        while True:
            ids = start(folder, options.processes, log)
            if len(struck) < options.kills:
                goal = len(list(folder.glob("shard-*"))) + chance.randint(0, 5)
                while len(list(folder.glob("shard-*"))) < goal and running(ids):
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.05))
                while len(struck) % 2 and not any(folder.glob(".*.partial")) and running(ids):
                    time.sleep(0.0002)
                for process in chance.sample(ids, len(ids)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            codes = wait(ids)
            if not any(codes):
                break
            assert -signal.SIGKILL in codes, log.read_text()
            struck.append(len(list(folder.glob("shard-*"))))
        found = left_behind(folder)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        LatentDataset(folder).verify()
        same += not wrong
        print(json.dumps({"trial": trial, "killed after shards": struck, "differs": wrong}), flush=True)
    print(f"{same} of {options.trials} identical; encoding takes {duration:.1f} s")
    return int(same < options.trials)


if __name__ == "__main__":
    sys.exit(main())
