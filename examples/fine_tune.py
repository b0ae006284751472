"""Fine-tune the decoder of a trained autoencoder: `python examples/fine_tune.py stabilityai/sd-vae-ft-mse photos/`.

The encoder does not change, so diffusion models for its latents keep working.
"""

import argparse

from diffusers_vae.data import DataConfig
from diffusers_vae.engine.config import OptimizerConfig, RunConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import train
from diffusers_vae.tasks.autoencoder_config import TrainConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("folder")
parser.add_argument("--resolution", type=int, default=256)
parser.add_argument("--max_images", type=int, default=10_000)
arguments = parser.parse_args()

config = TrainConfig(
    data=DataConfig(root=arguments.folder, resolution=arguments.resolution),
    model=ModelConfig(pretrained=arguments.model, train="decoder"),
    objective=ObjectiveConfig(),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_images=0),
    run=RunConfig(output_dir="runs/fine-tuned", epochs=1000, max_images=arguments.max_images),
)
mean, low, high = train(config).report.fine_tuning.differences["psnr"]
print(f"PSNR {mean:+.2f} dB, 95 % interval [{low:+.2f}, {high:+.2f}]")
