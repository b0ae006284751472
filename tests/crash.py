"""Runs that are killed again and again: a program, since a process that has computed must not be forked.

`python tests/crash.py FOLDER --signal KILL --processes 2 --trials 20 [--kind bf16 | whole]` trains once without
interruption, then per trial starts the same run, kills its processes at random moments, every second time inside a
save, starts it again until it was killed `--kills` times, lets it finish and compares every file that the two left.
Prints one line per trial and exits with 1 if any differs.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.figure  # noqa: F401  what a run imports late, so that every fork has it
import sklearn.datasets
import sklearn.decomposition  # noqa: F401
import torchmetrics.image.lpip  # noqa: F401
from whole import random_network, whole

from diffusers_vae.data import DataConfig
from diffusers_vae.evaluation import EvaluationConfig
from diffusers_vae.loop import Interrupted, RunConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.objective import ObjectiveConfig
from diffusers_vae.trainer import TrainConfig, train


def config_of(output_dir: Path, kind: str) -> TrainConfig:
    """One epoch and a part of the next on real digits, in accumulated micro-steps, with a save every second step."""
    config = TrainConfig(
        data=DataConfig(resolution=8),
        model=ModelConfig(block_out_channels=(8, 8), norm_num_groups=4),
        objective=ObjectiveConfig(scale=0.5),
        run=RunConfig(
            output_dir=str(output_dir),
            max_images=2000,
            batch_size=60,
            gradient_accumulation_steps=2,
            checkpoint_every=120,
            log_every=150,
            tracker=None,
            mixed_precision="bf16" if kind == "bf16" else "no",
        ),
        evaluation=EvaluationConfig(every=1100, max_images=100),
    )
    return whole(config, random_network(output_dir.parents[1] / "network")) if kind == "whole" else config


def start(run: Callable[[], object], processes: int, log: Path) -> list[int]:
    """The process ids of one launch, in each of which it runs."""
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
        if processes > 1:
            os.environ |= {  # one thread each: more of them than cores would take turns
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            }  # fmt: skip
        code = 1
        try:
            run()
            code = 0
        except Interrupted as interruption:
            print(interruption)
            code = 75
        except BaseException:
            logging.exception("rank %d", rank)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return ids


def wait(ids: list[int]) -> list[int]:
    """Exit codes; negative for a signal. When one fails, the others are ended, as launchers do."""
    codes, deadline = {}, None
    while len(codes) < len(ids):
        for process in ids:
            if process not in codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and len(codes) < len(ids):
            deadline = deadline or time.monotonic() + 20
            if time.monotonic() > deadline:
                for process in set(ids) - codes.keys():
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[process] for process in ids]


def saving(output_dir: Path) -> bool:
    return any((output_dir / "checkpoints").glob(".images-*.partial")) or any(output_dir.glob(".*.partial"))


def running(ids: list[int]) -> bool:
    return not any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) for process in ids)


def strike(ids: list[int], number: int, output_dir: Path, duration: float, inside_save: bool, chance) -> None:
    """Send the signal to all processes of a launch, the first of them chosen by chance, at a random moment."""
    until = time.monotonic() + chance.uniform(0, 0.6 * duration)
    while time.monotonic() < until and running(ids):
        time.sleep(0.001)
    while inside_save and not saving(output_dir) and running(ids):
        pass
    if inside_save:
        time.sleep(chance.choice([0, 0.0005, 0.002, 0.005]))
    for process in chance.sample(ids, len(ids)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        time.sleep(chance.choice([0, 0, 0.001, 0.01]))


def left_behind(output_dir: Path) -> dict[str, str]:
    """Checksum of every file of a finished run that must not depend on interruptions."""
    files = [path for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    found = {}
    for path in files:
        content = path.read_bytes()
        if path.name in ("config.yaml", "manifest.json"):  # name the output_dir
            continue
        if path.name == "README.md":
            content = content.replace(output_dir.as_posix().encode(), b"RUN")
        found[str(path.relative_to(output_dir))] = hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT", "USR1"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=["plain", "bf16", "whole"], default="plain")
    options = parser.parse_args()
    number = getattr(signal, f"SIG{options.signal}")
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "log.txt"

    began = time.monotonic()
    whole = options.folder / "reference" / "run"  # cards and reports name the folder
    reference = config_of(whole, options.kind)
    codes = wait(start(partial(train, reference), options.processes, log))
    assert not any(codes), (codes, log.read_text())
    duration = time.monotonic() - began
    expected = left_behind(whole)
    same = 0
    for trial in range(options.trials):
        chance = random.Random(f"{options.seed} {trial}")
        output_dir = options.folder / f"trial-{trial}" / "run"
        config = config_of(output_dir, options.kind)
        struck, wrong = [], []
        while True:
            ids = start(partial(train, config), options.processes, log)
            if len(struck) < options.kills:
                strike(ids, number, output_dir, duration, bool(len(struck) % 2), chance)
            codes = wait(ids)
            if not any(codes):
                break
            struck.append(max((path.name for path in (output_dir / "checkpoints").glob("images-*")), default="start"))
            # 0: one that was at its end already; 1: one that waited for another that had stopped
            expected_codes = {0, 75, -number} | ({1} if 75 in codes else set())
            if number != signal.SIGKILL and not set(codes) <= expected_codes:
                wrong.append(f"exit codes {codes}")
        found = left_behind(output_dir)
        wrong += sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        same += not wrong
        at = [name.removeprefix("images-").lstrip("0") for name in struck]
        print(json.dumps({"trial": trial, "killed after": at, "differs": wrong}), flush=True)
    print(f"{same} of {options.trials} bit-identical; a run takes {duration:.1f} s")
    return int(same < options.trials)


if __name__ == "__main__":
    sys.exit(main())
