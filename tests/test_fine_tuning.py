"""Runs that train on from an autoencoder: what moves, what stays, and what the report says of it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from support.models import original
from support.runs import CONFIGS, assert_same_gradient, at, interrupted_at, left_behind, run_in, tiny

from diffusers_vae import VAE, encode_images
from diffusers_vae.adversarial import AdversarialConfig
from diffusers_vae.config import TRAININGS, parse_settings
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.evaluation import EvaluationConfig, compare, evaluate
from diffusers_vae.images import to_model_range
from diffusers_vae.latents import measure_latents
from diffusers_vae.loop import OptimizerConfig, run_task
from diffusers_vae.models import LATENT_PARTS, ModelConfig, load_autoencoder, weights_hash
from diffusers_vae.objective import ObjectiveConfig
from diffusers_vae.trainer import AutoencoderTask, train

DATA = DataConfig(resolution=8)
NO_LATENTS = {"scaling_factor", "shift_factor"}


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


def moved(config, source):
    """Names of the weights that are not the source's."""
    before, after = saved(Path(source)), saved(output(config) / "model")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def evaluation(config):
    return json.loads((output(config) / "evaluation.json").read_text())


def assert_bit_identical_from(images_seen, config, to):
    again = interrupted_at(images_seen, output(config), to)
    train(at(config, again))
    found, expected = left_behind(again), left_behind(output(config))
    if config.model.lora_rank:  # the header of whose file is in no fixed order
        name = "lora/pytorch_lora_weights.safetensors"
        assert found.pop(name) and expected.pop(name)
        adapters, others = (load_file(folder / name) for folder in (again, output(config)))
        assert adapters.keys() == others.keys()
        assert all(torch.equal(adapters[key], each) for key, each in others.items())
    assert found == expected


