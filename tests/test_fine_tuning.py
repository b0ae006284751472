"""Fine-tuning of an autoencoder: which weights move, which stay, and what the report states about it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from support.hub import TOKEN, connect, uploaded
from support.launches import run_forked
from support.models import original
from support.runs import assert_same_gradient, at, fit, fit_with, interrupted_at, left_behind, tensors, tiny

from diffusers_vae import VAE, encode_images
from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.engine.config import OptimizerConfig
from diffusers_vae.evaluation.compare import compare
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.hub.config import HubConfig
from diffusers_vae.hub.push import push
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.latents import dataset
from diffusers_vae.latents.statistics import measure_latents
from diffusers_vae.losses.adversarial import AdversarialConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import LATENT_PARTS, ModelConfig, load_autoencoder, unmeasured, weights_hash
from diffusers_vae.tasks.autoencoder import train
from diffusers_vae.tasks.autoencoder_step import build_model

DATA = DataConfig(resolution=8)
NO_LATENTS = {"scaling_factor", "shift_factor"}
FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of an autoencoder after some steps on digits, with the scaling of Stable Diffusion, not its own."""
    torch.manual_seed(0)
    vae = VAE(
        in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), norm_num_groups=4, sample_size=8,
        mid_block_add_attention=False, force_upcast=False,
    )  # fmt: skip
    images = to_model_range(load_data(DATA)[0].pixels[:64])
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (vae(images).sample - images).square().mean().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("base") / "vae"
    vae.save_pretrained(folder)
    return folder


def tuning(output_dir, source, model=None, **run):
    """Six steps, each of which is kept."""
    run = {"max_images": 180, "checkpoint_every": 30, "keep_checkpoints": 99, "ema_decay": 0.9} | run
    return dataclasses.replace(
        tiny(output_dir, ModelConfig(pretrained=str(source), **{"train": "decoder"} | (model or {})), **run),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_images=0),
        evaluation=EvaluationConfig(max_images=20),
    )


@pytest.fixture(scope="module")
def decoder_run(base, tmp_path_factory):
    config = tuning(tmp_path_factory.mktemp("decoder") / "run", base)
    train(config)
    return config


@pytest.fixture(scope="module")
def copied(base, tmp_path_factory):
    """The settings of a finished run from a copy of the base with factors of its own."""
    folder = tmp_path_factory.mktemp("copied")
    model = VAE.from_pretrained(base)
    model.register_to_config(**FACTORS)
    model.save_pretrained(folder / "vae")
    config = tuning(folder / "run", folder / "vae", max_images=60)
    train(config)
    return config


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    """The latents of all training images."""
    folder = tmp_path_factory.mktemp("cache")
    vae, images = load_autoencoder(str(base)), load_data(DATA)[0]
    encode_images(vae, images, folder / "latents", compute_dtype=torch.float32)  # as the encoder of a run computes
    return folder / "latents"


def output(config):
    return Path(config.run.output_dir)


