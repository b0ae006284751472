"""Whole runs on real digits, small enough for seconds: what they leave behind, and that they repeat exactly."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from diffusers_vae import MLPVAE, VAE
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.evaluation import EvaluationConfig, evaluate
from diffusers_vae.images import to_model_range
from diffusers_vae.latents import measure_latents
from diffusers_vae.models import ModelConfig
from diffusers_vae.objective import ObjectiveConfig
from diffusers_vae.trainer import OptimizerConfig, RunConfig, TrainConfig, dry_run, train

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "training" / "train_vae.py"
DATA = DataConfig(resolution=8)
TINY_VAE = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False)
TINY_MLP = ModelConfig(architecture="mlp", hidden_dim=16, latent_dim=2)


def tiny(output_dir, model=TINY_MLP, **run):
    run = {"max_images": 300, "batch_size": 30, "log_every": 90, "tracker": None} | run
    return TrainConfig(
        data=DATA,
        model=model,
        objective=ObjectiveConfig(scale=0.5),
        run=RunConfig(output_dir=str(output_dir), **run),
    )


def records(output_dir, kind):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(output_dir):
    return load_file(Path(output_dir) / "model" / "diffusion_pytorch_model.safetensors")


def launch(*arguments, processes=1):
    """A run as users start it; several processes by torchrun, since `accelerate launch` starts one on a CPU."""
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*start, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("vae") / "run"
    config = tiny(output_dir, TINY_VAE, ema_decay=0.9, tracker="tensorboard")
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every=120))
    return config, train(config)


class TestRun:
    def test_leaves_all_files(self, vae_run):
        _, result = vae_run
        names = {str(path.relative_to(result.output_dir)) for path in result.output_dir.rglob("*") if path.is_file()}
        assert {"config.yaml", "metrics.jsonl", "evaluation.json", "model/config.json"} <= names
        assert {f"pictures/{name}.png" for name in ("reconstructions", "samples", "loss", "latents")} <= names
        assert any(name.startswith("tensorboard/") for name in names)
        for picture in (result.output_dir / "pictures").iterdir():
            assert Image.open(picture).size > (200, 200)

    def test_stock_loads_the_model_bit_equal(self, vae_run):
        _, result = vae_run
        stock, missing = AutoencoderKL.from_pretrained(result.output_dir / "model", output_loading_info=True)
        assert not any(missing.values())
        ours = VAE.from_pretrained(result.output_dir / "model")
        images = to_model_range(load_data(DATA)[1].pixels[:4])
        assert torch.equal(stock(images).sample, ours(images).sample)

    def test_the_line_that_it_prints_loads_the_model(self, vae_run):
        names = {}
        exec(vae_run[1].load_line, names)
        assert type(names["vae"]) is AutoencoderKL

    def test_report_is_of_the_saved_model(self, vae_run):
        config, result = vae_run
        model = VAE.from_pretrained(result.output_dir / "model")
        again = evaluate(model, load_data(DATA)[1], config.objective.build(), config.evaluation)
        assert again.psnr == pytest.approx(result.report.psnr, rel=1e-5)
        assert again.elbo == pytest.approx(result.report.elbo, rel=1e-5)
        assert json.loads((result.output_dir / "evaluation.json").read_text())["psnr"] == result.report.psnr

    def test_scaling_and_shift_are_measured(self, vae_run):
        result = vae_run[1]
        model = VAE.from_pretrained(result.output_dir / "model")
        statistics = measure_latents(model, load_data(DATA)[0], 100)
        assert model.config.scaling_factor == pytest.approx(1 / statistics.std, rel=1e-5)
        assert model.config.shift_factor == pytest.approx(statistics.mean, rel=1e-4)
        assert model.config.scaling_factor != 0.18215
        assert result.latent_shape == (4, 4, 4) and result.parameters == model.num_parameters()

    def test_records_count_every_image_once(self, vae_run):
        _, result = vae_run
        seen = [record["images_seen"] for record in records(result.output_dir, "train")]
        assert seen == [90, 180, 270, 300]
        assert [record["images_seen"] for record in records(result.output_dir, "evaluation")] == [120, 240, 300]
        (epoch,) = records(result.output_dir, "epoch")
        parts = np.diff([0, *seen])
        mean = np.average([record["rate"] for record in records(result.output_dir, "train")], weights=parts)
        assert epoch["rate"] == pytest.approx(mean, rel=1e-6)

    def test_training_lowers_the_loss(self, tmp_path):
        config = tiny(tmp_path / "run", max_images=6000)
        train(dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3)))
        losses = [record["loss"] for record in records(tmp_path / "run", "train")]
        assert losses[-1] < 0.5 * losses[0]

    def test_perceptron_saves_itself(self, tmp_path):
        result = train(tiny(tmp_path / "run"))
        assert result.latent_shape == (2, 1, 1)
        assert isinstance(MLPVAE.from_pretrained(tmp_path / "run" / "model"), MLPVAE)
        assert (tmp_path / "run" / "pictures" / "manifold.png").exists()

    def test_last_epoch_may_be_a_part(self, tmp_path):
        train(tiny(tmp_path / "run", max_images=2000, log_every=10_000))
        assert [r["images_seen"] for r in records(tmp_path / "run", "epoch")] == [1617, 2000 + (1617 - 2000) % 30]


class TestExactness:
    def test_two_runs_are_the_same(self, tmp_path, vae_run):
        config, result = vae_run
        again = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(tmp_path / "run")))
        train(again)
        first, second = weights(result.output_dir), weights(tmp_path / "run")
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert (result.output_dir / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()

    def test_another_seed_is_another_run(self, tmp_path):
        for seed in (0, 1):
            train(tiny(tmp_path / str(seed), seed=seed))
        first, second = (weights(tmp_path / str(seed)) for seed in (0, 1))
        assert not any(torch.equal(first[key], second[key]) for key in first)

    def test_accumulated_gradients_are_those_of_the_whole_batch(self, tmp_path):
        """Five forwards of 8 images draw the noise of one forward of 40: torch fills it in blocks of 16 numbers."""
        for steps in (1, 5):
            train(tiny(tmp_path / str(steps), gradient_accumulation_steps=steps, max_images=400, batch_size=40))
        whole, parts = (weights(tmp_path / str(steps)) for steps in (1, 5))
        assert not torch.equal(whole["encoder.0.weight"], parts["encoder.0.weight"])  # sums of another order
        for key in whole:
            torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=2e-5)

    def test_without_ema_the_last_weights_are_saved_with_it_their_average(self, tmp_path):
        for name, decay in (("last", None), ("average", 0.999)):
            train(tiny(tmp_path / name, ema_decay=decay))
        last, average = (weights(tmp_path / name) for name in ("last", "average"))
        assert not torch.equal(last["encoder.0.weight"], average["encoder.0.weight"])


class TestFaults:
    def test_another_run_is_not_overwritten(self, vae_run):
        config, result = vae_run
        before = weights(result.output_dir)
        with pytest.raises(FileExistsError, match="holds a run already"):
            train(config)
        assert all(torch.equal(before[key], value) for key, value in weights(result.output_dir).items())

    def test_stops_before_a_step_that_is_not_finite(self, tmp_path):
        config = dataclasses.replace(
            tiny(tmp_path / "run", log_every=30), optimizer=OptimizerConfig(learning_rate=1e30, schedule="constant")
        )
        with pytest.raises(FloatingPointError, match=r"stopped before step \d+: .* not finite"):
            train(config)
        assert all(math.isfinite(record["loss"]) for record in records(tmp_path / "run", "train"))

    def test_batch_size_that_cannot_be_divided(self, tmp_path):
        with pytest.raises(ValueError, match=r"run\.batch_size must be divisible by .* 4, got 30"):
            train(tiny(tmp_path / "run", gradient_accumulation_steps=4))
        assert not (tmp_path / "run").exists()

    def test_dry_run_leaves_nothing(self, tmp_path):
        result = dry_run(tiny(tmp_path / "run", TINY_VAE))
        assert result.latent_shape == (4, 4, 4) and result.memory > 0
        assert not (tmp_path / "run").exists() and not result.output_dir.exists()


class TestScript:
    def test_dry_run_of_the_default(self):
        done = launch("--dry_run")
        assert done.returncode == 0, done.stderr
        for word in ("parameters", "latents 4x", "MiB", "PSNR", "nothing was kept"):
            assert word in done.stdout

    def test_run_says_where_everything_is(self, tmp_path):
        arguments = ["--data.resolution", 8, "--model.architecture", "mlp", "--run.max_images", 300]
        config = tmp_path / "a.yaml"
        config.write_text("run: {tracker: null}\n")
        done = launch("--config", config, *arguments, "--run.output_dir", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        for path in ("pictures", "evaluation.json", "model"):
            assert str(tmp_path / "run" / path) in done.stdout
        assert "MLPVAE.from_pretrained" in done.stdout
        assert "img/s" in done.stderr and "loss" in done.stderr and "epoch 1:" in done.stderr

    def test_error_is_one_that_a_person_can_read(self, tmp_path):
        done = launch("--data.name", "folder", "--data.root", tmp_path / "none", "--run.output_dir", tmp_path / "run")
        assert done.returncode != 0
        assert "data.root must be a folder of images" in done.stderr

    @pytest.mark.slow
    def test_two_processes_synchronise_and_count_every_image(self, tmp_path):
        arguments = ["--run.tracker", "null", "--run.max_images", 1617, "--run.batch_size", 50, "--data.resolution", 8]
        arguments += ["--run.ema_decay", "null", "--run.epochs", 1, "--model.block_out_channels", "[8,8]"]
        arguments += ["--model.norm_num_groups", 4, "--optimizer.warmup_images", 0]
        for processes in (1, 2):
            done = launch(*arguments, "--run.output_dir", tmp_path / str(processes), processes=processes)
            assert done.returncode == 0, done.stderr
        one, two = (records(tmp_path / str(processes), "epoch")[0] for processes in (1, 2))
        assert one["images_seen"] == two["images_seen"] == 1617
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)  # the noise in the latents differs
