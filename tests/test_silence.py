"""A process or a reading worker that falls silent is named and ends the run; one that works for long does not."""

import dataclasses
import os
import re
import signal
import threading
import time
from functools import partial
from typing import ClassVar

import psutil
import pytest
import torch
from support.launches import Launch, run_forked, without_output
from support.runs import TINY_VAE, fit, fit_with, left_behind, tiny

from diffusers_vae.cli.encode import run_encode
from diffusers_vae.cli.evaluate import run_evaluate
from diffusers_vae.data import ArrayImages, DataConfig
from diffusers_vae.processes import on_main, process_share
from diffusers_vae.silence import Patience, report_progress, watched
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep

SHORT = Patience(warning=1, end=3)
AT = 150
"""Images after which something happens."""


def config_of(output_dir):
    """Six steps, with a checkpoint after each."""
    config = tiny(output_dir, TINY_VAE, batch_size=50, max_images=300, checkpoint_every=1, keep_checkpoints=100)
    return dataclasses.replace(config, data=DataConfig(resolution=8, heldout_fraction=0.8))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folders of a run of one and of two processes that went through, by their number."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for processes in (1, 2):
        run_forked(fit, config_of(folder / str(processes)), log=folder / "log", processes=processes)
    return lambda processes: folder / str(processes)


def assert_continued(config, reference, log, processes):
    """The same settings continue the run to the files of the `reference`."""
    output = run_forked(fit, config, log=log, processes=processes)
    assert f"continuing from {config.run.output_dir}/checkpoints/images-{AT:012d}" in output
    assert left_behind(config.run.output_dir) == left_behind(reference)


def fit_until(happen, config, ranks=(0,), workers=0, patience=SHORT):
    """Train, and call `happen` with the training set after some images on the processes `ranks`."""
    loaded = []

    def change(data):
        loaded.append(data.train_set)
        return dataclasses.replace(data, workers=workers)

    class Happens(AutoencoderStep):
        def begin(self, images_seen, *arguments):
            if images_seen == AT and process_share()[0] in ranks:
                happen(loaded[0])
            return super().begin(images_seen, *arguments)

    fit_with(config, step=Happens, change=change, patience=patience)


def stop(train_set):
    time.sleep(4 * SHORT.tick)  # so that the others have heard of the step
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_workers(train_set):
    for child in psutil.Process().children():
        child.suspend()


class Hanging(ArrayImages):
    """Images in a pipe that nobody writes to."""

    def read(self, indices):
        os.mkfifo(self.pipe)
        self.pipe.open()


class Slow(ArrayImages):
    """Images that take some seconds of work, once."""

    def read(self, indices):
        compute(5)
        self.__class__ = ArrayImages
        return self.read(indices)


def replace_images(kind, pipe, train_set):
    """From now on, this process reads images of another `kind`."""
    train_set.__class__, train_set.pipe = kind, pipe


def fit_slowly(config):
    def change(data):
        data.train_set.__class__ = Slow
        return dataclasses.replace(data, workers=1)

    fit_with(config, change=change, patience=Patience(warning=1, end=2.5))


def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.ones(1000).sum()


