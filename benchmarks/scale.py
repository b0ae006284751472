"""How long two large trainings would take on 8 and 64 GPUs, on paper: what each stage of a step takes, what saturates
first, and what it changes when an assumption is half or twice as large. Nothing here was measured on a GPU.

    python benchmarks/scale.py                                # with the figures of docs/scale.md
    python benchmarks/scale.py --measure data/photographs     # with those of this machine, which takes some minutes
    python benchmarks/scale.py --set gpu_used=0.4 shared_read=5e9
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
import torchvision
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusers_vae.data import DataConfig, deal, load_data, shuffled
from diffusers_vae.engine.checkpoint import find_checkpoint
from diffusers_vae.engine.state import TrainState
from diffusers_vae.engine.step import Discriminator
from diffusers_vae.losses.adversarial import PatchDiscriminator
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder_config import TrainConfig

SD = ModelConfig(
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
    use_quant_conv=True,
)
"""That of training/configs/kl-f8.yaml."""
RESOLUTION = 256
Stored = Literal["files", "archives", "stream"]
"""By themselves; in .tar or .zip; in Parquet files with data.streaming."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what."""

    name: str
    images: int
    file_bytes: float
    """Mean of a file."""
    decoded: str
    """The measured kind of file: a key of `Measured.decode`."""
    epochs: int
    batch_size: int
    """Images of a step, on all GPUs together."""
    checkpoint_every: int
    """Images."""
    evaluate_every: int
    """Images."""
    evaluated: int = 5000
    """Images of an evaluation."""


RECIPES = (
    Recipe("ImageNet", 1_281_167, 110e3, "500x375 JPEG", 10, 512, 250_000, 1_281_167),
    Recipe("100 million", 100_000_000, 100e3, "512 px JPEG", 1, 512, 1_000_000, 5_000_000),
    Recipe("100 million WebP", 100_000_000, 100e3, "512 px WebP", 1, 512, 1_000_000, 5_000_000),
)


@dataclass(frozen=True)
class Counted:
    """Facts about the model, found on the meta device: `count`."""

    parameters: int
    discriminator: int
    """Parameters of it."""
    checkpoint: int
    """Bytes: weights, their average and both of AdamW's, and those of the discriminator; float32."""
    step_bf16: float
    """Operations for an image in a step, under autocast: the autoencoder."""
    step_float32: float
    """Likewise, in float32: LPIPS by VGG-16, and the discriminator."""
    forward: float
    """Operations for a reconstruction."""


@dataclass(frozen=True)
class Measured:
    """Medians of several rounds on one core: `measure`. The defaults are those of docs/scale.md."""

    decode: dict[str, float]
    """Images that are read from memory, decoded and scaled per second of a core, by kind of file."""
    headers: float
    """Files of one folder that a process lists and checks per second of a core, when the system has them in memory."""
    headers_in_tar: float
    """Likewise, of the members of a tar."""
    bytes_per_file: float
    """Memory that a process takes for each file of a set."""
    permutation: float
    """Seconds of a core for the order of the images of an epoch, per image."""
    checkpoint_write: float
    """Bytes/s, with checksums and until they are on the disk."""
    checkpoint_read: float
    """Bytes/s, with checksums."""


MEASURED = Measured(
    decode={"500x375 JPEG": 384.0, "512 px JPEG": 286.0, "512 px WebP": 104.0},
    headers=10_000.0,
    headers_in_tar=6200.0,
    bytes_per_file=2450.0,
    permutation=6e-8,
    checkpoint_write=8.2e7,
    checkpoint_read=2.2e8,
)


