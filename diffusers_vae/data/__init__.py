"""Where images come from, and in which order."""

from .arrays import ArrayStore
from .look import Look, look, recommended
from .order import MicroBatch, Read, TrainingSet, deal, epoch_batches, step_generator
from .reading import image_batches, kept_images, read_ahead
from .rows import RowStore, is_hub_id
from .sources import (
    IMAGE_SUFFIXES,
    IN_MEMORY,
    OF_ROWS,
    OF_TRAINING,
    PLACED,
    ArrayImages,
    DataConfig,
    ImageSet,
    ReadImages,
    StoredImages,
    holds_rows,
    kind_at,
    load_data,
    load_split,
    refuse_colours,
)
from .store import FileStore, Store

__all__ = [
    "IMAGE_SUFFIXES",
    "IN_MEMORY",
    "OF_ROWS",
    "OF_TRAINING",
    "PLACED",
    "ArrayImages",
    "ArrayStore",
    "DataConfig",
    "FileStore",
    "ImageSet",
    "Look",
    "MicroBatch",
    "Read",
    "ReadImages",
    "RowStore",
    "Store",
    "StoredImages",
    "TrainingSet",
    "deal",
    "epoch_batches",
    "holds_rows",
    "image_batches",
    "is_hub_id",
    "kept_images",
    "kind_at",
    "load_data",
    "load_split",
    "look",
    "read_ahead",
    "recommended",
    "refuse_colours",
    "step_generator",
]
