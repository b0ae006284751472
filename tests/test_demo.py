"""The page on which people try autoencoders: what it computes, and the page itself in Chromium."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from support.hub import CONFIG, REPO, connect, make_run
from support.hub_server import Fault
from support.models import make_vae, tiny_vae

from diffusers_vae import MLPVAE, cli
from diffusers_vae.images.ranges import ValueRange
from diffusers_vae.reports.explore import (
    Explored,
    between,
    channel_std,
    moved,
    prior_samples,
    read_for,
    reconstruct_file,
    telling_directions,
)

ROOT = Path(__file__).parents[1]


def write_image(path: Path, height: int, width: int, channels: int = 3) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


def listening() -> set[int]:
    """Ports that this process listens on."""
    return {one.laddr.port for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}


def make_mlp() -> MLPVAE:
    torch.manual_seed(0)
    return MLPVAE(8, 1, 16, 3).eval()


class TestExploring:
    def test_psnr_is_that_of_the_reconstruct_command(self, tmp_path, capsys):
        model = tiny_vae(3)
        model.save_pretrained(tmp_path / "model")
        file = write_image(tmp_path / "odd.png", 21, 30)
        made = reconstruct_file(Explored("tiny", model), file)
        assert cli.main(["reconstruct", str(tmp_path / "model"), str(file), "--out", str(tmp_path / "out")]) == 0
        assert f"PSNR {made.psnr:.2f} dB" in capsys.readouterr().out
        assert made.reconstruction.shape == made.image.shape == (1, 3, 21, 30) and made.note == ""
        assert made.seconds > 0

    def test_images_of_another_size_are_fitted_and_the_page_says_so(self, tmp_path):
        file = write_image(tmp_path / "wide.png", 20, 40)
        image, note = read_for(Explored("mlp", make_mlp()), file)
        assert image.shape == (1, 1, 8, 8) and note == "scaled and cropped from 40x20 to 8x8 pixels"
        image, note = read_for(Explored("vae", tiny_vae(3)), file, largest=16)
        assert image.shape == (1, 3, 8, 16) and note == "scaled from 40x20 to 16x8 pixels"

    def test_values_outside_of_the_models_range_are_refused(self, tmp_path):
        file = write_image(tmp_path / "a.png", 8, 8, 1)
        explored = Explored("tiny", tiny_vae(1), ValueRange(0, 9))
        with pytest.raises(ValueError, match=r"values must be finite and lie in \[0, 9\]"):
            reconstruct_file(explored, file)

    def test_directions_are_those_of_the_largest_change(self, tmp_path):
        """Hardly a direction of the same length changes the picture more, though the decoder is not linear."""
        model = make_mlp()
        posterior = model.encode(torch.rand(1, 1, 8, 8)).latent_dist
        found, std = telling_directions(model, posterior), channel_std(model, posterior)
        assert torch.allclose(found.weights @ found.weights.T, torch.eye(3), atol=1e-5)
        assert torch.allclose(found.vectors, found.weights * std)
        assert found.shares.sum().item() == pytest.approx(1) and found.shares.tolist() == sorted(found.shares)[::-1]

        def change(weights):
            shift = 0.05 * (weights * std)[:, None, None]
            mean = posterior.mode()
            return (model.decode(mean + shift).sample - model.decode(mean - shift).sample).norm()

        with torch.no_grad():
            others = torch.nn.functional.normalize(torch.randn(200, 3, generator=torch.manual_seed(1)))
            assert all(change(other) <= 1.02 * change(found.weights[0]) for other in others)
            assert change(found.weights[0]) > 1.2 * change(found.weights[2])

    def test_sliders_at_0_give_the_reconstruction(self, tmp_path):
        explored = Explored("tiny", tiny_vae(3))
        made = reconstruct_file(explored, write_image(tmp_path / "a.png", 20, 28))
        found = telling_directions(explored.model, made.posterior)
        at_rest = moved(explored.model, made, found, [0.0] * 6)
        assert torch.allclose(at_rest, made.reconstruction, atol=1 / 255 + 1e-6)  # which is rounded to 8 bits
        assert (moved(explored.model, made, found, [3.0]) - at_rest).abs().max() > 0.01

    def test_interpolation_begins_and_ends_with_the_reconstructions(self, tmp_path):
        explored = Explored("tiny", tiny_vae(3))
        first, second = write_image(tmp_path / "a.png", 16, 24), write_image(tmp_path / "b.png", 16, 24)
        steps = between(explored, first, second, 3)
        made = reconstruct_file(explored, first)
        assert steps.shape == (3, 3, 16, 24)
        assert torch.allclose(steps[0], made.reconstruction[0], atol=1 / 255 + 1e-6)
        assert between(explored, first, write_image(tmp_path / "c.png", 40, 12), 2).shape == (2, 3, 16, 24)

    def test_samples_belong_to_their_seed(self):
        model = make_mlp()
        assert torch.equal(prior_samples(model, 4, 1), prior_samples(model, 4, 1))
        assert not torch.equal(prior_samples(model, 4, 1), prior_samples(model, 4, 2))


class TestSpace:
    @pytest.fixture
    def run(self, tmp_path) -> Path:
        return make_run(tmp_path / "runs" / "tiny", make_vae(), (8, 8), CONFIG)

    def test_is_published_beside_the_model(self, hub, run, capsys):
        assert cli.main(["push", str(run), REPO, "--license", "mit", "--space"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"space       {hub.url}/spaces/{REPO}"
        files = hub.files(f"spaces/{REPO}")
        assert {*files} == {".gitattributes", "README.md", "app.py", "requirements.txt"}
        header = yaml.safe_load(files["README.md"].decode().split("---")[1])
        assert header["sdk"] == "gradio" and header["models"] == [REPO] and header["license"] == "mit"
        assert header["app_file"] in files and files["requirements.txt"].startswith(b"diffusers-vae[demo]")
        assert f"show(['{REPO}'])" in files["app.py"].decode()
        assert "config.json" in hub.files(REPO) and not hub.repos[f"spaces/{REPO}"].private

    @pytest.mark.slow
    def test_app_serves_the_published_model(self, hub, run, monkeypatch, tmp_path):
        gradio = pytest.importorskip("gradio")
        assert cli.main(["push", str(run), REPO, "--space"]) == 0
        connect(monkeypatch, hub.url, tmp_path)
        before, app = listening(), hub.files(f"spaces/{REPO}")["app.py"]
        thread = threading.Thread(target=exec, args=(app, {}), daemon=True)
        thread.start()
        try:
            while not (ports := listening() - before):
                assert thread.is_alive()
                time.sleep(0.1)
            with urlopen(f"http://127.0.0.1:{min(ports)}/config") as answer:
                assert REPO in answer.read().decode()
        finally:
            gradio.close_all()
        thread.join(30)
        assert not thread.is_alive()

    def test_of_a_private_model_is_private_and_asks_for_a_token(self, hub, run):
        assert cli.main(["push", str(run), REPO, "--private", "true", "--revision", "dev", "--space"]) == 0
        files = hub.files(f"spaces/{REPO}")
        assert hub.repos[f"spaces/{REPO}"].private and b"secret `HF_TOKEN`" in files["README.md"]
        assert b"revision='dev'" in files["app.py"]

    def test_is_not_made_for_a_pull_request(self, hub, run, capsys):
        with pytest.raises(SystemExit) as ended:
            cli.main(["push", str(run), REPO, "--create_pr", "true", "--space"])
        assert ended.value.code == 2 and "--space" in capsys.readouterr().err and hub.repos == {}

    def test_refused_is_told_with_the_command_that_repeats_it(self, hub, run, capsys):
        hub.faults = [Fault(r"POST /api/spaces/.*/commit", "status", times=9, status=403)]
        assert cli.main(["push", str(run), REPO, "--space"]) == 1
        error = capsys.readouterr().err
        assert f"the Space {REPO} was not uploaded" in error and error.rstrip().endswith(f"{REPO} --space")


class TestCommand:
    def test_more_than_four_models_are_refused(self, capsys):
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo", *"abcde"])
        assert ended.value.code == 2 and "up to 4 models" in capsys.readouterr().err

    def test_missing_gradio_is_named_with_the_extra(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "diffusers_vae.reports.demo", raising=False)
        assert cli.main(["demo", "me/model"]) == 1
        assert 'demo needs gradio, which is not installed: pip install "diffusers-vae[demo]"' in capsys.readouterr().err

    def test_missing_model_is_named(self, capsys, tmp_path):
        pytest.importorskip("gradio")
        assert cli.main(["demo", str(tmp_path / "nothing")]) == 1
        assert "there is no file or folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Address of the page of two models, an MLP and a convolutional one, as the command serves it; at the end, Ctrl-C
    ends it quietly.
    """
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    make_mlp().save_pretrained(folder / "mlp")
    tiny_vae(1).save_pretrained(folder / "<b>vae")
    command = [sys.executable, "-m", "diffusers_vae.cli", "demo", "mlp", "<b>vae"]
    settings = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }

    def answer_ctrl_c():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore it

    with subprocess.Popen(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, text=True, preexec_fn=answer_ctrl_c
    ) as process:
        try:
            yield re.fullmatch(r"demo {8}(http://127\.0\.0\.1:\d+/) .*\n", process.stdout.readline())[1]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(30) == 0
            finally:
                process.kill()
    assert {path.name for path in folder.iterdir()} <= {"mlp", "<b>vae", "uploads"}


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Open the page at a width in pixels. In the end, nothing has gone wrong in it, and no other host was asked."""
    pages, wrong, asked = [], [], set()

    def open_page(width: int):
        page = chromium.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(address)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


def open_tab(page, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True)
    if page.viewport_size["width"] < 1000:  # the last ones are in a menu
        menu = page.locator(".overflow-menu > button")
        menu.wait_for()
        if not tab.is_visible():
            menu.click()
            tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
    tab.click()


def pictures(page, name: str) -> list[str]:
    """Addresses of the pictures in a part of the page, when all are there."""
    page.wait_for_selector(f"#{name} img", state="attached")
    return page.eval_on_selector_all(f"#{name} img", "images => images.map(image => image.src)")


def text_of(page, name: str) -> str:
    return page.locator(f"#{name}").text_content()


@pytest.mark.slow
def test_image_slider_second_image_and_samples(visit, tmp_path):
    page = visit(1280)
    page.set_input_files("#image input[type=file]", write_image(tmp_path / "a.png", 20, 24))
    shown = pictures(page, "reconstructions")
    assert (
        len(shown) == len(set(shown)) == 6
    )  # original; reconstruction and difference of each; original as the MLP sees it
    text = text_of(page, "reconstructions")
    assert text.count("PSNR") == 2 and "<b>vae" in text and "from 24x20 to 8x8 pixels" in text

    open_tab(page, "Latent channels")
    assert len(pictures(page, "channels")) == 4 and text_of(page, "channels").count("nats") >= 7

    open_tab(page, "Directions")
    reconstruction, shifted = pictures(page, "shifted")
    assert reconstruction == shifted
    page.locator("#direction-1 input[type=range]").press("ArrowRight")
    page.wait_for_function("before => document.querySelectorAll('#shifted img')[1].src != before", arg=shifted)
    assert pictures(page, "shifted")[0] == reconstruction
    page.locator("#reset").click()
    page.wait_for_function("before => document.querySelectorAll('#shifted img')[1].src == before", arg=shifted)
    page.get_by_label("<b>vae").click()  # a convolutional model, with as many directions as latent channels
    page.wait_for_selector("#direction-4", state="visible")
    assert pictures(page, "shifted")[0] != reconstruction

    open_tab(page, "Interpolation")
    page.set_input_files("#second-image input[type=file]", write_image(tmp_path / "b.png", 12, 30, 1))
    assert len(pictures(page, "interpolation")) == 14

    open_tab(page, "Samples")
    before = pictures(page, "samples")
    page.locator("#seed input").fill("1")
    page.locator("#seed input").press("Enter")
    page.wait_for_function("before => document.querySelector('#samples img').src != before", arg=before[0])
    assert len(before) == 32


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_scrolled_sideways(width, visit, tmp_path):
    page = visit(width)
    file = write_image(tmp_path / "a.png", 40, 60)
    page.set_input_files("#image input[type=file]", file)
    for tab, part in (
        ("Reconstruction", "reconstructions"),
        ("Latent channels", "channels"),
        ("Directions", "shifted"),
        ("Interpolation", "interpolation"),
        ("Samples", "samples"),
    ):
        open_tab(page, tab)
        if tab == "Interpolation":
            page.set_input_files("#second-image input[type=file]", file)
        page.wait_for_selector(f"#{part} img, #{part} .dv-units", state="visible")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        sizes = page.eval_on_selector_all(
            f"#{part} img", "images => images.map(image => [image.naturalWidth, image.width])"
        )
        assert sizes and all(natural > 0 and drawn >= 64 for natural, drawn in sizes), tab


@pytest.mark.slow
def test_damaged_file_is_told_and_the_next_one_works(visit, tmp_path):
    page = visit(1280)
    whole = write_image(tmp_path / "a.png", 20, 24).read_bytes()
    (tmp_path / "damaged.png").write_bytes(whole[: len(whole) // 2])
    page.set_input_files("#image input[type=file]", tmp_path / "damaged.png")
    page.get_by_text("cannot read the image").first.wait_for()
    page.set_input_files("#image input[type=file]", tmp_path / "a.png")
    pictures(page, "reconstructions")
