"""Any KL autoencoder of diffusers, ours or stock: loaded, called, and told from others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import diffusers
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin

from .mlp import MLPVAE
from .vae import VAE, posterior_from_moments


def load_autoencoder(
    source: str, subfolder: str | None = None, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> ModelMixin:
    """The KL autoencoder in `source`, in eval mode and without gradients: ours, or any of diffusers with
    `encode(...).latent_dist` and `decode(...).sample`.

    Args:
        source: a model's folder, a run's (its model/ is taken), a pipeline's (its vae/ is taken), or a repository on
            the Hub.
        subfolder: where in `source` the model lies.
        revision: of the repository.
        dtype: of the weights.

    Raises:
        OSError: when there is no model.
        ValueError: when it is no KL autoencoder of images.
    """
    folder = Path(source)
    if subfolder is None and not (folder / "config.json").exists():
        subfolder = next((name for name in ("model", "vae") if (folder / name / "config.json").exists()), None)
    if folder.is_dir() and not (folder / (subfolder or "") / "config.json").exists():
        raise FileNotFoundError(
            f"{folder.resolve()} holds no model: neither config.json nor model/config.json (of a run) nor "
            "vae/config.json (of a pipeline) is there"
        )
    try:
        config = MLPVAE.load_config(source, subfolder=subfolder, revision=revision)
    except OSError as error:
        hint = "" if subfolder or folder.is_dir() else " (the autoencoder of a pipeline lies in its subfolder vae)"
        raise OSError(f"cannot load a model from {source}{hint}: {error}") from error
    name = config.get("_class_name")
    kind = {"MLPVAE": MLPVAE, "AutoencoderKL": VAE}.get(name) or getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin) and hasattr(kind, "encode")):
        raise ValueError(f"{source} must hold an autoencoder of diffusers or of this package, got the class {name}")
    return (
        kind.from_pretrained(source, subfolder=subfolder, revision=revision, torch_dtype=dtype)
        .eval()
        .requires_grad_(False)
    )


def encode(model: ModelMixin, images: torch.Tensor) -> DiagonalGaussianDistribution:
    """The posterior, in float32, of images (B, C, H, W) in [-1, 1] under any autoencoder of diffusers.

    Raises:
        ValueError: when the model has none, or takes images of other channels.
    """
    channels = getattr(model.config, "in_channels", images.shape[1])
    if channels != images.shape[1]:
        raise ValueError(
            f"the model takes images of {channels} channels, got {images.shape[1]}; data.channels says how images are "
            "read"
        )
    encoded = model.encode(images.to(model.dtype))
    if not hasattr(encoded, "latent_dist"):
        raise ValueError(f"a KL autoencoder has encode(...).latent_dist, which {type(model).__name__} has not")
    return posterior_from_moments(encoded.latent_dist.parameters)


def decode(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Reconstructions in float32 of latents of any floating dtype."""
    return model.decode(latents.to(model.dtype)).sample.float()


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights with their names, shapes and dtypes, the same however they were saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
