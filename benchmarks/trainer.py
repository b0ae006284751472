"""Training by `accelerate launch` against a bare PyTorch loop with the same levers, and against the plain loop of
stock_loop.py: images/s in turn, on the same images, with the same model and batch. README.md says what is compared.

    python benchmarks/trainer.py --root data/bsds500 --out trainer.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from side_by_side import LAUNCH, follow, speed, write
from tqdm import tqdm

from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.models import ModelConfig, fast_dtype, speed_up_norms

HERE = Path(__file__).parent
MODEL = {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 1, "norm_num_groups": 32}
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="Folder of photographs, in train/ and val/.")
    parser.add_argument("--images", type=int, default=1920, help="Trained on in a round.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file for all figures.")
    parser.add_argument("--bare", action="store_true", help="Run the bare loop alone.")
    arguments = parser.parse_args()
    if arguments.bare:
        return bare(arguments)
    data = ["--data.name", "folder", "--data.root", arguments.root, "--data.channels", "3"]
    data += ["--data.resolution", "64", "--data.crops", "16"]
    model = [text for name, value in MODEL.items() for text in (f"--model.{name}", str(value))]
    speeds: dict[str, list[float]] = {"stock": [], "bare": [], "ours": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            stock = [sys.executable, str(HERE / "stock_loop.py"), *data, "--max_images", str(arguments.images)]
            stock += ["--batch_size", str(BATCH), "--out", f"{folder}/stock"]
            stock += [text.replace("--model.", "--", 1) for text in model]
            ours = [*LAUNCH, str(HERE.parent / "training" / "train_vae.py"), *data, *model]
            ours += ["--run.max_images", str(arguments.images), "--run.batch_size", str(BATCH)]
            ours += ["--run.output_dir", f"{folder}/run", "--run.tracker", "null", "--evaluation.max_images", "32"]
            commands = {"stock": stock, "bare": [sys.executable, *sys.argv, "--bare"], "ours": ours}
            for name, command in commands.items():
                marks, _ = follow(command, arguments.images)
                speeds[name].append(speed(marks))
        print("  ".join(f"{name} {values[-1]:.1f} img/s" for name, values in speeds.items()), flush=True)
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True))
        for name in ("stock", "bare")
    }
    print(f"ours is {ratios['stock']:.2f} times the plain loop, and {ratios['bare']:.3f} times the bare loop")
    if arguments.out:
        write(arguments.out, {"images_per_second": speeds, "ratios": ratios})


def bare(arguments: argparse.Namespace) -> None:
    """The steps of our run and nothing else: no checks, no checkpoint, no log."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    config = DataConfig("folder", arguments.root, resolution=64, channels=3, crops=16)
    pixels = load_data(config)[0].pixels.to(device)
    model = speed_up_norms(ModelConfig(architecture="vae", **MODEL).build(3, config.size)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0, fused=True)
    ema = EMAModel(model.parameters(), decay=0.99, use_ema_warmup=True, inv_gamma=20, power=1, foreach=True)
    dtype, parameters = fast_dtype(device), list(model.parameters())
    with tqdm(total=arguments.images, unit="img") as bar:
        while bar.n < arguments.images:
            for indices in torch.randperm(len(pixels)).split(BATCH):
                images = to_model_range(pixels.index_select(0, indices.to(device)))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    reconstructions, posterior = model(
                        images, sample_posterior=True, return_dict=False, return_posterior=True
                    )
                error = ((images - reconstructions.float()) ** 2).flatten(1).sum(1) / (2 * 0.1**2)
                (error + posterior.kl()).mean().backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.step(parameters)
                bar.update(len(indices))
                if bar.n >= arguments.images:
                    break


if __name__ == "__main__":
    main()
