"""Train, measure and publish KL autoencoders that load in stock diffusers."""

from .models import MLPVAE, VAE
from .objective import VAEObjective, kl_to_standard_normal

__version__ = "0.1.0"
__all__ = ["MLPVAE", "VAE", "VAEObjective", "kl_to_standard_normal"]
