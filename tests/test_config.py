"""From YAML and flags to settings, and the errors on the way."""

import json
import math
import re
import tarfile
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from docstring_parser import parse_from_object
from PIL import Image

from diffusers_vae.cli.parser import TRAININGS, parse_settings, training_parser
from diffusers_vae.data import DataConfig
from diffusers_vae.engine.config import OptimizerConfig, RunConfig
from diffusers_vae.latents.dataset import LatentDataset
from diffusers_vae.losses.adversarial import BETAS, AdversarialConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import train
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.text_to_image_config import AutoencoderConfig, LatentsConfig

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "training" / "configs").glob("*.yaml"))

TRAIN = TRAININGS["train"]
TEXT_TO_IMAGE = TRAININGS["train-text-to-image"]


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small stand-in for the published autoencoders, alone and in the subfolder of a pipeline."""
    folder = tmp_path_factory.mktemp("pretrained")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    stock = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, scaling_factor=0.13025, **blocks)
    stock.save_pretrained(folder)
    stock.save_pretrained(folder / "vae")
    return str(folder)


def read_preset(preset, pretrained, *flags):
    """Its settings; what it would fine-tune cannot be downloaded here."""
    training = TEXT_TO_IMAGE if preset.stem.endswith("-t2i") else TRAIN
    source = ["--model.pretrained", pretrained] if "  pretrained:" in preset.read_text() else []
    return parse_settings(training, ["--config", str(preset), *source, *flags])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
class TestPresets:
    def test_parses_writes_to_its_own_folder_and_reaches_all_that_it_sets(self, preset, pretrained):
        config, dry = read_preset(preset, pretrained)
        assert config.run.output_dir == f"runs/{preset.stem}" and not dry
        images = {"digits": 1617, "folder": 20_000}.get(config.data.name, 60_000)
        assert config.unreached(config.run.total_images(images)) == []

    def test_says_what_to_expect(self, preset):
        head = preset.read_text().split("\n\n")[0]
        for word in ("Purpose:", "Hardware:", "Time:", "Expect:"):
            assert word in head


class TestRecipes:
    """The presets with published recipes, against these in the words of their sources."""

    @staticmethod
    def read(name, pretrained, *flags):
        return read_preset(next(preset for preset in PRESETS if preset.stem == name), pretrained, *flags)[0]

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "power"), [("kl-f8", 1), ("eq-vae", 1), ("sdxl-decoder", 1), ("sd-ft-mse", 2)])
    def test_loss_is_that_of_latent_diffusion(self, name, power, pretrained):
        generator = torch.Generator().manual_seed(0)
        images, reconstructions = torch.rand(2, 3, 3, 8, 8, generator=generator) * 2 - 1
        posterior = DiagonalGaussianDistribution(torch.randn(3, 8, 2, 2, generator=generator))
        expected = (images - reconstructions).abs().pow(power).sum() / 3 + 0.000001 * posterior.kl().sum() / 3
        objective = self.read(name, pretrained).objective
        assert torch.allclose(objective.build()(images, reconstructions, posterior).loss, expected, rtol=1e-5)
        assert objective.perceptual == "vgg" and objective.perceptual_weight == (0.1 if power == 2 else 1.0)

    @pytest.mark.parametrize(
        ("name", "images_per_gpu", "gpus", "first_step"), [("kl-f8", 12, 1, 50001), ("eq-vae", 10, 8, 0)]
    )
    def test_units_are_those_of_a_step(self, name, images_per_gpu, gpus, first_step, pretrained):
        config = self.read(name, pretrained)
        images = images_per_gpu * 2 * gpus
        assert config.run.batch_size == images and config.optimizer.learning_rate == pytest.approx(4.5e-6 * images)
        assert config.adversarial.start_images == first_step * images and config.adversarial.weight == 0.5
        assert config.optimizer.betas == BETAS
        assert config.adversarial.max_factor == 1e4
        # one transformation per forward of the published launch
        assert name == "kl-f8" or config.objective.transformations == images / images_per_gpu

    def test_kl_f8_is_stable_diffusions_autoencoder(self, pretrained):
        with torch.device("meta"):
            parameters = self.read("kl-f8", pretrained).model.build(3, (256, 256)).num_parameters()
        assert parameters == 83_653_863  # of CompVis/stable-diffusion-v1-4

    @pytest.mark.parametrize("name", ["kl-f8", "eq-vae", "sd-ft-mse", "sdxl-decoder", "flux-16ch"])
    def test_deviations_are_listed(self, name):
        (preset,) = (preset for preset in PRESETS if preset.stem == name)
        assert "# Differs:" in preset.read_text().split("\n\n")[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["sd-ft-mse", "sdxl-decoder", "flux-16ch"])
    def test_decoders_leave_latents_as_they_are(self, name, pretrained):
        assert not self.read(name, pretrained).model.trains_encoder

    @pytest.mark.slow
    def test_recipe_runs_on_photographs(self, pretrained, shared_data, tmp_path):
        with tarfile.open(shared_data / "bsds500-val.tar") as archive:
            photographs = [member for member in archive.getmembers() if member.name.endswith(".jpg")][:12]
            archive.extractall(tmp_path / "photographs", photographs, filter="data")
        small = [
            f"--data.root={tmp_path / 'photographs'}", "--data.resolution=64", "--data.heldout_fraction=0.5",
            "--run.batch_size=4", "--run.max_images=12", "--optimizer.warmup_images=0",
            "--run.gradient_accumulation_steps=2", "--run.mixed_precision=no", "--objective.perceptual=null",
            "--adversarial.start_images=4", "--adversarial.width=8", "--run.tracker=null", "--evaluation.max_images=4",
            f"--run.output_dir={tmp_path / 'run'}",
        ]  # fmt: skip
        report = train(self.read("sdxl-decoder", pretrained, *small)).report
        assert report.fine_tuning.latents_unchanged and report.model.scaling_factor == 0.13025
        assert report.fine_tuning.differences["psnr"][0] != 0
        card, page = ((tmp_path / "run" / name).read_text() for name in ("README.md", "report.html"))
        for shown in (card, page):
            assert "Latents unchanged: existing diffusion models keep working." in shown
        assert "fine texture may look plausible" in card


def test_default_then_file_then_flag(tmp_path):
    file = write(tmp_path / "a.yaml", "objective: {kl_weight: 0.5, scale: 0.2}\nrun: {seed: 7}\n")
    config, dry = parse_settings(TRAIN, ["--config", file, "--objective.kl_weight", "0.1", "--dry_run"])
    assert (config.objective.kl_weight, config.objective.scale, config.run.seed) == (0.1, 0.2, 7)
    assert config.run.epochs == RunConfig().epochs and dry


def test_resolved_config_gives_the_same_run(tmp_path):
    arguments = ["--model.architecture", "mlp", "--data.resolution", "[8, 16]", "--optimizer.learning_rate", "3e-4"]
    config, _ = parse_settings(TRAIN, arguments)
    config.save(tmp_path / "config.yaml")
    assert parse_settings(TRAIN, ["--config", str(tmp_path / "config.yaml")])[0] == config
    stated = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stated["objective"]["scale"] == 0.05
    assert stated["model"]["hidden_dim"] == 400 and stated["model"]["latent_channels"] is None


def test_exponents_are_numbers(tmp_path):
    file = write(tmp_path / "a.yaml", "optimizer: {learning_rate: 1e-4}\n")
    assert parse_settings(TRAIN, ["--config", file])[0].optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("objective: {kl_wait: 3}", ["objective", "kl_wait"]),
        ("optimiser: {learning_rate: 3}", ["optimiser"]),
        ("optimizer: {learning_rate: fast}", ["optimizer.learning_rate", "fast"]),
        ("run: {epochs: 1.5}", ["run.epochs", "1.5"]),
        ("run: {mixed_precision: no}", ["run.mixed_precision", "quotes"]),
        ("data: {name: imagenet}", ["data.name", "imagenet", "cifar10"]),
        ("data: {channels: 4}", ["data.channels", "4"]),
        ("data: {resolution: 30}", ["data.resolution", "divisible by 4", "30x30"]),
        ("run: {batch_size: 0}", ["run.batch_size", "at least 1", "0"]),
        ("objective: {likelihood: bernoulli}", ["bernoulli", "mlp", "unbounded"]),
        ("objective: {likelihood: bernoulli, scale: 1.0}", ["objective.scale 1.0", "objective.likelihood bernoulli"]),
        ("run: 3", ["run"]),
        (
            "model: {architecture: mlp, layers_per_block: 2}",
            ["model.layers_per_block 2", "mlp", "model.architecture to vae"],
        ),
        ("model: {block_out_channels: [30, 60]}", ["model.block_out_channels", "divisible", "30"]),
        ("model: {latent_channels: 0}", ["model.latent_channels", "at least 1"]),
        ("run: [1, 2", ["a.yaml"]),
        ("data: {resolution: }", ["data.resolution must have a value, got null"]),
        ("optimizer: {learning_rate: null}", ["optimizer.learning_rate must have a value, got null"]),
    ],
)
def test_errors_name_the_key_and_the_value(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_settings(TRAIN, ["--config", write(tmp_path / "a.yaml", text)])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert all(word in message for word in [*words, "a.yaml"]), message


REMOVED = [
    (TRAIN, "adversarial.betas", "[0.5, 0.9]", "[0.9, 0.99]", "the discriminator's optimizer"),
    (TRAIN, "data.buckets", "null", "16", "train on data.crops, or on whole images at one data.resolution"),
    (TRAIN, "evaluation.fp16", "false", "true", "after the training, run diffusers-vae fp16 on it"),
    (TRAIN, "evaluation.projection", "pca", "tsne", "the picture of latents"),
    (TRAIN, "optimizer.weight_decay", "0.0", "0.01", "weights never decay"),
    (TRAIN, "run.compile", "null", "maybe", "set run.step to compiled or eager"),
    (TRAIN, "run.device_batch_size", "null", "auto", "set run.gradient_accumulation_steps instead"),
    (TEXT_TO_IMAGE, "data.buckets", "null", "16", "train on data.crops"),
    (TEXT_TO_IMAGE, "latents.batch_size", "64", "8", "the number of images per forward follows from their size"),
    (TEXT_TO_IMAGE, "latents.compute_dtype", "null", "float32", "run diffusers-vae encode --compute_dtype, and set"),
    (TEXT_TO_IMAGE, "latents.dtype", "float32", "float16", "run diffusers-vae encode --dtype, and set latents.folder"),
    (TEXT_TO_IMAGE, "latents.sample_posterior", "true", "false", "run diffusers-vae encode --kind mode"),
    (TEXT_TO_IMAGE, "model.text_heads", "4", "2", "the text encoder has 4 heads"),
    (TEXT_TO_IMAGE, "optimizer.weight_decay", "0.0", "0.01", "weights never decay"),
    (TEXT_TO_IMAGE, "run.device_batch_size", "null", "auto", "set run.gradient_accumulation_steps instead"),
    (TEXT_TO_IMAGE, "sampling.batch_size", "64", "8", "pictures are generated 64 at a time"),
]


@pytest.mark.parametrize(("compiled", "step"), [("true", "compiled"), ("false", "eager"), ("null", "auto")])
def test_config_that_says_whether_to_compile_is_read(compiled, step, tmp_path):
    file = write(tmp_path / "config.yaml", f"run: {{compile: {compiled}}}\n")
    config, _ = parse_settings(TRAIN, ["--config", file])
    assert config.run.step == step and "compile" not in config.plain()["run"]


@pytest.mark.parametrize(
    ("training", "setting", "default", "other", "advice"), REMOVED, ids=lambda value: getattr(value, "command", value)
)
class TestRemovedSettings:
    def test_old_default_is_ignored(self, training, setting, default, other, advice, tmp_path):
        section, name = setting.split(".")
        file = write(tmp_path / "config.yaml", f"{section}: {{{name}: {default}}}\n")
        config, _ = parse_settings(training, ["--config", file])
        assert config == parse_settings(training, [])[0] and name not in config.plain()[section]

    def test_other_value_is_an_error_that_says_what_to_use(
        self, training, setting, default, other, advice, tmp_path, capsys
    ):
        section, name = setting.split(".")
        file = write(tmp_path / "config.yaml", f"{section}: {{{name}: {other}}}\n")
        for arguments, where in ((["--config", file], f"{file}: "), ([f"--{setting}={other}"], "")):
            with pytest.raises(SystemExit):
                parse_settings(training, arguments)
            assert re.search(
                f"error: {re.escape(where + setting)} was removed, got .*: {advice}", capsys.readouterr().err
            )

    def test_help_does_not_list_it(self, training, setting, default, other, advice):
        assert setting not in training_parser(training).format_help()


class TestImages:
    """Which images a run is on."""

    @pytest.mark.parametrize("training", [TRAIN, TEXT_TO_IMAGE], ids=lambda training: training.command)
    def test_root_alone_is_what_lies_there(self, training, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
        np.save(tmp_path / "scans.npy", np.zeros((4, 8, 8), np.uint8))
        for root, name in (
            ("photos", "folder"), ("scans.npy", "array"), ("rows.parquet", "datasets"), ("ann/set", "datasets"),
        ):  # fmt: skip
            config, _ = parse_settings(training, ["--data.root", root])
            assert config.plain()["data"]["name"] == name and config.data.root == root

    def test_without_root_they_are_digits_and_torchvisions_lie_in_data(self, tmp_path):
        for arguments, name in (([], "digits"), (["--data.name", "mnist"], "mnist")):
            data = parse_settings(TRAIN, arguments)[0].plain()["data"]
            assert (data["name"], data["root"]) == (name, "data")

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"name": "digits", "root": "photos"}, "data.root photos would be ignored with data.name digits"),
            ({"channels": 3}, "data.channels 3 needs images that are named: give data.root"),
            ({"root": ""}, "data.root must name a folder, a file or a data set on the Hub, got an empty text"),
        ],
    )
    def test_root_of_a_set_that_has_none_and_colours_without_a_set_are_refused(self, settings, words):
        with pytest.raises(ValueError, match=words):
            DataConfig(**settings)

    @pytest.mark.parametrize(("suffix", "name"), [(".zip", "folder"), (".TAR", "folder"), (".npz", "array")])
    def test_missing_archives_and_arrays_are_no_sets_on_the_hub(self, suffix, name):
        assert DataConfig(root=f"photos/images{suffix}").name == name

    def test_pretrained_for_photographs_is_not_trained_on_digits(self, pretrained, capsys):
        with pytest.raises(SystemExit):
            parse_settings(TRAIN, ["--model.pretrained", pretrained])
        told = capsys.readouterr().err
        assert "takes images of 3 channels" in told and "--data.root FOLDER" in told


class TestIgnored:
    """Settings that others switch off."""

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (
                "--data.root scans --data.shuffle_buffer 9",
                "data.shuffle_buffer 9 .* data.streaming false: set data.str",
            ),
            (
                "--data.on_bad_image skip",
                "data.on_bad_image skip .* data.name digits: set data.name to folder or array",
            ),
            ("--data.name mnist --data.heldout_fraction 0.2", "data.heldout_fraction 0.2 .* data.name mnist"),
            ("--data.root scans --data.crops 2 --data.fit pad", "data.fit pad .* data.crops 2: leave out data.crops"),
            (
                "--adversarial.width 8 --adversarial.start_images 5",
                "adversarial.start_images 5, adversarial.width 8 .* adversarial.weight 0.0: set adversarial.weight, or "
                "keep the defaults, --adversarial.start_images 0 --adversarial.width 64",
            ),
            (
                "--adversarial.weight 1 --adversarial.adaptive false --adversarial.max_factor 2",
                "adversarial.max_factor 2.0 .* adversarial.adaptive false",
            ),
            ("--model.architecture mlp --model.latent_channels 4", "model.latent_channels 4 .* model.architecture mlp"),
            ("--model.hidden_dim 9", "model.hidden_dim 9 .* model.architecture vae: set model.architecture to mlp"),
            ("--model.train decoder", "model.train decoder .* model.pretrained null"),
            ("--objective.kl_cycles 2", "objective.kl_cycles 2 .* objective.kl_schedule constant: set .* to cyclical"),
            ("--data.root a/b --data.caption_column text", "data.caption_column text would be ignored"),
        ],
    )
    def test_is_an_error_that_names_both(self, flags, words, capsys):
        with pytest.raises(SystemExit):
            parse_settings(TRAIN, flags.split())
        assert re.search(words, capsys.readouterr().err)

    @pytest.mark.parametrize("training", [TRAIN, TEXT_TO_IMAGE], ids=lambda training: training.command)
    def test_of_text_to_image_too(self, training, capsys):
        with pytest.raises(SystemExit):
            parse_settings(training, ["--data.streaming", "true"])
        assert "data.streaming true would be ignored with data.name digits" in capsys.readouterr().err

    @pytest.mark.parametrize("training", [TRAIN, TEXT_TO_IMAGE], ids=lambda training: training.command)
    def test_defaults_that_a_config_of_an_older_version_states_are_none(self, training, tmp_path):
        config, _ = parse_settings(training, [])
        stated = {
            section: {option.name: None if option.default is MISSING else option.default for option in fields(kind)}
            for section, kind in get_type_hints(training.settings).items()
        }
        stated["data"] |= {"name": "digits", "root": "data", "channels": 1}
        for section in ("run", "optimizer"):  # whose defaults are not those of the section everywhere
            stated[section] = config.plain()[section]
        write(tmp_path / "config.yaml", yaml.safe_dump(json.loads(json.dumps(stated))))
        assert parse_settings(training, ["--config", str(tmp_path / "config.yaml")])[0] == config


class TestHome:
    """A ~ that no shell has replaced."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            (DataConfig, ["root"]), (RunConfig, ["output_dir"]), (ModelConfig, ["pretrained"]),
            (AutoencoderConfig, ["source"]), (LatentsConfig, ["folder"]),
        ],
    )  # fmt: skip
    def test_is_the_home_directory_in_settings(self, kind, names, home):
        config = kind(**dict.fromkeys(names, "~/here"))
        assert [getattr(config, name) for name in names] == [str(home / "here")] * len(names)

    def test_is_the_home_directory_in_files_and_flags(self, home):
        (home / "photos").mkdir()
        file = write(home / "a.yaml", "run: {output_dir: ~/runs/mine}\ndata: {root: ~/photos}\n")
        for arguments in (["--config", file], ["--run.output_dir=~/runs/mine", "--data", "~/photos"]):
            config, _ = parse_settings(TRAIN, arguments)
            assert config.run.output_dir == str(home / "runs/mine")
            assert (config.data.name, config.data.root) == ("folder", str(home / "photos"))

    def test_is_the_home_directory_in_python(self, home):
        with pytest.raises((OSError, ValueError), match=str(home / "latents")):
            LatentDataset("~/latents")


