"""The command line, on a small trained run, as people call it: with wrong input too."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from support.commands import call
from support.files import filled, paths_of
from support.hub import REPO, write_report
from support.launches import Launch, command, run_forked
from support.models import tiny_vae
from support.runs import TINY_VAE, tiny

from diffusers_vae import MLPVAE, VAE, LatentDataset, cli
from diffusers_vae.data import DataConfig, load_data, load_split
from diffusers_vae.evaluation.metrics import psnr
from diffusers_vae.evaluation.reconstruct import image_files, reconstruct_files
from diffusers_vae.evaluation.report import EvaluationReport
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import fast_dtype, load_autoencoder, weights_hash
from diffusers_vae.processes import out_of_memory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(finished_vae_run):
    """A finished run, which no test may change."""
    return finished_vae_run


HOSTILE = "\x1b[2J\x1b]0;t\x07\nerror: done\r\udcff"
"""As a file may be called where names are bytes."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any name")
class TestNames:
    def assert_tame(self, text):
        assert all(line.isprintable() for line in text.splitlines()), ascii(text)
        assert "\nerror: done" not in text and (r"\x1b[2J" in text or r"\u001b[2J" in text)

    def test_of_a_model_are_escaped_in_errors(self, capsys, tmp_path):
        code, out, error = call(capsys, "info", tmp_path / HOSTILE)
        assert code == 1 and out == ""
        self.assert_tame(error)

    def test_of_no_command_are_escaped(self, capsys):
        code, _, error = call(capsys, HOSTILE)
        assert code == 2
        self.assert_tame(error)

    def test_of_a_run_are_escaped_in_what_is_printed(self, run, capsys, tmp_path):
        name = HOSTILE.strip("\udcff")  # safetensors opens no file with such a name
        shutil.copytree(run, tmp_path / name)
        code, out, _ = call(capsys, "info", tmp_path / name)
        assert code == 0
        self.assert_tame(out)
        line = next(line for line in out.splitlines() if line.startswith("load it"))
        names = {}
        exec(line.removeprefix("load it").strip(), names)  # it loads what it names
        assert names["vae"].config.scaling_factor

    def test_that_safetensors_cannot_read_are_refused(self, run, capsys, tmp_path):
        """It writes to such a folder: a run there could not be continued."""
        odd = tmp_path / HOSTILE
        shutil.copytree(run, odd)
        for words in (
            ["info", odd], ["push", odd, "me/model"], ["train", "--run.output_dir", tmp_path / "\udcff"],
            ["encode", "digits", "--vae", run, "--out", tmp_path / "\udcff"],
        ):  # fmt: skip
            code, _, error = call(capsys, *words)
            assert code in (1, 2) and "must be a UTF-8 path, because safetensors reads no other" in error, error
        assert not (tmp_path / "\udcff").exists()

    def test_of_a_model_without_weights_are_escaped_in_what_diffusers_logs(self, run, capsys, caplog, tmp_path):
        shutil.copytree(run / "model", tmp_path / HOSTILE)
        (tmp_path / HOSTILE / "diffusion_pytorch_model.safetensors").unlink()
        code, _, error = call(capsys, "info", tmp_path / HOSTILE)
        assert code == 1 and "\x1b" not in caplog.text
        self.assert_tame(error)

    def test_of_images_are_escaped(self, run, capsys, tmp_path):
        images = tmp_path / "images"
        images.mkdir()
        Image.new("L", (8, 8)).save(images / "a.png")
        (images / "a.png").rename(images / f"{HOSTILE}.png")
        (images / f"{HOSTILE}-bad.png").write_bytes(b"no image")
        code, out, error = call(capsys, "reconstruct", run, images, "--out", tmp_path / "out")
        assert code == 1 and "1 of 2 images could not be reconstructed:\n  cannot read" in error
        self.assert_tame(out)
        self.assert_tame(error.partition("error: ")[2])  # after the bar

    @pytest.mark.slow
    def test_of_images_are_escaped_in_warnings_and_tables(self, capsys, caplog, tmp_path):
        images = tmp_path / "images"
        for folder in ("train", "test"):
            (images / folder / HOSTILE).mkdir(parents=True)
            for index in range(3):
                Image.effect_noise((8, 8), 50 + index).save(images / folder / HOSTILE / f"{index}.png")
        (images / "train" / HOSTILE / "bad.png").write_bytes(b"no image")
        code, out, _ = call(capsys, "data", images, "--data.channels", 1, "--data.resolution", 8, "--out",
                            tmp_path / "sheet.png")  # fmt: skip
        assert code == 0
        self.assert_tame(out)
        load_split(DataConfig("folder", str(images), channels=1, resolution=8, on_bad_image="skip"), "all", True)
        self.assert_tame("\n".join(record.getMessage() for record in caplog.records))


