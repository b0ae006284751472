"""Put a trained autoencoder into a stock pipeline: `python examples/use_in_pipeline.py PIPELINE MODEL PROMPT`.

The pipeline's denoiser must know the latents of the model, for example because only its decoder was fine-tuned.
`swap_vae` raises an error that lists every mismatch.
"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_vae import VAE, swap_vae

source, model, prompt = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(source)
swap_vae(pipeline, VAE.from_pretrained(model))
picture = pipeline(prompt, num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0]
picture.save("picture.png")
