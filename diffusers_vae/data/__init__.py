"""Where images come from, and in which order."""

from .look import Look, look, recommended
from .order import MicroBatch, epoch_batches, image_batches, kept_images, read_ahead, step_generator
from .sources import (
    IMAGE_SUFFIXES,
    ArrayImages,
    DataConfig,
    ImageSet,
    ReadImages,
    StoredImages,
    load_data,
    load_split,
)
from .store import FileStore, Store

__all__ = [
    "IMAGE_SUFFIXES",
    "ArrayImages",
    "DataConfig",
    "FileStore",
    "ImageSet",
    "Look",
    "MicroBatch",
    "ReadImages",
    "Store",
    "StoredImages",
    "epoch_batches",
    "image_batches",
    "kept_images",
    "load_data",
    "load_split",
    "look",
    "read_ahead",
    "recommended",
    "step_generator",
]
