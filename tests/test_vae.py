"""VAE held against stock AutoencoderKL: the same names, files, numbers and behaviour, and what it adds."""

import copy
import inspect
import json
import pickle
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file, save_file
from support.models import TINY, make_pipeline, original_name
from support.stock import run_without_package

from diffusers_vae import VAE
from diffusers_vae.models import LatentScaling, VAEOutput

GREY = {**TINY, "in_channels": 1, "out_channels": 1, "scaling_factor": 0.5, "use_post_quant_conv": False}
NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
BARE = {**TINY, **NO_QUANT, "shift_factor": 0.1, "mid_block_add_attention": False}
CONFIGS = {"rgb": TINY, "grey": GREY, "bare": BARE}

LARGE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
LARGE_16 = {**LARGE, **NO_QUANT, "sample_size": 1024}
PUBLISHED = {  # name: (config, number of parameters)
    "sd-1.5": ({**LARGE, "sample_size": 512, "scaling_factor": 0.18215}, 83_653_863),
    "sdxl": ({**LARGE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, 83_653_863),
    "sd3": ({**LARGE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}, 83_819_683),
    "flux.1": ({**LARGE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}, 83_819_683),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


@pytest.fixture
def vae(config):
    return build(config)


def build(config, cls=VAE, seed=0):
    """A model with random weights. In eval mode: training mode picks other CPU kernels, whose last bits differ."""
    torch.manual_seed(seed)
    return cls(**config).eval()


def stock_twin(vae):
    """A stock AutoencoderKL with its own copy of the weights."""
    stock = AutoencoderKL.from_config(vae.config).to(vae.dtype).eval()
    stock.load_state_dict(vae.state_dict())
    return stock


def random_images(model, batch=2, height=16, width=24):
    shape = (batch, model.config.in_channels, height, width)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(model.dtype)


def generator():
    return torch.Generator().manual_seed(2)


@torch.no_grad()
def assert_same_model(a, b):
    """Bit-equal weights, and the same posterior means and reconstructions of the same images, up to rounding, which may
    differ with the place of weights in memory.
    """
    weights, others = a.state_dict(), b.state_dict()
    assert list(weights) == list(others)
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype and torch.equal(weight, others[name]), name
    images = random_images(a)
    mean, other_mean = (model.encode(images).latent_dist.mean.float() for model in (a, b))
    # a half-precision model rounds its moments
    torch.testing.assert_close(mean.to(a.dtype), other_mean.to(a.dtype))
    torch.testing.assert_close(a(images).sample, b(images).sample)


class TestNames:
    def test_constructor(self):
        ours, stock = (inspect.signature(cls.__init__).parameters for cls in (VAE, AutoencoderKL))
        assert [(name, each.default) for name, each in ours.items()] == [(n, p.default) for n, p in stock.items()]

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published_shapes(self, name):
        config, parameters = PUBLISHED[name]
        with torch.device("meta"):
            ours, stock = VAE(**config), AutoencoderKL(**config)
        assert dict(ours.config) == dict(stock.config)
        shapes, stock_shapes = ({key: each.shape for key, each in m.state_dict().items()} for m in (ours, stock))
        assert shapes == stock_shapes and list(shapes) == list(stock_shapes)
        assert ours.num_parameters() == parameters
        assert ours.spatial_compression_ratio == 8

    def test_config_file(self, vae, config, tmp_path):
        vae.save_pretrained(tmp_path / "ours")
        AutoencoderKL(**config).save_pretrained(tmp_path / "stock")
        text = (tmp_path / "ours" / "config.json").read_text()
        assert json.loads(text)["_class_name"] == "AutoencoderKL"
        assert text == (tmp_path / "stock" / "config.json").read_text()


HALF = {"torch_dtype": torch.float16}
FILES = {  # name: (arguments of save_pretrained, of from_pretrained, a file that proves that the former was heeded)
    "plain": ({}, {}, ".safetensors"),
    "float16": ({}, HALF, ".safetensors"),
    "bfloat16": ({}, {"torch_dtype": torch.bfloat16}, ".safetensors"),
    "sharded": ({"max_shard_size": "15KB"}, {}, "-00002-of-*.safetensors"),
    "variant": ({"variant": "fp16"}, {"variant": "fp16", **HALF}, ".fp16.safetensors"),
    "sharded-variant": ({"max_shard_size": "9KB", "variant": "fp16"}, {"variant": "fp16"}, ".fp16-00002-of-*"),
    "bin": ({"safe_serialization": False}, {}, ".bin"),
    "high-memory": ({}, {"low_cpu_mem_usage": False}, ".safetensors"),
    "low-memory": ({}, {"low_cpu_mem_usage": True}, ".safetensors"),
    "device-map": ({}, {"device_map": "auto"}, ".safetensors"),
}
DIRECTIONS = [(VAE, AutoencoderKL), (VAE, AutoModel), (AutoencoderKL, VAE), (VAE, VAE)]


class TestFiles:
    @pytest.mark.parametrize("writer, reader", DIRECTIONS)
    @pytest.mark.parametrize(
        "config, files",
        [
            *(pytest.param(TINY, name, marks=() if name == "plain" else pytest.mark.slow, id=name) for name in FILES),
            pytest.param(GREY, "plain", id="grey"),
            pytest.param(BARE, "plain", id="bare"),
        ],
    )
    def test_loads_bit_equal(self, config, files, writer, reader, tmp_path):
        save, load, evidence = FILES[files]
        model = build(config, writer)
        if "variant" in save:
            model = model.half()  # as published variants are
        model.save_pretrained(tmp_path / "vae", **save)
        assert list((tmp_path / "vae").glob(f"diffusion_pytorch_model{evidence}"))

        loaded = reader.from_pretrained(str(tmp_path), subfolder="vae", **load)
        assert type(loaded) is (AutoencoderKL if reader is AutoModel else reader)
        assert not loaded.training
        assert_same_model(loaded, model.to(load.get("torch_dtype", torch.float32)))

    @pytest.mark.slow
    @pytest.mark.parametrize("config", [TINY, GREY], ids=["rgb", "grey"])
    def test_old_attention_names(self, vae, tmp_path):
        """As in the published Stable Diffusion checkpoints."""
        vae.save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        weights = {
            re.sub(r"to_(q|k|v|out\.0)\b", lambda match: old[match.group()], name): weight
            for name, weight in load_file(path).items()
        }
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in weights
        save_file(weights, path, {"format": "pt"})

        loaded, report = VAE.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert_same_model(loaded, vae)
        assert_same_model(loaded, AutoencoderKL.from_pretrained(tmp_path))

    @pytest.mark.slow
    def test_original_checkpoint(self, vae, config, tmp_path):
        """`from_single_file` reads the key layout of the latent-diffusion repository."""
        stock_twin(vae).save_pretrained(tmp_path)
        levels = len(config["block_out_channels"])
        weights = {f"first_stage_model.{original_name(key, levels)}": w for key, w in vae.state_dict().items()}
        save_file(weights, tmp_path / "ldm.safetensors")
        loaded = VAE.from_single_file(str(tmp_path / "ldm.safetensors"), config=str(tmp_path)).eval()
        assert type(loaded) is VAE
        assert_same_model(loaded, vae)

    @pytest.mark.parametrize(
        "clone", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["copy", "pickle"]
    )
    def test_copies(self, vae, clone):
        other = clone(vae)
        assert_same_model(other, vae)
        torch.nn.init.zeros_(other.decoder.conv_in.weight)
        assert vae.decoder.conv_in.weight.any()

    @pytest.mark.slow
    def test_real_size(self):
        config, _ = PUBLISHED["sd-1.5"]
        stock = build(config, AutoencoderKL)
        with torch.device("meta"):
            vae = VAE(**config).eval()
        vae.load_state_dict(stock.state_dict(), assign=True)
        images = random_images(vae, 1, 32, 32)
        with torch.no_grad():
            assert torch.equal(vae.encode(images).latent_dist.parameters, stock.encode(images).latent_dist.parameters)
            assert torch.equal(vae(images).sample, stock(images).sample)


def draw(pipeline):
    return pipeline("a", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]


WITHOUT_PACKAGE = """
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline

found = {}
for name in ("rgb", "grey", "bare"):
    images = torch.load(f"{name}.pt")
    by_name, report = AutoencoderKL.from_pretrained(name, output_loading_info=True)
    for kind, model in (("by name", by_name), ("by AutoModel", AutoModel.from_pretrained(name))):
        with torch.no_grad():
            moments, sample = model.encode(images).latent_dist.parameters, model(images).sample
        found[name, kind] = (type(model).__name__, moments, sample)
    found[name, "report"] = {key: list(each) for key, each in report.items()}
torch.save(found, "found.pt")
for name in ("rgb", "grey"):
    pipeline = DiffusionPipeline.from_pretrained(f"{name}-pipeline")
    draw = pipeline("a", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    draw.images[0].save(f"{name}.png")
"""


@pytest.fixture(scope="module")
def loaded_without_package(tmp_path_factory):
    """A folder with what a process without this package makes of models and pipelines that ours has saved."""
    folder = tmp_path_factory.mktemp("without-package")
    for name, config in CONFIGS.items():
        vae = build(config)
        vae.save_pretrained(folder / name)
        torch.save(random_images(vae), folder / f"{name}.pt")
        if name != "bare":
            pipeline = make_pipeline(vae, folder)
            draw(pipeline).save(folder / f"{name}-before.png")
            pipeline.save_pretrained(folder / f"{name}-pipeline")
    run_without_package(WITHOUT_PACKAGE, folder)
    return folder


@pytest.mark.slow
class TestWithoutThePackage:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_models(self, name, loaded_without_package):
        found = torch.load(loaded_without_package / "found.pt")
        assert not any(found[name, "report"].values()), found[name, "report"]
        vae = build(CONFIGS[name])
        images = random_images(vae)
        with torch.no_grad():
            expected = vae.encode(images).latent_dist.parameters, vae(images).sample
        for kind in ("by name", "by AutoModel"):
            cls, *values = found[name, kind]
            assert cls == "AutoencoderKL"
            for value, expected_value in zip(values, expected, strict=True):
                torch.testing.assert_close(value, expected_value)

    @pytest.mark.parametrize("name", ["rgb", "grey"])
    def test_pipelines(self, name, loaded_without_package):
        before, found = (Image.open(loaded_without_package / file) for file in (f"{name}-before.png", f"{name}.png"))
        assert before.mode == found.mode and before.tobytes() == found.tobytes()
        assert np.asarray(before).std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("config, mode", [(TINY, "RGB"), (GREY, "L")], ids=["rgb", "grey"])
def test_pipeline_pictures(vae, mode, tmp_path):
    pipeline = make_pipeline(vae, tmp_path)
    assert pipeline.vae.decoder is vae.decoder
    picture = draw(pipeline)
    assert picture.mode == mode and picture.size == (16, 16)
    assert np.asarray(picture).std() > 0
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    assert np.asarray(draw(pipeline)).std(axis=(0, 1)).max() == 0, "the picture did not come from this VAE"


class TestNumbers:
    @pytest.mark.slow
    @torch.no_grad()
    def test_equal_to_stock(self, vae):
        stock, images = stock_twin(vae), random_images(vae)
        ours, theirs = vae.encode(images).latent_dist, stock.encode(images).latent_dist
        for quantity in ("mean", "logvar", "std", "var", "parameters"):
            assert torch.equal(getattr(ours, quantity), getattr(theirs, quantity)), quantity
        latents = ours.sample(generator())
        assert torch.equal(latents, theirs.sample(generator()))
        assert torch.equal(vae.decode(latents).sample, stock.decode(latents).sample)
        for drawn in (False, True):
            sample = vae(images, sample_posterior=drawn, generator=generator()).sample
            assert torch.equal(sample, stock(images, sample_posterior=drawn, generator=generator()).sample)
        assert not torch.equal(sample, vae(images).sample)

    @torch.no_grad()
    def test_tuples_and_posterior(self, vae):
        images = random_images(vae)
        (posterior,) = vae.encode(images, return_dict=False)
        (reconstructions,) = vae.decode(posterior.mode(), return_dict=False)
        assert reconstructions.shape == images.shape
        assert torch.equal(vae(images, return_dict=False)[0], reconstructions)
        output = vae(images, return_posterior=True)
        assert type(output) is VAEOutput
        assert torch.equal(output.sample, reconstructions) and torch.equal(output.latent_dist.mean, posterior.mean)
        sample, latent_dist = vae(images, return_posterior=True, return_dict=False)
        assert torch.equal(sample, reconstructions) and torch.equal(latent_dist.logvar, posterior.logvar)

    @torch.no_grad()
    def test_moments_stand_for_the_encoder(self, vae):
        images = random_images(vae)
        moments = vae.encode(images).latent_dist.parameters
        noise = torch.randn(len(images), vae.config.latent_channels, 8, 12, generator=generator())
        expected = vae(images, noise=noise, return_posterior=True)
        calls = count_calls(vae.encoder)
        output = vae(None, noise=noise, return_posterior=True, moments=moments)
        assert torch.equal(output.sample, expected.sample)
        assert torch.equal(output.latent_dist.parameters, moments)
        assert torch.equal(vae(images, moments=moments).sample, vae.decode(expected.latent_dist.mode()).sample)
        assert not calls
        assert vae(None, moments=moments.bfloat16(), return_posterior=True).latent_dist.mean.dtype == torch.float32

    @torch.no_grad()
    def test_transform_of_the_latents(self, vae):
        images = random_images(vae)
        output = vae(images, return_posterior=True, transform=lambda latents: latents.flip(-1) * 2)
        assert torch.equal(output.latent_dist.mean, vae.encode(images).latent_dist.mean)
        assert torch.equal(output.sample, vae.decode(output.latent_dist.mean.flip(-1) * 2).sample)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    @torch.no_grad()
    def test_half_model(self, vae, dtype):
        vae = vae.to(dtype)
        images = random_images(vae)
        posterior = vae.encode(images).latent_dist
        assert posterior.mean.dtype == posterior.kl().dtype == torch.float32
        assert torch.equal(posterior.mean, stock_twin(vae).encode(images).latent_dist.mean.float())
        assert vae.decode(posterior.sample()).sample.dtype == dtype
        vae.enable_tiling()
        assert vae.tiled_encode(images).latent_dist.mean.dtype == torch.float32

    @torch.no_grad()
    def test_large_variance_in_float16(self):
        vae = build(TINY).half()
        torch.nn.init.zeros_(vae.quant_conv.weight)
        torch.nn.init.constant_(vae.quant_conv.bias, 15)  # exp(15) > 65504
        images = random_images(vae)
        assert stock_twin(vae).encode(images).latent_dist.kl().isinf().all()
        assert vae.encode(images).latent_dist.kl().isfinite().all()

    def test_autocast(self, vae):
        images = random_images(vae)
        vae.train()
        with torch.autocast("cpu", torch.bfloat16):
            output = vae(images.half(), sample_posterior=True, return_posterior=True)
            assert vae.decode(output.latent_dist.mean.double()).sample.dtype == torch.bfloat16
        assert output.sample.dtype == torch.bfloat16
        assert output.latent_dist.mean.dtype == output.latent_dist.kl().dtype == torch.float32
        (output.sample.float().square().sum() + output.latent_dist.kl().sum()).backward()
        for name, parameter in vae.named_parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


CHANNELWISE = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}


class TestLatentScaling:
    @pytest.mark.parametrize("settings", [{}, {"shift_factor": 0.3}, {"shift_factor": 0.3, **CHANNELWISE}])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_there_and_back(self, settings, dtype):
        vae = build({**TINY, "scaling_factor": 0.7, **settings})
        latents = torch.randn(2, 4, 3, 5, generator=generator()).to(dtype) * 3 + 1
        scaled_latents = vae.scale_latents(latents)
        assert scaled_latents.shape == latents.shape and scaled_latents.dtype == dtype
        eps = torch.finfo(dtype).eps
        for there_and_back in (vae.unscale_latents(scaled_latents), vae.scale_latents(vae.unscale_latents(latents))):
            assert (there_and_back - latents).abs().max() < 16 * eps * latents.abs().max()
        assert (scaled_latents - latents).abs().max() > 0.1

    def test_latents_of_the_measured_statistics_become_standard(self):
        mean, std = (torch.tensor(CHANNELWISE[key]).view(1, 4, 1, 1) for key in CHANNELWISE)
        noise = torch.randn(4, 4, 64, 64, generator=generator())
        noise = (noise - noise.mean()) / noise.std()
        shifted = build({**TINY, "scaling_factor": 0.5, "shift_factor": 0.3}).scale_latents(noise * 2 + 0.3)
        torch.testing.assert_close(shifted, noise)
        channelwise = build({**TINY, "scaling_factor": 1.0, "shift_factor": 0.3, **CHANNELWISE})
        torch.testing.assert_close(channelwise.scale_latents(noise * std + mean), noise)
        incomplete = build({**TINY, "scaling_factor": 0.5, "latents_mean": [9.0] * 4})
        torch.testing.assert_close(incomplete.scale_latents(noise * 2), noise)

    def test_errors(self):
        vae = build(TINY)
        with pytest.raises(ValueError, match=r"^latents must have 4 channels as in the model's config, got 3"):
            vae.scale_latents(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match=r"^scaled_latents must have the shape .*got \(4, 8, 8"):
            vae.unscale_latents(torch.zeros(4, 8, 8))
        for values, message in [
            ({"mean": (1.0,)}, "mean and std must be given together"),
            ({"mean": (1.0,), "std": (1.0, 2.0)}, "one value per channel"),
            ({"mean": (1.0,), "std": (1.0,), "shift": 1.0}, "replace shift"),
            ({"factor": 0.0}, "other than 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                LatentScaling(**values)
        with pytest.raises(ValueError, match=r"shape \(batch, 2, height, width.*got \(1, 1, 8, 8"):
            LatentScaling(mean=(1.0, 2.0), std=(1.0, 2.0)).scale(torch.zeros(1, 1, 8, 8))


class TestSharing:
    @pytest.mark.slow
    @pytest.mark.parametrize("direction", ["to_diffusers", "from_diffusers"])
    def test_shares_parameters(self, vae, direction):
        source = vae if direction == "to_diffusers" else stock_twin(vae)
        target = vae.to_diffusers() if direction == "to_diffusers" else VAE.from_diffusers(source)
        assert type(target) is (AutoencoderKL if direction == "to_diffusers" else VAE)
        own, shared = dict(source.named_parameters()), dict(target.named_parameters())
        assert list(own) == list(shared) and all(own[name] is shared[name] for name in own)
        assert all(target.config[key] == value for key, value in source.config.items() if key[0] != "_")

        before = target(random_images(target)).sample
        optimizer = torch.optim.SGD(source.parameters(), lr=0.01)
        source(random_images(source)).sample.square().mean().backward()
        optimizer.step()
        assert not torch.equal(before, target(random_images(target)).sample)
        assert_same_model(source, target)

    @pytest.mark.slow
    @torch.no_grad()
    def test_settings_follow(self, vae):
        vae.enable_slicing()
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 8, 4, 0.5
        for training in (True, False):
            stock = vae.train(training).to_diffusers()
            back = VAE.from_diffusers(stock)
            assert stock.training == back.training == training
        assert_same_model(stock, vae)
        assert_same_model(back, vae)
        assert back.use_slicing and stock.use_slicing
        vae.disable_tiling()
        assert not torch.equal(back(random_images(vae)).sample, vae(random_images(vae)).sample)

    @pytest.mark.slow
    def test_unknown_config_keys(self, vae, tmp_path):
        """A config.json of a later diffusers still converts."""
        vae.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "new_in_diffusers": 1}))
        assert_same_model(VAE.from_pretrained(tmp_path).to_diffusers(), vae)

    def test_wrong_class(self):
        with pytest.raises(TypeError, match=r"takes a diffusers AutoencoderKL, got VAE$"):
            VAE.from_diffusers(VAE(**TINY))
        with pytest.raises(TypeError, match="takes a diffusers AutoencoderKL, got Linear"):
            VAE.from_diffusers(torch.nn.Linear(1, 1))


