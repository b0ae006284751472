"""The code in docs/pipeline.md runs from top to bottom, and prints what the page says."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageChops
from support.stock import run_without_package
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_vae import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "pipeline.md").read_text()
# each with what it prints: `text`, or `text varies` where figures depend on the training
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text( varies)?\n(.*?)```\n)?", PAGE, re.S)
OURS = "# this block needs diffusers_vae"
RUN = f"""
import contextlib, io, json, sys
names, printed = {{}}, []
for code in json.load(open("blocks.json")):
    if code.startswith({OURS!r}):
        del sys.modules["diffusers_vae"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    printed.append(out.getvalue())
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_vae"]:
        sys.modules[name] = None
json.dump(printed, open("printed.json", "w"))
"""


def form(text):
    """Without the figures that differ between trainings and versions."""
    return re.sub(r"-?\d+(\.\d+)+(e-\d+)?|\d+%", "#", text)


def table():
    """First cells of the rows of the last table, with the other two."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if len(row) == 3}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder where the default commands ran, with a few images, and then the page; what each block printed."""
    folder = tmp_path_factory.mktemp("page")
    common = ["--run.tracker=null", "--run.max_images=64", "--data.heldout_fraction=0.9"]
    sampling = {"steps": 1, "seeds": 1, "guidance": [1.0], "heldout_images": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", *common, "--evaluation.max_images=8"]) == 0
        few = [f"--sampling.{name}={value}" for name, value in sampling.items()]
        assert cli.main(["train-text-to-image", *common, *few]) == 0
    (folder / "blocks.json").write_text(json.dumps([code for code, _, _ in BLOCKS]))
    run_without_package(RUN, folder)
    return folder, json.loads((folder / "printed.json").read_text())


@pytest.mark.slow
class TestPipeline:
    def test_blocks_print_what_the_page_shows(self, ran):
        assert len(ran[1]) == len(BLOCKS) > 10
        for (code, varies, shown), printed in zip(BLOCKS, ran[1], strict=True):
            same = form if varies else str
            assert same(printed.strip()) == same(shown.strip()), code

    def test_pictures_are_those_that_the_code_makes(self, ran):
        shown = {Path(path).name for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE)}
        assert shown == {path.name for path in ran[0].glob("*.png")}
        for name in shown:
            made, kept = (Image.open(folder / name) for folder in (ran[0], DOCS / "pictures"))
            assert made.size == kept.size
            assert ImageChops.invert(made.convert("L")).getbbox()  # not all white

    def test_table_is_of_this_model(self, ran):
        counts = re.findall(r"(\w+) +\w+ +(\d[\d,]{3,})$", ran[1][1], re.M)
        names = {"text_encoder": "text encoder", "unet": "U-Net", "vae": "VAE"}
        assert {name for name, _ in counts} == set(names)
        for name, count in counts:
            assert table()[f"{names[name]}: parameters"][0].startswith(count), name


def test_one_block_needs_the_package():
    assert [code.startswith(OURS) for code, _, _ in BLOCKS if "diffusers_vae" in code] == [True]


@pytest.mark.slow
def test_table_is_of_stable_diffusion():
    """Parameters of stock models with the sizes of Stable Diffusion 1.5, which are mostly the classes' defaults."""
    text = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}
    with torch.device("meta"):
        models = {
            "U-Net": UNet2DConditionModel(cross_attention_dim=768),
            "VAE": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
            ),
            "text encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, intermediate_size=3072, **text)),
        }
    for name, model in models.items():
        count = sum(weights.numel() for weights in model.parameters())
        assert table()[f"{name}: parameters"][1].startswith(f"{count:,}"), name


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert path[1:] in headings if path.startswith("#") else (page.parent / path).exists(), path
