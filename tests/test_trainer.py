"""Whole runs on real digits, small enough for seconds: what they leave behind, and that they repeat exactly."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from support.files import paths_of
from support.runs import DATA, ROOT, TINY_VAE, launch, records, tiny, weights

from diffusers_vae import MLPVAE, VAE, trainer
from diffusers_vae.checkpoint import find_checkpoint
from diffusers_vae.data import ArrayImages, DataConfig, epoch_batches, load_data, sources
from diffusers_vae.evaluation import EvaluationConfig, evaluate
from diffusers_vae.images import to_model_range
from diffusers_vae.latents import measure_latents
from diffusers_vae.loop import OptimizerConfig, dry_run, run_task
from diffusers_vae.trainer import AutoencoderTask, train


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

    @pytest.mark.slow
    def test_perceptron_saves_itself(self, tmp_path):
        result = train(tiny(tmp_path / "run"))
        assert result.latent_shape == (2, 1, 1)
        assert isinstance(MLPVAE.from_pretrained(tmp_path / "run" / "model"), MLPVAE)
        assert (tmp_path / "run" / "pictures" / "manifold.png").exists()

    @pytest.mark.slow
    def test_last_epoch_may_be_a_part(self, tmp_path):
        train(tiny(tmp_path / "run", max_images=2000, log_every=10_000))
        assert [r["images_seen"] for r in records(tmp_path / "run", "epoch")] == [1617, 2000 + (1617 - 2000) % 30]


class TestExactness:
    @pytest.mark.slow
    def test_two_runs_are_the_same(self, tmp_path, vae_run):
        config, result = vae_run
        again = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(tmp_path / "run")))
        train(again)
        first, second = weights(result.output_dir), weights(tmp_path / "run")
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert (result.output_dir / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()

    @pytest.mark.slow
    def test_another_seed_is_another_run(self, tmp_path):
        for seed in (0, 1):
            train(tiny(tmp_path / str(seed), seed=seed))
        first, second = (weights(tmp_path / str(seed)) for seed in (0, 1))
        assert not any(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.slow
    def test_accumulated_gradients_are_those_of_the_whole_batch(self, tmp_path):
        """A whole epoch, with an uneven last batch, of 17."""
        for steps in (1, 5):
            train(tiny(tmp_path / str(steps), gradient_accumulation_steps=steps, max_images=1617, batch_size=40))
        whole, parts = (weights(tmp_path / str(steps)) for steps in (1, 5))
        assert not torch.equal(whole["encoder.0.weight"], parts["encoder.0.weight"])  # sums of another order
        for key in whole:
            torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=2e-5)

    @pytest.mark.slow
    def test_average_is_that_of_the_warm_up(self, tmp_path):
        """diffusers' decay at its second step is 1 - 2^-0.75; at the first it is 0."""
        optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_images=0)
        for name, settings in (("w1", {"max_images": 30}), ("w2", {"max_images": 60}), ("average", {"max_images": 60})):
            config = tiny(tmp_path / name, ema_decay=0.999 if name == "average" else None, **settings)
            train(dataclasses.replace(config, optimizer=optimizer))
        w1, w2, average = (weights(tmp_path / name) for name in ("w1", "w2", "average"))
        decay = 1 - 2**-0.75
        for key in average:
            torch.testing.assert_close(average[key], decay * w1[key] + (1 - decay) * w2[key], rtol=0, atol=1e-6)
        assert (w1["mean.weight"] - w2["mean.weight"]).abs().max() > 1e-3

    @pytest.mark.slow
    def test_images_read_on_demand_train_the_same(self, tmp_path, cifar_folder, monkeypatch):
        data = DataConfig(name="folder", root=str(cifar_folder / "test" / "ship"), channels=3, resolution=(8, 16))
        for name, limit in (("memory", sources.MEMORY_LIMIT), ("disk", 0)):
            monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
            train(dataclasses.replace(tiny(tmp_path / name, TINY_VAE, max_images=90), data=data))
        first, second = weights(tmp_path / "memory"), weights(tmp_path / "disk")
        assert all(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.slow
    def test_deterministic_algorithms_are_used_when_asked_for(self, tmp_path):
        try:
            train(tiny(tmp_path / "run", TINY_VAE, deterministic=True, max_images=60))
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.slow
    def test_bfloat16_autocast_keeps_float32_weights(self, tmp_path):
        train(tiny(tmp_path / "run", TINY_VAE, mixed_precision="bf16"))
        assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
        AcceleratorState._reset_state(True)
        plain = train(tiny(tmp_path / "plain", TINY_VAE, mixed_precision="no")).report
        half = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert half["loss"] != plain.loss and half["loss"] == pytest.approx(plain.loss, rel=0.05)
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["mixed_precision"] == "bf16"


@pytest.fixture
def nan_at_17(monkeypatch):
    """The digits as float pixels, of which one is not a number."""

    def load(*arguments):
        train_images, heldout_images = load_data(*arguments)
        pixels = train_images.pixels / 255
        pixels[17, 0, 3, 3] = torch.nan
        return ArrayImages(pixels, train_images.labels), heldout_images

    monkeypatch.setattr(trainer, "load_data", load)


@pytest.fixture
def ships_on_demand(cifar_folder, tmp_path, monkeypatch):
    """Settings for a copy of real images that is not kept in memory and of which bad ones are skipped."""
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    folder = tmp_path / "images"
    shutil.copytree(cifar_folder / "test" / "ship", folder)
    return DataConfig(name="folder", root=str(folder), channels=3, resolution=8, on_bad_image="skip", num_workers=0)


class TestFaults:
    def test_stops_before_a_step_that_is_not_finite(self, tmp_path):
        config = dataclasses.replace(
            tiny(tmp_path / "run", log_every=30), optimizer=OptimizerConfig(learning_rate=1e30, schedule="constant")
        )
        with pytest.raises(FloatingPointError, match=r"stopped before step 2, not finite: loss"):
            train(config)
        assert all(math.isfinite(record["loss"]) for record in records(tmp_path / "run", "train"))

    @pytest.mark.slow
    def test_names_the_image_the_terms_and_the_dump(self, tmp_path, nan_at_17):
        """And keeps the checkpoint before, from which the run goes on without that step when told to."""
        config = tiny(tmp_path / "run", TINY_VAE, max_images=1617, checkpoint_every=30)
        config = dataclasses.replace(config, evaluation=EvaluationConfig(max_images=10))  # which 17 is not among
        with pytest.raises(FloatingPointError) as error:
            train(config)
        (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
        words = r"stopped before step (\d+), not finite: .*gradient, in 1 of 30 images: image 17\. "
        step = int(re.search(words, str(error.value))[1])
        assert f"step-{step:09d}" in dump.name and str(dump) in str(error.value)
        batch = load_file(dump)
        assert len(batch["indices"]) == 30 and batch["noise"].shape == (30, 4, 4, 4)
        (place,) = (batch["indices"] == 17).nonzero().flatten().tolist()
        assert batch["pixels"].isnan().flatten(1).any(1).nonzero().flatten().tolist() == [place]
        assert batch["distortion"].isnan().nonzero().flatten().tolist() == [place]
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest.name == f"images-{30 * (step - 1):012d}" and not damaged
        assert f"The newest checkpoint is {newest}" in str(error.value)

        train(dataclasses.replace(config, run=dataclasses.replace(config.run, on_nonfinite="skip")))
        (epoch,) = records(tmp_path / "run", "epoch")
        assert epoch["skipped"] == 1 and epoch["images_seen"] == 1617 and math.isfinite(epoch["loss"])

    @pytest.mark.slow
    def test_skipped_steps_change_nothing_and_are_counted(self, tmp_path, nan_at_17, caplog):
        config = tiny(tmp_path / "run", TINY_VAE, max_images=3234, on_nonfinite="skip", log_every=30)
        train(dataclasses.replace(config, evaluation=EvaluationConfig(max_images=10)))
        written = records(tmp_path / "run", "train")
        skips = [record.get("skipped", 0) for record in written]
        assert skips[0] == 0 and skips[-1] == 2 and sorted(skips) == skips
        empty = [record for record in written if record["loss"] is None]
        assert len(empty) == 2 and all(record["grad_norm"] is None for record in empty)
        assert caplog.text.count("skipped step") == 2 and "2 steps were skipped" in caplog.text
        assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())

    def test_skipping_ends_when_nothing_else_happens(self, tmp_path):
        optimizer = OptimizerConfig(learning_rate=1e30, schedule="constant")
        config = tiny(tmp_path / "run", max_images=1500, on_nonfinite="skip", batch_size=10)
        with pytest.raises(FloatingPointError, match="before step 21, not finite"):
            train(dataclasses.replace(config, optimizer=optimizer))
        assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 10

    @pytest.mark.slow
    def test_skipping_goes_on_while_other_steps_succeed(self, tmp_path, nan_at_17):
        """One in each of 22 epochs."""
        config = tiny(tmp_path / "run", max_images=None, epochs=22, on_nonfinite="skip")
        data = DataConfig(resolution=8, heldout_fraction=0.9)
        train(dataclasses.replace(config, data=data, evaluation=EvaluationConfig(max_images=10)))
        assert records(tmp_path / "run", "epoch")[-1]["skipped"] == 22

    @pytest.mark.slow
    def test_a_full_disk_costs_nothing_that_was_saved(self, tmp_path, small_disk):
        """With room again, the same command ends as it would have without."""
        settings = {"max_images": 900, "checkpoint_every": 30, "keep_checkpoints": 100}
        config = tiny(small_disk / "run", **settings)
        with pytest.raises(OSError, match=f"cannot write {small_disk}/run/.*: .*No space left on device"):
            train(config)
        saved, damaged = find_checkpoint(small_disk / "run" / "checkpoints")
        assert saved and not damaged
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        train(config)
        train(tiny(tmp_path / "run", **settings))
        first, second = weights(small_disk / "run"), weights(tmp_path / "run")
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert (small_disk / "run" / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()

    def test_a_folder_that_is_closed_is_named(self, small_disk):
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(OSError, match=f"cannot write {small_disk}/run: Read-only file system"):
            train(tiny(small_disk / "run"))

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])
    def test_images_that_cannot_be_read_are_left_out_and_listed(
        self, shared_data, tmp_path, monkeypatch, limit, caplog
    ):
        if limit is not None:
            monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
        data = DataConfig(
            name="folder", root=str(shared_data / "awkward"), channels=3, resolution=(8, 16), on_bad_image="skip"
        )
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=4, epochs=3, max_images=None)
        train(dataclasses.replace(config, data=data))
        listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
        names = {Path(line.split(": ")[0].removeprefix("cannot read the image ")).name for line in listed}
        expected = {"10ct_32bit_128.tiff", "decompression_bomb.gif", "zero_width.gif"}
        expected |= {"truncated_jpeg.jpg", "truncated_image.png"}
        assert names == expected and len(listed) == 5
        assert "5 files could not be read and were left out" in caplog.text

    @pytest.mark.slow
    def test_held_out_images_that_cannot_be_read_are_listed_too(self, ships_on_demand, tmp_path):
        data = ships_on_demand
        _, heldout = load_data(data)
        paths_of(heldout)[4].write_bytes(paths_of(heldout)[4].read_bytes()[:700])
        config = dataclasses.replace(tiny(tmp_path / "run", TINY_VAE, max_images=30), data=data)
        assert train(config).report.images == len(heldout) - 1
        assert str(paths_of(heldout)[4]) in (tmp_path / "run" / "bad_images.txt").read_text()
        for path in paths_of(heldout):
            path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(ValueError, match="no image to evaluate can be read"):
            train(dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(tmp_path / "none"))))

    @pytest.mark.slow
    def test_a_step_of_which_nothing_can_be_read_is_survived(self, ships_on_demand, tmp_path):
        data = ships_on_demand
        images, _ = load_data(data)
        for index in next(epoch_batches(len(images), 2, 0, 0))[0].indices:  # the two of the first step
            paths_of(images)[index].write_bytes(paths_of(images)[index].read_bytes()[:700])
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=2, max_images=4, log_every=2)
        train(dataclasses.replace(config, data=data))
        first, second = records(tmp_path / "run", "train")
        assert first["loss"] is None and first["grad_norm"] == 0 and second["loss"] > 0

    def test_a_last_step_that_diverges_is_no_success(self, tmp_path):
        optimizer = OptimizerConfig(learning_rate=1e30, schedule="constant", warmup_images=0)
        config = tiny(tmp_path / "run", TINY_VAE, max_images=30, ema_decay=None)
        with pytest.raises(FloatingPointError, match="diverged"):
            train(dataclasses.replace(config, optimizer=optimizer))
        assert not (tmp_path / "run" / "evaluation.json").exists()

    def test_float16_needs_a_gpu(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("float16 works on this machine's GPU")
        with pytest.raises(ValueError, match="must be bf16 or no, got fp16"):
            train(tiny(tmp_path / "run", mixed_precision="fp16"))

    def test_batch_size_that_cannot_be_divided(self, tmp_path):
        with pytest.raises(ValueError, match=r"run\.batch_size must be divisible by .* 4, got 30"):
            train(tiny(tmp_path / "run", gradient_accumulation_steps=4))
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_dry_run_leaves_nothing(self, tmp_path):
        result, same, seconds = dry_run(AutoencoderTask(tiny(tmp_path / "run", TINY_VAE)))
        assert result.latent_shape == (4, 4, 4) and result.memory > 0
        assert same and seconds == pytest.approx(300 / result.images_per_second)
        assert not (tmp_path / "run").exists() and not result.output_dir.exists()

    @pytest.mark.slow
    def test_dry_run_tells_a_run_that_is_not_repeated(self, tmp_path):
        class Careless(AutoencoderTask):
            """Draws on from wherever it is, whatever step that is for."""

            generator = torch.Generator().manual_seed(0)

            def draws(self, count, generator, size=None):
                return super().draws(count, self.generator, size)

            def few(self, folder):
                return Careless(super().few(folder).config, 0)

        assert not dry_run(Careless(tiny(tmp_path / "run")))[1]

    def test_may_end_by_its_last_checkpoint(self, tmp_path):
        assert run_task(AutoencoderTask(tiny(tmp_path / "run")), finish=False) is None
        saved = {path.name for path in (tmp_path / "run").iterdir()}
        assert "checkpoints" in saved and not saved & {"model", "evaluation.json", "report.html"}

    @pytest.mark.slow
    def test_dry_run_of_less_than_a_batch_resumes_too(self, tmp_path, caplog):
        caplog.set_level("INFO")
        _, same, seconds = dry_run(AutoencoderTask(tiny(tmp_path / "run", batch_size=4000, epochs=1, max_images=None)))
        assert same and seconds > 0 and caplog.text.count("continuing from") == 1

    def test_dry_run_refuses_what_the_run_would_refuse(self, vae_run):
        config, _ = vae_run
        with pytest.raises(FileExistsError, match=r"run\.seed: 0 -> 1"):
            dry_run(AutoencoderTask(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))))
        run = dataclasses.replace(config.run, allow_config_change=True, mixed_precision=None)
        other = dataclasses.replace(config, run=run, model=dataclasses.replace(TINY_VAE, block_out_channels=(8, 16)))
        with pytest.raises(ValueError, match="is of another model"):
            dry_run(AutoencoderTask(other))

    @pytest.mark.slow
    def test_dry_run_in_the_folder_of_the_run(self, vae_run):
        config, _ = vae_run
        run = dataclasses.replace(config.run, mixed_precision=None)  # as the preset has it
        assert dry_run(AutoencoderTask(dataclasses.replace(config, run=run)))[1]


