"""Autoencoders in one file under the names of latent-diffusion, held against the stock model that they were."""

import json
import pickle
import re
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import save_file
from support.models import original, same

from diffusers_vae import VAE, cli
from diffusers_vae.models import LatentScaling, ModelConfig, load_autoencoder, unmeasured
from diffusers_vae.pipelines import latent_scaling

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
    known = {name: each for name, each in stock.config.items() if name[0] != "_"} | {"scaling_factor": None}
    assert {name: each for name, each in vae.config.items() if name[0] != "_"} == known
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


class Callback:
    """Something other than a tensor, as Lightning's checkpoints hold."""


class Hyperparameters(dict):
    """As Lightning's AttributeDict."""


def lightning(state):
    """A checkpoint of PyTorch Lightning, as CompVis and Runway published theirs."""
    return {
        "epoch": 3,
        "pytorch-lightning_version": "1.7.7",
        "state_dict": state,
        "callbacks": {Callback: {"best_model_score": np.float64(0.5), "best_model_path": Path("a.ckpt")}},
        "optimizer_states": [{"state": defaultdict(dict, {0: {"exp_avg": torch.zeros(2)}})}],
        "hyper_parameters": Hyperparameters(lr=1e-4, args=Namespace(seed=deque([np.arange(3)], maxlen=2))),
    }