@dataclass(frozen=True)
class Assumed:
    """What this machine cannot measure: figures of a node of 8 NVIDIA H100 SXM and of its surroundings."""

    gpus_per_node: int = 8
    cores_per_node: int = 112
    """NVIDIA DGX H100: two processors of 56 cores."""
    gpu_bf16: float = 989e12
    """Operations/s, dense: NVIDIA's data sheet of H100 SXM."""
    gpu_tf32: float = 494e12
    """Likewise; what torch takes for convolutions in float32, by default."""
    gpu_used: float = 0.3
    """Of both, what convolutions between group norms reach: a guess, on which the result depends most."""
    gpu_memory: float = 3.35e12
    """Bytes/s: the same sheet."""
    gpu_copy: float = 25e9
    """Bytes/s from the node's memory to one GPU: about half of PCIe 5.0 x16."""
    gpu_link: float = 200e9
    """Bytes/s in an all-reduce within a node: somewhat less than half of NVLink 4's 450e9 in each direction."""
    node_link: float = 20e9
    """Bytes/s in an all-reduce between nodes, of a node: 200 Gbit/s, of which 4/5."""
    node_read: float = 2e9
    """Bytes/s that a node gets from shared storage."""
    shared_read: float = 8e9
    """Bytes/s that shared storage gives to all nodes together."""
    shared_write: float = 1e9
    """Bytes/s of one process that writes to it."""
    shared_opens: float = 20_000.0
    """Files/s that shared storage opens, for all nodes together."""
    disk_read: float = 5e9
    """Bytes/s from a node's own disk."""


SPEEDS = [field.name for field in fields(Assumed) if field.name not in ("gpus_per_node", "cores_per_node", "gpu_tf32")]
"""Assumptions to be halved and doubled."""


@dataclass(frozen=True)
class Estimate:
    """Seconds."""

    overlapping: dict[str, float]
    """Of a step, what goes on at the same time."""
    after: dict[str, float]
    """Of a step, what waits for that."""
    once: dict[str, float]
    """Of the whole run, what stands beside its steps."""
    steps: int
    steps_per_epoch: int

    @property
    def step(self) -> float:
        return max(self.overlapping.values()) + sum(self.after.values())

    @property
    def epoch(self) -> float:
        return self.steps_per_epoch * self.step

    @property
    def whole(self) -> float:
        return self.steps * self.step + sum(self.once.values())

    @property
    def saturated(self) -> list[str]:
        """The stages that overlap, the slowest first."""
        return sorted(self.overlapping, key=self.overlapping.get, reverse=True)


