"""Whole runs on real digits, small enough for seconds: what they leave behind, and that they repeat exactly."""

import dataclasses
import json
import math
import multiprocessing
import re
import shutil
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from support.batches import epoch_batches
from support.files import paths_of, tarred
from support.launches import Launch, command, run_forked
from support.runs import (
    DATA,
    DETERMINISTIC,
    TINY_VAE,
    at,
    end,
    fit,
    fit_with,
    left_behind,
    not_a_number,
    records,
    tensors,
    tiny,
)

from diffusers_vae import MLPVAE, VAE, cli
from diffusers_vae.data import ArrayImages, DataConfig, ReadImages, load_data
from diffusers_vae.engine.checkpoint import find_checkpoint
from diffusers_vae.engine.config import OptimizerConfig
from diffusers_vae.engine.dry_run import dry_run as try_out
from diffusers_vae.engine.folder import BadImages
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.evaluation.report import read_report
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.latents.statistics import measure_latents
from diffusers_vae.tasks.autoencoder import dry_run, few, finish_run, train
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep
from diffusers_vae.tasks.text_to_image_step import TextToImageStep

FEW = DataConfig(resolution=8, heldout_fraction=0.9)
"""180 images to train on."""


@pytest.fixture
def vae_run(finished_vae_run):
    """Settings and result of a finished run."""
    config = tiny(finished_vae_run, TINY_VAE, tracker="tensorboard")
    return config, train(config)


class TestRun:
    @pytest.mark.slow
    def test_leaves_all_files(self, vae_run):
        _, result = vae_run
        names = {str(path.relative_to(result.output_dir)) for path in result.output_dir.rglob("*") if path.is_file()}
        assert {"config.yaml", "metrics.jsonl", "evaluation.json", "model/config.json"} <= names
        assert {f"pictures/{name}.png" for name in ("reconstructions", "samples", "loss", "latents")} <= names
        assert any(name.startswith("tensorboard/") for name in names)
        for picture in (result.output_dir / "pictures").iterdir():
            assert Image.open(picture).size > (200, 200)

    def test_stock_loads_the_same_model(self, vae_run):
        """The averaged weights, bit for bit, and with them the same reconstructions."""
        _, result = vae_run
        stock, missing = AutoencoderKL.from_pretrained(result.output_dir / "model", output_loading_info=True)
        assert not any(missing.values())
        averaged = tensors(result.output_dir, 300, "ema")
        assert all(torch.equal(value, averaged[name]) for name, value in stock.state_dict().items())
        ours = VAE.from_pretrained(result.output_dir / "model")
        images = to_model_range(load_data(DATA)[1].pixels[:4])
        torch.testing.assert_close(stock(images).sample, ours(images).sample, rtol=1e-6, atol=1e-6)

    def test_the_line_that_it_prints_loads_the_model(self, vae_run):
        names = {}
        exec(vae_run[1].load_line, names)
        assert type(names["vae"]) is AutoencoderKL

    @pytest.mark.slow
    def test_report_is_of_the_saved_model(self, vae_run):
        config, result = vae_run
        model = VAE.from_pretrained(result.output_dir / "model")
        again = evaluate(model, load_data(DATA)[1], config.objective.build(), config.evaluation)
        assert again.psnr == pytest.approx(result.report.psnr, rel=1e-5)
        assert again.elbo == pytest.approx(result.report.elbo, rel=1e-5)
        assert json.loads((result.output_dir / "evaluation.json").read_text())["psnr"] == result.report.psnr

    @pytest.mark.slow
    def test_scaling_and_shift_are_measured(self, vae_run):
        result = vae_run[1]
        model = VAE.from_pretrained(result.output_dir / "model")
        statistics = measure_latents(model, load_data(DATA)[0])
        assert model.config.scaling_factor == pytest.approx(1 / statistics.std, rel=1e-5)
        assert model.config.shift_factor == pytest.approx(statistics.mean, rel=1e-4)
        assert model.config.scaling_factor != 0.18215
        assert result.latent_shape == (4, 4, 4) and result.parameters == model.num_parameters()

    def test_records_count_every_image_once(self, vae_run):
        _, result = vae_run
        seen = [record["images_seen"] for record in records(result.output_dir, "train")]
        assert seen == [90, 180, 270, 300]
        assert [record["images_seen"] for record in records(result.output_dir, "evaluation")] == [300]
        (epoch,) = records(result.output_dir, "epoch")
        parts = np.diff([0, *seen])
        mean = np.average([record["rate"] for record in records(result.output_dir, "train")], weights=parts)
        assert epoch["rate"] == pytest.approx(mean, rel=1e-6)

    @pytest.mark.slow
    def test_perceptron_saves_itself(self, finished_mlp_run):
        result = train(tiny(finished_mlp_run))
        assert result.latent_shape == (2, 1, 1)
        assert isinstance(MLPVAE.from_pretrained(finished_mlp_run / "model"), MLPVAE)
        assert (finished_mlp_run / "pictures" / "manifold.png").exists()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE = [
    ("model/diffusion_pytorch_model.safetensors", lambda content: b"x"),
    ("model/diffusion_pytorch_model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ("model/config.json", None),
    ("model/config.json", lambda content: b"{"),
    ("report.html", None),
    ("report.html", cut),
    ("README.md", None),
    ("README.md", lambda content: b""),
    ("pictures/loss.png", None),
    ("pictures/manifold.png", cut),
    ("evaluation.csv", None),
    ("evaluation.json", cut),
    ("evaluation.json", lambda content: content.replace(b'"psnr": ', b'"psnr": "high", "was": ')),
    ("config.yaml", lambda content: b"run: ["),
]
"""What can happen to a file of a finished run: it is gone (None), or has other content."""


def damaged(*which):
    """Parameters of a test: some of `DAMAGE`."""
    return pytest.mark.parametrize(("name", "damage"), [DAMAGE[number] for number in which])


class TestFinishedRunThatIsNotWhole:
    @pytest.fixture
    def run(self, name, damage, finished_mlp_run, tmp_path):
        """A copy of a finished run, with damage."""
        run = shutil.copytree(finished_mlp_run, tmp_path / finished_mlp_run.name)  # by which the model is called
        path = run / name
        content = path.read_bytes()
        path.unlink()
        if damage:
            path.write_bytes(damage(content))
        return run

    @pytest.mark.slow
    @damaged(0, 1, 5, 9, 12, 13)
    def test_its_end_is_done_again_from_the_last_checkpoint(self, name, damage, run, finished_mlp_run, caplog):
        result = train(tiny(run))
        assert left_behind(run) == left_behind(finished_mlp_run)
        assert yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] == 0
        assert "not whole" in caplog.text and result.train_images

    @damaged(*range(len(DAMAGE)))
    def test_without_a_checkpoint_it_is_refused_with_what_is_wrong(self, name, damage, run):
        shutil.rmtree(run / "checkpoints")
        before = left_behind(run)
        with pytest.raises(FileExistsError, match=r"finished run that is not whole, .* Put that back") as error:
            train(tiny(run))
        assert str(run / Path(name).parts[0]) in str(error.value) and left_behind(run) == before


