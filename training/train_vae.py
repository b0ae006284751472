"""Train a KL autoencoder: `accelerate launch training/train_vae.py [--config FILE.yaml] [--SECTION.KEY VALUE ...]`.

Without any, it trains on scikit-learn's digits, as training/configs/digits.yaml says. `--help` lists all settings.
"""

import logging
import sys

from diffusers_vae.config import parse_train_config
from diffusers_vae.trainer import dry_run, train


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config, dry = parse_train_config(sys.argv[1:])
    try:
        result = dry_run(config) if dry else train(config)
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if result is None:  # not the main process
        return
    print(
        f"\n{result.parameters:,} parameters, latents {'x'.join(map(str, result.latent_shape))}, "
        f"{result.memory / 2**20:,.0f} MiB of memory"
    )
    if dry:
        print("dry run: every phase ran, nothing was kept")
        return
    report = result.report
    print(
        f"{report.images} held-out images: PSNR {report.psnr:.2f} dB, SSIM {report.ssim:.4f}, "
        f"loss {report.loss:.3f} (without the distortion's constant), distortion {report.distortion:.2f}, "
        f"rate {report.rate:.2f}, ELBO {report.elbo:.2f} nats, {report.bits_per_dim:.3f} bits/dim ({report.density})"
    )
    print(f"pictures    {result.output_dir / 'pictures'}")
    print(f"evaluation  {result.output_dir / 'evaluation.json'}")
    print(f"model       {result.output_dir / 'model'}")
    print(f"load it     {result.load_line}")


if __name__ == "__main__":
    main()
