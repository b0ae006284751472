"""From YAML and flags to settings, and the errors on the way."""

import math
from pathlib import Path

import pytest
import yaml

from diffusers_vae.config import TRAININGS, parse_settings, training_parser
from diffusers_vae.data import DataConfig
from diffusers_vae.loop import OptimizerConfig, RunConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.objective import ObjectiveConfig
from diffusers_vae.trainer import TrainConfig

PRESETS = sorted((Path(__file__).parents[1] / "training" / "configs").glob("*.yaml"))

TRAIN = TRAININGS["train"]
TEXT_TO_IMAGE = TRAININGS["train-text-to-image"]


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
class TestPresets:
    def test_parses_and_writes_to_its_own_folder(self, preset):
        training = TEXT_TO_IMAGE if preset.stem.endswith("-t2i") else TRAIN
        config, dry = parse_settings(training, ["--config", str(preset)])
        assert config.run.output_dir == f"runs/{preset.stem}" and not dry

    def test_says_what_to_expect(self, preset):
        head = preset.read_text().split("\n\n")[0]
        for word in ("Purpose:", "Hardware:", "Time:", "Expect:"):
            assert word in head


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
    assert stated["objective"]["scale"] == 0.1
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
        ("objective: {likelihood: bernoulli, scale: 1.0}", ["bernoulli", "no scale", "1.0"]),
        ("run: 3", ["run"]),
        ("model: {architecture: mlp, layers_per_block: 2}", ["model.layers_per_block", "mlp", "hidden_dim"]),
        ("model: {block_out_channels: [30, 60]}", ["model.block_out_channels", "divisible", "30"]),
        ("model: {latent_channels: 0}", ["model.latent_channels", "at least 1"]),
        ("run: [1, 2", ["config"]),
    ],
)
def test_errors_name_the_key_and_the_value(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_settings(TRAIN, ["--config", write(tmp_path / "a.yaml", text)])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert all(word in message for word in words), message


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
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=math.nan), "learning_rate"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "betas"),
        (lambda: OptimizerConfig(schedule="linear"), "optimizer.schedule must be constant or cosine, got linear"),
        (lambda: ModelConfig(architecture="unet"), "model.architecture must be one of vae, mlp, got unet"),
        (lambda: OptimizerConfig(weight_decay=-1), "weight_decay"),
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


def test_digits_preset_is_the_default():
    digits = next(preset for preset in PRESETS if preset.stem == "digits")
    assert parse_settings(TRAIN, ["--config", str(digits)]) == parse_settings(TRAIN, [])
    digits = next(preset for preset in PRESETS if preset.stem == "digits-t2i")
    assert parse_settings(TEXT_TO_IMAGE, ["--config", str(digits)]) == parse_settings(TEXT_TO_IMAGE, [])


def test_perceptron_with_bernoulli_needs_nothing_else():
    config, _ = parse_settings(TRAIN, ["--model.architecture", "mlp", "--objective.likelihood", "bernoulli"])
    assert (config.model.latent_dim, config.objective.scale) == (20, None)


def test_model_and_objective_are_required():
    with pytest.raises(TypeError, match="model"):
        TrainConfig()
