"""Text-to-image training on the latents of an autoencoder, and the stock pipeline that comes of it."""

import dataclasses
import json
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from support.launches import Launch, run_forked
from support.models import same
from support.runs import DETERMINISTIC, at, left_behind, records, tensors
from support.stock import run_without_package
from transformers import CLIPTextModel

from diffusers_vae import MLPVAE, VAE, cli
from diffusers_vae.data import ArrayImages, DataConfig, load_data
from diffusers_vae.engine.config import OptimizerConfig, RunConfig
from diffusers_vae.images.ranges import ValueRange, to_model_range
from diffusers_vae.latents import dataset
from diffusers_vae.latents.encode import encode_images
from diffusers_vae.losses.diffusion import DiffusionConfig
from diffusers_vae.tasks.captions import DIGIT_PHRASES, Captions, captions_of
from diffusers_vae.tasks.text_to_image import SCHEDULERS, dry_run, stock_pipeline, train
from diffusers_vae.tasks.text_to_image_config import (
    AutoencoderConfig,
    CaptionConfig,
    DenoiserConfig,
    LatentsConfig,
    SamplingConfig,
    TextToImageConfig,
)
from diffusers_vae.tasks.text_to_image_data import load_run_data
from diffusers_vae.tasks.text_to_image_step import TextToImageStep, build_model

DATA = DataConfig(resolution=8, heldout_fraction=0.78)
IMAGES = 395  # to train on: six batches of 60 and one of 35
STOCK = {"diffusers", "transformers"}
FIRST = {"ddim": 961, "pndm": 961, "dpm-solver": 999}  # of 25 timesteps


@pytest.fixture
def vae(finished_vae_run):
    """The folder of a run of an autoencoder, read-only."""
    return finished_vae_run


def tiny(output_dir, vae, **run):
    settings = {"max_images": 300, "batch_size": 30, "log_every": 90, "tracker": None, "epochs": 3}
    run = settings | {"deterministic": DETERMINISTIC} | run
    return TextToImageConfig(
        data=DATA,
        vae=AutoencoderConfig(source=str(vae)),
        model=DenoiserConfig((8, 16), norm_num_groups=4, text_width=16, text_layers=1),
        run=RunConfig(output_dir=str(output_dir), **run),
        sampling=SamplingConfig(steps=2, seeds=2, guidance=(1.0, 3.0), heldout_images=40),
    )


@pytest.fixture(scope="session")
def finished(finished_vae_run, tmp_path_factory):
    """A run over two epochs whose checkpoints were all kept, and its result; read-only."""
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    config = tiny(
        tmp_path_factory.mktemp("t2i") / "run", finished_vae_run, max_images=900, batch_size=60,
        gradient_accumulation_steps=2, checkpoint_every=150, keep_checkpoints=100,
    )  # fmt: skip
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_images=100))
    return config, train(config)


END, IN_THE_SECOND_EPOCH = 910, 455  # images seen at checkpoints of the finished run


def trained(config):
    """The last checkpoint's images, of a run that trains, without a pipeline or an evaluation."""
    assert train(config, finish=False) is None
    return max(int(path.name.removeprefix("images-")) for path in checkpoints(config.run.output_dir))


def loaded(config, max_images=None):
    """The step of a run with its data, encoded."""
    accelerator = Accelerator(cpu=True)
    data = load_run_data(config, accelerator, max_images)
    return TextToImageStep(data.config, data, accelerator)


def checkpoints(output_dir):
    return list((Path(output_dir) / "checkpoints").iterdir())


def copied(run, to, images_seen=None):
    """The finished run elsewhere, or as it was after the checkpoint at `images_seen`."""
    shutil.copytree(run, to)
    if images_seen is not None:
        for path in checkpoints(to):
            if int(path.name.removeprefix("images-")) > images_seen:
                shutil.rmtree(path)
        (to / "evaluation.json").unlink()
        shutil.rmtree(to / "pipeline")
    return to


def captioned(folder, count=60):
    """A folder of digits with a caption in a file beside each."""
    images, _ = load_data(DATA)
    folder.mkdir()
    for index in range(count):
        Image.fromarray(images.pixels[index, 0].numpy()).save(folder / f"{index}.png")
        text = f"number {int(images.labels[index])}\nwritten by hand as {index}\n"
        (folder / f"{index}.txt").write_text(text)
    return DataConfig(name="folder", root=str(folder), resolution=8)


