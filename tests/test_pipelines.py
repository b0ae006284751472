"""Stock pipelines around a VAE trained with this package: what they apply to its latents, and which VAE fits which."""

import copy
import inspect
import json
import pickle
import re

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.stock import run_without_package
from tokenizers import Tokenizer, models
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffusers_vae import MLPVAE, VAE, swap_vae
from diffusers_vae.models import LatentScaling
from diffusers_vae.pipelines import STOCK, latent_scaling

FAMILIES = {
    "StableDiffusion": "StableDiffusionPipeline",
    "StableDiffusionXL": "StableDiffusionXLPipeline",
    "StableDiffusion3": "StableDiffusion3Pipeline",
    "Flux": "FluxPipeline",
    "DiT": "DiTPipeline",
}
RUN = ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", *FAMILIES.values()]
CHANNELWISE = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}


@pytest.fixture
def vae(finished_vae_run):
    """After training on digits: grey and with 4 latent channels of half the size."""
    return VAE.from_pretrained(finished_vae_run / "model")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Text encoders and tokenizers with random weights and three words."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clip_tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    words = models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], unk_id=2)
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 8})
    )
    torch.manual_seed(0)
    tokens = {"vocab_size": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(**tokens, **layers, projection_dim=8)
    return {
        "clip": CLIPTextModel(clip).eval(),
        "projected": CLIPTextModelWithProjection(clip).eval(),
        "t5": T5EncoderModel(T5Config(vocab_size=4, d_model=32, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval(),
        "clip_tokenizer": clip_tokenizer,
        "t5_tokenizer": T5TokenizerFast.from_pretrained(folder),
    }


def unet(in_channels=4, **settings):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    widths = {"block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    return UNet2DConditionModel(sample_size=8, in_channels=in_channels, **blocks, **widths, **settings)


def make(name, vae, texts, in_channels=None):
    """A pipeline of the stock class `name` with a random denoiser for 4 latent channels, with `vae` as it is."""
    torch.manual_seed(0)
    cls, family = getattr(diffusers, name), next(each for each in reversed(FAMILIES) if name.startswith(each))
    clip, projected, t5 = (copy.deepcopy(texts[each]) for each in ("clip", "projected", "t5"))
    clip_tokenizer, t5_tokenizer = texts["clip_tokenizer"], texts["t5_tokenizer"]
    if family == "DiT":
        heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_type": "ada_norm_zero"}
        sizes = {"in_channels": in_channels or 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 1000}
        transformer = DiTTransformer2DModel(**heads, **sizes)
        return cls(transformer=transformer.eval(), vae=vae, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))
    if family == "StableDiffusion":
        denoiser = unet(in_channels or (9 if "Inpaint" in name else 4), cross_attention_dim=8)
        components = {"text_encoder": clip, "tokenizer": clip_tokenizer, "unet": denoiser}
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    elif family == "StableDiffusionXL":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        added |= {"projection_class_embeddings_input_dim": 6 * 4 + 8}
        denoiser = unet(in_channels or 4, cross_attention_dim=16, **added)
        components = {"text_encoder": clip, "tokenizer": clip_tokenizer, "unet": denoiser}
        components |= {"text_encoder_2": projected, "tokenizer_2": clip_tokenizer}
    elif family == "StableDiffusion3":
        heads = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "caption_projection_dim": 8}
        sizes = {"sample_size": 8, "patch_size": 1, "in_channels": in_channels or 4, "out_channels": 4}
        denoiser = SD3Transformer2DModel(**heads, **sizes, joint_attention_dim=32, pooled_projection_dim=16)
        components = {"text_encoder": projected, "tokenizer": clip_tokenizer, "transformer": denoiser}
        components |= {"text_encoder_2": projected, "tokenizer_2": clip_tokenizer}
        components |= {"text_encoder_3": t5, "tokenizer_3": t5_tokenizer}
    else:
        heads = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        sizes = {"in_channels": in_channels or 16, "joint_attention_dim": 32, "pooled_projection_dim": 8}
        denoiser = FluxTransformer2DModel(**heads, **sizes, patch_size=1, axes_dims_rope=(4, 4, 8))
        components = {"text_encoder": clip, "tokenizer": clip_tokenizer, "transformer": denoiser}
        components |= {"text_encoder_2": t5, "tokenizer_2": t5_tokenizer}
    scheduler = (
        FlowMatchEulerDiscreteScheduler()
        if "transformer" in components
        else DDIMScheduler(clip_sample=False, steps_offset=1)
    )
    denoiser.eval()
    return cls(vae=vae, scheduler=scheduler, **components)


def untrained(vae, **config):
    """A stock VAE of another origin with the config of `vae`, but for `config`."""
    torch.manual_seed(1)
    return AutoencoderKL.from_config({**vae.config, **config}).eval()


def draw(pipeline, images=None, mask=None):
    """Pictures (1, 16, 16, C) in [0, 1], from the same noise each time. In the processes without the package too."""
    name = type(pipeline).__name__
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    if name == "DiTPipeline":
        return torch.tensor(pipeline(class_labels=[1], **call).images)
    call |= {"prompt": "a"}
    if "StableDiffusion3" in name or "Flux" in name:
        call |= {"max_sequence_length": 8}
    if "Img2Img" in name:
        return torch.tensor(pipeline(image=images, strength=1.0, **call).images)
    if "Inpaint" in name:
        call |= {"image": images, "mask_image": mask}
    return torch.tensor(pipeline(height=16, width=16, **call).images)


def pictures(channels=1):
    """Images in [0, 1], which pipelines take, and a mask."""
    images = torch.rand(1, channels, 16, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    return images, mask


class TestLatentScaling:
    """That of each stock class is what its pipeline does, bit for bit."""

    @pytest.fixture(params=[{}, CHANNELWISE], ids=["scalar", "channelwise"])
    def scaled(self, vae, request):
        vae.register_to_config(scaling_factor=0.7, shift_factor=0.3, **request.param)
        return vae

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FAMILIES.values())
    def test_decoding(self, name, scaled, texts):
        """What arrives at the decoder, against what arrives there from the same steps when nothing is scaled."""
        seen = []
        scaled.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        stock = scaled.to_diffusers()
        pipeline = make(name, stock, texts)
        scaling = latent_scaling(pipeline, scaled)
        draw(pipeline)
        plain = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
        stock.register_to_config(**plain)
        draw(pipeline)
        latents, scaled_latents = seen
        assert not torch.allclose(latents, scaled_latents, atol=0.1)
        expected = scaling.unscale(scaled_latents)
        if name == "DiTPipeline":  # multiplies by 1 / scaling_factor
            torch.testing.assert_close(latents, expected, rtol=2e-7, atol=0)
        else:
            assert torch.equal(latents, expected)

    @pytest.mark.parametrize("family", [name for name in FAMILIES if name != "DiT"])
    @torch.no_grad()
    def test_encoding(self, family, scaled, texts):
        name = f"{family}Img2ImgPipeline"
        pipeline = make(name, scaled.to_diffusers(), texts)
        images = pictures()[0] * 2 - 1
        generator = torch.Generator().manual_seed(0)
        latents = scaled.encode(images).latent_dist.sample(generator)
        expected = latent_scaling(name, scaled).scale(latents)
        noise = torch.randn(latents.shape, generator=generator)
        generator = torch.Generator().manual_seed(0)
        pipeline.scheduler.set_timesteps(4)
        timestep = pipeline.scheduler.timesteps[2:3]
        call = {"dtype": torch.float32, "device": "cpu", "generator": generator}
        if family == "Flux":
            found = pipeline._encode_vae_image(images, generator)
        elif family == "StableDiffusionXL":
            found = pipeline.prepare_latents(images, timestep, 1, 1, **call, add_noise=False)
        else:
            found = pipeline.prepare_latents(images, timestep, 1, 1, **call)
            add_noise = getattr(pipeline.scheduler, "scale_noise", None) or pipeline.scheduler.add_noise
            arguments = (timestep, noise) if family == "StableDiffusion3" else (noise, timestep)
            expected = add_noise(expected, *arguments)
        assert torch.equal(found, expected)

    @pytest.mark.slow
    def test_names_classes_objects_and_derived_classes(self, vae, texts):
        class Derived(diffusers.FluxPipeline):
            pass

        expected = LatentScaling(vae.config.scaling_factor, vae.config.shift_factor)
        assert expected.shift != 0
        flux = make("FluxPipeline", vae.to_diffusers(), texts)
        for pipeline in (flux, "FluxPipeline", diffusers.FluxPipeline, Derived, "StableDiffusion3InpaintPipeline"):
            assert latent_scaling(pipeline, vae) == latent_scaling(pipeline, vae.to_diffusers()) == expected
        for pipeline in ("StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline", DiTPipeline):
            assert latent_scaling(pipeline, vae) == LatentScaling(vae.config.scaling_factor)

    def test_known_classes_are_there(self):
        for name, stock in STOCK.items():
            signature = getattr(diffusers, name)._get_signature_types()
            assert {"vae", stock.denoiser} <= set(signature)

    def test_refusals(self, vae):
        with pytest.raises(
            ValueError, match="how PixArtSigmaPipeline scales latents; supported are StableDiffusionPipeline, "
        ):
            latent_scaling("PixArtSigmaPipeline", vae)
        vae.register_to_config(shift_factor=None, **CHANNELWISE)
        with pytest.raises(ValueError, match="has None, and FluxPipeline subtracts it"):
            latent_scaling("FluxPipeline", vae)
        vae.register_to_config(latents_mean=[0.0] * 3)
        with pytest.raises(ValueError, match="4 channels only, and the VAE has 4 channels, 3 means and 4 stds"):
            latent_scaling("StableDiffusionXLPipeline", vae)
        with pytest.raises(TypeError, match="got AutoencoderTiny"):
            latent_scaling("StableDiffusionPipeline", AutoencoderTiny())


class TestSwap:
    @pytest.mark.slow
    def test_saved_pipelines_draw_the_same_without_the_package(self, vae, texts, tmp_path):
        """Each kind of pipeline runs with the trained VAE, names stock classes only, and loads without this package."""
        images, mask = pictures()
        expected = {}
        for name in RUN:
            pipeline = make(name, untrained(vae), texts)
            before = draw(pipeline, images, mask)
            assert swap_vae(pipeline, vae) is pipeline
            expected[name] = draw(pipeline, images, mask)
            assert expected[name].shape == (1, 16, 16, 1) and expected[name].isfinite().all()
            assert expected[name].std() > 0.01 and not torch.allclose(before, expected[name], atol=0.01)
            pipeline.save_pretrained(tmp_path / name)
            index = json.loads((tmp_path / name / "model_index.json").read_text())
            libraries = {library for library, _ in [each for each in index.values() if isinstance(each, list)]}
            assert libraries <= {"diffusers", "transformers", None} and index["vae"] == ["diffusers", "AutoencoderKL"]
            weights = load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")
            assert all(torch.equal(weights[key], weight) for key, weight in vae.state_dict().items())
        torch.save([images, mask, expected], tmp_path / "expected.pt")
        run_without_package(
            f"import torch\n\n{inspect.getsource(draw)}"
            """
from diffusers import AutoencoderKL, DiffusionPipeline
images, mask, expected = torch.load("expected.pt")
for name, pictures in expected.items():
    pipeline = DiffusionPipeline.from_pretrained(name)
    assert type(pipeline).__name__ == name and type(pipeline.vae) is AutoencoderKL
    torch.testing.assert_close(draw(pipeline, images, mask), pictures, rtol=0, atol=1e-5, msg=lambda text: name + text)
""",
            tmp_path,
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [name for name in RUN if "XL" not in name])
    def test_bfloat16(self, name, vae, texts):
        pipeline = make(name, untrained(vae), texts)
        pipeline.to(torch.bfloat16)
        swap_vae(pipeline, vae)
        assert pipeline.vae.dtype == torch.bfloat16 and vae.dtype == torch.float32
        assert draw(pipeline, *pictures()).isfinite().all()

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "DiTPipeline"])
    def test_float16(self, name, vae, texts):
        pipeline = make(name, untrained(vae), texts)
        pipeline.to(torch.float16)
        swap_vae(pipeline, vae)
        assert pipeline.vae.dtype == torch.float16 and draw(pipeline).isfinite().all()

    @pytest.mark.slow
    def test_upcasting(self, vae, texts):
        """Stock's SDXL in float16 takes the float32 dtype from post_quant_conv."""
        pipeline = make("StableDiffusionXLPipeline", untrained(vae), texts)
        pipeline.to(torch.float16)
        with pytest.raises(AttributeError, match="NoneType"):
            draw(pipeline)
        pipeline.vae.half()
        with pytest.raises(ValueError, match="force_upcast: the VAE has True, and no post_quant_conv"):
            swap_vae(pipeline, vae)
        vae.register_to_config(force_upcast=False)
        assert draw(swap_vae(pipeline, vae)).isfinite().all()
        torch.manual_seed(0)
        upcast = AutoencoderKL.from_config({**vae.config, "force_upcast": True, "use_post_quant_conv": True})
        assert draw(swap_vae(pipeline, upcast)).isfinite().all() and pipeline.vae.dtype == torch.float16

    @pytest.mark.slow
    def test_copy_takes_the_place_of_the_old_one(self, vae, texts):
        vae.train()
        pipeline = make("StableDiffusionPipeline", untrained(vae).double(), texts)
        pipeline.vae.enable_slicing()
        pipeline.fuse_qkv_projections(unet=False)
        swap_vae(pipeline, vae)
        assert type(pipeline.vae) is AutoencoderKL and not any(each.training for each in pipeline.vae.modules())
        assert pipeline.vae.dtype == torch.float64 and pipeline.vae.use_slicing and not pipeline.vae.use_tiling
        assert vae.dtype == torch.float32 and all(each.training for each in vae.modules()) and not vae.use_slicing
        pipeline.unfuse_qkv_projections(unet=False)
        before = {key: weight.clone() for key, weight in pipeline.vae.state_dict().items()}
        torch.nn.init.zeros_(vae.decoder.conv_out.weight)
        assert all(torch.equal(before[key], weight) for key, weight in pipeline.vae.state_dict().items())
        vae.enable_tiling()
        assert swap_vae(pipeline, vae).vae.use_tiling
        assert vae.config.sample_size < pipeline.vae.config.sample_size == pipeline.vae.tile_sample_min_size == 256

    @pytest.mark.slow
    @pytest.mark.parametrize("name", STOCK)
    def test_what_a_pipeline_derives_is_as_if_it_was_built_with_the_vae(self, name, vae, texts):
        three = untrained(vae, latent_channels=3)
        pipeline, fresh = (make(name, each, texts, 12 if "Flux" in name else 3) for each in (None, three))
        swap_vae(pipeline, three)
        derived = {key: value for key, value in vars(fresh).items() if key not in fresh.components and key[0] != "_"}
        assert "vae_scale_factor" in derived or name == "DiTPipeline"
        for key, value in derived.items():
            found = getattr(pipeline, key)
            assert getattr(found, "config", found) == getattr(value, "config", value), key

    @pytest.mark.slow
    def test_without_an_old_vae(self, vae, texts, tmp_path):
        """The way to a VAE of another scaling, for which the denoiser was trained."""
        make("StableDiffusionPipeline", untrained(vae, in_channels=3, out_channels=3), texts).save_pretrained(tmp_path)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path, vae=None, torch_dtype=torch.bfloat16)
        swap_vae(pipeline, vae)
        assert pipeline.config["vae"] == ("diffusers", "AutoencoderKL")  # what model_index.json will say
        assert pipeline.vae.dtype == torch.bfloat16 and draw(pipeline).shape == (1, 16, 16, 1)
        pipeline.vae = AutoencoderTiny(latent_channels=4)
        assert type(swap_vae(pipeline, vae).vae) is AutoencoderKL

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("StableDiffusionPipeline", {"shift_factor": 7.0, **CHANNELWISE}),
            ("DiTPipeline", {"shift_factor": None, **CHANNELWISE}),
            ("StableDiffusionXLImg2ImgPipeline", {"shift_factor": 7.0, "latents_std": [7.0] * 4}),
            ("FluxInpaintPipeline", CHANNELWISE),
            ("StableDiffusion3Pipeline", {"force_upcast": False, "sample_size": 512, **CHANNELWISE}),
        ],
    )
    def test_what_a_pipeline_ignores_may_differ(self, name, config, vae, texts):
        pipeline = make(name, untrained(vae), texts)
        vae.register_to_config(**config)
        assert {key: swap_vae(pipeline, vae).vae.config[key] for key in config} == config

    @pytest.mark.slow
    def test_inpainting_denoisers_of_both_kinds(self, vae, texts):
        for in_channels in (4, 9):
            swap_vae(make("StableDiffusionXLInpaintPipeline", untrained(vae), texts, in_channels), vae)


