"""Where images come from, and in which order."""

from .order import MicroBatch, epoch_batches, image_batches, step_noise
from .sources import ArrayImages, DataConfig, FolderImages, ImageSet, ReadImages, load_data

__all__ = [
    "ArrayImages",
    "DataConfig",
    "FolderImages",
    "ImageSet",
    "MicroBatch",
    "ReadImages",
    "epoch_batches",
    "image_batches",
    "load_data",
    "step_noise",
]
