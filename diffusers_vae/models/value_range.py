"""The value range that a model was trained with."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..images.ranges import RANGE_FILE, ValueRange
from ..messages import hiding_passwords, showable
from .load import find_subfolder

logger = logging.getLogger(__name__)


def find_value_range(source: str, subfolder: str | None = None, revision: str | None = None) -> ValueRange | None:
    """What the model that `load_autoencoder` finds says of the values in files; None for one of images of 8 bits.

    Raises:
        OSError: when the Hub does not answer as it should.
        ValueError: when what it says is no range.
    """
    if Path(source).exists():
        return ValueRange.load(Path(source, find_subfolder(source, subfolder) or ""))
    with hiding_passwords():
        try:
            file = hf_hub_download(source, RANGE_FILE, subfolder=subfolder, revision=revision)
        except LocalEntryNotFoundError:
            said = "%s is taken for a model of images of 8 bits: there is no network to ask for more"
            logger.warning(said, showable(source))
            return None
        except EntryNotFoundError:
            return None
    return ValueRange.load(Path(file).parent)


def check_value_range(
    stated: ValueRange | None, source: str, subfolder: str | None = None, revision: str | None = None
) -> None:
    """Raise ValueError when data.value_range is `stated` otherwise than the model was trained to."""
    known = find_value_range(source, subfolder, revision)
    if known and known != stated:
        raise ValueError(f"data.value_range must be {known}, to which {source} was trained, got {stated or 'null'}")