@pytest.mark.slow
class TestDecoder:
    def test_the_encoder_is_bit_equal_and_the_decoder_is_not(self, decoder_run, base):
        names = moved(decoder_run, base)
        assert not any(name.startswith(("encoder.", "quant_conv.")) for name in names)
        assert names == {name for name in saved(base) if name.startswith(("decoder.", "post_quant_conv."))}

    @pytest.mark.parametrize("factors", [{}, {"scaling_factor": 0.3611, "shift_factor": 0.1159}])
    def test_the_config_is_the_sources(self, factors, decoder_run, base, tmp_path):
        config = decoder_run
        if factors:
            model = VAE.from_pretrained(base)
            model.register_to_config(**factors)
            model.save_pretrained(tmp_path / "base")
            base, config = tmp_path / "base", tuning(tmp_path / "run", tmp_path / "base", max_images=30)
            train(config)
        assert settings_of(output(config) / "model") == settings_of(base)
        expected = {"scaling_factor": 0.18215, "shift_factor": None} | factors
        assert {name: settings_of(base)[name] for name in NO_LATENTS} == expected

    def test_stock_loads_it(self, decoder_run):
        _, missing = AutoencoderKL.from_pretrained(
            output(decoder_run) / "model", output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(missing.values())

    def test_the_report_says_what_stayed_and_what_became_better(self, decoder_run, base):
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

    @pytest.mark.parametrize("images_seen", [0, 90])
    def test_resumes_bit_identical(self, images_seen, decoder_run, tmp_path):
        assert_bit_identical_from(images_seen, decoder_run, tmp_path / "run")


@pytest.mark.slow
def test_all_is_trained_and_its_latents_measured(base, tmp_path):
    config = tuning(tmp_path / "run", base, {"train": "all"})
    train(config)
    assert moved(config, base) == set(saved(base))
    found = evaluation(config)["fine_tuning"]
    result = load_autoencoder(str(output(config)))
    assert found["latents_unchanged"] is False
    assert found["encoder_sha256"] == weights_hash(result, LATENT_PARTS)
    statistics = measure_latents(result, load_data(DATA)[0], config.evaluation.batch_size, 20)
    values = settings_of(output(config) / "model")
    assert values["scaling_factor"] == pytest.approx(1 / statistics.std, rel=1e-5)
    assert values["shift_factor"] == pytest.approx(statistics.mean, rel=1e-4)
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
    config = tuning(tmp_path / "run", base, {"train": patterns})
    train(config)
    assert moved(config, base) == {name for name in saved(base) if name.startswith(prefixes)}
    assert evaluation(config)["fine_tuning"]["latents_unchanged"] is unchanged
    factors = {name: settings_of(output(config) / "model")[name] for name in NO_LATENTS}
    assert (factors == {"scaling_factor": 0.18215, "shift_factor": None}) is unchanged


class TestLatentCache:
    @pytest.fixture
    def encoded(self, monkeypatch):
        """The batches that encoders of trained models see while these are in training."""
        batches, build = [], AutoencoderTask.build

        def hooked(task):
            model = build(task)

            def note(encoder, given, moments):
                if model.training:
                    batches.append(given[0])

            model.encoder.register_forward_hook(note)
            return model

        monkeypatch.setattr(AutoencoderTask, "build", hooked)
        return batches

    @pytest.mark.slow
    def test_gives_the_same_weights_and_the_encoder_does_not_run(self, decoder_run, base, cache, encoded, tmp_path):
        config = tuning(tmp_path / "cached", base, {"latents": str(cache)})
        train(config)
        assert not encoded
        for path in ("checkpoints/images-000000000180/model.safetensors", "model/diffusion_pytorch_model.safetensors"):
            expected, found = (load_file(output(c) / path) for c in (decoder_run, config))
            for name, each in expected.items():
                torch.testing.assert_close(found[name], each, rtol=0, atol=1e-5)
        assert evaluation(config)["fine_tuning"]["latents_unchanged"] is True
        train(tuning(tmp_path / "images", base, max_images=60))
        assert [len(images) for images in encoded] == [30, 30]  # so the hook sees what it is to see

    @pytest.mark.slow
    def test_resumes_bit_identical(self, base, cache, tmp_path):
        config = tuning(tmp_path / "run", base, {"latents": str(cache)})
        train(config)
        assert_bit_identical_from(90, config, tmp_path / "again" / "run")

    def test_of_another_autoencoder_is_refused(self, base, cache, tmp_path):
        other = VAE.from_pretrained(base)
        with torch.no_grad():
            other.quant_conv.bias.add_(1e-3)
        other.save_pretrained(tmp_path / "other")
        self.assert_refused(tmp_path, tmp_path / "other", cache, f"{cache}.*another VAE")

    def test_of_other_images_is_refused(self, base, tmp_path):
        encode_images(load_autoencoder(str(base)), load_data(DATA)[1], tmp_path / "latents", data="the held-out")
        self.assert_refused(tmp_path, base, tmp_path / "latents", r"latents of other images: 180, the held-out")

    def test_without_deviations_is_refused(self, base, tmp_path):
        encode_images(load_autoencoder(str(base)), load_data(DATA)[0], tmp_path / "latents", kind="mode")
        self.assert_refused(tmp_path, base, tmp_path / "latents", r"^model\.latents .* kind mode: .*--kind posterior")

    @staticmethod
    def assert_refused(folder, source, latents, message):
        with pytest.raises(ValueError, match=message):
            train(tuning(folder / "run", source, {"latents": str(latents)}))
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
    def test_the_model_is_stock_and_reconstructs_as_the_adapted_one(self, adapted_run, base):
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
    def test_the_adapters_load_on_the_source_in_stock(self, adapted_run, base):
        stock = AutoencoderKL.from_pretrained(base)
        stock.load_lora_adapter(output(adapted_run) / "lora", prefix=None, use_safetensors=True)
        images = to_model_range(load_data(DATA)[1].pixels[:8])
        assert torch.equal(stock(images).sample, self.adapted(adapted_run)(images).sample)

    def test_resumes_bit_identical(self, adapted_run, tmp_path):
        assert_bit_identical_from(90, adapted_run, tmp_path / "run")


@pytest.fixture(scope="module")
def copied(base, tmp_path_factory):
    """The settings of a finished run from a copy of the base."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(base, folder / "vae")
    config = tuning(folder / "run", folder / "vae", max_images=60)
    train(config)
    return config


class TestSource:
    @pytest.mark.slow
    def test_that_changed_since_is_refused(self, copied, base, tmp_path):
        config = at(copied, interrupted_at(30, output(copied), tmp_path / "run"))
        source, state = Path(copied.model.pretrained), saved(base)
        state["decoder.conv_in.bias"] += 1e-3
        before = left_behind(output(config))
        try:
            save_file(state, source / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            with pytest.raises(FileExistsError, match=r"other inputs(.|\n)*another pretrained autoencoder"):
                train(config)
        finally:
            shutil.copytree(base, source, dirs_exist_ok=True)
        assert left_behind(output(config)) == before
        train(config)
        assert left_behind(output(config)) == left_behind(output(copied))

    @pytest.mark.slow
    def test_that_is_gone_is_named(self, copied, tmp_path):
        config = at(copied, interrupted_at(30, output(copied), tmp_path / "run"))
        source = Path(copied.model.pretrained)
        source.rename(tmp_path / "elsewhere")
        try:
            with pytest.raises(OSError, match=str(source)):
                train(config)
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
    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    def test_original_checkpoint(self, suffix, tmp_path):
        """Trained as the stock model that it was, and saved as stock."""
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        stock = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(32, 32), sample_size=512, **blocks)
        stock.save_pretrained(tmp_path / "stock")
        path = tmp_path / f"vae{suffix}"
        state = original(stock)
        save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
        configs = [
            tuning(tmp_path / source.stem / "run", source, max_images=60) for source in (path, tmp_path / "stock")
        ]
        for config in configs:
            train(config)
        of_file, of_folder = (saved(output(config) / "model") for config in configs)
        assert all(torch.equal(of_file[name], each) for name, each in of_folder.items())
        assert {name.split(".")[0] for name in moved(configs[0], tmp_path / "stock")} == {"decoder", "post_quant_conv"}
        _, missing = AutoencoderKL.from_pretrained(
            output(configs[0]) / "model", output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(missing.values())
        assert evaluation(configs[0])["fine_tuning"]["source"] == str(path)


class TestRefused:
    def replace(self, base, model=None, **sections):
        return dataclasses.replace(tuning("unused", base, model), **sections)

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
def test_a_discriminator_judges_what_is_tuned(model, base, tmp_path):
    """With the weight adapting where the last layer is trained; the encoder stays, and a resume changes nothing."""
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
    run_task(AutoencoderTask(config))
    assert evaluation(config)["fine_tuning"]["latents_unchanged"] is True
    assert {name.split(".")[0] for name in moved(config, base)} <= {"decoder", "post_quant_conv"}
    assert_bit_identical_from(90, config, tmp_path / "again" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"lora_rank": 2}, "latents"], ids=["decoder", "lora", "latents"])
def test_two_processes_have_the_gradient_of_one(model, base, cache, tmp_path):
    model = {"latents": str(cache)} if model == "latents" else model
    configs = [tuning(tmp_path / name, base, model, max_images=60, batch_size=30) for name in ("one", "two")]
    optimizer = dataclasses.replace(configs[0].optimizer, max_grad_norm=None)
    configs = [dataclasses.replace(config, optimizer=optimizer) for config in configs]
    train(configs[0])
    run_in(2, configs[1], "--config_file", str(CONFIGS / "ddp.yaml"))
    assert assert_same_gradient(output(configs[0]), output(configs[1]), 30) > 20
    assert not any(name.startswith(("encoder", "quant_conv")) for name in moved(configs[1], base))
