"""Cards and pushes, by the real client, against a server that speaks the Hub's protocol."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import logging as client_logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from support.files import filled
from support.hub import CONFIG, READ_TOKEN, REPO, TOKEN, connect, make_run, uploaded, write_report
from support.hub_server import Fault, card_errors
from support.launches import Launch
from support.models import make_vae
from support.stock import run_without_package

from diffusers_vae import MLPVAE, VAE, cli
from diffusers_vae.data import DataConfig, load_split
from diffusers_vae.evaluation.figures import FIGURES
from diffusers_vae.evaluation.report import FineTuning, read_report
from diffusers_vae.hub.card import render_card, write_card
from diffusers_vae.hub.config import HubConfig
from diffusers_vae.hub.push import check_can_push, push
from diffusers_vae.losses.adversarial import AdversarialConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig, load_autoencoder
from diffusers_vae.models.config import add_lora
from diffusers_vae.tasks.autoencoder_config import TrainConfig

ROOT = Path(__file__).parents[1]
WRONG_TOKEN = "hf_WhichTheServerDoesNotKnow"


TUNED = {
    "source": "stabilityai/sd-vae-ft-mse", "revision": "v1", "weights_sha256": "ab" * 32, "encoder_sha256": "cd" * 32,
    "latents_unchanged": True,
    "differences": {"psnr": [0.5234, 0.49, 0.5512], "rate": [0.0, 0.0, 0.0], "ssim": [-0.001, -0.002, 0.0]},
    "repository": "stabilityai/sd-vae-ft-mse",
}  # fmt: skip
ADAPTER = "lora/pytorch_lora_weights.safetensors"


def tune(run: Path, fine_tuning: dict | None = None, **model) -> Path:
    """Make of a run one that began with a trained autoencoder."""
    fine_tuning = TUNED | (fine_tuning or {})
    report = json.loads((run / "evaluation.json").read_text())
    write_report(run, report | {"fine_tuning": fine_tuning})
    defaults = {"subfolder": None, "train": "decoder", "lora_rank": None, "latents": None}
    model = {"architecture": "vae", "pretrained": fine_tuning["source"], "revision": "v1"} | defaults | model
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": model}, sort_keys=False))
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with random weights, ready to be pushed."""
    return make_run(tmp_path / "runs" / "tiny", make_vae(), (8, 8), CONFIG)


@pytest.fixture
def mlp_run(tmp_path) -> Path:
    config = CONFIG | {"model": {"architecture": "mlp", "hidden_dim": 8, "latent_dim": 2}}
    return make_run(tmp_path / "runs" / "perceptron", MLPVAE(8, 1, 8, 2), (8, 8), config)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def expected_files(run: Path, config: HubConfig) -> dict[str, bytes]:
    names = ["config.json", "diffusion_pytorch_model.safetensors"]
    files = {name: (run / "model" / name).read_bytes() for name in names}
    files["evaluation.json"] = (run / "evaluation.json").read_bytes()
    files["config.yaml"] = (run / "config.yaml").read_bytes().replace(b"/home/ann/secret-place", b"secret-place")
    files |= {f"pictures/{name}.png": (run / "pictures" / f"{name}.png").read_bytes() for name in PICTURED}
    return files | {"README.md": render_card(run, config).encode()}