class TestMachinery:
    """What stock can do beside encoding and decoding."""

    @torch.no_grad()
    def test_tiles_are_not_those_of_a_small_training_size(self):
        """Tiles of 32 pixels show in an image; up to 256 pixels, none are made."""
        vae, stock = build({**TINY, "sample_size": 32}), stock_twin(build({**TINY, "sample_size": 32}))
        images = random_images(vae, height=64, width=96)
        whole = vae(images).sample
        for model in (vae, stock, vae.to_diffusers()):
            model.enable_tiling()
        assert not torch.equal(stock(images).sample, whole)
        assert torch.equal(vae(images).sample, whole) and torch.equal(vae.to_diffusers()(images).sample, whole)
        assert vae.config.sample_size == 32
        for size, tile in ((32, 256), (256, 256), (512, 512), (1024, 1024)):
            vae = VAE(**{**TINY, "sample_size": size})
            assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (tile, tile // vae.spatial_compression_ratio)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The tiled_encode implementation")
    @torch.no_grad()
    def test_slicing_and_tiling(self, vae):
        stock, images = stock_twin(vae), random_images(vae, batch=3, height=48, width=40)
        latents = torch.randn(3, vae.config.latent_channels, 24, 20, generator=generator())
        whole = vae.encode(images).latent_dist.mean
        for model in (vae, stock):
            model.enable_slicing()
            model.enable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = 32, 16
        assert torch.equal(vae.encode(images).latent_dist.mean, stock.encode(images).latent_dist.mean)
        assert torch.equal(vae.decode(latents).sample, stock.decode(latents).sample)
        assert torch.equal(vae.tiled_encode(images).latent_dist.mean, stock.tiled_encode(images).latent_dist.mean)
        assert torch.equal(vae.tiled_decode(latents).sample, stock.tiled_decode(latents).sample)
        assert not torch.allclose(vae.encode(images).latent_dist.mean, whole)
        vae.disable_tiling()
        calls = count_calls(vae.encoder)
        torch.testing.assert_close(vae.encode(images).latent_dist.mean, whole)
        assert len(calls) == 3
        vae.disable_slicing()
        assert torch.equal(vae.encode(images).latent_dist.mean, whole)

    @pytest.mark.slow
    def test_gradient_checkpointing(self, vae):
        vae.train()
        calls = count_calls(vae.decoder.mid_block.resnets[0])
        gradients = []
        for switch in (vae.disable_gradient_checkpointing, vae.enable_gradient_checkpointing):
            switch()
            vae.zero_grad()
            vae(random_images(vae)).sample.square().mean().backward()
            gradients.append([parameter.grad for parameter in vae.parameters()])
        assert len(calls) == 3, "once without, and twice with: the second time in the backward pass"
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize("config", [TINY, GREY], ids=["rgb", "grey"])
    @torch.no_grad()
    def test_attention_processors(self, vae):
        images = random_images(vae)
        expected = vae(images).sample
        assert list(vae.attn_processors) == list(stock_twin(vae).attn_processors)

        vae.fuse_qkv_projections()
        vae.encoder.mid_block.attentions[0].to_q.weight.zero_()  # not in use while fused
        torch.testing.assert_close(vae(images).sample, expected, atol=1e-5, rtol=1e-5)
        vae.unfuse_qkv_projections()
        assert not torch.allclose(vae(images).sample, expected, atol=1e-5)

        vae.set_attn_processor(AttnProcessor2_0())
        fast = vae(images).sample
        vae.set_default_attn_processor()
        assert {type(each) for each in vae.attn_processors.values()} == {AttnProcessor}
        torch.testing.assert_close(vae(images).sample, fast, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("config", [TINY], ids=["rgb"])
    def test_lora(self, vae, tmp_path):
        from peft import LoraConfig

        images, stock = random_images(vae), stock_twin(vae)
        plain = vae(images).sample.detach()
        vae.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        trainable = {name: each for name, each in vae.named_parameters() if each.requires_grad}
        assert trainable and all("lora" in name for name in trainable)
        optimizer = torch.optim.SGD(trainable.values(), lr=100)
        for _ in range(2):  # lora_A moves once lora_B is no longer zero
            vae(images).sample.square().sum().backward()
            optimizer.step()
        tuned = vae(images).sample
        assert not torch.allclose(tuned, plain, atol=1e-4)

        vae.save_lora_adapter(tmp_path)
        for other in (stock, VAE.from_diffusers(stock_twin(stock))):
            other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
            torch.testing.assert_close(other(images).sample, tuned)
        converted = vae.to_diffusers()
        converted.save_lora_adapter(tmp_path / "again")
        converted.disable_adapters()
        torch.testing.assert_close(converted(images).sample, plain)


class TestFrozenParts:
    def test_stay_in_eval_mode(self, vae):
        parts = [part for part in (vae.encoder, vae.quant_conv, vae.decoder, vae.post_quant_conv) if part is not None]
        assert vae.train() is vae and all(part.training for part in parts)
        vae.encoder.requires_grad_(False)
        assert vae.train().training
        assert [part.training for part in parts] == [part is not vae.encoder for part in parts]
        next(vae.encoder.parameters()).requires_grad_(True)
        assert vae.train().encoder.training
        assert not any(module.training for module in vae.eval().modules())

    def test_a_frozen_encoder_stays_in_eval_mode_in_a_wrapper(self, vae):
        vae.encoder.requires_grad_(False)
        torch.nn.Sequential(vae).train()
        assert vae.training and vae.decoder.training and not vae.encoder.mid_block.training

    def test_decoder_learns_as_with_all_trained(self, vae):
        stock, images = stock_twin(vae).train(), random_images(vae)
        for part in (vae.encoder, vae.quant_conv):
            if part is not None:
                part.requires_grad_(False)
        output = vae.train()(images, return_posterior=True)
        assert not output.latent_dist.mean.requires_grad
        output.sample.square().mean().backward()
        stock(images).sample.square().mean().backward()
        for (name, ours), theirs in zip(vae.named_parameters(), stock.parameters(), strict=True):
            if name.startswith(("encoder", "quant_conv")):
                assert ours.grad is None and theirs.grad.any(), name
            else:
                torch.testing.assert_close(ours.grad, theirs.grad)


def count_calls(module):
    """A list that grows by one for every call of `module`."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


class TestErrors:
    @pytest.mark.parametrize(
        "images, message",
        [
            (torch.zeros(1, 3, 30, 31), "divisible by 2, got 30x31"),
            (torch.zeros(1, 3, 0, 16), "divisible by 2, got 0x16"),
            (torch.zeros(1, 1, 16, 16), "images must have 3 channels as in the model's config, got 1"),
            (
                torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
                r"torch.uint8; diffusers_vae\.images\.ranges\.to_model_range",
            ),
            (torch.zeros(3, 16, 16), r"\(batch, channels, height, width\), got \(3, 16, 16\)"),
            (torch.zeros(1, 3, 16, 16).half(), "model's dtype, torch.float32, got torch.float16"),
        ],
    )
    def test_images(self, images, message):
        vae = build(TINY)
        for call in (vae.encode, vae):
            with pytest.raises(ValueError, match=message):
                call(images)

    def test_sides_by_compression_ratio(self):
        with torch.device("meta"):
            vae = VAE(**LARGE)
        with pytest.raises(ValueError, match="image height and width must be divisible by 8, got 30x32"):
            vae.encode(torch.zeros(1, 3, 30, 32, device="meta"))
        assert vae.encode(torch.zeros(1, 3, 24, 32, device="meta")).latent_dist.mean.shape == (1, 4, 3, 4)

    @pytest.mark.parametrize(
        "latents, message",
        [
            (torch.zeros(1, 3, 8, 8), "latents must have 4 channels as in the model's config, got 3"),
            (torch.zeros(4, 8, 8), r"got \(4, 8, 8\)"),
            (torch.zeros(1, 4, 8, 8, dtype=torch.int64), "latents must be floating point, got torch.int64$"),
        ],
    )
    def test_latents(self, latents, message):
        with pytest.raises(ValueError, match=message):
            build(TINY).decode(latents)

    @pytest.mark.parametrize(("shape", "got"), [((1, 7, 8, 8), "8 channels .*got 7"), ((8, 8, 8), r"got \(8, 8, 8\)")])
    def test_moments(self, shape, got):
        with pytest.raises(ValueError, match=f"^moments must have .*{got}"):
            build(TINY)(None, moments=torch.zeros(shape))

    def test_float64_is_refused_under_autocast_too(self):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"got torch\.float64"):
            build(TINY).encode(torch.zeros(1, 3, 16, 16).double())
