"""Where images come from, and in which order."""

from .arrays import ArrayStore
from .files import ARCHIVES, OWN_PICTURES, SIGNATURE, Files
from .folders import no_image
from .look import Look, look, recommended
from .order import MicroBatch, Read, TrainingSet, deal, epoch_batches, step_generator
from .reading import image_batches, kept_images, read_ahead
from .rows import RowStore, is_hub_id
from .sources import (
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
from .store import IMAGE_SUFFIXES, FileStore, Store, left_out

__all__ = [
    "ARCHIVES",
    "IMAGE_SUFFIXES",
    "IN_MEMORY",
    "OF_ROWS",
    "OF_TRAINING",
    "OWN_PICTURES",
    "PLACED",
    "SIGNATURE",
    "ArrayImages",
    "ArrayStore",
    "DataConfig",
    "FileStore",
    "Files",
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
    "left_out",
    "load_data",
    "load_split",
    "look",
    "no_image",
    "read_ahead",
    "recommended",
    "refuse_colours",
    "step_generator",
]