@pytest.mark.slow
def test_finished_run_without_its_model_or_config_is_whole_again(finished_mlp_run, tmp_path):
    run = shutil.copytree(finished_mlp_run, tmp_path / finished_mlp_run.name)
    shutil.rmtree(run / "model")
    (run / "config.yaml").unlink()
    train(tiny(run))
    assert left_behind(run) == left_behind(finished_mlp_run)
    assert (run / "config.yaml").exists()


def test_finished_run_that_is_whole_stays_as_it_is_without_a_checkpoint_too(finished_mlp_run, tmp_path):
    shutil.copytree(finished_mlp_run, tmp_path / "run", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    assert train(tiny(tmp_path / "run")).train_images is None
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_model_is_evaluated_at_each_interval_but_the_last(tmp_path):
    """At the end of the run it is evaluated by `finish`."""
    evaluated = []

    def measure(model, progress):
        evaluated.append(progress["images_seen"])
        assert not model.training and not any(p.requires_grad for p in model.parameters())

    config = dataclasses.replace(tiny(tmp_path / "run"), evaluation=EvaluationConfig(every=75))
    fit_with(config, measure=measure)
    assert evaluated == [90, 150, 240]


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path):
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_images=0)
    fit(dataclasses.replace(tiny(tmp_path / "run", max_images=3000), optimizer=optimizer))
    losses = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert losses[-1] < 0.5 * losses[0]


def test_last_epoch_may_be_a_part(tmp_path):
    config = tiny(tmp_path / "run", max_images=300, log_every=10_000)
    fit(dataclasses.replace(config, data=dataclasses.replace(FEW, heldout_fraction=0.89)))
    assert [r["images_seen"] for r in records(tmp_path / "run", "epoch")] == [198, 318]


