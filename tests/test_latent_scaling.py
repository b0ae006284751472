"""Scaled latents have mean 0 and std 1 by every route from images to what a diffusion model sees."""

import copy
import dataclasses
import json
import logging
import re

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, DDIMScheduler, DiTPipeline, Flux2Pipeline
from support.models import tiny_vae
from support.runs import tiny

from diffusers_vae import MLPVAE, VAE, LatentDataset, cli, encode_images, measure_latents, swap_vae
from diffusers_vae.data import ArrayImages, DataConfig, load_data
from diffusers_vae.evaluation.evaluate import EvaluationConfig
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.models import LatentScaling, ModelConfig
from diffusers_vae.pipelines import STOCK, latent_scaling
from diffusers_vae.tasks.autoencoder import train

CHANNELWISE = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}
SOURCES = {
    "new": {},
    "published": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "no shift": {"scaling_factor": 0.13025, "shift_factor": None},
    "nothing": {"scaling_factor": None, "shift_factor": None},
    "channelwise": {"scaling_factor": 0.5, "shift_factor": 0.3, **CHANNELWISE},
    "half channelwise": {"latents_mean": [9.0] * 4},
}


def shifted(vae):
    """The model with latents of another mean and std in each channel."""
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 3 * torch.arange(1.0, 5.0).view(4, 1, 1, 1)
        vae.quant_conv.bias[:4] = torch.tensor([2.0, -1.0, 0.5, 3.0])
        vae.quant_conv.bias[4:] = -2.0
    return vae


def pictures(count=32):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def latents_of(vae, images, draws=32):
    torch.manual_seed(1)
    return vae.encode(images.repeat(draws, 1, 1, 1)).latent_dist.sample()


def assert_standard(scaled_latents, mean=0.0):
    assert scaled_latents.std().item() == pytest.approx(1, abs=1e-2)
    assert scaled_latents.mean().item() == pytest.approx(mean, abs=1e-2)


def assert_standard_by_every_scaling(vae, images):
    """By the model's own scaling and those of the stock pipelines, which have mean 0 where they subtract one."""
    latents = latents_of(vae, images)
    assert_standard(vae.scale_latents(latents))
    torch.testing.assert_close(vae.unscale_latents(vae.scale_latents(latents)), latents)
    models = (vae, vae.to_diffusers(), VAE.from_diffusers(vae.to_diffusers()))
    for name, stock in STOCK.items():
        mean = 0.0 if stock.use_shift else vae.config.shift_factor * vae.config.scaling_factor
        for model in models:
            assert_standard(latent_scaling(name, model).scale(latents), mean)


