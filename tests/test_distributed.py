"""Several processes: the result of one, nothing counted twice, and one failure ends all."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import is_torch_version
from safetensors.torch import load_file
from support.batches import epoch_batches
from support.files import paths_of
from support.launches import Launch, command, run_forked
from support.runs import (
    CONFIGS,
    LAUNCH,
    ROOT,
    TINY_VAE,
    assert_same_gradient,
    at,
    begun,
    end,
    fit,
    fit_with,
    group_is_gone,
    interrupted_at,
    left_behind,
    not_a_number,
    records,
    tensors,
    tiny,
    weights,
    whole,
)

from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.engine.config import OptimizerConfig
from diffusers_vae.engine.launch import FSDP2_TORCH
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.latents.statistics import measure_latents
from diffusers_vae.losses.adversarial import AdversarialConfig
from diffusers_vae.losses.objective import Gaussian, ObjectiveConfig, VAEObjective
from diffusers_vae.models import ModelConfig
from diffusers_vae.processes import on_main, process_share
from diffusers_vae.tasks.autoencoder_step import build_model

pytestmark = pytest.mark.slow

LAUNCH_TWO = [*LAUNCH, "--num_processes", "2", "--main_process_port", "0"]  # a free port

SHARDED = ROOT / "tests" / "programs" / "sharded.py"
END = 439


def config_of(output_dir, micro_steps=1):
    """11 steps on 359 images: eight batches of 40 and one of 39, and two of the next epoch. Not clipped, so that Adam's
    first average is a tenth of the first gradient.
    """
    config = tiny(
        output_dir, TINY_VAE, batch_size=40, max_images=END, checkpoint_every=40, keep_checkpoints=100,
        gradient_accumulation_steps=micro_steps, log_every=1,
    )  # fmt: skip
    return dataclasses.replace(
        config,
        model=dataclasses.replace(TINY_VAE, mid_block_add_attention=True),
        data=DataConfig(resolution=8, heldout_fraction=0.8),
        optimizer=OptimizerConfig(max_grad_norm=None, warmup_images=200, schedule="cosine"),
    )


def whole_config_of(output_dir, micro_steps=1):
    """5 steps with a discriminator, LPIPS and a learned scale. Later, rounding decides at kinks of the networks that
    judge, and grows.
    """
    config = config_of(output_dir, micro_steps)
    run = dataclasses.replace(config.run, max_images=200)
    optimizer = dataclasses.replace(config.optimizer, schedule="constant")
    return whole(dataclasses.replace(config, run=run, optimizer=optimizer))


def assert_same_training(reference, output_dir):
    """The first gradients, the norms of all; weights and their average after the last step to 1e-4."""
    assert assert_same_gradient(reference, output_dir, 40) > 100
    judged = (Path(reference) / "checkpoints" / "images-000000000080" / "discriminator.safetensors").exists()
    if judged:
        assert assert_same_gradient(reference, output_dir, 80, "discriminator_optimizer") > 7
    for kind in ("model", "ema", "discriminator") if judged else ("model", "ema"):
        expected, found = (tensors(path, 200 if judged else END, kind) for path in (reference, output_dir))
        for name in expected:
            if not name.endswith("to_k.bias"):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
    for first, second in zip(records(reference, "train"), records(output_dir, "train"), strict=True):
        assert first["learning_rate"] == second["learning_rate"] and first["images_seen"] == second["images_seen"]
        # with a learned scale the loss passes zero: it is a sum of terms of which distortion is one
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-5 * first["distortion"])
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
        if judged:
            assert first["adversarial_weight"] == pytest.approx(second["adversarial_weight"], rel=1e-4)
            assert (first["adversarial_weight"] > 0) == (first["images_seen"] > 80)


def processes_of(output_dir):
    """How many processes wrote the newest checkpoint of a run."""
    newest = max((Path(output_dir) / "checkpoints").glob("images-*"))
    assert (
        len(list(newest.glob("process-*.json")))
        == json.loads((newest / "progress.json").read_text())["surroundings"]["processes"]
    )
    return len(list(newest.glob("process-*.json")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process with the settings of `config_of`."""
    folder = tmp_path_factory.mktemp("alone")
    run_forked(fit, config_of(folder / "run"), log=folder / "log")
    return folder / "run"


