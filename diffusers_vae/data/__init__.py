"""Where images come from, and in which order."""

from .look import Look, look, recommended
from .order import MicroBatch, epoch_batches, image_batches, kept_images, read_ahead, step_generator
from .sources import (
    IMAGE_SUFFIXES,
    ArrayImages,
    DataConfig,
    FolderImages,
    ImageSet,
    ReadImages,
    first_images,
    load_data,
    load_split,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "ArrayImages",
    "DataConfig",
    "FolderImages",
    "ImageSet",
    "Look",
    "MicroBatch",
    "ReadImages",
    "epoch_batches",
    "first_images",
    "image_batches",
    "kept_images",
    "load_data",
    "load_split",
    "look",
    "read_ahead",
    "recommended",
    "step_generator",
]