def estimate(
    recipe: Recipe,
    gpus: int,
    counted: Counted,
    measured: Measured,
    assumed: Assumed,
    num_workers: int = 8,
    stored: Stored = "archives",
    on_disk: bool = False,
) -> Estimate:
    """What a run takes. `num_workers`: data.num_workers, of each process, as far as there are cores. `on_disk`:
    archives are copied to each node's disk before.
    """
    nodes, processes = -(-gpus // assumed.gpus_per_node), min(gpus, assumed.gpus_per_node)
    batch, own = recipe.batch_size, recipe.batch_size / gpus
    workers = min(gpus * num_workers, nodes * (assumed.cores_per_node - processes))  # who trains has a core, too
    from_storage = min(nodes * assumed.node_read, assumed.shared_read)
    set_bytes = recipe.images * recipe.file_bytes
    compute = counted.step_bf16 / assumed.gpu_bf16 + counted.step_float32 / assumed.gpu_tf32
    overlapping = {
        "read": batch * recipe.file_bytes / (nodes * assumed.disk_read if on_disk else from_storage),
        "open files": batch / assumed.shared_opens if stored == "files" else 0.0,
        "decode": batch / (workers * measured.decode[recipe.decoded]),
        "copy to GPU": own * 3 * RESOLUTION**2 / assumed.gpu_copy,  # as uint8
        "compute": own * compute / assumed.gpu_used,
        "all-reduce": all_reduce(4 * counted.parameters, processes, nodes, assumed),
    }
    after = {
        # weights, gradients, moments and average are read, all but the gradients written
        "optimiser": 9 * 4 * counted.parameters / assumed.gpu_memory,
        "all-reduce of the discriminator": all_reduce(4 * counted.discriminator, processes, nodes, assumed),
    }
    seen = recipe.images * recipe.epochs
    # every process looks for itself, the first of a node before the others
    checked = {"files": measured.headers, "archives": measured.headers_in_tar, "stream": float("inf")}[stored]
    headers = min(2, processes) * recipe.images / checked
    if stored == "files":
        headers = max(headers, gpus * recipe.images / assumed.shared_opens)
    ordered = 0 if stored == "stream" else recipe.images  # a stream orders its row groups
    once = {
        "copy to the disks": nodes * set_bytes / from_storage if on_disk else 0.0,
        "check headers": headers,
        "order of images": recipe.epochs * ordered * measured.permutation,
        "checkpoints": seen // recipe.checkpoint_every * write_checkpoint(counted, measured, assumed),
        "evaluations": seen
        // recipe.evaluate_every
        * recipe.evaluated
        * (
            counted.forward / (gpus * assumed.gpu_tf32 * assumed.gpu_used)
            + 1 / (min(4, assumed.cores_per_node // processes) * gpus * measured.decode[recipe.decoded])
        ),
    }
    per_epoch = -(-recipe.images // batch)
    return Estimate(overlapping, after, once, per_epoch * recipe.epochs, per_epoch)


def all_reduce(size: float, processes: int, nodes: int, assumed: Assumed) -> float:
    """Seconds to sum `size` bytes over `nodes` of so many processes each: rings within the nodes, and between them."""
    within = 2 * (processes - 1) / processes * size / assumed.gpu_link
    return within + 2 * (nodes - 1) / nodes * size / assumed.node_link


def write_checkpoint(counted: Counted, measured: Measured, assumed: Assumed) -> float:
    """Seconds, in which all wait."""
    return counted.checkpoint / min(measured.checkpoint_write, assumed.shared_write)


def memory_of_names(recipe: Recipe, measured: Measured, assumed: Assumed) -> tuple[float, float]:
    """Bytes on a node, of a set that is no stream: of the files' names, and of the orders of images, of all processes
    without their workers. There are two orders, one for the steps and one for the workers that read ahead.
    """
    names = recipe.images * measured.bytes_per_file * assumed.gpus_per_node
    return names, 2 * 8 * recipe.images * assumed.gpus_per_node


@cache
def count() -> Counted:
    """Of the model, LPIPS and discriminator of training/configs/kl-f8.yaml, an image of 256 pixels a side."""
    discriminator, patches = PatchDiscriminator(3), torch.zeros(1, 3, RESOLUTION, RESOLUTION)  # small enough
    with torch.device("meta"):
        vae = SD.build(3, (RESOLUTION, RESOLUTION))
        vgg = torchvision.models.vgg16(weights=None).features[:30].requires_grad_(False)
        image = torch.empty(1, 3, RESOLUTION, RESOLUTION)
    with FlopCounterMode(display=False) as forward:
        reconstruction = vae.decode(vae.encode(image).latent_dist.mode()).sample
    with FlopCounterMode(display=False) as backward:
        reconstruction.sum().backward()
    fake = reconstruction.detach().requires_grad_()
    with FlopCounterMode(display=False) as seen:
        vgg(image)
    with FlopCounterMode(display=False) as judged:  # and its gradient, which the adaptive weight takes a second time
        vgg(fake).sum().backward()
    with FlopCounterMode(display=False) as fooled, torch.no_grad():
        discriminator(patches)
    judging = judged.get_total_flops() + (judged.get_total_flops() - seen.get_total_flops())
    # the generator's forward, its gradient twice; the discriminator's own step on two images
    adversarial = fooled.get_total_flops() * (1 + 2 + 2 * 3)
    parameters, own = (sum(p.numel() for p in module.parameters()) for module in (vae, discriminator))
    return Counted(
        parameters=parameters,
        discriminator=own,
        checkpoint=4 * (4 * parameters + 3 * own),
        step_bf16=forward.get_total_flops() + backward.get_total_flops(),
        step_float32=seen.get_total_flops() + judging + adversarial,
        forward=forward.get_total_flops(),
    )


LOOK = """
import sys, time
import psutil
from diffusers_vae.data import DataConfig, load_data
kept = load_data(DataConfig(name="digits"))  # whatever is imported late
for root in sys.argv[1:]:
    before, start = psutil.Process().memory_info().rss, time.process_time()
    kept = load_data(DataConfig(name="folder", root=root, resolution=256, channels=3), memory_limit=0)
    print(time.process_time() - start, psutil.Process().memory_info().rss - before)
"""


def measure(folder: Path, scratch: Path, rounds: int) -> tuple[Measured, dict[str, list[float]]]:
    """Medians, and the figures of all rounds, in files below `scratch`, made of the photographs in `folder`."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    photographs = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    pictures = [Image.open(path).convert("RGB") for path in photographs[:48]]
    pictures = [picture if picture.width > picture.height else picture.rotate(90, expand=True) for picture in pictures]
    kinds = {
        "500x375 JPEG": ([ImageOps.fit(picture, (500, 375)) for picture in pictures], "jpg", 110e3),
        "512 px JPEG": ([ImageOps.fit(picture, (768, 512)) for picture in pictures], "jpg", 100e3),
        "512 px WebP": ([ImageOps.fit(picture, (768, 512)) for picture in pictures], "webp", 100e3),
    }
    sets = {}
    for name, (fitted, suffix, size) in kinds.items():
        quality = compress(fitted, scratch / name, suffix, size)
        files = list((scratch / name).iterdir())
        kept = sum(path.stat().st_size for path in files) / len(files)
        logging.info("%s: %d files of %.0f bytes in the mean, quality %d", name, len(files), kept, quality)
        sets[name] = load_data(
            DataConfig(name="folder", root=str(scratch / name), resolution=RESOLUTION, channels=3), memory_limit=0
        )[0]
    for name, images in sets.items():
        rows = range(len(images))
        images.read(rows)  # from now on in the system's memory
        found[f"decode {name}"] = [len(rows) / processor(images.read, rows) for _ in range(rounds)]

    many, copies = scratch / "many", 10_000
    many.mkdir()
    content = next((scratch / "500x375 JPEG").iterdir()).read_bytes()
    for number in range(copies):
        (many / f"n{number:08d}.jpg").write_bytes(content[:5000])  # headers alone are read
    (scratch / "tars").mkdir()
    subprocess.run(["tar", "-cf", scratch / "tars" / "many.tar", "-C", scratch, "many"], check=True)
    for _ in range(rounds):  # memory, of a new process
        done = subprocess.run([sys.executable, "-c", LOOK, many, scratch / "tars"], check=True, stdout=subprocess.PIPE)
        folder_took, memory, tar_took, _ = map(float, done.stdout.split())
        for name, value in (
            ("headers", copies / folder_took), ("headers_in_tar", copies / tar_took),
            ("bytes_per_file", memory / copies),
        ):  # fmt: skip
            found.setdefault(name, []).append(value)
    write, read = checkpoint_rates(scratch / "checkpoints", rounds)
    found |= {"checkpoint_write": write, "checkpoint_read": read}
    for count in (1_281_167, 100_000_000):
        took = [processor(lambda count=count: next(deal(shuffled(count, 512, 0, 0, 0), 0, 0))) for _ in range(rounds)]
        found[f"permutation of {count}"] = [value / count for value in took]
    for name, values in found.items():
        logging.info("%-28s%s", name, "  ".join(f"{value:.4g}" for value in values))
    middle = {name: median(values) for name, values in found.items()}
    return (
        Measured(
            decode={name: middle[f"decode {name}"] for name in kinds},
            headers=middle["headers"],
            headers_in_tar=middle["headers_in_tar"],
            bytes_per_file=middle["bytes_per_file"],
            permutation=middle["permutation of 100000000"],
            checkpoint_write=middle["checkpoint_write"],
            checkpoint_read=middle["checkpoint_read"],
        ),
        found,
    )


def compress(pictures: Sequence[Image.Image], folder: Path, suffix: str, size: float) -> int:
    """Write the pictures with the quality, which is returned, at which a file has at most `size` bytes in the mean."""
    folder.mkdir(parents=True)
    low, high = 10, 100
    while True:
        quality = (low + high) // 2
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{number:03d}.{suffix}", quality=quality)
        mean = sum(path.stat().st_size for path in folder.iterdir()) / len(pictures)
        if high - low <= 1:
            return quality
        low, high = (quality, high) if mean <= size else (low, quality)


def checkpoint_rates(folder: Path, rounds: int, config: ModelConfig = SD) -> tuple[list[float], list[float]]:
    """Bytes/s, of each round, at which a checkpoint of a model, by default of Stable Diffusion's size, is written, and
    is checked and restored.
    """
    judge = PatchDiscriminator(3)
    judged = Discriminator(judge, torch.optim.AdamW(judge.parameters()))
    settings = TrainConfig(data=DataConfig(channels=3, root=str(folder)), model=config, objective=ObjectiveConfig())
    state = TrainState(
        Accelerator(cpu=True), lambda: config.build(3, (RESOLUTION, RESOLUTION)), settings, ("distortion", "rate"),
        torch.nn.Module.forward, judged,
    )  # fmt: skip
    for parameter in (*state.parameters, *judge.parameters()):
        parameter.grad = torch.ones_like(parameter)
    state.take_step(judged=True)
    state.zero_grad()
    write, read = [], []
    for number in tqdm(range(rounds), "checkpoints", disable=None):
        state.step, state.images_seen = number, number + 1
        wrote = seconds(state.save, folder, {}, [], 1)
        path = next(folder.iterdir())
        size = sum(file.stat().st_size for file in path.iterdir())
        write.append(size / wrote)
        read.append(size / (seconds(find_checkpoint, folder) + seconds(state.load, path)))
    return write, read


def processor(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of a core, which do not depend on what else the machine does."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def seconds(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def duration(value: float) -> str:
    """Seconds in a unit that suits them."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if value >= (length if unit == "s" else 2 * length) or (unit == "ms" and value):
            return f"{value / length:.3g} {unit}"
    return "0"


def table(recipe: Recipe, gpus: int, found: Estimate, saturated_at: dict[str, float]) -> str:
    """The parts of a run."""
    lines = [f"{'a step of ' + str(recipe.batch_size):<34}{'step':>10}{'epoch':>10}   saturates at images/s"]
    for name in found.saturated:
        took = found.overlapping[name]
        limit = f"{saturated_at[name]:,.0f}" if took else "never"
        lines.append(f"  {name:<32}{duration(took):>10}{duration(took * found.steps_per_epoch):>10}   {limit}")
    for name, took in found.after.items():
        lines.append(f"+ {name:<32}{duration(took):>10}{duration(took * found.steps_per_epoch):>10}")
    lines.append(f"= {'step, epoch':<32}{duration(found.step):>10}{duration(found.epoch):>10}")
    lines.append(f"{'beside the steps, in the whole run':<34}")
    lines += [f"+ {name:<32}{'':>10}{duration(took):>10}" for name, took in found.once.items()]
    rate = recipe.batch_size / found.step
    lines.append(
        f"= {'the whole run':<32}{'':>10}{duration(found.whole):>10}   {recipe.epochs} x {recipe.images:,} images, "
        f"{rate:,.0f} a second in steps; saturated first: {found.saturated[0]}, then {found.saturated[1]}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="Measure anew, with the photographs in there.")
    parser.add_argument("--rounds", type=int, default=5, help="Of each measurement.")
    parser.add_argument("--scratch", type=Path, help="Folder on the disk that is measured; by default the system's.")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--num_workers", type=int, default=8, help="data.num_workers: of each process, that is GPU.")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="Assumptions, as they are printed.")
    parser.add_argument("--stored", choices=get_args(Stored), default="archives", help="How the images lie there.")
    parser.add_argument("--on_disk", action="store_true", help="Archives are copied to each node's disk first.")
    parser.add_argument("--out", type=Path, help="File for all figures, as JSON.")
    settings = parser.parse_args(arguments)
    if settings.on_disk and settings.stored != "archives":
        parser.error(f"--on_disk is of archives, got --stored {settings.stored}")
    assumed, known = Assumed(), {field.name for field in fields(Assumed)}
    for name, _, value in (text.partition("=") for text in settings.set):
        if name not in known:
            parser.error(f"--set knows {', '.join(sorted(known))}, got {name}")
        assumed = replace(assumed, **{name: type(getattr(assumed, name))(float(value))})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    measured, rounds = MEASURED, {}
    if settings.measure:
        with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
            measured, rounds = measure(settings.measure, Path(scratch), settings.rounds)
    counted = count()

    print("MEASURED on one core of a CPU", "now, medians" if settings.measure else "for docs/scale.md, medians")
    for name, value in asdict(measured).items():
        for kind, figure in value.items() if isinstance(value, dict) else [("", value)]:
            seen = [] if not rounds else rounds.get(f"{name} {kind}".strip(), [])
            spread = f"   {min(seen):.3g} to {max(seen):.3g}" if seen else ""
            print(f"  {f'{name} {kind}':<28}{figure:>12.4g}{spread}")
    print("COUNTED on the meta device")
    for name, value in asdict(counted).items():
        print(f"  {name:<28}{value:>12.4g}")
    print("ASSUMED, measured nowhere here (--set NAME=VALUE)")
    for name, value in asdict(assumed).items():
        print(f"  {name:<28}{value:>12.4g}")
    results = []
    for recipe in RECIPES:
        for gpus in settings.gpus:
            way = {"num_workers": settings.num_workers, "stored": settings.stored, "on_disk": settings.on_disk}
            found = estimate(recipe, gpus, counted, measured, assumed, **way)
            limits = {name: recipe.batch_size / took for name, took in found.overlapping.items() if took}
            print(f"\n{recipe.name}, {gpus} GPUs, by assumption")
            print(table(recipe, gpus, found, limits))
            changed = {}
            for name in SPEEDS:
                for factor in (0.5, 2.0):
                    other = replace(assumed, **{name: getattr(assumed, name) * factor})
                    changed[name, factor] = estimate(recipe, gpus, counted, measured, other, **way)
            for factor in (0.5, 2.0):
                slower = replace(measured, decode={kind: rate * factor for kind, rate in measured.decode.items()})
                changed["decode", factor] = estimate(recipe, gpus, counted, slower, assumed, **way)
            print("the whole run, and what saturates, with half and with twice of it:")
            for name in (*SPEEDS, "decode"):
                half, twice = changed[name, 0.5], changed[name, 2.0]
                if max(abs(other.whole / found.whole - 1) for other in (half, twice)) > 0.01:
                    ends = (f"{duration(other.whole):>9} ({other.saturated[0]})" for other in (half, twice))
                    print(f"  {name:<16}{'  '.join(f'{end:<22}' for end in ends)}".rstrip())
            names, orders = memory_of_names(recipe, measured, assumed)
            wanted = recipe.batch_size / max(found.overlapping["compute"], found.overlapping["all-reduce"])
            needed = wanted / gpus / measured.decode[recipe.decoded]
            print(f"data.num_workers that keep the GPUs busy: {needed:.1f}")
            if settings.stored != "stream":
                text = f"{names / 1e9:,.1f} GB of names, {orders / 1e9:,.1f} GB for the order of images"
                print(f"memory of a node: {text}")
            results.append(
                {"recipe": asdict(recipe), "gpus": gpus, **way, "saturated": found.saturated, "step": found.step}
                | {"epoch": found.epoch, "whole": found.whole, **asdict(found)}
            )
    if settings.out:
        machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
        machine |= {"torch": torch.__version__}
        report = {"machine": machine, "measured": asdict(measured), "rounds": rounds, "counted": asdict(counted)}
        settings.out.write_text(json.dumps(report | {"assumed": asdict(assumed), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