PICTURED = ("reconstructions", "loss")


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def read_markdown(card: str) -> tuple[list[str], str]:
    """Kinds of all elements of a card's text, but for the plain ones, and its text as it is shown."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(card.partition("\n---\n")[2])
    inner = [part for token in tokens for part in token.children or [token]]
    plain = ("text", "text_special", "softbreak")
    shown = "".join(part.content or " " for part in inner)
    return [token.type for token in [*tokens, *inner] if token.type not in plain], shown


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"push": True}, "hub.push needs hub.repo_id"),
            ({"repo_id": "no-namespace"}, "hub.repo_id must be NAMESPACE/NAME, got 'no-namespace'"),
            ({"repo_id": "ann/a/b"}, "hub.repo_id must be NAMESPACE/NAME, got 'ann/a/b'"),
            ({"repo_id": "ann/a--b"}, "hub.repo_id must be NAMESPACE/NAME, got 'ann/a--b'"),
            ({"repo_id": ""}, "hub.repo_id must be NAMESPACE/NAME, got ''"),
            ({"base_model": "a b"}, "hub.base_model must be NAMESPACE/NAME"),
            ({"commit_message": " "}, "hub.commit_message must not be empty"),
            ({"create_pr": True, "revision": "dev"}, "hub.revision must be left out, got 'dev'"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            HubConfig(**settings)

    def test_right_settings_pass(self):
        (
            HubConfig(),
            HubConfig(create_pr=True, revision="main"),
            HubConfig(push=True, repo_id="ann/x", base_model="gpt2"),
        )

    def test_command_names_what_differs_from_the_defaults(self):
        config = HubConfig(True, "ann/x", True, "dev", "it's done", False, "mit", "ann/y")
        command = shlex.split(config.command(Path("my runs/a")))
        assert command[:4] == ["diffusers-vae", "push", str(Path.cwd() / "my runs/a"), "ann/x"]
        options = dict(zip(command[4::2], command[5::2], strict=True))
        assert options == {
            "--private": "true",
            "--revision": "dev",
            "--commit_message": "it's done",
            "--license": "mit",
            "--base_model": "ann/y",
        }


class TestCard:
    def test_metadata_is_that_of_the_evaluation(self, run):
        report = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").unlink()  # the trainer writes it last
        write_card(run, HubConfig(repo_id=REPO, license="mit", base_model="ann/base"), report)
        card = ModelCard.load(run / "README.md")
        assert card_errors(str(card)) == []
        assert card.data.library_name == "diffusers" and card.data.license == "mit"
        assert card.data.base_model == "ann/base" and {"vae", "autoencoder-kl"} <= set(card.data.tags)
        assert card.data.model_name == "tiny-vae"
        values = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert values == {key: report[key] for key in FIGURES if report.get(key) is not None}
        assert {result.dataset_split for result in card.data.eval_results} == {"held-out"}

    def test_every_number_shown_is_measured(self, run):
        card = render_card(run)
        for shown in ("| PSNR | 30.88 | 30.50 to 31.25 |", "| LPIPS (vgg) | 0.0625 |", "30 of 32", "6.2 %", "14,431"):
            assert shown in card
        assert "LPIPS (alex)" not in card and "rFID" not in card
        report = json.loads((run / "evaluation.json").read_text())
        report["psnr"], report["posterior"]["active_units"] = 12.5, 3
        write_report(run, report)
        changed = render_card(run)
        assert "| PSNR | 12.50 |" in changed and "3 of 32" in changed and "30.9" not in changed

    def test_data_set_of_the_hub_is_linked(self, run):
        assert ModelCard(render_card(run)).data.datasets is None
        config = CONFIG | {"data": CONFIG["data"] | {"name": "mnist"}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert ModelCard(render_card(run)).data.datasets == ["ylecun/mnist"]

    def test_repeating_the_training_does_not_push(self, run):
        assert "--run.output_dir FOLDER`" in render_card(run)
        (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"hub": {"push": True, "repo_id": REPO}}))
        assert "--run.output_dir FOLDER --hub.push false`" in render_card(run)

    @pytest.mark.parametrize("kind", ["run", "mlp_run"])
    def test_code_runs_as_it_stands(self, kind, request, monkeypatch):
        run = request.getfixturevalue(kind)
        monkeypatch.chdir(run.parents[1])
        card = render_card(Path("runs") / run.name)
        names = {"images": torch.rand(2, 1, 8, 8) * 2 - 1}
        blocks = re.findall(r"```python\n(.*?)```", card, re.S)
        assert blocks[0].count("\n") == 3 and f'from_pretrained("runs/{run.name}/model")' in blocks[0]
        for block in blocks:
            exec(block, names)
        assert type(names["vae"]) is (AutoencoderKL if kind == "run" else MLPVAE)
        assert names["images"].shape == (2, 1, 8, 8)

    def test_pushed_card_loads_from_the_hub(self, run):
        assert f'AutoencoderKL.from_pretrained("{REPO}")' in render_card(run, HubConfig(repo_id=REPO))
        card = render_card(run, HubConfig(repo_id=REPO, revision="dev"))
        assert f'AutoencoderKL.from_pretrained("{REPO}", revision="dev")' in card

    def test_perceptron_says_what_it_needs(self, mlp_run):
        card = render_card(mlp_run)
        assert "needs the package `diffusers_vae`" in card and "stock" not in card
        assert ModelCard(card).data.library_name == "diffusers_vae"

    @pytest.mark.slow
    def test_pictures_are_linked_relatively(self, run):
        links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", render_card(run))
        assert links == [f"pictures/{name}.png" for name in PICTURED]
        assert all((run / link).is_file() for link in links)
        shutil.rmtree(run / "pictures")
        assert "![" not in render_card(run) and "## Pictures" not in render_card(run)

    @pytest.mark.slow
    def test_limits_follow_from_the_settings(self, run):
        assert "without a perceptual or adversarial term" in render_card(run)
        assert "No licence was chosen" in render_card(run)
        assert "No licence was chosen" not in render_card(run, HubConfig(license="mit"))
        config = CONFIG | {"objective": CONFIG["objective"] | {"perceptual": "vgg"}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert "without a perceptual" not in render_card(run) and "may look plausible" not in render_card(run)
        (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"adversarial": {"weight": 0.5}}))
        assert "without a perceptual" not in render_card(run) and "fine texture may look plausible" in render_card(run)

    def test_recipe_tells_of_options_only_where_they_are_used(self, run):
        plain = TrainConfig(data=DataConfig(), model=ModelConfig(), objective=ObjectiveConfig())
        plain.save(run / "config.yaml")
        (recipe,) = re.findall(r"## Training\n(.*?)\n\n\[config", render_card(run), re.S)
        for option in (
            "kl_schedule", "kl_warmup_images", "kl_cycles", "free_bits", "target_rate", "perceptual", "equivariance",
            "pretrained", "train", "lora_rank", "latents ", "adversarial", "lecam_weight",
        ):  # fmt: skip
            assert option not in recipe, option
        assert "| objective | likelihood gaussian, scale 0.05, kl_weight 1.0 |" in recipe
        objective = ObjectiveConfig(kl_schedule="cyclical", perceptual="vgg", equivariance=0.5)
        adversarial = AdversarialConfig(weight=0.5, start_images=600, layers=1, r1_weight=2.0)
        dataclasses.replace(plain, objective=objective, adversarial=adversarial).save(run / "config.yaml")
        (recipe,) = re.findall(r"## Training\n(.*?)\n\n\[config", render_card(run), re.S)
        for used in ("kl_schedule cyclical", "perceptual vgg", "equivariance 0.5", "start_images 600", "r1_weight 2.0"):
            assert used in recipe, used
        assert "kl_cycles" not in recipe and "lecam_weight" not in recipe and "warmup_images 0" not in recipe

    def test_decoder_alone_leaves_diffusion_models_working(self, run):
        card = render_card(tune(run, subfolder="vae"))
        link = "[stabilityai/sd-vae-ft-mse](https://huggingface.co/stabilityai/sd-vae-ft-mse"
        assert f"trained on scikit-learn's digits from {link})." in card
        assert (
            f"Made from {link}/tree/v1), subfolder `vae`, revision `v1`" in card and "its decoder was trained" in card
        )
        assert "**Latents unchanged: existing diffusion models keep working.** The encoder's weights are bit" in card
        assert f"SHA-256 `{TUNED['encoder_sha256']}`" in card and "so are `scaling_factor`" in card
        assert "| PSNR | +0.52 dB | +0.49 to +0.55 |" in card and "| SSIM | -0.0010 | -0.0020 to +0.0000 |" in card
        assert "| rate | +0" not in card  # which the encoder alone decides
        assert "mean 0 and std 1" not in card  # nobody has measured that
        assert "latents are scaled by the factors of stabilityai/sd-vae-ft-mse" in card
        assert "fine-tuned only on scikit-learn's digits" in card and "It was trained only on" not in card
        assert ModelCard(card).data.base_model == "stabilityai/sd-vae-ft-mse" and card_errors(card) == []
        assert ModelCard(render_card(run, HubConfig(base_model="a/b"))).data.base_model == "a/b"

    def test_trained_encoder_makes_other_latents(self, run):
        card = render_card(tune(run, {"latents_unchanged": False}, train=["encoder.mid_block.*", "decoder.*"]))
        assert "**Latents changed:** the encoder was trained" in card and "no longer fit" in card
        assert "what `encoder.mid_block.*`, `decoder.*` matches of it was trained" in card
        assert "mean 0 and std 1" in card and "unchanged" not in card and "keep working" not in card

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["absolute", "relative", "elsewhere", "file", "windows"])
    def test_source_on_this_machine_is_named_without_its_path(self, run, place, monkeypatch, tmp_path):
        folder = tmp_path / "runs" / "secret-vae" / "model"
        folder.mkdir(parents=True)
        monkeypatch.chdir(tmp_path if place == "relative" else "/")
        windows = "C:\\Users\\ann\\secret-vae"
        sources = {"absolute": str(folder), "file": "checkpoints/vae.ckpt", "windows": windows}
        run = tune(run, {"source": sources.get(place, "runs/secret-vae"), "repository": None})
        card = render_card(run, HubConfig(repo_id=REPO))
        name = "vae.ckpt" if place == "file" else "secret-vae"
        assert f"Made from {name}, revision" in card and f"from {name}." in card
        assert str(tmp_path) not in card and "runs/secret" not in card and "huggingface.co/" not in card
        assert ModelCard(card).data.base_model is None and "Users" not in card

    def test_run_that_did_not_record_its_source_claims_none(self, run):
        """Unless it was a folder of the Hub's cache, whose path names the repository."""
        commit = "0123456789abcdef" * 2 + "01234567"
        cached = f"/home/ann/.cache/huggingface/hub/models--stabilityai--sd-vae-ft-mse/snapshots/{commit}"
        for source, expected in (("stabilityai/sd-vae-ft-mse", None), (cached, "stabilityai/sd-vae-ft-mse")):
            tune(run, {"source": source})
            report = json.loads((run / "evaluation.json").read_text())
            del report["fine_tuning"]["repository"]
            write_report(run, report)
            card = render_card(run)
            assert ModelCard(card).data.base_model == expected and ("from sd-vae-ft-mse." in card) == (not expected)
            assert ("huggingface.co/stabilityai" in card) == (expected is not None) and "/home/ann" not in card

    @pytest.mark.parametrize("source", ["model", "vae", ".", ".."])
    def test_source_without_a_folder_in_its_path_has_a_name_too(self, run, source):
        tune(run, {"source": source, "repository": None})
        assert f"Made from {source}, revision" in render_card(run)

    @pytest.mark.slow
    def test_adapters_load_as_the_card_says(self, run):
        base, tuned = make_vae(1).eval(), make_vae(1)
        add_lora(tuned, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=generator)
        tuned.save_lora_adapter(run / "lora")
        card = render_card(tune(run, lora_rank=2))
        assert "adapters of rank 2 on its decoder (LoRA) were trained" in card
        (line,) = re.findall(r"`(base\.load_lora_adapter.*)`", card)
        stock, latents = make_vae(1).to_diffusers().eval(), torch.randn(1, 2, 4, 4, generator=generator)
        exec(line, {"base": stock})
        with torch.no_grad():
            expected = tuned.eval().decode(latents).sample
            assert torch.allclose(stock.decode(latents).sample, expected, atol=1e-5)
            assert not torch.allclose(base.decode(latents).sample, expected, atol=1e-2)
        pushed = render_card(run, HubConfig(repo_id=REPO))
        assert f'base.load_lora_adapter("{REPO}", prefix=None' in pushed

    def test_tells_of_float16_and_of_the_weight_of_the_rate(self, run):
        assert "Float16" not in render_card(run) and "The loss has kl_weight 0.5." in render_card(run)
        report = json.loads((run / "evaluation.json").read_text())
        precision = {"images": 1234, "blocks": {"a": 1.0}, "overflow": None, "fp16_psnr": 71.0, "verdict": "safe"}
        report |= {"fp16": precision | {"advice": "Float16 is safe: say so."}, "kl_weight": 1e-6, "scale": 0.125}
        write_report(run, report)
        card = render_card(run)
        assert "Float16 is safe: say so. Measured on 1,234 images." in card
        assert "The loss has kl_weight 1e-06." in card and "0.125" not in card

    def test_reports_a_target_rate_that_was_missed(self, run):
        report = json.loads((run / "evaluation.json").read_text())
        for target, missed in ((None, False), (report["rate"], False), (10 * report["rate"], True)):
            write_report(run, report | {"target_rate": target})
            assert ("was not reached: the rate is" in render_card(run)) == missed

    @pytest.mark.parametrize("hostile", ["<!--<script>", "a`b``c", "[x](y)|**z**_", "# \\ $x$ ~~", "\x1b\n\n# a\udcff"])
    def test_names_mean_nothing_in_markdown(self, run, hostile):
        """A parser of Markdown finds them as text, and the same blocks as with harmless ones."""
        cards = []
        for name in (hostile, "name"):
            report = json.loads((run / "evaluation.json").read_text())
            report["protocol"] |= dict.fromkeys(
                ("data", "split", "fingerprint", "resize", "value_range", "dtype"), name
            )
            report["protocol"]["versions"] = {name: name}
            report["posterior"] |= {"verdict": name, "advice": name}
            report["density"] = report["model"]["class_name"] = report["model"]["weights_sha256"] = name
            report["fp16"] = {"images": 1, "blocks": {}, "overflow": None, "fp16_psnr": None, "verdict": "safe"}
            report["fp16"]["advice"] = name
            write_report(run, report)
            changes = {"revision": name, "weights_sha256": name, "encoder_sha256": name, "source": f"/x/{name}"}
            changes["repository"] = None
            tune(run, changes, subfolder=name, train=[name])
            settings = yaml.safe_load((run / "config.yaml").read_text())
            settings["data"]["fit"] = name
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
            cards.append(render_card(run, HubConfig(repo_id=REPO, license=name, revision="x")))
        shown = hostile.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\udcff", "\\udcff")
        assert cards[0].encode() and "<!--" not in re.sub("`.*?`", "", cards[0].partition("\n---\n")[2])
        kinds, texts = zip(*map(read_markdown, cards), strict=True)
        assert kinds[0] == kinds[1]
        assert texts[0].count(shown) >= texts[1].count("name") - 3 > 15
        assert ModelCard(cards[0]).data.license == hostile

    @pytest.mark.parametrize("name", ['a"); import os; ("', "a\nb", "<!--", "back\\slash", "\u202e"])
    def test_example_loads_the_run_whatever_its_name(self, run, name, monkeypatch):
        monkeypatch.chdir(run.parent)
        run.rename(name)
        code = re.search(r"```python\n(.*?)```", render_card(Path(name)), re.S)[1]
        names = {}
        exec(code, names)
        assert isinstance(names["vae"], AutoencoderKL) and "os" not in names
        write_card(Path(name), HubConfig(), json.loads(Path(name, "evaluation.json").read_text()))

    @pytest.mark.slow
    def test_is_the_same_each_time_and_has_no_local_path(self, run):
        config = HubConfig(repo_id=REPO)
        assert render_card(run, config) == render_card(run, config)
        assert "secret-place" not in render_card(run, config) and str(run.parent) not in render_card(run, config)
        assert "{{" not in render_card(run) and "{%" not in render_card(run) and "None" not in render_card(run)


