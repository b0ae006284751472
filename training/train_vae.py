"""Train a KL autoencoder: `accelerate launch training/train_vae.py [--config FILE.yaml] [--SECTION.KEY VALUE ...]`.

Without `--config`, the settings are those of training/configs/digits.yaml. `--help` lists them all.
"""

import logging
import sys
from pathlib import Path

from diffusers_vae.config import parse_train_config
from diffusers_vae.trainer import dry_run, train

DEFAULT = Path(__file__).parent / "configs" / "digits.yaml"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", str(DEFAULT), *arguments]
    config, dry = parse_train_config(arguments)
    result = dry_run(config) if dry else train(config)
    if result is None:  # not the main process
        return
    report = result.report
    print(
        f"\n{report.images} held-out images: PSNR {report.psnr:.2f} dB, SSIM {report.ssim:.4f}, "
        f"loss {report.loss:.3f}, distortion {report.distortion:.2f}, rate {report.rate:.2f}, "
        f"ELBO {report.elbo:.2f} nats, {report.bits_per_dim:.3f} bits/dim ({report.density})"
    )
    print(
        f"{result.parameters:,} parameters, latents {'x'.join(map(str, result.latent_shape))}, "
        f"{result.memory / 2**20:,.0f} MiB of memory"
    )
    if dry:
        print("dry run: every phase ran, nothing was kept")
        return
    print(f"pictures    {result.output_dir / 'pictures'}")
    print(f"evaluation  {result.output_dir / 'evaluation.json'}")
    print(f"model       {result.output_dir / 'model'}")
    print(f"load it     {result.load_line}")


if __name__ == "__main__":
    main()
