"""Several processes: the result of one, nothing counted twice, and one failure ends all."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_torch_version
from safetensors.torch import load_file
from support.runs import (
    CONFIGS,
    LAUNCH,
    ROOT,
    SCRIPT,
    TINY_VAE,
    assert_same_gradient,
    begin,
    group_is_gone,
    interrupted_at,
    launch,
    random_network,
    reading_on_demand,
    records,
    run_in,
    tensors,
    tiny,
    weights,
    whole,
)

from diffusers_vae.data import DataConfig
from diffusers_vae.evaluation import EvaluationConfig
from diffusers_vae.loop import FSDP2_TORCH, OptimizerConfig

pytestmark = pytest.mark.slow


def config_of(output_dir, schedule, micro_steps=1):
    """20 steps on 359 images: eight batches of 40 and one of 39 an epoch. Not clipped, so that Adam's first average
    is a tenth of the first gradient.
    """
    config = tiny(
        output_dir, TINY_VAE, batch_size=40, max_images=798, checkpoint_every=40, keep_checkpoints=100,
        gradient_accumulation_steps=micro_steps, log_every=40,
    )  # fmt: skip
    return dataclasses.replace(
        config,
        model=dataclasses.replace(TINY_VAE, mid_block_add_attention=True),
        data=DataConfig(resolution=8, heldout_fraction=0.8),
        optimizer=OptimizerConfig(max_grad_norm=None, warmup_images=200, schedule=schedule),
    )


def assert_same_training(reference, output_dir):
    """The first gradients; weights and their average after 20 steps to 1e-4. With a discriminator, after 5, of which it
    took part in 4: later, rounding decides at kinks of the networks that judge, and grows.
    """
    assert assert_same_gradient(reference, output_dir, 40) > 100
    judged = (Path(reference) / "checkpoints" / "images-000000000080" / "discriminator.safetensors").exists()
    end = 200 if judged else 798
    if judged:
        assert assert_same_gradient(reference, output_dir, 80, "discriminator_optimizer") > 7
    for kind in ("model", "ema", "discriminator") if judged else ("model", "ema"):
        expected, found = (tensors(path, end, kind) for path in (reference, output_dir))
        for name in expected:
            if not name.endswith("to_k.bias"):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
    for first, second in zip(records(reference, "train"), records(output_dir, "train"), strict=True):
        assert first["learning_rate"] == second["learning_rate"] and first["images_seen"] == second["images_seen"]
        if first["images_seen"] > end:
            break
        # with a learned scale the loss passes zero: it is a sum of terms of which distortion is one
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-5 * first["distortion"])
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
        if judged:
            assert first["adversarial_weight"] == pytest.approx(second["adversarial_weight"], rel=1e-4)
            assert (first["adversarial_weight"] > 0) == (first["images_seen"] > 80)


@pytest.fixture(scope="module", params=["constant", "cosine", "whole"])
def alone(request, tmp_path_factory):
    """The settings of a run of one process, after it."""
    folder = tmp_path_factory.mktemp("alone")
    config = config_of(folder / "run", "constant" if request.param == "whole" else request.param)
    if request.param == "whole":
        config = whole(config, random_network(folder / "network"))
    run_in(1, config)
    return config


class TestSameResult:
    def other(self, alone, output_dir, micro_steps):
        run = config_of(output_dir, alone.optimizer.schedule, micro_steps).run
        return dataclasses.replace(alone, run=run)

    def test_accumulation(self, alone, tmp_path):
        run_in(1, self.other(alone, tmp_path / "run", 2))
        assert_same_training(alone.run.output_dir, tmp_path / "run")

    def test_two_processes(self, alone, tmp_path):
        run_in(2, self.other(alone, tmp_path / "run", 1), "--config_file", str(CONFIGS / "ddp.yaml"))
        assert_same_training(alone.run.output_dir, tmp_path / "run")
        first, second = (weights(path) for path in (alone.run.output_dir, tmp_path / "run"))
        assert not all(torch.equal(first[name], second[name]) for name in first)  # there were two

    def test_two_processes_with_accumulation(self, alone, tmp_path):
        run_in(2, self.other(alone, tmp_path / "run", 2), "--multi_gpu")
        assert_same_training(alone.run.output_dir, tmp_path / "run")

    def test_sharded_by_fsdp2_and_continued(self, alone, tmp_path):
        """Accelerate offers FSDP on GPUs only; told that it may, it shards over processes on a CPU all the same."""
        if alone.optimizer.schedule == "cosine" or alone.adversarial.weight:
            pytest.skip("one is enough here")
        if not is_torch_version(">=", FSDP2_TORCH):
            pytest.skip(f"FSDP2 is refused before torch {FSDP2_TORCH}")
        script = tmp_path / "sharded.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
            "from accelerate.state import AcceleratorState\n"
            "from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin\n"
            "import train_vae\n"
            "begin = AcceleratorState.__init__\n"
            "def init(self, *args, **kwargs):\n"
            "    new = not AcceleratorState._shared_state\n"
            "    begin(self, *args, **kwargs)\n"
            "    if new:\n"
            "        self.distributed_type = DistributedType.FSDP\n"
            "        self.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher's config says\n"
            "AcceleratorState.__init__ = init\n"
            "train_vae.main()\n"
        )
        launcher = ["--config_file", str(CONFIGS / "fsdp2.yaml")]
        run_in(2, self.other(alone, tmp_path / "run", 2), *launcher, script=script)
        assert_same_training(alone.run.output_dir, tmp_path / "run")
        again = interrupted_at(439, tmp_path / "run", tmp_path / "again")
        output = run_in(2, self.other(alone, again, 2), *launcher, script=script)
        assert f"continuing from {again}/checkpoints/images-000000000439" in output
        first, second = (weights(tmp_path / name) for name in ("run", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_unsynchronised_gradients_would_be_seen(tmp_path):
    """Every process sees other images: were their gradients not averaged, their weights would differ at once."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "from diffusers_vae.config import TRAININGS, parse_settings\n"
        "from diffusers_vae.models import ModelConfig\n"
        "from diffusers_vae.trainer import train\n"
        "models, build = [], ModelConfig.build\n"
        "ModelConfig.build = lambda *arguments: models.append(build(*arguments)) or models[-1]\n"
        "train(parse_settings(TRAININGS['train'], sys.argv[1:])[0])\n"
        "torch.save(models[0].state_dict(), f'{os.environ[\"RANK\"]}.pt')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    config = dataclasses.replace(config_of(tmp_path / "run", "constant", 2))
    config.save(tmp_path / "run.yaml")
    done = subprocess.run(
        [*LAUNCH, "--multi_gpu", "--num_processes", "2", str(script), "--config", str(tmp_path / "run.yaml")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_measures_are_those_of_one_process(tmp_path):
    """To the last digit, of counts that no number of processes divides, and of fewer batches than processes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, torch\n"
        "from accelerate import Accelerator\n"
        "from diffusers_vae.data import DataConfig, load_data\n"
        "from diffusers_vae.evaluation import EvaluationConfig, evaluate\n"
        "from diffusers_vae.latents import measure_latents\n"
        "from diffusers_vae.models import ModelConfig\n"
        "from diffusers_vae.objective import VAEObjective\n"
        "torch.set_num_threads(1)\n"
        "accelerator = Accelerator(cpu=True)\n"
        "torch.manual_seed(0)\n"
        "model = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4).build(1, (8, 8)).eval()\n"
        "_, images = load_data(DataConfig(resolution=8, heldout_fraction=0.101))\n"
        "found = [accelerator.num_processes]\n"
        "for batch_size in (16, 100):\n"
        "    config = EvaluationConfig(batch_size=batch_size, draws=2)\n"
        "    found.append(json.loads(evaluate(model, images, VAEObjective(), config).to_json()))\n"
        "    statistics = measure_latents(model, images, batch_size)\n"
        "    found.append([statistics.images, statistics.latents_mean, statistics.latents_std])\n"
        "if accelerator.is_main_process:\n"
        "    print(json.dumps(found))\n"
        "accelerator.end_training()\n"
    )

    def measure(*arguments):
        done = subprocess.run([*LAUNCH, *arguments, str(script)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    alone = measure("--num_processes", "1")
    together = measure("--multi_gpu", "--num_processes", "3")
    assert (alone[0], together[0]) == (1, 3)
    assert alone[1]["images"] == 181 and alone[2][0] == 181
    assert together[1:] == alone[1:]


def children(process):
    """Process ids of the launch's processes, in the order in which they were started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


class TestFailure:
    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
    def test_a_killed_process_ends_all_and_the_same_command_continues(self, tmp_path):
        launcher = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
        settings = ["--data.resolution", 8, "--run.max_images", 8000]
        process = begin(tmp_path / "run", *settings, launcher=launcher)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        output = process.communicate(timeout=90)[0]
        assert process.returncode not in (0, 75)
        assert "SIGKILL" in output or "Signal 9" in output
        assert group_is_gone(process, 5)
        settings += ["--run.tracker", "null", "--run.checkpoint_every", 100]
        for name in ("run", "reference"):
            done = launch(*settings, "--run.output_dir", tmp_path / name, processes=2)
            assert done.returncode == 0, done.stderr
            assert ("continuing from" in done.stderr) == (name == "run")
        first, second = (weights(tmp_path / name) for name in ("run", "reference"))
        assert all(torch.equal(first[name], second[name]) for name in first)
        first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "reference"))
        assert first == second

    def test_a_step_that_is_not_finite_on_one_is_skipped_by_all(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
            "from diffusers_vae import trainer\n"
            "from diffusers_vae.data import ArrayImages, load_data\n"
            "def load(*arguments):\n"
            "    train, heldout = load_data(*arguments)\n"
            "    pixels = train.pixels / 255\n"
            "    pixels[17, 0, 3, 3] = float('nan')\n"
            "    return ArrayImages(pixels, train.labels), heldout\n"
            "trainer.load_data = load\n"
            "import train_vae\n"
            "train_vae.main()\n"
        )
        config = tiny(tmp_path / "run", TINY_VAE, max_images=1617, on_nonfinite="skip", log_every=30)
        config = dataclasses.replace(config, evaluation=EvaluationConfig(max_images=10))
        output = run_in(2, config, "--multi_gpu", script=script)
        assert output.count("skipped step") == 1 and "1 steps were skipped" in output
        named = re.search(r"in 1 of 30 images: image 17\. Its images are in (\S+)", output)[1]
        assert 17 in load_file(named)["indices"].tolist() and len(load_file(named)["indices"]) == 15
        assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 2

    def test_an_error_in_one_ends_all_and_is_shown(self, cifar_folder, tmp_path):
        """A file that only one process reads, of a set that is read on demand."""
        images = tmp_path / "images"
        images.mkdir()
        for path in (cifar_folder / "test" / "ship").iterdir():
            (images / path.name).write_bytes(path.read_bytes())
        script = reading_on_demand(tmp_path)
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=20, max_images=4000, epochs=100)
        data = DataConfig(name="folder", root=str(images), channels=3, resolution=8, num_workers=1)
        config = dataclasses.replace(config, data=data)
        victim = sorted(images.iterdir())[40]
        victim.write_bytes(victim.read_bytes()[:700])
        config.save(tmp_path / "run.yaml")
        began = time.monotonic()
        done = subprocess.run(
            [*LAUNCH, "--multi_gpu", "--num_processes", "2", str(script), "--config", str(tmp_path / "run.yaml")],
            capture_output=True, text=True, cwd=ROOT, timeout=120,
        )  # fmt: skip
        assert done.returncode != 0
        assert f"error: cannot read the image {victim}" in done.stderr, done.stderr
        assert time.monotonic() - began < 100


def test_dry_run_of_two_processes(tmp_path):
    done = launch("--dry_run", "--run.output_dir", tmp_path / "run", "--data.resolution", 8, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed from a checkpoint: bit-identical") == 1
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = launch("--run.output_dir", tmp_path / "run", "--run.batch_size", 31, processes=2)
    assert done.returncode != 0
    assert "run.batch_size must be divisible by" in done.stderr and not (tmp_path / "run").exists()
