"""What a newcomer types first: presets by name, images by their folder, help, and settings that are nearly right."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.commands import call
from support.launches import command, run_forked
from support.runs import fit, tensors, tiny

from diffusers_vae import VAE, cli
from diffusers_vae.cli.chosen import choose
from diffusers_vae.cli.parser import TRAININGS, parse_settings, training_parser
from diffusers_vae.presets import presets

ROOT = Path(__file__).parents[1]
TRAIN = TRAININGS["train"]
SMALL = [
    "--run.max_images=8", "--run.batch_size=4", "--run.tracker=null", "--data.resolution=8",
    "--model.block_out_channels=[8,8]", "--model.norm_num_groups=4", "--model.mid_block_add_attention=false",
]  # fmt: skip


def save_images(folder, size=(24, 20), mode="L", count=12):
    """Save images of noise, of (height, width) `size`."""
    folder.mkdir()
    shape = size if mode == "L" else (*size, 3)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels, mode).save(folder / f"{number}.png")
    return folder


class TestPresets:
    def test_list_has_purpose_hardware_and_figure_of_each(self, capsys):
        code, out, _ = call(capsys, "presets")
        assert code == 0
        entries = {entry.split()[0]: entry for entry in out.split("\n\n")[:-1]}
        assert sorted(entries) == sorted(path.stem for path in (ROOT / "training" / "configs").glob("*.yaml"))
        for entry in entries.values():
            assert all(f"\n  {label} " in entry for label in ("purpose", "hardware", "figure"))
        assert "(diffusers-vae train-text-to-image)" in entries["mnist-t2i"]

    def test_one_is_printed_whole(self, capsys):
        code, out, _ = call(capsys, "presets", "rgb-small")
        assert code == 0 and out == (ROOT / "training" / "configs" / "rgb-small.yaml").read_text()

    def test_heads_are_read_to_their_last_line(self):
        head = presets()["kl-f8"].head
        assert head["Hardware"] == "a GPU; several with `accelerate launch --multi_gpu`, with the same result."
        assert head["Differs"].endswith("with the updated autoencoder.")

    @pytest.mark.slow
    @pytest.mark.parametrize("flip", [False, True])
    def test_defaults_presets_files_and_flags_override_each_other_in_any_order(self, flip, tmp_path):
        (tmp_path / "own.yaml").write_text("run: {epochs: 2, seed: 5}\noptimizer: {learning_rate: 0.5}\n")
        groups = [["--preset", "mnist-vae"], [f"--config={tmp_path / 'own.yaml'}"], ["--run.seed", "6"]]
        arguments = [word for group in (reversed(groups) if flip else groups) for word in group]
        config, _ = parse_settings(TRAIN, arguments)
        assert (config.run.seed, config.run.epochs, config.run.batch_size) == (6, 2, 64)  # flag, file, preset
        assert config.optimizer.learning_rate == 0.5 and config.optimizer.betas == (0.9, 0.999)  # file, default

    @pytest.mark.parametrize(
        ("command", "name", "message"),
        [
            ("train", "rgb-smal", "there is no preset rgb-smal. Did you mean rgb-small?"),
            ("train", "mnist-t2i", "the preset mnist-t2i is for diffusers-vae train-text-to-image"),
            ("train-text-to-image", "digits", "the preset digits is for diffusers-vae train\n"),
        ],
    )
    def test_wrong_names_are_refused(self, command, name, message, capsys):
        code, _, error = call(capsys, command, "--preset", name)
        assert code == 2 and message in error


class TestSuggestions:
    @pytest.mark.parametrize(
        ("flags", "meant"),
        [
            (["--run.epoch", "3"], "run.epochs"),
            (["--run.batch-size=3"], "run.batch_size"),
            (["--epochs", "3"], "run.epochs"),
            (["--learning_rate", "1"], "adversarial.learning_rate or optimizer.learning_rate"),
            (["--presets", "digits"], "preset"),
        ],
    )
    def test_nearest_setting_is_suggested(self, flags, meant, capsys):
        code, _, error = call(capsys, "train", *flags)
        assert code == 2 and error.count(f"Did you mean {meant}?") == 1

    def test_keys_of_a_file_get_one_too(self, tmp_path, capsys):
        (tmp_path / "own.yaml").write_text("objective: {kl_wieght: 2}\n")
        code, _, error = call(capsys, "train", "--config", tmp_path / "own.yaml")
        assert code == 2 and "Did you mean objective.kl_weight?" in error and "own.yaml" in error

    def test_nothing_is_suggested_for_what_is_like_no_setting(self, capsys):
        assert "Did you mean" not in call(capsys, "train", "--zzzzzz", "1")[2]


class TestHelp:
    @pytest.mark.parametrize("training", TRAININGS.values(), ids=list(TRAININGS))
    def test_is_short(self, training, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        lines = training_parser(training).format_help().splitlines()
        settings = [line for line in lines if re.match(r"  --\w+\.\w+ ", line)]
        assert len(settings) > 60 and len(lines) <= 3.5 * len(settings)
        monkeypatch.setenv("COLUMNS", "2000")
        texts = re.findall(r"\n  --\w+\.\w+ .*\n +(.*)", training_parser(training).format_help())
        assert len(texts) == len(settings) and not [text for text in texts if len(text.split()) > 25]

    @pytest.mark.parametrize(
        ("word", "settings"),
        [
            ("sharper", ["objective.perceptual", "adversarial.weight"]),
            ("memory", ["run.gradient_checkpointing", "run.gradient_accumulation_steps"]),
        ],
    )
    def test_what_people_look_for_is_found(self, word, settings):
        found = re.split(r"\n  --", training_parser(TRAIN).format_help())
        assert {*settings} <= {entry.split()[0] for entry in found if word in entry}


class TestImages:
    """`train DATA`."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("size", "mode", "expected"),
        [
            ((24, 20), "L", ("mnist-vae", 32, "pad", None, 1)),
            ((70, 90), "RGB", ("rgb-small", 64, "crop", None, 3)),
            ((130, 140), "RGB", ("rgb-small", 64, "crop", 100, 3)),
        ],
    )
    def test_preset_channels_and_resolution_suit_the_images(self, size, mode, expected, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "photos", size, mode)
        flags, stated = choose(TRAIN, ["photos"])
        config, _ = parse_settings(TRAIN, ["photos"], flags)
        data = config.data
        assert (data.resolution, data.fit, data.crops, data.channels) == expected[1:]
        assert (data.name, data.root, config.run.output_dir) == ("folder", "photos", "runs/photos")
        assert f"--preset {expected[0]} " in stated and "--run.output_dir runs/photos " in stated
        lines = [line.split("  ")[1] for line in stated.splitlines()[1:]]  # as flags, they state the same
        assert parse_settings(TRAIN, shlex.split(" ".join(lines)))[0] == config

    @pytest.mark.slow
    def test_data_ends_with_a_command_for_the_same_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "my photos", (70, 90), "RGB")
        assert cli.main(["data", "my photos"]) == 0
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert words[:2] == ["diffusers-vae", "train"] and "--run.output_dir" in words
        flags, _ = choose(TRAIN, ["my photos"])
        assert parse_settings(TRAIN, words[2:]) == parse_settings(TRAIN, ["my photos"], flags)

    @pytest.mark.slow
    def test_flags_and_files_win(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "photos", (130, 140), "RGB")
        (tmp_path / "own.yaml").write_text("run: {output_dir: runs/own}\n")
        arguments = ["--data.fit", "pad", "photos", "--config", "own.yaml", "--data.resolution", "32"]
        flags, stated = choose(TRAIN, arguments)
        config, _ = parse_settings(TRAIN, arguments, flags)
        assert (config.data.fit, config.data.crops, config.data.resolution) == ("pad", None, 32)
        assert config.run.output_dir == "runs/own" and "output_dir" not in stated

    @pytest.mark.slow
    def test_fine_tuning_keeps_the_model_and_another_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "photos", (70, 90), "RGB")
        VAE(in_channels=3, out_channels=3, block_out_channels=[8, 8], norm_num_groups=4).save_pretrained("model")
        arguments = ["photos", "--model.pretrained", "model", "--model.train", "decoder"]
        config, _ = parse_settings(TRAIN, arguments, choose(TRAIN, arguments)[0])
        assert config.model.pretrained == "model" and config.optimizer.learning_rate == 1e-4
        assert config.run.output_dir == "runs/photos-fine-tuned"

    @pytest.mark.slow
    def test_a_preset_that_is_given_stays(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "photos", (70, 90), "RGB")
        arguments = ["photos", "--preset", "mnist-vae"]
        config, _ = parse_settings(TRAIN, arguments, choose(TRAIN, arguments)[0])
        preset, _ = parse_settings(TRAIN, ["--preset", "mnist-vae"])
        assert config.model == preset.model and config.data.resolution == preset.data.resolution
        assert (config.data.root, config.run.output_dir) == ("photos", "runs/photos")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "folder"),
        [
            (["--data", "photos"], "runs/photos"),
            (["--data.name", "mnist"], "runs/mnist"),
            (["--data", "photos", "--run.output_dir", "runs/own"], "runs/own"),
            (["--data", "photos", "--preset", "rgb-small"], "runs/rgb-small"),
            ([], "runs/digits"),
        ],
    )
    def test_runs_are_named_after_their_images_unless_stated(self, arguments, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "photos")
        config, _ = parse_settings(TRAIN, arguments, choose(TRAIN, arguments)[0])
        assert config.run.output_dir == folder

    def test_missing_images_are_named(self, capsys):
        code, _, error = call(capsys, "train", "nowhere")
        assert code == 1 and "nowhere, which is not there" in error

    def test_two_are_refused(self, capsys):
        code, _, error = call(capsys, "train", "a", "b")
        assert code == 2 and "unrecognized arguments: a b" in error

    @pytest.mark.slow
    def test_same_command_continues_the_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        save_images(tmp_path / "photos")
        code, out, error = call(capsys, "train", "photos", *SMALL)
        assert code == 0, error
        assert out.startswith("chosen for 11 training images") and "--data.resolution" not in out
        (line,) = [line for line in out.splitlines() if line.startswith("report ")]
        assert line.endswith("runs/photos/report.html")
        figures = (tmp_path / "runs" / "photos" / "evaluation.json").read_text()
        assert json.loads(figures)["protocol"]["data"] == "photos"
        assert yaml.safe_load((tmp_path / "runs" / "photos" / "config.yaml").read_text())["data"]["root"] == "photos"
        Image.new("RGB", (130, 130)).save(tmp_path / "photos" / "12.png")  # for which another choice would be made
        code, out, error = call(capsys, "train", "photos", *SMALL)
        assert (
            code == 0
            and out.startswith("runs/photos holds a run: continuing it with its settings")
            and "chosen" not in out
        )