class TestForms:
    """Values as people write them."""

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("run.max_images", "1e4", 10_000), ("run.max_images", "2.5e3", 2500), ("run.epochs", "2.0", 2),
            ("run.checkpoint_every", "1E5", 100_000), ("data.resolution", "64x64", (64, 64)),
            ("data.resolution", "32,64", (32, 64)), ("data.resolution", "32 64", (32, 64)),
            ("data.resolution", "(32, 64)", (32, 64)), ("data.resolution", "[32, 64]", (32, 64)),
            ("data.resolution", "64", 64), ("model.block_out_channels", "8,16", (8, 16)),
            ("model.block_out_channels", "16", (16,)), ("optimizer.betas", "0.5,0.9", (0.5, 0.9)),
            ("evaluation.lpips", "alex,vgg", ("alex", "vgg")), ("optimizer.learning_rate", "1e-3", 1e-3),
        ],
    )  # fmt: skip
    def test_are_what_is_meant(self, name, text, value, tmp_path):
        section, _, key = name.partition(".")
        file = write(tmp_path / "a.yaml", f"{section}: {{{key}: '{text}'}}\n")
        for arguments in ([f"--{name}", text], [f"--{name}={text}"], ["--config", file]):
            config, _ = parse_settings(TRAIN, arguments)
            assert getattr(getattr(config, section), key) == value

    def test_range_of_values(self, tmp_path):
        config, _ = parse_settings(TRAIN, ["--data.root", str(tmp_path), "--data.value_range", "0,4095"])
        assert config.data.value_range == (0, 4095)

    @pytest.mark.parametrize("training", [TRAIN, TEXT_TO_IMAGE], ids=lambda training: training.command)
    @pytest.mark.parametrize("equals", [True, False])
    def test_data_names_the_images_for_training_too(self, training, equals, tmp_path):
        preset = write(tmp_path / "a.yaml", "data: {name: digits, resolution: 64}\n")
        data = [f"--data={tmp_path}"] if equals else ["--data", str(tmp_path)]
        config, _ = parse_settings(training, ["--config", preset, *data])
        assert (config.data.name, config.data.root, config.data.resolution) == ("folder", str(tmp_path), 64)
        assert parse_settings(training, ["--data", '{"resolution": 64}'])[0].data.resolution == 64

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (
                "--data.resolution big",
                "data.resolution must be a whole number or a list such as '[32, 64]', got big: for ",
            ),
            ("--data.resolution 64x64x64", "got [64, 64, 64]: for example, --data.resolution 32"),
            ("--run.epochs 1.5", "run.epochs must be a whole number, got 1.5: for example, --run.epochs 8"),
            ("--run.step maybe", "run.step must be auto, eager, compiled or graph, got maybe"),
            ("--objective.scale big", "objective.scale must be a number, learned, optimal or null, got big"),
            ("--evaluation.lpips alec", "evaluation.lpips must be a list such as '[alex]', got alec"),
            ("--data.name imagenet", "data.name must be digits, mnist, "),
        ],
    )
    def test_others_are_refused_without_types_of_python(self, flags, words, tmp_path, capsys):
        name, value = flags.split()
        section, key = name.removeprefix("--").split(".")
        file = write(tmp_path / "a.yaml", f"{section}: {{{key}: {value}}}\n")
        for arguments in ([name, value], ["--config", file]):
            with pytest.raises(SystemExit):
                parse_settings(TRAIN, arguments)
            told = capsys.readouterr().err
            assert words in told and not re.search("class|Union|Literal|typing|Parser key", told)


