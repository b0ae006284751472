"""The scripts in benchmarks/ tell good pictures from bad ones, and run."""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest
from support.launches import run_forked
from support.models import make_pipeline, tiny_vae

from diffusers_vae import LatentDataset
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.evaluation.metrics import psnr
from diffusers_vae.images.ranges import to_model_range


def load_script(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


script, stock_loop = load_script("judge_text_to_image"), load_script("stock_loop")
startup, reading = load_script("startup"), load_script("reading")
latent_cache, gpu = load_script("latent_cache"), load_script("gpu")


@pytest.fixture(scope="module")
def digits():
    """Training and held-out digits as the script reads them for pictures of 16x16 pixels."""
    return load_data(DataConfig("digits", resolution=16, fit=script.FITS["digits"]))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Folder of a StableDiffusionPipeline with random weights and a vae of stock class, which draws 16x16 pictures."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(tiny_vae(), folder).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def call(capsys, *arguments):
    """Exit code, and what was printed to stdout and to stderr."""
    try:
        code = script.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def write_idx(path, values):
    """Write an array of bytes in the format of MNIST's files."""
    path.write_bytes(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


def write_noise(root):
    """Write images of noise below `root` in the format and the place of MNIST."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 100)):
        write_idx(raw / f"{part}-images-idx3-ubyte", random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


class TestFigures:
    @pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (20, 20), (985, 1000)])
    def test_interval_is_wilsons(self, right, count):
        expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert script.wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)

    def test_real_images_come_in_the_order_of_the_prompts(self, digits):
        train = digits[0]
        indices = script.real_in_turn(train.labels, 12)
        assert torch.equal(train.labels[indices], script.digits_in_turn(120))
        assert len(set(indices.tolist())) == 120
        prompts = script.prompts_in_turn(120, ["a {word}", "the digit {number}"])
        assert prompts[:2] == ["a zero", "a one"] and prompts[19:21] == ["the digit 9", "a zero"]
        assert len(set(prompts)) == 20

    def test_spread_is_the_mean_distance_within_a_digit(self):
        features = torch.rand(40, 3, dtype=torch.float64)
        four = features[2::10]
        apart = [(four[i] - four[k]).norm() for i in range(4) for k in range(i)]
        assert script.spread(features)[2].item() == pytest.approx(sum(apart).item() / 6)

    def test_a_contact_sheet_has_a_column_per_digit(self):
        columns = torch.arange(10, dtype=torch.uint8).mul(20).repeat(12).view(120, 1, 1, 1).expand(-1, 1, 32, 32)
        sheet = np.asarray(script.contact_sheet({"guidance 1": columns, "guidance 4": columns.flip(0)}))
        assert sheet.shape == (18 + 10 * 34 + 2, 2 * (10 * 34 + 2) + 12, 3)
        shown = [sheet[18 + 5 + 34 * row, 5 + 34 * column, 0] // 20 for row in (0, 9) for column in range(10)]
        assert shown == [*range(10)] * 2
        assert [sheet[18 + 5, 342 + 12 + 5 + 34 * column, 0] // 20 for column in range(10)] == [*range(10)][::-1]


@pytest.fixture(scope="module")
def judged(digits):
    """What the script says of known pictures in the place of drawn ones."""
    train, heldout = digits
    classifier = script.train_classifier(train, 8, 0, torch.device("cpu"))
    pixels = heldout.pixels[script.real_in_turn(heldout.labels, 14)]
    others = train.pixels[script.real_in_turn(train.labels, 20)]
    features = script.look(classifier, pixels)[1]
    turned = pixels.view(14, 10, *pixels.shape[1:]).roll(1, 1).flatten(0, 1)
    cases = {"same": pixels, "others": others, "turned": turned, "repeated": pixels[:10].repeat(14, 1, 1, 1)}
    cases["black"] = torch.zeros_like(pixels)
    return {name: script.judge(classifier, given, features) for name, given in cases.items()}


@pytest.mark.slow
class TestJudgement:
    def test_real_images_are_right_near_and_diverse(self, judged):
        assert judged["same"]["right"] > 0.95 and judged["others"]["right"] > 0.95
        assert judged["same"]["frechet_distance"] == pytest.approx(0, abs=1e-3)
        assert judged["same"]["diversity"] == pytest.approx(1)
        assert 0.8 < judged["others"]["diversity"] < 1.2
        assert judged["others"]["images"] == 200 and judged["others"]["images_in_distance"] == 140

    def test_wrong_digits_are_told_by_the_share_alone(self, judged):
        assert judged["turned"]["right"] < 0.05
        assert judged["turned"]["frechet_distance"] == pytest.approx(0, abs=1e-3)

    def test_one_picture_again_and_again_is_told_by_the_diversity(self, judged):
        assert judged["repeated"]["right"] > 0.95
        assert judged["repeated"]["diversity"] == pytest.approx(0, abs=1e-6)
        assert judged["repeated"]["frechet_distance"] > 3 * judged["others"]["frechet_distance"]

    def test_no_digit_at_all(self, judged):
        assert judged["black"]["right"] == pytest.approx(0.1) and max(judged["black"]["seen_per_digit"]) == 140
        assert judged["black"]["frechet_distance"] > 20 * judged["others"]["frechet_distance"]


@pytest.mark.slow
class TestRuns:
    def test_end_to_end(self, pipeline, tmp_path, capsys):
        out, picture = tmp_path / "figures" / "judged.json", tmp_path / "judged.png"
        settings = ["--count", "20", "--steps", "2", "--guidance", "1", "4", "--out", out, "--picture", picture]
        code, text, err = call(capsys, pipeline, "--data.name", "digits", *settings)
        assert code == 0, err
        assert "guidance 4" in text and "real training images" in text and str(out) in text
        judged = json.loads(out.read_text())
        assert judged["pipeline"]["class"] == "StableDiffusionPipeline" and judged["pipeline"]["vae"] == "AutoencoderKL"
        assert set(judged["weights"]) == {"vae", "text_encoder", "unet"}
        assert judged["classifier"]["accuracy"] >= 0.97 and judged["count"] == 20
        assert list(judged["judged"]) == ["real training images", "reconstructions", "guidance 1", "guidance 4"]
        assert judged["judged"]["guidance 1"]["right"] < 0.5 < judged["judged"]["real training images"]["right"]
        assert str(tmp_path) not in out.read_text()
        assert Image.open(picture).width > 600

    def test_pictures_are_repeatable_and_do_not_depend_on_the_batch(self, pipeline):
        loaded = script.load_pipeline(pipeline, None, torch.device("cpu"))
        prompts = script.prompts_in_turn(10, ["a {word}"])
        first, again, other = (script.draw(loaded, prompts, 4, 2, 0, size).int() for size in (10, 10, 3))
        assert torch.equal(first, again) and (first - other).abs().max() <= 1
        assert (first[0] - first[1]).abs().max() > 10
        assert (first - script.draw(loaded, prompts, 4, 2, 1, 10)).abs().max() > 10

    def test_another_vae_takes_the_place_of_the_pipelines_own(self, pipeline, tmp_path):
        vae = DiffusionPipeline.from_pretrained(pipeline).vae
        with torch.no_grad():
            vae.post_quant_conv.bias += 1
        vae.save_pretrained(tmp_path)
        loaded = script.load_pipeline(pipeline, str(tmp_path), torch.device("cpu"))
        assert torch.equal(loaded.vae.post_quant_conv.bias, vae.post_quant_conv.bias)

    def test_a_classifier_that_errs_is_no_judge(self, pipeline, tmp_path, capsys):
        """As on noise, of which nothing can be learned."""
        write_noise(tmp_path)
        code, _, err = call(capsys, pipeline, "--data.root", tmp_path, "--count", "20", "--steps", "1")
        assert code == 1 and "error: the classifier must be right on 98%" in err

    def test_missing_data(self, pipeline, tmp_path, capsys, monkeypatch):
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        code, _, err = call(capsys, pipeline, "--data.root", tmp_path, "--count", "20", "--steps", "1")
        assert code == 1 and "the data set is missing and cannot be downloaded" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "pipeline"),
        (["nowhere"], 1, "error: there is no pipeline in"),
        (["x", "--data.name", "cifar10"], 2, "cifar10"),
        (["x", "--count", "25"], 2, "--count must be a multiple of 10, at least 20, got 25"),
        (["x", "--guidance", "0.5"], 2, "--guidance must be at least 1, which is none, got 0.5"),
        (["x", "--steps", "0"], 2, "--steps must be at least 1, got 0"),
        (["x", "--prompts", "a digit"], 2, "--prompts must name the digit as {word} or {number}, got 'a digit'"),
        (["x", "--prompts", "a {digit}"], 2, "--prompts must name the digit"),
        (["x", "--picture", "judged.txt"], 2, "--picture must be a picture"),
    ],
)
def test_wrong_input(arguments, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, _, err = call(capsys, *arguments)
    assert got == code and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_missing_vae_is_named(pipeline, capsys):
    code, _, err = call(capsys, pipeline, "--vae", "nowhere")
    assert code == 1 and "error: there is no autoencoder in" in err


@pytest.mark.slow
class TestStockLoop:
    def train(self, out, *more):
        model = ["--block_out_channels", "[8,16]", "--layers_per_block", "1", "--norm_num_groups", "4"]
        data = ["--data.name", "digits", "--data.resolution", "8", "--batch_size", "32"]
        stock_loop.main([*data, *model, "--max_images", "320", "--out", str(out), *more])
        return AutoencoderKL.from_pretrained(out)

    def error(self, vae):
        images = to_model_range(load_data(DataConfig(resolution=8))[1].pixels)
        with torch.no_grad():
            return -psnr(images, vae(images).sample).mean().item()

    def test_trains_a_stock_autoencoder(self, tmp_path):
        vae, slow, again = (
            self.train(tmp_path / name, "--learning_rate", rate)
            for name, rate in (("vae", "1e-2"), ("slow", "1e-9"), ("again", "1e-2"))
        )
        assert vae.config.block_out_channels == [8, 16] and vae.config.in_channels == 1
        assert self.error(vae) < self.error(slow) - 3
        assert all(map(torch.equal, vae.state_dict().values(), again.state_dict().values()))


class TestStartup:
    @pytest.mark.slow
    def test_only_the_lines_asked_for_are_run_and_all_seconds_are_kept(self, tmp_path, capsys):
        startup.main(["--rounds", "2", "--only", "diffusers-vae --help", "--out", str(tmp_path / "out.json")])
        figures = json.loads((tmp_path / "out.json").read_text())["figures"]
        assert list(figures) == ["diffusers-vae --help"] and len(figures["diffusers-vae --help"]["seconds"]) == 2
        assert "diffusers-vae --help" in capsys.readouterr().out

    def test_every_line_is_compared_with_one_that_is_run_too(self, tmp_path):
        commands = startup.commands(tmp_path)
        assert {against for _, against in commands.values() if against} <= commands.keys()


@pytest.mark.slow
class TestLatentCache:
    def call(self, out, *more):
        """On files of real digits, with a tiny model of random weights."""
        images, _ = load_data(DataConfig(resolution=16))
        (out / "images" / "all").mkdir(parents=True)
        for index in range(24):
            Image.fromarray(images.pixels[index, 0].numpy()).convert("RGB").save(
                out / "images" / "all" / f"{index}.png"
            )
        data = ["--data.name", "folder", "--data.root", str(out / "images"), "--data.channels", "3"]
        model = ["--data.resolution", "16", "--block_out_channels", "[32,32]", "--rounds", "3"]
        latent_cache.main([*data, *model, "--out", str(out / "timings.json"), *more])
        return json.loads((out / "timings.json").read_text())

    def test_both_are_timed_in_turns(self, tmp_path, capsys):
        found = self.call(tmp_path, "--compute_dtype", "float32", "--max_images", "20")
        assert [len(rates) for rates in found["images per second"].values()] == [2, 2]
        assert found["compute_dtype"] == "float32" and found["ratio"] > 0
        assert "plain loop" in capsys.readouterr().out

    def test_both_give_the_same_latents(self, tmp_path):
        self.call(tmp_path)
        data = DataConfig(name="folder", root=str(tmp_path / "images"), channels=3, resolution=16)
        arguments = ["--data.name=folder", f"--data.root={data.root}", "--compute_dtype=float32"]
        settings, _ = latent_cache.read_settings([*arguments, "--block_out_channels=[32,32]"])
        vae = latent_cache.load_vae(settings, data)
        for name, work in (("plain", latent_cache.plain_loop), ("ours", latent_cache.ours)):
            (tmp_path / name).mkdir()
            assert work(vae, settings, data, tmp_path / name) == 24
        plain = load_file(tmp_path / "plain" / "latents.safetensors")
        ours = LatentDataset(tmp_path / "ours")
        torch.testing.assert_close(
            ours.latents(range(24)).sum((1, 2, 3)).sort()[0],
            plain["mean"].sum((1, 2, 3)).sort()[0],
            rtol=1e-3,
            atol=1e-3,
        )

    @pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="needs two cores")
    def test_several_processes(self, tmp_path, monkeypatch):
        """What torchrun is asked to start, as it understands it, in forked processes."""

        def run(command, env, **settings):
            assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
            asked = torchrun.parse_args(command[3:])
            assert asked.standalone and Path(asked.training_script).samefile(latent_cache.__file__)
            processes = int(asked.nproc_per_node)
            log = tmp_path / f"log-{processes}"
            work = latent_cache_worker, asked.training_script_args, env["SCRATCH"]
            return subprocess.CompletedProcess(command, 0, run_forked(*work, log=log, processes=processes))

        monkeypatch.setattr("subprocess.run", run)
        found = self.call(tmp_path, "--processes", "2", "--shard_images", "6", "--rounds", "1")
        assert list(found["images per second"]) == ["1 process", "2 processes"]
        assert all(rates[0] > 0 for rates in found["images per second"].values())


def latent_cache_worker(arguments, scratch):
    """A process that torchrun starts."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= {name: value for name, value in alone.items() if name not in os.environ} | {"SCRATCH": scratch}
    latent_cache.main(arguments)


@pytest.mark.slow
def test_reading_of_a_folder_and_its_archive(cifar_folder, tmp_path, capsys):
    folder, archive = tmp_path / "images", tmp_path / "images.zip"
    shutil.copytree(cifar_folder / "test" / "ship", folder)
    with zipfile.ZipFile(archive, "w", strict_timestamps=False) as opened:
        for path in folder.iterdir():
            opened.write(path, path.name)
    reading.main([str(folder), "--packed", str(archive), "--resolution", "16", "--workers", "0", "--rounds", "1"])
    told = capsys.readouterr().out
    assert "106 files to 16x16" in told and "images.zip" in told


class TestGPU:
    @pytest.mark.parametrize(
        "parts",
        [
            pytest.param(["step", "inference"], marks=pytest.mark.slow),
            pytest.param(list(gpu.PARTS), marks=pytest.mark.soak),
        ],
    )
    def test_a_rehearsal_measures_every_part_and_the_same_command_none_again(
        self, parts, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setenv("TQDM_MININTERVAL", "0")  # which the script sets, and pytest then restores
        write_noise(tmp_path)
        command = ["--rehearse", "--root", str(tmp_path), "--out", str(tmp_path / "out.json"), "--only", *parts]
        assert gpu.main(command) == 0
        printed = capsys.readouterr().out
        measured = json.loads((tmp_path / "out.json").read_text())["measured"]
        assert list(measured) == parts
        for name, part in measured.items():
            assert f"part {name}\n" in printed and f"| {name} | {part['rows'][0]['what']} | " in printed
        if "resume" in parts:
            assert [row["value"] for row in measured["resume"]["rows"]] == ["bit-identical"] * 2
        assert gpu.main(command) == 0
        again = capsys.readouterr().out
        assert printed.endswith(again) and "\npart " not in again

    def test_parts_that_cannot_run_are_left_out_and_named(self, tmp_path, capsys):
        command = ["--rehearse", "--only", "mlps", "--out", str(tmp_path / "out.json")]
        assert gpu.main(command) == 0
        assert "| mlps | | left out: it needs --root FOLDER" in capsys.readouterr().out
        assert not (tmp_path / "out.json").exists()

    def test_figures_of_another_machine_are_not_added_to(self, tmp_path, capsys):
        part = {"device": "other", "torch": "2.0", "rehearsal": True, "date": "2026-01-01", "rows": []}
        (tmp_path / "out.json").write_text(json.dumps({"measured": {"f8": part}}))
        with pytest.raises(SystemExit):
            gpu.main(["--rehearse", "--out", str(tmp_path / "out.json")])
        assert "choose another --out" in capsys.readouterr().err
