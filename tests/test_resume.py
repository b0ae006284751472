"""A run that was interrupted, by whatever, ends as if nothing had happened."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from programs import crash
from support.files import flip
from support.runs import (
    TINY_VAE,
    at,
    begin,
    group_is_gone,
    interrupted_at,
    launch,
    left_behind,
    random_network,
    reading_on_demand,
    records,
    tiny,
    weights,
    whole,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_vae.checkpoint import find_checkpoint
from diffusers_vae.data import DataConfig
from diffusers_vae.evaluation import EvaluationConfig
from diffusers_vae.loop import Interrupted, run_task
from diffusers_vae.trainer import AutoencoderTask, train


@pytest.fixture(
    scope="module", params=["no", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "whole"))]
)
def finished(request, tmp_path_factory):
    """A run with accumulation, evaluations and a second epoch, all of whose checkpoints were kept."""
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("finished")
    config = tiny(
        folder / "run", TINY_VAE, mixed_precision="bf16" if request.param == "bf16" else "no", max_images=1800,
        batch_size=60, gradient_accumulation_steps=2, checkpoint_every=150, keep_checkpoints=100,
    )  # fmt: skip
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every=1000, max_images=64))
    if request.param == "whole":
        config = whole(config, random_network(folder / "network"))
    train(config)
    return config


class TestSameCommand:
    @pytest.mark.parametrize("images_seen", [960, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1617, 1857))])
    def test_ends_bit_identical(self, images_seen, finished, tmp_path, caplog):
        """From the start, within an epoch between two records, at its end, and when only the end was missing."""
        output_dir = interrupted_at(images_seen, finished.run.output_dir, tmp_path / "run")
        caplog.set_level("INFO")
        train(at(finished, output_dir))
        assert left_behind(output_dir) == left_behind(Path(finished.run.output_dir))
        assert (f"continuing from {output_dir}" in caplog.text) == bool(images_seen)

    @pytest.mark.slow
    def test_damaged_checkpoints_are_passed_over(self, finished, tmp_path, caplog):
        output_dir = interrupted_at(960, finished.run.output_dir, tmp_path / "run")
        newest, second, third = sorted((output_dir / "checkpoints").iterdir(), reverse=True)[:3]
        flip(newest / "model.safetensors")
        (second / "optimizer.safetensors").write_bytes(b"")
        caplog.set_level("INFO")
        train(at(finished, output_dir))
        assert left_behind(output_dir) == left_behind(Path(finished.run.output_dir))
        for words in (f"{newest} is damaged", f"{second} is damaged", f"continuing from {third}"):
            assert words in caplog.text

    def test_of_a_finished_run_changes_nothing(self, finished, tmp_path):
        output_dir = tmp_path / "run"
        shutil.copytree(finished.run.output_dir, output_dir)
        before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.name != ".lock"}
        result = train(at(finished, output_dir))
        assert before == {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.name != ".lock"}
        assert result.report.psnr == json.loads((output_dir / "evaluation.json").read_text())["psnr"]
        assert result.parameters > 0 and "AutoencoderKL" in result.load_line

    @pytest.mark.slow
    def test_of_a_run_whose_model_was_removed_writes_it_again(self, finished, tmp_path):
        output_dir = tmp_path / "run"
        shutil.copytree(finished.run.output_dir, output_dir)
        shutil.rmtree(output_dir / "model")
        train(at(finished, output_dir))
        assert left_behind(output_dir) == left_behind(Path(finished.run.output_dir))

    def test_what_was_left_as_an_old_checkpoint_was_deleted_goes(self, finished, tmp_path):
        """After the last save, behind which no other would delete it."""
        output_dir = tmp_path / "run"
        shutil.copytree(finished.run.output_dir, output_dir)
        expected = left_behind(output_dir)
        (output_dir / "evaluation.json").unlink()  # which says that it is finished
        for name in ("images-000000000001", ".images-000000000002.old", ".images-000000000003.partial"):
            (output_dir / "checkpoints" / name).mkdir()
            (output_dir / "checkpoints" / name / "ema.safetensors").write_bytes(b"half")
        train(at(finished, output_dir))
        assert left_behind(output_dir) == expected

    @pytest.mark.slow
    def test_tracker_shows_no_point_twice(self, tmp_path):
        config = tiny(
            tmp_path / "run", max_images=600, checkpoint_every=150, keep_checkpoints=100, tracker="tensorboard"
        )
        train(config)
        interrupted_at(310, tmp_path / "run", tmp_path / "again")
        train(at(config, tmp_path / "again"))
        events = EventAccumulator(str(tmp_path / "again" / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [90, 180, 270, 360, 450, 540, 600]

    def test_of_an_older_version_that_knew_fewer_settings(self, finished, tmp_path):
        output_dir = interrupted_at(960, finished.run.output_dir, tmp_path / "run")
        shutil.rmtree(output_dir / "checkpoints")
        stated = yaml.safe_load((output_dir / "config.yaml").read_text())
        for section, name in (("optimizer", "betas"), ("run", "log_every"), ("evaluation", "seed")):
            del stated[section][name]
        (output_dir / "config.yaml").write_text(yaml.safe_dump(stated))
        with pytest.raises(FileExistsError) as error:  # of what is not stated, only what is not the default differs
            train(at(finished, output_dir))
        assert [line for line in str(error.value).splitlines() if "->" in line] == ["  run.log_every: 1000 -> 90"]

    @pytest.mark.slow
    def test_settings_that_change_no_result_may_differ(self, finished, tmp_path):
        output_dir = interrupted_at(960, finished.run.output_dir, tmp_path / "run")
        train(at(finished, output_dir, checkpoint_every=1000, keep_checkpoints=1, on_nonfinite="skip"))
        reference = weights(finished.run.output_dir)
        assert all(torch.equal(reference[key], value) for key, value in weights(output_dir).items())
        assert len(list((output_dir / "checkpoints").iterdir())) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    AcceleratorState._reset_state(True)
    config = tiny(tmp_path_factory.mktemp("other") / "run", checkpoint_every=90)
    train(config)
    return config


@pytest.mark.slow
class TestAnotherRun:
    def test_is_never_overwritten(self, run):
        before = left_behind(Path(run.run.output_dir))
        other = dataclasses.replace(at(run, run.run.output_dir, seed=3), model=TINY_VAE)
        with pytest.raises(FileExistsError, match="holds a run with other settings") as error:
            train(other)
        lines = [line.strip() for line in str(error.value).splitlines()]
        assert "run.seed: 0 -> 3" in lines and "model.architecture: mlp -> vae" in lines
        assert "model.hidden_dim: 16 -> None" in lines and "run.allow_config_change" in str(error.value)
        assert left_behind(Path(run.run.output_dir)) == before

    def test_unfinished_and_without_a_checkpoint_neither(self, run, tmp_path):
        (tmp_path / "run").mkdir()
        run.save(tmp_path / "run" / "config.yaml")
        with pytest.raises(FileExistsError, match=r"run\.seed: 0 -> 3"):
            train(at(run, tmp_path / "run", seed=3))

    def test_is_continued_with_other_settings_when_told_to(self, run, tmp_path, caplog):
        """Longer, at another learning rate."""
        shutil.copytree(run.run.output_dir, tmp_path / "run")
        longer = at(run, tmp_path / "run", max_images=600, allow_config_change=True)
        train(dataclasses.replace(longer, optimizer=dataclasses.replace(longer.optimizer, learning_rate=1e-4)))
        for words in ("run.max_images: 300 -> 600", "optimizer.learning_rate: 0.002 -> 0.0001"):
            assert words in caplog.text
        seen = [record["images_seen"] for record in records(tmp_path / "run", "train")]
        assert seen == [90, 180, 270, 300, 360, 450, 540, 600]
        kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert kinds.count("evaluation") == 1
        rates = [record["learning_rate"] for record in records(tmp_path / "run", "train")]
        assert max(rates[4:]) < 1e-4 < max(rates[:4])

    @pytest.mark.parametrize("missing", ["checkpoints", "checkpoints config.yaml"])
    def test_results_without_a_checkpoint_stay(self, run, tmp_path, missing):
        """Of a finished run, to save room, say: there is nothing to continue, and nothing is to be overwritten."""
        shutil.copytree(run.run.output_dir, tmp_path / "run")
        for name in missing.split():
            path = tmp_path / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = left_behind(tmp_path / "run")
        with pytest.raises(FileExistsError, match=r"model, evaluation\.json"):
            train(at(run, tmp_path / "run", seed=3, allow_config_change=True))
        assert left_behind(tmp_path / "run") == before

    def test_files_of_somebody_else_stay(self, run, tmp_path):
        (tmp_path / "run" / "model").mkdir(parents=True)
        (tmp_path / "run" / "model" / "net.py").write_text("mine")
        with pytest.raises(FileExistsError, match=r"no config\.yaml that says whose they are: model in"):
            train(at(run, tmp_path / "run"))
        assert (tmp_path / "run" / "model" / "net.py").read_text() == "mine"

    def test_another_model_is_refused_before_anything_is_changed(self, run, tmp_path):
        shutil.copytree(run.run.output_dir, tmp_path / "run")
        before = left_behind(tmp_path / "run")
        wider = dataclasses.replace(run.model, hidden_dim=32)
        other = dataclasses.replace(at(run, tmp_path / "run", allow_config_change=True), model=wider)
        with pytest.raises(
            ValueError, match=r"another model.* decoder\.0\.bias has the shape \(16,\) there and \(32,\)"
        ):
            train(other)
        assert left_behind(tmp_path / "run") == before

    @pytest.mark.slow
    def test_results_are_those_of_the_settings_that_they_were_made_with(self, run, tmp_path):
        """A finished run, measured again with others: then they are the run's."""
        shutil.copytree(run.run.output_dir, tmp_path / "run")
        fewer = dataclasses.replace(at(run, tmp_path / "run"), evaluation=EvaluationConfig(max_images=5))
        first = train(dataclasses.replace(fewer, run=dataclasses.replace(fewer.run, allow_config_change=True)))
        assert first.report.images == 5 and train(fewer).report == first.report
        train(at(run, tmp_path / "run"))
        assert left_behind(tmp_path / "run") == left_behind(Path(run.run.output_dir))

    @pytest.mark.parametrize("text", ['{"psnr"', *(pytest.param(t, marks=pytest.mark.slow) for t in ("", "{}"))])
    def test_a_half_written_evaluation_is_made_again(self, run, tmp_path, text):
        shutil.copytree(run.run.output_dir, tmp_path / "run")
        (tmp_path / "run" / "evaluation.json").write_text(text)
        train(at(run, tmp_path / "run"))
        assert left_behind(tmp_path / "run") == left_behind(Path(run.run.output_dir))

    @pytest.mark.slow
    def test_latents_may_be_smaller_than_the_default_images_allow(self, tmp_path):
        config = dataclasses.replace(
            tiny(tmp_path / "run", TINY_VAE, max_images=4, batch_size=2),
            data=DataConfig(resolution=128),
            evaluation=EvaluationConfig(max_images=4),
        )
        config = dataclasses.replace(config, model=dataclasses.replace(TINY_VAE, block_out_channels=(4,) * 7))
        train(config)
        (tmp_path / "run" / "evaluation.json").unlink()
        train(config)

    def test_a_file_is_no_folder(self, run, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(OSError, match=f"must be a folder, got the file {tmp_path}/run"):
            train(at(run, tmp_path / "run"))

    def test_is_not_taken_for_finished_when_it_goes_on_and_fails(self, run, tmp_path):
        shutil.copytree(run.run.output_dir, tmp_path / "run")
        longer = at(run, tmp_path / "run", max_images=600, allow_config_change=True, checkpoint_every=30)
        optimizer = dataclasses.replace(longer.optimizer, learning_rate=1e30, max_grad_norm=None)
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                train(dataclasses.replace(longer, optimizer=optimizer))

    @pytest.mark.slow
    def test_other_images_are_refused(self, cifar_folder, tmp_path):
        images = tmp_path / "images"
        shutil.copytree(cifar_folder / "test" / "ship", images)
        data = DataConfig(name="folder", root=str(images), channels=3, resolution=8)
        config = dataclasses.replace(tiny(tmp_path / "run", TINY_VAE, max_images=90, checkpoint_every=30), data=data)
        train(config)
        (tmp_path / "run" / "evaluation.json").unlink()
        moved = images.rename(tmp_path / "moved")
        train(dataclasses.replace(config, data=dataclasses.replace(data, root=str(moved))))  # the same images
        (tmp_path / "run" / "evaluation.json").unlink()
        next(moved.iterdir()).unlink()
        with pytest.raises(FileExistsError, match=r"other images.*\n.*\n.*11 held-out images -> 10"):
            train(dataclasses.replace(config, data=dataclasses.replace(data, root=str(moved))))

    @pytest.mark.slow
    def test_two_at_once_are_kept_apart(self, run, tmp_path):
        """The lock is another process's, alive."""
        hold = (
            "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
            "print('held', flush=True); time.sleep(60)"
        )
        (tmp_path / "run").mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE
        ) as other:
            other.stdout.readline()
            with pytest.raises(OSError, match=f"another process is training in {tmp_path}/run: wait for its end or"):
                train(at(run, tmp_path / "run"))
            other.kill()
        train(at(run, tmp_path / "run"))

    def test_files_that_are_no_yaml_are_named(self, run, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("run: [1, 2")
        with pytest.raises(ValueError, match=r"run/config\.yaml"):
            train(at(run, tmp_path / "run"))


class TestOtherProcesses:
    @pytest.mark.slow
    def test_keep_the_order_of_images_and_say_what_changes(self, tmp_path):
        """Two processes, then one with accumulation, against one all along: equal but for rounding."""
        arguments = [
            "--data.resolution", 8, "--model.block_out_channels", "[8,8]", "--model.norm_num_groups", 4,
            "--run.tracker", "null", "--run.batch_size", 60, "--run.max_images", 1200, "--run.log_every", 240,
            "--run.checkpoint_every", 100, "--run.keep_checkpoints", 100, "--run.mixed_precision", "no",
        ]  # fmt: skip
        done = launch(*arguments, "--run.output_dir", tmp_path / "two", processes=2)
        assert done.returncode == 0, done.stderr
        output_dir = interrupted_at(650, tmp_path / "two", tmp_path / "both")
        done = launch(*arguments, "--run.output_dir", output_dir, "--run.gradient_accumulation_steps", 2)
        assert done.returncode == 0, done.stderr
        assert "processes 2 -> 1" in done.stderr and "no longer bit-identical" in done.stderr
        done = launch(*arguments, "--run.output_dir", tmp_path / "one")
        assert done.returncode == 0, done.stderr
        one, both = weights(tmp_path / "one"), weights(output_dir)
        for key in one:
            torch.testing.assert_close(both[key], one[key], rtol=0, atol=1e-4)
        for kind, count in (("train", 5), ("epoch", 1)):
            first, second = records(tmp_path / "one", kind), records(output_dir, kind)
            assert len(first) == len(second) == count
            for a, b in zip(first, second, strict=True):
                assert {k: a[k] for k in ("step", "images_seen")} == {k: b[k] for k in ("step", "images_seen")}
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
    def test_the_step_is_finished_and_saved(self, name, tmp_path):
        process = begin(tmp_path / "run")
        os.kill(process.pid, getattr(signal, name))
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 75, output
        (newest, *_) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
        assert f"asked to stop ({name})" in output and f"saved as {newest}" in output
        assert "Traceback" not in output

    def test_sent_to_all_processes_of_a_job(self, cifar_folder, tmp_path):
        """To those, too, that read images for the next steps."""
        script = reading_on_demand(tmp_path)
        data = ["--data.name", "folder", "--data.root", cifar_folder, "--data.channels", 3, "--data.num_workers", 2]
        for name in ("SIGTERM", "SIGINT"):
            process = begin(tmp_path / name, *data, script=script)
            os.killpg(process.pid, getattr(signal, name))
            output = process.communicate(timeout=60)[0]
            assert process.returncode == 75 and "Traceback" not in output, output
            assert group_is_gone(process, 10)

    def test_stays_one_where_code_makes_another_error_of_it(self, tmp_path):
        """As the import of a library in C does."""

        class Importing(AutoencoderTask):
            def finish(self, *arguments):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(5)
                except BaseException as error:
                    raise ImportError("initialization failed") from error

        with pytest.raises(Interrupted, match=r"asked to stop \(SIGTERM\)"):
            run_task(Importing(tiny(tmp_path / "run")))
        assert train(tiny(tmp_path / "run")).report.images == 180

    @pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
    def test_while_the_end_is_measured(self, on_bad_image, cifar_folder, tmp_path):
        """The images read then are no bad ones, and the same command does the end again."""
        script = reading_on_demand(tmp_path)
        data = ["--data.name", "folder", "--data.root", cifar_folder, "--data.channels", 3]
        data += ["--data.on_bad_image", on_bad_image, "--run.max_images", 64, "--run.batch_size", 64]
        process = begin(tmp_path / "run", *data, script=script)
        while not (tmp_path / "run" / "model").exists():
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 75 and "asked to stop (SIGTERM)" in output, output
        assert not (tmp_path / "run" / "evaluation.json").exists()
        assert not (tmp_path / "run" / "bad_images.txt").exists()

    def test_the_second_ends_it_at_once_without_damage(self, tmp_path):
        """Of a step that takes long, the first signal waits for the end, the second does not."""
        process = begin(tmp_path / "run", "--run.batch_size", 512)
        process.send_signal(signal.SIGTERM)
        output = ""
        while "a second signal stops at once" not in output:
            output += process.stdout.read(1) or pytest.fail(output)
        process.send_signal(signal.SIGTERM)
        output += process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGTERM and "saved as" not in output, output
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest and not damaged

    def test_when_only_the_launcher_gets_it(self, tmp_path):
        """`accelerate launch` dies without passing it on; the run sees that and saves."""
        process = begin(tmp_path / "run", launcher=[sys.executable, "-m", "accelerate.commands.launch"])
        os.kill(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert "the launcher has ended" in output and f"saved as {newest}" in output and not damaged
        assert group_is_gone(process, 30)

    def test_launcher_of_two_passes_it_on(self, tmp_path):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        process = begin(tmp_path / "run", launcher=launcher)
        os.kill(process.pid, signal.SIGTERM)
        assert "asked to stop (SIGTERM)" in process.communicate(timeout=60)[0]
        assert group_is_gone(process, 30)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs fork")
@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [("KILL", 1, "plain"), ("TERM", 1, "whole"), ("KILL", 2, "whole"), ("TERM", 2, "bf16")],
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
