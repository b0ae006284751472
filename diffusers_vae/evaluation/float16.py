"""Safety of float16 for an autoencoder: its largest activations on real images, and a run in float16."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..data import ImageSet, image_batches
from ..models import decode, encode
from ..models.stock import ModelMixin
from ..processes import gather_parts, process_share
from .metrics import psnr

LARGEST = torch.finfo(torch.float16).max
"""65,504, the largest float16 number: 65,520 or more becomes infinite."""
MARGIN = 4
"""Safety factor: all activations must stay below `LARGEST` / `MARGIN`. The measured images are a sample, and latents
from a diffusion model differ from those of images. In the decoders of two presets, an image reached up to 1.7 times the
median image's largest activation of a layer, and latents sampled from N(0, I) up to 2.1 times the largest of 128
images. The factor is twice that."""
EXACT = 20 * math.log10(255)
"""PSNR in dB of an error whose root mean square is one 8-bit step, 48.13. Above it, float16 makes no visible
difference. Trained models reached 70 and more."""


@dataclass(frozen=True)
class PrecisionReport:
    """Effect of float16 on an autoencoder, measured on real images."""

    images: int
    """Number of measured images."""
    blocks: dict[str, float]
    """Largest absolute float32 activation of each block, over its output and every module in it, in execution order;
    encoder.* and quant_conv encode, decoder.* and post_quant_conv decode."""
    overflow: str | None
    """First block with an activation above 65,504 in float32 or a non-finite one in float16."""
    fp16_psnr: float | None
    """Smallest PSNR of an image's float16 reconstruction against the float32 one, dB; at most 100, None if float16
    overflows."""
    verdict: str
    """overflows, close, inexact or safe."""
    advice: str
    """Consequence of the verdict for force_upcast."""

    @property
    def safe(self) -> bool:
        """Return whether force_upcast can be false."""
        return self.verdict == "safe"


def _verdict(blocks: dict[str, float], overflow: str | None, fp16_psnr: float | None) -> tuple[str, str]:
    if overflow:
        return "overflows", f"Float16 overflows in {overflow}: keep force_upcast true."
    highest = max(blocks, key=blocks.__getitem__)
    if blocks[highest] * MARGIN > LARGEST:
        return "close", (
            f"Float16 is close to overflow: {highest} reaches {blocks[highest]:,.0f}, more than 1/{MARGIN} of the "
            f"{LARGEST:,.0f} at which float16 ends, and other images may reach more. Keep force_upcast true."
        )
    if fp16_psnr is not None and fp16_psnr < EXACT:
        return "inexact", (
            f"Float16 is inexact: nothing overflows, but its reconstruction of an image has a PSNR of {fp16_psnr:.2f} "
            f"dB against float32's, and an error of one step of 8 bits has {EXACT:.2f} dB. Keep force_upcast true."
        )
    return "safe", "Float16 is safe: force_upcast can be false."


@torch.no_grad()
def measure_precision(
    model: ModelMixin, image_set: ImageSet, batch_size: int, max_images: int | None = None, progress: bool = False
) -> PrecisionReport:
    """Measure whether `model`, in eval mode, can run in float16: the largest activations of a float32 copy on the first
    `max_images` images, by default all, each encoded and the mode of its posterior decoded, and the same in float16.

    It is safe if nothing overflows, all activations stay `MARGIN` times below the largest float16 number, and the two
    reconstructions differ by less than one 8-bit step, `EXACT`. Values that no module outputs, such as products within
    attention, are covered only by the run in float16, as computed on this device.

    Under torch.distributed, all processes must call it with the same model. They share the work, and the report equals
    one from a single process.

    Args:
        model: Any autoencoder of diffusers with `encode(...).latent_dist` and `decode(...).sample`, of any dtype. It is
            copied twice on its device.
        image_set: The images.
        batch_size: Images per forward.
        max_images: Maximum number of images.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no image can be read, the model does not take such images, or its float32 activations are not
            finite.
    """
    rank, processes = process_share()
    exact, half = copy.deepcopy(model).float(), copy.deepcopy(model).half()
    in_exact, in_half = _watch(exact), _watch(half)
    closeness: list[float] = []
    count = len(image_set) if max_images is None else min(max_images, len(image_set))
    with tqdm(total=count, desc="float16", unit="img", disable=not progress or rank > 0, leave=False) as bar:
        for _, indices, images in image_batches(image_set, batch_size, max_images, model.device, rank, processes):
            reconstructions, of_half = (decode(each, encode(each, images).mode()) for each in (exact, half))
            closeness += psnr(reconstructions.clamp(-1, 1), of_half).tolist()
            bar.update(min(len(indices) * processes, count - bar.n))
    largest = [{name: value.item() for name, value in watched.items()} for watched in (in_exact, in_half)]
    parts: list[Any] = [part for part in gather_parts([(rank, *largest, closeness)]) if part[3]]
    if not parts:
        raise ValueError("no image to measure the activations of can be read")
    blocks = {name: max(part[1][name] for part in parts) for name in parts[0][1]}
    for name in blocks:
        if not all(math.isfinite(part[1][name]) for part in parts):
            raise ValueError(f"the activations of the model are not finite in float32 already, first in {name}")
    finite = {name: all(math.isfinite(part[2][name]) for part in parts) for name in blocks}
    overflow = next((name for name in blocks if blocks[name] > LARGEST or not finite[name]), None)
    closeness = [value for part in parts for value in part[3]]
    fp16_psnr = None if overflow else min(closeness)
    return PrecisionReport(len(closeness), blocks, overflow, fp16_psnr, *_verdict(blocks, overflow, fp16_psnr))


def _watch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the largest absolute activation so far by block, in the order in which blocks first ran. Every later
    forward of `model` updates it.
    """
    largest: dict[str, torch.Tensor] = {}

    def note(block: str, output: object) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                value = tensor.abs().amax().float()
                largest[block] = torch.maximum(largest.get(block, value), value)  # maximum keeps NaN

    for name, module in model.named_modules():
        if block := _block(name):
            module.register_forward_hook(lambda _, inputs, output, block=block: note(block, output))
    return largest


def _block(name: str) -> str | None:
    """Return the block of a module: decoder.up_blocks.2, decoder.conv_out, quant_conv; None if it contains several
    blocks.
    """
    top, *inner = name.split(".")
    if top not in ("encoder", "decoder"):
        return top or None
    length = 2 if len(inner) > 1 and inner[1].isdigit() else 1
    return ".".join([top, *inner[:length]]) if inner else None
