"""Train an autoencoder in your own loop: `python examples/own_loop.py`."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from diffusers_vae import VAE, Gaussian, VAEObjective, measure_latents

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--images", type=int, default=1797)
arguments = parser.parse_args()
pixels = torch.tensor(load_digits().images[: arguments.images]).float()[:, None]  # (N, 1, 8, 8) in [0, 16]
images = interpolate(pixels, size=32) / 8 - 1  # (N, 1, 32, 32) in [-1, 1]
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
vae = VAE(in_channels=1, out_channels=1, block_out_channels=(16, 32, 64), norm_num_groups=8, **blocks)
objective = VAEObjective(Gaussian(0.05), kl_weight=1.0)
optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
for _ in range(arguments.steps):
    batch = images[torch.randint(len(images), (32,))]
    terms = objective(batch, *vae(batch, sample_posterior=True, return_dict=False, return_posterior=True))
    optimizer.zero_grad()
    terms.loss.backward()
    optimizer.step()
print(f"distortion {terms.distortion.mean():.1f}, rate {terms.rate.mean():.1f} nats per image")
measure_latents(vae, images)
vae.save_pretrained("my-vae")  # AutoencoderKL.from_pretrained("my-vae") loads it