def assign(pipeline, vae, folder):
    pipeline.vae = vae
    return pipeline


def register(pipeline, vae, folder):
    pipeline.register_modules(vae=vae)
    return pipeline


def construct(pipeline, vae, folder):
    return type(pipeline)(**pipeline.components | {"vae": vae})


def load(pipeline, vae, folder):
    pipeline.save_pretrained(folder / "old")
    return type(pipeline).from_pretrained(folder / "old", vae=vae)


def swap(pipeline, vae, folder):
    return swap_vae(pipeline, vae)


WAYS = [assign, register, construct, load, swap]


def with_adapters(vae):
    adapted = copy.deepcopy(vae)
    adapted.add_adapter(LoraConfig(target_modules=["conv_out"], init_lora_weights=False))
    return adapted


class TestSaving:
    """A pipeline with a `VAE` in it, put there in any way, names stock classes only."""

    @pytest.mark.slow
    def test_loads_without_the_package(self, vae, texts, tmp_path):
        """And draws the same, with the weights of the adapters and of the module inside a compiled one too."""
        put = {way.__name__: (way, vae) for way in WAYS}
        put |= {"adapters": (assign, with_adapters(vae)), "compiled": (assign, torch.compile(vae, backend="eager"))}
        put["swapped-adapters"] = swap, put["adapters"][1]
        expected = {}
        for name, (way, put_in) in put.items():
            pipeline = way(make("DiTPipeline", untrained(vae), texts), put_in, tmp_path)
            expected[name] = draw(pipeline)
            pipeline.save_pretrained(tmp_path / name, variant="fp16")
            assert json.loads((tmp_path / name / "model_index.json").read_text())["vae"] == [
                "diffusers",
                "AutoencoderKL",
            ]
            assert (tmp_path / name / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
        assert all(torch.equal(expected["assign"], expected[name]) for name in [each.__name__ for each in WAYS])
        assert not torch.allclose(expected["assign"], expected["adapters"], atol=0.01)
        for wrapped in (
            put["compiled"][1],
            get_peft_model(copy.deepcopy(vae), LoraConfig(target_modules=["conv_out"])),
        ):
            with pytest.raises(TypeError, match="pass the model inside"):
                swap_vae(pipeline, wrapped)
        torch.save(expected, tmp_path / "expected.pt")
        run_without_package(
            f"import torch\n\n{inspect.getsource(draw)}"
            """
from diffusers import AutoencoderKL, DiffusionPipeline
for name, pictures in torch.load("expected.pt").items():
    pipeline = DiffusionPipeline.from_pretrained(name, variant="fp16")
    assert type(pipeline.vae) is AutoencoderKL
    found = draw(pipeline)
    if "adapters" in name:  # merged: rounded otherwise
        torch.testing.assert_close(found, pictures, rtol=0, atol=1e-5, msg=lambda text: name + text)
    else:
        assert torch.equal(found, pictures), name
""",
            tmp_path,
        )

    def test_class_is_found_under_its_own_name(self, vae):
        for again in (pickle.loads(pickle.dumps(vae)), copy.deepcopy(vae), VAE.from_diffusers(vae.to_diffusers())):
            assert type(again) is VAE and not isinstance(again, AutoencoderKL)
            pipeline = DiTPipeline(transformer=None, vae=again, scheduler=None)
            assert pipeline.config["vae"] == ("diffusers", "AutoencoderKL")
        assert f"{VAE.__module__}.{VAE.__qualname__}" == "diffusers_vae.models.vae.VAE"

        class Other(VAE):
            """Of other code, under whose name it is saved."""

        pipeline = DiTPipeline(transformer=None, vae=Other.from_config(vae.config), scheduler=None)
        assert pipeline.config["vae"] == (Other.__module__, "Other")


def state(pipeline):
    """All that swap_vae could change."""
    found = {key: getattr(value, "config", value) for key, value in vars(pipeline).items() if key != "_internal_dict"}
    return copy.copy(found), dict(pipeline.config), id(pipeline.vae)


class TestRefusals:
    @pytest.fixture
    def refused(self, vae, texts):
        """Function that swaps a VAE with other settings into a pipeline: what the error lists."""

        def refused(name, config, denoiser_channels=None, old=None):
            pipeline = make(name, untrained(vae, **(old or {})), texts, denoiser_channels)
            before = state(pipeline)
            with pytest.raises(ValueError) as error:
                swap_vae(pipeline, untrained(vae, **config))
            assert state(pipeline) == before
            first, *problems = str(error.value).split("\n- ")
            assert first == f"the VAE does not fit this {name}:"
            return problems

        return refused

    def test_everything_at_once(self, refused, vae):
        factor, shift = vae.config.scaling_factor, vae.config.shift_factor
        three = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3}
        three |= {"up_block_types": ("UpDecoderBlock2D",) * 3, "in_channels": 3, "out_channels": 3}
        problems = refused(
            "StableDiffusion3Pipeline", {**three, "latent_channels": 16, "scaling_factor": 9.0, "shift_factor": 7.0}
        )
        expected = [
            (
                "latent channels: the VAE has 16,",
                "the transformer must take 16 channels, and it takes 4; train the VAE ",
            ),
            ("spatial compression ratio: the VAE has 4, the old one 2;", "train the VAE with 2 widths"),
            ("image channels, in_channels: the VAE has 3, the old one 1;", "data.channels"),
            ("image channels, out_channels: the VAE has 3, the old one 1;", "data.channels"),
            ("scaling_factor: the VAE has 9.0,", f"{factor}; if", f"vae.register_to_config(scaling_factor={factor})"),
            ("shift_factor: the VAE has 7.0,", f"{shift}; if", "load the pipeline with vae=None before"),
        ]
        assert len(problems) == len(expected)
        for problem, parts in zip(problems, expected, strict=True):
            assert problem.startswith(parts[0]) and all(part in problem for part in parts), problem

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "denoiser_channels", "latent_channels", "message"),
        [
            ("DiTPipeline", 4, 3, "the VAE has 3, for which the transformer must take 3 channels, and it takes 4"),
            ("StableDiffusionPipeline", 9, 4, "the unet must take 4 channels, and it takes 9"),
            ("StableDiffusionInpaintPipeline", 9, 3, "take 3 or 7 channels, and it takes 9; .*latent_channels 4 or 9,"),
            ("StableDiffusionInpaintPipeline", 9, 9, "the VAE has 9, the old one 4; .*model.latent_channels 4$"),
            ("FluxImg2ImgPipeline", 16, 16, "take 64 channels, and it takes 16; .*model.latent_channels 4,"),
            ("FluxInpaintPipeline", 64, 4, "take 16 channels, and it takes 64; .*model.latent_channels 16,"),
        ],
    )
    def test_latent_channels(self, name, denoiser_channels, latent_channels, message, refused):
        (problem,) = refused(name, {"latent_channels": latent_channels}, denoiser_channels)
        assert problem.startswith("latent channels: ") and re.search(message, problem), problem

    @pytest.mark.parametrize(
        ("name", "config", "messages"),
        [
            ("FluxPipeline", {"shift_factor": 7.0}, ["shift_factor: the VAE has 7.0,"]),
            ("FluxPipeline", {"shift_factor": None}, ["shift_factor: the VAE has None,", "FluxPipeline subtracts it"]),
            ("DiTPipeline", {"scaling_factor": 7.0}, ["scaling_factor: the VAE has 7.0,"]),
            (
                "StableDiffusionXLPipeline",
                CHANNELWISE,
                [f"{key}: the VAE has {CHANNELWISE[key]}," for key in CHANNELWISE],
            ),
        ],
    )
    def test_scaling(self, name, config, messages, refused):
        problems = refused(name, config)
        assert len(problems) == len(messages)
        assert all(message in problem for message, problem in zip(messages, problems, strict=True)), problems

    def test_channelwise_scaling_of_the_old_one(self, refused):
        problems = refused("StableDiffusionXLPipeline", {}, old=CHANNELWISE)
        assert [problem.split(" if ")[0].split(": ")[1] for problem in problems] == [
            f"the VAE has None, the old one, with which the denoiser was trained, {values};"
            for values in CHANNELWISE.values()
        ]

    def test_channelwise_scaling_of_a_length_that_sdxl_does_not_take(self, vae, texts):
        pipeline = make("StableDiffusionXLPipeline", None, texts)
        vae.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
        with pytest.raises(ValueError, match="StableDiffusionXLPipeline takes them for 4 channels only"):
            swap_vae(pipeline, vae)
        assert pipeline.vae is None

    def test_other_classes(self, vae, texts):
        class Other(AutoencoderKL):
            pass

        pipeline = make("StableDiffusionPipeline", untrained(vae), texts)
        for wrong, reason in [
            (MLPVAE(image_size=(16, 16), in_channels=1), "got MLPVAE: its latents are not spatial"),
            (AutoencoderTiny(), "got AutoencoderTiny: stock pipelines read"),
            (Other.from_config(vae.config), "got Other: stock pipelines read"),
            (vae.decoder, "got Decoder: "),
        ]:
            with pytest.raises(TypeError, match=reason):
                swap_vae(pipeline, wrong)
        with pytest.raises(TypeError, match="takes a pipeline object of diffusers, got <class"):
            swap_vae(DiTPipeline, vae)
        unknown = diffusers.DDPMPipeline(unet(cross_attention_dim=8), DDIMScheduler())
        with pytest.raises(ValueError, match="cannot determine how DDPMPipeline scales latents; supported are "):
            swap_vae(unknown, vae)

    def test_offloading(self, vae, texts):
        """Weights that a hook moves about are not where the others are."""
        pipeline, other = (make("StableDiffusionPipeline", untrained(vae), texts) for _ in range(2))
        cpu_offload(pipeline.vae, torch.device("cpu"))
        with pytest.raises(ValueError, match="- offloading: the pipeline moves its components between devices"):
            swap_vae(pipeline, vae)
        with pytest.raises(ValueError, match="- offloading: the weights of the VAE are not in memory"):
            swap_vae(other, pipeline.vae)
        pipeline.remove_all_hooks()
        swap_vae(pipeline, vae)