class TestMeasured:
    @pytest.mark.slow
    @pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
    def test_whatever_the_config_held(self, source, tmp_path):
        vae, images = shifted(tiny_vae(**source)), pictures()
        statistics = measure_latents(vae, images)
        assert vae.config.latents_mean is vae.config.latents_std is None
        assert (vae.config.scaling_factor, vae.config.shift_factor) == (1 / statistics.std, statistics.mean)
        assert_standard_by_every_scaling(vae, images)
        vae.save_pretrained(tmp_path)
        again, stock = VAE.from_pretrained(tmp_path), AutoencoderKL.from_pretrained(tmp_path)
        assert LatentScaling.from_config(again.config) == LatentScaling.from_config(stock.config)
        assert LatentScaling.from_config(again.config) == LatentScaling(1 / statistics.std, statistics.mean)

    def test_from_a_tensor_batches_and_an_image_set(self):
        pixels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images = to_model_range(pixels)
        loader = torch.utils.data.DataLoader(images, batch_size=7)
        found = []
        for given in (images, loader, (batch.double() for batch in loader), ArrayImages(pixels)):
            vae = shifted(tiny_vae())
            statistics = measure_latents(vae, given, batch_size=6)
            found.append([statistics.images, vae.config.scaling_factor, vae.config.shift_factor])
        assert all(each == pytest.approx(found[0], rel=1e-5) for each in found) and found[0][0] == 20

    def test_of_stock_and_perceptron(self, tmp_path):
        vae, images = shifted(tiny_vae()), pictures()
        stock = AutoencoderKL.from_config(tiny_vae().config)
        stock.load_state_dict(vae.state_dict())
        measure_latents(stock, images), measure_latents(vae, images)
        for found in (stock, VAE.from_diffusers(stock)):
            assert LatentScaling.from_config(found.config) == LatentScaling.from_config(vae.config)
        mlp = MLPVAE(8, latent_dim=3, hidden_dim=8)
        measure_latents(mlp, images)
        assert_standard(LatentScaling.from_config(mlp.config).scale(latents_of(mlp, images, 1000)))
        mlp.save_pretrained(tmp_path)
        assert "latents_mean" not in json.loads((tmp_path / "config.json").read_text())

    def test_leaves_the_mode_of_every_part_as_it_was(self):
        vae = tiny_vae().train()
        vae.encoder.mid_block.eval()
        modes = [module.training for module in vae.modules()]
        seen = []
        vae.encoder.register_forward_pre_hook(
            lambda encoder, _: seen.append((encoder.training, torch.is_grad_enabled()))
        )
        measure_latents(vae, pictures(4))
        with pytest.raises(ValueError, match="finite and lie in"):
            measure_latents(vae, pictures(4) * 2)
        assert seen == [(False, False)] and [module.training for module in vae.modules()] == modes

    @pytest.mark.parametrize(
        ("images", "kind", "message"),
        [
            (pictures(0), ValueError, "there is no image to measure the latents of"),
            ([], ValueError, "there is no image to measure the latents of"),
            (pictures() * 127.5, ValueError, r"finite and lie in \[-1, 1\], got values from -127"),
            (pictures() * float("nan"), ValueError, r"finite and lie in \[-1, 1\], got values from nan"),
            (
                (pictures() * 127).to(torch.uint8),
                ValueError,
                "must be floating point, got torch.uint8; .*to_model_range",
            ),
            (pictures()[0], ValueError, r"must have the shape \(batch, channels, height, width\), got \(1, 8, 8\)"),
            (pictures().expand(-1, 3, -1, -1), ValueError, "must have 1 channels as in the model's config, got 3"),
            ([pictures(), pictures().repeat(1, 1, 2, 2)], ValueError, r"one size, got \(8, 8\) and \(16, 16\)"),
            ([(pictures(), 1)], TypeError, r"must be tensors \(B, C, H, W\), got tuple; .* labels"),
        ],
    )
    def test_wrong_images_are_named_and_nothing_is_written(self, images, kind, message):
        vae = tiny_vae()
        before = dict(vae.config)
        with pytest.raises(kind, match=message):
            measure_latents(vae, images)
        assert dict(vae.config) == before

    def test_latents_that_are_not_finite_are_named(self):
        vae = tiny_vae()
        torch.nn.init.constant_(vae.quant_conv.bias, float("nan"))
        with pytest.raises(FloatingPointError, match="the latents have mean nan and std nan: both must be finite"):
            measure_latents(vae, pictures())
        assert vae.config.scaling_factor == 0.18215

    @pytest.mark.parametrize(
        "model", [torch.nn.Linear(1, 1), AutoencoderTiny().encoder, torch.nn.DataParallel(tiny_vae())]
    )
    def test_other_models_are_refused(self, model):
        with pytest.raises(TypeError, match=f"has a scaling_factor.*got {type(model).__name__}; if it is wrapped"):
            measure_latents(model, pictures())


