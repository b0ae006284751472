"""A run that was interrupted, by whatever, ends as if nothing had happened."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from functools import cache, partial
from pathlib import Path

import PIL.ImageFile
import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from filelock import FileLock
from programs import crash
from support.files import flip
from support.launches import INTERRUPTED, Launch, command, run_forked, without_output
from support.runs import (
    LAUNCH,
    TINY_VAE,
    at,
    begun,
    end,
    fit,
    fit_with,
    group_is_gone,
    interrupted_at,
    left_behind,
    records,
    tensors,
    tiny,
    whole,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_vae import cli
from diffusers_vae.data import DataConfig
from diffusers_vae.engine.checkpoint import find_checkpoint
from diffusers_vae.evaluation.evaluate import EvaluationConfig
from diffusers_vae.evaluation.report import read_report
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.processes import Interrupted
from diffusers_vae.storage import watch
from diffusers_vae.tasks.autoencoder import train
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep

FEW = DataConfig(resolution=8, heldout_fraction=0.9)
"""180 images to train on."""
END = 330


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Settings of a run of each kind that went through, with accumulation and a second epoch, not measured at its end,
    with a checkpoint after each step.
    """

    @cache
    def of(kind):
        AcceleratorState._reset_state(True)
        folder = tmp_path_factory.mktemp("uninterrupted")
        config = tiny(
            folder / "run", TINY_VAE, mixed_precision="bf16" if kind == "bf16" else "no", max_images=300,
            batch_size=50, gradient_accumulation_steps=2, checkpoint_every=1, keep_checkpoints=100,
        )  # fmt: skip
        config = dataclasses.replace(config, data=FEW)
        if kind == "whole":
            config = whole(config)
        fit(config)
        AcceleratorState._reset_state(True)
        return config

    return of


PLACES = [150, *(pytest.param(images_seen, marks=pytest.mark.slow) for images_seen in (0, 180, 280))]
KINDS = ["plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bf16", "whole"))]


