# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-vae[train]"]
# ///
"""Train a KL autoencoder: `accelerate launch training/train_vae.py [DATA] [--preset NAME] [--SECTION.KEY VALUE ...]`.

Without any, it trains on scikit-learn's digits, as in training/configs/digits.yaml. `--help` lists all settings. The
same command continues a run that was interrupted. Exit codes: 0 finished, 75 interrupted by a signal, 2 wrong settings,
1 any other error. `diffusers-vae train` does the same in one process.
"""

import sys

from diffusers_vae import cli


def main() -> None:
    sys.exit(cli.main(["train", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