@pytest.mark.slow
def test_two_processes_make_one_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_images(tmp_path / "photos")
    told = run_forked(command, "train", folder, *SMALL, "--dry_run", log=tmp_path / "log", processes=2)
    assert told.count("chosen for 11 training images") == 1 and "dry run: every phase ran" in told


@pytest.mark.slow
def test_ema_decay_of_0_means_no_averaging(tmp_path):
    for decay in (0, None, 0.5):
        fit(tiny(tmp_path / str(decay), max_images=60, ema_decay=decay))
    averaged = [path.name for path in sorted(tmp_path.glob("*")) if list(path.rglob("ema.safetensors"))]
    assert averaged == ["0.5"]
    first, second = (tensors(tmp_path / name, 60, "model") for name in ("0", "None"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_accelerate_launch_is_explained_after_an_error(monkeypatch, capsys):
    assert "accelerate" not in call(capsys, "train", "--run.epoch", 3)[2]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which it sets
    code, _, error = call(capsys, "train", "--run.epoch", 3)
    first, last = error.splitlines()
    assert code == 2 and first.startswith("error: ") and "`diffusers-vae train` ends without" in last


def test_outputs_that_have_a_default_are_ignored_by_git():
    outputs = ["contact-sheet.png", "samples.png", "comparisons/a", "evaluations/a", "reconstructions/a", "runs/a"]
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    command = ["git", "check-ignore", "--no-index", *outputs]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() == outputs
