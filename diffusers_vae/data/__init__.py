"""Image sets, and the order in which training reads them."""

from .config import IN_MEMORY, PLACED, DataConfig
from .files import ARCHIVES, OWN_PICTURES, Files
from .folders import no_image
from .kinds import IMAGE_SUFFIXES, holds_rows, is_hub_id, kind_at
from .load import load_data, load_split, refuse_colours
from .look import Look, Recommended, look, recommended
from .order import MicroBatch, Read, TrainingSet, deal, shuffled, step_generator
from .reading import image_batches, kept_images, read_ahead
from .sets import ArrayImages, ImageSet, ReadImages, Records, StoredImages
from .store import FileStore, left_out

__all__ = [
    "ARCHIVES",
    "IMAGE_SUFFIXES",
    "IN_MEMORY",
    "OWN_PICTURES",
    "PLACED",
    "ArrayImages",
    "DataConfig",
    "FileStore",
    "Files",
    "ImageSet",
    "Look",
    "MicroBatch",
    "Read",
    "ReadImages",
    "Recommended",
    "Records",
    "StoredImages",
    "TrainingSet",
    "deal",
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
    "shuffled",
    "step_generator",
]