class TestUnmeasured:
    """The scaling_factor of a constructor that was given none is nobody's."""

    def test_scaling_by_a_default_is_refused_with_what_to_do(self):
        vae, latents = tiny_vae(), torch.zeros(1, 4, 4, 4)
        what_to_do = r"got 0.18215, the default .*diffusers_vae.measure_latents\(vae, images\).*register_to_config\(sc"
        stock = AutoencoderKL.from_config(vae.config)
        models = [vae, copy.deepcopy(vae), vae.to_diffusers(), VAE.from_diffusers(vae.to_diffusers()), stock]
        for scale in (vae.scale_latents, vae.unscale_latents):
            with pytest.raises(ValueError, match=what_to_do):
                scale(latents)
        for name in STOCK:
            for model in models:
                with pytest.raises(ValueError, match=what_to_do):
                    latent_scaling(name, model)
        with pytest.raises(ValueError, match=r"got 1\.0, the default .*measure_latents"):
            LatentScaling.from_config(MLPVAE(8).config)
        with pytest.raises(ValueError, match=r"got None: .*measure_latents"):
            tiny_vae(scaling_factor=None).scale_latents(latents)

    def test_swap_lists_it(self):
        stock = tiny_vae(scaling_factor=0.18215).to_diffusers()
        pipeline = DiTPipeline(transformer=None, vae=stock, scheduler=DDIMScheduler())
        with pytest.raises(ValueError, match=r"fit this DiTPipeline:\n- scaling_factor must be .*got 0\.18215, the"):
            swap_vae(pipeline, tiny_vae())
        assert pipeline.vae is stock and swap_vae(pipeline, tiny_vae(scaling_factor=0.18215)).vae is not stock

    def test_stated_factors_are_used_even_those_of_the_default(self):
        given, registered = tiny_vae(scaling_factor=0.18215), tiny_vae()
        registered.register_to_config(scaling_factor=0.18215)
        for vae in (given, registered, given.to_diffusers(), VAE.from_config(registered.config)):
            assert latent_scaling("StableDiffusionPipeline", vae) == LatentScaling(0.18215)
        mlp = MLPVAE(8)
        mlp.register_to_config(scaling_factor=1.0)
        assert LatentScaling.from_config(mlp.config) == LatentScaling(1.0)

    @pytest.mark.slow
    def test_registered_values_survive_the_change_of_class(self):
        """`from_config` of diffusers resets values whose arguments the constructor was not given."""
        vae, stock = tiny_vae(), AutoencoderKL.from_config(tiny_vae().config)
        for model in (vae, stock):
            model.register_to_config(scaling_factor=0.7, shift_factor=0.1, force_upcast=False)
        for other in (vae.to_diffusers(), VAE.from_diffusers(stock), VAE.from_diffusers(vae.to_diffusers())):
            config = other.config
            assert (config.scaling_factor, config.shift_factor, config.force_upcast) == (0.7, 0.1, False)

    @pytest.mark.parametrize("kind", [VAE, AutoencoderKL])
    def test_config_of_early_stable_diffusion_means_its_factor(self, kind, tmp_path):
        tiny_vae(scaling_factor=0.18215).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        early = {"_diffusers_version": "0.6.0", "_class_name": "AutoencoderKL"}
        dropped = ("scaling_factor", "_name_or_path")
        config = {name: value for name, value in (config | early).items() if name not in dropped}
        (tmp_path / "config.json").write_text(json.dumps(config))
        vae = kind.from_pretrained(tmp_path)
        stock = AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path))  # as from_single_file does
        for model in (vae, copy.deepcopy(vae), stock, VAE.from_diffusers(stock)):
            assert latent_scaling("StableDiffusionPipeline", model) == LatentScaling(0.18215)

    def test_info_states_the_formula_of_flux_2(self, tmp_path, capsys):
        """A batch norm over squares of latents, and no factor."""
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKLFlux2(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        vae.save_pretrained(tmp_path)
        assert cli.main(["info", str(tmp_path)]) == 0
        formula = re.search(r"^scaled latents +(.*), per channel of the patches", capsys.readouterr().out, re.M)[1]
        patches = Flux2Pipeline._patchify_latents(torch.randn(2, 2, 4, 6))
        names = {"vae": vae, "sqrt": torch.sqrt, "patches": patches.movedim(1, -1)}
        torch.testing.assert_close(eval(formula, names).movedim(-1, 1), vae.bn.eval()(patches))

    def test_info_states_what_each_pipeline_does(self, tmp_path, capsys):
        vae = tiny_vae(scaling_factor=0.5, shift_factor=0.25, **CHANNELWISE)
        vae.save_pretrained(tmp_path)
        assert cli.main(["info", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        line = re.search(r"^in pipelines of +(.*)$", out, re.M)[1]
        stated = {
            name: formula
            for names, formula in (part.split(": ") for part in line.split("; "))
            for name in names.split(", ")
        }
        assert stated.keys() == {"Stable Diffusion", "DiT", "Stable Diffusion 3", "FLUX.1"}
        for name, pipeline in {"Stable Diffusion": "StableDiffusion", "FLUX.1": "Flux", "DiT": "DiT"}.items():
            expected = latent_scaling(f"{pipeline}Pipeline", vae).scale(latents)
            torch.testing.assert_close(eval(stated[name], {"latents": latents}), expected)
        assert re.search(r"^scaled latents +\(latents - mean\) \* 0.5 / std, per channel: mean 0.1, ", out, re.M)

    def test_saving_and_encoding_warn(self, tmp_path, caplog):
        images = ArrayImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
        for number, vae in enumerate(
            (tiny_vae(), MLPVAE(8), tiny_vae(scaling_factor=0.18215), tiny_vae(scaling_factor=None))
        ):
            for use in (vae.save_pretrained, lambda folder, vae=vae: encode_images(vae, images, f"{folder}-latents")):
                caplog.clear()
                with caplog.at_level(logging.WARNING, "diffusers_vae"):
                    use(tmp_path / f"{number}")
                assert ("diffusers_vae.measure_latents(vae, images)" in caplog.text) is (number < 2)


DATA = DataConfig(resolution=8)
IMAGES = 20


def images_measured():
    return to_model_range(load_data(DATA)[0].pixels[:IMAGES])


@pytest.fixture(scope="module", params=["scratch", "all", "decoder", "decoder of a measured one"])
def finished(request, tmp_path_factory):
    """Folder of a run of one step: from scratch, or from a model that standardises its latents by channel, or by one
    factor.
    """
    folder = tmp_path_factory.mktemp("run")
    model = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4)
    if request.param != "scratch":
        source = shifted(tiny_vae(sample_size=8))
        statistics = measure_latents(source, images_measured())
        if request.param in ("all", "decoder"):
            channelwise = {"latents_mean": statistics.latents_mean, "latents_std": statistics.latents_std}
            source.register_to_config(scaling_factor=1.0, shift_factor=None, **channelwise)
        source.save_pretrained(folder / "source")
        model = ModelConfig(pretrained=str(folder / "source"), train=request.param.partition(" ")[0])
    config = tiny(folder / "run", model, max_images=30)
    config = dataclasses.replace(config, data=DATA, evaluation=EvaluationConfig(max_images=IMAGES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(config)
    return folder / "run"


@pytest.mark.slow
class TestRuns:
    def test_every_route_standardises_the_latents(self, finished, tmp_path, capsys):
        vae, images = VAE.from_pretrained(finished / "model"), images_measured()
        by_channel = vae.config.latents_mean is not None
        latents = latents_of(vae, images, 64)
        assert_standard(vae.scale_latents(latents))
        xl = latent_scaling("StableDiffusionXLPipeline", vae).scale(latents)
        if by_channel:
            assert_standard(xl)
        else:
            assert_standard_by_every_scaling(vae, images)

        assert cli.main(["info", str(finished)]) == 0
        line = re.search(r"^scaled latents  (.*)$", capsys.readouterr().out, re.M)[1]
        formula, _, values = line.partition(", per channel: ")
        found = re.findall(r"(mean|std) ([^;]*)", values)
        names = {
            name: torch.tensor([float(each) for each in text.split(", ")]).view(1, -1, 1, 1) for name, text in found
        }
        assert bool(names) is by_channel
        assert_standard(eval(formula, {"latents": latents, **names}))

        card = (finished / "README.md").read_text()
        (code,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.S) if "scaled_latents" in block]
        torch.manual_seed(1)
        names = {"vae": AutoencoderKL.from_pretrained(finished / "model"), "images": images.repeat(64, 1, 1, 1)}
        with torch.no_grad():
            exec(code, names)
        assert_standard(names["scaled_latents"])
        with torch.no_grad():
            torch.testing.assert_close(names["images"], vae.decode(names["latents"]).sample, rtol=1e-3, atol=1e-4)
        scaled = [float(each) for each in re.findall(r"^\| \d \| \S+ \| \S+ \| (\S+) \|", card, re.M)]
        assert len(scaled) == 4 and (not by_channel or scaled == pytest.approx([1.0] * 4, abs=0.5))

        encode_images(vae, load_data(DATA)[0].first(IMAGES), tmp_path / "latents", compute_dtype=torch.float32)
        cache = LatentDataset(tmp_path / "latents")
        noise = torch.randn(64, *cache.latents([0]).shape[1:], generator=torch.Generator().manual_seed(0))
        cached = torch.cat([cache.latents([index] * 64, noise) for index in range(IMAGES)])
        assert_standard(LatentScaling.from_config(cache.vae_config).scale(cached))

    def test_report_says_what_became_of_the_scaling(self, finished):
        config = json.loads((finished / "model" / "config.json").read_text())
        card = " ".join((finished / "README.md").read_text().split())
        if not (finished.parent / "source").exists():
            assert "Fine-tuning" not in card
        elif "**Latents unchanged" in card:
            source = json.loads((finished.parent / "source" / "config.json").read_text())
            for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
                assert config[name] == source[name] and f"`{name}`" in card.partition("so are ")[2]
        else:
            assert "measured again; `latents_mean` and `latents_std` are null." in card
            assert config["latents_mean"] is config["latents_std"] is None