@pytest.mark.slow
class TestRun:
    def test_leaves_a_stock_pipeline(self, finished):
        _, result = finished
        index = json.loads((result.output_dir / "pipeline" / "model_index.json").read_text())
        parts = {name: value for name, value in index.items() if isinstance(value, list)}
        assert {library for library, name in parts.values() if name} <= STOCK
        files = {path.name for path in (result.output_dir / "pipeline" / "tokenizer").iterdir()}
        assert {"vocab.json", "merges.txt"} <= files  # for transformers 4, which does not read tokenizer.json
        weights = load_file(result.output_dir / "pipeline" / "text_encoder" / "model.safetensors")
        assert all(name.startswith("text_model.") for name in weights)  # likewise: others would stay random
        encoder, loading = CLIPTextModel.from_pretrained(
            result.output_dir / "pipeline" / "text_encoder", output_loading_info=True
        )
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        averages = load_file(max((result.output_dir / "checkpoints").iterdir()) / "ema.safetensors")
        own = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
        trained = {name.removeprefix("text_encoder.").removeprefix("text_model."): value
                   for name, value in averages.items() if name.startswith("text_encoder.")}  # fmt: skip
        assert own.keys() == trained.keys() and all(torch.equal(own[name], trained[name]) for name in own)
        assert parts["vae"] == ["diffusers", "AutoencoderKL"] and parts["unet"][1] == "UNet2DConditionModel"
        names = {}
        exec(result.load_line, names)
        pictures = names["pipeline"](["a handwritten seven", "1"], num_inference_steps=2).images
        assert type(names["pipeline"]) is StableDiffusionPipeline and [p.size for p in pictures] == [(8, 8)] * 2

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_samplers_know_the_noise_of_the_training(self, name, finished):
        """Sampling begins with nearly all of the noise, and no sampler clips, in pipelines made from them too."""
        config, result = finished
        latents = LatentsConfig(folder=str(result.output_dir / "latents"))
        step = loaded(dataclasses.replace(config, latents=latents, sampling=SamplingConfig(scheduler=name)))
        scheduler = stock_pipeline(build_model(step.config, step.data), step.data).scheduler
        scheduler.set_timesteps(25)
        torch.testing.assert_close(scheduler.alphas_cumprod, step.objective.scheduler.alphas_cumprod)
        assert scheduler.timesteps[0] >= FIRST[name]
        assert not DDIMScheduler.from_config(scheduler.config).config.clip_sample
        assert PNDMScheduler.from_config(scheduler.config).config.skip_prk_steps

    def test_averaged_weights_are_saved_in_full_precision(self, finished):
        _, result = finished
        averages = load_file(max((result.output_dir / "checkpoints").iterdir()) / "ema.safetensors")
        unet = load_file(result.output_dir / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        assert unet and all(torch.equal(averages[f"unet.{name}"], value) for name, value in unet.items())
        assert {value.dtype for value in unet.values()} == {torch.float32}

    def test_pipeline_holds_the_given_autoencoder_unchanged(self, finished, vae):
        before, after = VAE.from_pretrained(vae / "model"), VAE.from_pretrained(finished[1].output_dir / "pipeline/vae")
        assert same(before.state_dict(), after.state_dict())
        assert before.config.scaling_factor == after.config.scaling_factor

    def test_run_leaves_pictures_and_figures(self, finished):
        _, result = finished
        width, height = Image.open(result.output_dir / "pictures" / "prompts.png").size
        assert width > 4 * 64 and height > 10 * 64  # two seeds at two scales, ten prompts
        assert Image.open(result.output_dir / "pictures" / "loss.png").size > (200, 200)
        evaluation = json.loads((result.output_dir / "evaluation.json").read_text())
        assert evaluation["heldout"]["error"] == result.heldout_error and evaluation["heldout"]["images"] == 40
        assert records(result.output_dir, "train")[-1]["images_seen"] == END  # the step that reaches 900 begins at 850

    def test_loss_falls(self, finished):
        losses = [record["error"] for record in records(finished[1].output_dir, "train")]
        assert losses[-1] < 0.9 * losses[0]

    def test_finished_run_started_again_returns_its_result(self, finished, tmp_path):
        config, result = finished
        output_dir = copied(result.output_dir, tmp_path / "run")
        again = train(at(config, output_dir))
        assert again.heldout_error == result.heldout_error and again.parameters == result.parameters

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("pipeline/unet/diffusion_pytorch_model.safetensors", b"x"),
            ("pipeline/text_encoder/model.safetensors", None),
            ("pipeline/vae/config.json", b"{"),
            ("pipeline/scheduler/scheduler_config.json", None),
            ("pipeline/model_index.json", b""),
            ("pipeline/tokenizer/merges.txt", None),
            ("pictures/prompts.png", b"\x89PNG"),
            ("evaluation.json", b"{}"),
            ("evaluation.json", b'{"heldout": {"error": "low"}}'),
        ],
    )
    def test_finished_run_that_is_not_whole_needs_a_checkpoint(self, name, content, finished, tmp_path):
        config, result = finished
        output_dir = copied(result.output_dir, tmp_path / "run")
        shutil.rmtree(output_dir / "checkpoints")
        (output_dir / name).unlink()
        if content is not None:
            (output_dir / name).write_bytes(content)
        with pytest.raises(FileExistsError, match=rf"finished run that is not whole, .*{output_dir / name}"):
            train(at(config, output_dir))

    def test_finished_run_whose_weights_were_changed_is_whole_again(self, finished, tmp_path):
        config, result = finished
        output_dir = copied(result.output_dir, tmp_path / "run")
        weights = output_dir / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        train(at(config, output_dir))
        assert left_behind(output_dir) == left_behind(result.output_dir)

    def test_dry_run_leaves_nothing(self, vae, tmp_path):
        result, same, seconds = dry_run(tiny(tmp_path / "run", vae, max_images=None))
        assert same and result.parameters > 0 and not (tmp_path / "run").exists()
        assert seconds * result.images_per_second == pytest.approx(3 * IMAGES)  # of all images, not of the few

    def test_dry_run_in_the_folder_of_the_run(self, finished, tmp_path):
        config, result = finished
        output_dir = copied(result.output_dir, tmp_path / "run", IN_THE_SECOND_EPOCH)
        before = left_behind(output_dir)
        assert dry_run(at(config, output_dir))[1]
        assert left_behind(output_dir) == before


