"""The models. Each takes and gives images in [-1, 1] and has `encode`, `decode`, `forward` as `AutoencoderKL` has."""

from .config import ModelConfig
from .load import load_autoencoder, weights_hash
from .mlp import MLPVAE
from .vae import VAE, VAEOutput, posterior_from_moments

__all__ = ["MLPVAE", "VAE", "ModelConfig", "VAEOutput", "load_autoencoder", "posterior_from_moments", "weights_hash"]
