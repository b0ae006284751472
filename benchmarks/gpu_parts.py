"""The parts of gpu.py: what each measures, and how much of it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import articles
import latent_cache
import numpy as np
import torch
import yaml
from PIL import Image
from side_by_side import LAUNCH, follow, memory_of, speed, stock_vae
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.losses.perceptual import FILES

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "training" / "configs"
SCRIPT = HERE.parent / "training" / "train_vae.py"
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 3
    """Number of rounds, in turn, of everything that has a ratio."""
    epoch: int = 60_000
    """Images of MNIST; runs on them are as long as the articles', and are stopped when their speed is known."""
    loop_steps: int = 600
    images: int = 120_000
    """Images of a round of training on small images."""
    loss: float = 37.0
    """Training loss of article 000 after its last epoch."""
    epochs: int | None = None
    """Epochs of the run to that loss; None: those of its preset."""
    digits: tuple[str, ...] = ()
    """Settings of the main job."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    side: int = 256
    batch: int = 16
    loop_images: int = 480
    large_images: int = 960
    """Images of a round of training on large images."""
    planned_steps: int = 100_000
    """Steps of the runs that are stopped when their speed is known."""
    perceptual: str = "vgg"
    matrix: int = 8192
    sides: tuple[int, ...] = (256, 512, 1024, 2048)
    seconds: float = 0.7
    """Least time of a round of inference."""
    encoded: int = 2048
    """Images of the latent cache."""
    evaluated: int = 2000
    resumed: int = 3200


TINY = Sizes(
    rounds=1, epoch=200, loop_steps=2, images=64, loss=1e6, epochs=1,
    digits=("--run.max_images=64", "--evaluation.max_images=8"), widths=(32, 32), side=32,
    batch=4, loop_images=12, large_images=12, planned_steps=5000, perceptual="squeeze", matrix=64,
    sides=(16, 32), seconds=0.0, encoded=8, evaluated=8, resumed=64,
)  # fmt: skip
Row = dict[str, Any]
"""What was measured, its `value`, and what it is `beside`, in words; the `ratio`, and the raw `figures`."""


def row(what: str, value: str, beside: str = "", ratio: float | None = None, **figures: Any) -> Row:
    return {"what": what, "value": value, "beside": beside, "ratio": ratio, "figures": figures}


def left_out(what: str, reason: str) -> Row:
    return row(what, f"left out: {reason}")


def beside(what: str, ours: Sequence[float], loop: str, theirs: Sequence[float]) -> Row:
    """Images/s of ours and of another program, which ran in turn, with the median of the rounds' ratios."""
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    value, against = f"{median(ours):,.1f} img/s", f"{loop}, {median(theirs):,.1f} img/s"
    return row(what, value, against, ratio, ours=list(ours), theirs=list(theirs))