class TestScript:
    @pytest.mark.slow
    def test_run_says_where_everything_is(self, tmp_path, cifar_folder):
        """RGB, not square, from a folder."""
        config = tmp_path / "a.yaml"
        config.write_text(
            "data: {name: folder, channels: 3, resolution: [16, 24], fit: pad}\n"
            "model: {block_out_channels: [8, 8], norm_num_groups: 4}\n"
            "run: {tracker: null, max_images: 96}\n"
        )
        folder, output_dir = cifar_folder / "test" / "frog", tmp_path / "run"
        done = launch("--config", config, "--data.root", folder, "--run.output_dir", output_dir)
        assert done.returncode == 0, done.stderr
        for path in ("pictures", "evaluation.json", "model"):
            assert str(output_dir / path) in done.stdout
        assert "latents 4x8x12" in done.stdout and "AutoencoderKL.from_pretrained" in done.stdout
        assert "img/s" in done.stderr and "loss" in done.stderr and "epoch 1:" in done.stderr

    @pytest.mark.slow
    def test_errors_are_for_people(self, tmp_path):
        (tmp_path / "config.yaml").write_text("run: {seed: 7}")
        done = launch("--run.output_dir", tmp_path)
        assert done.returncode != 0
        assert f"error: run.output_dir holds a run with other settings: {tmp_path}" in done.stderr
        assert "run.seed: 7 -> 0" in done.stderr and "run.allow_config_change" in done.stderr
        assert "train_vae.py" not in done.stderr.split("error:")[0]  # no traceback of ours

    @pytest.mark.slow
    def test_dry_run_of_the_default(self, tmp_path):
        done = launch("--dry_run", "--run.output_dir", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        for word in ("681,241 parameters", "latents 4x8x8", "MiB", "bit-identical", "min (", "nothing was kept"):
            assert word in done.stdout
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_two_processes_count_every_image_once(self, tmp_path):
        arguments = ["--run.tracker", "null", "--run.max_images", 1617, "--run.batch_size", 50, "--data.resolution", 8]
        arguments += ["--run.ema_decay", "null", "--model.block_out_channels", "[8,8]", "--model.norm_num_groups", 4]
        for processes in (1, 2):
            done = launch(*arguments, "--run.output_dir", tmp_path / str(processes), processes=processes)
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("epoch 1:") == 1
        one, two = (records(tmp_path / str(processes), "epoch")[0] for processes in (1, 2))
        assert one["images_seen"] == two["images_seen"] == 1617
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


BROKEN = """
import torch
from diffusers_vae.data import MicroBatch, TrainingSet
from diffusers_vae.loop import _read_by_workers

class Broken(TrainingSet):
    def __len__(self):
        return 1

    def read(self, batch):
        raise MemoryError("none left")

steps = [(0, 0, [MicroBatch([0], 0, 1, 1.0)])] * 9
try:
    with _read_by_workers(Broken(), steps, 2, 0, torch.device("cpu")) as reads:
        next(reads)
except MemoryError as error:
    kept = error  # and with it, by its traceback, what reads
    print("failed")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs workers that are forked")
def test_workers_end_when_a_run_fails():
    """They ignore the signal by which Python would end them, to let a step be finished."""
    ended = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.returncode == 0 and ended.stdout == "failed\n", ended.stderr
