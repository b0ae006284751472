"""Models. Each takes and returns images in [-1, 1] and has `encode`, `decode` and `forward` like `AutoencoderKL`."""

from .config import ModelConfig
from .load import (
    LATENT_PARTS,
    Source,
    cached_repository,
    decode,
    decode_logits,
    encode,
    is_local,
    load_autoencoder,
    no_such_path,
    weights_hash,
)
from .mlp import MLPVAE
from .posterior import VAEOutput, check_batch
from .scaling import LatentScaling, compression_ratio, unmeasured
from .speed import fast_dtype, for_inference, several_at_once, speed_up_norms
from .vae import VAE, with_whole_tiles, without_adapters

__all__ = [
    "LATENT_PARTS", "MLPVAE", "VAE", "LatentScaling", "ModelConfig", "Source", "VAEOutput", "cached_repository",
    "check_batch", "compression_ratio", "decode", "decode_logits", "encode", "fast_dtype", "for_inference",
    "is_local", "load_autoencoder", "no_such_path", "several_at_once", "speed_up_norms", "unmeasured",
    "weights_hash", "with_whole_tiles", "without_adapters",
]  # fmt: skip