def saved(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def settings_of(folder):
    values = json.loads((folder / "config.json").read_text())
    return {name: each for name, each in values.items() if name[0] != "_"}


def trained(config, images_seen):
    """The averaged weights of a run without adapters at a checkpoint."""
    state = tensors(output(config), images_seen, "ema")
    return {name.removeprefix("autoencoder."): each for name, each in state.items() if name != "slow_log_scale"}


def differing(before, after):
    """Names of the weights that are not the same, bit by bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def moved(config, source):
    """Names of the weights of a finished run that are not the source's."""
    return differing(saved(Path(source)), saved(output(config) / "model"))


def evaluation(config):
    return json.loads((output(config) / "evaluation.json").read_text())


def left_by_training(output_dir):
    """Checksums of all checkpoints, in which metrics.jsonl is, too."""
    return {name: each for name, each in left_behind(output_dir).items() if name.startswith("checkpoints")}


def assert_training_is_bit_identical_from(images_seen, config, to):
    again = interrupted_at(images_seen, output(config), to)
    fit(at(config, again))
    found = left_by_training(again)
    assert found == left_by_training(output(config)) and len(found) > 30


@pytest.mark.slow
class TestDecoder:
    def test_encoder_is_bit_equal_and_decoder_is_not(self, decoder_run, base):
        names = moved(decoder_run, base)
        assert not any(name.startswith(("encoder.", "quant_conv.")) for name in names)
        assert names == {name for name in saved(base) if name.startswith(("decoder.", "post_quant_conv."))}

    @pytest.mark.parametrize("factors", [{"scaling_factor": 0.18215, "shift_factor": None}, FACTORS], ids=str)
    def test_config_is_that_of_the_source(self, factors, decoder_run, copied):
        config = copied if factors == FACTORS else decoder_run
        source = Path(config.model.pretrained)
        assert settings_of(output(config) / "model") == settings_of(source)
        assert {name: settings_of(source)[name] for name in NO_LATENTS} == factors

    def test_stock_loads_it(self, decoder_run):
        _, missing = AutoencoderKL.from_pretrained(
            output(decoder_run) / "model", output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(missing.values())

    def test_report_states_what_stayed_and_what_became_better(self, decoder_run, base):
        found = evaluation(decoder_run)["fine_tuning"]
        source, result = (load_autoencoder(str(path)) for path in (base, output(decoder_run)))
        assert (found["source"], found["revision"]) == (str(base), None)
        assert found["weights_sha256"] == weights_hash(source)
        assert found["encoder_sha256"] == weights_hash(source, LATENT_PARTS) == weights_hash(result, LATENT_PARTS)
        assert found["latents_unchanged"] is True
        heldout, settings = load_data(DATA)[1], decoder_run.evaluation
        reports = [evaluate(vae, heldout, decoder_run.objective.build(), settings) for vae in (source, result)]
        expected = compare(*reports).differences
        assert found["differences"].keys() == expected.keys() and found["differences"]["psnr"][0] != 0
        for name, difference in expected.items():
            assert found["differences"][name] == pytest.approx([difference.mean, *difference.interval], abs=1e-5)
        assert found["differences"]["psnr"][0] == pytest.approx(reports[1].psnr - reports[0].psnr, abs=1e-5)

    def test_resumed_run_is_bit_identical(self, decoder_run, tmp_path):
        again = interrupted_at(90, output(decoder_run), tmp_path / "run")
        train(at(decoder_run, again))
        assert left_behind(again) == left_behind(output(decoder_run))

    def test_run_that_was_interrupted_before_its_first_checkpoint_is_bit_identical(self, decoder_run, tmp_path):
        assert_training_is_bit_identical_from(0, decoder_run, tmp_path / "run")


@pytest.mark.slow
def test_everything_is_trained_and_the_latents_are_measured(base, tmp_path):
    config = tuning(tmp_path / "run", base, {"train": "all"})
    train(config)
    assert moved(config, base) == set(saved(base))
    found = evaluation(config)["fine_tuning"]
    result = load_autoencoder(str(output(config)))
    assert found["latents_unchanged"] is False
    assert found["encoder_sha256"] == weights_hash(result, LATENT_PARTS)
    statistics = measure_latents(result, load_data(DATA)[0].first(20))
    values = settings_of(output(config) / "model")
    assert values["scaling_factor"] == pytest.approx(1 / statistics.std, rel=1e-5)
    assert values["shift_factor"] == pytest.approx(statistics.mean, rel=1e-4)
    assert values["latents_mean"] is values["latents_std"] is None
    before = settings_of(base)
    assert all(values[name] == before[name] for name in before.keys() - NO_LATENTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patterns", "prefixes", "unchanged"),
    [
        (("decoder.up_blocks.0.*", "decoder.conv_out.*"), ("decoder.up_blocks.0.", "decoder.conv_out."), True),
        (("encoder.conv_out.*", "quant_conv.bias"), ("encoder.conv_out.", "quant_conv.bias"), False),
    ],
)
def test_only_what_patterns_name_moves(patterns, prefixes, unchanged, base, tmp_path):
    config = tuning(tmp_path / "run", base, {"train": patterns}, max_images=30)
    train(config)
    assert moved(config, base) == {name for name in saved(base) if name.startswith(prefixes)}
    assert evaluation(config)["fine_tuning"]["latents_unchanged"] is unchanged
    factors = {name: settings_of(output(config) / "model")[name] for name in NO_LATENTS}
    assert (factors == {"scaling_factor": 0.18215, "shift_factor": None}) is unchanged


def watched(config):
    """The batches that the encoder of the model in training sees."""
    encoded = []

    def build(config):
        model = build_model(config)

        def note(encoder, given, moments):
            if model.training:
                encoded.append(given[0])

        model.encoder.register_forward_hook(note)
        return model

    fit_with(config, build=build)
    return encoded


class TestLatentCache:
    @pytest.mark.slow
    def test_gives_the_same_weights_and_the_encoder_does_not_run(self, decoder_run, base, cache, tmp_path):
        config = tuning(tmp_path / "cached", base, {"latents": str(cache)})
        assert watched(config) == []
        for name in ("model", "ema"):
            expected, found = (tensors(output(c), 180, name) for c in (decoder_run, config))
            for key, each in expected.items():
                torch.testing.assert_close(found[key], each, rtol=0, atol=1e-5)
        encoded = watched(tuning(tmp_path / "images", base, max_images=60))
        assert [len(images) for images in encoded] == [30, 30]  # so the hook sees what it is to see

    @pytest.mark.slow
    def test_resumed_run_is_bit_identical(self, base, cache, tmp_path):
        config = tuning(tmp_path / "run", base, {"latents": str(cache)})
        fit(config)
        again = interrupted_at(90, output(config), tmp_path / "again" / "run")
        train(at(config, again))
        assert left_by_training(again) == left_by_training(output(config))
        assert evaluation(at(config, again))["fine_tuning"]["latents_unchanged"] is True
        state = trained(config, 180)
        assert all(torch.equal(state[name], each) for name, each in saved(again / "model").items())

    @pytest.mark.slow
    def test_of_another_autoencoder_is_refused(self, base, cache, tmp_path):
        other = VAE.from_pretrained(base)
        with torch.no_grad():
            other.quant_conv.bias.add_(1e-3)
        other.save_pretrained(tmp_path / "other")
        self.assert_refused(tmp_path, tmp_path / "other", cache, f"{cache}.*another VAE")

    @pytest.mark.slow
    @pytest.mark.parametrize("at_once", [True, False])
    def test_with_a_flipped_bit_is_refused(self, at_once, base, cache, tmp_path, monkeypatch):
        """Before anything is written, or by the end of the training: a large cache is verified meanwhile."""
        folder = shutil.copytree(cache, tmp_path / "latents")
        path = folder / "shard-00000.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-999] + bytes([content[-999] ^ 4]) + content[-998:])
        monkeypatch.setattr(dataset, "VERIFIED_AT_ONCE", 2**30 * at_once)
        message = f"shard-00000.safetensors in {folder} missing or not as written"
        if at_once:
            self.assert_refused(tmp_path, base, folder, message)
        else:
            with pytest.raises(ValueError, match=message):
                train(tuning(tmp_path / "run", base, {"latents": str(folder)}))
            assert not (tmp_path / "run" / "model").exists()

    @pytest.mark.slow
    def test_of_images_that_change_is_refused(self, base, cache, tmp_path):
        config = tuning(tmp_path / "run", base, {"latents": str(cache)})
        with pytest.raises(
            ValueError, match=r"^model\.latents belong to unchanged images.* leave out data\.color_jitter"
        ):
            dataclasses.replace(config, data=dataclasses.replace(config.data, color_jitter=(0.1,) * 4))

    @pytest.mark.slow
    def test_of_other_images_is_refused(self, base, tmp_path):
        encode_images(load_autoencoder(str(base)), load_data(DATA)[1], tmp_path / "latents", data="the held-out")
        self.assert_refused(tmp_path, base, tmp_path / "latents", r"latents of other images: 180, the held-out")

    @pytest.mark.slow
    def test_without_deviations_is_refused(self, base, tmp_path):
        encode_images(load_autoencoder(str(base)), load_data(DATA)[0], tmp_path / "latents", kind="mode")
        self.assert_refused(tmp_path, base, tmp_path / "latents", r"^model\.latents .* kind mode: .*--kind posterior")

    @staticmethod
    def assert_refused(folder, source, latents, message):
        with pytest.raises(ValueError, match=message):
            fit(tuning(folder / "run", source, {"latents": str(latents)}))
        assert {path.name for path in (folder / "run").iterdir()} <= {".lock"}


@pytest.fixture(scope="module")
def adapted_run(base, tmp_path_factory):
    """The settings of a finished run with adapters."""
    config = tuning(tmp_path_factory.mktemp("lora") / "run", base, {"lora_rank": 2}, ema_decay=None)
    train(config)
    return config


@pytest.mark.slow
class TestLora:
    def adapted(self, adapted_run):
        """The model as it was trained, from its last checkpoint, with its adapters beside the weights."""
        model = adapted_run.model.build(1, (8, 8))
        model.load_state_dict(
            load_file(output(adapted_run) / "checkpoints" / "images-000000000180" / "model.safetensors")
        )
        return model.eval()

    @torch.no_grad()
    def test_saved_model_is_stock_and_reconstructs_as_the_adapted_one(self, adapted_run, base):
        stock, missing = AutoencoderKL.from_pretrained(
            output(adapted_run) / "model", output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(missing.values())
        images = to_model_range(load_data(DATA)[1].pixels[:8])
        expected = self.adapted(adapted_run)(images).sample
        torch.testing.assert_close(stock(images).sample, expected, rtol=0, atol=1e-5)
        assert (expected - AutoencoderKL.from_pretrained(base)(images).sample).abs().max() > 1e-3
        decoder = {name for name in saved(base) if name.startswith("decoder.")}
        assert moved(adapted_run, base) == {name for name in decoder if name.endswith("weight") and "norm" not in name}
        assert evaluation(adapted_run)["fine_tuning"]["latents_unchanged"] is True
        assert settings_of(output(adapted_run) / "model") == settings_of(base)

    @torch.no_grad()
    def test_adapters_load_on_the_source_in_stock(self, adapted_run, base):
        stock = AutoencoderKL.from_pretrained(base)
        stock.load_lora_adapter(output(adapted_run) / "lora", prefix=None, use_safetensors=True)
        images = to_model_range(load_data(DATA)[1].pixels[:8])
        torch.testing.assert_close(stock(images).sample, self.adapted(adapted_run)(images).sample, rtol=0, atol=1e-6)

    def test_resumed_run_is_bit_identical(self, adapted_run, tmp_path):
        assert_training_is_bit_identical_from(90, adapted_run, tmp_path / "run")


class TestSource:
    @pytest.mark.slow
    def test_that_changed_since_is_refused(self, copied, tmp_path):
        config = at(copied, interrupted_at(30, output(copied), tmp_path / "run"))
        source = Path(copied.model.pretrained)
        shutil.copytree(source, tmp_path / "kept")
        state = saved(source)
        state["decoder.conv_in.bias"] += 1e-3
        before = left_behind(output(config))
        try:
            save_file(state, source / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            with pytest.raises(FileExistsError, match=r"other inputs(.|\n)*another pretrained autoencoder"):
                fit(config)
        finally:
            shutil.copytree(tmp_path / "kept", source, dirs_exist_ok=True)
        assert left_behind(output(config)) == before
        fit(config)
        assert left_by_training(output(config)) == left_by_training(output(copied))

    @pytest.mark.slow
    def test_that_is_gone_is_named(self, copied, tmp_path):
        config = at(copied, interrupted_at(30, output(copied), tmp_path / "run"))
        source = Path(copied.model.pretrained)
        source.rename(tmp_path / "elsewhere")
        try:
            with pytest.raises(OSError, match=str(source)):
                fit(config)
            with pytest.raises(ValueError, match=f"^model.pretrained: there is no file or folder {source}"):
                tuning(tmp_path / "new", source)
        finally:
            (tmp_path / "elsewhere").rename(source)

    @pytest.mark.slow
    def test_that_is_gone_is_not_missed_by_a_finished_run(self, copied, tmp_path):
        source = Path(copied.model.pretrained)
        source.rename(tmp_path / "elsewhere")
        try:
            again = dataclasses.replace(copied, model=dataclasses.replace(copied.model))  # read anew
            assert train(again).report.fine_tuning.source == str(source)
        finally:
            (tmp_path / "elsewhere").rename(source)

    @pytest.mark.slow
    def test_original_checkpoint(self, tmp_path):
        """Trained as the stock model that it was, and saved as stock."""
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        stock = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(32, 32), sample_size=512, **blocks)
        stock.save_pretrained(tmp_path / "stock")
        state = original(stock)
        save_file(state, tmp_path / "vae.safetensors")
        torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
        names = ("stock", "vae.safetensors", "vae.ckpt")
        configs = [tuning(tmp_path / f"run {name}", tmp_path / name, max_images=60) for name in names]
        for config in configs:
            fit(config)
        of_folder, *of_files = (trained(config, 60) for config in configs)
        assert all(differing(of_folder, of_file) == set() for of_file in of_files)
        train(configs[2])  # what is left of it: to save and to measure
        names = moved(configs[2], tmp_path / "stock")
        assert {name.split(".")[0] for name in names} == {"decoder", "post_quant_conv"}
        _, missing = AutoencoderKL.from_pretrained(
            output(configs[2]) / "model", output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(missing.values())
        assert evaluation(configs[2])["fine_tuning"]["source"] == str(tmp_path / "vae.ckpt")
        # the file does not state a scaling factor, so that nothing does
        assert json.loads((output(configs[2]) / "model" / "config.json").read_text())["scaling_factor"] is None
        assert evaluation(configs[2])["model"]["scaling_factor"] is None
        card, page = ((output(configs[2]) / name).read_text() for name in ("README.md", "report.html"))
        assert "its `scaling_factor` is unknown, and null in `config.json`" in card and "0.18215" not in card
        assert "its scaling_factor is unknown" in page and "states no scaling_factor for pipelines" in page


class TestRefused:
    def replace(self, base, model=None, **sections):
        return dataclasses.replace(tuning("unused", base, model), **sections)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"name": "folder", "root": "a", "channels": 3, "resolution": 8}, r"^data\.channels must be 1, .*, got 3"),
            ({"resolution": 9}, r"^data\.resolution must be divisible by 2, .* got 9x9"),
        ],
    )
    def test_images_that_do_not_fit_the_source(self, data, message, base):
        with pytest.raises(ValueError, match=message):
            self.replace(base, data=DataConfig(**data))

    def test_patterns_without_a_parameter(self, base):
        with pytest.raises(ValueError, match=r"^model\.train: decoder\.up\.\* matches no parameter"):
            self.replace(base, {"train": ("decoder.up.*",)})

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("model", "named"),
        [
            (
                {"train": ("decoder.up_blocks.*", "decoder.conv_out.bias")},
                r"model\.train .*decoder\.up_blocks.* leaves",
            ),
            ({"lora_rank": 2}, r"model\.lora_rank 2 leaves"),
        ],
    )
    def test_an_adaptive_weight_without_a_last_layer_that_is_trained(self, model, named, base):
        data, judged = DataConfig(resolution=24), AdversarialConfig(weight=0.1, layers=1, width=8)
        with pytest.raises(ValueError, match=rf"^adversarial\.adaptive .*decoder\.conv_out\.weight, which {named}"):
            self.replace(base, model, data=data, adversarial=judged)
        self.replace(base, model, data=data, adversarial=dataclasses.replace(judged, adaptive=False))
        self.replace(base, {"train": ("decoder.conv_out.weight",)}, data=data, adversarial=judged)

    def test_on_the_command_line(self, base, capsys):
        with pytest.raises(SystemExit):
            flags = ["--model.pretrained", str(base), "--data.name", "cifar10", "--data.channels", "3"]
            parse_settings(TRAININGS["train"], flags)
        assert "error: data.channels must be 1, as the images of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"lora_rank": 2}, "latents"], ids=["decoder", "lora", "latents"])