@pytest.mark.slow
class TestInterrupted:
    def test_resumed_run_is_bit_identical(self, finished, tmp_path):
        """Resumed within the second epoch, and once more between the last step and the pipeline."""
        config, result = finished
        output_dir = copied(result.output_dir, tmp_path / "run", IN_THE_SECOND_EPOCH)
        config = at(config, output_dir)
        assert trained(config) == END and not (output_dir / "pipeline").exists()
        train(config)
        assert left_behind(output_dir) == left_behind(result.output_dir)
        for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
            first, second = (load_file(folder / "pipeline" / f"{part}.safetensors") for folder in (
                output_dir, result.output_dir))  # fmt: skip
            assert all(torch.equal(first[name], second[name]) for name in first)

    def test_killed_run_started_again_is_bit_identical(self, finished, tmp_path):
        """SIGKILL while latents are encoded, then while steps are taken."""
        config, result = finished
        output_dir = tmp_path / "killed"
        work = partial(train, at(config, output_dir))
        for number, wanted in enumerate((output_dir / "latents", output_dir / "checkpoints" / "images-000000000180")):
            launch = Launch(work, tmp_path / f"log-{number}")
            while not wanted.exists():
                assert launch.running, launch.output()
                time.sleep(0.002)
            launch.send(signal.SIGKILL)
            assert launch.wait() == [-signal.SIGKILL]
        assert not (output_dir / "evaluation.json").exists()
        run_forked(work, log=tmp_path / "log")
        assert left_behind(output_dir) == left_behind(result.output_dir)

    def test_moved_autoencoder_is_taken_and_another_is_refused(self, finished, tmp_path):
        """Its path may change; what counts are the weights."""
        config, result = finished
        moved = tmp_path / "moved"
        shutil.copytree(Path(config.vae.source) / "model", moved)
        output_dir = copied(result.output_dir, tmp_path / "run", IN_THE_SECOND_EPOCH)
        assert trained(dataclasses.replace(at(config, output_dir), vae=AutoencoderConfig(str(moved)))) == END
        other = VAE.from_pretrained(moved)
        with torch.no_grad():
            other.encoder.conv_out.bias.add_(1e-3)
        other.save_pretrained(tmp_path / "other")
        output_dir = copied(result.output_dir, tmp_path / "again", IN_THE_SECOND_EPOCH)
        changed = dataclasses.replace(at(config, output_dir), vae=AutoencoderConfig(str(tmp_path / "other")))
        with pytest.raises(ValueError, match="latents"):  # those in its folder are of the old one
            train(changed)
        changed = dataclasses.replace(changed, latents=LatentsConfig(folder=str(tmp_path / "latents")))
        with pytest.raises(FileExistsError, match="another autoencoder"):
            train(changed)

    def test_other_captions_and_another_kind_of_latents_are_refused(self, vae, tmp_path):
        data = captioned(tmp_path / "images")
        model = VAE.from_pretrained(vae / "model").eval()
        for name, dtype in (("first", torch.float32), ("second", torch.float16)):
            encode_images(model, load_data(data)[0], tmp_path / name, dtype=dtype)
        config = dataclasses.replace(tiny(tmp_path / "run", vae, max_images=60), data=data)
        config = dataclasses.replace(config, latents=LatentsConfig(folder=str(tmp_path / "first")))
        trained(config)
        with pytest.raises(FileExistsError, match="another kind of latents"):
            changed = dataclasses.replace(config, latents=LatentsConfig(folder=str(tmp_path / "second")))
            train(changed)
        (tmp_path / "images" / "7.txt").write_text("a number")
        with pytest.raises(FileExistsError, match="54 training images -> 54, others or changed"):
            train(config)

    def test_finished_run_of_another_autoencoder_is_refused(self, finished, tmp_path, caplog):
        """One that was trained again in its place, too; one that is gone is told of."""
        config, result = finished
        source = tmp_path / "vae"
        shutil.copytree(config.vae.source, source)
        output_dir = copied(result.output_dir, tmp_path / "run")
        config = dataclasses.replace(at(config, output_dir), vae=AutoencoderConfig(str(source)))
        assert train(config).heldout_error == result.heldout_error
        weights = source / "model" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        save_file({name: value * 1.01 for name, value in tensors.items()}, weights, {"format": "pt"})
        with pytest.raises(FileExistsError, match="finished run on the latents of another autoencoder"):
            train(config)
        shutil.rmtree(source)
        assert train(config).heldout_error == result.heldout_error
        assert "cannot be loaded, and may be another now" in caplog.text

    def test_folder_of_an_autoencoder_run_is_refused(self, vae, tmp_path):
        config = tiny(shutil.copytree(vae, tmp_path / "run"), vae, allow_config_change=True)
        with pytest.raises(FileExistsError, match=r"of something else, with the settings objective.*and not captions"):
            train(config)
        assert not (tmp_path / "run" / "latents").exists()

    def test_other_settings_are_refused(self, finished, tmp_path):
        config, result = finished
        output_dir = copied(result.output_dir, tmp_path / "run", IN_THE_SECOND_EPOCH)
        changed = dataclasses.replace(at(config, output_dir), diffusion=DiffusionConfig("v_prediction"))
        with pytest.raises(FileExistsError, match=r"diffusion\.prediction_type: epsilon -> v_prediction"):
            train(changed)


