"""A run with everything in its objective that there is, for tests of what must hold of any run."""

import dataclasses
from pathlib import Path

import torch
from torchvision.models import squeezenet1_1

from diffusers_vae.adversarial import AdversarialConfig
from diffusers_vae.objective import ObjectiveConfig


def random_network(folder: Path) -> Path:
    """A folder with a network for LPIPS whose weights are random: there is no other without a download."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_1().state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    return folder


def whole(config, weights: Path):
    """`config` with a discriminator that joins after a while, LPIPS and a learned scale, on images large enough."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, resolution=24),
        objective=ObjectiveConfig(
            scale="learned",
            kl_schedule="cosine",
            kl_warmup_images=400,
            free_bits=3.0,
            perceptual="squeeze",
            perceptual_weight=0.1,
            perceptual_weights=str(weights),
        ),
        adversarial=AdversarialConfig(
            weight=0.1, start_images=40, warmup_images=300, width=8, layers=2, lecam_weight=0.1, r1_weight=0.01
        ),
    )