class TestExactness:
    @pytest.mark.slow
    def test_two_runs_are_the_same(self, tmp_path):
        for name in ("first", "second"):
            fit(tiny(tmp_path / name, TINY_VAE, checkpoint_every=150))
        assert left_behind(tmp_path / "first") == left_behind(tmp_path / "second")

    @pytest.mark.slow
    def test_evaluations_do_not_change_the_training(self, tmp_path):
        """Not even by what they draw at random."""

        def measure(model, progress):
            model(torch.randn(4, 1, 8, 8))
            np.random.standard_normal(3)

        config = tiny(tmp_path / "plain", TINY_VAE, max_images=120)
        fit(config)
        measured = dataclasses.replace(at(config, tmp_path / "measured"), evaluation=EvaluationConfig(every=30))
        fit_with(measured, measure=measure)
        for kind in ("model", "ema", "optimizer"):
            first, second = (tensors(tmp_path / name, 120, kind) for name in ("plain", "measured"))
            assert all(torch.equal(first[key], second[key]) for key in first)

    def test_a_step_has_the_learning_rate_of_its_beginning(self, tmp_path):
        config = tiny(tmp_path / "run", max_images=150, log_every=30)
        optimizer = dataclasses.replace(config.optimizer, warmup_images=60, schedule="cosine")
        fit(dataclasses.replace(config, optimizer=optimizer))
        rates = [record["learning_rate"] for record in records(tmp_path / "run", "train")]
        assert rates == [optimizer.learning_rate_at(images_seen, 150) for images_seen in (0, 30, 60, 90, 120)]

    def test_gradients_are_scaled_down_to_the_largest_norm(self, tmp_path):
        """Adam's first average after its first step is a tenth of the gradient."""
        norms = {}
        for limit in (None, 0.5):
            config = tiny(tmp_path / str(limit), max_images=30)
            fit(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_grad_norm=limit)))
            state = tensors(tmp_path / str(limit), 30, "optimizer")
            averages = [tensor for name, tensor in state.items() if name.startswith("exp_avg.")]
            norms[limit] = 10 * torch.nn.utils.get_total_norm(averages)
            (record,) = records(tmp_path / str(limit), "train")
            assert record["grad_norm"] == pytest.approx(float(norms[None]), rel=1e-5)  # as it was before
        assert norms[None] > 5 and norms[0.5] == pytest.approx(0.5, rel=1e-4)

    @pytest.mark.slow
    def test_another_seed_is_another_run(self, tmp_path):
        for seed in (0, 1):
            fit(tiny(tmp_path / str(seed), seed=seed))
        first, second = (tensors(tmp_path / str(seed), 300, "ema") for seed in (0, 1))
        assert not any(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.slow
    def test_accumulated_gradients_are_those_of_the_whole_batch(self, tmp_path, caplog):
        """A whole epoch, with an uneven last batch, of 17."""
        caplog.set_level("INFO")
        for steps in (1, 5):
            fit(tiny(tmp_path / str(steps), gradient_accumulation_steps=steps, max_images=1617, batch_size=40))
            assert f"{40 // steps} images per forward" in caplog.text
        whole, parts = (tensors(tmp_path / str(steps), 1617, "ema") for steps in (1, 5))
        for key in whole:
            torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("step", [AutoencoderStep, TextToImageStep])
    def test_advice_for_stability_names_no_setting_without_effect(self, step):
        """Adam divides by the size of the gradient, so that a lower limit of its norm changes nothing."""
        assert "optimizer.learning_rate" in step.advice and "max_grad_norm" not in step.advice

    def test_average_reaches_back_over_a_twentieth_of_the_steps(self, tmp_path):
        """The decay is step / (step + 20), with 0 at the first step, and at most run.ema_decay."""
        optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_images=0)
        config = tiny(tmp_path / "run", ema_decay=0.1, max_images=150, checkpoint_every=30, keep_checkpoints=9)
        fit(dataclasses.replace(config, optimizer=optimizer))
        weights = [tensors(tmp_path / "run", images_seen, "model") for images_seen in (30, 60, 90, 120, 150)]
        expected = weights[0]
        for decay, new in zip((1 / 21, 2 / 22, 0.1, 0.1), weights[1:], strict=True):
            expected = {key: decay * expected[key] + (1 - decay) * new[key] for key in new}
        for key, average in tensors(tmp_path / "run", 150, "ema").items():
            torch.testing.assert_close(average, expected[key], rtol=0, atol=1e-6)
        assert (weights[-1]["mean.weight"] - expected["mean.weight"]).abs().max() > 1e-4

    @pytest.mark.slow
    def test_images_read_on_demand_train_the_same(self, tmp_path, cifar_folder):
        data = DataConfig(name="folder", root=str(cifar_folder / "test" / "ship"), channels=3, resolution=(8, 16))
        for name, limit in (("memory", None), ("disk", 0)):
            fit(dataclasses.replace(tiny(tmp_path / name, TINY_VAE, max_images=90), data=data), memory_limit=limit)
        first, second = (tensors(tmp_path / name, 90, "model") for name in ("memory", "disk"))
        assert all(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.slow
    def test_deterministic_algorithms_are_used_when_asked_for(self, tmp_path):
        """And by this run alone."""
        enabled = []

        class Noting(AutoencoderStep):
            def begin(self, *arguments):
                enabled.append(torch.are_deterministic_algorithms_enabled())
                return super().begin(*arguments)

        for asked in (True, False):
            fit_with(tiny(tmp_path / str(asked), TINY_VAE, deterministic=asked, max_images=30), step=Noting)
        assert enabled == [True, False] and not torch.are_deterministic_algorithms_enabled()

    @pytest.mark.slow
    def test_bfloat16_autocast_keeps_float32_weights(self, tmp_path):
        """In a process that has had another precision before, too."""
        for precision in ("bf16", "no"):
            fit(tiny(tmp_path / precision, TINY_VAE, mixed_precision=precision))
            for kind in ("model", "ema", "optimizer"):
                assert {value.dtype for value in tensors(tmp_path / precision, 300, kind).values()} == {torch.float32}
            stated = yaml.safe_load((tmp_path / precision / "config.yaml").read_text())
            assert stated["run"]["mixed_precision"] == precision
        half, plain = (records(tmp_path / precision, "train")[-1]["loss"] for precision in ("bf16", "no"))
        assert half != plain and half == pytest.approx(plain, rel=0.05)


@pytest.fixture
def ships(cifar_folder, tmp_path):
    """Settings for a copy of real images, of which bad ones are skipped."""
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
    def test_step_that_is_not_finite_names_the_image_the_terms_and_the_dump(self, tmp_path):
        """And keeps the checkpoint before, from which the run goes on without that step when told to."""
        config = tiny(tmp_path / "run", TINY_VAE, max_images=180, checkpoint_every=30)
        config = dataclasses.replace(config, data=FEW)
        with pytest.raises(FloatingPointError) as error:
            fit_with(config, change=not_a_number)
        (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
        words = r"stopped before step (\d+), not finite: .*gradient, in 1 of 30 images: image 17\. "
        step = int(re.search(words, str(error.value))[1])
        assert step > 1 and f"step-{step:09d}" in dump.name and str(dump) in str(error.value)
        batch = load_file(dump)
        assert len(batch["indices"]) == 30 and batch["noise"].shape == (30, 4, 4, 4)
        (place,) = (batch["indices"] == 17).nonzero().flatten().tolist()
        assert batch["pixels"].isnan().flatten(1).any(1).nonzero().flatten().tolist() == [place]
        assert batch["distortion"].isnan().nonzero().flatten().tolist() == [place]
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest.name == f"images-{30 * (step - 1):012d}" and not damaged
        assert f"The newest checkpoint is {newest}" in str(error.value)

        fit_with(at(config, config.run.output_dir, on_nonfinite="skip"), change=not_a_number)
        (epoch,) = records(tmp_path / "run", "epoch")
        assert epoch["skipped"] == 1 and epoch["images_seen"] == 180 and math.isfinite(epoch["loss"])

    @pytest.mark.slow
    @pytest.mark.parametrize("target", [None, 1e6])
    def test_target_rate_that_was_missed_is_reported_at_the_end(self, target, tmp_path, caplog):
        config = tiny(tmp_path, max_images=30)
        objective = dataclasses.replace(config.objective, target_rate=target)
        config = dataclasses.replace(config, objective=objective)
        report = train(config).report
        assert report.target_rate == target == read_report(tmp_path / "evaluation.json").target_rate
        for text in (caplog.text, (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()):
            assert ("rate 1e+06 was not reached" in text.replace("\\", "")) == (target is not None)

    @pytest.mark.slow
    def test_skipped_steps_change_nothing_and_are_counted(self, tmp_path, caplog):
        config = tiny(
            tmp_path / "run", TINY_VAE, max_images=360, on_nonfinite="skip", log_every=30, checkpoint_every=1,
            keep_checkpoints=100,
        )  # fmt: skip
        fit_with(dataclasses.replace(config, data=FEW), change=not_a_number, finish=end)
        written = records(tmp_path / "run", "train")
        skips = [record.get("skipped", 0) for record in written]
        assert skips[0] == 0 and skips[-1] == 2 and sorted(skips) == skips
        empty = [record for record in written if record["loss"] is None]
        assert len(empty) == 2 and all(record["grad_norm"] is None for record in empty)
        assert caplog.text.count("skipped step") == 2 and "2 steps were skipped" in caplog.text
        for record in empty:
            for kind in ("model", "ema", "optimizer"):
                before, after = (tensors(tmp_path / "run", record["images_seen"] - back, kind) for back in (30, 0))
                assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(value.isfinite().all() for value in tensors(tmp_path / "run", 360, "model").values())

    def test_skipping_ends_when_nothing_else_happens(self, tmp_path):
        optimizer = OptimizerConfig(learning_rate=1e30, schedule="constant")
        config = tiny(tmp_path / "run", max_images=1500, on_nonfinite="skip", batch_size=10)
        with pytest.raises(FloatingPointError, match="before step 21, not finite"):
            train(dataclasses.replace(config, optimizer=optimizer))
        assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 10

    @pytest.mark.slow
    def test_skipping_goes_on_while_other_steps_succeed(self, tmp_path):
        """One in each of 22 epochs."""
        config = tiny(tmp_path / "run", max_images=None, epochs=22, on_nonfinite="skip")
        fit_with(dataclasses.replace(config, data=FEW), change=not_a_number, finish=end)
        assert records(tmp_path / "run", "epoch")[-1]["skipped"] == 22

    @pytest.mark.slow
    def test_a_full_disk_costs_nothing_that_was_saved(self, tmp_path, small_disk):
        """With room again, the same command ends as it would have without."""
        settings = {"max_images": 600, "checkpoint_every": 30, "keep_checkpoints": 100}
        config = tiny(small_disk / "run", **settings)
        with pytest.raises(OSError, match=f"cannot write {small_disk}/run/.*: .*No space left on device"):
            fit(config)
        saved, damaged = find_checkpoint(small_disk / "run" / "checkpoints")
        assert saved and not damaged
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        fit(config)
        fit(tiny(tmp_path / "run", **settings))
        assert left_behind(small_disk / "run") == left_behind(tmp_path / "run")

    @pytest.mark.slow
    def test_a_folder_that_cannot_be_written_to_is_named(self, small_disk):
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(OSError, match=f"cannot write {small_disk}/run: Read-only file system"):
            train(tiny(small_disk / "run"))

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])
    def test_images_that_cannot_be_read_are_left_out_and_listed(self, shared_data, tmp_path, limit, caplog):
        """Those that are held out, too, of which a set on demand knows when they are measured."""
        data = DataConfig(
            name="folder", root=str(shared_data / "awkward"), channels=3, resolution=(8, 16), on_bad_image="skip"
        )
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=4, epochs=2, max_images=None)
        config = dataclasses.replace(config, data=data)
        train(config, limit) if limit == 0 else fit_with(config, finish=end)
        listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
        names = {Path(line.split(": ")[0].removeprefix("cannot read the image ")).name for line in listed}
        expected = {"10ct_32bit_128.tiff", "decompression_bomb.gif", "zero_width.gif"}
        expected |= {"truncated_jpeg.jpg", "truncated_image.png"}
        assert names == expected and len(listed) == 5
        assert "5 files could not be read and were left out" in caplog.text

    def test_list_of_bad_images_goes_on_in_a_new_line_after_one_that_was_cut_off(self, tmp_path):
        path = tmp_path / "bad_images.txt"
        path.write_text("a.png: no image\nb.png: no im")
        for _ in range(2):
            BadImages(path).add(["a.png: no image", "b.png: no image", "b.png: no image"])
        assert path.read_text().splitlines() == ["a.png: no image", "b.png: no im", "b.png: no image"]

    @pytest.mark.slow
    def test_held_out_images_that_cannot_be_read_are_listed_too(self, ships, tmp_path):
        _, heldout = load_data(ships, memory_limit=0)
        paths_of(heldout)[4].write_bytes(paths_of(heldout)[4].read_bytes()[:700])
        config = dataclasses.replace(tiny(tmp_path / "run", TINY_VAE, max_images=30), data=ships)
        assert train(config, memory_limit=0).report.images == len(heldout) - 1
        assert str(paths_of(heldout)[4]) in (tmp_path / "run" / "bad_images.txt").read_text()
        for path in paths_of(heldout):
            path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(ValueError, match="no image to evaluate can be read"):
            train(at(config, tmp_path / "none"), memory_limit=0)

    @pytest.mark.slow
    def test_a_step_of_which_nothing_can_be_read_stops_the_run(self, ships, tmp_path):
        images, _ = load_data(ships, memory_limit=0)
        steps = epoch_batches(len(images), 2, 0, 0)
        (partly,), (fully,) = next(steps), next(steps)
        for index in (partly.indices[0], *fully.indices):
            paths_of(images)[index].write_bytes(paths_of(images)[index].read_bytes()[:700])
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=2, max_images=6, checkpoint_every=1)
        with pytest.raises(ValueError, match=r"no image of step 2 can be read\. .*bad_images\.txt lists them"):
            fit(dataclasses.replace(config, data=ships), memory_limit=0)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["images-000000000002"]
        assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == 3

    @pytest.mark.slow
    def test_too_many_images_that_cannot_be_read_stop_the_run(self, ships, tmp_path):
        images, _ = load_data(ships, memory_limit=0)
        for path in paths_of(images)[::4]:
            path.write_bytes(path.read_bytes()[:700])
        config = tiny(tmp_path / "run", TINY_VAE, batch_size=20, max_images=None, epochs=4, checkpoint_every=1)
        with pytest.raises(
            ValueError, match=r"at most 10% of the images .*, got \d+ of the 2\d\d read so far, .*\.png"
        ):
            fit(dataclasses.replace(config, data=ships), memory_limit=0)
        newest, damaged = find_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest and not damaged

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["renamed", "emptied", "archive"])
    @pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_run_whose_images_vanish_stops_and_continues_when_they_are_back(self, what, workers, ships, tmp_path):
        folder = Path(ships.root)
        root = tarred(folder, tmp_path / "images.tar") if what == "archive" else folder
        data = dataclasses.replace(ships, root=str(root), num_workers=workers)
        config = tiny(tmp_path / "run", batch_size=20, max_images=400, checkpoint_every=1, keep_checkpoints=100)
        config = dataclasses.replace(config, data=data)

        class Vanishing(AutoencoderStep):
            def begin(self, images_seen, total_images, learning_rate):
                if images_seen == 60:
                    root.rename(tmp_path / "gone")
                    if what == "emptied":  # as the folder in which a disk was mounted
                        root.mkdir()
                return super().begin(images_seen, total_images, learning_rate)

        with pytest.raises(OSError, match=r"cannot reach the image .* the same command continues"):
            fit_with(config, 0, Vanishing)
        assert not (tmp_path / "run" / "bad_images.txt").exists()
        if what == "emptied":
            root.rmdir()
        (tmp_path / "gone").rename(root)
        fit(config, memory_limit=0)
        fit(at(config, tmp_path / "uninterrupted"), memory_limit=0)
        assert left_behind(tmp_path / "run") == left_behind(tmp_path / "uninterrupted")

    @pytest.mark.slow
    def test_run_whose_images_are_deleted_in_part_ends_and_stays_finished(self, ships, tmp_path):
        class Deleting(AutoencoderStep):
            def begin(self, images_seen, total_images, learning_rate):
                if images_seen == 30:
                    for images in load_data(ships, memory_limit=0):
                        paths_of(images)[4].unlink()
                return super().begin(images_seen, total_images, learning_rate)

        config = dataclasses.replace(tiny(tmp_path / "run", max_images=200), data=ships)
        result = fit_with(config, 0, Deleting, finish=lambda run, *parts: finish_run(*parts))
        _, heldout = load_data(ships, memory_limit=0)
        assert result.report.images == len(heldout)
        assert train(config).report.images == len(heldout)
        assert len((tmp_path / "run" / "bad_images.txt").read_text().splitlines()) == 2

    @pytest.mark.slow
    def test_list_of_bad_images_does_not_grow_at_every_start(self, ships, tmp_path):
        images, _ = load_data(ships, memory_limit=0)
        paths_of(images)[4].write_bytes(b"no image")
        archive = tarred(Path(ships.root), tmp_path / "images.tar")
        for length in (30, 60, 90):
            config = tiny(tmp_path / "run", max_images=length, allow_config_change=True)
            fit(dataclasses.replace(config, data=dataclasses.replace(ships, root=str(archive))))
        (line,) = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
        assert line.endswith(".png: cannot identify image file")

    def test_the_share_of_bad_images_is_judged_by_all_that_were_read(self, tmp_path):
        """Where the last batch has none, too."""
        bad, good = (ReadImages(torch.zeros(0, 1, 8, 8), [], errors) for errors in (("a.png: no image",) * 30, ()))
        found = BadImages(tmp_path / "bad_images.txt")
        found.judge(bad, 180)
        with pytest.raises(ValueError, match=r"got 30 of the 212 read so far, a\.png: no image among them"):
            found.judge(good, 32)

    @pytest.mark.slow
    def test_a_run_may_begin_to_average_its_weights(self, tmp_path):
        fit(tiny(tmp_path / "run", ema_decay=None, max_images=60))
        fit(tiny(tmp_path / "run", ema_decay=0.9, max_images=120, allow_config_change=True))
        assert tensors(tmp_path / "run", 120, "ema").keys() <= tensors(tmp_path / "run", 120, "model").keys()

    @pytest.mark.slow
    @pytest.mark.parametrize("log_every", [30, 1000])
    def test_metrics_that_are_deleted_are_written_again(self, log_every, tmp_path, caplog):
        class Deleting(AutoencoderStep):
            def begin(self, images_seen, total_images, learning_rate):
                if images_seen in (60, 210):
                    Path(self.config.run.output_dir, "metrics.jsonl").unlink()
                return super().begin(images_seen, total_images, learning_rate)

        config = tiny(tmp_path / "run", log_every=log_every, checkpoint_every=90, keep_checkpoints=100)
        fit_with(config, step=Deleting)
        assert caplog.text.count("metrics.jsonl was deleted during the run; it is written again") == 2
        fit(at(config, tmp_path / "undisturbed"))
        assert left_behind(tmp_path / "run") == left_behind(tmp_path / "undisturbed")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's thread
    @pytest.mark.parametrize("trouble", ["a file in its place", "deleted", "full disk"])
    def test_tracker_that_fails_does_not_end_the_run(self, trouble, tmp_path, caplog, request):
        folder = tmp_path / "run" / "tensorboard"
        disk = request.getfixturevalue("small_disk") if trouble == "full disk" else None

        class Troubled(AutoencoderStep):
            def __init__(self, config, *arguments):
                folder.parent.mkdir(exist_ok=True)
                if disk:
                    folder.symlink_to(disk)
                elif trouble != "deleted":
                    folder.write_text("mine")
                super().__init__(config, *arguments)

            def begin(self, images_seen, total_images, learning_rate):
                if images_seen == 150 and disk:
                    with suppress(OSError), (disk / "much").open("wb") as file:
                        file.write(bytes(2**20))
                elif images_seen == 150 and trouble == "deleted":
                    shutil.rmtree(folder)
                return super().begin(images_seen, total_images, learning_rate)

        config = tiny(tmp_path / "run", batch_size=10, log_every=10, tracker="tensorboard")
        fit_with(config, step=Troubled)
        assert caplog.text.count("the tracker tensorboard failed and logs nothing from now on") == 1
        assert len(records(tmp_path / "run", "train")) == 30
        assert find_checkpoint(tmp_path / "run" / "checkpoints")[0].name == "images-000000000300"

    @pytest.mark.slow
    def test_workers_end_when_a_run_fails(self, tmp_path):
        """They ignore the signal by which Python would end them, so that a step can be finished. As long as the error
        is kept, so is, by its traceback, what reads.
        """

        class Unreadable(ArrayImages):
            def read(self, batch):
                raise MemoryError("none left")

        def failing(data):
            return dataclasses.replace(data, train_set=Unreadable(data.train_set.pixels), workers=2)

        before = set(multiprocessing.active_children())
        with pytest.raises(MemoryError, match="none left") as error:
            fit_with(tiny(tmp_path / "run"), change=failing)
        left = set(multiprocessing.active_children()) - before
        for worker in left:  # or the tests would never end
            worker.kill()
        assert error.traceback and not left

    @pytest.mark.slow
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

    def test_batch_size_that_cannot_be_divided_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"run\.batch_size must be divisible by .* 4, got 30"):
            train(tiny(tmp_path / "run", gradient_accumulation_steps=4))
        assert not (tmp_path / "run").exists()

    def test_settings_that_the_run_never_reaches_are_warned_of_before_its_first_step(self, tmp_path, caplog):
        config = tiny(tmp_path / "run", max_images=60, checkpoint_every=30)
        objective = dataclasses.replace(config.objective, kl_schedule="linear", kl_warmup_images=90)
        optimizer = OptimizerConfig(warmup_images=90)
        fit(dataclasses.replace(config, objective=objective, optimizer=optimizer))
        warned = [record.getMessage() for record in caplog.records if "of the run, got" in record.getMessage()]
        assert [text.split(" ", 1)[0] for text in warned] == ["optimizer.warmup_images", "objective.kl_warmup_images"]

    def test_dry_run_judges_by_the_length_of_the_run(self, tmp_path, caplog):
        config = tiny(tmp_path / "run", max_images=300)
        dry_run(dataclasses.replace(config, optimizer=OptimizerConfig(warmup_images=301)))
        assert "optimizer.warmup_images must not exceed the 300 images of the run, got 301" in caplog.text
        assert caplog.text.count("of the run, got") == 1

    def test_dry_run_notices_a_run_that_cannot_be_repeated(self, tmp_path):
        class Careless(AutoencoderStep):
            """Samples on from wherever it is, whatever step that is for."""

            shared = torch.Generator().manual_seed(0)

            def random_inputs(self, count, generator):
                return super().random_inputs(count, self.shared)

        config = tiny(tmp_path / "run")

        def careless(folder, finish):
            return fit_with(few(config, folder), 0, Careless, finish=end if finish else None)

        assert not try_out(config.run, lambda: None, careless)[1]

    def test_run_may_end_with_its_last_checkpoint(self, tmp_path):
        assert train(tiny(tmp_path / "run"), finish=False) is None
        saved = {path.name for path in (tmp_path / "run").iterdir()}
        assert "checkpoints" in saved and not saved & {"model", "evaluation.json", "report.html"}

    @pytest.mark.slow
    def test_dry_run_of_less_than_a_batch_resumes_too(self, tmp_path, caplog):
        caplog.set_level("INFO")
        config = tiny(tmp_path / "run", batch_size=4000, epochs=1, max_images=None)
        _, same, seconds = dry_run(config)
        assert same and seconds > 0 and caplog.text.count("continuing from") == 1
        assert not (tmp_path / "run").exists()

    def test_dry_run_refuses_what_the_run_would_refuse(self, vae_run):
        config, _ = vae_run
        with pytest.raises(FileExistsError, match=r"run\.seed: 0 -> 1"):
            dry_run(at(config, config.run.output_dir, seed=1))
        run = dataclasses.replace(config.run, allow_config_change=True, mixed_precision=None)
        other = dataclasses.replace(config, run=run, model=dataclasses.replace(TINY_VAE, block_out_channels=(8, 16)))
        with pytest.raises(ValueError, match="is of another model"):
            dry_run(other)

    @pytest.mark.slow
    def test_dry_run_leaves_nothing_in_the_folder_of_the_run(self, vae_run):
        config, finished = vae_run
        before = left_behind(config.run.output_dir)
        run = dataclasses.replace(config.run, mixed_precision=None)  # as the preset has it
        result, same, seconds = dry_run(dataclasses.replace(config, run=run))
        assert result.latent_shape == (4, 4, 4) and result.memory > 0
        assert same and seconds == pytest.approx(300 / result.images_per_second)
        assert result.parameters == finished.parameters and not result.output_dir.exists()
        assert left_behind(config.run.output_dir) == before


