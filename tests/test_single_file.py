"""Autoencoders in one file under the names of latent-diffusion, held against the stock model that they were."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import save_file
from support.models import original, same

from diffusers_vae import VAE
from diffusers_vae.models import ModelConfig, load_autoencoder

TINY = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 32, 64),
    "sample_size": 512,
}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
CONFIGS = {
    "sd": TINY,
    "16-channels": {**TINY, **NO_QUANT, "latent_channels": 16, "layers_per_block": 2},
    "grey": {**TINY, "in_channels": 1, "out_channels": 1, "mid_block_add_attention": False},
}


def make(config):
    torch.manual_seed(0)
    return AutoencoderKL(**config).eval()


def write(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 7}, path)
    return str(path)


def whole(state, prefix="first_stage_model.", **others):
    """A checkpoint of a whole diffusion model."""
    text = {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)}
    return {prefix + name: tensor for name, tensor in state.items()} | text | others


@torch.no_grad()
def assert_equal_to_stock(vae, stock):
    assert type(vae) is VAE and not vae.training
    images = torch.rand(2, stock.config.in_channels, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert same(vae.state_dict(), stock.state_dict())
    ours, theirs = (model.encode(images).latent_dist.parameters for model in (vae, stock))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(vae(images).sample, stock(images).sample)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_to_stock(config, suffix, tmp_path):
    stock = make(config)
    extras = {"loss.discriminator.main.0.weight": torch.zeros(3), "model_ema.decay": torch.zeros(())}
    file = tmp_path / f"vae{suffix}"
    path = write(file, original(stock) | extras)
    vae = load_autoencoder(path)
    assert {name: each for name, each in vae.config.items() if name[0] != "_"} == {
        name: each for name, each in stock.config.items() if name[0] != "_"
    }
    file.write_bytes(bytes(file.stat().st_size))  # what was loaded is no map of the file
    assert_equal_to_stock(vae, stock)
    vae.save_pretrained(tmp_path / "saved")
    saved, report = AutoencoderKL.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert_equal_to_stock(vae, saved)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_whole_checkpoint(suffix, prefix, tmp_path):
    stock = make(TINY)
    vae = load_autoencoder(write(tmp_path / f"sd{suffix}", whole(original(stock), prefix)))
    assert_equal_to_stock(vae, stock)


@pytest.mark.slow
def test_other_files(tmp_path):
    """The weights without "state_dict" around them, in the old format of torch, in half precision."""
    stock = make(TINY).half()
    torch.save(original(stock), tmp_path / "vae.pt", _use_new_zipfile_serialization=False)
    assert_equal_to_stock(load_autoencoder(str(tmp_path / "vae.pt")), stock.float())
    assert load_autoencoder(str(tmp_path / "vae.pt"), dtype=torch.bfloat16).dtype == torch.bfloat16


V1, V2, XL = (CHECKPOINT_KEY_NAMES[name] for name in ("v1", "v2", "xl_base"))
SD3, FLUX = CHECKPOINT_KEY_NAMES["sd3"][1], CHECKPOINT_KEY_NAMES["flux"][1]
POSITIONS = "model.diffusion_model.pos_embed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "others", "factor", "shift"),
    [
        ("sd", {V1: (2, 2)}, 0.18215, None),
        ("sd", {V2: (2, 1024)}, 0.18215, None),
        ("sd", {XL: (2,)}, 0.13025, None),
        ("16-channels", {SD3: (9216,), POSITIONS: (1, 36864, 1)}, 1.5305, 0.0609),
        ("16-channels", {FLUX: (2,)}, 0.3611, 0.1159),
    ],
    ids=["sd1", "sd2", "sdxl", "sd3", "flux"],
)
def test_scaling_factor_of_known_models(config, others, factor, shift, tmp_path, caplog):
    others = {name: torch.zeros(shape) for name, shape in others.items()}
    path = write(tmp_path / "a.safetensors", whole(original(make(CONFIGS[config])), **others))
    vae = load_autoencoder(path)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (factor, shift)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize(("config", "named"), [("sd", ["SDXL", "0.13025"]), ("16-channels", ["1.5305", "0.3611"])])
def test_unknown_scaling_factor_is_said(config, named, tmp_path, caplog):
    for state in (original(make(CONFIGS[config])), whole(original(make(CONFIGS[config])))):
        caplog.clear()
        vae = load_autoencoder(write(tmp_path / "vae.safetensors", state))
        assert vae.config.scaling_factor == 0.18215
        assert all(word in caplog.text for word in ["does not tell its scaling_factor", *named])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_single_file_is_trained_on(suffix, tmp_path):
    stock = make(TINY)
    config = ModelConfig(pretrained=write(tmp_path / f"vae{suffix}", original(stock)), train="decoder")
    with torch.device("meta"):
        meta = config.build(3, (16, 16))
    assert {each.device.type for each in meta.parameters()} == {"meta"}
    assert config.spatial_compression_ratio == 4 and config.latent_shape((16, 24)) == (4, 4, 6)
    model = config.build(3, (16, 16))
    assert model.decoder.training and not model.encoder.training
    assert_equal_to_stock(model.eval(), stock)
    with pytest.raises(ValueError, match="is a file, which has no subfolder or revision, got vae"):
        _ = ModelConfig(pretrained=config.pretrained, subfolder="vae").spatial_compression_ratio


class Callback:
    """Something other than a tensor, as Lightning's checkpoints hold."""