@pytest.mark.slow
def test_the_file_with_the_error_is_named_and_no_other(tmp_path, capsys):
    right, wrong = write(tmp_path / "a.yaml", "run: {epochs: 2}"), write(tmp_path / "b.yaml", "run: {epochs: two}")
    for arguments, files in (
        ([f"--config={right}", "--config", wrong], ["b.yaml"]),
        (["--config", right, "--run.epochs", "two"], []),
    ):
        with pytest.raises(SystemExit):
            parse_settings(TRAIN, arguments)
        message = capsys.readouterr().err
        assert [name for name in ("a.yaml", "b.yaml") if name in message] == files, message


@pytest.mark.parametrize("flag", ["--optimizer.learning_rat", "--nothing"])
def test_unknown_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse_settings(TRAIN, [flag, "1"])
    assert flag in capsys.readouterr().err


def test_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_settings(TRAIN, ["--config", "missing.yaml"])
    assert "missing.yaml" in capsys.readouterr().err


def test_help_describes_every_setting():
    text = " ".join(training_parser(TRAIN).format_help().split())
    sections = {
        "data": DataConfig, "model": ModelConfig, "objective": ObjectiveConfig, "optimizer": OptimizerConfig,
        "run": RunConfig,
    }  # fmt: skip
    for section, cls in sections.items():
        for name in cls.__dataclass_fields__:
            assert f"--{section}.{name}" in text
    assert "Std of the gaussian or scale of the laplace" in text


