"""Reads a folder of images without training on them, by this package and by torchvision's `ImageFolder` with the usual
transforms, in turn, and prints images per second.

    python benchmarks/reading.py data/photographs --resolution 256 --workers 0 2 --rounds 5 --out reading.json
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import PIL
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from diffusers_vae.data import DataConfig, ImageSet, ReadImages, kind_at, load_data, load_split
from diffusers_vae.images.ranges import to_model_range


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="With image files, in it or below it.")
    parser.add_argument(
        "--packed",
        type=Path,
        nargs="*",
        default=[],
        help="Archives, arrays (.npy) or Parquet of the same images, read too; Parquet as a stream as well.",
    )
    parser.add_argument("--resolution", type=int, default=256, help="Side of the images in pixels.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="Processes that read, one run for each.")
    parser.add_argument("--rounds", type=int, default=5, help="How often each way reads all files.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="File for the figures, as JSON.")
    settings = parser.parse_args(arguments)

    sets, streams = {}, {}
    for root in (settings.folder, *settings.packed):
        name = kind_at(str(root))
        config = DataConfig(name=name, root=str(root), resolution=settings.resolution, channels=3)
        images, _ = load_split(config, "all", memory_limit=0)  # so that they are read on demand
        sets["diffusers_vae" if root == settings.folder else root.name] = images
        for row in images.rows.tolist():
            images.store.content(row)  # from now on in the system's cache
        if name == "datasets":
            streams[f"{root.name}, streamed"] = replace(config, streaming=True)
    ours = sets["diffusers_vae"]
    for name, images in sets.items():
        if len(images) != len(ours):
            parser.error(f"{name} has {len(images)} images, {settings.folder} {len(ours)}")
    indices = range(len(ours))
    batches = [indices[start : start + settings.batch_size] for start in indices[:: settings.batch_size]]
    results = []
    with tempfile.TemporaryDirectory() as classes:
        (Path(classes) / "all").symlink_to(settings.folder.resolve())  # it wants a folder for each class
        steps = [
            transforms.Resize(settings.resolution, transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(settings.resolution),
            transforms.ToTensor(),
        ]
        theirs = ImageFolder(classes, transforms.Compose(steps))
        if len(theirs) != len(ours):
            parser.error(f"torchvision finds {len(theirs)} images in {settings.folder}, this package {len(ours)}")
        for workers in settings.workers:
            loaders = {name: (_loader(images, batches, workers), _images) for name, images in sets.items()}
            for name, config in streams.items():  # in its own order, the part to train on
                images, _ = load_data(config)
                images.lanes = 1, max(1, workers)
                own = [batch.tolist() for batch in images.batches(settings.batch_size, 0, 0, 0)]
                loaders[name] = (_loader(images, own, workers), _images)
            loaders["torchvision"] = (DataLoader(theirs, batch_sampler=batches, num_workers=workers), _first)
            rates = {name: [] for name in loaders}
            for _ in range(settings.rounds):
                for name, (loader, images) in loaders.items():
                    rates[name].append(_rate(loader, images))
            ratios = {
                name: [own / other for own, other in zip(rates[name], rates["torchvision"], strict=True)]
                for name in loaders
                if name != "torchvision"
            }
            results.append({"workers": workers, "images_per_second": rates, "ratios": ratios})

    print(f"{len(ours)} files to {settings.resolution}x{settings.resolution}, medians of {settings.rounds} rounds")
    print(f"{'workers':>7}  {'read by':<20}{'img/s':>8}{'torchvision':>13}{'ratio':>8}{'least':>8}{'most':>8}")
    for result in results:
        rates = {name: median(values) for name, values in result["images_per_second"].items()}
        for name, ratios in result["ratios"].items():
            print(
                f"{result['workers']:7}  {name:<20}{rates[name]:8.1f}{rates['torchvision']:13.1f}"
                f"{median(ratios):8.2f}{min(ratios):8.2f}{max(ratios):8.2f}"
            )
    if settings.out:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
        machine |= {module.__name__: module.__version__ for module in (PIL, torch, torchvision)}
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
        report = {"settings": asked, "images": len(ours), "machine": machine, "results": results}
        settings.out.write_text(json.dumps(report, indent=2) + "\n")


def _rate(loader: DataLoader, images: Callable[[object], torch.Tensor]) -> float:
    """Images per second of one pass, with the start of the workers."""
    start = time.perf_counter()
    count = sum(len(images(batch)) for batch in loader)
    return count / (time.perf_counter() - start)


@dataclass(frozen=True)
class _ByIndex:
    """An image set as torch's `DataLoader` reads one."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> ReadImages:
        return self.images.read(indices)


def _loader(images: ImageSet, batches: Sequence[Sequence[int]], workers: int) -> DataLoader:
    return DataLoader(_ByIndex(images), batch_sampler=batches, num_workers=workers, collate_fn=_as_read)


def _as_read(read: ReadImages) -> ReadImages:
    return read


def _images(read: ReadImages) -> torch.Tensor:
    return to_model_range(read.checked().pixels)


def _first(batch: list[torch.Tensor]) -> torch.Tensor:
    return batch[0]


if __name__ == "__main__":
    main()
