"""The code in docs/pipeline.md runs and prints what the page shows; links, commands and flags of all pages exist."""

import contextlib
import io
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

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
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


def anchors(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = page.read_text()
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    references = set(re.findall(r"\]\[([\w-]+)\]", text))
    assert references == set(re.findall(r"^\[([\w-]+)\]: https://\S+$", text, re.M))


@pytest.fixture(scope="module")
def flags():
    """Flags of each command of diffusers-vae, from its --help."""
    found = {}
    for command in cli.COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        found[command] = set(re.findall(r"(?<![\w-])--\w[\w.]*", out.getvalue())) | {"--debug"}
    return found


def commands(text):
    """Commands of diffusers-vae and their flags in the code of a page: (command, arguments) pairs."""
    code = re.findall(r"```(\w*)[^\n]*\n(.*?)```|(?<!`)`([^`]+)`(?!`)", text, re.S)
    shell = [block or re.sub(r"\s+", " ", inline) for language, block, inline in code if not language]
    lines = re.sub(r"\\\n\s*", " ", "\n".join(shell))
    names = {"train_vae.py": "train", "train_text_to_image.py": "train-text-to-image"}
    pattern = r"(?:\bdiffusers-vae |-m diffusers_vae\.cli |training/(?=train_))([\w.-]+)((?:'[^']*'|[^\n#&;'])*)"
    return [(names.get(name, name), rest) for name, rest in re.findall(pattern, lines)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page, flags):
    for command, arguments in commands(page.read_text()):
        assert command in {*flags, "COMMAND", "--help"}, command
        for flag in re.findall(r"(?<!\S)--\w[\w.]*", arguments):
            assert flag in flags[command] or flag.startswith("--SECTION"), f"{command} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page, flags):
    """Settings in a page's code, alone or with a value: `run.step`, `--run.step graph`, `objective.scale 0.1`."""
    known = set().union(*flags.values())
    sections = {flag[2:].partition(".")[0] for flag in known if "." in flag} - {"vae"}  # a variable in code, too
    inline = re.findall(r"(?<!`)`(?:--)?([a-z_]+\.[a-z_0-9]+)(?: [^`]*)?`(?!`)", page.read_text())
    for setting in inline:
        section, _, name = setting.partition(".")
        if section in sections and name not in ("csv", "json", "py", "yaml"):
            assert f"--{setting}" in known, setting


def test_commands_are_found_in_blocks_and_lines():
    text = """`diffusers-vae trane runs/a`
```python
vae = "diffusers-vae none"
```
```
accelerate launch training/train_vae.py \\
  --run.colour '[1, 2]'  # --no
```
"""
    assert [(name, rest.split()) for name, rest in commands(text)] == [
        ("trane", ["runs/a"]),
        ("train", ["--run.colour", "'[1,", "2]'"]),
    ]
