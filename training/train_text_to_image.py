# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-vae[train]"]
# ///
"""Train a text-to-image model: `accelerate launch training/train_text_to_image.py [--config FILE.yaml] [--vae MODEL]`.

Without either, it trains on scikit-learn's digits with the autoencoder in runs/digits, as
training/configs/digits-t2i.yaml describes. `--help` lists all settings. The same command continues a run that was
interrupted. Exit codes: 0 finished, 75 interrupted by a signal, 2 wrong settings, 1 any other error. `diffusers-vae
train-text-to-image` does the same in one process.
"""

import sys

from diffusers_vae import cli


def main() -> None:
    sys.exit(cli.main(["train-text-to-image", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