def flags(settings: dict[str, Any]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def trainer(
    settings: dict[str, Any], images: int, stop: int, folder: str, program: Sequence[str] = ("train",)
) -> tuple[float, float]:
    """Images/s and GiB of a run that is planned for `images` images, so that it runs as such a run does, and is stopped
    after `stop`; or of its bare steps.
    """
    settings = settings | {"run.max_images": images, "run.epochs": 10**6, "run.checkpoint_every": 10**9}
    settings |= {"run.tracker": "null", "evaluation.max_images": 64}
    with tempfile.TemporaryDirectory(dir=folder) as run:
        command = [*LAUNCH, str(HERE / "gpu_runs.py"), *program, *flags(settings | {"run.output_dir": f"{run}/run"})]
        marks, printed = follow(command, stop) if "bare" in program else follow(command, images, stop)
    return speed(marks), memory_of(printed)


def article(sizes: Sizes, root: str, folder: str) -> list[Row]:
    """Article 000 against its loop, and the time to its final training loss."""
    rows = against_article("conv", sizes, root, folder)
    config = CONFIGS / "qmnist-vae-fast.yaml"
    what = f"article 000: seconds to a training loss of {sizes.loss:g}"
    if not config.exists():
        return [*rows, left_out(what, f"there is no {config.name}")]
    settings = {"config": config, "data.name": "mnist", "data.root": root, "run.tracker": "null"}
    epochs = sizes.epochs or yaml.safe_load(config.read_text())["run"]["epochs"]
    settings |= {"run.epochs": epochs, "evaluation.max_images": 64, "run.output_dir": f"{folder}/fast"}
    began = time.perf_counter()
    marks, _ = follow([*LAUNCH, str(SCRIPT), *flags(settings)], epochs * sizes.epoch)
    whole = time.perf_counter() - began
    lines = map(json.loads, Path(folder, "fast", "metrics.jsonl").read_text().splitlines())
    losses = {record["images_seen"]: record["loss"] for record in lines if record["kind"] == "train"}
    for seen in losses:
        mean = np.mean([loss for at, loss in losses.items() if seen - sizes.epoch < at <= seen])
        if seen >= sizes.epoch and mean <= sizes.loss:
            seconds = next(when for when, done in marks if done >= seen) - began
            value = f"{seconds:.1f} s, {seen:,} images"
            return [*rows, row(what, value, f"the whole command, {whole:.1f} s", seconds=seconds, whole=whole)]
    return [*rows, row(what, "not reached", f"the whole command, {whole:.1f} s", losses=losses)]


def against_article(name: str, sizes: Sizes, root: str, folder: str) -> list[Row]:
    config, _, epochs = articles.RUNS[name]
    settings = {"config": CONFIGS / f"{config}.yaml", "data.name": "mnist", "data.root": root}
    loops, ours = [], []
    for _ in range(sizes.rounds):
        loop = articles.article(name, root, "--steps", str(sizes.loop_steps))[-1]
        loops.append(loop["images_per_second"])
        ours.append(trainer(settings, epochs * sizes.epoch, sizes.images, folder)[0])
    return [beside(f"{config}, training", ours, f"article_loops.py {name}", loops)]


def mlps(sizes: Sizes, root: str, folder: str) -> list[Row]:
    """The MLPs against the articles' loops."""
    return [line for name in ("mlp-z2", "mlp-z20") for line in against_article(name, sizes, root, folder)]


def digits(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """The main job, by the clock."""
    epochs = yaml.safe_load((CONFIGS / "digits.yaml").read_text())["run"]["epochs"]
    images = epochs * len(load_data(DataConfig("digits", resolution=32))[0])
    images = min([images, *(int(text.split("=")[1]) for text in sizes.digits if "run.max_images" in text)])
    clock, speeds = [], []
    for number in range(sizes.rounds):
        began = time.perf_counter()
        output = ["--run.output_dir", f"{folder}/{number}"]
        speeds.append(speed(follow([*LAUNCH, str(SCRIPT), *output, *sizes.digits], images)[0]))
        clock.append(time.perf_counter() - began)
    value = f"{median(clock):.1f} s"
    steps = f"its steps, {median(speeds):,.0f} img/s"
    return [row("main job (digits), by the clock", value, steps, seconds=clock, images_per_second=speeds)]


def write_images(path: Path, count: int, side: int) -> np.ndarray:
    """Write `count` smooth random RGB images of `side` pixels as an .npy, and return them."""
    torch.manual_seed(0)
    parts = torch.rand(count, 3, side // 8, side // 8).split(64)
    pixels = [interpolate(part, (side, side), mode="bicubic").clamp(0, 1).mul(255).byte() for part in parts]
    images = torch.cat(pixels).permute(0, 2, 3, 1).contiguous().numpy()
    np.save(path, images)
    return images


def large(sizes: Sizes, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of data and model for large images, half of which are held out."""
    write_images(Path(folder, "images.npy"), 32 * sizes.batch, sizes.side)
    data = {"name": "array", "root": f"{folder}/images.npy", "channels": 3, "resolution": sizes.side}
    model = {"block_out_channels": list(sizes.widths), "layers_per_block": 2, "norm_num_groups": 32}
    data = {f"data.{name}": value for name, value in (data | {"heldout_fraction": 0.5}).items()}
    return data, model


def f8(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """Training of a VAE of Stable Diffusion's size against the plain loop."""
    data, model = large(sizes, folder)
    stock = data | model | {"batch_size": sizes.batch, "max_images": sizes.loop_images, "out": f"{folder}/stock"}
    ours = data | {f"model.{name}": value for name, value in model.items()}
    ours |= {"model.use_quant_conv": "true", "run.batch_size": sizes.batch}
    planned = sizes.planned_steps * sizes.batch
    names = {"no": "stock_loop.py, torch's defaults", "bf16": "stock_loop.py, bf16 autocast", "ours": "trainer"}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(sizes.rounds):
        for precision in ("no", "bf16"):
            command = [sys.executable, str(HERE / "stock_loop.py"), *flags(stock | {"mixed_precision": precision})]
            marks, printed = follow(command, sizes.loop_images)
            found[precision].append((speed(marks), memory_of(printed)))
        found["ours"].append(trainer(ours, planned, sizes.large_images, folder))
    speeds = {name: [each[0] for each in rounds] for name, rounds in found.items()}
    memory = {name: f", {max(each[1] for each in rounds):.1f} GiB" for name, rounds in found.items()}
    rows = []
    for precision in ("no", "bf16"):
        what = f"f8 training at {sizes.side}x{sizes.side}, batch {sizes.batch}"
        line = beside(what, speeds["ours"], names[precision], speeds[precision])
        line["value"] += memory["ours"]
        line["beside"] += memory[precision]
        rows.append(line)
    flop, peak = flop_of_image(sizes), matrix_peak(sizes.matrix)
    share = f"{100 * median(speeds['ours']) * flop / peak:.2g} % of the device's peak"
    counted = f"{flop / 1e12:.2f} TFLOP an image; {peak / 1e12:,.0f} TFLOP/s, bf16 product of {sizes.matrix}²"
    rows.append(row("f8 training, arithmetic", share, counted, flop=flop, peak=peak))
    judged = ours | {"adversarial.weight": 0.5}
    rows.append(_alone("f8 training with a discriminator", judged, planned, sizes, folder))
    what = f"f8 training with a discriminator and LPIPS ({sizes.perceptual})"
    if missing := missing_weights(sizes.perceptual):
        return [*rows, left_out(what, missing)]
    return [*rows, _alone(what, judged | {"objective.perceptual": sizes.perceptual}, planned, sizes, folder)]


def _alone(what: str, settings: dict[str, Any], planned: int, sizes: Sizes, folder: str) -> Row:
    rate, memory = trainer(settings, planned, sizes.large_images // 2, folder)
    return row(what, f"{rate:,.1f} img/s, {memory:.1f} GiB", images_per_second=rate, gib=memory)


def missing_weights(net: str) -> str:
    """Which file of a network for LPIPS or rFID is missing, or nothing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILES[net]
    return "" if path.exists() else f"{path} is missing"


def flop_of_image(sizes: Sizes) -> float:
    """Multiplications and additions of forward and backward of one image, counted without computing them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vae = stock_vae(3, sizes.widths, layers_per_block=2)
        vae(torch.zeros(1, 3, sizes.side, sizes.side)).sample.sum().backward()
    return counter.get_total_flops()


def synchronise() -> None:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(work: Callable[[], Any], least: float) -> float:
    """Seconds of a call, on average over as many as take `least` seconds together."""
    synchronise()
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < least:
        work()
        synchronise()
        calls += 1
    return (time.perf_counter() - began) / calls


def matrix_peak(side: int) -> float:
    """FLOP/s of a large product of matrices in bf16."""
    matrix = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    seconds_of(lambda: matrix @ matrix, 0.3)
    return 2 * side**3 / min(seconds_of(lambda: matrix @ matrix, 0.3) for _ in range(3))


def step(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """The trainer against its bare step, for the model of the main job."""
    settings = {"config": CONFIGS / "digits.yaml"}
    batch = yaml.safe_load(settings["config"].read_text())["run"]["batch_size"]
    return _against_bare("digits", settings, sizes.planned_steps * batch, sizes.images, sizes, folder)


def step_f8(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """The trainer against its bare step, for a VAE of Stable Diffusion's size."""
    data, model = large(sizes, folder)
    settings = data | {f"model.{name}": value for name, value in model.items()} | {"run.batch_size": sizes.batch}
    return _against_bare("f8", settings, sizes.planned_steps * sizes.batch, sizes.large_images, sizes, folder)


def _against_bare(
    name: str, settings: dict[str, Any], planned: int, images: int, sizes: Sizes, folder: str
) -> list[Row]:
    bare, ours = [], []
    for _ in range(sizes.rounds):
        bare.append(trainer(settings, planned, images, folder, ["bare", str(images)])[0])
        ours.append(trainer(settings, planned, images, folder)[0])
    return [beside(f"trainer, {name}", ours, "its bare step", bare)]


def inference(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """Encoding and decoding in bf16: stock blocks, `fast`, and `fast` compiled."""
    from diffusers_vae import fast

    def build() -> Any:
        torch.manual_seed(0)
        vae = stock_vae(3, sizes.widths, layers_per_block=2)
        return torch.nn.Module.to(vae, DEVICE, torch.bfloat16).eval().requires_grad_(False)

    kinds = {"stock": build(), "fast": fast(build()), "fast, compiled": fast(build(), compiled=True)}
    ways = {  # of a vae and images or latents of a side
        "encode": (lambda vae, given: vae.encode(given).latent_dist.mean, 3, 1, 32),
        "decode": (lambda vae, given: vae.decode(given).sample, 4, 2 ** (len(sizes.widths) - 1), 16),
    }
    rows = []
    for name, (work, channels, ratio, batch) in ways.items():
        for side in sizes.sides:
            count = max(1, batch * sizes.sides[0] ** 2 // side**2)
            given = torch.randn(count, channels, side // ratio, side // ratio, device=DEVICE, dtype=torch.bfloat16)
            calls = {kind: partial(work, vae, given) for kind, vae in kinds.items()}
            found: dict[str, list[float]] = {kind: [] for kind in kinds}
            gib = {kind: memory_of_call(calls[kind], kinds[kind]) for kind in kinds}  # a warm-up, too
            for _ in range(sizes.rounds):
                for kind, call in calls.items():
                    found[kind].append(1000 * seconds_of(call, sizes.seconds) / count)
            texts = {kind: f"{median(each):.2f} ms{gib[kind]}" for kind, each in found.items()}
            best = min(("fast", "fast, compiled"), key=lambda kind: median(found[kind]))
            quick = "; ".join(f"{kind} {texts[kind]}" for kind in ("fast", "fast, compiled"))
            gain = median(a / b for a, b in zip(found["stock"], found[best], strict=True))
            what = f"{name} {side}x{side}, batch {count}, an image"
            rows.append(row(what, quick, f"stock {texts['stock']}", gain, milliseconds=found))
    return rows


def memory_of_call(call: Callable[[], Any], vae: torch.nn.Module) -> str:
    """The memory that the weights and a call take, as text; nothing on a CPU. Called before, so that it is warm."""
    seconds_of(call, 0.0)
    if DEVICE.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds_of(call, 0.0)
    weights = sum(tensor.nbytes for tensor in vae.state_dict().values())
    return f", {(torch.cuda.max_memory_allocated() - before + weights) / 2**30:.2f} GiB"


def cache(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """The latent cache from files to files, against the plain loop."""
    images = Path(folder, "images", "all")
    images.mkdir(parents=True)
    for index, pixels in enumerate(write_images(Path(folder, "images.npy"), sizes.encoded, sizes.side)):
        Image.fromarray(pixels).save(images / f"{index}.jpg", quality=95)
    data = {"data.name": "folder", "data.root": images.parent, "data.channels": 3, "data.resolution": sizes.side}
    settings = data | {"block_out_channels": list(sizes.widths), "rounds": sizes.rounds + 1}
    latent_cache.main(flags(settings | {"out": f"{folder}/cache.json"}))
    found = json.loads(Path(folder, "cache.json").read_text())
    loop, ours = (found["images per second"][name] for name in ("plain loop", "ours"))
    return [beside(f"latent cache, {sizes.encoded:,} JPEGs of {sizes.side}x{sizes.side}", ours, "plain loop", loop)]


def evaluation(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """An evaluation with rFID, in seconds."""
    from diffusers_vae import VAE, Gaussian, VAEObjective
    from diffusers_vae.data import load_split
    from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate

    write_images(Path(folder, "images.npy"), sizes.evaluated, sizes.side)
    data = DataConfig("array", f"{folder}/images.npy", channels=3, resolution=sizes.side)
    images, _ = load_split(data, "all")
    vae = VAE.from_diffusers(stock_vae(3, sizes.widths, layers_per_block=2).eval().to(DEVICE))
    missing, rows = missing_weights("inception"), []
    for rfid in (False, True):
        what = f"evaluate {len(images):,} images of {sizes.side}x{sizes.side}{' with rFID' if rfid else ''}"
        if rfid and missing:
            rows.append(left_out(what, missing))
            continue
        began = time.perf_counter()
        evaluate(vae, images, VAEObjective(Gaussian(0.1)), EvaluationConfig(rfid=rfid))
        seconds = time.perf_counter() - began
        rows.append(row(what, f"{seconds:.1f} s", f"{len(images) / seconds:,.0f} img/s", seconds=seconds))
    return rows


def resume(sizes: Sizes, root: str | None, folder: str) -> list[Row]:
    """Whether a run that is continued halfway ends with the bytes of one that went through."""
    rows = []
    for precision in ("bf16", "no"):
        whole, continued = (Path(folder, f"{name}-{precision}") for name in ("whole", "continued"))
        settings = {"run.max_images": sizes.resumed, "run.checkpoint_every": sizes.resumed // 2, "run.tracker": "null"}
        settings |= {"run.keep_checkpoints": 100, "evaluation.max_images": 8, "run.deterministic": "true"}
        command = [*LAUNCH, str(SCRIPT), *flags(settings | {"run.mixed_precision": precision})]
        follow([*command, "--run.output_dir", str(whole)], sizes.resumed)
        shutil.copytree(whole, continued)  # as it was when it had written its first checkpoint
        first, last = min((continued / "checkpoints").iterdir()), max((continued / "checkpoints").iterdir())
        shutil.rmtree(last)
        (continued / "evaluation.json").unlink()
        shutil.rmtree(continued / "model")
        follow([*command, "--run.output_dir", str(continued)], sizes.resumed)
        bytes_of = [(run / "checkpoints" / last.name / "model.safetensors").read_bytes() for run in (whole, continued)]
        same = first != last and bytes_of[0] == bytes_of[1]
        what = f"resumed run, {'float32' if precision == 'no' else precision}, run.deterministic true"
        rows.append(row(what, "bit-identical" if same else "NOT bit-identical", same=same))
    return rows


PARTS: dict[str, Callable[[Sizes, Any, str], list[Row]]] = {
    "article": article, "digits": digits, "f8": f8, "step": step, "step-f8": step_f8, "inference": inference,
    "cache": cache, "evaluation": evaluation, "mlps": mlps, "resume": resume,
}  # fmt: skip
NEED_ROOT = ("article", "mlps")
