"""Train, measure and publish KL autoencoders that load in stock diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .latents.dataset import LatentDataset
    from .latents.encode import encode_images
    from .latents.statistics import measure_latents
    from .losses.objective import Bernoulli, Gaussian, Laplace, VAEObjective, kl_to_standard_normal
    from .models import MLPVAE, VAE
    from .models.fast import fast
    from .pipelines import swap_vae

__version__ = "0.1.0"
__all__ = [
    "MLPVAE", "VAE", "Bernoulli", "Gaussian", "Laplace", "LatentDataset", "VAEObjective", "encode_images", "fast",
    "kl_to_standard_normal", "measure_latents", "swap_vae",
]  # fmt: skip

_MODULES = {
    "latents.dataset": ["LatentDataset"],
    "latents.encode": ["encode_images"],
    "latents.statistics": ["measure_latents"],
    "losses.objective": ["Bernoulli", "Gaussian", "Laplace", "VAEObjective", "kl_to_standard_normal"],
    "models": ["MLPVAE", "VAE"],
    "models.fast": ["fast"],
    "pipelines": ["swap_vae"],
}


def __getattr__(name: str):
    """Import public names when they are used, so that `diffusers-vae --help` need not wait for torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
