"""Train an autoencoder on a folder of images: `python examples/train_on_a_folder.py photos/`.

`diffusers-vae train --data photos/ --data.resolution 64` does the same. The same command continues an interrupted run.
"""

import argparse

from diffusers_vae.data import DataConfig
from diffusers_vae.engine.config import RunConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import train
from diffusers_vae.tasks.autoencoder_config import TrainConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--output_dir", default="runs/photos")
parser.add_argument("--resolution", type=int, default=64)
parser.add_argument("--max_images", type=int, default=40_000)
arguments = parser.parse_args()

config = TrainConfig(
    data=DataConfig(root=arguments.folder, resolution=arguments.resolution),
    model=ModelConfig(block_out_channels=(32, 64, 64)),  # latents a quarter as high and wide
    objective=ObjectiveConfig(),
    run=RunConfig(output_dir=arguments.output_dir, epochs=1000, max_images=arguments.max_images),
)
result = train(config)
print(f"PSNR {result.report.psnr:.1f} dB. {result.load_line}")
