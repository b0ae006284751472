"""Settings of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torchvision.transforms import v2

from ..fields import at_home, check, only_with, setting
from ..images.files import OVERSIZE
from ..images.ranges import ValueRange
from ..images.raw_files import as_they_are
from .kinds import is_hub_id, kind_at

IN_MEMORY = ("digits", "mnist", "qmnist", "fashion-mnist", "cifar10")
"""Names of sets with images of one size, which are kept in memory."""
PLACED = ("folder", "array", "datasets")
"""Names of sets that `data.root` locates."""


@dataclass(frozen=True)
class DataConfig:
    """Images, and how they are read, resized and augmented."""

    name: Literal["digits", "mnist", "qmnist", "fashion-mnist", "cifar10", "folder", "array", "datasets"] | None = None
    """Data set, or kind of files at `root`; null: detected from `root`, or digits without one (docs/images.md)."""
    root: str | None = setting(None, "free", "local")
    """Folder, archive, array, Parquet file or NAMESPACE/NAME on the Hub (docs/images.md), or download folder of
    torchvision's sets; null: data."""
    subset: str | None = only_with(None, "of_rows", name=("datasets",))
    """Configuration of a data set of rows, if it has several."""
    revision: str | None = only_with(None, "of_rows", "local", name=("datasets",))
    """Branch, tag or commit of a data set on the Hub; null: the newest."""
    image_column: str | None = only_with(None, "of_rows", name=("datasets", "array"))
    """Column or .npz key of the images; null: the only image column, or the only array with three or four axes."""
    label_column: str | None = only_with(None, "of_rows", name=("datasets", "array"), streaming=False)
    """Column or .npz key of the labels; null: the only ClassLabel column, or none of an .npz."""
    caption_column: str | None = only_with(None, "of_rows", name=("datasets",), streaming=False)
    """Column of the captions, each a string or a list of strings; null: text, caption or prompt."""
    resolution: int | tuple[int, int] = setting(32, "any_set")
    """Side of the images in pixels, or [height, width]."""
    channels: int | None = setting(None, "any_set", "kept", at_least=1)
    """1: grey; 3: RGB; others: unconverted files with that many channels; null: 1 if all images are grey, else 3
    (docs/images.md)."""
    value_range: tuple[float, float] | None = only_with(None, "any_set", name=PLACED)
    """[low, high] of the values in the files, mapped to [-1, 1] without other conversion; null: 8-bit values
    (docs/images.md)."""
    fit: Literal["crop", "pad"] = only_with("crop", "any_set", crops=False)
    """crop: scale the image to cover the resolution and crop the centre; pad: add black borders, and scale only if too
    large."""
    crops: int | Literal["random"] | None = only_with(None, at_least=1, name=PLACED)
    """Number of random crops per image, fixed for the whole run, instead of resizing the image; random: a new crop in
    every epoch."""
    horizontal_flip: bool = setting(False, "training")
    """Mirror each training image with probability 0.5 in every epoch."""
    vertical_flip: bool = setting(False, "training")
    """Flip each training image upside down with probability 0.5 in every epoch."""
    color_jitter: tuple[float, float, float, float] | None = setting(None, "training")
    """[brightness, contrast, saturation, hue]: largest random change of training images, as in torchvision's
    ColorJitter."""
    on_bad_image: Literal["stop", "skip"] = only_with("stop", "any_set", "free", "local", name=PLACED)
    """What to do with unreadable files; stop: raise an error that names them; skip: leave them out and list them in
    bad_images.txt."""
    heldout_fraction: float = only_with(0.1, above=0, below=1, name=("digits", *PLACED))
    """Fraction of images to hold out, the same in every run, if the set has no held-out part (docs/images.md)."""
    streaming: bool = only_with(False, name=("datasets",))
    """Read Parquet files one row group at a time during training, without preparing the whole set first
    (docs/images.md)."""
    shuffle_buffer: int = only_with(4096, "training", at_least=1, streaming=True)
    """Number of images of a stream, over all processes, that are shuffled together; their files stay in memory."""
    num_workers: int = setting(2, "any_set", "free", "local", at_least=0)
    """Number of worker processes that read images, for a set that does not fit into memory."""

    def __post_init__(self):
        at_home(self, "root")
        if self.root == "":
            raise ValueError("data.root must name a folder, a file or a data set on the Hub, got an empty text")
        if self.name is None and self.root is None and self.channels not in (None, 1):
            raise ValueError(
                f"data.channels {self.channels} needs images that are named: give data.root, a folder for example, or "
                "data.name; without both, they are scikit-learn's digits, which are grey"
            )
        if self.name is None:
            object.__setattr__(self, "name", "digits" if self.root is None else kind_at(self.root))
        if self.root is None:
            object.__setattr__(self, "root", "data")
        if self.channels is None and self.name in IN_MEMORY:
            object.__setattr__(self, "channels", 3 if self.name == "cifar10" else 1)
        if self.name == "digits" and self.root != "data":  # which is what an older config.yaml states
            raise ValueError(
                f"data.root {self.root} would be ignored with data.name digits: leave out data.name, or set it to what "
                f"lies there, one of {', '.join(PLACED)}; or leave out data.root"
            )
        check("data", self)
        if self.value_range is not None:
            try:
                _ = self.stated_range
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"data.value_range must be [low, high], two finite increasing numbers, got {list(self.value_range)}"
                ) from error
        if self.as_they_are and self.name in IN_MEMORY:
            raise ValueError(
                f"data.channels {self.channels} is for files, and the images of {self.name} have 1 or 3 channels"
            )
        if min(self.size) < 8:
            raise ValueError(f"data.resolution must be at least 8 pixels a side, got {self.resolution}")
        for name in ("horizontal_flip", "vertical_flip"):
            if getattr(self, name) and self.name in ("digits", "mnist", "qmnist"):
                raise ValueError(f"data.{name} makes another sign of a digit: leave it out with data.name {self.name}")
        if self.color_jitter is not None:
            if self.channels not in (None, 1, 3):
                raise ValueError(f"data.color_jitter is for grey or RGB images, got data.channels {self.channels}")
            try:
                v2.ColorJitter(*self.color_jitter)
            except ValueError as error:
                raise ValueError(
                    "data.color_jitter must be [brightness, contrast, saturation, hue], each at least 0 and hue at "
                    f"most 0.5, got {list(self.color_jitter)}"
                ) from error
        if self.streaming and isinstance(self.crops, int):
            raise ValueError(f"with data.streaming true, data.crops must be random or null, got {self.crops}")

    @property
    def location(self) -> str:
        """Return the folder, file or Hub data set that `root` names."""
        assert self.root is not None
        return self.root

    @property
    def described(self) -> str:
        """Return the set's name: the name of the folder or file, or NAMESPACE/NAME on the Hub."""
        if self.name in PLACED and not (self.name == "datasets" and is_hub_id(self.location)):
            return Path(self.location).resolve().name
        return self.location if self.name == "datasets" else str(self.name)

    @property
    def run_folder(self) -> str:
        """Folder of a run on these images that is named after them."""
        file = Path(self.location) if self.name in PLACED else Path()
        return f"runs/{file.stem if file.is_file() else Path(self.described).name or 'images'}"

    @property
    def as_they_are(self) -> bool:
        """Return whether values in files are used without conversion to 8-bit grey or RGB."""
        return as_they_are(self.channels, self.stated_range)

    @property
    def stated_range(self) -> ValueRange | None:
        """Return the range of values in files that `value_range` states, or None."""
        return None if self.value_range is None else ValueRange(*self.value_range)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of pixels after reading: uint8 in [0, 255] or float32 in [0, 1]."""
        return torch.uint8 if self.value_range is None else torch.float32

    @property
    def resize(self) -> str:
        """Return a description of how images of another size are resized to `resolution`."""
        how = f"bicubic with antialiasing, on {'8-bit' if self.value_range is None else 'float32'} values"
        if self.crops is not None:
            positions = "a place" if self.crops == "random" else f"{self.crops} places"
            return f"cut out at {positions} of each, always the same; if smaller, scaled to cover ({how})"
        if self.name not in (*IN_MEMORY, "array") and not self.as_they_are:
            how += f"; JPEGs that are {2 * OVERSIZE} times as large or more, from a decode at reduced scale"
        if self.fit == "crop":
            return f"scaled to cover ({how}), then the centre is cut out"
        border = "black" if self.value_range is None else "the lowest value"
        return f"scaled if too large ({how}), then padded with {border}"

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of the images."""
        height, width = (self.resolution,) * 2 if isinstance(self.resolution, int) else self.resolution
        return height, width

    @property
    def changes_images(self) -> str:
        """Return the settings that change a training image from epoch to epoch, as text; empty if there are none."""
        unchanged = {"horizontal_flip": False, "vertical_flip": False, "color_jitter": None}
        changing = [name for name, value in unchanged.items() if getattr(self, name) != value]
        changing += ["crops"] * (self.crops == "random")
        return ", ".join(f"data.{name} {getattr(self, name)}" for name in changing)
