"""Data sets by name: digits, MNIST and its variants, CIFAR-10."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from ..untrusted import MAX_UNPACKED, open_regular
from .config import DataConfig

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def heldout_indices(length: int, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out indices, shuffled: the same for every seed of a run, so that runs are comparable."""
    heldout = max(1, round(length * config.heldout_fraction))
    if heldout >= length:
        raise ValueError(f"no image is left to train on: {length} images, {heldout} of them held out")
    order = np.random.default_rng(0).permutation(length)
    return order[heldout:], order[:heldout]


def load_digits(config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """Return pixels (N, 1, 10, 10) uint8, labels and class names of scikit-learn's digits, training part first."""
    import sklearn.datasets

    images, targets = sklearn.datasets.load_digits(return_X_y=True)
    pixels = torch.from_numpy((images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8))
    pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1))  # strokes touch the border of the 8x8 pixels
    labels = torch.from_numpy(targets.astype(np.int64))
    parts = map(torch.from_numpy, heldout_indices(len(pixels), config))
    return [(pixels[part, None], labels[part], DIGITS) for part in parts]


def _mnist_files(name: str) -> list[str]:
    if name == "qmnist":
        parts = [("qmnist-train", "int"), ("qmnist-test", "int")]
    else:
        parts = [("train", "ubyte"), ("t10k", "ubyte")]
    rank = 2 if name == "qmnist" else 1  # QMNIST's labels are a table
    return [f"{part}-{kind}" for part, dtype in parts for kind in ("images-idx3-ubyte", f"labels-idx{rank}-{dtype}")]


def load_mnist(config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """Return pixels, labels and class names. Files are unpacked in memory, so that a killed process leaves none
    behind.
    """
    name = str(config.name)
    kind = {"mnist": datasets.MNIST, "qmnist": datasets.QMNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    files = _mnist_files(name)
    raw = Path(config.location) / kind.__name__ / "raw"
    if not all((raw / file).exists() or (raw / f"{file}.gz").exists() for file in files):
        parts: list[dict[str, Any]] = [{"what": "train"}, {"what": "test"}] if name == "qmnist" else [{"train": True}]
        packed = [f"{file}.gz" for file in files]
        _download(lambda: [kind(config.location, download=True, **part) for part in parts], raw, packed)
    classes = tuple(map(str.lower, kind.classes)) if name == "fashion-mnist" else DIGITS
    loaded = []
    for images, labels in zip(files[::2], files[1::2], strict=True):
        pixels, targets = _read_idx(raw / images, 3), _read_idx(raw / labels, 2 if name == "qmnist" else 1)
        if len(pixels) != len(targets):
            raise ValueError(f"{raw} is damaged: {images} holds {len(pixels)} images, and {labels} {len(targets)}")
        loaded.append([pixels[:, None], (targets[:, 0] if targets.ndim == 2 else targets).long(), classes])
    if name == "qmnist":  # its first 10,000 test images are MNIST's
        loaded[1][:2] = [values[:10_000] for values in loaded[1][:2]]
    return [tuple(part) for part in loaded]


def _read_idx(path: Path, rank: int) -> torch.Tensor:
    """Return the array in a file of MNIST's format (LeCun et al. 1998), uint8 or int32, or in `path`.gz."""
    file = path if path.exists() else path.with_name(f"{path.name}.gz")
    try:
        with open_regular(file) as opened, opened if file == path else gzip.open(opened) as stored:
            content = stored.read(MAX_UNPACKED + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if len(content) > MAX_UNPACKED:
        raise ValueError(f"{file} must hold at most {MAX_UNPACKED:,} bytes, got more")
    try:
        dtype = {8: np.dtype("u1"), 12: np.dtype(">i4")}[content[2]]
        if content[:2] != b"\0\0" or content[3] != rank:
            raise ValueError("wrong header")
        shape = np.frombuffer(content, ">u4", rank, 4)
        values = np.frombuffer(content, dtype, offset=4 + 4 * rank).reshape(shape)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path.parent} is damaged: {path.name} is not an IDX file of rank {rank}: {error}") from error
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def load_cifar10(config: DataConfig) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """Return pixels, labels and class names. Files are unpacked in memory, so that a killed process leaves none
    behind.
    """
    kind, root = datasets.CIFAR10, Path(config.location)
    folder, packed = root / kind.base_folder, root / kind.filename
    if not (folder.exists() or packed.exists()):
        _download(lambda: kind(root, download=True), root, [packed.name])
    if folder.exists():
        content = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    elif check_integrity(str(packed), kind.tgz_md5):
        with tarfile.open(packed) as archive:
            content = {Path(entry.name).name: file.read() for entry in archive if (file := archive.extractfile(entry))}
    else:
        raise ValueError(f"{packed} is damaged or not CIFAR-10: its md5 is not {kind.tgz_md5}")
    read = {}
    for name, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        if hashlib.md5(content.get(name, b""), usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{folder} is damaged or not CIFAR-10: the md5 of {name} is not {md5}")
        read[name] = _ArrayUnpickler(io.BytesIO(content[name]), encoding="latin1").load()
    classes = tuple(map(str.lower, read[kind.meta["filename"]][kind.meta["key"]]))
    parts = [[read[name] for name, _ in listed] for listed in (kind.train_list, kind.test_list)]
    return [
        (
            torch.from_numpy(np.concatenate([batch["data"] for batch in part])).view(-1, 3, 32, 32),
            torch.tensor([label for batch in part for label in batch["labels"]]),
            classes,
        )
        for part in parts
    ]


ARRAY_NAMES = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that calls nothing except what builds a NumPy array."""

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("numpy._core", "numpy.core") + f".{name}" in ARRAY_NAMES:  # NumPy 2 renamed it
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are read")


def _download(download: Callable[[], Any], folder: Path, files: list[str]) -> None:
    try:
        download()
    except (OSError, RuntimeError) as error:
        names = ", ".join(files)
        raise FileNotFoundError(
            f"the data set is missing and cannot be downloaded ({error}). Put {names} into {folder.resolve()}, or "
            "set data.root to a folder that holds them in torchvision's layout"
        ) from error
