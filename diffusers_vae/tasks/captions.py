"""Captions of images, or their labels in phrases."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

DIGIT_PHRASES = (
    "a handwritten {name}",
    "the digit {number}",
    "a {name}",
    "a handwritten {number}",
    "the number {name}",
    "{number}",
)
PHRASES = ("a picture of a {name}", "a {name}", "{name}")


class Captions:
    """Captions of a set of images, one or more per image."""

    def __init__(self, captions: Sequence[Sequence[str]]):
        self.distinct = list(dict.fromkeys(text for texts in captions for text in texts))
        row_of = {text: row for row, text in enumerate(self.distinct)}
        self.rows = torch.tensor([row_of[text] for texts in captions for text in texts])
        self.counts = torch.tensor([len(texts) for texts in captions])
        self.firsts = self.counts.cumsum(0) - self.counts

    def to(self, device: torch.device) -> Captions:
        """Return the captions with tensors on `device`."""
        moved = copy(self)
        for name in ("rows", "counts", "firsts"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def choose(self, indices: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """Return a row of `distinct` (B,) for each image of `indices` (B,), chosen by numbers (B,) in [0, 1)."""
        counts = self.counts[indices]
        chosen = (chance * counts).long().minimum(counts - 1)  # a float32 product may round up
        return self.rows[self.firsts[indices] + chosen]


def captions_of(
    captions: Sequence[Sequence[str]] | None,
    labels: torch.Tensor | None,
    classes: Sequence[str] | None,
    phrases: Sequence[str] | None,
    digits: bool,
    part: str = "training",
) -> Sequence[Sequence[str]]:
    """Return one or more captions per image: its captions, or otherwise its label in every phrase. `part` names the
    images in errors.

    Raises:
        ValueError: if there are neither captions nor labels, or both captions and phrases.
    """
    if captions is not None:
        if phrases is not None:
            raise ValueError(
                "captions.phrases are for labels, and these images have captions of their own, in metadata.jsonl or "
                ".txt files; leave out captions.phrases"
            )
        return captions
    if labels is None:
        raise ValueError(
            f"text-to-image needs captions or labels of the {part} images: a metadata.jsonl with file_name and text, a "
            ".txt file beside each image, or a subfolder for each class"
        )
    spoken = phrases or (DIGIT_PHRASES if digits else PHRASES)
    names = classes or [str(number) for number in range(int(labels.max()) + 1)]
    of_class = [
        tuple(dict.fromkeys(phrase.format(name=name, number=number) for phrase in spoken))
        for number, name in enumerate(names)
    ]
    return [of_class[label] for label in labels.tolist()]
