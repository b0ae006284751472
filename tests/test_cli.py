"""The command line, on a small trained run, as people call it: with wrong input too."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from support.files import paths_of
from support.models import tiny_vae
from support.runs import tiny

from diffusers_vae import MLPVAE, VAE, LatentDataset, cli
from diffusers_vae.data import DataConfig, load_data, load_split
from diffusers_vae.evaluation import EvaluationReport
from diffusers_vae.hub import HubConfig
from diffusers_vae.models import ModelConfig, fast_dtype, weights_hash
from diffusers_vae.trainer import train

ROOT = Path(__file__).parents[1]
SMALL = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on 16x16 digits, of which 20 held-out images were measured."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = tiny(folder, SMALL, max_images=64)
    train(config)
    return folder


def call(capsys, *arguments):
    """Exit code, and what was printed to stdout and to stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


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
        told = {"evaluate": "Draws from the posterior per image", "compare": "Draws from the posterior per image"}
        told |= {
            "data": "are decoded",
            "push": "Visible to its owners only",
            "train": "Passes over the training images",
        }
        told |= {"train-text-to-image": "Share of images that are seen with the empty prompt"}
        assert told.get(name, "Where in a repository the model lies") in " ".join(out.split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["foo"], "foo is no command; there are train, train-text-to-image, data"),
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
    def test_wrong_arguments(self, arguments, message, capsys):
        code, _, error = call(capsys, *arguments)
        assert code == 2 and message in error and "Traceback" not in error

    def test_an_autoencoder_that_is_not_there(self, capsys, tmp_path):
        """Nor is it looked for on the Hub."""
        missing = tmp_path / "none"
        for arguments, begin in (
            (["train-text-to-image", "--vae", missing, "--run.output_dir", tmp_path / "run"], "vae.source: "),
            (["evaluate", missing, "--data", "digits"], ""),
        ):
            code, out, error = call(capsys, *arguments)
            assert code == 1 and out == "" and f"{begin}there is no file or folder {missing}" in error

    def test_errors_are_one_line_unless_debug_is_asked_for(self, capsys, tmp_path):
        code, out, error = call(capsys, "evaluate", tmp_path)
        assert code == 1 and out == ""
        assert error.startswith(f"error: {tmp_path} holds no model") and error.count("\n") == 1
        with pytest.raises(FileNotFoundError):
            cli.main(["evaluate", str(tmp_path), "--debug"])

    def test_a_bug_says_its_kind(self, capsys, monkeypatch, run):
        monkeypatch.setattr("diffusers_vae.commands.load_autoencoder", lambda *arguments: [][0])
        code, _, error = call(capsys, "info", run)
        assert code == 1 and error == "error: IndexError: list index out of range (--debug shows where)\n"

    @pytest.mark.slow
    def test_a_reader_who_has_seen_enough(self, run):
        command = f"{sys.executable} -m diffusers_vae.cli info {run} | head -c 1"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


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
        {"name": "folder", "root": "photos", "buckets": 8, "horizontal_flip": True, "color_jitter": [0.1, 0, 0, 0]},
        {"name": "array", "root": "a.npz", "image_column": "images", "vertical_flip": True, "crops": 3},
    ],
)
def test_a_run_on_other_images_than_it_was_trained_on(of_its_own, run, tmp_path, capsys):
    """What its own set had, and how it was trained on, is not asked of others."""
    shutil.copytree(run, tmp_path / "run")
    stated = yaml.safe_load((run / "config.yaml").read_text())
    stated["data"] |= of_its_own
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stated))
    code, out, _ = call(
        capsys,
        "evaluate",
        tmp_path / "run",
        "--data",
        "digits",
        "--out",
        tmp_path / "out",
        "--evaluation.max_images",
        8,
    )
    assert code == 0 and "PSNR" in out


