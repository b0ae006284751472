"""Train, measure and publish KL autoencoders that load in stock diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .latents.dataset import LatentDataset
    from .latents.encode import encode_images
    from .latents.statistics import measure_latents
    from .losses.objective import Bernoulli, Gaussian, Laplace, VAEObjective, kl_to_standard_normal
    from .models import MLPVAE, VAE
    from .pipelines import swap_vae

__version__ = "0.1.0"
__all__ = [
    "MLPVAE",
    "VAE",
    "Bernoulli",
    "Gaussian",
    "Laplace",
    "LatentDataset",
    "VAEObjective",
    "encode_images",
    "kl_to_standard_normal",
    "measure_latents",
    "swap_vae",
]

_MODULES = {
    "Bernoulli": "losses.objective",
    "Gaussian": "losses.objective",
    "Laplace": "losses.objective",
    "LatentDataset": "latents.dataset",
    "MLPVAE": "models",
    "VAE": "models",
    "VAEObjective": "losses.objective",
    "encode_images": "latents.encode",
    "kl_to_standard_normal": "losses.objective",
    "measure_latents": "latents.statistics",
    "swap_vae": "pipelines",
}


def __getattr__(name: str):
    """Public names when they are asked for, so that `diffusers-vae --help` need not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
