"""Images per second of `encode_images` and of the loop that one writes around stock `AutoencoderKL.encode`, from image
files to files of latents, in turns. README.md beside this file says what is compared.

    python benchmarks/latent_cache.py --data.name mnist --data.root data --data.fit pad --vae runs/mnist-vae/model
    python benchmarks/latent_cache.py --data.name folder --data.root photos --data.channels 3 --data.resolution 256
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import diffusers
import torch
from diffusers import AutoencoderKL
from jsonargparse import ArgumentParser, Namespace
from safetensors.torch import save_file
from side_by_side import stock_vae
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from diffusers_vae import VAE, LatentDataset, encode_images
from diffusers_vae.data import DataConfig, load_split


def read_settings(arguments: Sequence[str] | None) -> tuple[Namespace, DataConfig]:
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--vae", help="Folder of a stock AutoencoderKL; by default one with random weights.")
    parser.add_argument("--block_out_channels", type=list[int], default=[64, 128, 256, 256], help="Of the random one.")
    parser.add_argument("--max_images", type=int, help="By default all training images.")
    parser.add_argument("--batch_size", type=int, default=32, help="Of the plain loop; ours chooses.")
    parser.add_argument("--num_workers", type=int, default=0, help="Of the plain loop's DataLoader.")
    parser.add_argument("--compute_dtype", type=Literal["float32", "bfloat16", "float16"] | None, help="Of ours.")
    parser.add_argument("--shard_images", type=int, default=4096, help="Of ours.")
    parser.add_argument("--rounds", type=int, default=5, help="The first is not counted.")
    parser.add_argument("--processes", type=int, help="Compare ours in so many with one, each on cores of its own.")
    parser.add_argument("--worker", type=int, help="(How many there are: for the script itself.)")
    parser.add_argument("--out", help="JSON file for all timings.")
    settings = parser.parse_args(arguments)
    return settings, parser.instantiate(settings).data


def load_vae(settings: Namespace, data: DataConfig) -> AutoencoderKL:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if settings.vae:
        return AutoencoderKL.from_pretrained(settings.vae).eval().to(device)
    torch.manual_seed(0)
    vae = stock_vae(data.channels, settings.block_out_channels, layers_per_block=2)
    return vae.eval().to(device)


def plain_loop(vae: AutoencoderKL, settings: Namespace, data: DataConfig, folder: Path) -> int:
    """float32, a DataLoader, and all posteriors in one file at the end; how many images there were."""
    steps = [transforms.ToTensor(), transforms.Normalize([0.5] * data.channels, [0.5] * data.channels)]
    if data.name == "mnist":
        images = datasets.MNIST(data.root, transform=transforms.Compose([transforms.Pad(2), *steps]))
    else:
        fit = [transforms.Resize(data.resolution), transforms.CenterCrop(data.resolution)]
        images = datasets.ImageFolder(data.root, transforms.Compose([*fit, *steps]))
    images = Subset(images, range(min(len(images), settings.max_images or len(images))))
    loader = DataLoader(images, settings.batch_size, num_workers=settings.num_workers)
    means, logvars = [], []
    with torch.no_grad():
        for batch, _ in loader:
            posterior = vae.encode(batch.to(vae.device)).latent_dist
            means.append(posterior.mean.cpu())
            logvars.append(posterior.logvar.cpu())
    save_file(
        {"mean": torch.cat(means).contiguous(), "logvar": torch.cat(logvars).contiguous()},
        folder / "latents.safetensors",
    )
    return len(images)


def ours(vae: AutoencoderKL, settings: Namespace, data: DataConfig, folder: Path) -> int:
    images, _ = load_split(data, "training" if data.name == "mnist" else "all", False)
    if settings.max_images:
        images = images.first(settings.max_images)
    dtype = settings.compute_dtype and getattr(torch, settings.compute_dtype)
    return len(
        encode_images(VAE.from_diffusers(vae), images, folder, compute_dtype=dtype, shard_images=settings.shard_images)
    )


def rate(work: Callable, vae: AutoencoderKL, settings: Namespace, data: DataConfig, folder: Path) -> float:
    """Images per second."""
    began = time.perf_counter()
    return work(vae, settings, data, folder) / (time.perf_counter() - began)


def work_on_own_cores(settings: Namespace, data: DataConfig) -> None:
    """One process of several, or the one that they are compared with: prints the rate of all together."""
    rank, cores = int(os.environ["RANK"]), sorted(os.sched_getaffinity(0))
    share = len(cores) // settings.worker
    if not share:
        raise ValueError(f"{settings.worker} processes need as many cores, got {len(cores)}")
    os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])
    torch.set_num_threads(share)
    vae = load_vae(settings, data)
    torch.distributed.init_process_group("gloo")
    for number in range(2):  # the first warms up
        torch.distributed.barrier()
        found = rate(ours, vae, settings, data, Path(os.environ["SCRATCH"]) / str(number))
    if rank == 0:
        print(json.dumps({"rate": found}))
    torch.distributed.destroy_process_group()


def rate_of(processes: int, arguments: Sequence[str], settings: Namespace) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        program = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        done = subprocess.run(
            [*program, __file__, *arguments, f"--worker={settings.processes}"],
            env=os.environ | {"SCRATCH": scratch}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])["rate"]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings, data = read_settings(arguments)
    if settings.worker:
        return work_on_own_cores(settings, data)
    found: dict[str, list[float]] = {}
    computed = None
    if settings.processes:
        for _ in range(settings.rounds):
            for processes in (1, settings.processes):
                name = f"{processes} process{'es' * (processes > 1)}"
                found.setdefault(name, []).append(rate_of(processes, arguments, settings))
    else:
        vae = load_vae(settings, data)
        for number in range(settings.rounds):
            for name, work in (("plain loop", plain_loop), ("ours", ours)):
                with tempfile.TemporaryDirectory() as folder:
                    value = rate(work, vae, settings, data, Path(folder))
                    if name == "ours":
                        computed = str(LatentDataset(folder).compute_dtype).removeprefix("torch.")
                if number:
                    found.setdefault(name, []).append(value)
    (base, first), (_, second) = found.items()
    print(f"{'':14}{'images/s':>10}{'least':>10}{'most':>10}{'ratio':>8}")
    for name, rates in found.items():
        print(f"{name:14}{median(rates):10.1f}{min(rates):10.1f}{max(rates):10.1f}{median(rates) / median(first):8.2f}")
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    print(f"ratio to {base}, round by round: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    if computed:
        print(f"ours in {computed}, {torch.get_num_threads()} threads")
    if settings.out:
        figures = {
            "images per second": found,
            "ratio": median(ratios),
            "compute_dtype": computed,
            "threads": torch.get_num_threads(),
            "settings": json.loads(json.dumps(settings.as_dict(), default=str)),
            "machine": platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }
        Path(settings.out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
