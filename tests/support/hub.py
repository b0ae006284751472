"""What a test of the Hub pushes: a run with random weights, and who pushes it."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.hub_server import HubServer

from diffusers_vae import MLPVAE, VAE
from diffusers_vae.evaluation.report import report_digest
from diffusers_vae.models import weights_hash

TOKEN = "hf_ThisTokenMustNeverShow"


READ_TOKEN = "hf_AnotherTokenWhichReads"


REPO = "ann/tiny-vae"


def write_report(run: Path, report: dict) -> None:
    """Write `report` as the evaluation.json of a run, with the digest of its figures."""
    (run / "evaluation.json").write_text(json.dumps(report | {"sha256": report_digest(report)}, indent=2) + "\n")


def make_run(path: Path, model: VAE | MLPVAE, resolution: tuple[int, int], config: dict) -> Path:
    """What a finished run leaves behind, with things besides that must not be published."""
    channels, latent_shape = 1, (2, 4, 4) if isinstance(model, VAE) else (2, 1, 1)
    model.save_pretrained(path / "model")
    weights = (path / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    report = {
        "format": 2, "images": 180, "loss": 61.5,
        "distortion": -812.25, "rate": 41.125, "elbo": 771.125, "bits_per_dim": -4.345,
        "density": "normal density with std 0.1 over pixels in [-1, 1]", "psnr": 30.875, "ssim": 0.9875,
        "lpips_alex": None, "lpips_vgg": 0.0625, "lpips_squeeze": None, "rfid": None, "importance_weighted_bound": None,
        "intervals": {"psnr": [30.5, 31.25], "ssim": [0.985, 0.99], "rate": [40.0, 42.5]},
        "latents": {"mean": [0.1, -0.2], "std": [0.5, 0.25], "scaling_factor": 2.5, "shift_factor": -0.05},
        "posterior": {
            "units": 32, "active_units": 30, "empty_share": 0.0625, "unused_channels": [],
            "rate_per_channel": [30.0, 11.125], "information_per_channel": [28.0, 10.5],
            "swaps": {"images": 64, "all": 12.5, "colour": None, "channels": [7.25, 0.5]},
            "rate_per_position": [[2.5] * 4] * 4, "aggregate_distance": 0.75, "verdict": "healthy",
            "advice": "Nothing needs to change.",
        },
        "model": {
            "name": "tiny", "class_name": "AutoencoderKL" if isinstance(model, VAE) else "MLPVAE",
            "parameters": model.num_parameters(), "latent_shape": latent_shape,
            "scaling_factor": model.config.scaling_factor, "shift_factor": model.config.shift_factor,
            "weights_sha256": weights_hash(model),
        },
        "protocol": {
            "data": config["data"]["name"], "split": "held-out", "images": 180, "fingerprint": "0123abcd",
            "resolution": resolution, "channels": channels, "resize": "scaled to cover, then the centre is cut out",
            "value_range": "[-1, 1]", "round_to_8_bit": False, "reconstruction": "mode", "draws": 1, "seed": 0,
            "dtype": "float32", "device": "cpu", "networks": {"vgg": "4567cdef"},
            "versions": {"diffusers_vae": "0.1.0", "torch": "2.7.1"},
        },
        "kl_weight": 0.5, "scale": 0.1, "fine_tuning": None, "fp16": None,
    }  # fmt: skip
    write_report(path, report)
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    (path / "tensorboard").mkdir()
    (path / "tensorboard" / "events.out.tfevents.1").write_bytes(b"\0log")
    (path / "checkpoints" / "images-000000001000").mkdir(parents=True)
    (path / "checkpoints" / "images-000000001000" / "model.safetensors").write_bytes(weights)
    (path / "checkpoints" / "images-000000001000" / "discriminator.safetensors").write_bytes(b"\0")
    (path / "pictures").mkdir()
    for seed, name in enumerate(("reconstructions", "loss")):
        noise = np.random.default_rng(seed).integers(0, 255, (40, 60), np.uint8)
        Image.fromarray(noise).save(path / "pictures" / f"{name}.png")
    (path / "pictures" / "reconstructions.svg").write_text("<svg/>")
    (path / "model" / "notes.txt").write_text("mine")
    return path


CONFIG = {
    "data": {"name": "digits", "root": "/home/ann/secret-place", "resolution": 8, "channels": 1, "fit": "crop"},
    "model": {"architecture": "vae", "latent_channels": 2, "block_out_channels": [8, 8], "hidden_dim": None},
    "objective": {"likelihood": "gaussian", "scale": 0.1, "kl_weight": 1.0},
    "optimizer": {"learning_rate": 0.002, "schedule": "cosine"},
    "run": {"output_dir": "runs/tiny", "epochs": 15, "batch_size": 32, "mixed_precision": "no"},
    "evaluation": {"max_images": None},
}


def uploaded(hub: HubServer, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """What is in a repository besides the file that it is created with."""
    files = hub.files(repo, revision)
    del files[".gitattributes"]
    return files


def connect(patch: pytest.MonkeyPatch, url: str | None, cache: Path) -> None:
    """Let `datasets` and the Hub's client in this process talk to the server at `url`, to none but that, without a
    token, and keep what they load in the folder `cache`.
    """
    from huggingface_hub import HfFileSystem

    patch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    patch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
    patch.setattr("datasets.config.USE_PARQUET_EXPORT", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
    HfFileSystem.clear_instance_cache()  # which knows the server of a test before
    if url is not None:
        patch.setattr("datasets.config.HF_ENDPOINT", url)
        patch.setattr("huggingface_hub.constants.ENDPOINT", url)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in ("constants", "file_download"):  # of older versions, the latter
            patch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
