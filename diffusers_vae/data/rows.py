"""Images in rows of tables: Hugging Face Hub data sets, Parquet, and other formats of `datasets`."""

from __future__ import annotations

import glob
import os
import pickle
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..messages import changed_logs, message, problem_list, without_passwords
from ..untrusted import refuse_irregular
from .captions import KEYS
from .config import DataConfig
from .files import is_output
from .kinds import PARQUET, is_hub_id, was_saved
from .parts import HELDOUT, TRAINING, VALIDATION, part_of, split_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features
    from pyarrow import ChunkedArray


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table."""

    image: str
    label: str | None
    caption: str | None


def find_columns(features: Features, config: DataConfig, captions: bool) -> Columns:
    """Return the columns that `config` names, by default the only ones of type Image and ClassLabel and, with
    `captions`, the one called text, caption or prompt; ValueError listing all columns if this is ambiguous.
    """
    images = [name for name, feature in features.items() if _type(feature) == "Image"]
    labels = [name for name, feature in features.items() if _type(feature) == "ClassLabel"]
    texts = [name for name in KEYS if name in features and _is_text(features[name])] if captions else []
    texts = [name for name in texts if name != "prompt"] or texts  # a prompt may accompany a caption

    def find(setting: str, only: list[str], what: str, fits: Callable[[Any], bool]) -> str | None:
        named = getattr(config, setting)
        if named is None and len(only) < 2:
            return next(iter(only), None)
        if named is None:
            reason = f"must say which column has the {what}, since {' and '.join(only)} could"
        elif named not in features:
            reason = f"must be a column with the {what}, got {named}, which does not exist"
        elif not fits(features[named]):
            reason = f"must be a column with the {what}, got {named} with {_kind(features[named])}"
        else:
            return named
        raise ValueError(f"data.{setting} {reason}. {listed}")

    kinds = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    listed = f"The columns of {config.described} are {kinds}"
    image = find("image_column", images, "images", _is_image)
    if image is None:
        raise ValueError(
            f"data.image_column must say which column has the images, since none is of type Image. {listed}"
        )
    return Columns(
        image,
        find("label_column", labels, "labels, whole numbers or words", _is_label),
        find("caption_column", texts, "captions, a string or a list of strings each", _is_text),
    )


def _type(feature: Any) -> str:
    return type(feature).__name__


def _kind(feature: Any) -> str:
    """Return a description of a column's type."""
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{name}: {_kind(inner)}" for name, inner in feature.items()) + "}"
    if _type(feature) == "ClassLabel":
        return f"ClassLabel of {feature.num_classes}"
    if (inner := _inner(feature)) is not None:
        return f"list of {_kind(inner)}"
    return feature.dtype if _type(feature) == "Value" else _type(feature)


