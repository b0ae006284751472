"""Train a KL autoencoder: `accelerate launch training/train_vae.py [--config FILE.yaml] [--SECTION.KEY VALUE ...]`.

Without any, it trains on scikit-learn's digits, as training/configs/digits.yaml says. `--help` lists all settings. The
same command continues a run that was interrupted. Exit codes: 0 finished, 75 interrupted by a signal, 2 wrong settings,
1 any other error.
"""

import logging
import os
import sys

import torch.distributed

from diffusers_vae.config import parse_train_config
from diffusers_vae.trainer import Interrupted, RunResult, TrainConfig, dry_run, train

RESUME_ME = 75  # EX_TEMPFAIL in sysexits.h: "the user is invited to try again later"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config, dry = parse_train_config(sys.argv[1:])
    try:
        if dry:
            describe_dry_run(config)
        elif result := train(config):  # on the main process
            describe(result)
    except Interrupted as interruption:
        if os.environ.get("RANK", "0") == "0":
            print(interruption, file=sys.stderr)
        leave_group()
        sys.exit(RESUME_ME)
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    leave_group()


def leave_group() -> None:
    """Without it, a process that ends before the others may abort, since the group's threads still run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe_dry_run(config: TrainConfig) -> None:
    outcome = dry_run(config)
    if outcome is None:
        return
    result, same, seconds = outcome
    describe_size(result)
    print(f"resumed from a checkpoint: {'bit-identical' if same else 'NOT bit-identical, see run.deterministic'}")
    if seconds is not None:
        print(f"the training steps would take about {seconds / 60:,.1f} min ({result.images_per_second:,.0f} images/s)")
    print("dry run: every phase ran, nothing was kept")


def describe_size(result: RunResult) -> None:
    memory = "" if result.memory is None else f", at most {result.memory / 2**20:,.0f} MiB of memory"
    print(f"\n{result.parameters:,} parameters, latents {'x'.join(map(str, result.latent_shape))}{memory}")


def describe(result: RunResult) -> None:
    describe_size(result)
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
