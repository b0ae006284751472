"""The scripts and the notebook in examples/ do what they say, at tiny sizes."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from support.models import make_pipeline, tiny_vae

from diffusers_vae import VAE, measure_latents

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs an example with arguments in an empty folder, and returns what it prints."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def photos(tmp_path):
    """A folder of twenty images in RGB."""
    (tmp_path / "photos").mkdir()
    torch.manual_seed(0)
    for number in range(20):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_train_on_a_folder(run, photos, tmp_path):
    printed = run("train_on_a_folder.py", photos, "--resolution", 16, "--max_images", 16)
    assert "AutoencoderKL.from_pretrained" in printed
    vae = AutoencoderKL.from_pretrained(tmp_path / "runs" / "photos" / "model")
    assert vae.config.in_channels == 3 and vae.config.scaling_factor != 0.18215


@pytest.mark.slow
def test_fine_tune(run, photos, tmp_path):
    vae = tiny_vae(3)
    measure_latents(vae, torch.rand(4, 3, 16, 16))
    vae.save_pretrained(tmp_path / "base")
    printed = run("fine_tune.py", tmp_path / "base", photos, "--resolution", 16, "--max_images", 16)
    assert printed.splitlines()[-1].startswith("PSNR ") and "95 % interval" in printed
    before, after = (
        AutoencoderKL.from_pretrained(folder)
        for folder in (tmp_path / "base", tmp_path / "runs" / "fine-tuned" / "model")
    )
    assert torch.equal(before.encoder.conv_in.weight, after.encoder.conv_in.weight)
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)


@pytest.mark.slow
def test_use_in_pipeline(run, tmp_path):
    vae = tiny_vae(1)
    measure_latents(vae, torch.rand(4, 1, 16, 16))
    make_pipeline(vae, tmp_path).save_pretrained(tmp_path / "pipeline")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "model")
    run("use_in_pipeline.py", tmp_path / "pipeline", tmp_path / "model", "a")
    picture = Image.open(tmp_path / "picture.png")
    generator = torch.Generator().manual_seed(0)
    before = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")("a", num_inference_steps=25, generator=generator)
    assert picture.size == before.images[0].size and picture.tobytes() != before.images[0].tobytes()


@pytest.mark.slow
def test_own_loop(run, tmp_path):
    assert run("own_loop.py", "--steps", 2, "--images", 40).startswith("distortion ")
    vae = AutoencoderKL.from_pretrained(tmp_path / "my-vae")
    assert VAE.from_pretrained(tmp_path / "my-vae").scale_latents(torch.zeros(1, 4, 8, 8)).isfinite().all()
    assert vae.config.scaling_factor != 0.18215


def test_examples_are_short():
    for script in EXAMPLES.glob("*.py"):
        assert 10 <= len(script.read_text().splitlines()) <= 30, script.name


def execute(folder, monkeypatch, **parameters):
    """Execute the notebook in a folder, with other values in the cell of its parameters; return its cells."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", nbformat.NO_CONVERT)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{name} = {value}" for name, value in parameters.items())
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells


def shown(cells, kind):
    return [output.data[kind] for cell in cells for output in cell.get("outputs", ()) if kind in output.get("data", ())]


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = execute(tmp_path, monkeypatch, RESOLUTION=16, MAX_IMAGES=64, STEPS=2)
    assert len(shown(cells, "image/png")) == 3  # reconstructions, traversals, pictures of prompts
    assert (tmp_path / "runs" / "digits-t2i" / "pipeline" / "model_index.json").exists()


@pytest.mark.soak
def test_notebook_trains_a_healthy_autoencoder(tmp_path, monkeypatch):
    cells = execute(tmp_path, monkeypatch)
    (printed,) = [
        output.text for cell in cells for output in cell.get("outputs", ()) if "PSNR" in output.get("text", "")
    ]
    assert float(printed.split()[1]) > 32 and "healthy" in printed
