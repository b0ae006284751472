"""A run that ends at any of its durable operations, or loses what was not synced there, continues bit-identically.

Every operation in turn: what a process would leave that ended there, which is a copy of its folder before the
operation, is continued, and every file is compared with those of a run without interruption. Where another process
meets the end of one, processes end themselves at some of their operations, and with `-m soak` at all. States of the
disk that are the same, file by file, are continued once.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from support.crashes import (
    ENDED,
    Disk,
    End,
    Snapshots,
    copy_after_power_failure,
    in_folder,
    operations,
    state_of,
    watched,
)
from support.launches import Launch
from support.runs import tiny

from diffusers_vae import LatentDataset, encode_images
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.engine.checkpoint import find_checkpoint
from diffusers_vae.evaluation.evaluate import EvaluationConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs fork")]


def config_of(**run):
    """Two steps; the second checkpoint deletes the first."""
    run = {"max_images": 20, "batch_size": 10, "log_every": 10, "checkpoint_every": 10, "keep_checkpoints": 1} | run
    config = dataclasses.replace(tiny("run", **run), evaluation=EvaluationConfig(max_images=8))
    model = dataclasses.replace(config.model, latent_dim=1)  # the model with the fewest pictures
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, heldout_fraction=0.9))


def run_loop() -> None:
    train(config_of(), finish=False)


def run_whole() -> None:
    train(config_of())


def encode() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    vae = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4).build(1, (8, 8)).eval()
    _, images = load_data(DataConfig(resolution=8, heldout_fraction=0.03))
    encode_images(vae, images, "latents", shard_images=20, batch_size=10)
    LatentDataset("latents").verify()


def launched(work: Callable[[], object], log: Path, processes: int = 1, timeout: float = 120) -> list[int]:
    codes = Launch(work, log, processes).wait(timeout)
    if any(code not in (0, ENDED) for code in codes) and processes == 1:
        pytest.fail(log.read_text())
    return codes


class Points:
    """The operations of a launch without interruption, and what it leaves."""

    def __init__(self, work: Callable[[], object], folder: Path, processes: int):
        self.work, self.folder, self.processes, self.log = work, folder, processes, folder / "log"
        reference = folder / "reference"
        assert not any(launched(partial(watched, work, reference, Disk()), self.log, processes)), self.log.read_text()
        self.expected = state_of(reference)
        self.operations = [operations(reference, rank) for rank in range(processes)]
        self.states: dict[frozenset, tuple[Path, str]] = {}
        first = (number for number, name in enumerate(self.operations[0][0]) if "checkpoints/images-" in name)
        self.first_checkpoint = next(first, len(self.operations[0][0]))

    def copy_at_every_operation(
        self, begin: Callable[[], object] | None = None, unfinished: str | None = None, power_failures: bool = True
    ) -> int:
        """Keep what an end of the first process at each operation would leave, also by a power failure where that loses
        something, from what `begin` has done on; how many. For `unfinished`, see `keep`.
        """
        trial, states = self.folder / "copied", self.folder / "states"
        states.mkdir()
        if begin:
            assert launched(partial(in_folder, begin, trial), self.log) == [0]
        copying = partial(watched, self.work, trial, Snapshots(trial, states))
        assert not any(launched(copying, self.log, self.processes)), self.log.read_text()
        assert state_of(trial) == self.expected
        names, lossy = operations(trial)
        found = sorted(states.iterdir())
        assert len(found) == len(names) + len(lossy)
        found = [state for state in found if power_failures or "power" not in state.name]
        for state in found:
            number = int(state.name[:4])
            self.keep(state, names[number], unfinished, checkpoint=bool(begin) or number > self.first_checkpoint)
        return len(found)

    def end_at_operations(self, every: int = 1, power_failures: bool = True) -> int:
        """End the first process at one in `every` of its operations, and the others at each of theirs, also by a
        power failure where that loses something; how many.
        """
        points = 0
        for rank in range(self.processes):
            names, lossy = self.operations[rank]
            for number in range(0, len(names), 1 if rank else every):
                self.end_at(number, rank, power := power_failures and number in lossy)
                points += 1 + power
        return points

    def end_at(self, number: int, rank: int, power_failure: bool) -> None:
        """End process `rank` at an operation, and keep what is left, and would be by a power failure."""
        trial, lost = (self.folder / f"{rank}-{number:04d}{name}" for name in ("", ".lost"))
        codes = launched(partial(watched, self.work, trial, End(number, lost), rank), self.log, self.processes)
        name = self.operations[rank][0][number]
        assert codes[rank] == ENDED, (name, codes, self.log.read_text())
        left = [trial]
        if power_failure:
            paths = [Path(path) for path in json.loads(lost.read_text())]
            left.append(self.folder / f"{trial.name}-power")
            copy_after_power_failure(trial, paths, left[1])
        for folder in left:
            self.keep(folder, name, checkpoint=rank == 0 and number > self.first_checkpoint)

    def keep(self, trial: Path, operation: str, unfinished: str | None = None, checkpoint: bool = False) -> None:
        """Keep what lies in `trial` to continue it, unless it is as another state. `unfinished` stands for the content
        of all unfinished files. Files that have their names are whole: the log alone grows in place, and a model's
        config is replaced when its latents were measured. If `checkpoint`, a whole checkpoint must be among them.
        """
        if checkpoint:
            assert find_checkpoint(trial / "run" / "checkpoints")[0], f"ended before {operation}: no checkpoint is left"
        state = state_of(trial)
        other = [path for path in state.keys() & self.expected.keys() if state[path] != self.expected[path]]
        torn = [path for path in other if Path(path).name not in ("metrics.jsonl", "config.json")]
        assert not torn, f"ended before {operation}: {torn}"
        if unfinished is not None:
            state = {path: unfinished if ".partial" in path else content for path, content in state.items()}
        if self.states.setdefault(frozenset(state.items()), (trial, operation)) != (trial, operation):
            shutil.rmtree(trial)

    def continue_all(self) -> None:
        """Continue all states that were kept, one after the other in one launch, and compare all files of each."""
        trials = list(self.states.values())
        log = self.folder / "log of what is continued"
        work = partial(one_after_the_other, self.work, [folder for folder, _ in trials])
        assert not any(launched(work, log, self.processes, timeout=1200)), log.read_text()
        assert "is damaged" not in log.read_text(), log.read_text()
        for folder, operation in trials:
            found = state_of(folder)
            different = [
                path for path in found.keys() | self.expected.keys() if found.get(path) != self.expected.get(path)
            ]
            assert not different, f"ended before {operation}: {different}"


def one_after_the_other(work: Callable[[], object], folders: list[Path]) -> None:
    for folder in folders:
        AcceleratorState._reset_state(True)  # of the one before
        logging.info("in %s", folder)
        in_folder(work, folder)


def test_run_ended_at_any_operation_continues_bit_identically(tmp_path, record_property):
    """The loop with its checkpoints, their deletion and its log; the end of a run has a test of its own."""
    points = Points(run_loop, tmp_path, 1)
    record_property("points", count := points.copy_at_every_operation())
    assert count > 90 and sum(name.startswith("unlink") for name in points.operations[0][0]) > 5
    points.continue_all()
    record_property("states", len(points.states))


def test_run_of_two_processes_one_of_which_ends_at_any_operation_continues_bit_identically(tmp_path, record_property):
    points = Points(run_loop, tmp_path, 2)
    assert len(points.operations[1][0]) > 5
    count = points.copy_at_every_operation(power_failures=False)
    record_property("points", count + points.end_at_operations(every=8, power_failures=False))
    points.continue_all()
    record_property("states", len(points.states))


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
def test_run_whose_processes_end_themselves_at_every_operation_continues_bit_identically(processes, tmp_path):
    points = Points(run_loop, tmp_path, processes)
    points.end_at_operations(power_failures=processes == 1)
    points.continue_all()


@pytest.mark.parametrize("processes", [1, 2])
def test_encoding_ended_at_any_operation_continues_with_the_same_files(processes, tmp_path, record_property):
    points = Points(encode, tmp_path, processes)
    visit = points.copy_at_every_operation if processes == 1 else points.end_at_operations
    record_property("points", count := visit())
    kinds = {name.partition(" ")[0] for name in points.operations[0][0]}
    assert count > 20 and kinds >= {"open", "write", "fsync", "rename"}
    points.continue_all()
    record_property("states", len(points.states))


def test_end_of_a_run_interrupted_at_any_operation_is_done_again_the_same(tmp_path, record_property):
    """From the last checkpoint on: model, evaluation, pictures, report, card. Measuring and drawing take long, so that
    states that differ only in the content of unfinished files are continued once.
    """
    points = Points(run_whole, tmp_path, 1)
    record_property("points", count := points.copy_at_every_operation(begin=run_loop, unfinished=""))
    assert count > 60
    points.continue_all()
    record_property("states", len(points.states))


def test_finished_run_started_again_does_no_operation(tmp_path):
    for number in range(2):
        assert launched(partial(watched, run_whole, tmp_path / "again", Disk()), tmp_path / "log") == [0]
        names = operations(tmp_path / "again")[0]
        assert bool(names) == (number == 0)


def test_power_failure_would_be_noticed(tmp_path):
    """A file that was renamed before it was synced is lost with its new name."""
    disk = Disk()
    (tmp_path / "a").write_text("text")
    disk("write", tmp_path / "a", None)
    disk("rename", tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "b")
    disk("fsync", tmp_path / "b", None)
    assert disk.lossy == [1, 2]
    copy_after_power_failure(tmp_path, disk.to_lose(), tmp_path / "copy")
    assert (tmp_path / "copy" / "b").read_text() == ""