@pytest.mark.parametrize(
    "section",
    dict.fromkeys(kind for training in (TRAIN, TEXT_TO_IMAGE) for kind in get_type_hints(training.settings).values()),
    ids=lambda section: section.__name__,
)
def test_help_of_a_setting_is_one_sentence_of_at_most_25_words(section):
    described = {option.arg_name: option.description for option in parse_from_object(section).params}
    assert described.keys() == {option.name for option in fields(section)}
    for name, text in described.items():
        assert len(text.split()) <= 25 and re.fullmatch(r"(?:[^.]|\.(?! )|(?<=al)\.)+\.", text), name
        assert all((ROOT / page).exists() for page in re.findall(r"docs/\w+\.md", text)), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=math.nan), "learning_rate"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer.betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda: OptimizerConfig(schedule=None), "optimizer.schedule must be constant or cosine, got None"),
        (lambda: OptimizerConfig(schedule="linear"), "optimizer.schedule must be constant or cosine, got linear"),
        (lambda: ModelConfig(architecture="unet"), "model.architecture must be vae or mlp, got unet"),
        (lambda: OptimizerConfig(warmup_images=-1), "warmup_images"),
        (lambda: OptimizerConfig(max_grad_norm=0), "max_grad_norm"),
        (lambda: RunConfig(seed=-1), "seed"),
        (lambda: RunConfig(output_dir=""), r"run\.output_dir must name a folder"),
        (lambda: RunConfig(checkpoint_every=0), r"run\.checkpoint_every must be at least 1"),
        (lambda: RunConfig(keep_checkpoints=0), r"run\.keep_checkpoints must be at least 1"),
        (lambda: RunConfig(on_nonfinite="ignore"), r"run\.on_nonfinite must be stop or skip, got ignore"),
        (lambda: RunConfig(ema_decay=1.0), "ema_decay"),
        (lambda: RunConfig(max_images=0), "max_images"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TestLearningRate:
    def test_rises_linearly_then_falls_as_a_cosine(self):
        optimizer = OptimizerConfig(learning_rate=2.0, warmup_images=100)
        rates = [optimizer.learning_rate_at(seen, 1100) for seen in (49, 99, 100, 600, 1100)]
        assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0])

    def test_constant(self):
        optimizer = OptimizerConfig(learning_rate=2.0, schedule="constant", warmup_images=0)
        assert {optimizer.learning_rate_at(seen, 1000) for seen in (0, 1, 999, 1000)} == {2.0}

    def test_warm_up_longer_than_the_run(self):
        assert OptimizerConfig(learning_rate=1.0, warmup_images=100).learning_rate_at(9, 10) == pytest.approx(0.1)


