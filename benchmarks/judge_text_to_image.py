"""Judge a text-to-image pipeline that was trained on MNIST or scikit-learn's digits: does it draw the digit asked for,
as real ones look, and each time another? README.md beside this file defines the figures.

    python benchmarks/judge_text_to_image.py runs/mnist-t2i/pipeline --data.name mnist --data.root data
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from diffusers_vae.data import IMAGE_SUFFIXES, ArrayImages, DataConfig, deal, load_data, shuffled
from diffusers_vae.evaluation.metrics import frechet_distance
from diffusers_vae.images.grid import to_pil
from diffusers_vae.images.ranges import to_model_range, to_uint8
from diffusers_vae.models import weights_hash

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BARS = {"mnist": 0.98, "digits": 0.97}
"""Accuracy on real held-out images below which the classifier is no judge."""
EPOCHS = {"mnist": 2, "digits": 15}
FITS = {"mnist": "pad", "digits": "crop"}
"""As in the presets mnist-vae.yaml and digits.yaml."""
BATCH = 500
"""Images per forward where nothing is learned."""


class Classifier(nn.Module):
    """Ten logits of images (B, C, H, W) in [-1, 1]; `features` are the 64 values before the last layer."""

    def __init__(self, channels: int):
        super().__init__()
        layers, widths = [], (channels, 16, 32, 64)
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], 64), nn.ReLU()
        )
        self.last = nn.Linear(64, len(WORDS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(images))


def train_classifier(real: ArrayImages, epochs: int, seed: int, device: torch.device) -> Classifier:
    """Adam with a learning rate that falls to 0; in evaluation mode."""
    torch.manual_seed(seed)
    classifier = Classifier(real.pixels.shape[1]).to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    batches = [
        batch for epoch in range(epochs) for (batch,) in deal(shuffled(len(real), 64, seed, epoch, 0), seed, epoch)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in tqdm(batches, "classifier"):
        logits = classifier(to_model_range(real.pixels[batch.indices].to(device)))
        functional.cross_entropy(logits, real.labels[batch.indices].to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return classifier.eval()


@torch.no_grad()
def look(classifier: Classifier, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits (N,) that the classifier sees in uint8 pixels (N, C, H, W), and its features (N, 64)."""
    device = classifier.last.weight.device
    features = torch.cat([classifier.features(to_model_range(part.to(device))) for part in pixels.split(BATCH)])
    return classifier.last(features).argmax(1).cpu(), features.cpu()


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share: Wilson 1927."""
    z, share = 1.959964, right / count
    centre = share + z**2 / (2 * count)
    half = z * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((centre + side * half) / (1 + z**2 / count) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def digits_in_turn(count: int) -> torch.Tensor:
    """0, 1, ... 9, 0, 1, ... (count,): the order of prompts, and of the real images beside them."""
    return torch.arange(count) % len(WORDS)


def real_in_turn(labels: torch.Tensor, each: int) -> torch.Tensor:
    """Indices of the first `each` images of every digit, in the order of `digits_in_turn`."""
    return torch.stack([(labels == digit).nonzero().flatten()[:each] for digit in range(len(WORDS))], 1).flatten()


def spread(features: torch.Tensor) -> torch.Tensor:
    """Mean distance (10,) between the features (N, F), in the order of `digits_in_turn`, of two images of a digit."""
    return torch.stack([torch.pdist(features[digit :: len(WORDS)].double()).mean() for digit in range(len(WORDS))])


def judge(classifier: Classifier, pixels: torch.Tensor, real_features: torch.Tensor) -> dict[str, Any]:
    """The figures of uint8 pixels (N, C, H, W), beside features of real images; both in the order of `digits_in_turn`.
    Distance and diversity are of as many images as there are on both sides.
    """
    answers, features = look(classifier, pixels)
    right = answers == digits_in_turn(len(pixels))
    same = min(len(features), len(real_features))
    diversity = spread(features[:same]) / spread(real_features[:same])
    return {
        "images": len(pixels),
        "right": right.double().mean().item(),
        "right_interval": wilson_interval(int(right.sum()), len(right)),
        "right_per_digit": right.view(-1, len(WORDS)).double().mean(0).tolist(),
        "seen_per_digit": answers.bincount(minlength=len(WORDS)).tolist(),
        "frechet_distance": max(0.0, frechet_distance(real_features[:same], features[:same])),
        "images_in_distance": same,
        "diversity": diversity.mean().item(),
        "diversity_per_digit": diversity.tolist(),
    }


def load_pipeline(folder: Path, vae: str | None, device: torch.device) -> DiffusionPipeline:
    """The pipeline in a folder, loaded by stock diffusers."""
    place = next((path for path in (folder, folder / "pipeline") if (path / "model_index.json").is_file()), None)
    if place is None:
        raise FileNotFoundError(f"there is no pipeline in {folder.resolve()}: no model_index.json")
    if vae is not None and not (Path(vae) / "config.json").is_file():
        raise FileNotFoundError(f"there is no autoencoder in {Path(vae).resolve()}: no config.json")
    parts = {} if vae is None else {"vae": AutoencoderKL.from_pretrained(vae)}
    pipeline = DiffusionPipeline.from_pretrained(place, **parts).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts_in_turn(count: int, phrasings: Sequence[str]) -> list[str]:
    """One prompt per picture: the digits in turn and, after each ten, the next phrasing."""
    turns = [(phrasings[index // len(WORDS) % len(phrasings)], index % len(WORDS)) for index in range(count)]
    return [phrasing.format(word=WORDS[digit], number=digit) for phrasing, digit in turns]


def draw(
    pipeline: DiffusionPipeline, prompts: Sequence[str], guidance: float, steps: int, seed: int, batch_size: int
) -> torch.Tensor:
    """uint8 pixels (N, C, H, W); the noise of a picture depends on `seed` and its place alone."""
    pictures = []
    with tqdm(total=len(prompts), desc=f"guidance {guidance:g}", unit="img", disable=len(prompts) == 1) as bar:
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            seeds = [np.random.SeedSequence([seed, start + place]).generate_state(1)[0] for place in range(len(part))]
            generators = [torch.Generator().manual_seed(int(own)) for own in seeds]
            settings = {"guidance_scale": guidance, "num_inference_steps": steps, "generator": generators}
            drawn = pipeline(part, **settings, output_type="pt").images
            if not torch.isfinite(drawn).all():
                raise ValueError(f"the pipeline gives pictures that are not finite with guidance {guidance:g}")
            pictures.append(to_uint8(to_model_range(drawn.float())).cpu())
            bar.update(len(part))
    return torch.cat(pictures)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of the decoded modes of the posteriors of uint8 pixels (N, C, H, W)."""
    parts = (to_model_range(part.to(vae.device)) for part in pixels.split(BATCH // 5))
    return torch.cat([to_uint8(vae.decode(vae.encode(part).latent_dist.mode()).sample).cpu() for part in parts])


def table(judged: dict[str, dict[str, Any]]) -> str:
    """One line per set of pictures, and below them the shares digit by digit."""
    rows = [("", "right", "95 % interval", "Frechet distance", "diversity", "least of a digit")]
    by_digit = [("right, %", *WORDS)]
    for name, figures in judged.items():
        low, high = figures["right_interval"]
        shown = f"{figures['right']:.1%}", f"{low:.1%} to {high:.1%}", f"{figures['frechet_distance']:.3f}"
        rows.append((name, *shown, f"{figures['diversity']:.2f}", f"{min(figures['diversity_per_digit']):.2f}"))
        by_digit.append((name, *(f"{100 * share:.0f}" for share in figures["right_per_digit"])))
    return f"{_aligned(rows)}\n\n{_aligned(by_digit)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def contact_sheet(pictures: dict[str, torch.Tensor]) -> Image.Image:
    """The first hundred pictures of each set, a column per digit, side by side under the names of the sets."""
    scale = max(1, round(40 / next(iter(pictures.values())).shape[-1]))
    grids = [to_pil(to_model_range(pixels[:100]), len(WORDS), scale) for pixels in pictures.values()]
    width, height, title, gap = *grids[0].size, 18, 12
    sheet = Image.new("RGB", (len(grids) * (width + gap) - gap, height + title), "white")
    for place, (name, grid) in enumerate(zip(pictures, grids, strict=True)):
        sheet.paste(grid, (place * (width + gap), title))
        ImageDraw.Draw(sheet).text((place * (width + gap) + 4, 3), name, fill="black")
    return sheet


def facts(pipeline: DiffusionPipeline, arguments: Sequence[str]) -> dict[str, Any]:
    """What was run, with what; of absolute paths the last part alone, since the rest is the machine's."""
    told = (Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments)
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    return {
        "command": " ".join(["python benchmarks/judge_text_to_image.py", *told]),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("diffusers-vae", "torch", "diffusers", "transformers")},
        "device": pipeline.device.type,
        "pipeline": {"class": type(pipeline).__name__, **{name: type(part).__name__ for name, part in parts.items()}},
        "weights": {name: weights_hash(part) for name, part in parts.items() if isinstance(part, nn.Module)},
    }


def run(settings: argparse.Namespace, arguments: Sequence[str]) -> None:
    """All of it, with what is most likely to fail first."""
    for file in filter(None, (settings.out, settings.picture)):
        file.parent.mkdir(parents=True, exist_ok=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    pipeline = load_pipeline(settings.pipeline, settings.vae, device)
    prompts = prompts_in_turn(settings.count, settings.prompts)
    how = {"steps": settings.steps, "seed": settings.seed, "batch_size": settings.batch_size}
    channels, *size = draw(pipeline, prompts[:1], settings.guidance[0], **how).shape[1:]
    fit = FITS[settings.name]
    config = DataConfig(settings.name, settings.root, resolution=tuple(size), channels=channels, fit=fit)
    train, heldout = load_data(config)

    classifier = train_classifier(train, EPOCHS[settings.name], settings.seed, device)
    right = int((look(classifier, heldout.pixels)[0] == heldout.labels).sum())
    accuracy, interval = right / len(heldout), wilson_interval(right, len(heldout))
    print(
        f"classifier: right on {accuracy:.2%} of {len(heldout):,} real held-out images "
        f"({interval[0]:.2%} to {interval[1]:.2%})"
    )
    if accuracy < BARS[settings.name]:
        raise ValueError(
            f"the classifier must be right on {BARS[settings.name]:.0%} of them to judge; try another --seed"
        )

    each = min(settings.count // len(WORDS), *heldout.labels.bincount().tolist(), *train.labels.bincount().tolist())
    real = heldout.pixels[real_in_turn(heldout.labels, each)]
    real_features = look(classifier, real)[1]
    pictures = {
        "real training images": train.pixels[real_in_turn(train.labels, each)],
        "reconstructions": reconstruct(pipeline.vae, real),
    }
    drawn = {f"guidance {value:g}": draw(pipeline, prompts, value, **how) for value in settings.guidance}
    judged = {name: judge(classifier, pixels, real_features) for name, pixels in (pictures | drawn).items()}
    print(
        f"\n{settings.count:,} pictures per guidance, {settings.steps} steps, seed {settings.seed}; distance and "
        f"diversity of {len(real):,} pictures against as many held-out images\n\n{table(judged)}"
    )
    if settings.out:
        figures = {"accuracy": accuracy, "accuracy_interval": interval, "heldout_images": len(heldout)}
        told = {"count": settings.count, "steps": settings.steps, "seed": settings.seed, "prompts": settings.prompts}
        data = {"name": config.name, "resolution": size, "channels": channels, "fit": config.fit}
        data |= {"heldout_sha256": heldout.fingerprint(), "training_sha256": train.fingerprint()}
        whole = facts(pipeline, arguments) | {"data": data, **told, "classifier": figures, "judged": judged}
        settings.out.write_text(json.dumps(whole, indent=2) + "\n")
        print(f"\nfigures   {settings.out}")
    if settings.picture:
        contact_sheet(drawn).save(settings.picture)
        print(f"pictures  {settings.picture}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The settings; a wrong one ends the process with code 2 and a message that names it."""
    parser = argparse.ArgumentParser(
        description="Judge a text-to-image pipeline that was trained on MNIST or scikit-learn's digits.",
        epilog="example: python benchmarks/judge_text_to_image.py runs/mnist-t2i/pipeline --data.name mnist "
        "--data.root data --picture judged.png",
        allow_abbrev=False,
    )
    parser.add_argument("pipeline", type=Path, help="Folder of a pipeline, or of a run with pipeline/.")
    parser.add_argument("--data.name", dest="name", choices=list(BARS), default="mnist", help="What it was trained on.")
    parser.add_argument("--data.root", dest="root", default="data", help="Where MNIST lies in torchvision's layout.")
    parser.add_argument("--count", type=int, default=1000, help="Pictures per guidance; a multiple of 10.")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 4, 7.5], help="1 is without guidance.")
    parser.add_argument("--steps", type=int, default=25, help="Of the sampler.")
    parser.add_argument("--seed", type=int, default=0, help="Of the classifier, and of the pictures' noise.")
    parser.add_argument("--batch_size", type=int, default=50, help="Pictures at once; they do not depend on it.")
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=["a handwritten {word}"],
        metavar="PHRASING",
        help="With {word} (zero) or {number} (0) for the digit; several are taken in turn. (a handwritten {word})",
    )
    parser.add_argument("--vae", help="Folder of an AutoencoderKL that takes the place of the pipeline's own.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures.")
    parser.add_argument("--picture", type=Path, help="Picture of a hundred pictures per guidance, a column per digit.")
    settings = parser.parse_args(arguments)
    if settings.count < 20 or settings.count % len(WORDS):
        parser.error(f"--count must be a multiple of 10, at least 20, got {settings.count}")
    if min(settings.guidance) < 1:
        parser.error(f"--guidance must be at least 1, which is none, got {min(settings.guidance):g}")
    for name in ("steps", "batch_size"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if settings.seed < 0:
        parser.error(f"--seed must be at least 0, got {settings.seed}")
    for phrasing in settings.prompts:
        try:
            told = phrasing.format(word="zero", number=0) != phrasing
        except (IndexError, KeyError, ValueError):
            told = False
        if not told:
            parser.error(f"--prompts must name the digit as {{word}} or {{number}}, got {phrasing!r}")
    if settings.picture and settings.picture.suffix.lower() not in IMAGE_SUFFIXES:
        parser.error(f"--picture must be a picture, {', '.join(IMAGE_SUFFIXES)}, got {settings.picture}")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 after an error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settings = parse(arguments)
    try:
        run(settings, arguments)
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
