"""Each autoencoder of diffusers is measured, or refused with one sentence that says what to do."""

import json

import numpy as np
import pytest
import torch
from diffusers import models
from diffusers.models import autoencoders
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from diffusers_vae import cli, measure_latents
from diffusers_vae.models import ModelConfig, load_autoencoder

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
WIDTHS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
HALVED = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
SMALL = {
    "AutoencoderKL": {**BLOCKS, **WIDTHS},
    "AsymmetricAutoencoderKL": {**BLOCKS, **HALVED},
    "AutoencoderKLFlux2": {**BLOCKS, **WIDTHS, "latent_channels": 4},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16,
    },
    "AutoencoderKLKVAE": {
        "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2), "sample_size": 16,
    },
}  # fmt: skip
OTHERS = sorted(
    name
    for name, kind in vars(autoencoders).items()
    if isinstance(kind, type) and issubclass(kind, ModelMixin) and name not in SMALL
)


def write_config(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": name, "in_channels": 3, "out_channels": 3}))
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return str(tmp_path / "photos")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_supported_classes_are_measured(name, photos, tmp_path, monkeypatch, capsys):
    if not hasattr(models, name) and not hasattr(autoencoders, name):
        pytest.skip("not in this version of diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    getattr(autoencoders, name)(**SMALL[name]).save_pretrained("model")
    for command in (
        ["info", "model"],
        ["evaluate", "model", "--data", photos, "--out", "out"],
        ["encode", photos, "--vae", "model", "--out", "latents"],
        ["reconstruct", "model", photos, "--out", "back"],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    halves = 1 if name == "AsymmetricAutoencoderKL" else 2  # it has as many blocks, and none that halves, in one
    assert f"class           {name}" in out and "SHA-256" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["model"]["latent_shape"][1] in (
        8,
        16 // halves,
    )


def test_every_other_class_is_refused_by_one_sentence(tmp_path):
    assert {"AutoencoderKLWan", "AutoencoderKLTemporalDecoder", "VQModel", "AutoencoderDC", "AutoencoderTiny"} < {
        *OTHERS
    }
    for name in OTHERS:
        folder = write_config(tmp_path / "model", name)
        message = (
            f"must hold an autoencoder of images that this package supports, got the class {name}: give a model of "
        )
        with pytest.raises(
            ValueError, match=f"^{folder} {message}the class AutoencoderKL, .* or MLPVAE, and use {name} in"
        ):
            load_autoencoder(folder)
        with pytest.raises(ValueError, match=f"^model.pretrained: {folder} {message}the class AutoencoderKL, and use"):
            _ = ModelConfig(pretrained=folder, train="decoder").spatial_compression_ratio


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLTemporalDecoder", "AutoencoderTiny"])
def test_every_command_refuses_it_before_anything_else(name, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "model", name)
    for command in (
        ["info", "model"],
        ["evaluate", "model", "--data", photos],
        ["evaluate", "model"],
        ["compare", "model", "model", "--data", photos],
        ["fp16", "model", "--data", photos],
        ["encode", photos, "--vae", "model", "--out", "latents"],
        ["reconstruct", "model", photos],
        ["sample", "model"],
        [
            "train",
            "--model.pretrained",
            "model",
            "--data.name",
            "folder",
            "--data.root",
            photos,
            "--data.channels",
            "3",
        ],
        ["train-text-to-image", "--vae", "model"],
    ):
        try:
            assert cli.main(command) == 1
        except SystemExit as exit:
            assert exit.code == 2
        error = capsys.readouterr().err
        assert f"must hold an autoencoder of images that this package supports, got the class {name}: give" in error, (
            command
        )


def test_a_model_in_memory_is_refused_too():
    tiny = autoencoders.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(ValueError, match=r"^the model must be an autoencoder .* got the class AutoencoderTiny"):
        measure_latents(tiny, torch.zeros(1, 3, 16, 16))