class TestTop:
    def test_help_needs_no_torch(self):
        code = (
            "import sys; from diffusers_vae import cli; code = cli.main(['--help']); "
            "print(code, [name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.endswith("0 []\n") and "diffusers-vae COMMAND" in done.stdout
        assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_each_command_says_what_it_takes_with_an_example(self, name, capsys):
        code, out, _ = call(capsys, name, "--help")
        assert code == 0 and "usage: diffusers-vae" in out and "--debug" in out
        example = out[out.index("example: ") :]
        assert "diffusers" in example or "training/train_" in example
        told = {
            **dict.fromkeys(("evaluate", "compare"), "Number of posterior samples per image"),
            "data": "Maximum number of training images to decode",
            "presets": "Preset to print",
            "push": "Make the repository private",
            "train": "Number of passes over the training images",
            "train-text-to-image": "Fraction of images with an empty prompt",
        }
        assert told.get(name, "Subfolder of the folder or repository that holds the model") in " ".join(out.split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["foo"], "foo is not a command; the commands are train, train-text-to-image, data"),
            (["evaluate"], "model"),
            (["evaluate", "x", "--evaluation.draws", "none"], "evaluation.draws"),
            (["evaluate", "x", "--evaluation.draws", "0"], "evaluation.draws must be at least 1, got 0"),
            (["evaluate", "x", "--split", "some"], "split"),
            (["evaluate", "x", "--evaluation.every", "5"], "--evaluation.every"),
            (["evaluate", "x", "--colour", "red"], "--colour"),
            (["sample", "x", "--count", "0"], "count"),
            (["push", "x", "no-namespace"], "hub.repo_id must be NAMESPACE/NAME"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments, message, capsys):
        code, _, error = call(capsys, *arguments)
        assert code == 2 and message in error and "Traceback" not in error

    @pytest.mark.slow
    def test_a_missing_autoencoder_is_named(self, capsys, tmp_path):
        """It is not looked for on the Hub either."""
        missing = tmp_path / "none"
        for arguments, begin in (
            (["train-text-to-image", "--vae", missing, "--run.output_dir", tmp_path / "run"], "vae.source: "),
            (["evaluate", missing, "--data", "digits"], ""),
        ):
            code, out, error = call(capsys, *arguments)
            assert code == 1 and out == "" and f"{begin}there is no file or folder {missing}" in error

    @pytest.mark.slow
    def test_errors_are_one_line_unless_debug_is_asked_for(self, capsys, tmp_path):
        code, out, error = call(capsys, "evaluate", tmp_path)
        assert code == 1 and out == ""
        assert error.startswith(f"error: {tmp_path} holds no model") and error.count("\n") == 1
        with pytest.raises(FileNotFoundError):
            cli.main(["evaluate", str(tmp_path), "--debug"])

    def test_error_that_nobody_expected_is_shown_with_its_type(self, capsys, tmp_path, monkeypatch):
        tiny_vae().save_pretrained(tmp_path)

        def fail(self, sample):
            raise RuntimeError("the device is lost")

        monkeypatch.setattr("diffusers.models.autoencoders.vae.Encoder.forward", fail)
        code, out, error = call(capsys, "info", tmp_path)
        assert code == 1 and out == ""
        assert error == "error: RuntimeError: the device is lost (--debug shows the traceback)\n"
        with pytest.raises(RuntimeError):
            cli.main(["info", str(tmp_path), "--debug"])

    @pytest.mark.parametrize("name", ["evaluate", "fp16", "compare"])
    def test_missing_data_are_asked_for_before_a_model_is_looked_for(self, name, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        for model in ("me/vae", "runs/tinyy"):
            code, _, error = call(capsys, name, *[model] * (2 if name == "compare" else 1))
            assert code == 2 and re.match(
                rf"error: .*{model}\. For a model on the Hub, name the images with --data\n$", error
            )
        code, _, error = call(capsys, name, *["runs/tiny/model"] * (2 if name == "compare" else 1))
        assert code == 1 and "there is no file or folder" in error

    def test_missing_data_of_a_text_to_image_run_are_asked_for_before_a_download(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        flags = ["--data.name", "folder", "--data.root", "gone", "--run.output_dir", "run"]
        code, _, error = call(capsys, "train-text-to-image", "--vae", "me/vae", *flags)
        assert code == 1 and "gone" in error and "me/vae" not in error
        code, _, error = call(capsys, "train-text-to-image", "--vae", "./runs/tiny", *flags)
        assert code == 1 and "vae.source: there is no file or folder" in error

    def test_too_little_memory_is_told_with_what_to_do(self, capsys, tmp_path):
        """An error of torch itself: more samples than fit into any memory."""
        MLPVAE(image_size=8, hidden_dim=4, latent_dim=2).save_pretrained(tmp_path / "model")
        arguments = ["sample", tmp_path / "model", "--count", 10**15, "--out", tmp_path / "samples.png"]
        code, _, error = call(capsys, *arguments)
        assert code == 1 and error.startswith("error: there is not enough memory (") and "smaller batch" in error, error
        assert error.count("\n") == 1 and not (tmp_path / "samples.png").exists()

    @pytest.mark.slow
    def test_closed_pipe_ends_the_command_quietly(self, run, tmp_path):
        output = run_forked(info_for_a_reader_who_has_left, str(run), log=tmp_path / "log")
        assert output == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
    output = run_forked(print_to_a_full_disk, log=tmp_path / "log")
    assert output.splitlines() == ["error: [Errno 28] No space left on device"] * 2


def print_to_a_full_disk():
    for arguments in ([], ["--version"]):
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115
        assert cli.main(arguments) == 1
    os._exit(0)  # Python would complain of the same at its end


def info_for_a_reader_who_has_left(run):
    """As in `diffusers-vae info RUN | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    for arguments in (["info", run], ["info", "--help"], ["--help"]):
        assert cli.main(arguments) == 1
        sys.stdout.flush()  # as Python does when it ends
        os.dup2(writer, 1)


def copy_images(source, target, count):
    target.mkdir()
    for path in sorted(source.iterdir())[:count]:
        shutil.copyfile(path, target / path.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "of_its_own",
    [
        {
            "name": "datasets",
            "root": "ann/pets",
            "streaming": True,
            "lanes": [1, 2],
            "shuffle_buffer": 9,
            "crops": "random",
        },
        {"name": "folder", "root": "photos", "buckets": None, "horizontal_flip": True, "color_jitter": [0.1, 0, 0, 0]},
        {"name": "array", "root": "a.npz", "image_column": "images", "vertical_flip": True, "crops": 3},
    ],
)
def test_a_run_on_other_images_than_it_was_trained_on(of_its_own, run, tmp_path, capsys):
    """What its own set had, and how it was trained on, is not asked of others."""
    shutil.copytree(run, tmp_path / "run")
    stated = yaml.safe_load((run / "config.yaml").read_text())
    stated["data"] |= of_its_own
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stated))
    arguments = ["--data", "digits", "--max_images", 8]
    code, out, _ = call(capsys, "fp16", tmp_path / "run", *arguments)
    assert code == 0 and "8 images" in out


def assert_same(found, expected, where="report"):
    """That two JSON values are the same, with floats within 1e-5: a run measures the model that it trained, a command
    the one that was saved.
    """
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), where
    else:
        assert found == expected, where


def read_csv(file):
    """Header, names of the images and figures."""
    header, *lines = (line.split(",") for line in file.read_text().splitlines())
    return [header, [line[0] for line in lines], [[float(value) for value in line[1:]] for line in lines]]


class TestEvaluate:
    @pytest.mark.slow
    def test_a_run_is_measured_on_its_held_out_images(self, run, capsys, tmp_path):
        """With all its settings: the figures are those of the run's own evaluation."""
        code, out, _ = call(capsys, "evaluate", run, "--out", tmp_path)
        assert code == 0 and "PSNR" in out and "95 % interval" in out
        found, of_run = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, run))
        assert found.pop("sha256") and of_run.pop("sha256")
        assert_same(found, of_run)
        assert_same(read_csv(tmp_path / "evaluation.csv"), read_csv(run / "evaluation.csv"))
        assert {path.stem for path in (tmp_path / "pictures").iterdir()} >= {"reconstructions", "rates", "traversals"}
        assert "data:image/png" in (tmp_path / "report.html").read_text()

    @pytest.mark.slow
    def test_settings_override_those_of_the_run(self, run, capsys, tmp_path):
        arguments = ["--evaluation.draws", 2, "--evaluation.max_images", 5, "--split", "training"]
        arguments += ["--dtype", "bfloat16", "--out", tmp_path]
        assert call(capsys, "compare", run, run, *arguments)[0] == 0
        report = json.loads((tmp_path / "comparison.json").read_text())["first"]
        protocol = report["protocol"]
        assert (report["images"], protocol["draws"], protocol["split"]) == (5, 2, "training")
        assert report["importance_weighted_bound"] > -1e9 and protocol["dtype"] == "bfloat16"

    @pytest.mark.slow
    def test_a_stock_model_is_measured_on_a_folder(self, capsys, tmp_path, cifar_folder):
        """Channels and resolution are the model's; a folder without parts is measured whole."""
        tiny_vae(3, sample_size=16).to_diffusers().save_pretrained(tmp_path / "pipeline" / "vae")
        copy_images(cifar_folder / "test" / "ship", tmp_path / "ships", 12)
        arguments = ["evaluate", tmp_path / "pipeline", f"--data={tmp_path / 'ships'}", "--out", tmp_path / "out"]
        assert call(capsys, *arguments)[0] == 0
        report = EvaluationReport.from_json((tmp_path / "out" / "evaluation.json").read_text())
        assert report.images == 12 and report.protocol.split == "all" and report.protocol.data == "ships"
        assert report.protocol.resolution == [16, 16] and report.protocol.channels == 3
        assert report.model.name == "pipeline"

    @pytest.mark.slow
    def test_a_run_on_a_folder_is_measured_on_what_it_was_not_trained_on(self, run, capsys, tmp_path, cifar_folder):
        folders = [tmp_path / name for name in ("ships", "frogs")]
        for folder, count in zip(folders, (30, 20), strict=True):
            copy_images(cifar_folder / "test" / folder.name[:-1], folder, count)
        data = DataConfig(name="folder", root=str(folders[0]), resolution=8, channels=1)
        shutil.copytree(run / "model", tmp_path / "run" / "model")
        config = dataclasses.replace(tiny(tmp_path / "run", TINY_VAE), data=data)
        config.save(tmp_path / "run" / "config.yaml")
        for folder, split, count in ((folders[0], "held-out", 3), (folders[1], "all", 20)):
            arguments = ["--data", folder, "--data.channels", 1, "--out", tmp_path / "out"]
            assert call(capsys, "compare", tmp_path / "run", tmp_path / "run", *arguments)[0] == 0
            comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
            protocol = comparison["first"]["protocol"]
            assert (protocol["split"], protocol["images"], protocol["data"]) == (split, count, folder.name)
        tiny_vae().save_pretrained(tmp_path / "other")  # which the second of two was trained on
        (tmp_path / "link").symlink_to(folders[0])
        arguments = ["--data", f"{tmp_path / 'link'}/", "--data.resolution", 8, "--out", tmp_path / "both"]
        assert call(capsys, "compare", tmp_path / "other", tmp_path / "run", *arguments)[0] == 0
        comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
        assert comparison["first"]["protocol"]["split"] == "held-out"
        arguments += ["--data.heldout_fraction", 0.3]
        code, _, error = call(capsys, "compare", tmp_path / "other", tmp_path / "run", *arguments)
        assert code == 1 and "data.heldout_fraction must be the same as in training" in error

    def test_homes_and_counts_as_people_write_them(self, run, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        shutil.copytree(run, tmp_path / "run")
        code, out, _ = call(capsys, "sample", "~/run", "--out=~/samples.png", "--count", "4e0")
        assert code == 0 and f"{tmp_path}/samples.png" in out and not (tmp_path / "~").exists()
        code, _, error = call(capsys, "sample", "~/run", "--count", "many")
        assert (
            code == 2
            and error == "error: --count must be a whole number of at least 1, got many: for example, --count 64\n"
        )

    @pytest.mark.parametrize("command", ["evaluate", "compare", "fp16", "encode"])
    def test_settings_that_only_a_training_reads_are_refused(self, command, capsys):
        code, _, error = call(capsys, command, "a", *["b"] * (command == "compare"), "--data.horizontal_flip", "true")
        assert code == 2 and "--data.horizontal_flip" in error

    def test_images_in_colour_are_not_made_grey_unasked(self, run, capsys, tmp_path):
        (tmp_path / "photos").mkdir()
        for index in range(3):
            Image.effect_noise((12, 9), 50 + index).convert("RGB").save(tmp_path / "photos" / f"{index}.png")
        for words in (["evaluate", run, "--data"], ["fp16", run, "--data"], ["encode", "--vae", run]):
            code, _, error = call(
                capsys, *words, tmp_path / "photos", *["--out", tmp_path / "out"] * (words[0] != "fp16")
            )
            assert code == 1 and "takes grey images, and photos has some in colour: --data.channels 1" in error
        arguments = [tmp_path / "photos", "--data.channels", 1, "--out", tmp_path / "out"]
        code, out, _ = call(capsys, "encode", *arguments, "--vae", run, "--data.crops", 2)
        assert code == 0 and "3 images of photos, RGB, 9x12; read as 8x8 grey, 2 crops of each" in out
        assert "images      2 crops of each of 3 images of photos, all" in out

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "nowhere"], "which is not there"),
            (["--evaluation.lpips", '["alex"]'], "Put alexnet-owt-7be5be79.pth into"),
            (["--data.channels", "3"], "takes images of 1 channels, got 3"),
            (["--data.resolution", "17"], "must be divisible by 2"),
            (["--out", ROOT / "README.md"], "README.md"),
            (["--device", "abacus"], "--device must be one that torch can use on this machine, got abacus"),
        ],
    )
    def test_arguments_that_do_not_fit_are_refused(self, arguments, message, run, no_download, capsys, tmp_path):
        code, _, error = call(capsys, "evaluate", run, "--out", tmp_path / "out", *arguments)
        assert code == 1 and message in error and not list((tmp_path / "out").rglob("*.*"))

    @pytest.mark.slow
    def test_two_processes_write_the_report_of_one(self, run, tmp_path):
        for processes in (1, 2):
            arguments = ["evaluate", run, "--out", tmp_path / str(processes), "--evaluation.draws", 3]
            arguments += ["--evaluation.max_images", 40, "--evaluation.batch_size", 7]  # 6 batches, the last of 5
            arguments += ["--fp16", "true"]
            run_forked(command, *map(str, arguments), log=tmp_path / "log", processes=processes)
        for name in ("evaluation.json", "evaluation.csv"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


class TestFp16:
    @pytest.mark.slow
    def test_a_run_is_told_safe_and_its_config_changed_when_asked(self, run, capsys, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        code, out, _ = call(capsys, "fp16", folder, "--max_images", 20)
        assert code == 0 and "decoder.up_blocks.1" in out and "20 images. Float16 is safe" in out
        assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        code, out, _ = call(capsys, "fp16", folder, "--write", "true", "--max_images", 20)
        config = folder / "model" / "config.json"
        assert code == 0 and f"force_upcast is now false in {config}" in out
        assert config.read_text() == before[config].decode().replace('"force_upcast": true', '"force_upcast": false')
        after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert {file for file in after.keys() | before.keys() if after.get(file) != before.get(file)} == {config}
        assert AutoencoderKL.from_pretrained(folder / "model").config.force_upcast is False
        code, out, _ = call(capsys, "fp16", folder / "model", "--write", "true")
        assert code == 0 and f"was already false in {config}" in out and config.read_bytes() == after[config]

    @pytest.mark.slow
    def test_another_programs_config_keeps_its_order(self, capsys, tmp_path):
        tiny_vae(sample_size=16).to_diffusers().save_pretrained(tmp_path / "pipeline" / "vae")
        file = tmp_path / "pipeline" / "vae" / "config.json"
        config = dict(reversed(json.loads(file.read_text()).items())) | {"unknown": [1e-7, "ü"]}
        del config["force_upcast"]  # as in the oldest ones, where it is true
        file.write_text(json.dumps(config))
        arguments = ["--data", "digits", "--max_images", 20, "--write", "true"]
        assert call(capsys, "fp16", tmp_path / "pipeline", *arguments)[0] == 0
        assert list(json.loads(file.read_text()).items()) == [*config.items(), ("force_upcast", False)]

    @pytest.mark.slow
    def test_what_is_not_safe_is_left_alone(self, capsys, tmp_path):
        vae = tiny_vae(sample_size=16)
        with torch.no_grad():
            vae.decoder.up_blocks[0].resnets[0].conv1.bias.fill_(1e5)
        vae.save_pretrained(tmp_path)
        before = (tmp_path / "config.json").read_bytes()
        code, out, error = call(capsys, "fp16", tmp_path, "--data", "digits", "--max_images", 20, "--write", "true")
        assert code == 1 and "Float16 overflows in decoder.up_blocks.0: keep force_upcast true." in out
        assert error.endswith(
            "config.json was not changed. Float16 overflows in decoder.up_blocks.0: keep force_upcast true.\n"
        )
        assert (tmp_path / "config.json").read_bytes() == before
        assert call(capsys, "fp16", tmp_path, "--data", "digits", "--max_images", 20)[0] == 0

    def test_a_class_without_the_setting_is_refused(self, capsys, tmp_path):
        MLPVAE(16, latent_dim=2).save_pretrained(tmp_path)
        code, out, error = call(capsys, "fp16", tmp_path, "--data", "digits", "--max_images", 20, "--write", "true")
        assert code == 1 and out == "" and "MLPVAE does not have" in error

    @pytest.mark.slow
    def test_a_repository_is_not_written_to(self, capsys, tmp_path, monkeypatch):
        repository = tmp_path / "models--me--vae"
        tiny_vae(sample_size=16).save_pretrained(repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, out, error = call(capsys, "fp16", "me/vae", "--data", "digits", "--write", "true")
        assert code == 1 and "but me/vae is a repository" in error and out == ""


class TestEncode:
    @pytest.mark.slow
    def test_the_training_images_of_a_run_are_encoded(self, run, capsys, tmp_path):
        """As the run has them; the line that is printed opens what was written."""
        out = tmp_path / "latents"
        code, printed, _ = call(capsys, "encode", "digits", "--vae", run, "--out", out, "--dtype", "float16")
        assert code == 0 and "images      1,617 of digits, training\n" in printed
        assert "latents     4x4x4, posterior, float16\ncomputed    in " in printed and f"folder      {out}\n" in printed
        names = {}
        exec(printed[printed.index("from diffusers_vae") :], names)
        vae = VAE.from_pretrained(run / "model").eval()
        train, _ = load_data(DataConfig(resolution=8))
        with torch.no_grad():
            expected = vae.encode(train.pixels[:64] / 127.5 - 1).latent_dist.mean
        atol = 1e-3 if fast_dtype(vae.device) == torch.float32 else 0.05
        assert torch.allclose(names["latents"].latents(range(64)), expected, atol=atol)
        assert torch.equal(names["latents"].labels, train.labels)
        assert names["latents"].weights_hash == weights_hash(vae)
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.*")}
        assert call(capsys, "encode", "digits", "--vae", run, "--out", out, "--dtype", "float16")[0] == 0
        assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.*")}
        code, _, error = call(capsys, "encode", "digits", "--vae", run, "--out", out, "--split", "held-out")
        assert code == 1 and "dtype: float16 there, float32 here" in error and "data.images: 1617 there" in error

    @pytest.mark.slow
    def test_latents_are_computed_in_the_precision_asked_for(self, run, capsys, tmp_path):
        for name, arguments in (("float32", []), ("bfloat16", ["--batch_size", "7"])):
            arguments += ["--out", tmp_path / name, "--compute_dtype", name]
            code, printed, _ = call(capsys, "encode", "digits", "--vae", run, *arguments)
            assert code == 0 and f"computed    in {name} on cpu\n" in printed
        one, other = (LatentDataset(tmp_path / name).latents(range(64)) for name in ("float32", "bfloat16"))
        assert not torch.equal(one, other) and torch.allclose(one, other, atol=0.05)

    @pytest.mark.slow
    def test_a_folder_is_encoded_by_a_model_of_no_run(self, capsys, tmp_path):
        """All images of a folder without parts, at the model's size, with captions; those left out are counted."""
        tiny_vae(3, sample_size=16).save_pretrained(tmp_path / "model")
        (tmp_path / "images").mkdir()
        for index in range(12):
            Image.new("RGB", (20, 16), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
            (tmp_path / "images" / f"{index}.txt").write_text(f"number {index}")
        (tmp_path / "images" / "3.png").write_bytes(b"no image")
        arguments = ["--vae", tmp_path / "model", "--data.on_bad_image", "skip", "--kind", "mode", "--batch_size", 5]
        code, printed, _ = call(capsys, "encode", tmp_path / "images", "--out", tmp_path / "out", *arguments)
        assert code == 0 and "images      11 of images, all\n" in printed, printed
        assert "left out    1 that cannot be read\n" in printed and "latents     4x8x8, mode, float32\n" in printed
        latents = LatentDataset(tmp_path / "out")
        assert sorted(latents.captions) == sorted((f"number {index}",) for index in range(12) if index != 3)
        (tmp_path / "images" / "5.txt").unlink()
        code, _, error = call(capsys, "encode", tmp_path / "images", "--out", tmp_path / "more", *arguments)
        assert code == 1 and "5.png has no caption, and others have one" in error
        arguments += ["--captions", "false"]
        assert call(capsys, "encode", tmp_path / "images", "--out", tmp_path / "more", *arguments)[0] == 0
        assert LatentDataset(tmp_path / "more").captions is None

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (
                ["nowhere"],
                1,
                "DATA must be digits, mnist, qmnist, fashion-mnist, cifar10, a folder or archive of images, an array",
            ),
            (["digits", "--data.channels", "3"], 1, "takes images of 1 channels, got 3"),
            (["digits", "--data.resolution", "17"], 1, "must be divisible by 2"),
            (["digits", "--kind", "mean"], 2, "kind"),
            (["digits", "--dtype", "float64"], 2, "dtype"),
            (["digits", "--batch_size", "0"], 2, "batch_size"),
            (
                ["digits", "--device", "abacus"],
                1,
                "--device must be one that torch can use on this machine, got abacus",
            ),
        ],
    )
    def test_arguments_that_do_not_fit_are_refused(self, arguments, code, message, run, capsys, tmp_path):
        found, _, error = call(capsys, "encode", "--vae", run, "--out", tmp_path / "out", *arguments)
        assert found == code and message in error and not list((tmp_path / "out").rglob("*.*[!k]"))

    @pytest.mark.slow
    def test_two_processes_write_the_files_of_one(self, run, tmp_path):
        for processes in (1, 2):
            arguments = ["encode", "digits", "--vae", run, "--out", tmp_path / str(processes), "--shard_images", 300]
            log = tmp_path / f"log-{processes}"
            printed = run_forked(command, *map(str, arguments), log=log, processes=processes)
            assert printed.count("images      1,617") == 1
        names = sorted(path.name for path in (tmp_path / "1").glob("*.*") if path.name != ".lock")
        assert len(names) == 7
        for name in names:
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

    @pytest.mark.slow
    def test_an_error_in_one_process_ends_both(self, tmp_path):
        """A file that only the second reads, of a set that is read on demand; what was finished is kept."""
        tiny_vae(1, sample_size=16).save_pretrained(tmp_path / "model")
        (tmp_path / "images").mkdir()
        for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        data = DataConfig(name="folder", root=str(tmp_path / "images"), resolution=16)
        victim = paths_of(load_split(data, "all", memory_limit=0)[0])[33]
        whole = victim.read_bytes()
        victim.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))  # of the same size
        arguments = ["encode", tmp_path / "images", "--vae", tmp_path / "model", "--out", tmp_path / "out"]
        arguments += ["--shard_images", 10, "--data.crops", "random"]  # a set whose images are read on demand
        work = partial(command, *map(str, arguments))
        launch = Launch(work, tmp_path / "log", processes=2)
        assert launch.wait() == [1, 1], launch.output()
        assert launch.output().count(f"error: cannot read the image {victim}") == 2, launch.output()
        kept = [(path.name, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").glob("shard*"))]
        assert [name for name, _ in kept] == [f"shard-0000{number}.safetensors" for number in range(3)]
        victim.write_bytes(whole)
        run_forked(work, log=tmp_path / "log", processes=2)
        assert len(LatentDataset(tmp_path / "out")) == 40
        assert kept == [(name, (tmp_path / "out" / name).stat().st_mtime_ns) for name, _ in kept]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_too_little_memory_are_told_from_others(error, expected):
    """Whichever library found none."""
    assert out_of_memory(error) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "again", "out"),
    [
        (["evaluate", "RUN", "--evaluation.max_images", 5], ["--evaluation.max_images", 6], ""),
        (["compare", "RUN", "RUN", "--evaluation.max_images", 5], ["--evaluation.max_images", 6], ""),
        (["sample", "RUN"], ["--seed", 1], "samples.png"),
        (["data", "digits", "--max_images", 100], ["--max_images", 99], "sheet.png"),
        (["reconstruct", "RUN", "IMAGE"], ["--seed", 1], ""),
        (["encode", "digits", "--vae", "RUN", "--split", "held-out"], ["--out", "OTHER"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_full_disk_is_named_and_leaves_older_results_whole(
    command, again, out, finished_mlp_run, small_disk, tmp_path, capsys
):
    """Once there is room, the same command succeeds."""
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "image.png")
    names = {"RUN": finished_mlp_run, "IMAGE": tmp_path / "image.png", "OTHER": small_disk / "other"}
    command, again = ([names.get(word, word) for word in words] for words in (command, again))
    folder = small_disk / "out"
    command += ["--out", folder / out]
    assert call(capsys, *command)[0] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    filler = filled(small_disk)
    code, _, error = call(capsys, *command, *again)
    place = small_disk / "other" if "--out" in again else folder
    assert code == 1 and f"cannot write {place}" in error and "No space left on device" in error, error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    filler.unlink()
    assert call(capsys, *command, *again)[0] == 0
    assert not list(small_disk.rglob("*.partial"))


class TestOthers:
    @pytest.mark.slow
    def test_compare(self, run, capsys, tmp_path):
        """The model in a run is found to be of that run, with its settings."""
        code, out, _ = call(capsys, "compare", run / "model", run, "--out", tmp_path)
        assert code == 0 and "in 0 % of images" in out
        comparison = json.loads((tmp_path / "comparison.json").read_text())
        assert comparison["differences"]["psnr"]["mean"] == 0
        of_run = json.loads((run / "evaluation.json").read_text())
        for name in ("psnr", "protocol", "density"):
            assert_same(comparison["first"][name], of_run[name], name)
        assert Image.open(tmp_path / "comparison.png").width > 100

    @pytest.mark.slow
    def test_compare_says_which_is_better(self, run, capsys, tmp_path):
        shutil.copytree(run, tmp_path / "worse")
        worse = VAE.from_pretrained(run / "model")
        with torch.no_grad():
            worse.decoder.conv_out.bias += 0.5
        worse.save_pretrained(tmp_path / "worse" / "model")
        code, out, _ = call(capsys, "compare", run, tmp_path / "worse", "--out", tmp_path / "out")
        assert code == 0 and "first: small-vae\nsecond: worse" in out
        assert "180 images of digits, split held-out, at 8x8, 1 channel." in out and "second minus first" in out
        comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
        psnr = comparison["differences"]["psnr"]
        assert psnr["mean"] < 0 and psnr["interval"][1] < 0 and psnr["second_is_better"] < 0.5

    def runs_on_folders(self, run, folder, cifar_folder, **settings):
        """Two models with the weights of `run`, the second a little worse, and a config.yaml each, made of `settings`,
        which names one of DataConfig and one of ObjectiveConfig with a value for each; and a folder of other images.
        """
        for name, count in (("ship", 20), ("frog", 6)):
            copy_images(cifar_folder / "test" / name, folder / name, count)
        for place, name in enumerate(("one", "two")):
            vae = VAE.from_pretrained(run / "model")
            with torch.no_grad():
                vae.decoder.conv_out.bias += 0.1 * place
            vae.save_pretrained(folder / name / "model")
            config = tiny(folder / name, TINY_VAE)
            chosen = {setting: values[place] for setting, values in settings.items()}
            data = {"name": "folder", "root": str(folder / "ship"), "resolution": 8, "channels": 1}
            data["crops"] = chosen.get("crops")
            objective = ObjectiveConfig(scale=chosen.get("scale", 0.5))
            dataclasses.replace(config, data=DataConfig(**data), objective=objective).save(
                folder / name / "config.yaml"
            )
        return folder / "one", folder / "two"

    @pytest.mark.slow
    def test_compare_is_of_the_same_images_in_either_order(self, run, capsys, tmp_path, cifar_folder):
        """Though one of the runs has `crops`, which are of its own set; differences are negated."""
        models = self.runs_on_folders(run, tmp_path, cifar_folder, crops=(4, None))
        found = []
        for pair in (models, models[::-1]):
            frogs = ["--data", tmp_path / "frog", "--data.channels", 1, "--out", tmp_path / "out"]
            code, out, _ = call(capsys, "compare", *pair, *frogs)
            assert code == 0 and f"first: {pair[0].name}\nsecond: {pair[1].name}" in out
            found.append(json.loads((tmp_path / "out" / "comparison.json").read_text()))
        one, other = found
        assert one["first"]["protocol"] == other["first"]["protocol"] and one["first"]["images"] == 6
        for name, difference in one["differences"].items():
            assert difference["mean"] == pytest.approx(-other["differences"][name]["mean"]), name
        assert one["differences"]["psnr"]["mean"] != 0

    @pytest.mark.slow
    def test_compare_refuses_runs_that_differ_in_what_no_flag_gives(self, run, capsys, tmp_path, cifar_folder):
        models = self.runs_on_folders(run, tmp_path, cifar_folder, crops=(2, None), scale=(0.5, 0.25))
        one, two = models
        for pair in (models, models[::-1]):
            code, _, error = call(capsys, "compare", *pair, "--out", tmp_path / "out")
            assert code == 1 and "give --data.crops VALUE --objective.scale VALUE, since" in error
            scales = {one: 0.5, two: 0.25}
            shown = f"objective.scale is {scales[pair[0]]} for {pair[0]} and {scales[pair[1]]} for {pair[1]}"
            assert shown in error and "data.crops is " in error
        flags = ["--data.crops", 1, "--objective.scale", 0.5, "--evaluation.max_images", 2]
        assert call(capsys, "compare", *models, *flags, "--out", tmp_path / "out")[0] == 0
        code, _, error = call(capsys, "compare", one, run, "--out", tmp_path / "out")  # digits
        assert code == 1 and "name them with --data, since the run of" in error

    @pytest.mark.slow
    def test_compare_refuses_runs_that_learned_different_scales(self, run, capsys, tmp_path, cifar_folder):
        models = self.runs_on_folders(run, tmp_path, cifar_folder, crops=(None, None), scale=("learned", "learned"))
        report = json.loads((run / "evaluation.json").read_text())
        for model, scale in zip(models, (0.5, 0.25), strict=True):
            write_report(model, report | {"scale": scale})
        code, _, error = call(capsys, "compare", *models, "--out", tmp_path / "out")
        assert code == 1 and "give --objective.scale VALUE, since objective.scale learned is 0.5 for" in error
        same = ["--evaluation.max_images", 2, "--out", tmp_path / "out"]
        assert call(capsys, "compare", models[0], models[0], *same)[0] == 0
        comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert comparison["first"]["scale"] == 0.5

    @pytest.mark.slow
    def test_compare_takes_the_settings_of_the_only_run_wherever_it_stands(self, run, capsys, tmp_path):
        tiny_vae(sample_size=16).save_pretrained(tmp_path / "other")
        few = ["--evaluation.max_images", 3, "--out", tmp_path / "out"]
        for pair in ((tmp_path / "other", run), (run, tmp_path / "other")):
            assert call(capsys, "compare", *pair, *few)[0] == 0
            protocol = json.loads((tmp_path / "out" / "comparison.json").read_text())["first"]["protocol"]
            assert (protocol["data"], protocol["split"], protocol["resolution"]) == ("digits", "held-out", [8, 8])

    @pytest.mark.slow
    def test_compare_refuses_a_model_before_it_measures_another(self, run, capsys, tmp_path):
        tiny_vae(3).save_pretrained(tmp_path / "rgb")
        code, _, error = call(capsys, "compare", run, tmp_path / "rgb", "--out", tmp_path / "out")
        assert code == 1 and error.startswith("error: rgb: the model takes images of 3 channels")

    def test_what_is_no_folder_of_images_and_no_picture(self, run, capsys, tmp_path):
        code, _, error = call(capsys, "reconstruct", run, tmp_path, "--out", tmp_path / "out")
        assert code == 1 and f"no image below {tmp_path}: none of" in error
        code, _, error = call(capsys, "sample", run, "--out", tmp_path / "a.txt")
        assert code == 1 and "--out must be a picture" in error and not (tmp_path / "a.txt").exists()

    @pytest.mark.slow
    def test_reconstruct_does_not_write_over_what_it_reads(self, run, capsys, tmp_path):
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
        before = (tmp_path / "a.png").read_bytes()
        code, _, error = call(capsys, "reconstruct", run, tmp_path, "--out", tmp_path)
        assert code == 1 and "--out must be another folder" in error and (tmp_path / "a.png").read_bytes() == before

    def test_reconstruct_keeps_sizes_and_goes_on_after_a_bad_file(self, run, capsys, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 13), dtype=np.uint8)
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            Image.fromarray(pixels).save(tmp_path / folder / "odd.png")
        (tmp_path / "a" / "bad.png").write_bytes(b"no image")
        (tmp_path / "a" / "folder.png").mkdir()
        code, out, error = call(capsys, "reconstruct", run, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
        assert code == 1 and "1 of 3 images" in error and "bad.png" in error
        files = sorted((tmp_path / "out").iterdir())
        pictures = [Image.open(file) for file in files]
        assert [(picture.size, picture.mode) for picture in pictures] == [((13, 9), "L")] * 2
        assert out.count("PSNR") == 2
        code, _, error = call(capsys, "reconstruct", run, tmp_path / "none.png")
        assert code == 1 and error == f"error: there is no image {tmp_path / 'none.png'}\n"

    def test_reconstruct_from_python_is_the_command(self, run, capsys, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 13), dtype=np.uint8)
        (tmp_path / "images").mkdir()
        Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
        (tmp_path / "images" / "b.png").write_bytes(b"no image")
        call(capsys, "reconstruct", run, tmp_path / "images", "--out", tmp_path / "command")
        found = reconstruct_files(load_autoencoder(str(run)), image_files([tmp_path / "images"]), tmp_path / "python")
        path, figure = next(found)
        with pytest.raises(ValueError, match=r"1 of 2 images could not be reconstructed:\n.*b\.png"):
            next(found)
        assert path.read_bytes() == (tmp_path / "command" / "a.png").read_bytes()
        images, written = (to_model_range(torch.from_numpy(np.array(Image.open(file)))[None, None]) for file in (
            tmp_path / "images" / "a.png", path))  # fmt: skip
        assert figure == pytest.approx(psnr(images, written).item(), abs=1e-4)

    def test_reconstruct_is_what_the_model_gives(self, run, capsys, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        assert call(capsys, "reconstruct", run, tmp_path / "image.png", "--out", tmp_path / "out")[0] == 0
        vae = AutoencoderKL.from_pretrained(run / "model")
        with torch.no_grad():
            sample = vae(torch.from_numpy(pixels)[None, None] / 127.5 - 1).sample
        expected = ((sample[0, 0] + 1) / 2).clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
        found = np.asarray(Image.open(tmp_path / "out" / "image.png").convert("L"))
        assert np.abs(found.astype(int) - expected).max() <= 1  # a sum that was rounded otherwise may be on the edge
        assert found.std() > 1

    @pytest.mark.slow
    def test_sample_repeats(self, run, capsys, tmp_path):
        for name in ("one", "two"):
            assert call(capsys, "sample", run, "--count", 3, "--out", tmp_path / f"{name}.png")[0] == 0
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()

    def test_info_shows_weights_and_quality_of_a_run(self, run, capsys):
        code, out, _ = call(capsys, "info", run)
        report = json.loads((run / "evaluation.json").read_text())
        assert code == 0 and report["model"]["weights_sha256"] in out and f"{report['psnr']:.4f}" in out

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["evaluation.json", "config.yaml"])
    @pytest.mark.parametrize("text", ["", "[]", "{}", "a: [", "data: 3"])
    def test_damaged_files_are_named_in_one_line(self, name, text, run, capsys, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / name).write_text(text)
        reader = "info" if name == "evaluation.json" else "evaluate"
        for words in (["push", tmp_path / "run", "me/model"], [reader, tmp_path / "run"]):
            code, _, error = call(capsys, *words)
            assert code == 1 and error.count("\n") == 1 and str(tmp_path / "run" / name) in error, (words, error)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (["psnr"], "high", "report.psnr must be of the type number, got 'high'"),
            (["psnr"], None, "report.psnr must be of the type number, got None"),
            (["model"], [], "report.model must be of the type object"),
            (["model", "latent_shape"], 4, "report.model.latent_shape must be of the type array"),
            (["model", "latent_shape"], [4, 4], "a latent_shape must have 3 entries"),
            (["intervals", "psnr"], ["a", "b"], "report.intervals[psnr][0] must be of the type number"),
            (["posterior", "rate_per_channel"], {}, "report.posterior.rate_per_channel must be of the type array"),
            (["images"], 1.5, "report.images must be of the type integer, got 1.5"),
        ],
    )
    def test_wrong_types_in_a_report_are_named(self, place, value, message, run, capsys, tmp_path):
        """In one line, by all that read it."""
        shutil.copytree(run, tmp_path / "run")
        path = tmp_path / "run" / "evaluation.json"
        report = json.loads(path.read_text())
        *outer, last = place
        part = report
        for key in outer:
            part = part[key]
        part[last] = value
        write_report(tmp_path / "run", report)
        for words in (["info", tmp_path / "run"], ["push", tmp_path / "run", "me/model"]):
            code, _, error = call(capsys, *words)
            assert code == 1 and error.count("\n") == 1, error
            assert f"{path} is damaged" in error and message in error, error

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("section", "changed", "message"),
        [
            ("data", {"name": ...}, ".data lacks name"),
            ("data", {"root": ...}, ".data lacks root"),
            ("data", {"heldout_fraction": "all"}, ".data.heldout_fraction must be of the type number"),
            ("objective", {"scale": ...}, ".objective lacks scale"),
            ("data", {"resolution": "large"}, "data.resolution"),
            ("data", {"resolution": None}, "data.resolution must have a value, got null"),
            ("data", {"pixels": 5}, "does not accept option 'pixels'"),
            ("data", {"buckets": 16}, "data.buckets was removed, got 16: train on data.crops"),
            ("evaluation", {"batch_size": None}, "evaluation.batch_size must have a value, got null"),
            ("run", {"device_batch_size": "auto"}, "run.device_batch_size was removed, got auto: set run.gradient_acc"),
        ],
    )
    def test_wrong_settings_of_a_run_are_named_with_its_file(self, section, changed, message, run, capsys, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        file = tmp_path / "run" / "config.yaml"
        settings = yaml.safe_load(file.read_text())
        settings[section] = {name: value for name, value in (settings[section] | changed).items() if value is not ...}
        file.write_text(yaml.safe_dump(settings))
        commands = [["evaluate", tmp_path / "run"], ["compare", tmp_path / "run", run]]
        commands += [["encode", "digits", "--vae", tmp_path / "run"]] * (section != "evaluation")
        for words in commands:
            code, _, error = call(capsys, *words, "--out", tmp_path / "out")
            assert code in (1, 2) and message in error and str(file) in error, error
            assert "--debug" not in error and not (tmp_path / "out" / "evaluation.json").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("changed", [{"name": ...}, {"resolution": None}])
    def test_push_names_a_config_of_which_no_card_can_be_made(self, changed, run, capsys, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        file = tmp_path / "run" / "config.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["data"] = {name: value for name, value in (settings["data"] | changed).items() if value is not ...}
        file.write_text(yaml.safe_dump(settings))
        code, _, error = call(capsys, "push", tmp_path / "run", "me/model")
        assert code == 1 and f"error: {file} is damaged: no model card can be made of it" in error, error

    def test_info_shows_a_model_without_a_scaling_factor(self, capsys, tmp_path):
        tiny_vae(3, scaling_factor=None).save_pretrained(tmp_path)
        code, out, error = call(capsys, "info", tmp_path)
        assert code == 0 and "scaled latents  unknown: scaling_factor None was not measured or published" in out, error

    @pytest.mark.slow
    def test_settings_of_the_hub_are_those_of_the_run(self, hub, run, capsys, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["hub"] |= {"license": "mit", "revision": "123", "private": True, "commit_message": "it's: done"}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
        code, out, _ = call(capsys, "push", tmp_path / "run", REPO, "--license", "apache-2.0")
        assert code == 0 and out == f"published   {hub.url}/{REPO}/tree/123\n"
        repo = hub.repos[REPO]
        assert repo.private and repo.refs.keys() == {"main", "123"} and repo.at("123").message == "it's: done"
        assert b"license: apache-2.0" in hub.files(REPO, "123")["README.md"]

    @pytest.mark.slow
    def test_a_model_of_no_run_needs_to_be_told_on_what(self, capsys, tmp_path):
        tiny_vae(3).save_pretrained(tmp_path)
        code, _, error = call(capsys, "evaluate", tmp_path)
        assert code == 2 and "name the images with --data" in error

    def test_push_refuses_what_is_no_run(self, capsys, tmp_path):
        code, _, error = call(capsys, "push", tmp_path, "me/model")
        assert code == 1 and "must be finished" in error

    def test_train_prints_what_it_made(self, run):
        printed = (run.parent / "printed.txt").read_text()
        assert "load it     from diffusers import AutoencoderKL" in printed
        assert (run / "README.md").exists() and (run / "report.html").exists()

    def test_train_names_wrong_settings(self, capsys):
        assert call(capsys, "train", "--run.epochs", "0")[0] == 2
