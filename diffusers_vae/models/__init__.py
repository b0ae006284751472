"""The models. Each takes and gives images in [-1, 1] and has `encode`, `decode`, `forward` as `AutoencoderKL` has."""

from .config import ModelConfig
from .load import (
    LATENT_PARTS,
    cached_repository,
    decode,
    decode_logits,
    encode,
    find_repository,
    find_subfolder,
    is_local,
    load_autoencoder,
    no_such_path,
    read_config,
    weights_hash,
)
from .mlp import MLPVAE
from .scaling import LatentScaling, unmeasured
from .speed import fast_dtype, for_inference, several_at_once, speed_up_norms
from .vae import VAE, VAEOutput, check_batch, with_whole_tiles, without_adapters

__all__ = [
    "LATENT_PARTS",
    "MLPVAE",
    "VAE",
    "LatentScaling",
    "ModelConfig",
    "VAEOutput",
    "cached_repository",
    "check_batch",
    "decode",
    "decode_logits",
    "encode",
    "fast_dtype",
    "find_repository",
    "find_subfolder",
    "for_inference",
    "is_local",
    "load_autoencoder",
    "no_such_path",
    "read_config",
    "several_at_once",
    "speed_up_norms",
    "unmeasured",
    "weights_hash",
    "with_whole_tiles",
    "without_adapters",
]