@pytest.mark.slow
def test_two_processes_train_as_one(vae, tmp_path):
    configs = [tiny(tmp_path / f"run-{n}", vae, checkpoint_every=30, keep_checkpoints=100) for n in (1, 2)]
    configs = [dataclasses.replace(config, optimizer=OptimizerConfig(max_grad_norm=None)) for config in configs]
    assert trained(configs[0]) == 300
    run_forked(trained, configs[1], log=tmp_path / "log", processes=2)
    first, second = (tensors(config.run.output_dir, 30, "optimizer") for config in configs)
    gradients = [name for name in first if name.startswith("exp_avg.") and not name.endswith("k_proj.bias")]
    assert len(gradients) > 50
    for name in gradients:
        assert (first[name] - second[name]).norm() <= 1e-5 * first[name].norm(), name
    first, second = (tensors(config.run.output_dir, 300, "model") for config in configs)
    for name in first:
        if not name.endswith("k_proj.bias"):  # to which a softmax is blind
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-4)


class TestLatents:
    def step(self, vae, tmp_path, kind=None, **latents):
        if kind:
            model, latents["folder"] = VAE.from_pretrained(vae / "model").eval(), str(tmp_path / kind)
            encode_images(model, load_data(DATA)[0], tmp_path / kind, kind=kind, compute_dtype=torch.float32)
        return loaded(dataclasses.replace(tiny(tmp_path / "run", vae), latents=LatentsConfig(**latents)))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["posterior", "mode"])
    def test_training_from_the_cache_equals_training_from_the_images(self, kind, vae, tmp_path):
        """Ten steps with the same noise, on latents from the disk and on latents that are encoded just then."""
        step = self.step(vae, tmp_path, kind)
        images, _ = load_data(DATA)
        encoder = VAE.from_pretrained(vae / "model").eval()

        class JustEncoded:
            kind, latent_shape = step.data.latents.kind, step.data.latents.latent_shape
            indices = step.data.latents.indices

            @torch.no_grad()
            def latents(self, indices, noise=None):
                posterior = encoder.encode(to_model_range(images.pixels[torch.tensor(indices)])).latent_dist
                return posterior.mean if noise is None else posterior.mean + posterior.std * noise

        losses, weights = {}, {}
        stored = step.data.train_set.latents
        for kind, source in (("stored", stored), ("encoded", JustEncoded())):
            step.data.train_set.latents = source
            torch.manual_seed(0)
            model, losses[kind] = build_model(step.config, step.data), []
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            for seed in range(10):
                generator = torch.Generator().manual_seed(seed)
                indices = torch.randperm(len(images), generator=generator)[:30].tolist()
                terms = step(model, step.batch(step.data.train_set.read(indices), step.random_inputs(30, generator)))
                terms.loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[kind].append(terms.loss.item())
            weights[kind] = model.state_dict()
        assert losses["stored"] == pytest.approx(losses["encoded"], rel=1e-5)
        for name, value in weights["stored"].items():
            torch.testing.assert_close(value, weights["encoded"][name], rtol=0, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["posterior", "mode"])
    def test_the_denoiser_sees_noised_scaled_latents(self, kind, vae, tmp_path):
        """Scaled draws from the posterior, or scaled means, of the images asked for, with the noise asked for."""
        step = self.step(vae, tmp_path, kind)
        draws, indices, seen = step.random_inputs(5, torch.Generator().manual_seed(0)), [7, 3, 390, 3, 11], []

        class Denoiser(torch.nn.Module):
            def forward(self, noisy_latents, timesteps, tokens):
                seen.append(noisy_latents)
                return torch.zeros_like(noisy_latents)

        terms = step(Denoiser(), step.batch(step.data.train_set.read(indices), draws))
        rows = [step.data.train_set.latents[index] for index in indices]
        latents = torch.stack([row["mean" if kind == "posterior" else "latents"] for row in rows])
        if kind == "posterior":
            latents = latents + torch.stack([row["logvar"] for row in rows]).mul(0.5).exp() * draws["posterior_noise"]
        scaled_latents = latents * VAE.from_pretrained(vae / "model").config.scaling_factor
        alphas = step.objective.scheduler.alphas_cumprod[draws["timesteps"]].view(-1, 1, 1, 1)
        torch.testing.assert_close(seen[0], alphas.sqrt() * scaled_latents + (1 - alphas).sqrt() * draws["noise"])
        torch.testing.assert_close(terms.per_image["error"], (draws["noise"] ** 2).mean((1, 2, 3)))

    @pytest.mark.slow
    def test_drawn_latents_differ_from_the_mean(self, vae, tmp_path):
        """A model that sees draws sees the posterior's variance."""
        step = self.step(vae, tmp_path)
        latents = step.data.train_set.latents
        drawn = latents.latents(range(IMAGES), torch.randn(IMAGES, *latents.latent_shape))
        assert (drawn - latents.latents(range(IMAGES))).std() > 0.01

    @pytest.mark.slow
    def test_scaled_latents_have_unit_scale(self, vae, tmp_path):
        """As the pipeline scales them: without the shift."""
        step = self.step(vae, tmp_path)
        latents = step.data.train_set.latents
        scaled = step.data.scaling.scale(
            latents.latents(range(len(latents)), torch.randn(len(latents), *latents.latent_shape))
        )
        factor = VAE.from_pretrained(vae / "model").config.scaling_factor
        torch.testing.assert_close(step.data.scaling.scale(torch.ones(1, 4, 4, 4)), torch.full((1, 4, 4, 4), factor))
        assert scaled.std() == pytest.approx(1, abs=0.05)

    def test_a_cache_that_was_made_before_is_used(self, vae, tmp_path):
        images, _ = load_data(DATA)
        model = VAE.from_pretrained(vae / "model").eval()
        before = encode_images(model, images, tmp_path / "latents").fingerprint
        stamp = (tmp_path / "latents" / "index.json").stat().st_mtime_ns
        step = self.step(vae, tmp_path, folder=str(tmp_path / "latents"))
        assert step.data.train_set.latents.fingerprint == before
        assert (tmp_path / "latents" / "index.json").stat().st_mtime_ns == stamp

    @pytest.mark.slow
    @pytest.mark.parametrize("at_once", [True, False])
    def test_a_flipped_bit_is_not_trained_on(self, at_once, vae, tmp_path, monkeypatch):
        """In latents of the run's own, too, which another start has encoded."""
        config = tiny(tmp_path / "run", vae, max_images=30)
        trained(config)
        path = tmp_path / "run" / "latents" / "shard-00000.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-4000] + bytes([content[-4000] ^ 4]) + content[-3999:])
        monkeypatch.setattr(dataset, "VERIFIED_AT_ONCE", 2**30 * at_once)
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors in .*/run/latents missing or not as written"):
            train(config)
        assert not (tmp_path / "run" / "pipeline").exists()

    @pytest.mark.slow
    def test_a_cache_of_another_kind_dtype_and_shard_size_is_used_too(self, vae, tmp_path):
        images, _ = load_data(DATA)
        model = VAE.from_pretrained(vae / "model").eval()
        settings = {"dtype": torch.float16, "shard_images": 100}
        encode_images(model, images, tmp_path / "mode", kind="mode", **settings)
        step = self.step(vae, tmp_path, folder=str(tmp_path / "mode"))
        assert step.data.train_set.latents.dtype == torch.float16
        encode_images(model, images.first(100), tmp_path / "few", data="few")
        with pytest.raises(ValueError, match="holds latents of other images: 100, few, where 395, training images of"):
            self.step(vae, tmp_path, folder=str(tmp_path / "few"))