def test_discriminator_judges_what_is_fine_tuned(model, base, tmp_path):
    """With an adaptive weight where the last layer is trained; the encoder stays, and a resume changes nothing."""
    data = DataConfig(resolution=24)
    if model == "latents":
        encode_images(load_autoencoder(str(base)), load_data(data)[0], tmp_path / "latents")
        model = {"latents": str(tmp_path / "latents")}
    config = dataclasses.replace(
        tuning(tmp_path / "run", base, model),
        data=data,
        objective=ObjectiveConfig(scale="learned"),
        adversarial=AdversarialConfig(
            weight=0.3, start_images=30, layers=1, width=8, adaptive="lora_rank" not in model
        ),
    )
    fit(config)
    assert_training_is_bit_identical_from(90, config, tmp_path / "again" / "run")
    if "lora_rank" in model:  # the adapters are merged when the model is saved
        train(config)
        assert evaluation(config)["fine_tuning"]["latents_unchanged"] is True
        names = moved(config, base)
    else:
        names = differing(saved(base), trained(config, 180))
    assert names and {name.split(".")[0] for name in names} <= {"decoder", "post_quant_conv"}


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"lora_rank": 2}, "latents"], ids=["decoder", "lora", "latents"])
def test_two_processes_have_the_gradient_of_one(model, base, cache, tmp_path):
    model = {"latents": str(cache)} if model == "latents" else model
    configs = [tuning(tmp_path / name, base, model, max_images=60, batch_size=30) for name in ("one", "two")]
    optimizer = dataclasses.replace(configs[0].optimizer, max_grad_norm=None)
    configs = [dataclasses.replace(config, optimizer=optimizer) for config in configs]
    fit(configs[0])
    run_forked(fit, configs[1], log=tmp_path / "log", processes=2)
    assert assert_same_gradient(output(configs[0]), output(configs[1]), 30) > 20
    before, after = saved(base), trained(configs[1], 60)
    still = [name for name in before if name.startswith(("encoder", "quant_conv"))]
    assert still and all(torch.equal(before[name], after[name]) for name in still)