@pytest.fixture(scope="module")
def whole_alone(tmp_path_factory):
    """The same of `whole_config_of`."""
    folder = tmp_path_factory.mktemp("alone")
    config = whole_config_of(folder / "run")
    run_forked(fit, config, log=folder / "log")
    return folder / "run"


SHARES = pytest.mark.parametrize(
    ("processes", "micro_steps"),
    [(1, 2), (2, 1), (2, 2)],
    ids=["accumulated", "two processes", "two processes, accumulated"],
)


class TestSameResult:
    @SHARES
    def test_training_does_not_depend_on_how_a_batch_is_shared(self, processes, micro_steps, alone, tmp_path):
        config = config_of(tmp_path / "run", micro_steps)
        output = run_forked(fit, config, log=tmp_path / "log", processes=processes)
        assert f"on {processes} x cpu" in output and f"{40 // processes // micro_steps} images per forward" in output
        assert processes_of(tmp_path / "run") == processes
        assert_same_training(alone, tmp_path / "run")

    @SHARES
    def test_training_with_all_losses_does_not_depend_on_it_either(self, processes, micro_steps, whole_alone, tmp_path):
        config = whole_config_of(tmp_path / "run", micro_steps)
        run_forked(fit, config, log=tmp_path / "log", processes=processes)
        assert processes_of(tmp_path / "run") == processes
        assert_same_training(whole_alone, tmp_path / "run")

    def test_processes_with_images_of_different_sizes_give_the_result_of_one(self, tmp_path):
        """Each with a transformation of its own, and the last batch of an epoch with one for both."""
        for processes, micro_steps in ((1, 2), (2, 1)):
            config = tiny(
                tmp_path / f"{processes}", TINY_VAE, batch_size=24, max_images=80, epochs=9, log_every=1,
                checkpoint_every=24, keep_checkpoints=9, gradient_accumulation_steps=micro_steps,
            )  # fmt: skip
            config = dataclasses.replace(
                config,
                data=DataConfig(resolution=24, heldout_fraction=0.965),  # 63 images
                objective=ObjectiveConfig(scale="optimal", target_rate=9.0, equivariance=0.5, transformations=2),
                adversarial=AdversarialConfig(weight=0.1, width=8, layers=1),
                optimizer=OptimizerConfig(max_grad_norm=None, warmup_images=1000),
            )
            run_forked(fit, config, log=tmp_path / f"log of {processes}", processes=processes)
        assert_same_gradient(tmp_path / "1", tmp_path / "2", 24)
        one, two = (records(tmp_path / name, "train") for name in "12")
        for name in one[0].keys() - {"kind"}:
            assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-4), name

    def test_run_sharded_by_fsdp2_and_continued_gives_the_same(self, alone, tmp_path):
        if not is_torch_version(">=", FSDP2_TORCH):
            pytest.skip(f"FSDP2 is refused before torch {FSDP2_TORCH}")
        config_of(tmp_path / "run", 2).save(tmp_path / "run.yaml")
        launcher = [*LAUNCH_TWO, "--config_file", CONFIGS / "fsdp2.yaml"]
        done = subprocess.run(
            [*launcher, SHARDED, tmp_path / "run.yaml", tmp_path / "again", "240"],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_same_training(alone, tmp_path / "run")
        assert f"continuing from {tmp_path / 'again'}/checkpoints/images-000000000240" in done.stderr
        first, second = (weights(tmp_path / name) for name in ("run", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def train_and_save_weights(config, folder):
    """The weights that each process has after training."""
    models = []

    def build(config):
        models.append(build_model(config))
        return models[-1]

    fit_with(config, build=build)
    (model,) = (model for model in models if next(model.parameters()).device.type != "meta")
    torch.save(model.state_dict(), folder / f"{os.environ['RANK']}.pt")


def test_processes_end_with_equal_weights(tmp_path):
    """Each sees other images: were their gradients not averaged, their weights would differ at once."""
    config = config_of(tmp_path / "run", 2)
    run_forked(train_and_save_weights, config, tmp_path, log=tmp_path / "log", processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_run_of_three_processes_is_continued_bit_identically(tmp_path):
    """The gradients of three processes can be summed in more than one order."""
    config = tiny(tmp_path / "run", TINY_VAE, batch_size=30, max_images=120, checkpoint_every=60)
    config = whole(config)
    run_forked(fit, config, log=tmp_path / "log", processes=3)
    output_dir = interrupted_at(60, tmp_path / "run", tmp_path / "again")
    output = run_forked(fit, at(config, output_dir), log=tmp_path / "log of the second", processes=3)
    assert f"continuing from {output_dir}/checkpoints/images-000000000060" in output
    assert processes_of(output_dir) == 3
    assert left_behind(output_dir) == left_behind(tmp_path / "run")


def fail_on_main(folder):
    """Write to a file of each process what it learns of errors and results of the main one."""
    torch.distributed.init_process_group("gloo")
    found = []
    for error in (ValueError("wrong"), FileNotFoundError(2, "gone"), KeyError("name")):

        def work(error=error):
            raise error

        with pytest.raises(Exception) as caught:
            on_main(work)
        found.append(repr(caught.value))
    found.append(repr(on_main(process_share)))
    (folder / str(process_share()[0])).write_text("\n".join(found))


def test_errors_and_results_of_the_main_process_are_those_of_all(tmp_path):
    run_forked(fail_on_main, tmp_path, log=tmp_path / "log", processes=2)
    first, second = ((tmp_path / name).read_text().splitlines() for name in "01")
    assert first == ["ValueError('wrong')", "FileNotFoundError(2, 'gone')", "KeyError('name')", "(0, 2)"]
    assert second == [*first[:2], "RuntimeError(\"process 0: KeyError: 'name'\")", "(0, 2)"]


def measure():
    """Print what is measured of a model, on the main process."""
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4).build(1, (8, 8)).eval()
    _, images = load_data(DataConfig(resolution=8, heldout_fraction=0.101))
    found = [accelerator.num_processes]
    for batch_size in (16, 100):
        config = EvaluationConfig(batch_size=batch_size, draws=2)
        found.append(json.loads(evaluate(model, images, VAEObjective(Gaussian(1.0)), config).to_json()))
        statistics = measure_latents(model, images, batch_size)
        found.append([statistics.images, statistics.latents_mean, statistics.latents_std])
    if accelerator.is_main_process:
        sys.stdout.write(f"{json.dumps(found)}\n")
    accelerator.end_training()


def test_measures_are_those_of_one_process(tmp_path):
    """To the last digit, since batches are the same, of a count that no number of processes divides, and of fewer
    batches than processes.
    """
    alone, together = (
        json.loads(run_forked(measure, log=tmp_path / f"{processes}", processes=processes).splitlines()[-1])
        for processes in (1, 3)
    )
    assert (alone[0], together[0]) == (1, 3)
    assert alone[1]["images"] == 181 and alone[2][0] == 181
    assert together[1:] == alone[1:]


def children(process):
    """Process ids of the launch's processes, in the order in which they were started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def train_not_a_number(config):
    fit_with(config, change=not_a_number, finish=end)


class TestFailure:
    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
    def test_killed_process_ends_all_and_the_same_settings_continue(self, alone, tmp_path):
        """As users launch it; what is continued gives what one process does."""
        config = config_of(tmp_path / "run")
        config.save(tmp_path / "run.yaml")
        launcher = [*LAUNCH_TWO, "--config_file", str(CONFIGS / "ddp.yaml")]
        settings = ["--config", tmp_path / "run.yaml", "--run.checkpoint_every", 40]
        with begun(tmp_path / "run", *settings, launcher=launcher) as process:
            os.kill(children(process.pid)[1], signal.SIGKILL)
            output = process.communicate(timeout=90)[0]
            assert process.returncode not in (0, 75)
            assert "SIGKILL" in output or "Signal 9" in output
            assert group_is_gone(process.pid, 5)
        assert not (tmp_path / "run" / "checkpoints" / f"images-{END:012d}").exists()
        output = run_forked(fit, config, log=tmp_path / "log", processes=2)
        assert "continuing from" in output
        assert_same_training(alone, tmp_path / "run")

    def test_a_step_that_is_not_finite_on_one_is_skipped_by_all(self, tmp_path):
        config = tiny(tmp_path / "run", TINY_VAE, max_images=359, on_nonfinite="skip", log_every=30)
        config = dataclasses.replace(config, data=DataConfig(resolution=8, heldout_fraction=0.8))
        output = run_forked(train_not_a_number, config, log=tmp_path / "log", processes=2)
        assert output.count("skipped step") == 1 and "1 steps were skipped" in output
        named = re.search(r"in 1 of 30 images: image 17\. Its images are in (\S+)", output)[1]
        assert 17 in load_file(named)["indices"].tolist() and len(load_file(named)["indices"]) == 15
        assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 2

    def test_an_error_in_one_ends_all_and_is_shown(self, cifar_folder, tmp_path):
        """A file that only one process reads, of a set that is read on demand."""
        images = tmp_path / "images"
        shutil.copytree(cifar_folder / "test" / "ship", images)
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=20, max_images=4000, epochs=100)
        data = DataConfig(name="folder", root=str(images), channels=3, resolution=8, num_workers=1)
        config = dataclasses.replace(config, data=data)
        victim = sorted(images.iterdir())[40]
        victim.write_bytes(victim.read_bytes()[:700])
        launch = Launch(partial(fit, config, 0), tmp_path / "log", processes=2)
        assert launch.wait() == [1, 1]
        assert launch.output().count(f"ValueError: cannot read the image {victim}") == 1, launch.output()

    def test_a_process_without_an_image_takes_part_and_a_step_without_any_stops_all(self, cifar_folder, tmp_path):
        folder = tmp_path / "images"
        shutil.copytree(cifar_folder / "test" / "ship", folder)
        data = DataConfig(
            name="folder", root=str(folder), channels=3, resolution=8, on_bad_image="skip", num_workers=0
        )  # fmt: skip
        images, _ = load_data(data, memory_limit=0)
        first, second = islice(epoch_batches(len(images), 4, 0, 0), 2)
        for index in (*first[0].indices[2:], *second[0].indices):  # in the first step those of the second process
            path = paths_of(images)[index]
            path.write_bytes(path.read_bytes()[:700])
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=4, max_images=12, checkpoint_every=1, log_every=4)
        launch = Launch(partial(fit, dataclasses.replace(config, data=data), 0), tmp_path / "log", processes=2)
        assert launch.wait() == [1, 1]
        assert launch.output().count("ValueError: training stopped: no image of step 2 can be read") == 2
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["images-000000000004"]
        assert [record["loss"] > 0 for record in records(tmp_path / "run", "train")] == [True]


def test_dry_run_of_two_processes_runs_every_phase_and_keeps_nothing(tmp_path):
    run = ["--run.output_dir", tmp_path / "run", "--data.resolution", 8, "--model.block_out_channels", "[8,8]"]
    run += ["--model.norm_num_groups", 4, "--evaluation.max_images", 16]
    launch = Launch(partial(command, "train", "--dry_run", *run), tmp_path / "log", processes=2)
    assert launch.wait() == [0, 0], launch.output()
    assert launch.output().count("resumed from a checkpoint: bit-identical") == 1
    assert "continuing from its first checkpoint" in launch.output()  # and from no folder that is gone afterwards
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    run = ["--run.output_dir", tmp_path / "run", "--run.batch_size", 31]
    launch = Launch(partial(command, "train", *run), tmp_path / "log", processes=2)
    assert launch.wait() == [1, 1], launch.output()
    assert "run.batch_size must be divisible by" in launch.output() and not (tmp_path / "run").exists()