class TestCaptions:
    def test_every_caption_of_an_image_is_chosen_alike(self):
        captions = Captions([("a", "b", "c"), ("a",), ("d", "b")])
        chance = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
        for index, texts in enumerate((("a", "b", "c"), ("a",), ("d", "b"))):
            rows = captions.choose([index] * len(chance), chance)
            counts = {
                captions.distinct[row]: int(count) for row, count in zip(*rows.unique(return_counts=True), strict=True)
            }
            assert counts.keys() == set(texts)
            assert all(abs(count / len(chance) - 1 / len(texts)) < 0.02 for count in counts.values())
        assert captions.distinct[captions.choose([0], torch.tensor([1.0]))] == "c"  # rounded up

    def test_labels_are_put_into_every_phrase(self):
        found = captions_of(None, torch.tensor([7, 0]), ("zero",) * 7 + ("seven",), None, digits=True)
        assert found[0][:2] == ("a handwritten seven", "the digit 7") and len(found[0]) == len(DIGIT_PHRASES)
        assert captions_of(None, torch.tensor([1]), ("cat", "dog"), None, False)[0][0] == "a picture of a dog"

    def test_own_captions_come_first(self):
        own = [("a ship",), ("a cat", "a small cat")]
        assert captions_of(own, torch.tensor([0, 1]), ("x", "y"), None, False) == own
        with pytest.raises(ValueError, match=r"captions\.phrases are for labels"):
            captions_of(own, None, None, ("a {name}",), False)
        with pytest.raises(ValueError, match=r"metadata\.jsonl"):
            captions_of(None, None, None, None, False)

    @pytest.mark.slow
    def test_dropped_captions_are_the_empty_prompt(self, vae, tmp_path):
        config = tiny(tmp_path / "run", vae)
        step = loaded(dataclasses.replace(config, diffusion=DiffusionConfig(caption_dropout=0.25)))
        seen = []

        class Denoiser(torch.nn.Module):
            def forward(self, noisy_latents, timesteps, tokens):
                seen.append(tokens)
                return noisy_latents

        draws = step.random_inputs(1600, torch.Generator().manual_seed(0))
        indices = [place % IMAGES for place in range(1600)][::-1]
        step(Denoiser(), step.batch(step.data.train_set.read(indices), draws))
        empty = (seen[0] == step.no_prompt).all(1)
        assert torch.equal(empty, draws["dropped"]) and 0.2 < empty.float().mean() < 0.3
        labels = step.data.train_set.latents.labels
        for place in (~empty).nonzero().flatten()[:50].tolist():
            text = step.data.tokenizer.decode(seen[0][place], skip_special_tokens=True).strip()
            number = int(labels[indices[place]])
            name = step.data.train_set.latents.classes[number]
            assert text in {phrase.format(name=name, number=number) for phrase in DIGIT_PHRASES}

    @pytest.mark.slow
    def test_tokens_are_those_of_the_pipeline(self, finished):
        """The stock pipeline's own encoding of a prompt, against the text encoder on the tokens of the training."""
        config, result = finished
        pipeline = DiffusionPipeline.from_pretrained(result.output_dir / "pipeline")
        prompt, negative = pipeline.encode_prompt("a handwritten seven", "cpu", 1, True)
        tokens = [pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids for text in (
            "a handwritten seven", "")]  # fmt: skip
        assert tokens[0].shape == (1, config.captions.max_length)
        for expected, ids in zip((prompt, negative), tokens, strict=True):
            torch.testing.assert_close(pipeline.text_encoder(ids)[0], expected)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"phrases": ()}, "one phrase at least"),
            ({"phrases": ("a digit",)}, "must hold {name} or {number}"),
            ({"phrases": ("a {nmae}",)}, "no other braces, got a {nmae}"),
            ({"max_length": 2}, r"captions\.max_length must be at least 3"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, named):
        with pytest.raises(ValueError, match=named):
            CaptionConfig(**settings)

    @pytest.mark.slow
    def test_captions_of_a_folder_are_those_of_its_files(self, vae, tmp_path):
        """Files beside the images say what they show; prompts of the grid are captions that were held out."""
        config = dataclasses.replace(tiny(tmp_path / "run", vae, max_images=60), data=captioned(tmp_path / "images"))
        data = loaded(config).data
        assert len(data.images) == 54
        assert all(re.fullmatch(r"number \d", prompt) for prompt in data.prompts) and 2 <= len(data.prompts) <= 6
        few = dataclasses.replace(at(config, tmp_path / "other"), captions=CaptionConfig(max_length=4))
        with pytest.raises(ValueError, match=r"captions\.max_length, start and end among them; got \d"):
            train(few)


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"vae": AutoencoderConfig("nowhere/to/be/found")}, "nowhere/to/be/found"),
            ({"data": dataclasses.replace(DATA, channels=3)}, "takes 1"),
            ({"data": dataclasses.replace(DATA, resolution=9)}, "divisible by"),
            ({"data": dataclasses.replace(DATA, resolution=12)}, "divisible by"),
            ({"model": DenoiserConfig((8, 8, 8, 8), norm_num_groups=4)}, "at least 16"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_is_written(self, changes, named, vae, tmp_path):
        config = dataclasses.replace(tiny(tmp_path / "run", vae), **changes)
        with pytest.raises((OSError, ValueError), match=named):
            train(config)
        assert [path.name for path in (tmp_path / "run").iterdir()] in ([], [".lock"])

    def test_images_of_another_value_range_are_refused(self, vae, tmp_path):
        shutil.copytree(vae / "model", tmp_path / "vae")
        ValueRange(0, 4095).save(tmp_path / "vae")
        with pytest.raises(ValueError, match=r"data\.value_range must be \[0, 4095\], with which .* got null"):
            train(tiny(tmp_path / "run", tmp_path / "vae"))

    @pytest.mark.slow
    def test_images_fitted_otherwise_than_for_the_autoencoder_are_warned_of(self, vae, tmp_path, caplog):
        config = tiny(tmp_path / "run", vae)
        for fit in ("crop", "pad"):
            data = dataclasses.replace(DATA, fit=fit)
            loaded(dataclasses.replace(at(config, tmp_path / fit), data=data), max_images=30)
            assert ("trained with data.fit crop, and this is data.fit pad" in caplog.text) == (fit == "pad")

    @pytest.mark.slow
    def test_held_out_captions_and_prompts_are_not_cut_silently(self, vae, tmp_path):
        config = tiny(tmp_path / "run", vae)
        long = SamplingConfig(prompts=("a nine " * 20,))
        with pytest.raises(ValueError, match=r"sampling\.prompts may have 16 tokens, .* got 42 in 'a nine a nine"):
            train(dataclasses.replace(config, sampling=long))

    def test_latents_of_an_mlp_are_refused(self, tmp_path):
        MLPVAE(image_size=8, hidden_dim=8, latent_dim=2).save_pretrained(tmp_path / "mlp")
        with pytest.raises(ValueError, match="takes an AutoencoderKL, got MLPVAE"):
            train(tiny(tmp_path / "run", tmp_path / "mlp"))

    @pytest.mark.parametrize(
        ("make", "named"),
        [
            (lambda: DenoiserConfig((8, 12), norm_num_groups=8), "divisible by model.norm_num_groups, got 12 and 8"),
            (lambda: DenoiserConfig(text_width=10), "model.text_width must be divisible by 8, got 10"),
            (lambda: DenoiserConfig(text_layers=0), "model.text_layers must be at least 1"),
            (lambda: SamplingConfig(guidance=(0.5,)), "sampling.guidance must be at least 1"),
            (lambda: SamplingConfig(prompts=()), "sampling.prompts must hold one prompt"),
            (lambda: SamplingConfig(steps=0), "sampling.steps must be in .1, 1000., got 0"),
            (lambda: SamplingConfig(steps=1001), "sampling.steps must be in .1, 1000., got 1001"),
        ],
    )
    def test_wrong_settings_are_named(self, make, named):
        with pytest.raises(ValueError, match=named):
            make()

    def test_wrong_key_on_the_command_line(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train-text-to-image", "--diffusion.gamma", "5"])
        assert stopped.value.code == 2 and "diffusion.gamma" in capsys.readouterr().err

    @pytest.mark.slow
    def test_vae_is_short_for_its_source(self, tmp_path, capsys):
        flags = [f"--vae={tmp_path / 'missing'}", "--run.output_dir", str(tmp_path / "run")]
        assert cli.main(["train-text-to-image", *flags]) == 1
        assert str(tmp_path / "missing") in capsys.readouterr().err


@pytest.mark.slow
def test_stock_diffusers_runs_it_without_the_package(finished, tmp_path):
    """Text, image to image, automatic pipelines, other schedulers, slicing, tiling, half precision, saved again."""
    shutil.copytree(finished[1].output_dir / "pipeline", tmp_path / "pipeline")
    run_without_package(
        "import torch, numpy as np\n"
        "import diffusers\n"
        "from diffusers import AutoPipelineForText2Image, DiffusionPipeline\n"
        "from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline\n"
        "few = {'num_inference_steps': 2, 'output_type': 'np'}\n"
        "def seed(): return {'generator': torch.Generator().manual_seed(0)}\n"
        "pipeline = DiffusionPipeline.from_pretrained('pipeline')\n"
        "first = pipeline('a handwritten seven', **few, **seed()).images\n"
        "assert type(pipeline) is StableDiffusionPipeline and first.shape == (1, 8, 8, 1) and first.std() > 0\n"
        "automatic = AutoPipelineForText2Image.from_pretrained('pipeline')\n"
        "assert (automatic('a handwritten seven', **few, **seed()).images == first).all()\n"
        "other = StableDiffusionImg2ImgPipeline.from_pretrained('pipeline')\n"
        "def changed(strength):\n"  # by the image, at the same noise
        "    made = [other('the digit 1', torch.full((1, 1, 8, 8), grey), strength, num_inference_steps=10,\n"
        "            output_type='np', **seed()).images for grey in (0.0, 1.0)]\n"
        "    return np.abs(made[0] - made[1]).mean()\n"
        "assert changed(0.1) > 2 * changed(1.0)\n"
        "for name in ('DDIM', 'PNDM', 'DPMSolverMultistep', 'EulerDiscrete', 'DDPM'):\n"
        "    kind = getattr(diffusers, name + 'Scheduler')\n"
        "    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)\n"
        "    assert np.isfinite(pipeline(['a seven', '3'], **few, guidance_scale=3.0, **seed()).images).all()\n"
        "pipeline.vae.enable_slicing(); pipeline.vae.enable_tiling()\n"
        "assert pipeline(['a seven', '3'], height=16, width=24, **few).images.shape == (2, 16, 24, 1)\n"
        "for dtype in (torch.bfloat16, torch.float16):\n"
        "    half = DiffusionPipeline.from_pretrained('pipeline', torch_dtype=dtype)\n"
        "    assert half.unet.dtype == dtype and np.isfinite(half('a seven', **few, **seed()).images).all()\n"
        "automatic.save_pretrained('again')\n"
        "again = DiffusionPipeline.from_pretrained('again')\n"
        "assert (again('a handwritten seven', **few, **seed()).images == first).all()\n",
        tmp_path,
    )


def test_arrays_without_labels_cannot_be_described():
    images = ArrayImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="needs captions or labels of the training images"):
        captions_of(images.captions, images.labels, images.classes, None, False)