@pytest.mark.slow
class TestScript:
    def test_run_prints_where_everything_is(self, tmp_path, cifar_folder):
        """RGB, not square, from a folder."""
        config = tmp_path / "a.yaml"
        config.write_text(
            "data: {name: folder, channels: 3, resolution: [16, 24], fit: pad}\n"
            "model: {block_out_channels: [8, 8], norm_num_groups: 4}\n"
            "run: {tracker: null, max_images: 96}\n"
        )
        folder, output_dir = cifar_folder / "test" / "frog", tmp_path / "run"
        settings = ["--config", config, "--data.root", folder, "--run.output_dir", output_dir]
        launch = Launch(partial(command, "train", *settings), tmp_path / "log")
        assert launch.wait() == [0], launch.output()
        printed = launch.output()
        for path in ("pictures", "evaluation.json", "model"):
            assert str(output_dir / path) in printed
        assert "latents 4x8x12" in printed and "AutoencoderKL.from_pretrained" in printed
        assert "img/s" in printed and "loss" in printed and "epoch 1:" in printed

    def test_errors_are_for_people(self, tmp_path, capsys):
        (tmp_path / "config.yaml").write_text("run: {seed: 7}")
        assert cli.main(["train", "--run.output_dir", str(tmp_path)]) == 1
        printed = capsys.readouterr().err
        assert f"error: run.output_dir holds a run with other settings: {tmp_path}" in printed
        assert "run.seed: 7 -> 0" in printed and "run.allow_config_change" in printed
        assert "Traceback" not in printed

    def test_dry_run_of_the_default(self, tmp_path, capsys):
        repeats = ["--run.deterministic", str(DETERMINISTIC).lower()]
        assert cli.main(["train", "--dry_run", "--run.output_dir", str(tmp_path / "run"), *repeats]) == 0
        printed = capsys.readouterr().out
        for word in ("681,241 parameters", "latents 4x8x8", "MiB", "bit-identical", " min\n", "nothing was kept"):
            assert word in printed
        assert "NOT bit-identical" not in printed and not (tmp_path / "run").exists()

    def test_two_processes_count_every_image_once(self, tmp_path):
        config = tiny(tmp_path / "1", TINY_VAE, max_images=None, epochs=1, batch_size=50, ema_decay=None)
        config = dataclasses.replace(config, data=FEW)
        for processes in (1, 2):
            output_dir = tmp_path / str(processes)
            log = tmp_path / f"log of {processes}"
            printed = run_forked(fit, at(config, output_dir), log=log, processes=processes)
            assert printed.count("epoch 1:") == 1
        one, two = (records(tmp_path / str(processes), "epoch")[0] for processes in (1, 2))
        assert one["images_seen"] == two["images_seen"] == 180
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_run_states_the_channels_of_its_images_and_goes_on_with_them(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(12):
        Image.effect_noise((8, 8), 50 + index).convert("RGB").save(photos / f"{index}.png")
    config = dataclasses.replace(
        tiny(tmp_path / "run", max_images=30, batch_size=10), data=DataConfig(root=str(photos), resolution=8)
    )
    fit(config)
    stated = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert (stated["name"], stated["channels"]) == ("folder", 3)
    fit(config)
    assert dry_run(config)[1]  # which goes on from its own checkpoint
