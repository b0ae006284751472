"""Runs that are killed again and again, at random moments.

`cd tests && python -m programs.crash FOLDER --signal KILL --processes 2 --trials 20 [--kind bf16 | whole] [--finish]`
trains once without interruption, then per trial starts the same run, kills its processes at random moments, every
second time inside a save, starts it again until it was killed `--kills` times, lets it finish and compares every file
that the two left. With `--finish`, the end of the run is measured and pictured too. Prints one line per trial and exits
with 1 if any differs.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from support.launches import INTERRUPTED, Launch
from support.runs import DETERMINISTIC, left_behind, use_random_networks, whole

from diffusers_vae.data import DataConfig
from diffusers_vae.engine.config import RunConfig
from diffusers_vae.evaluation.evaluate import EvaluationConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import train
from diffusers_vae.tasks.autoencoder_config import TrainConfig


def config_of(output_dir: Path, kind: str, finish: bool) -> TrainConfig:
    """One epoch and a part of the next on real digits, in accumulated micro-steps, with a save every second step;
    measured in between where the end is.
    """
    config = TrainConfig(
        data=DataConfig(resolution=8, heldout_fraction=0.8),
        model=ModelConfig(block_out_channels=(8, 8), norm_num_groups=4),
        objective=ObjectiveConfig(scale=0.5),
        run=RunConfig(
            output_dir=str(output_dir),
            max_images=480,
            batch_size=60,
            gradient_accumulation_steps=2,
            checkpoint_every=120,
            keep_checkpoints=1,  # a signal saves one more
            log_every=150,
            tracker=None,
            mixed_precision="bf16" if kind == "bf16" else "no",
            deterministic=DETERMINISTIC,
        ),
        evaluation=EvaluationConfig(every=240 if finish else None, max_images=64),
    )
    return whole(config) if kind == "whole" else config


def run(config: TrainConfig, finish: bool) -> None:
    train(config, finish=finish)


def saving(output_dir: Path) -> bool:
    return any((output_dir / "checkpoints").glob(".images-*.partial")) or any(output_dir.glob(".*.partial"))


def strike(launch: Launch, number: int, output_dir: Path, duration: float, inside_save: bool, chance) -> None:
    """Send the signal to all processes of a launch, the first of them chosen by chance, at a random moment."""
    until = time.monotonic() + chance.uniform(0, 0.8 * duration)
    while time.monotonic() < until and launch.running:
        time.sleep(0.001)
    while inside_save and not saving(output_dir) and launch.running:
        pass
    if inside_save:
        time.sleep(chance.choice([0, 0.0005, 0.002, 0.005]))
    order = chance.sample(range(len(launch.processes)), len(launch.processes))
    launch.send(number, order, lambda: chance.choice([0, 0, 0.001, 0.01]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT", "USR1"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--kind", choices=["plain", "bf16", "whole"], default="plain")
    options = parser.parse_args(arguments)
    number = getattr(signal, f"SIG{options.signal}")
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "log.txt"
    if "TORCH_HOME" not in os.environ:
        use_random_networks(options.folder / "torch")

    assert Launch(bool, log).wait() == [0]  # the server, whose start takes longer than a run
    began = time.monotonic()
    uninterrupted = options.folder / "reference" / "run"  # cards and reports name the folder
    config = config_of(uninterrupted, options.kind, options.finish)
    launch = Launch(partial(run, config, options.finish), log, options.processes)
    codes = launch.wait()
    assert not any(codes), (codes, launch.output())
    duration = time.monotonic() - began
    expected = left_behind(uninterrupted)
    same, all_struck = 0, 0
    for trial in range(options.trials):
        chance = random.Random(f"{options.seed} {trial}")
        output_dir = options.folder / f"trial-{trial}" / "run"
        config = config_of(output_dir, options.kind, options.finish)
        struck, wrong = [], []
        while True:
            launch = Launch(partial(run, config, options.finish), log, options.processes)
            if strikes := len(struck) < options.kills:
                strike(launch, number, output_dir, duration, bool(len(struck) % 2), chance)
            codes = launch.wait()
            if not any(codes):
                break
            assert strikes, (codes, launch.output())
            struck.append(max((path.name for path in (output_dir / "checkpoints").glob("images-*")), default="start"))
            # 0: one that was at its end already; 1: one that waited for another that had stopped
            stopped = {-number, INTERRUPTED} & set(codes)
            if not stopped or not set(codes) <= {0, -number, INTERRUPTED, 1}:
                wrong.append(f"exit codes {codes}")
        found = left_behind(output_dir)
        wrong += sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        same, all_struck = same + (not wrong), all_struck + len(struck)
        at = [name.removeprefix("images-").lstrip("0") for name in struck]
        print(json.dumps({"trial": trial, "killed after": at, "differs": wrong}), flush=True)
    print(f"{same} of {options.trials} bit-identical; a run takes {duration:.1f} s")
    return int(same < options.trials or not all_struck)


if __name__ == "__main__":
    sys.exit(main())