def _inner(feature: Any) -> Any:
    """Return the type of the items of a column of lists."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _is_image(feature["bytes"])
    return _type(feature) == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_label(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", None))
    whole = re.fullmatch(r"u?int\d+|bool|string|large_string", dtype)
    return _type(feature) == "ClassLabel" or (_type(feature) == "Value" and whole is not None)


def _is_text(feature: Any) -> bool:
    inner = _inner(feature)
    return getattr(feature if inner is None else inner, "dtype", None) in ("string", "large_string")


def find_parts(names: Sequence[str], root: str) -> tuple[str, ...]:
    """Return the names of the training and the held-out split (`parts.split_of`), or of the only split; ValueError
    listing them if this is unclear.
    """
    if len(names) == 1:
        return (names[0],)
    split = split_of(names, alone=lambda: all(map(part_of, names)))
    if split and len(split.training) == len(split.heldout) == 1:
        return split.training[0], split.heldout[0]
    raise ValueError(
        f"it is not clear what to train on in {root}: it must have one split, or train and one of "
        f"{', '.join(HELDOUT)}, got {', '.join(names)}. Put the files of the splits to use, named so, in a "
        "folder and point data.root there; `hf download NAME --repo-type dataset --local-dir FOLDER` fetches a set"
    )


def unused_splits(names: Iterable[str], used: Iterable[str]) -> tuple[str, ...]:
    """Return a note that lists the unused splits, if there are any."""
    others = sorted({*map(str, names)} - {*used})
    return (f"unused, because other parts are used: {', '.join(others)}",) if others else ()


def open_rows(config: DataConfig, progress: bool = False) -> dict[str, Dataset]:
    """Return all splits of a set, memory-mapped. One process downloads and prepares it in the cache of `datasets`.

    Raises:
        OSError: If there is no such set, access is denied, or it cannot be loaded.
        ValueError: If a setting does not apply to it.
    """
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    try:
        if was_saved(Path(config.location)):
            _refuse(config, "subset", "revision")
            refuse_irregular(Path(config.location))
            with _explained(config):
                found = datasets.load_from_disk(config.location)
        else:
            builder = rows_builder(config)
            with _explained(config):
                builder.download_and_prepare()
                found = builder.as_dataset()
    finally:
        if shown:
            datasets.enable_progress_bars()
    if isinstance(found, datasets.Dataset):
        return {str(found.split or "train"): found}
    return {str(name): part for name, part in found.items()}


def rows_builder(config: DataConfig) -> DatasetBuilder:
    """Return the builder of `datasets` for Parquet or other files, on this machine or on the Hub, before they are
    downloaded.

    Raises:
        OSError: If there is no such set, access is denied, or the Hub cannot be reached.
        ValueError: If a setting does not apply to it.
    """
    import datasets
    from datasets import config as settings

    path = Path(config.location)
    if is_hub_id(config.location):
        with _explained(config):
            builder = datasets.load_dataset_builder(config.location, config.subset, revision=config.revision)
        from_cache = not str(builder.base_path).startswith("hf://")  # the cache returns its newest commit
        if from_cache and config.revision not in (None, builder.hash):
            raise OSError(
                f"cannot tell without a connection to {without_passwords(settings.HF_ENDPOINT)} whether "
                f"data.revision {config.revision} of {config.location} is what the cache holds, the commit "
                f"{builder.hash}; if so, name it"
            )
        return builder
    if path.is_dir():
        _refuse(config, "revision")
        refuse_irregular(path)
        with _explained(config):
            return _folder_builder(path.resolve(), config.subset)
    if not path.is_file() or path.suffix.lower() != PARQUET:
        raise FileNotFoundError(
            f"data.root must be a data set on the Hub, NAMESPACE/NAME, a folder or a {PARQUET} file, got "
            f"{path.resolve()}, which is {'another file' if path.exists() else 'not there'}"
        )
    _refuse(config, "subset", "revision")
    with _explained(config):
        return datasets.load_dataset_builder("parquet", data_files={"train": [glob.escape(str(path.resolve()))]})


def _folder_builder(root: Path, subset: str | None) -> DatasetBuilder:
    """Return the builder for a folder, without this package's outputs. If `datasets` finds one split, the names of
    Parquet files and of their folders may still mean parts (`parts.split_of`).
    """
    import datasets

    files, written = [], False
    for parent, folders, names in os.walk(root):
        if is_output(parent, names):
            written = True
            folders.clear()
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(PARQUET)]
    whole = None if written and files else datasets.load_dataset_builder(str(root), subset)
    if whole is not None:
        found = whole.config.data_files or {}
        if whole.name != "parquet" or len(found) != 1:
            return whole
        files = [str(file) for file in next(iter(found.values()))]
    paths = [Path(file).relative_to(root).parts for file in files]
    while len({path[0] for path in paths}) == 1 and all(path[1:] for path in paths):
        paths = [path[1:] for path in paths]
    is_file = {path[0]: len(path) == 1 for path in paths}
    named = {name: part for name, inner in is_file.items() if (part := part_of(name, inner))}
    split = split_of(is_file, is_file.__getitem__, lambda: len(named) == len(is_file))
    if split is None and whole is not None:
        return whole
    chosen: dict[str, list[str]] = {}
    for file, path in zip(files, paths, strict=True):
        word = named[path[0]].word if split and path[0] in named else "train"
        name = "train" if word in TRAINING else "validation" if word in VALIDATION else "test"
        if split is None or path[0] in named:
            chosen.setdefault(name, []).append(glob.escape(file))
    return datasets.load_dataset_builder("parquet", data_files=chosen)


def own_folders(root: str) -> tuple[str, ...]:
    """Return the folders whose files a set's rows may name: the set's folder, its downloads, and unpacked archives."""
    from datasets import config as settings
    from huggingface_hub.constants import HF_HUB_CACHE

    if is_hub_id(root):
        folders = [str(Path(HF_HUB_CACHE) / f"datasets--{root.replace('/', '--')}")]
        folders += [str(settings.DOWNLOADED_DATASETS_PATH)]
    else:
        folders = [str(Path(root).resolve() if Path(root).is_dir() else Path(root).resolve().parent)]
    return (*folders, str(settings.EXTRACTED_DATASETS_PATH))


def _refuse(config: DataConfig, *settings: str) -> None:
    for setting in settings:
        if (value := getattr(config, setting)) is not None:
            raise ValueError(f"data.{setting} must be null for {Path(config.location).resolve()}, got {value}")


@contextmanager
def _explained(config: DataConfig) -> Generator[None]:
    """Convert any error into one line with advice, without causes and signed addresses."""
    from datasets import config as settings
    from datasets.exceptions import DatasetNotFoundError

    try:
        with changed_logs(message):
            yield
        return
    except Exception as error:  # the client's errors have no common base and differ between versions
        cause = f"{error.__cause__}" if error.__cause__ and "generating" in str(error) else ""
        said = " ".join(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?***", f"{error} {cause}").split())
        page = f"{settings.HF_ENDPOINT}/datasets/{config.location}"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        if "BuilderConfig" in said or "Config name" in said:
            kind, reason = ValueError, f"data.subset must name one of its configurations, got {config.subset} ({said})"
        elif "Revision" in said:
            reason = f"data.revision must be a branch, a tag or a commit of it, got {config.revision} ({said})"
        elif "gated" in said:
            reason = f"it is gated. Ask for access on {page}, and log in with `hf auth login` or set HF_TOKEN"
        elif isinstance(error, DatasetNotFoundError):
            reason = (
                f"it must be a folder here, or exist on the Hub and be visible to you ({said}). See {page}; if it is "
                "private, log in with `hf auth login`, or set HF_TOKEN, as somebody who may read it"
            )
        elif any(isinstance(found, pickle.UnpicklingError) for found in (error, error.__cause__)):
            kind, reason = ValueError, "a .pth file in it is refused, since it is damaged or a pickle that holds code"
        elif isinstance(error, ConnectionError):
            reason = (
                f"there is no file or folder {Path(config.location).resolve()}, and for a set on the Hub, the "
                f"connection to {settings.HF_ENDPOINT} must hold, or the set be in the cache already ({said})"
            )
        else:
            reason = f"{type(error).__name__}: {said}"
    raise kind(without_passwords(f"cannot load the data set {config.location}: {reason}"))


def read_labels(
    root: str, parts: Mapping[str, Dataset], column: str
) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
    """Return int64 labels (N,) of all rows, -1 in a part without labels, and the names of the classes: those of a
    ClassLabel, otherwise the values. None and None if there are fewer than two classes. ValueError if a part lacks some
    labels.
    """
    names = getattr(next(iter(parts.values())).features[column], "names", None)
    found = {part: _column(table, column).to_pandas() for part, table in parts.items()}
    for part, values in found.items():
        missing = values.isna() | (values < 0 if names is not None else False)
        if missing.any() and not missing.all():
            raise ValueError(
                f"{missing.sum():,} of {len(values):,} labels in {column} of {root}, {part}, are missing, first in row "
                f"{missing.idxmax()}: all must be there, or none"
            )
        found[part] = None if missing.all() else values
    values_found = sorted({value for values in found.values() if values is not None for value in values.unique()})
    classes = tuple(map(str, values_found)) if names is None else tuple(names)
    if len(classes) < 2 or not values_found:
        return None, None
    index_of = {value: int(value) if names is not None else index for index, value in enumerate(values_found)}
    labels = [
        torch.full((len(parts[part]),), -1) if values is None else torch.tensor(values.map(index_of).tolist())
        for part, values in found.items()
    ]
    return torch.cat(labels), classes


def read_row_captions(root: str, parts: Mapping[str, Dataset], column: str) -> list[tuple[str, ...]]:
    """Return one or more captions of each row of the parts; ValueError naming rows without one."""
    captions, problems = [], []
    for part, table in parts.items():
        for row, value in enumerate(_column(table, column).to_pylist()):
            several = tuple(text and text.strip() for text in ([value] if isinstance(value, str) else value or ()))
            captions.append(several)
            if not several or not all(several):
                problems.append(f"{part}, row {row}")
    if problems:
        raise ValueError(
            f"every row of {root} must have a caption in {column} that is not empty; not so in\n"
            f"{problem_list(problems)}"
        )
    return captions


def _column(table: Dataset, column: str) -> ChunkedArray:
    return table.select_columns(column).with_format("arrow")[:][column]