def sleep_and_report(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
        report_progress()


def one_works(work):
    """The main process works, and the others wait."""
    with watched(Patience(warning=1, end=2.5)):
        torch.distributed.init_process_group("gloo")
        on_main(work)


@pytest.mark.slow
class TestProcesses:
    def test_stopped_process_is_named_and_the_same_settings_continue(self, uninterrupted, tmp_path):
        def config(rank):
            return config_of(tmp_path / f"run of {rank}")

        launches = [
            Launch(partial(fit_until, stop, config(rank), [rank]), tmp_path / f"log of {rank}", processes=2)
            for rank in (0, 1)
        ]
        for rank, launch in enumerate(launches):
            codes = launch.wait(timeout=40, grace=1)
            assert codes[1 - rank] == 1 and codes[rank] == -signal.SIGKILL, launch.output()
            output = launch.output()
            said = re.findall(rf"^error: process {rank}.* has not been heard from for \d+ s.*$", output, re.MULTILINE)
            assert len(said) == 1 and "The same command continues" in said[0] and re.search(r"step \d", said[0]), output
            assert output.count("the run ends with an error after 3 s") == 1
            assert "Traceback" not in output
            assert_continued(config(rank), uninterrupted(2), tmp_path / f"log of {rank} continued", 2)

    def test_the_others_end_where_nothing_can_be_printed(self, tmp_path):
        work = partial(fit_until, stop, config_of(tmp_path / "run"), [1])
        launch = Launch(partial(without_output, "closed pipe", work), tmp_path / "log", processes=2)
        assert launch.wait(timeout=30, grace=1) == [1, -signal.SIGKILL]

    def test_process_that_hangs_in_reading_is_named(self, uninterrupted, tmp_path):
        config = config_of(tmp_path / "run")
        happen = partial(replace_images, Hanging, tmp_path / "pipe")
        launch = Launch(partial(fit_until, happen, config, [1]), tmp_path / "log", processes=2)
        assert launch.wait(timeout=40) == [1, 1], launch.output()
        output = launch.output()
        said = re.findall(r"^error: process 1 has made no progress for \d+ s in reading for step 4\..*$", output, re.M)
        assert len(said) == 1 and output.count("error: ") == 1, output
        assert_continued(config, uninterrupted(2), tmp_path / "log of the second", 2)

    def test_process_that_never_started_is_named(self, tmp_path):
        launches = [
            Launch(
                partial(fit_until, stop, config_of(tmp_path / f"run of {rank}")), tmp_path / f"log of {rank}",
                processes=2, ranks=[1 - rank],
            )
            for rank in (0, 1)
        ]  # fmt: skip
        for rank, expected in enumerate(["process 0 must answer at localhost:", "only 1 of 2 processes have started"]):
            assert launches[rank].wait(timeout=40) == [1]
            output = launches[rank].output()
            assert f"TimeoutError: {expected}" in output and f"process {rank}" in output, output
            assert not (tmp_path / f"run of {rank}").exists()

    def test_launch_that_is_stopped_as_a_whole_goes_on(self, uninterrupted, tmp_path):
        """As schedulers do for another job: nobody was waited for while all were stopped."""
        config = config_of(tmp_path / "run")
        launch = Launch(partial(fit_until, stop, config, [0, 1]), tmp_path / "log", processes=2)
        deadline = time.monotonic() + 40
        while any(psutil.Process(process.pid).status() != psutil.STATUS_STOPPED for process in launch.processes):
            assert time.monotonic() < deadline and launch.running, launch.output()
            time.sleep(0.05)
        time.sleep(SHORT.end + 1)
        launch.send(signal.SIGCONT)
        assert launch.wait(timeout=40) == [0, 0], launch.output()
        assert "has not been heard from" not in launch.output()
        assert left_behind(config.run.output_dir) == left_behind(uninterrupted(2))

    def test_work_of_one_is_not_cut_off(self, tmp_path):
        works = compute, sleep_and_report
        launches = [
            Launch(partial(one_works, partial(work, 5)), tmp_path / work.__name__, processes=2) for work in works
        ]
        for launch in launches:
            assert launch.wait() == [0, 0] and "error" not in launch.output(), launch.output()

    def test_one_that_does_nothing_ends_all(self, tmp_path):
        launch = Launch(partial(one_works, partial(time.sleep, 60)), tmp_path / "log", processes=3)
        assert launch.wait(timeout=40) == [1, 1, 1]
        assert launch.output().count("error: process 0 has made no progress for") == 1, launch.output()
        assert "Traceback" not in launch.output()


BRIEF = Patience(warning=0.5, end=2)


def run_until(rank, run_command, arguments):
    """Run a command, and stop process `rank` at its third batch."""
    read, batches = ArrayImages.read, []

    def read_or_stop(self, indices):
        batches.append(indices)
        if len(batches) == 3 and process_share()[0] == rank:
            stop(None)
        return read(self, indices)

    ArrayImages.read = read_or_stop  # in this process, which ends with it
    run_command([*map(str, arguments)], patience=BRIEF)


@pytest.mark.slow
class TestCommands:
    @pytest.mark.parametrize(
        ("run_command", "rank", "arguments", "words"),
        [
            (run_evaluate, 0, ["RUN", "--evaluation.batch_size", 4], "Repeat the command to measure again"),
            (run_encode, 1, ["digits", "--vae", "RUN", "--shard_images", 100], "The same command continues"),
        ],
    )
    def test_stopped_process_is_named(self, run_command, rank, arguments, words, finished_mlp_run, tmp_path):
        arguments = [finished_mlp_run if word == "RUN" else word for word in [*arguments, "--out", tmp_path / "out"]]
        launch = Launch(partial(run_until, rank, run_command, arguments), tmp_path / "log", processes=2)
        codes = launch.wait(timeout=20, grace=0.1)
        assert codes[1 - rank] == 1 and codes[rank] == -signal.SIGKILL, launch.output()
        output = launch.output()
        said = re.findall(rf"^error: process {rank}.* has not been heard from for \d+ s.*$", output, re.MULTILINE)
        assert len(said) == 1 and words in said[0], output
        assert "the run ends with an error" in output and "Traceback" not in output


@pytest.mark.slow
class TestWorkers:
    def test_stopped_worker_is_named_and_the_same_settings_continue(self, uninterrupted, tmp_path):
        config = config_of(tmp_path / "run")
        launch = Launch(partial(fit_until, stop_workers, config, workers=2), tmp_path / "log")
        assert launch.wait(timeout=40) == [1], launch.output()
        output = launch.output()
        said = re.search(r"TimeoutError: reading made no progress.*worker [01] of 2 \(process (\d+), stopped\)", output)
        assert said and "50 images, image " in said[0], output
        assert "reading is slow" in output
        assert not psutil.pid_exists(int(said[1]))
        newest = max((tmp_path / "run" / "checkpoints").glob("images-*"))
        output = run_forked(fit, config, log=tmp_path / "log of the second")
        assert f"continuing from {newest}" in output
        assert left_behind(tmp_path / "run") == left_behind(uninterrupted(1))

    def test_slow_reading_is_reported_and_not_cut_off(self, tmp_path):
        config = config_of(tmp_path / "run")
        output = run_forked(fit_slowly, config, log=tmp_path / "log")
        assert "reading is slow" in output and "error" not in output


class Threads(AutoencoderStep):
    """Notes the threads that there are in a step."""

    found: ClassVar = set()

    def begin(self, *arguments):
        self.found.update(threading.enumerate())
        return super().begin(*arguments)


def test_one_process_has_no_thread_for_it(tmp_path):
    before = set(threading.enumerate())
    fit_with(tiny(tmp_path / "run"), step=Threads)
    added = {type(thread).__module__.split(".")[0] for thread in Threads.found - before}
    assert added <= {"tqdm"}  # which refreshes the bar
