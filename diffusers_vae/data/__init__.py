"""Where images come from, and in which order."""

from .order import MicroBatch, epoch_batches, image_batches
from .sources import ArrayImages, DataConfig, FolderImages, ImageSet, load_data

__all__ = [
    "ArrayImages",
    "DataConfig",
    "FolderImages",
    "ImageSet",
    "MicroBatch",
    "epoch_batches",
    "image_batches",
    "load_data",
]