def without(state, *beginnings):
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


UNET = {f"model.diffusion_model.{name}": torch.zeros(2) for name in ("time_embed.0.weight", "out.0.weight")}
LORA = {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(2)}
NOT_A_VAE = {
    "unet": (lambda state: UNET, "it is a denoiser .* lacks encoder.conv_in.weight"),
    "lora": (lambda state: LORA, "it is a LoRA file"),
    "vq": (lambda state: state | {"quantize.embedding.weight": torch.zeros(8, 4)}, "it is a VQ-VAE"),
    "whole-vq": (lambda state: whole(state | {"quantize.embedding.weight": torch.zeros(8, 4)}), "it is a VQ-VAE"),
    "video": (
        lambda state: {name: each[:, :, None].clone() if each.ndim == 4 else each for name, each in state.items()},
        "autoencoder of video",
    ),
    "decoder-alone": (lambda state: without(state, "encoder"), "lacks encoder.conv_in.weight"),
    "incomplete": (lambda state: without(state, "decoder.mid"), r"Missing key\(s\).*decoder.mid_block"),
    "attention": (
        lambda state: state | {"encoder.down.2.attn.0.q.weight": torch.zeros(64, 64, 1, 1)},
        "attention at other resolutions .*encoder.down.2.attn.0.q.weight",
    ),
    "not-double": (
        lambda state: state | {"encoder.conv_out.weight": torch.zeros(4, 64, 3, 3)},
        "mean and a log-variance",
    ),
    "diffusers": (lambda state: make(TINY).state_dict(), "names are those of diffusers.*config.json"),
    "nothing": (lambda state: {}, "holds no tensors"),
    "other": (lambda state: {"layer.weight": torch.zeros(2)}, "lacks encoder.conv_in.weight.*begins with layer.weight"),
}


class TestRefused:
    @pytest.mark.parametrize(("change", "message"), NOT_A_VAE.values(), ids=NOT_A_VAE)
    def test_not_a_vae(self, change, message, tmp_path):
        path = write(tmp_path / "x.safetensors", change(original(make(TINY))))
        with pytest.raises(ValueError, match=rf"(?s)^{re.escape(path)} holds no KL autoencoder.*{message}"):
            load_autoencoder(path)

    def test_real_unet(self, tmp_path):
        unet = UNet2DConditionModel(
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=8,
        )
        with pytest.raises(ValueError, match="it is a denoiser"):
            load_autoencoder(write(tmp_path / "unet.safetensors", unet.state_dict()))

    def test_groups_that_do_not_fit(self, tmp_path):
        path = write(
            tmp_path / "x.ckpt", original(make({**TINY, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}))
        )
        with pytest.raises(ValueError, match="divisible by 32, got 8"):
            load_autoencoder(path)

    def test_pickles_of_more_than_tensors(self, tmp_path):
        torch.save({"state_dict": original(make(TINY)), "callbacks": Callback()}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=r"holds code, .*Callback, and is refused.*\.safetensors"):
            load_autoencoder(str(tmp_path / "x.ckpt"))

    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    def test_unreadable(self, suffix, tmp_path):
        path = tmp_path / f"x{suffix}"
        write(path, original(make(TINY)))
        data = path.read_bytes()
        for content in (b"", b"a text, and no weights\n" * 9, data[: len(data) // 2]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is no .* or was cut off"):
                load_autoencoder(str(path))

    def test_other_suffix(self, tmp_path):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ValueError, match=r"must be \.safetensors or \.ckpt.*a\.txt"):
            load_autoencoder(str(tmp_path / "a.txt"))