class TestEvaluate:
    def test_a_run_is_measured_on_its_held_out_images(self, run, capsys, tmp_path):
        code, out, _ = call(capsys, "evaluate", run, "--out", tmp_path)
        assert code == 0 and "PSNR" in out and "95 % interval" in out
        report = EvaluationReport.from_json((tmp_path / "evaluation.json").read_text())
        of_run = EvaluationReport.from_json((run / "evaluation.json").read_text())
        assert report == of_run  # settings, images, seed: all as in the run
        assert (tmp_path / "evaluation.csv").read_text() == (run / "evaluation.csv").read_text()
        assert {path.stem for path in (tmp_path / "pictures").iterdir()} >= {"reconstructions", "rates", "traversals"}
        assert "data:image/png" in (tmp_path / "report.html").read_text()
        again = call(capsys, "evaluate", run / "model", "--out", tmp_path / "again")
        assert again[0] == 0
        report = EvaluationReport.from_json((tmp_path / "again" / "evaluation.json").read_text())
        assert report.psnr == of_run.psnr and report.protocol == of_run.protocol

    @pytest.mark.slow
    def test_settings_override_those_of_the_run(self, run, capsys, tmp_path):
        arguments = ["--evaluation.draws", 2, "--evaluation.max_images", 5, "--split", "training"]
        assert call(capsys, "evaluate", run, "--out", tmp_path, *arguments)[0] == 0
        report = EvaluationReport.from_json((tmp_path / "evaluation.json").read_text())
        assert (report.images, report.protocol.draws, report.protocol.split) == (5, 2, "training")
        assert report.importance_weighted_bound > -1e9

    @pytest.mark.slow
    def test_a_stock_model_on_a_folder(self, capsys, tmp_path, cifar_folder):
        """Channels and resolution are the model's; a folder without parts is measured whole."""
        tiny_vae(3, sample_size=16).to_diffusers().save_pretrained(tmp_path / "vae")
        shutil.copytree(cifar_folder / "test" / "ship", tmp_path / "ships")
        (tmp_path / "pipeline").mkdir()
        shutil.move(tmp_path / "vae", tmp_path / "pipeline" / "vae")
        arguments = ["evaluate", tmp_path / "pipeline", f"--data={tmp_path / 'ships'}", "--out", tmp_path / "out"]
        assert call(capsys, *arguments)[0] == 0
        report = EvaluationReport.from_json((tmp_path / "out" / "evaluation.json").read_text())
        assert report.images == 106 and report.protocol.split == "all" and report.protocol.data == "ships"
        assert report.protocol.resolution == [16, 16] and report.protocol.channels == 3
        assert report.model.name == "pipeline"

    @pytest.mark.slow
    @pytest.mark.slow
    def test_a_run_on_a_folder_is_measured_on_what_it_was_not_trained_on(self, capsys, tmp_path, cifar_folder):
        folders = [tmp_path / name for name in ("ships", "frogs")]
        for folder in folders:
            shutil.copytree(cifar_folder / "test" / folder.name[:-1], folder)
        data = DataConfig(name="folder", root=str(folders[0]), resolution=8)
        config = dataclasses.replace(tiny(tmp_path / "run", SMALL, max_images=30), data=data)
        train(config)
        for folder, split, count in ((folders[0], "held-out", 11), (folders[1], "all", 112)):
            assert call(capsys, "evaluate", tmp_path / "run", "--data", folder, "--out", tmp_path / "out")[0] == 0
            protocol = EvaluationReport.from_json((tmp_path / "out" / "evaluation.json").read_text()).protocol
            assert (protocol.split, protocol.images, protocol.data) == (split, count, folder.name)
        tiny_vae().save_pretrained(tmp_path / "other")  # which the second of two was trained on
        (tmp_path / "link").symlink_to(folders[0])
        arguments = ["--data", f"{tmp_path / 'link'}/", "--data.resolution", 8, "--out", tmp_path / "both"]
        assert call(capsys, "compare", tmp_path / "other", tmp_path / "run", *arguments)[0] == 0
        comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
        assert comparison["first"]["protocol"]["split"] == "held-out"
        arguments += ["--data.heldout_fraction", 0.3]
        code, _, error = call(capsys, "compare", tmp_path / "other", tmp_path / "run", *arguments)
        assert code == 1 and "data.heldout_fraction must be that of the training" in error

    @pytest.mark.slow
    def test_half_precision(self, run, capsys, tmp_path):
        assert call(capsys, "evaluate", run, "--out", tmp_path, "--dtype", "bfloat16")[0] == 0
        assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["dtype"] == "bfloat16"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "nowhere"], "which is not there"),
            (["--evaluation.lpips", '["alex"]', "--evaluation.weights", "."], "put alexnet-owt-7be5be79.pth into"),
            (["--data.channels", "3"], "takes images of 1 channels, got 3"),
            (["--data.resolution", "17"], "must be divisible by 2"),
            (["--out", ROOT / "README.md"], "README.md"),
            (["--device", "abacus"], "--device must be one that torch can use here, got abacus"),
        ],
    )
    def test_what_does_not_fit(self, arguments, message, run, capsys, tmp_path):
        code, _, error = call(capsys, "evaluate", run, "--out", tmp_path / "out", *arguments)
        assert code == 1 and message in error and not list((tmp_path / "out").rglob("*.*"))

    @pytest.mark.slow
    def test_two_processes_write_the_report_of_one(self, run, tmp_path):
        for processes in (1, 2):
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
            launch += ["--multi_gpu"] * (processes > 1)
            arguments = ["evaluate", str(run), "--out", str(tmp_path / str(processes)), "--evaluation.draws", "3"]
            arguments += ["--evaluation.batch_size", "7", "--evaluation.fp16", "true"]  # 26 batches, the last of 5
            done = subprocess.run(
                [*launch, "-m", "diffusers_vae.cli", *arguments], capture_output=True, text=True, cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        for name in ("evaluation.json", "evaluation.csv"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


class TestFp16:
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
        assert code == 0 and f"was false already in {config}" in out and config.read_bytes() == after[config]

    def test_another_programs_config_keeps_its_order(self, capsys, tmp_path):
        tiny_vae(sample_size=16).to_diffusers().save_pretrained(tmp_path / "pipeline" / "vae")
        file = tmp_path / "pipeline" / "vae" / "config.json"
        config = dict(reversed(json.loads(file.read_text()).items())) | {"unknown": [1e-7, "ü"]}
        del config["force_upcast"]  # as in the oldest ones, where it is true
        file.write_text(json.dumps(config))
        arguments = ["--data", "digits", "--max_images", 20, "--write", "true"]
        assert call(capsys, "fp16", tmp_path / "pipeline", *arguments)[0] == 0
        assert list(json.loads(file.read_text()).items()) == [*config.items(), ("force_upcast", False)]

    def test_what_is_not_safe_is_left_alone(self, capsys, tmp_path):
        vae = tiny_vae(sample_size=16)
        with torch.no_grad():
            vae.decoder.up_blocks[0].resnets[0].conv1.bias.fill_(1e5)
        vae.save_pretrained(tmp_path)
        before = (tmp_path / "config.json").read_bytes()
        code, out, error = call(capsys, "fp16", tmp_path, "--data", "digits", "--max_images", 20, "--write", "true")
        assert code == 1 and "Float16 overflows in decoder.up_blocks.0: keep force_upcast true." in out
        assert error.endswith(
            "config.json is left as it is. Float16 overflows in decoder.up_blocks.0: keep force_upcast true.\n"
        )
        assert (tmp_path / "config.json").read_bytes() == before
        assert call(capsys, "fp16", tmp_path, "--data", "digits", "--max_images", 20)[0] == 0

    def test_a_class_without_the_setting(self, capsys, tmp_path):
        MLPVAE(16, latent_dim=2).save_pretrained(tmp_path)
        code, out, error = call(capsys, "fp16", tmp_path, "--data", "digits", "--max_images", 20, "--write", "true")
        assert code == 1 and out == "" and "MLPVAE does not have" in error

    @pytest.mark.slow
    def test_a_repository_is_not_written_to(self, tmp_path):
        repository = tmp_path / "hub" / "models--me--vae"
        tiny_vae(sample_size=16).save_pretrained(repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        done = subprocess.run(
            [sys.executable, "-m", "diffusers_vae.cli", "fp16", "me/vae", "--data", "digits", "--write", "true"],
            capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 1 and "and me/vae is a repository" in done.stderr and done.stdout == ""


class TestEncode:
    def test_the_training_images_of_a_run(self, run, capsys, tmp_path):
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

    def test_precision(self, run, capsys, tmp_path):
        for name, arguments in (("float32", []), ("bfloat16", ["--batch_size", "7"])):
            arguments += ["--out", tmp_path / name, "--compute_dtype", name]
            code, printed, _ = call(capsys, "encode", "digits", "--vae", run, *arguments)
            assert code == 0 and f"computed    in {name} on cpu\n" in printed
        one, other = (LatentDataset(tmp_path / name).latents(range(64)) for name in ("float32", "bfloat16"))
        assert not torch.equal(one, other) and torch.allclose(one, other, atol=0.05)

    def test_a_folder_and_a_model_of_no_run(self, capsys, tmp_path):
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
            (["digits", "--device", "abacus"], 1, "--device must be one that torch can use here, got abacus"),
        ],
    )
    def test_what_does_not_fit(self, arguments, code, message, run, capsys, tmp_path):
        found, _, error = call(capsys, "encode", "--vae", run, "--out", tmp_path / "out", *arguments)
        assert found == code and message in error and not list((tmp_path / "out").rglob("*.*[!k]"))

    @pytest.mark.slow
    def test_two_processes_write_the_files_of_one(self, run, tmp_path):
        for processes in (1, 2):
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
            launch += ["--multi_gpu"] * (processes > 1)
            arguments = ["encode", "digits", "--vae", str(run), "--out", str(tmp_path / str(processes))]
            done = subprocess.run(
                [*launch, "-m", "diffusers_vae.cli", *arguments, "--shard_images", "300"],
                capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("images      1,617") == 1
        names = sorted(path.name for path in (tmp_path / "1").glob("*.*") if path.name != ".lock")
        assert len(names) == 7
        for name in names:
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

    @pytest.mark.slow
    def test_an_error_in_one_process_ends_both(self, capsys, tmp_path):
        """A file that only the second reads, of a set that is read on demand; what was finished is kept."""
        tiny_vae(1, sample_size=16).save_pretrained(tmp_path / "model")
        (tmp_path / "images").mkdir()
        for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\n"
            "from diffusers_vae import cli\n"
            "from diffusers_vae.data import sources\n"
            "sources.MEMORY_LIMIT = 0\n"
            "sys.exit(cli.main())\n"
        )
        everything, _ = load_split(DataConfig(name="folder", root=str(tmp_path / "images"), resolution=16), "all")
        victim = paths_of(everything)[33]
        whole = victim.read_bytes()
        victim.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))  # of the same size
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", script]
        arguments = ["encode", tmp_path / "images", "--vae", tmp_path / "model", "--out", tmp_path / "out"]
        arguments = [str(argument) for argument in [*launch, *arguments, "--shard_images", 10]]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode != 0 and done.stderr.count(f"error: cannot read the image {victim}") == 2, done.stderr
        kept = [(path.name, path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").glob("shard*"))]
        assert [name for name, _ in kept] == [f"shard-0000{number}.safetensors" for number in range(3)]
        victim.write_bytes(whole)
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(LatentDataset(tmp_path / "out")) == 40
        assert kept == [(name, (tmp_path / "out" / name).stat().st_mtime_ns) for name, _ in kept]


class TestOthers:
    def test_compare(self, run, capsys, tmp_path):
        code, out, _ = call(capsys, "compare", run, run / "model", "--out", tmp_path)
        assert code == 0 and "in 0 % of images" in out
        comparison = json.loads((tmp_path / "comparison.json").read_text())
        assert comparison["differences"]["psnr"]["mean"] == 0
        assert Image.open(tmp_path / "comparison.png").width > 100

    def test_compare_says_which_is_better(self, run, capsys, tmp_path):
        shutil.copytree(run, tmp_path / "worse")
        worse = VAE.from_pretrained(run / "model")
        with torch.no_grad():
            worse.decoder.conv_out.bias += 0.5
        worse.save_pretrained(tmp_path / "worse" / "model")
        code, out, _ = call(capsys, "compare", run, tmp_path / "worse", "--out", tmp_path / "out")
        assert code == 0 and "first: small\nsecond: worse" in out
        comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
        psnr = comparison["differences"]["psnr"]
        assert psnr["mean"] < 0 and psnr["interval"][1] < 0 and psnr["second_is_better"] < 0.5

    def test_compare_refuses_a_model_before_it_measures_another(self, run, capsys, tmp_path):
        tiny_vae(3).save_pretrained(tmp_path / "rgb")
        code, _, error = call(capsys, "compare", run, tmp_path / "rgb", "--out", tmp_path / "out")
        assert code == 1 and error.startswith("error: rgb: the model takes images of 3 channels")

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
        code, out, error = call(capsys, "reconstruct", run, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
        assert code == 1 and "1 of 3 images" in error and "bad.png" in error
        files = sorted((tmp_path / "out").iterdir())
        pictures = [Image.open(file) for file in files]
        assert [(picture.size, picture.mode) for picture in pictures] == [((13, 9), "L")] * 2
        assert out.count("PSNR") == 2
        code, _, error = call(capsys, "reconstruct", run, tmp_path / "none.png")
        assert code == 1 and error == f"error: there is no image {tmp_path / 'none.png'}\n"

    def test_reconstruct_is_what_the_model_gives(self, run, capsys, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        assert call(capsys, "reconstruct", run, tmp_path / "image.png", "--out", tmp_path / "out")[0] == 0
        vae = AutoencoderKL.from_pretrained(run / "model")
        with torch.no_grad():
            sample = vae(torch.from_numpy(pixels)[None, None] / 127.5 - 1).sample
        expected = ((sample[0, 0] + 1) / 2).clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "image.png").convert("L")), expected)

    def test_sample_repeats(self, run, capsys, tmp_path):
        for name in ("one", "two"):
            assert call(capsys, "sample", run, "--count", 3, "--out", tmp_path / f"{name}.png")[0] == 0
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()

    def test_info(self, run, capsys):
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
        for command in (["push", tmp_path / "run", "me/model"], [reader, tmp_path / "run"]):
            code, _, error = call(capsys, *command)
            assert code == 1 and error.count("\n") == 1 and f"{name} is damaged" in error, (command, error)

    def test_settings_of_the_hub_are_those_of_the_run(self, run, capsys, tmp_path, monkeypatch):
        shutil.copytree(run, tmp_path / "run")
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["hub"] |= {"license": "mit", "revision": "123", "private": True, "commit_message": "it's: done"}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
        told = []
        monkeypatch.setattr("diffusers_vae.commands.push", lambda run, config: told.append(config) or "url")
        assert call(capsys, "push", tmp_path / "run", "me/model", "--license", "apache-2.0")[0] == 0
        assert told == [
            HubConfig(True, "me/model", True, "123", "it's: done", license="apache-2.0"),
        ]

    def test_a_model_of_no_run_needs_to_be_told_on_what(self, capsys, tmp_path):
        tiny_vae(3).save_pretrained(tmp_path)
        code, _, error = call(capsys, "evaluate", tmp_path)
        assert code == 2 and "say with --data on which images" in error

    def test_push_of_what_is_no_run(self, capsys, tmp_path):
        code, _, error = call(capsys, "push", tmp_path, "me/model")
        assert code == 1 and "must be finished" in error

    @pytest.mark.slow
    def test_train_is_the_training_script(self, capsys, tmp_path):
        config = tiny(tmp_path / "run", SMALL, max_images=32)
        config.save(tmp_path / "run.yaml")
        code, out, _ = call(capsys, "train", "--config", tmp_path / "run.yaml")
        assert code == 0 and "load it     from diffusers import AutoencoderKL" in out
        assert (tmp_path / "run" / "README.md").exists() and (tmp_path / "run" / "report.html").exists()
        assert call(capsys, "train", "--run.epochs", "0")[0] == 2