class TestUnreached:
    """Of 1,000 images that a run sees."""

    @pytest.mark.parametrize(
        ("section", "what"),
        [
            (
                OptimizerConfig(learning_rate=2e-3, warmup_images=4000),
                r"optimizer\.warmup_images must not exceed the 1,000 images of the run, got 4,000.* to about 0\.0005,",
            ),
            (
                ObjectiveConfig(kl_weight=2.0, kl_schedule="linear", kl_warmup_images=4000),
                r"objective\.kl_warmup_images must not exceed the 1,000 .*, got 4,000.* to about 0\.5, not .* 2\.",
            ),
            (
                ObjectiveConfig(kl_weight=2.0, kl_schedule="cosine", kl_warmup_images=4000),
                r"objective\.kl_warmup_images .* rises to about 0\.29, not",
            ),
            (
                AdversarialConfig(weight=0.5, start_images=1000),
                r"adversarial\.start_images must be less than the 1,000 .*, got 1,000: the discriminator never trains",
            ),
            (
                AdversarialConfig(weight=0.5, start_images=800, warmup_images=400),
                r"adversarial\.warmup_images must not exceed the 1,000 .* got 800 \+ 400: .* about 0\.25, not .* 0\.5",
            ),
        ],
    )
    def test_states_rule_value_and_what_is_reached(self, section, what):
        [sentence] = section.unreached(1000)
        assert re.match(f".*{what}", sentence) and "run.epochs or run.max_images" in sentence

    @pytest.mark.parametrize(
        "section",
        [
            OptimizerConfig(warmup_images=1000),
            ObjectiveConfig(kl_schedule="linear", kl_warmup_images=1000),
            ObjectiveConfig(kl_schedule="cyclical"),
            AdversarialConfig(weight=0.5, start_images=999),
            AdversarialConfig(weight=0.5, start_images=400, warmup_images=600),
            AdversarialConfig(),
        ],
    )
    def test_is_empty_when_all_is_reached_by_the_end(self, section):
        assert section.unreached(1000) == []


@pytest.mark.slow
def test_digits_preset_is_the_default():
    digits = next(preset for preset in PRESETS if preset.stem == "digits")
    assert parse_settings(TRAIN, ["--config", str(digits)]) == parse_settings(TRAIN, [])
    digits = next(preset for preset in PRESETS if preset.stem == "digits-t2i")
    assert parse_settings(TEXT_TO_IMAGE, ["--config", str(digits)]) == parse_settings(TEXT_TO_IMAGE, [])


def test_mlp_with_bernoulli_needs_nothing_else():
    config, _ = parse_settings(TRAIN, ["--model.architecture", "mlp", "--objective.likelihood", "bernoulli"])
    assert (config.model.latent_dim, config.objective.scale) == (20, None)


def test_data_model_and_objective_are_required():
    with pytest.raises(TypeError, match="'data', 'model', and 'objective'"):
        TrainConfig()