class TestSameCommand:
    @pytest.mark.slow
    @pytest.mark.parametrize("images_seen", PLACES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_resumed_run_is_bit_identical(self, kind, images_seen, uninterrupted, tmp_path, caplog):
        """From within an epoch between two records, from the start, from the end of an epoch, and before the last
        step.
        """
        config = uninterrupted(kind)
        output_dir = interrupted_at(images_seen, config.run.output_dir, tmp_path / "run")
        caplog.set_level("INFO")
        fit(at(config, output_dir))
        assert left_behind(output_dir) == left_behind(config.run.output_dir)
        assert (f"continuing from {output_dir}" in caplog.text) == bool(images_seen)
        assert max(path.name for path in (output_dir / "checkpoints").iterdir()) == f"images-{END:012d}"

    @pytest.mark.slow
    @pytest.mark.usefixtures("drawn_figures")
    def test_resumed_run_that_is_measured_leaves_the_same_files(self, tmp_path):
        """Between two evaluations, with a learned scale; weights, pictures, report and card too."""
        config = tiny(tmp_path / "a" / "run", TINY_VAE, max_images=240, checkpoint_every=150, keep_checkpoints=100)
        config = dataclasses.replace(config, data=FEW, evaluation=EvaluationConfig(every=120, max_images=16))
        config = dataclasses.replace(config, objective=ObjectiveConfig(scale="learned"))
        train(config)
        assert [record["images_seen"] for record in records(tmp_path / "a" / "run", "evaluation")] == [120, 240]
        (tmp_path / "b").mkdir()
        output_dir = interrupted_at(150, config.run.output_dir, tmp_path / "b" / "run")
        train(at(config, output_dir))
        assert left_behind(output_dir) == left_behind(config.run.output_dir)

    @pytest.mark.slow
    def test_damaged_checkpoints_are_passed_over(self, uninterrupted, tmp_path, caplog):
        config = uninterrupted("plain")
        output_dir = interrupted_at(280, config.run.output_dir, tmp_path / "run")
        newest, second, third, fourth = sorted((output_dir / "checkpoints").iterdir(), reverse=True)[:4]
        flip(newest / "model.safetensors")
        (second / "optimizer.safetensors").write_bytes(b"")
        (third / "model.safetensors").unlink()
        os.mkfifo(third / "model.safetensors")
        caplog.set_level("INFO")
        fit(at(config, output_dir))
        assert left_behind(output_dir) == left_behind(config.run.output_dir)
        for words in (
            f"{newest} is damaged",
            f"{second} is damaged",
            f"{third} is damaged",
            f"continuing from {fourth}",
        ):
            assert words in caplog.text

    @pytest.mark.slow
    def test_leftovers_of_deleted_checkpoints_are_deleted_after_the_last_save(self, uninterrupted, tmp_path):
        config = uninterrupted("plain")
        output_dir = interrupted_at(END, config.run.output_dir, tmp_path / "run")
        for name in ("images-000000000001", ".images-000000000002.old", ".images-000000000003.partial"):
            (output_dir / "checkpoints" / name).mkdir()
            (output_dir / "checkpoints" / name / "ema.safetensors").write_bytes(b"half")
        newest = {f"images-{images_seen:012d}" for images_seen in (280, END)}
        fit(at(config, output_dir, keep_checkpoints=2))
        assert {path.name for path in (output_dir / "checkpoints").iterdir()} == newest

    @pytest.mark.slow
    def test_tracker_shows_no_point_twice(self, tmp_path):
        config = tiny(
            tmp_path / "run", max_images=600, checkpoint_every=150, keep_checkpoints=100, tracker="tensorboard"
        )
        fit(config)
        interrupted_at(310, tmp_path / "run", tmp_path / "again")
        fit(at(config, tmp_path / "again"))
        events = EventAccumulator(str(tmp_path / "again" / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [90, 180, 270, 360, 450, 540, 600]

    def test_settings_that_an_older_version_did_not_have_are_the_defaults(self, uninterrupted, tmp_path):
        config = uninterrupted("plain")
        output_dir = interrupted_at(END, config.run.output_dir, tmp_path / "run")
        shutil.rmtree(output_dir / "checkpoints")
        stated = yaml.safe_load((output_dir / "config.yaml").read_text())
        for section, name in (("optimizer", "betas"), ("run", "log_every"), ("evaluation", "seed")):
            del stated[section][name]
        (output_dir / "config.yaml").write_text(yaml.safe_dump(stated))
        with pytest.raises(FileExistsError) as error:  # of what is not stated, only what is not the default differs
            fit(at(config, output_dir))
        assert [line for line in str(error.value).splitlines() if "->" in line] == ["  run.log_every: 1000 -> 90"]

    def test_removed_settings_are_ignored_at_their_old_defaults_and_refused_otherwise(self, tmp_path):
        config = tiny(tmp_path, max_images=30)
        settings, file = config.plain(), tmp_path / "config.yaml"
        settings["run"]["device_batch_size"] = "auto"
        file.write_text(yaml.safe_dump(settings))
        with pytest.raises(ValueError, match=r"config\.yaml: run\.device_batch_size was removed, got auto: set run\."):
            fit(config)
        settings["run"]["device_batch_size"] = None
        file.write_text(yaml.safe_dump(settings))
        fit(config)
        assert "device_batch_size" not in yaml.safe_load(file.read_text())["run"]

    def test_a_run_that_said_whether_to_compile_is_continued(self, tmp_path):
        config = tiny(tmp_path, max_images=60, checkpoint_every=30)
        fit(config)
        interrupted_at(30, tmp_path, tmp_path / "again")
        settings = config.plain()
        del settings["run"]["step"]
        settings["run"]["compile"] = False
        (tmp_path / "again" / "config.yaml").write_text(yaml.safe_dump(settings))
        fit(at(config, tmp_path / "again"))
        assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["run"]["step"] == "eager"

    @pytest.mark.slow
    def test_settings_that_change_no_result_may_differ(self, uninterrupted, tmp_path):
        config = uninterrupted("plain")
        output_dir = interrupted_at(280, config.run.output_dir, tmp_path / "run")
        fit(at(config, output_dir, checkpoint_every=1000, keep_checkpoints=1, on_nonfinite="skip"))
        assert [path.name for path in (output_dir / "checkpoints").iterdir()] == [f"images-{END:012d}"]
        for kind in ("model", "ema", "optimizer"):
            expected, found = (tensors(path, END, kind) for path in (config.run.output_dir, output_dir))
            assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def run(finished_mlp_run, tmp_path):
    """The settings of a copy of a finished run."""
    shutil.copytree(finished_mlp_run, tmp_path / finished_mlp_run.name)
    return tiny(tmp_path / finished_mlp_run.name)


class TestFinishedRun:
    @pytest.mark.slow
    def test_finished_run_started_again_changes_nothing(self, run):
        output_dir = Path(run.run.output_dir)
        before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.name != ".lock"}
        result = train(run)
        assert before == {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.name != ".lock"}
        assert result.report.psnr == json.loads((output_dir / "evaluation.json").read_text())["psnr"]
        assert result.parameters > 0 and "MLPVAE" in result.load_line

    @pytest.mark.slow
    def test_model_that_was_removed_is_written_again(self, run, finished_mlp_run):
        shutil.rmtree(Path(run.run.output_dir) / "model")
        train(run)
        assert left_behind(run.run.output_dir) == left_behind(finished_mlp_run)

    @pytest.mark.slow
    def test_finished_run_is_measured_again_with_other_settings_when_that_is_allowed(self, run, finished_mlp_run):
        """The run has these settings from then on."""
        fewer = dataclasses.replace(run, evaluation=EvaluationConfig(max_images=5))
        first = train(dataclasses.replace(fewer, run=dataclasses.replace(fewer.run, allow_config_change=True)))
        assert first.report.images == 5 and train(fewer).report == first.report
        train(run)
        assert left_behind(run.run.output_dir) == left_behind(finished_mlp_run)

    @pytest.mark.slow
    @pytest.mark.parametrize("text", ['{"psnr"', "", "{}", '{"format": 1}'])
    def test_end_is_done_again_if_the_evaluation_cannot_be_read(self, run, text, caplog):
        path = Path(run.run.output_dir) / "evaluation.json"
        path.write_text(text)
        result = fit_with(run, finish=end)
        assert result.train_images == 1617  # not known of a run that had finished before
        assert "evaluation.json is damaged" in caplog.text

    @pytest.mark.slow
    def test_report_that_is_damaged_is_named(self, run, caplog):
        path = Path(run.run.output_dir) / "report.html"
        path.write_bytes(path.read_bytes().replace(b"<body", b"\xff<body"))
        fit_with(run, finish=end)
        assert f"{path} is damaged" in caplog.text

    @pytest.mark.slow
    def test_list_of_bad_images_that_is_not_utf8_ends_no_run(self, run):
        path = Path(run.run.output_dir) / "bad_images.txt"
        path.write_bytes(b"caf\xe9.png\n")
        (path.parent / "evaluation.json").unlink()
        fit(run)
        assert path.read_bytes() == b"caf\xe9.png\n"

    @pytest.mark.slow
    def test_list_of_bad_images_that_is_a_pipe_is_refused(self, run):
        path = Path(run.run.output_dir) / "bad_images.txt"
        os.mkfifo(path)
        (path.parent / "evaluation.json").unlink()
        with pytest.raises(ValueError, match=rf"{path} must be a regular file, got a pipe"):
            fit(run)

    @pytest.mark.slow
    def test_evaluation_that_was_cut_off_is_made_again(self, run, finished_mlp_run):
        path = Path(run.run.output_dir) / "evaluation.json"
        path.write_bytes(path.read_bytes()[:-9])
        train(run)
        assert left_behind(run.run.output_dir) == left_behind(finished_mlp_run)


def hold(path):
    """Hold a lock until the process ends."""
    with FileLock(path):
        Path(f"{path} is held").touch()
        time.sleep(600)


class TestAnotherRun:
    @pytest.mark.slow
    def test_is_never_overwritten(self, run):
        before = left_behind(run.run.output_dir)
        other = dataclasses.replace(at(run, run.run.output_dir, seed=3), model=TINY_VAE)
        with pytest.raises(FileExistsError, match="holds a run with other settings") as error:
            train(other)
        lines = [line.strip() for line in str(error.value).splitlines()]
        assert "run.seed: 0 -> 3" in lines and "model.architecture: mlp -> vae" in lines
        assert "model.hidden_dim: 16 -> None" in lines and "run.allow_config_change" in str(error.value)
        assert left_behind(run.run.output_dir) == before

    def test_is_not_overwritten_before_its_first_checkpoint_either(self, tmp_path):
        (tmp_path / "run").mkdir()
        tiny(tmp_path / "run").save(tmp_path / "run" / "config.yaml")
        with pytest.raises(FileExistsError, match=r"run\.seed: 0 -> 3"):
            train(tiny(tmp_path / "run", seed=3))

    @pytest.mark.slow
    def test_is_continued_with_other_settings_when_that_is_allowed(self, run, caplog):
        """Longer, at another learning rate."""
        longer = at(run, run.run.output_dir, max_images=600, allow_config_change=True)
        fit(dataclasses.replace(longer, optimizer=dataclasses.replace(longer.optimizer, learning_rate=1e-4)))
        for words in ("run.max_images: 300 -> 600", "optimizer.learning_rate: 0.002 -> 0.0001"):
            assert words in caplog.text
        seen = [record["images_seen"] for record in records(run.run.output_dir, "train")]
        assert seen == [90, 180, 270, 300, 360, 450, 540, 600]
        assert records(run.run.output_dir, "evaluation") == []  # the one from before is no longer that of the end
        rates = [record["learning_rate"] for record in records(run.run.output_dir, "train")]
        assert max(rates[4:]) < 1e-4 < max(rates[:4])

    @pytest.mark.parametrize("missing", ["checkpoints", "checkpoints config.yaml"])
    def test_results_without_a_checkpoint_are_not_overwritten(self, run, missing):
        """A finished run whose checkpoints were deleted to save space, say."""
        output_dir = Path(run.run.output_dir)
        for name in missing.split():
            path = output_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = left_behind(output_dir)
        with pytest.raises(FileExistsError, match=r"model, evaluation\.json"):
            train(at(run, output_dir, seed=3, allow_config_change=True))
        assert left_behind(output_dir) == before

    def test_files_of_somebody_else_are_not_overwritten(self, tmp_path):
        (tmp_path / "run" / "model").mkdir(parents=True)
        (tmp_path / "run" / "model" / "net.py").write_text("mine")
        with pytest.raises(FileExistsError, match=r"no config\.yaml of a run: model in"):
            train(tiny(tmp_path / "run"))
        assert (tmp_path / "run" / "model" / "net.py").read_text() == "mine"

    def test_another_model_is_refused_before_anything_is_changed(self, run):
        before = left_behind(run.run.output_dir)
        wider = dataclasses.replace(run.model, hidden_dim=32)
        other = dataclasses.replace(at(run, run.run.output_dir, allow_config_change=True), model=wider)
        with pytest.raises(
            ValueError, match=r"another model.* decoder\.0\.bias has the shape \(16,\) there and \(32,\)"
        ):
            train(other)
        assert left_behind(run.run.output_dir) == before

    @pytest.mark.slow
    def test_latents_may_be_smaller_than_the_default_images_allow(self, tmp_path):
        config = dataclasses.replace(
            tiny(tmp_path / "run", TINY_VAE, max_images=4, batch_size=2),
            data=DataConfig(resolution=(64, 128), heldout_fraction=0.9),
            model=dataclasses.replace(TINY_VAE, block_out_channels=(4,) * 7),
            evaluation=EvaluationConfig(max_images=4),
        )
        fit(config)
        assert train(config).report.images == 4

    def test_a_file_in_place_of_the_folder_is_an_error(self, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(OSError, match=f"must be a folder, got the file {tmp_path}/run"):
            train(tiny(tmp_path / "run"))

    def test_is_not_taken_for_finished_when_it_goes_on_and_fails(self, run):
        longer = at(run, run.run.output_dir, max_images=600, allow_config_change=True, checkpoint_every=30)
        optimizer = dataclasses.replace(longer.optimizer, learning_rate=1e30, max_grad_norm=None)
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                train(dataclasses.replace(longer, optimizer=optimizer))

    @pytest.mark.slow
    def test_other_images_are_refused(self, cifar_folder, tmp_path):
        images = tmp_path / "images"
        shutil.copytree(cifar_folder / "test" / "ship", images)
        data = DataConfig(name="folder", root=str(images), channels=3, resolution=8)
        config = dataclasses.replace(tiny(tmp_path / "run", TINY_VAE, max_images=60, checkpoint_every=30), data=data)
        fit(config)
        moved = images.rename(tmp_path / "moved")
        fit(dataclasses.replace(config, data=dataclasses.replace(data, root=str(moved))))  # the same images
        next(moved.iterdir()).unlink()
        with pytest.raises(FileExistsError, match=r"other images.*\n.*\n.*11 held-out images -> 10"):
            fit(dataclasses.replace(config, data=dataclasses.replace(data, root=str(moved))))

    @pytest.mark.slow
    @pytest.mark.skipif(os.name == "nt", reason="needs fork")
    def test_two_runs_at_once_are_kept_apart(self, tmp_path, impatient_locks):
        """The lock is held by another process, which is alive, and free when that is killed."""
        (tmp_path / "run").mkdir()
        lock = tmp_path / "run" / ".lock"
        other = Launch(partial(hold, lock), tmp_path / "log")
        wait_until(Path(f"{lock} is held").exists, other)
        try:
            with pytest.raises(OSError, match=f"another process is training in {tmp_path}/run: wait until it ends or"):
                fit(tiny(tmp_path / "run"))
        finally:
            other.send(signal.SIGKILL)
            other.wait()
        assert 0 < max(impatient_locks) < 60
        fit(tiny(tmp_path / "run"))

    def test_config_that_is_no_yaml_is_named(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("run: [1, 2")
        with pytest.raises(ValueError, match=r"run/config\.yaml"):
            train(tiny(tmp_path / "run"))


@pytest.mark.slow
def test_run_continued_by_fewer_processes_keeps_the_order_of_images_and_warns(tmp_path):
    """Two processes, then one with accumulation, against one all along: equal but for rounding."""
    config = tiny(
        tmp_path / "two", TINY_VAE, batch_size=60, max_images=300, log_every=150, checkpoint_every=1,
        keep_checkpoints=100,
    )  # fmt: skip
    config = dataclasses.replace(config, data=FEW)
    run_forked(fit, config, log=tmp_path / "log", processes=2)
    output_dir = interrupted_at(120, tmp_path / "two", tmp_path / "both")
    parts = at(config, output_dir, gradient_accumulation_steps=2)
    output = run_forked(fit, parts, log=tmp_path / "log of the second")
    assert "processes 2 -> 1" in output and "no longer bit-identical" in output
    run_forked(fit, at(config, tmp_path / "one"), log=tmp_path / "log of one")
    for kind in ("model", "ema"):
        one, both = (tensors(path, 300, kind) for path in (tmp_path / "one", output_dir))
        for key in one:
            torch.testing.assert_close(both[key], one[key], rtol=0, atol=1e-4)
    for kind, count in (("train", 2), ("epoch", 2)):
        first, second = records(tmp_path / "one", kind), records(output_dir, kind)
        assert len(first) == len(second) == count
        for a, b in zip(first, second, strict=True):
            assert {k: a[k] for k in ("step", "images_seen")} == {k: b[k] for k in ("step", "images_seen")}
            for term in ("loss", "distortion", "rate"):
                assert a[term] == pytest.approx(b[term], rel=1e-5)


def wait_until(condition, launch):
    """Wait for something that a launch brings about."""
    deadline = time.monotonic() + 120
    while not condition():
        if not launch.running or time.monotonic() > deadline:
            launch.send(signal.SIGKILL)
            pytest.fail(launch.output())
        time.sleep(0.01)


ENDLESS = [
    "--data.resolution", 8, "--model.block_out_channels", "[8,8]", "--model.norm_num_groups", 4, "--run.epochs", 10_000,
]  # fmt: skip


def started(work, output_dir):
    """A forked run, once it has a checkpoint."""
    launch = Launch(work, output_dir.with_suffix(".log"))
    wait_until(lambda: any((output_dir / "checkpoints").glob("images-*")), launch)
    return launch


def endless(output_dir, *arguments):
    """The command that trains for hours, with a checkpoint after each step."""
    run = ["--run.output_dir", output_dir, "--run.tracker", "null", "--run.checkpoint_every", 1]
    return partial(command, "train", *run, *ENDLESS, *arguments)


def hung_up(disposition, work):
    """Do `work` with what is to happen at SIGHUP, whatever the shell that runs the tests has set."""
    signal.signal(signal.SIGHUP, disposition)
    work()


def below_a_launcher(work):
    """Do `work` in a child of a process that has become another program, called as launchers are."""
    if os.fork():
        os.execvp("sleep", ["accelerate launch", "600"])
    while "accelerate" not in " ".join(psutil.Process(os.getppid()).cmdline()):
        time.sleep(0.01)
    work()


def fit_in_a_group(config):
    """Train in a process group of its own, as a job does; images are read on demand."""
    os.setsid()
    fit(config, memory_limit=0)


class Slow(AutoencoderStep):
    """Takes minutes for each step except the first."""

    def batch(self, read, inputs):
        if any((Path(self.config.run.output_dir) / "checkpoints").glob("images-*")):
            Path(self.config.run.output_dir, "in a step").touch()
            for _ in range(100):
                time.sleep(1)
        return super().batch(read, inputs)


def fit_slowly(config):
    fit_with(config, step=Slow)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
    def test_step_is_finished_and_saved(self, name, tmp_path):
        launch = started(partial(hung_up, signal.SIG_DFL, endless(tmp_path / "run")), tmp_path / "run")
        launch.send(getattr(signal, name))
        assert launch.wait() == [75], launch.output()
        (newest, *_) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
        assert f"asked to stop ({name})" in launch.output() and f"saved as {newest}" in launch.output()
        assert "Traceback" not in launch.output()

    def test_run_that_was_started_by_nohup_goes_on_when_the_terminal_is_closed(self, tmp_path):
        launch = started(partial(hung_up, signal.SIG_IGN, endless(tmp_path / "run")), tmp_path / "run")
        launch.send(signal.SIGHUP)
        seen = max((tmp_path / "run" / "checkpoints").iterdir()).name
        wait_until(lambda: max((tmp_path / "run" / "checkpoints").glob("images-*")).name[:19] > seen, launch)
        launch.send(signal.SIGTERM)
        assert launch.wait() == [75] and "asked to stop (SIGTERM)" in launch.output()

    @pytest.mark.parametrize("output", ["full disk", "closed pipe"])
    def test_run_whose_output_cannot_be_written_goes_on_to_its_end(self, output, tmp_path):
        config = tiny(tmp_path / "run", TINY_VAE)
        config.save(tmp_path / "run.yaml")
        work = partial(without_output, output, partial(command, "train", "--config", tmp_path / "run.yaml"))
        assert Launch(work, tmp_path / "log").wait() == [0]
        assert (tmp_path / "run" / "evaluation.json").exists()

    def test_interrupted_run_whose_output_cannot_be_written_is_saved(self, tmp_path):
        work = partial(without_output, "closed pipe", endless(tmp_path / "run"))
        launch = started(partial(hung_up, signal.SIG_DFL, work), tmp_path / "run")
        launch.send(signal.SIGHUP)
        assert launch.wait() == [75]

    def test_a_signal_while_the_last_checkpoint_is_saved_ends_the_run(self, tmp_path):
        def kill(operation, path, *_):
            if "images-000000000060" in str(path):
                watch(None)
                os.kill(os.getpid(), signal.SIGTERM)

        watch(kill)
        try:
            with pytest.raises(Interrupted, match=r"asked to stop \(SIGTERM\) after 60 of 60 images; saved as"):
                train(tiny(tmp_path / "run", max_images=60))
        finally:
            watch(None)
        assert not (tmp_path / "run" / "model").exists()

    def test_step_that_a_signal_came_in_is_saved_before_the_next_checkpoint_is_due(self, tmp_path):
        class Signalled(AutoencoderStep):
            def begin(self, images_seen, total_images, learning_rate):
                if images_seen == 60:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().begin(images_seen, total_images, learning_rate)

        with pytest.raises(Interrupted, match=r"asked to stop \(SIGTERM\)"):
            fit_with(tiny(tmp_path / "run", checkpoint_every=10**6), step=Signalled)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["images-000000000090"]

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_processes_that_read_images_outlive_a_signal_to_all_of_a_job(self, name, cifar_folder, tmp_path):
        """The step that is finished and those before it in the queue need their images."""
        config = tiny(tmp_path / "run", TINY_VAE, max_images=None, epochs=10_000, checkpoint_every=1)
        root = str(cifar_folder / "test" / "ship")
        data = DataConfig(name="folder", root=root, channels=3, resolution=8, num_workers=2)
        launch = started(partial(fit_in_a_group, dataclasses.replace(config, data=data)), tmp_path / "run")
        (process,) = launch.processes
        group = process.pid
        os.killpg(group, getattr(signal, name))
        assert launch.wait() == [INTERRUPTED], launch.output()
        assert f"asked to stop ({name})" in launch.output() and "saved as" in launch.output()
        assert "Traceback" not in launch.output()
        assert group_is_gone(group, 10)

    def test_interruption_stays_one_where_code_makes_another_error_of_it(self, tmp_path):
        """The import of a library in C does so."""

        def importing(*_):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except BaseException as error:
                raise ImportError("initialization failed") from error

        with pytest.raises(Interrupted, match=r"asked to stop \(SIGTERM\)"):
            fit_with(tiny(tmp_path / "run"), finish=importing)
        assert fit_with(tiny(tmp_path / "run"), finish=end).train_images == 1617

    @pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
    def test_images_that_are_read_at_a_signal_are_no_bad_ones(self, on_bad_image, cifar_folder, tmp_path, monkeypatch):
        """The signal comes while the end of the run is measured."""
        data = DataConfig(
            name="folder", root=str(cifar_folder / "test" / "ship"), channels=3, resolution=8, num_workers=0,
            on_bad_image=on_bad_image,
        )  # fmt: skip
        config = dataclasses.replace(tiny(tmp_path / "run", TINY_VAE, max_images=30), data=data)
        load, sent = PIL.ImageFile.ImageFile.load, threading.Event()

        def load_and_signal(image):
            if (tmp_path / "run" / "model").exists() and not sent.is_set():
                sent.set()
                os.kill(os.getpid(), signal.SIGTERM)
            return load(image)

        monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load_and_signal)
        with pytest.raises(Interrupted, match=r"asked to stop \(SIGTERM\)"):
            train(config, memory_limit=0)
        assert sent.is_set() and not (tmp_path / "run" / "evaluation.json").exists()
        assert not (tmp_path / "run" / "bad_images.txt").exists()

    def test_second_signal_ends_the_run_at_once_without_damage(self, tmp_path):
        """The first one waits for the end of a step that takes long."""
        config = tiny(tmp_path / "run", checkpoint_every=1)
        launch = Launch(partial(fit_slowly, config), tmp_path / "log")
        wait_until((tmp_path / "run" / "in a step").exists, launch)
        launch.send(signal.SIGTERM)
        wait_until(lambda: "a second signal stops at once" in launch.output(), launch)
        launch.send(signal.SIGTERM)
        assert launch.wait(timeout=60) == [-signal.SIGTERM]
        assert "saved as" not in launch.output()
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest and not damaged

    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
    def test_run_stops_when_its_launcher_is_gone(self, tmp_path):
        """The run saves as soon as its parent, which was named as a launcher is, has ended."""
        launch = started(partial(below_a_launcher, endless(tmp_path / "run")), tmp_path / "run")
        (run,) = psutil.Process(launch.processes[0].pid).children()
        launch.send(signal.SIGTERM)
        assert launch.wait() == [-signal.SIGTERM]
        run.wait(timeout=60)
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert "the launcher has ended" in launch.output() and f"saved as {newest}" in launch.output() and not damaged

    @pytest.mark.soak
    def test_run_stops_when_accelerate_is_gone(self, tmp_path):
        """`accelerate launch` of one process dies without passing the signal on."""
        with begun(tmp_path / "run", *ENDLESS, launcher=LAUNCH) as process:
            os.kill(process.pid, signal.SIGTERM)
            output = process.communicate(timeout=60)[0]
            newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
            assert "the launcher has ended" in output and f"saved as {newest}" in output and not damaged
            assert group_is_gone(process.pid, 30)

    def test_launcher_of_two_passes_the_signal_on(self, tmp_path):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        with begun(tmp_path / "run", *ENDLESS, launcher=launcher) as process:
            os.kill(process.pid, signal.SIGTERM)
            assert "asked to stop (SIGTERM)" in process.communicate(timeout=60)[0]
            assert group_is_gone(process.pid, 30)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs fork")
@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [("KILL", 1, "plain"), ("TERM", 1, "bf16"), ("KILL", 2, "bf16"), ("TERM", 2, "plain")],
)
def test_run_killed_at_random_moments_ends_bit_identical(name, processes, kind, tmp_path, capsys):
    """Killed up to twice, within a save too. What happens at every operation in turn is in test_crash_points.py."""
    arguments = ["--signal", name, "--processes", str(processes), "--kind", kind, "--trials", "2", "--kills", "2"]
    assert crash.main([str(tmp_path), *arguments]) == 0, capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["plain", "bf16", "whole"])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_run_killed_at_random_moments_by_the_dozen_ends_bit_identical(name, processes, kind, tmp_path, capsys):
    arguments = ["--signal", name, "--processes", str(processes), "--kind", kind, "--trials", "20", "--finish"]
    assert crash.main([str(tmp_path), *arguments]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_may_be_repeated_with_another_batch_size(finished_mlp_run, tmp_path):
    """As after one for which the memory did not suffice."""
    run = tmp_path / "run"
    shutil.copytree(finished_mlp_run, run)
    (run / "evaluation.json").unlink()
    settings = ["--config", str(run / "config.yaml"), "--run.output_dir", str(run)]
    assert cli.main(["train", *settings, "--evaluation.batch_size", "50"]) == 0
    again, before = (read_report(folder / "evaluation.json") for folder in (run, finished_mlp_run))
    assert (again.protocol.batch_size, before.protocol.batch_size) == (50, 64)
    assert again.model.weights_sha256 == before.model.weights_sha256
    assert again.psnr == pytest.approx(before.psnr, rel=1e-6)