class TestContainers:
    """Where people keep an autoencoder's weights in a file."""

    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_lightning(self, legacy, tmp_path, caplog):
        stock = make(TINY)
        content = lightning(whole(original(stock), **{V1: torch.zeros(2, 2)}))
        torch.save(content, tmp_path / "sd-v1-4.ckpt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "sd-v1-4.ckpt", weights_only=True)
        vae = load_autoencoder(str(tmp_path / "sd-v1-4.ckpt"))
        assert same(vae.state_dict(), stock.state_dict()) and vae.config.scaling_factor == 0.18215
        assert not caplog.records

    @pytest.mark.parametrize(
        "nest",
        [
            lambda state: {"model": state},
            lambda state: {"ema": state, "step": 3},
            lambda state: {"model_ema": state},
            lambda state: {"model": {"state_dict": state}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
            lambda state: {"state_dict": {"model": state}},
            lambda state: {"module": OrderedDict(state)},
            lambda state: {f"module._orig_mod.{name}": each for name, each in state.items()},
            lambda state: {"trainer": {"vae": whole(state)}},
            lambda state: {
                part: {name.partition(".")[2]: each for name, each in state.items() if name.startswith(f"{part}.")}
                for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")
            },
        ],
    )
    def test_nested(self, nest, tmp_path):
        stock = make(TINY)
        torch.save(nest(original(stock)), tmp_path / "a.pth")
        assert same(load_autoencoder(str(tmp_path / "a.pth")).state_dict(), stock.state_dict())

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_averaged_weights_are_taken_and_said(self, suffix, tmp_path, caplog):
        stock = make(TINY)
        state = {
            f"{start}{name}": each + change
            for start, change in (("model.", 1), ("model_ema.", 0))
            for name, each in original(stock).items()
        }
        vae = load_autoencoder(write(tmp_path / f"a{suffix}", state))
        assert same(vae.state_dict(), stock.state_dict())
        assert "several autoencoders: using model_ema.encoder.*, not model.encoder.*" in caplog.text

    @pytest.mark.parametrize("suffix", [".sft", ".SAFETENSORS", ".Sft", ".CKPT", ".Pth", ".BIN"])
    def test_suffixes(self, suffix, tmp_path):
        stock = make(TINY)
        if suffix.lower() in (".sft", ".safetensors"):
            save_file(original(stock), tmp_path / f"a{suffix}")
        else:
            torch.save(original(stock), tmp_path / f"a{suffix}")
        assert same(load_autoencoder(str(tmp_path / f"a{suffix}")).state_dict(), stock.state_dict())


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
def test_unknown_scaling_factor_is_null_and_said(config, named, tmp_path, caplog):
    for state in (original(make(CONFIGS[config])), whole(original(make(CONFIGS[config])))):
        caplog.clear()
        vae = load_autoencoder(write(tmp_path / "vae.safetensors", state))
        assert vae.config.scaling_factor is vae.config.shift_factor is None
        assert all(word in caplog.text for word in ["not state the scaling_factor", f"{tmp_path}/vae.json", *named])
        with pytest.raises(ValueError, match=r"got None: call diffusers_vae\.measure_latents"):
            latent_scaling("StableDiffusionPipeline", vae)
    vae.save_pretrained(tmp_path / "saved")
    assert unmeasured(load_autoencoder(str(tmp_path / "saved")).config)


def scaling(path):
    config = ModelConfig(pretrained=path, train="decoder")
    with torch.device("meta"):  # as a run resolves it
        vae = config.build(3, (16, 16))
    return tuple(vae.config[name] for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"))


class TestStatedScaling:
    """What a file, or NAME.json beside it, says of latents is what the config says."""

    @pytest.mark.parametrize(
        ("config", "architecture", "expected"),
        [
            ("sd", "stable-diffusion-v1", (0.18215, None)),
            ("sd", "stable-diffusion-v2-768-v/vae", (0.18215, None)),
            ("sd", "stable-diffusion-xl-v1-base/vae", (0.13025, None)),
            ("16-channels", "stable-diffusion-3.5-large", (1.5305, 0.0609)),
            ("16-channels", "stable-diffusion-v3-medium", (1.5305, 0.0609)),
            ("16-channels", "Flux.1-AE", (0.3611, 0.1159)),
            ("16-channels", "flux-1-dev", (0.3611, 0.1159)),
            ("16-channels", "Flux.2-AE", (None, None)),
            ("sd", "Flux.1-AE", (None, None)),
            ("16-channels", "stable-diffusion-xl-v1-base", (None, None)),
            ("sd", "stable-diffusion-v10", (None, None)),
            ("sd", "", (None, None)),
        ],
    )
    def test_by_metadata(self, config, architecture, expected, tmp_path):
        metadata = {"format": "pt", "modelspec.architecture": architecture}
        save_file(original(make(CONFIGS[config])), tmp_path / "a.safetensors", metadata)
        assert scaling(str(tmp_path / "a.safetensors")) == (*expected, None, None)

    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    def test_by_the_buffer_of_latent_diffusion(self, suffix, tmp_path):
        """`scale_by_std` of latent-diffusion measures it on the first batch."""
        state = whole(original(make(TINY)), **{V1: torch.zeros(2, 2)})
        path = write(tmp_path / f"a{suffix}", state | {"scale_factor": torch.tensor(0.625)})
        assert scaling(path) == (0.625, None, None, None)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"scale_factor": torch.tensor(1j)},
            {"scale_factor": torch.tensor(True)},
            {"scale_factor": torch.empty((), device="meta")},
            {V1: torch.tensor(1.0), "joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.tensor(1.0)},
            {"decoder.stages.1.op_list.0.main.conv.conv.bias": torch.zeros(2)},
        ],
    )
    def test_tensors_under_names_of_others_state_nothing(self, tensors, tmp_path):
        assert scaling(write(tmp_path / "a.ckpt", original(make(TINY)) | tensors)) == (None,) * 4

    def test_beside_the_file(self, tmp_path):
        metadata = {"modelspec.architecture": "stable-diffusion-v1"}
        save_file(original(make(TINY)), tmp_path / "a.safetensors", metadata)
        stated = {"scaling_factor": 0.13025, "latents_mean": [1.0, 2, 3, 4], "latents_std": [1, 1, 1, 2]}
        (tmp_path / "a.json").write_text(json.dumps(stated | {"_class_name": "AutoencoderKL", "latent_channels": 4}))
        assert scaling(str(tmp_path / "a.safetensors")) == (0.13025, None, [1.0, 2, 3, 4], [1, 1, 1, 2])
        vae = load_autoencoder(str(tmp_path / "a.safetensors"))
        assert LatentScaling.from_config(vae.config).factor == 0.13025
        (tmp_path / "a.json").write_text(json.dumps({"description": "of the web UI", "sd version": "SD1"}))
        assert scaling(str(tmp_path / "a.safetensors"))[0] == 0.18215

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"scaling_factor": "0.13"}', "scaling_factor must be of the type number, got '0.13'"),
            ('{"scaling_factor": 0}', "scaling_factor must be a number other than 0"),
            ('{"latents_mean": 1}', "latents_mean must be of the type array, got 1"),
            ("[0.13025]", "must be of the type object"),
            ("{", "is damaged"),
            (
                '{"scaling_factor": 1, "latent_channels": 16}',
                "describe the model in a.ckpt, whose latent_channels is 4",
            ),
            (
                '{"scaling_factor": 1, "block_out_channels": [128]}',
                r"block_out_channels is \[32, 32, 64\], got",
            ),
        ],
    )
    def test_wrong_values_are_named(self, text, message, tmp_path):
        path = write(tmp_path / "a.ckpt", original(make(TINY)))
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path / 'a.json'}\W.*{message}"):
            load_autoencoder(path)

    def test_info_says_what_is_not_known(self, tmp_path, capsys):
        path = write(tmp_path / "a.ckpt", original(make(TINY)))
        assert cli.main(["info", path]) == 0
        out = capsys.readouterr().out
        assert "scaled latents  unknown: scaling_factor None was not measured or published" in out
        line = re.search(r"^load it  +(.*)$", out, re.M)[1]
        names = {}
        exec(line, names)
        assert type(names["vae"]) is VAE
        (tmp_path / "a.json").write_text('{"scaling_factor": 0.5, "shift_factor": 0.1}')
        assert cli.main(["info", path]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^scaled latents  \(latents -0.1\) \* 0.5$", out, re.M)
        assert re.search(r"^in pipelines of +Stable Diffusion, SDXL, DiT: latents \* 0.5$", out, re.M)


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
    with pytest.raises(ValueError, match="is a file, so it can have no subfolder or revision, got vae"):
        _ = ModelConfig(pretrained=config.pretrained, subfolder="vae").spatial_compression_ratio


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
    "nothing": (lambda state: {}, "holds no named tensors"),
    "flux-2": (
        lambda state: state | {"bn.running_mean": torch.zeros(16)},
        "it is an autoencoder of FLUX.2, .*KLFlux2",
    ),
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

    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    def test_unreadable(self, suffix, tmp_path):
        path = tmp_path / f"x{suffix}"
        write(path, original(make(TINY)))
        data = path.read_bytes()
        for content in (b"", b"a text, and no weights\n" * 9, data[: len(data) // 2]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is not a .* or is truncated"):
                load_autoencoder(str(path))

    def test_code_in_the_place_of_weights(self, tmp_path):
        torch.save({"state_dict": original(make(TINY)) | {"encoder.conv_in.weight": print}}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=r"x.ckpt holds no KL autoencoder .*it lacks encoder\.conv_in"):
            load_autoencoder(str(tmp_path / "x.ckpt"))

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("encoder.conv_in.weight", torch.zeros(3), r"conv_in.weight must have 4 dimensions, got the shape \(3,\)"),
            ("decoder.conv_in.weight", torch.zeros(()), r"conv_in.weight must have 4 dimensions, got the shape \(\)"),
            ("encoder.conv_out.weight", torch.zeros(()), "must have 4 dimensions"),
            ("quant_conv.weight", torch.zeros(8, 8, 1, 1, dtype=torch.int8), "got values of the type torch.int8"),
            ("quant_conv.weight", torch.zeros(8, 8, 1, 1, dtype=torch.complex64), "of the type torch.complex64"),
            ("quant_conv.weight", torch.empty(8, 8, 1, 1, device="meta"), "must hold floating-point values, got no"),
        ],
    )
    def test_weights_that_no_layer_has(self, name, tensor, message, tmp_path):
        path = write(tmp_path / "x.ckpt", original(make(TINY)) | {name: tensor})
        with pytest.raises(ValueError, match=rf"^{re.escape(path)} holds no KL autoencoder .*: .*{message}"):
            load_autoencoder(path)

    def test_other_suffix(self, tmp_path):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ValueError, match=r"must be \.safetensors, \.sft, \.ckpt.*a\.txt"):
            load_autoencoder(str(tmp_path / "a.txt"))
