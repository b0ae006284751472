"""What the README tells a newcomer to do is there and works."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub import ModelCard
from support.models import make_pipeline

from diffusers_vae import VAE
from diffusers_vae.evaluation.figures import FIGURES
from diffusers_vae.evaluation.report import EvaluationReport
from diffusers_vae.losses.objective import ObjectiveConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PRESETS = (ROOT / "docs" / "presets.md").read_text()
TEXT_TO_IMAGE = (ROOT / "docs" / "text_to_image.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def digits_model(tmp_path):
    """An untrained model with the shape of the default preset, where the default run puts it."""
    torch.manual_seed(0)
    vae = VAE(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        scaling_factor=1.1,
        shift_factor=0.2,
    )
    vae.save_pretrained(tmp_path / "runs" / "digits" / "model")
    return vae


@pytest.mark.slow
def test_code_runs_as_it_stands(digits_model, tmp_path, monkeypatch):
    make_pipeline(digits_model, tmp_path)
    shutil.copytree(tmp_path / "before", tmp_path / "runs" / "digits-t2i" / "pipeline")
    (tmp_path / "before").rename(tmp_path / "my-pipeline")
    monkeypatch.chdir(tmp_path)
    names, pipelines = {}, []
    for block in BLOCKS:
        exec(block, names)
        pipelines += [names.pop("pipeline", None)]
    assert isinstance(pipelines[0], DiffusionPipeline) and pipelines[0].vae.config.shift_factor == 0.2
    assert (tmp_path / "seven.png").exists()
    assert names["reconstructions"].shape == names["images"].shape == (4, 1, 32, 32)
    assert torch.isfinite(names["terms"].loss)
    assert names["vae"].config.scaling_factor != 0.18215 and (tmp_path / "my-vae" / "config.json").exists()


def test_own_loop_trains_what_the_command_trains():
    """The objective of the snippet, against that of a run's default settings."""
    (code,) = re.findall(r"^objective = .*$", README, re.M)
    names = {}
    exec("from diffusers_vae import *", names)
    exec(code, names)
    images, reconstructions, moments = (torch.rand(2, channels, 4, 4) for channels in (1, 1, 8))
    batch = images, reconstructions, DiagonalGaussianDistribution(moments)
    found, expected = names["objective"](*batch), ObjectiveConfig().build()(*batch)
    assert names["objective"] == ObjectiveConfig().build()
    for term in ("distortion", "rate", "loss"):
        assert torch.equal(getattr(found, term), getattr(expected, term)), term


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r"^pip install -e .*pytest$", README, re.M)
    assert command == 'pip install -e ".[dev]" && pytest'
    done = subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 200
    start, *chapters = re.findall(r"^## (.*)$", README, re.M)
    assert start == "Start" and README.index("![") < README.index("## Start")
    assert chapters == [
        "Use it in diffusers",
        "What it does that others do not",
        "Train on your images",
        "Fine-tune",
        "Measure",
        "Text to image",
        "Interrupted runs and several processes",
        "Files",
        "Licence",
    ]


def test_files_lists_each_chapter_once():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.S).group(1)
    chapters = re.findall(r"^  (\w+)/ +\S", tree, re.M)
    assert sorted(chapters) == sorted(file.parent.name for file in (ROOT / "diffusers_vae").glob("*/__init__.py"))
    for line in tree.splitlines():
        assert len(line) <= 120, line


def test_each_preset_has_a_row():
    for preset in (ROOT / "training" / "configs").glob("*.yaml"):
        assert len(re.findall(rf"^\| `{preset.name}` \|", PRESETS, re.M)) == 1, preset


CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_cards_show_what_was_measured(card):
    """Figures and links of the card of a preset, and those in docs/presets.md, against its evaluation.json."""
    report = json.loads(EvaluationReport.from_json((card.parent / "evaluation.json").read_text()).to_json())
    text = card.read_text()
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (card.parent / path).exists(), path
    metadata = ModelCard.load(card).data
    measured = {result.metric_type: result.metric_value for result in metadata.eval_results}
    assert measured == {key: report[key] for key in FIGURES if report.get(key) is not None}
    assert f"**{report['posterior']['verdict'].capitalize()}:**" in text
    preset = f"`{card.parent.name}.yaml`"
    row = next(line for line in PRESETS.splitlines() if line.startswith(f"| {preset}"))
    shown = {"PSNR": report["psnr"], "SSIM": report["ssim"], "loss": report["loss"], "rate": report["rate"]}
    found = re.findall(r"(PSNR|SSIM|loss|rate) ([\d.]+)", row)
    assert len(found) == 2
    for name, value in found:
        digits = len(value.partition(".")[2])
        assert value == f"{shown[name]:.{digits}f}", name


def test_cards_are_of_the_presets():
    assert {card.parent.name for card in CARDS} == {"digits", "mnist-mlp-z2", "mnist-mlp-z20", "mnist-vae", "rgb-small"}
    for card in CARDS:
        preset = yaml.safe_load((ROOT / "training" / "configs" / f"{card.parent.name}.yaml").read_text())
        ran = yaml.safe_load((card.parent / "config.yaml").read_text())
        for section, settings in preset.items():
            for name, value in settings.items():
                assert ran[section][name] == (float(value) if name == "learning_rate" else value), f"{section}.{name}"


def test_readme_shows_the_figures_of_the_default_run():
    report = json.loads((ROOT / "model_cards" / "digits" / "evaluation.json").read_text())
    assert re.findall(r"PSNR ([\d.]+) dB", README) == [f"{report['psnr']:.1f}"]


def test_text_to_image_is_shown_as_it_was_judged():
    record = json.loads((ROOT / "benchmarks" / "judged" / "mnist-t2i.json").read_text())
    names = {
        "real images, a second sample": "real training images",
        "the autoencoder's reconstructions": "reconstructions",
        "guidance 1 (none)": "guidance 1",
        "guidance 2": "guidance 2",
        "guidance 4": "guidance 4",
        "guidance 7.5": "guidance 7.5",
    }
    for label, name in names.items():
        judged = record["judged"][name]
        figures = f"{judged['right']:.1%}".replace("%", " %"), judged["frechet_distance"], judged["diversity"]
        assert f"| {label} | {figures[0]} | {figures[1]:.1f} | {figures[2]:.2f} |" in TEXT_TO_IMAGE
    accuracy = f"right on {record['classifier']['accuracy']:.1%}".replace("%", " %")
    assert accuracy in " ".join(TEXT_TO_IMAGE.split())
    digits = json.loads((ROOT / "benchmarks" / "judged" / "digits-t2i.json").read_text())
    right = f"{digits['judged']['guidance 2']['right']:.1%}".replace("%", " %")
    assert f"{right} of the pictures show the digit asked for at guidance 2" in " ".join(README.split())
    assert f"At guidance 2, {right} of its pictures" in " ".join(TEXT_TO_IMAGE.split())
    assert record["count"] == 1000 and record["judged"]["guidance 2"]["right"] >= 0.99