class TestPush:
    @pytest.mark.slow
    def test_uploads_what_others_need_and_nothing_else(self, hub, run):
        before = contents(run)
        config = HubConfig(repo_id=REPO, license="mit")
        assert push(run, config) == f"{hub.url}/{REPO}"
        assert uploaded(hub) == expected_files(run, config)
        assert contents(run) == before
        assert len(hub.repos[REPO].commits) == 2 and not hub.repos[REPO].private
        assert hub.repos[REPO].at("main").message == "Upload tiny: PSNR 30.88 dB on 180 images"

    @pytest.mark.slow
    def test_adapters_go_with_the_model_and_leave_with_it(self, hub, run):
        (run / "lora").mkdir()
        shutil.copy(run / "model" / "diffusion_pytorch_model.safetensors", run / ADAPTER)
        push(tune(run, lora_rank=2), HubConfig(repo_id=REPO))
        expected = expected_files(run, HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected | {ADAPTER: (run / ADAPTER).read_bytes()}
        push(tune(run), HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(run, HubConfig(repo_id=REPO))

    @pytest.mark.slow
    def test_writes_nothing_so_that_full_disks_do_not_matter(self, hub, run, small_disk, monkeypatch):
        """That of the run, of temporary files and of the Hub's cache."""
        full = Path(shutil.move(run, small_disk / "tiny"))
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk / "cache"))
        filled(small_disk)
        before = contents(small_disk)
        push(full, HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(full, HubConfig(repo_id=REPO))
        assert contents(small_disk) == before

    @pytest.mark.slow
    def test_repeated_changes_nothing(self, hub, run):
        push(run, HubConfig(repo_id=REPO))
        sent = len(hub.uploads)
        assert push(run, HubConfig(repo_id=REPO)) == f"{hub.url}/{REPO}"
        assert len(hub.repos[REPO].commits) == 2 and len(hub.uploads) == sent

    @pytest.mark.slow
    def test_repository_that_exists_gets_another_commit(self, hub, run, tmp_path):
        push(run, HubConfig(repo_id=REPO))
        other = make_run(tmp_path / "runs" / "other", make_vae(1), (8, 8), CONFIG)
        push(other, HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(other, HubConfig(repo_id=REPO))
        assert len(hub.repos[REPO].commits) == 3

    @pytest.mark.slow
    def test_shards_replace_one_file_and_the_other_way(self, hub, run):
        config = HubConfig(repo_id=REPO)
        push(run, config)
        (run / "model" / "diffusion_pytorch_model.safetensors").unlink()
        make_vae().save_pretrained(run / "model", max_shard_size="20KB")
        push(run, config)
        sharded = {name for name in uploaded(hub) if "safetensors" in name}
        assert len(sharded) > 2 and "diffusion_pytorch_model.safetensors" not in sharded
        assert "diffusion_pytorch_model.safetensors.index.json" in sharded
        for file in (run / "model").glob("*safetensors*"):
            file.unlink()
        make_vae().save_pretrained(run / "model")
        push(run, config)
        assert uploaded(hub) == expected_files(run, config)

    @pytest.mark.slow
    def test_private_revision_and_message(self, hub, run):
        config = HubConfig(repo_id="lab/x", private=True, revision="v1/try", commit_message="The first")
        assert push(run, config) == f"{hub.url}/lab/x/tree/v1%2Ftry"
        repo = hub.repos["lab/x"]
        assert repo.private and repo.at("v1/try").message == "The first"
        assert uploaded(hub, "lab/x", "v1/try") == expected_files(run, config)
        assert uploaded(hub, "lab/x") == {}
        push(run, config)  # the branch is there now

    @pytest.mark.slow
    def test_pull_request_leaves_main_alone(self, hub, run):
        hub.create("somebody/model")
        config = HubConfig(repo_id="somebody/model", create_pr=True)
        assert push(run, config) == f"{hub.url}/somebody/model/discussions/1"
        assert uploaded(hub, "somebody/model") == {}
        assert uploaded(hub, "somebody/model", "refs/pr/1") == expected_files(run, config)

    @pytest.mark.slow
    def test_goes_on_with_an_open_pull_request(self, hub, run):
        hub.create(REPO)
        push(run, HubConfig(repo_id=REPO, create_pr=True))
        push(run, HubConfig(repo_id=REPO, revision="refs/pr/1", license="mit"))
        assert b"license: mit" in uploaded(hub, REPO, "refs/pr/1")["README.md"]
        assert hub.repos[REPO].refs.keys() == {"main", "refs/pr/1"}

    def test_public_repository_is_never_used_as_a_private_one(self, hub, run):
        hub.create(REPO, private=False)
        with pytest.raises(OSError, match=f"to {REPO}: {REPO} must be private, as hub.private requires, but"):
            push(run, HubConfig(repo_id=REPO, private=True))
        assert uploaded(hub) == {} and hub.uploads == []

    def test_run_of_a_text_to_image_model_is_told_how_it_is_published(self, hub, run):
        (run / "pipeline").mkdir()
        (run / "pipeline" / "model_index.json").write_text("{}")
        with pytest.raises(ValueError, match=f"`hf upload ME/NAME {run}/pipeline`"):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []

    @pytest.mark.parametrize("missing", ["evaluation.json", "config.yaml", "model/config.json"])
    def test_unfinished_run_is_refused(self, hub, run, missing):
        (run / missing).unlink()
        with pytest.raises(ValueError, match=f"must be finished: .*{missing} is missing. Continue the run"):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []

    def test_weights_must_be_whole_safetensors(self, hub, run):
        config, weights = HubConfig(repo_id=REPO), run / "model" / "diffusion_pytorch_model.safetensors"
        (run / "model" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=r"safetensors, got diffusion_pytorch_model.bin, which can run code"):
            push(run, config)
        (run / "model" / "diffusion_pytorch_model.bin").unlink()
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is damaged"):
            push(run, config)
        weights.unlink()
        with pytest.raises(ValueError, match="holds no weights"):
            push(run, config)
        assert hub.requests == []

    def test_evaluation_of_an_older_version_is_named(self, hub, run):
        report = json.loads((run / "evaluation.json").read_text())
        write_report(run, report | {"format": 1})
        with pytest.raises(
            ValueError, match=r"its format is 1 and must be 2, .*Delete it and run the training command"
        ):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []

    def test_figures_of_other_weights_are_refused(self, hub, run):
        make_vae(1).save_pretrained(run / "model")
        with pytest.raises(ValueError, match=r"evaluation.json must be of the weights in .*model, got one of others"):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []

    @pytest.mark.slow
    def test_pictures_are_those_that_the_package_draws(self, hub, run, tmp_path):
        (tmp_path / "secret").write_text("root:x:0:0")
        shutil.copy(run / "pictures" / "loss.png", run / "pictures" / "holiday.png")
        (run / "pictures" / "zz.png").symlink_to(tmp_path / "secret")
        push(run, HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(run, HubConfig(repo_id=REPO))

    @pytest.mark.parametrize("kind", ["text", "jpeg", "cut", "followed", "pipe"])
    def test_pictures_must_be_png_and_nothing_else(self, hub, run, kind):
        picture = run / "pictures" / "loss.png"
        content = picture.read_bytes()
        if kind == "jpeg":
            Image.open(picture).save(picture, "JPEG")
        else:
            changed = {"cut": content[: len(content) // 2], "followed": content + b"root:x:0:0", "text": b"root:x:0:0"}
            picture.write_bytes(changed.get(kind, b""))
        if kind == "pipe":
            picture.unlink()
            (run / "lora").mkdir()
            os.mkfifo(run / ADAPTER)
            tune(run, lora_rank=2)
        match = (
            "must be a regular file, got a pipe" if kind == "pipe" else "loss.png must be the PNG that the run wrote"
        )
        with pytest.raises(ValueError, match=match):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []

    @pytest.mark.parametrize(
        "name",
        [
            "config.yaml", "evaluation.json", "model", "model/config.json", "model/value_range.json", "pictures",
            "model/diffusion_pytorch_model.safetensors", "pictures/loss.png", ADAPTER, "lora",
        ],
    )  # fmt: skip
    def test_links_are_refused(self, hub, run, name, tmp_path):
        if name in (ADAPTER, "lora"):
            (run / "lora").mkdir()
            shutil.copy(run / "model" / "diffusion_pytorch_model.safetensors", run / ADAPTER)
            tune(run, lora_rank=2)
        if name.endswith("range.json"):
            (run / name).write_text('{"low": 0, "high": 4095}')
        (run / name).rename(tmp_path / "elsewhere")
        (run / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(
            ValueError, match=rf"{name}.* must be a file of the run itself .*, got a link to .*elsewhere"
        ):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []

    @pytest.mark.slow
    def test_run_behind_a_link_is_pushed(self, hub, run, tmp_path):
        (tmp_path / "newest").symlink_to(run)
        push(tmp_path / "newest", HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(run, HubConfig(repo_id=REPO))

    @pytest.mark.slow
    def test_shards_are_those_of_the_index(self, hub, run):
        (run / "model" / "diffusion_pytorch_model.safetensors").unlink()
        make_vae().save_pretrained(run / "model", max_shard_size="20KB")
        stray = "diffusion_pytorch_model-00009-of-00009.safetensors"
        saved = {file.name for file in (run / "model").glob("*.safetensors*")}
        shutil.copy(run / "model" / max(saved - {INDEX}), run / "model" / stray)
        push(run, HubConfig(repo_id=REPO))
        assert {name for name in uploaded(hub) if "safetensors" in name} == saved and len(saved) > 2
        (run / "model" / INDEX).write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
        with pytest.raises(ValueError, match=r"index.json is damaged: it must name files like"):
            push(run, HubConfig(repo_id=REPO))

    @pytest.mark.parametrize("secret", [TOKEN, "mine", "hf_" + "aB3" * 11, "api_org_" + "x" * 34, "http://a:b@c.lan/"])
    @pytest.mark.parametrize("where", ["config.yaml", "evaluation.json", "config.json", "value_range.json", "message",
                                       "loss.png", "safetensors"])  # fmt: skip
    def test_tokens_are_refused(self, hub, run, where, secret, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "mine-of-an-unusual-kind" if secret == "mine" else TOKEN)
        secret = "mine-of-an-unusual-kind" if secret == "mine" else secret
        text, config = f"by {secret} of ann", HubConfig(repo_id=REPO)
        if where == "config.yaml":
            settings = CONFIG | {"hub": {"push": True, "commit_message": text}}
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
        elif where == "message":
            config, where = HubConfig(repo_id=REPO, commit_message=text), "hub.commit_message"
        elif where == "loss.png":
            described = PngInfo()
            described.add_text("Comment", text, zip=True)
            Image.open(run / "pictures" / "loss.png").save(run / "pictures" / "loss.png", pnginfo=described)
        elif where == "safetensors":
            file = run / "model" / "diffusion_pytorch_model.safetensors"
            save_file(load_file(file), file, {"format": "pt", "note": text})
        else:
            file = run / where if where == "evaluation.json" else run / "model" / where
            values = json.loads(file.read_text()) if file.exists() else {"low": 0, "high": 255}
            notes = {"versions": {"torch": text}} if where == "evaluation.json" else text
            if where == "evaluation.json":
                values["protocol"] |= notes
            else:
                values["note"] = notes
            file.write_text(json.dumps(values))
        if where == "evaluation.json":
            write_report(run, values)
        with pytest.raises(ValueError, match=rf"{where}.* must hold no token and no password, .* got one\.") as error:
            push(run, config)
        assert secret not in str(error.value) and hub.requests == []

    @pytest.mark.slow
    def test_relative_paths_on_this_machine_stay_here(self, hub, run):
        places = {"data": "home/ann/photos", "model": "home/ann/latents"}
        names = {"data": "root", "model": "latents"}
        settings = CONFIG | {section: CONFIG[section] | {names[section]: place} for section, place in places.items()}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        push(run, HubConfig(repo_id=REPO))
        found = yaml.safe_load(uploaded(hub)["config.yaml"])
        assert [found[section][name] for section, name in names.items()] == ["photos", "latents"]

    @pytest.mark.slow
    def test_paths_on_this_machine_stay_here(self, hub, run):
        places = {
            "inside": "pipe:cat /home/ann/x.tar 'C:\\Users\\ann\\y' 2/255 ~/z",
            "root": "/home/ann/my photos", "a": "C:\\Users\\ann\\x.png", "b": "~/data/y", "c": "../../ann/z",
            "d": ["/srv/ann"], "e": "file:///home/ann/f", "kept": "runs/ann", "rule": "nats/image", "url": "https://hub.lan/ann",
        }  # fmt: skip
        shown = {
            "inside": "pipe:cat x.tar 'y' 2/255 z",
            "root": "my photos", "a": "x.png", "b": "y", "c": "z", "d": ["ann"], "e": "f", "kept": "runs/ann",
            "rule": "nats/image", "url": "https://hub.lan/ann",
        }  # fmt: skip
        settings = CONFIG | {"data": CONFIG["data"] | places, "run": CONFIG["run"] | {"output_dir": str(run)}}
        tune(run, {"source": "/home/ann/models/base", "repository": None}, note="/home/ann/note")
        model = yaml.safe_load((run / "config.yaml").read_text())["model"]
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"model": model}) + "# by /home/ann/train.py\n")
        config = json.loads((run / "model" / "config.json").read_text())
        (run / "model" / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/ann/models/base"}))
        before = contents(run)
        push(run, HubConfig(repo_id=REPO))
        pushed = uploaded(hub)
        found = yaml.safe_load(pushed["config.yaml"])
        assert {name: found["data"][name] for name in shown} == shown and found["run"]["output_dir"] == "tiny"
        assert json.loads(pushed["evaluation.json"])["fine_tuning"]["source"] == "base"
        assert found["model"]["pretrained"] == "base" and "_name_or_path" not in json.loads(pushed["config.json"])
        for name in ("config.yaml", "evaluation.json", "config.json", "README.md"):
            assert b"/home/ann" not in pushed[name] and b"Users" not in pushed[name], name
        assert contents(run) == before

    @pytest.mark.slow
    def test_figures_that_were_edited_are_refused(self, hub, run):
        report = read_report(run / "evaluation.json")
        sealed = json.loads(report.to_json()) | {"psnr": 99.0}
        (run / "evaluation.json").write_text(json.dumps(sealed))
        with pytest.raises(ValueError, match=r"evaluation.json .* were changed .*measures the model again"):
            push(run, HubConfig(repo_id=REPO))
        assert hub.requests == []
        tuned = FineTuning(**TUNED | {"source": "/home/ann/base", "repository": None})
        (run / "evaluation.json").write_text(dataclasses.replace(report, fine_tuning=tuned).to_json())
        tune_settings = CONFIG["model"] | {"pretrained": "/home/ann/base", "train": "decoder"}
        (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": tune_settings}))
        push(run, HubConfig(repo_id=REPO))
        (run / "pushed.json").write_bytes(uploaded(hub)["evaluation.json"])  # without the path, and whole all the same
        assert read_report(run / "pushed.json").fine_tuning.source == "base"

    def test_needs_a_repository(self, run):
        with pytest.raises(ValueError, match=r"hub.repo_id must be NAMESPACE/NAME of a repository, got null"):
            push(run, HubConfig())


class TestFaults:
    @pytest.fixture(autouse=True)
    def repeats_at_once(self, monkeypatch):
        """The client waits for up to 8 seconds between two attempts."""
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["halfway", "unanswered"])
    def test_connection_that_breaks_in_the_commit(self, hub, run, kind):
        config = HubConfig(repo_id=REPO, license="mit")
        hub.faults.append(Fault("POST .*/commit/", kind))
        with pytest.raises(OSError, match=r"the connection to .* failed") as error:
            push(run, config)
        assert f"Repeat: diffusers-vae push {run} {REPO} --license mit" in str(error.value)
        assert "\n" not in str(error.value)
        assert len(hub.repos[REPO].commits) == (2 if kind == "unanswered" else 1)
        sent = sorted(hub.uploads)
        assert len(sent) == 3  # weights and pictures
        assert push(run, config) == f"{hub.url}/{REPO}"
        assert uploaded(hub) == expected_files(run, config)
        assert sorted(hub.uploads) == sent and len(hub.repos[REPO].commits) == 2

    @pytest.mark.slow
    def test_error_ends_with_the_command_that_repeats_the_upload(self, hub, run, capsys):
        config = HubConfig(False, "lab/x", True, "dev", "it's done", False, "mit", "ann/y")
        hub.faults.append(Fault("POST .*/commit/", "halfway"))
        with pytest.raises(OSError) as error:
            push(run, config)
        name, *arguments = shlex.split(str(error.value).partition("Repeat: ")[2])
        assert name == "diffusers-vae" and cli.main(arguments) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == f"published   {hub.url}/lab/x/tree/dev\n"
        assert uploaded(hub, "lab/x", "dev") == expected_files(run, config)
        assert hub.repos["lab/x"].private and hub.repos["lab/x"].at("dev").message == "it's done"

    @pytest.mark.slow
    def test_connection_that_breaks_halfway_through_a_file_is_mended(self, hub, run):
        hub.faults.append(Fault("PUT ", "halfway"))
        config = HubConfig(repo_id=REPO)
        push(run, config)
        assert uploaded(hub) == expected_files(run, config)
        assert sum(request.startswith("PUT ") for request, _ in hub.requests) == 4 and len(hub.uploads) == 3

    @pytest.mark.slow
    def test_connection_that_stays_broken(self, hub, run):
        weights = hashlib.sha256((run / "model" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        hub.faults.append(Fault(f"PUT .*{weights}", "halfway", times=6))  # the client tries six times
        config = HubConfig(repo_id=REPO)
        with pytest.raises(OSError, match=r"the connection to .* failed"):
            push(run, config)
        assert uploaded(hub) == {} and weights not in hub.uploads and len(hub.uploads) == 2
        push(run, config)
        assert uploaded(hub) == expected_files(run, config)
        assert sorted(hub.uploads) == sorted({*hub.uploads}) and weights in hub.uploads

    @pytest.mark.slow
    def test_rate_limit(self, hub, run):
        headers = {"Retry-After": "37"}
        hub.faults.append(Fault("POST /api/repos/create", "status", status=429, headers=headers))
        with pytest.raises(OSError, match=r"returned 429 .* wait 37 s\. .*Repeat: diffusers-vae push"):
            push(run, HubConfig(repo_id=REPO))
        push(run, HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(run, HubConfig(repo_id=REPO))

    @pytest.mark.slow
    def test_storage_that_is_overloaded_for_a_moment(self, hub, run):
        hub.faults.append(Fault("PUT ", "status", status=503))
        push(run, HubConfig(repo_id=REPO))
        assert uploaded(hub) == expected_files(run, HubConfig(repo_id=REPO))

    def test_hub_that_is_out_of_order(self, hub, run):
        hub.faults.append(Fault("POST /api/repos/create", "status", status=502, body="<html>Bad gateway</html>"))
        with pytest.raises(
            OSError, match=r"returned 502 .*server error: try again later\. .*Repeat: diffusers-vae push"
        ):
            push(run, HubConfig(repo_id=REPO))

    def test_wrong_token(self, hub, run, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", WRONG_TOKEN)
        with pytest.raises(
            OSError, match=r"returned 401 .*the token is not valid\. .*hf auth login.*HF_TOKEN"
        ) as error:
            push(run, HubConfig(repo_id=REPO))
        assert WRONG_TOKEN not in str(error.value) and hub.repos == {}

    def test_no_token(self, hub, run, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(OSError, match=r"returned 401 .*the token is not valid"):
            push(run, HubConfig(repo_id=REPO))
        with pytest.raises(OSError, match=r"there must be a token, got none\. Make one"):
            check_can_push(HubConfig(repo_id=REPO))

    @pytest.mark.slow
    @pytest.mark.parametrize("repo", [REPO, "stranger/x"])
    def test_token_that_may_not_write(self, hub, run, monkeypatch, repo):
        if repo == REPO:
            monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        with pytest.raises(OSError, match=r"returned 403 .*the token may not write there"):
            push(run, HubConfig(repo_id=repo))

    @pytest.mark.slow
    def test_server_that_echoes_the_token(self, hub, run):
        body = json.dumps({"error": f"the token {TOKEN} may not, nor hf_{'x' * 30}, says\n{hub.url}/a?signature=abc"})
        hub.faults.append(Fault("POST /api/repos/create", "status", status=403, body=body))
        with pytest.raises(OSError, match=r"the token \*\*\* may not, nor hf_\*\*\*, says http") as error:
            push(run, HubConfig(repo_id=REPO))
        assert error.value.__cause__ is None and error.value.__context__ is None
        assert "abc" not in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.slow
    def test_revision_that_cannot_be(self, hub, run):
        with pytest.raises(OSError, match=r"returned 404 .*repository or revision does not exist"):
            push(run, HubConfig(repo_id=REPO, revision="refs/pr/9"))

    @pytest.mark.slow
    def test_licence_that_the_hub_does_not_know(self, hub, run):
        with pytest.raises(OSError, match=r'returned 400 .*"license" must be one of .*change what the message names'):
            push(run, HubConfig(repo_id=REPO, license="MIT licence"))
        assert hub.uploads == []

    def test_server_that_is_gone(self, hub, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=r"the connection to http://127.0.0.1:9 failed: Connect"):
            push(run, HubConfig(repo_id=REPO))


class TestPasswords:
    """Of a Hub of one's own, in HF_ENDPOINT."""

    SECRET = "s3cret-word"

    @pytest.fixture(autouse=True)
    def endpoint(self, hub, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        connect(monkeypatch, f"http://ann:{self.SECRET}@127.0.0.1:9", tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "work",
        [
            lambda run: push(run, HubConfig(repo_id=REPO)),
            lambda run: check_can_push(HubConfig(repo_id=REPO)),
            lambda run: load_autoencoder(REPO),
            lambda run: load_split(DataConfig(name="datasets", root=REPO, resolution=8), "all"),
        ],
    )
    def test_show_in_no_error(self, run, work, caplog):
        with pytest.raises(OSError) as error:
            work(run)
        assert self.SECRET not in str(error.value) + caplog.text
        assert REPO in str(error.value)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "words", [["info", REPO], ["push", "RUN", REPO], ["data", REPO], ["evaluate", REPO, "--data", "digits"]]
    )
    def test_show_nowhere_in_the_terminal(self, run, words, capfd):
        assert cli.main([str(run) if word == "RUN" else word for word in words]) == 1
        out, error = capfd.readouterr()
        assert self.SECRET not in out + error and "error: " in error


class TestCheck:
    @pytest.mark.slow
    def test_what_would_be_refused_is_told_before(self, hub, monkeypatch):
        check_can_push(HubConfig(repo_id=REPO))
        check_can_push(HubConfig(repo_id="lab/x"))
        check_can_push(HubConfig(repo_id="stranger/x", create_pr=True))
        with pytest.raises(OSError, match=r"a namespace of the token, ann or lab, got stranger/x"):
            check_can_push(HubConfig(repo_id="stranger/x"))
        with pytest.raises(ValueError, match=r"hub.repo_id must be NAMESPACE/NAME of a repository, got null"):
            check_can_push(HubConfig())
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        with pytest.raises(OSError, match="must have write permission, got one of ann with the role read"):
            check_can_push(HubConfig(repo_id=REPO))
        monkeypatch.setenv("HF_TOKEN", WRONG_TOKEN)
        with pytest.raises(OSError, match=f"cannot push to {REPO}: the Hub returned 401") as error:
            check_can_push(HubConfig(repo_id=REPO))
        assert WRONG_TOKEN not in str(error.value)
        assert hub.repos == {}


class TestLoading:
    @pytest.fixture
    def cache(self, hub, monkeypatch, tmp_path) -> Path:
        """An empty cache, and nobody logged in."""
        connect(monkeypatch, hub.url, tmp_path)
        return tmp_path / "hub"

    @pytest.mark.slow
    def test_pushed_model_loads_where_this_package_is_missing(self, hub, run, tmp_path):
        push(run, HubConfig(repo_id=REPO))
        code = f"""
import os
from huggingface_hub import constants
os.environ.pop("HF_TOKEN", None)
constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
constants.ENDPOINT, constants.HF_HUB_CACHE = {hub.url!r}, {str(tmp_path / "hub")!r}
constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.HF_TOKEN_PATH = {str(tmp_path / "no-token")!r}
import torch
from diffusers import AutoencoderKL
model = AutoencoderKL.from_pretrained("{REPO}")
torch.save((dict(model.config), model.state_dict()), "loaded.pt")
"""
        run_without_package(code, tmp_path)
        config, weights = torch.load(tmp_path / "loaded.pt", weights_only=False)
        assert_pushed(hub, config, weights, tmp_path / "hub")

    @pytest.mark.slow
    def test_pushed_model_loads_with_this_package(self, hub, run, cache, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setenv("HF_TOKEN", TOKEN)
            push(run, HubConfig(repo_id=REPO))
        model = VAE.from_pretrained(REPO)
        assert_pushed(hub, model.config, model.state_dict(), cache)

    @pytest.mark.slow
    def test_private_mlp_loads_with_the_token_alone(self, hub, mlp_run, cache, monkeypatch):
        hub.create(REPO, private=True)
        with monkeypatch.context() as patch:
            patch.setenv("HF_TOKEN", TOKEN)
            push(mlp_run, HubConfig(repo_id=REPO))
        with pytest.raises(OSError, match=REPO):
            MLPVAE.from_pretrained(REPO)
        assert not any(cache.rglob("*.safetensors"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        weights, reference = (MLPVAE.from_pretrained(source).state_dict() for source in (REPO, mlp_run / "model"))
        assert weights.keys() == reference.keys()
        assert all(torch.equal(weights[key], value) for key, value in reference.items())


def assert_pushed(hub, config, weights, cache):
    """That a model that was loaded is the one that `run` holds, and that no other files were downloaded for it."""
    assert (config["scaling_factor"], config["shift_factor"]) == (2.5, -0.05)
    reference = make_vae().state_dict()
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[key], value) for key, value in reference.items())
    (snapshot,) = (cache / "models--ann--tiny-vae" / "snapshots").iterdir()
    cached = contents(snapshot)
    assert len(cached) == 2 and cached.items() <= uploaded(hub).items()


def push_with_a_talkative_client(url, home, run, token=TOKEN, xet=False):
    """As with HF_DEBUG=1 and HF_HUB_VERBOSITY=debug."""
    os.environ["HF_TOKEN"] = token
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET, constants.HF_DEBUG = url, not xet, True
    constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = str(home / "hub"), str(home / "token")
    constants.HF_XET_CACHE = str(home / "xet")
    client_logging.set_verbosity_debug()
    logging.basicConfig(level=logging.INFO)
    try:
        print(push(run, HubConfig(repo_id=REPO, license="mit")))  # noqa: T201
    except OSError as error:
        print(f"error: {error}")  # noqa: T201
        sys.stdout.flush()
        os._exit(1)


@pytest.mark.slow
def test_token_shows_nowhere(hub, run, tmp_path):
    """Whatever happens, and with the client as talkative as it can be."""
    echo = json.dumps({"error": f"token {TOKEN} and {WRONG_TOKEN} seen"})
    warning = {"X-HF-Warning": f"auth; {TOKEN} is about to expire"}
    limited = {"Retry-After": "3", "X-Error-Message": f"slow down, {TOKEN}"}
    cases = {  # what goes wrong on the server, and what is asked for
        "none": (None, {}),
        "forbidden": (Fault("POST .*/preupload/", "status", status=403, body=echo, headers=warning), {}),
        "limited": (Fault("POST .*/commit/", "status", status=429, headers=limited), {}),
        "broken": (Fault("POST .*/commit/", "unanswered"), {}),
        "wrong": (None, {"token": WRONG_TOKEN}),
        "xet": (None, {"xet": True}),  # which this server does not speak
    }
    outputs = {}
    for name, (fault, settings) in cases.items():
        hub.faults = [fault] if fault else []
        (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"changed": {"by": name}}))
        work = partial(push_with_a_talkative_client, hub.url, tmp_path / "home", run, **settings)
        launch = Launch(work, tmp_path / f"{name}.log")
        assert launch.wait() == [0 if name == "none" else 1], launch.output()
        outputs[name] = launch.output()
        last = outputs[name].splitlines()[-1]
        assert last == f"{hub.url}/{REPO}" if name == "none" else "error: " in last
    assert "returned 401" in outputs["wrong"] and "xet-write-token" in outputs["xet"]
    assert "*** is about to expire" in outputs["forbidden"]
    for token in (TOKEN, WRONG_TOKEN):
        held = contents(tmp_path) | {f"hub/{name}": content for name, content in uploaded(hub).items()}
        assert [name for name, content in held.items() if token.encode() in content] == []
        assert "none.log" in held
    assert "/lfs/" in outputs["none"]  # of the storage, whose addresses are signed
    assert [name for name, output in outputs.items() if re.search(r"signature=\w", output)] == []
    assert any(TOKEN in headers.get("authorization", "") for _, headers in hub.requests)
    to_storage = [headers for request, headers in hub.requests if request.startswith("PUT ")]
    assert to_storage and not any("authorization" in headers for headers in to_storage)


@pytest.mark.slow
def test_wheel_holds_every_module_and_the_template(run, installed, tmp_path):
    packed = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusers_vae").rglob("*.py")}
    assert modules | {"diffusers_vae/model_cards/template.md", "diffusers_vae/py.typed"} <= packed
    assert not [name for name in packed if name.startswith(("tests", "training", "model_cards"))]
    code = f"""
import sys
from pathlib import Path
del sys.modules["diffusers_vae"]
sys.path.insert(0, {str(installed)!r})
from diffusers_vae.hub import card
assert card.__file__.startswith(sys.path[0]), card.__file__
Path("card.md").write_text(card.render_card(Path({str(run)!r})))
"""
    run_without_package(code, tmp_path)
    assert (tmp_path / "card.md").read_text() == render_card(run)