@pytest.fixture
def at_home(monkeypatch, tmp_path) -> Path:
    """The working directory, in the home of a user whose name is in nothing else."""
    home = tmp_path / "zebedee"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home / "work"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["of a run", "cache", "hub"])
def test_published_from_another_place_it_names_its_source_and_no_path(place, at_home, base, hub, monkeypatch, tmp_path):
    """A local folder that is named like a repository is none; a repository, or its copy in the Hub's cache, is one."""
    repo, commit = "lab/base", "0123456789abcdef" * 2 + "01234567"
    connect(monkeypatch, hub.url, at_home.parent / "cache")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = at_home / f"hub/models--lab--base/snapshots/{commit}" if place == "cache" else Path(repo)
    if place == "hub":
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=base)
    else:
        shutil.copytree(base, source / "model" if place == "of a run" else source)
    (at_home / "data").mkdir()
    for name in range(12):
        pixels = np.random.default_rng(name).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(at_home / "data" / f"{name}.png")
    config = tuning(Path("runs/tuned"), source, max_images=30)
    train(dataclasses.replace(config, data=DataConfig(root=str(at_home / "data"), resolution=8)))
    report = Path("runs/tuned/report.html").read_text()
    shutil.rmtree(at_home / "lab", ignore_errors=True)
    monkeypatch.chdir(tmp_path)
    push(at_home / "runs" / "tuned", HubConfig(repo_id="ann/tuned"))
    pushed = uploaded(hub, "ann/tuned")
    assert [name for name, content in pushed.items() if b"zebedee" in content or b"/work" in content] == []
    assert "zebedee" not in report
    card, settings = ModelCard(pushed["README.md"].decode()), yaml.safe_load(pushed["config.yaml"])
    known = place in ("cache", "hub")
    assert card.data.base_model == (repo if known else None)
    assert f"from {'[' * known}{repo if known else 'base'}" in card.text
    assert settings["model"]["pretrained"] == (repo if known else "base")
    assert settings["model"]["revision"] == (commit if place == "cache" else None)
    assert "_name_or_path" not in json.loads(pushed["config.json"])
    assert json.loads(pushed["evaluation.json"])["fine_tuning"]["repository"] == (repo if known else None)


def test_what_is_saved_names_no_folder_that_it_was_loaded_from(base, monkeypatch):
    monkeypatch.chdir(base.parents[1])
    for source in (base, Path("..", base.parents[1].name, base.parent.name, base.name), Path(base.parent.name, "vae")):
        vae = VAE.from_pretrained(source)
        for model in (vae, vae.to_diffusers(), VAE.from_diffusers(AutoencoderKL.from_pretrained(source))):
            assert "_name_or_path" not in json.loads(model.to_json_string())
        assert unmeasured(vae.config) == unmeasured(vae.to_diffusers().config) is None
    vae.register_to_config(_name_or_path="lab/base")
    assert json.loads(vae.to_json_string())["_name_or_path"] == vae.to_diffusers().config["_name_or_path"] == "lab/base"
