"""Training on from a published autoencoder: what is built, what is trained of it, and what is left at the end."""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import save_file
from support.hub import connect
from support.hub_server import HubServer
from support.models import same

from diffusers_vae import MLPVAE, VAE
from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.models import ModelConfig, load_autoencoder, weights_hash, without_adapters

TINY = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 16],
    "norm_num_groups": 4,
    "latent_channels": 6,
    "sample_size": 16,
    "scaling_factor": 0.7,
    "shift_factor": 0.1,
}
SIZE = (16, 24)
IMAGES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return AutoencoderKL(**TINY).eval()


@pytest.fixture(scope="module")
def source(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    stock.save_pretrained(folder)
    return str(folder)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model):
    """One of training, large enough to be seen."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):  # the first factor of an adapter moves once the second is no longer zero
        optimizer.zero_grad()
        (model(IMAGES).sample - IMAGES).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def assert_equal_to_stock(model, stock):
    ours, theirs = ({name: each for name, each in m.config.items() if name[0] != "_"} for m in (model, stock))
    assert ours == theirs
    model.eval()
    weights, expected = model.state_dict(), stock.state_dict()
    if weights.keys() == expected.keys():  # no adapters
        assert same(weights, expected)
    theirs = stock.encode(IMAGES).latent_dist.parameters
    torch.testing.assert_close(model.encode(IMAGES).latent_dist.parameters, theirs)
    torch.testing.assert_close(model(IMAGES).sample, stock(IMAGES).sample)


class TestSources:
    @pytest.mark.parametrize("place", ["", "model", "vae"])
    def test_folders(self, place, source, stock, tmp_path):
        shutil.copytree(source, tmp_path / "a" / place)
        config = ModelConfig(pretrained=str(tmp_path / "a"))
        assert config.spatial_compression_ratio == 4 and config.latent_shape(SIZE) == (6, 4, 6)
        model = config.build(3, SIZE)
        assert type(model) is VAE and model.training and len(trained(model)) == len(stock.state_dict())
        assert_equal_to_stock(model, stock)

    @pytest.mark.parametrize(
        ("config", "error", "message"),
        [
            ('{"_class_name": "UNet2DModel"}', ValueError, "must hold an autoencoder .* got the class UNet2DModel"),
            ("{", ValueError, "config.json is damaged, not valid JSON"),
            ('{"_class_name": "AutoencoderKL"}', OSError, "no file named diffusion_pytorch_model"),
        ],
    )
    def test_folders_that_hold_no_autoencoder(self, config, error, message, tmp_path):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(error, match=message):
            load_autoencoder(str(tmp_path))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"norm_num_groups": 0}, "ZeroDivisionError"),
            ({"act_fn": []}, r"act_fn must be of the type string, got \[\]"),
            ({"act_fn": "none"}, "not make a valid AutoencoderKL: "),
            ({"down_block_types": ["Evil"] * 3}, "not make a valid AutoencoderKL: ValueError: Evil does not exist"),
            ({"block_out_channels": [8]}, "not make a valid AutoencoderKL: IndexError"),
            ({"block_out_channels": 8}, "block_out_channels must be of the type array, got 8"),
            ({"sample_size": "large"}, "sample_size must be of the type integer, got 'large'"),
            ({"sample_size": [8, "8"]}, r"sample_size\[1\] must be of the type integer, got '8'"),
            ({"layers_per_block": "2"}, "layers_per_block must be of the type integer, got '2'"),
            ({"norm_num_groups": 4.0}, "norm_num_groups must be of the type integer, got 4.0"),
            ({"latent_channels": [6]}, r"latent_channels must be of the type integer, got \[6\]"),
            ({"down_block_types": "DownEncoderBlock2D"}, "down_block_types must be of the type array"),
            ({"use_quant_conv": "false"}, "use_quant_conv must be of the type boolean, got 'false'"),
            ({"mid_block_add_attention": 2}, "mid_block_add_attention must be of the type boolean, got 2"),
            ({"force_upcast": {}}, "force_upcast must be of the type boolean, got {}"),
            ({"scaling_factor": "1"}, "scaling_factor must be of the type number, got '1'"),
            ({"shift_factor": float("nan")}, "shift_factor must be a finite number, got nan"),
            ({"_class_name": ["AutoencoderKL"]}, "must hold an autoencoder"),
            (
                {"_class_name": "Evil"},
                "must hold an autoencoder of images that .* got the class Evil: give",
            ),
            ({"_class_name": "DiffusionPipeline"}, "must hold an autoencoder"),
            ({"_class_name": "pipelines"}, "must hold an autoencoder"),
            ({"_class_name": "ModelMixin"}, "must hold an autoencoder"),
        ],
    )
    def test_wrong_values_in_a_config_are_named(self, values, message, source, tmp_path):
        """By those that load the model, and by those that read its config alone."""
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | values))
        for read in (
            lambda: load_autoencoder(str(tmp_path)),
            lambda: ModelConfig(pretrained=str(tmp_path)).spatial_compression_ratio,
        ):
            with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}"):
                read()

    @pytest.mark.parametrize("text", ["[]", "3", '{"a":' * 100_000])
    def test_config_that_is_none_is_named(self, text, tmp_path):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^{tmp_path}.*config\.json "):
            load_autoencoder(str(tmp_path))

    @pytest.mark.parametrize("class_name", ["FlaxAutoencoderKL"])
    def test_weights_of_the_class_for_flax(self, class_name, source, stock, tmp_path):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": class_name}))
        assert_equal_to_stock(ModelConfig(pretrained=str(tmp_path)).build(3, SIZE), stock)
        assert type(load_autoencoder(str(tmp_path))) is VAE

    @pytest.fixture
    def unreachable(self, tmp_path, monkeypatch):
        """A Hub that does not answer, and no patience with it."""
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited for the Hub"))
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
        connect(monkeypatch, url, tmp_path)  # where nobody listens any more

    def test_hub_that_cannot_be_reached_is_said_at_once(self, unreachable):
        """Not that it has no such file."""
        for read in (
            lambda: load_autoencoder("ann/vae"),
            lambda: ModelConfig(pretrained="ann/vae").spatial_compression_ratio,
        ):
            with pytest.raises((OSError, ValueError), match=r"no .*, and the Hub could not be reached .* ann/vae"):
                read()

    def test_a_repository_in_the_cache_needs_no_hub(self, unreachable, source, stock, tmp_path):
        snapshot = tmp_path / "hub" / "models--ann--vae" / "snapshots" / ("a" * 40)
        shutil.copytree(source, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
        assert_equal_to_stock(ModelConfig(pretrained="ann/vae").build(3, SIZE), stock)
        (snapshot / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(OSError, match=r"the Hub could not be reached .* that its cache on this machine lacks"):
            load_autoencoder("ann/vae")

    @pytest.mark.parametrize("name", ["runs/tinyy", "rnus/tiny", "runs/Tiny", "./runs/tinny", "runs/tiny/modle", "run"])
    def test_a_mistyped_path_is_answered_by_those_there_are(self, name, unreachable, source, tmp_path, monkeypatch):
        shutil.copytree(source, tmp_path / "runs" / "tiny" / "model")
        monkeypatch.chdir(tmp_path)
        there = {"runs/tiny/modle": "runs/tiny/model", "run": "runs"}.get(name, "runs/tiny")
        with pytest.raises(OSError, match=rf"^there is no file or folder .*{Path(name)} \(did you mean {there}\?\)"):
            load_autoencoder(name)

    def test_a_repository_that_is_not_there_is_said(self, tmp_path, monkeypatch):
        with HubServer({}) as hub:
            connect(monkeypatch, hub.url, tmp_path)
            hub.put("ann/pipeline", {"vae/config.json": b"{}", "model_index.json": b"{}"})
            with pytest.raises(OSError, match=r"^there is no .*, and ann/gone .* there is no such repository, or"):
                load_autoencoder("ann/gone")
            with pytest.raises(OSError, match=r"ann/pipeline cannot .*no config.json in it; .* in the subfolder vae$"):
                load_autoencoder("ann/pipeline")

    def test_subfolder(self, source, stock, tmp_path):
        shutil.copytree(source, tmp_path / "ema")
        with pytest.raises(ValueError, match=r"^model.pretrained: .* holds no model"):
            _ = ModelConfig(pretrained=str(tmp_path)).spatial_compression_ratio
        assert_equal_to_stock(ModelConfig(pretrained=str(tmp_path), subfolder="ema").build(3, SIZE), stock)

    @pytest.mark.slow
    @pytest.mark.parametrize("arguments", [{"max_shard_size": "15KB"}, {}], ids=["sharded", "whole"])
    def test_variant_only(self, arguments, source, tmp_path, caplog):
        """Some repositories hold weights in float16 only."""
        half = AutoencoderKL.from_pretrained(source).half()
        half.save_pretrained(tmp_path, variant="fp16", **arguments)
        model = ModelConfig(pretrained=str(tmp_path)).build(3, SIZE)
        assert {each.dtype for each in model.parameters()} == {torch.float32}
        assert_equal_to_stock(model, half.float())
        assert "float16 only" in caplog.text

    def test_missing_weights_are_not_random(self, source, stock, tmp_path):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        state = {name: each for name, each in stock.state_dict().items() if not name.startswith("decoder.conv_out")}
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 2 weights of its AutoencoderKL, decoder.conv_out.bias"):
            ModelConfig(pretrained=str(tmp_path)).build(3, SIZE)

    def test_config_is_read_once_and_weights_not_on_meta(self, source, stock, tmp_path):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        config = ModelConfig(pretrained=str(tmp_path), train="decoder")
        assert config.spatial_compression_ratio == 4
        shutil.rmtree(tmp_path)
        with torch.device("meta"):
            model = config.build(3, SIZE)
        assert {each.device.type for each in model.state_dict().values()} == {"meta"}
        assert list(model.state_dict()) == list(stock.state_dict())
        with pytest.raises(OSError, match=tmp_path.name):
            config.build(3, SIZE)


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        ("train", "prefixes"),
        [
            ("all", ("",)),
            ("decoder", ("decoder.", "post_quant_conv.")),
            (("decoder.up_blocks.0.*", "decoder.conv_out.*"), ("decoder.up_blocks.0.", "decoder.conv_out.")),
            (("*encoder.conv_in.weight",), ("encoder.conv_in.weight",)),
        ],
    )
    def test_names(self, train, prefixes, source):
        model = ModelConfig(pretrained=source, train=train).build(3, SIZE)
        assert trained(model) == {name for name in model.state_dict() if name.startswith(prefixes)}
        assert model.encoder.training == any(name.startswith("encoder") for name in trained(model))

    def test_latents_stay(self, source, stock):
        model = ModelConfig(pretrained=source, train="decoder").build(3, SIZE)
        parts, before = ("encoder", "quant_conv"), weights_hash(stock)
        step(model)
        assert weights_hash(model, parts) == weights_hash(stock, parts) and weights_hash(model) != before
        torch.testing.assert_close(model.encode(IMAGES).latent_dist.mean, stock.encode(IMAGES).latent_dist.mean)
        torch.nn.init.zeros_(model.quant_conv.bias)
        assert weights_hash(model, parts) != weights_hash(stock, parts)

    @pytest.mark.slow
    @pytest.mark.parametrize("settings", [{}, {"train": "decoder"}, {"train": "decoder", "lora_rank": 2}])
    def test_state_goes_through_meta(self, settings, source):
        """As the loop keeps and resumes a model."""
        config = ModelConfig(pretrained=source, **settings)
        model = config.build(3, SIZE)
        step(model)
        with torch.device("meta"):
            kept = config.build(3, SIZE)
        assert trained(kept) == trained(model)
        kept.to_empty(device="cpu")
        kept.load_state_dict(model.state_dict())
        assert_equal_to_stock(kept, model.eval())


class TestLora:
    @pytest.fixture
    def tuned(self, source):
        model = ModelConfig(pretrained=source, train="decoder", lora_rank=2).build(3, SIZE)
        step(model)
        return model.eval()

    @pytest.mark.slow
    def test_trains_adapters_of_the_decoder(self, source, stock):
        model = ModelConfig(pretrained=source, train="decoder", lora_rank=2).build(3, SIZE)
        assert_equal_to_stock(model, stock)
        names = trained(model)
        assert all(name.startswith("decoder.") and ".lora_" in name for name in names)
        adapted = {name.split(".lora_")[0] for name in names}
        assert {f"{name}.weight" for name in adapted} == {
            name for name, each in stock.state_dict().items() if name.startswith("decoder") and each.ndim > 1
        }

    @pytest.mark.slow
    @torch.no_grad()
    def test_merges_into_stock_weights(self, tuned, stock, tmp_path):
        expected = tuned(IMAGES).sample
        merged = without_adapters(tuned)
        assert list(merged.state_dict()) == list(stock.state_dict())
        merged.save_pretrained(tmp_path)
        loaded, report = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        for model in (merged, loaded):
            torch.testing.assert_close(model(IMAGES).sample, expected, atol=1e-5, rtol=0)
        assert (expected - stock(IMAGES).sample).abs().max() > 1e-3
        assert torch.equal(tuned(IMAGES).sample, expected), "merging changed the model itself"
        assert without_adapters(merged) is merged

    @pytest.mark.slow
    @torch.no_grad()
    def test_adapters_load_in_stock(self, tuned, source, tmp_path):
        tuned.save_lora_adapter(tmp_path)
        stock = AutoencoderKL.from_pretrained(source)
        stock.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(stock(IMAGES).sample, tuned(IMAGES).sample)

    def test_a_missing_peft_is_named(self, source, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match="pip install peft"):
            ModelConfig(pretrained=source, train="decoder", lora_rank=2).build(3, SIZE)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"train": "decoder"},
                r"model.train decoder would be ignored with model.pretrained null: set model.pretrained",
            ),
            ({"subfolder": "vae"}, r"model.subfolder vae would be ignored"),
            ({"revision": "main"}, r"model.revision main would be ignored"),
            ({"lora_rank": 4}, r"model.lora_rank 4 would be ignored"),
            ({"pretrained": ""}, r"model.pretrained must name"),
            (
                {"pretrained": "a", "architecture": "mlp"},
                r"model.pretrained a would be ignored with model.architecture mlp",
            ),
            (
                {"pretrained": "a", "latent_channels": 4, "use_quant_conv": False},
                r"^model.latent_channels 4, model.use_quant_conv false would be ignored with model.pretrained a",
            ),
            ({"pretrained": "a", "train": "encoder"}, r"model.train must be decoder, all or a list .*got encoder"),
            ({"pretrained": "a", "train": ()}, r"model.train must hold at least one pattern"),
            ({"pretrained": "a", "lora_rank": 0, "train": "decoder"}, r"lora_rank must be at least 1 or null, got 0"),
            (
                {"pretrained": "a", "lora_rank": 4},
                r"lora_rank 4 would be ignored with model.train all: set model.train to decoder",
            ),
            ({"pretrained": "a", "latents": "b"}, r"model.latents needs a frozen encoder"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**settings)

    def test_missing_source_is_named(self, tmp_path):
        config = ModelConfig(pretrained=str(tmp_path / "gone"))
        for read in (
            lambda: config.spatial_compression_ratio,
            lambda: config.latent_shape(SIZE),
            lambda: config.build(3, SIZE),
        ):
            with pytest.raises(ValueError, match=r"^model.pretrained: there is no file or folder .*gone"):
                read()

    def test_channels(self, source):
        for device in ("cpu", "meta"):
            with torch.device(device), pytest.raises(ValueError, match=r"^data.channels must be 3, as .*, got 1$"):
                ModelConfig(pretrained=source).build(1, SIZE)

    def test_pattern_without_a_parameter(self, source):
        config = ModelConfig(pretrained=source, train=("decoder.*", "decoder.up.0.*"))
        with torch.device("meta"), pytest.raises(ValueError, match=r"decoder\.up\.0\.\* matches no .* decoder\.conv_"):
            config.build(3, SIZE)

    def test_other_classes(self, tmp_path):
        MLPVAE(8).save_pretrained(tmp_path / "mlp")
        (tmp_path / "dc").mkdir()
        (tmp_path / "dc" / "config.json").write_text(json.dumps({"_class_name": AutoencoderDC.__name__}))
        for name, kind in (("mlp", "MLPVAE"), ("dc", "AutoencoderDC")):
            message = (
                f"^model.pretrained: .* must hold .* got the class {kind}: give a model of the class AutoencoderKL\\b"
            )
            with pytest.raises(ValueError, match=message):
                _ = ModelConfig(pretrained=str(tmp_path / name)).spatial_compression_ratio


COLOUR = ["--data.name", "digits", "--data.channels", "3"]


class TestSettings:
    @pytest.mark.parametrize(
        ("yaml", "flags", "train"),
        [
            ("", ["--model.train", "decoder"], "decoder"),
            ("train: decoder", ["--model.train", "[decoder.up_blocks.*]"], ("decoder.up_blocks.*",)),
            ("train: ['*.bias', decoder.conv_in.*]", [], ("*.bias", "decoder.conv_in.*")),
        ],
    )
    def test_from_yaml_and_flags(self, yaml, flags, train, source, tmp_path):
        (tmp_path / "a.yaml").write_text(f"model:\n  pretrained: {source}\n  {yaml}\n")
        config, _ = parse_settings(TRAININGS["train"], [*COLOUR, "--config", str(tmp_path / "a.yaml"), *flags])
        assert config.model == ModelConfig(pretrained=source, train=train)

    @pytest.mark.slow
    def test_resolved_config_gives_the_same(self, source, tmp_path):
        config, _ = parse_settings(
            TRAININGS["train"], [*COLOUR, "--model.pretrained", source, "--model.train", "[decoder.*]"]
        )
        config.save(tmp_path / "config.yaml")
        assert parse_settings(TRAININGS["train"], ["--config", str(tmp_path / "config.yaml")])[0] == config

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--model.pretrained", "gone/model"], "model.pretrained: there is no file or folder"),
            (["--model.train", "encoder.*"], "model.train"),
            (["--model.lora_rank", "4"], "model.lora_rank"),
            (
                ["--model.pretrained", "a", "--model.layers_per_block", "2"],
                "model.layers_per_block 2 would be ignored with model.pretrained a",
            ),
        ],
    )
    def test_errors_name_the_key(self, flags, words, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)  # a finished run in runs/ would need no source
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which would retry for long
        with pytest.raises(SystemExit):
            parse_settings(TRAININGS["train"], flags)
        assert words in capsys.readouterr().err
