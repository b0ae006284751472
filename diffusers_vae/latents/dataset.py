"""Latents of a data set on disk, read by row without loading all of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..data import ImageSet
from ..models import weights_hash
from ..models.stock import ModelMixin
from ..processes import on_main, process_share
from ..storage import described, digest_of
from ..untrusted import check_type, refuse_odd_name

if TYPE_CHECKING:
    import datasets
from .shards import COMPUTED, DTYPES, STORED, Kind, changed_shards, data_identity, read_index, read_tensors, shard_path

logger = logging.getLogger(__name__)
VERIFIED_AT_ONCE = 2**30
"""Maximum bytes of a cache that is verified before training on it; larger ones are verified during training."""
LISTED = 20
CHECKED = 256  # rows per check for non-finite values


def matching_latents(vae: ModelMixin, image_set: ImageSet, folder: str | Path, data: str) -> LatentDataset:
    """Return the latents that `encode_images` wrote to `folder`, of any kind and dtype. The labels and captions of
    their images may differ from those of `image_set`, which `data` describes.

    Raises:
        FileNotFoundError: If there is no complete cache.
        ValueError: If its VAE has other weights than `vae`, or its images are not those of `image_set`.
    """
    latents = LatentDataset(folder, weights_hash(vae))
    found, wanted = latents.cache["data"], json.loads(json.dumps(data_identity(image_set)))
    compared = ["fingerprint", "images", "image_shape", "resize"]
    compared += ["contents"] * ("contents" in found)  # earlier versions did not record it
    if differing := [name for name in compared if found[name] != wanted.get(name)]:
        digests = ("fingerprint", "contents")
        what = ", ".join(f"{name} {found[name]} and not {wanted[name]}" for name in differing if name not in digests)
        raise ValueError(
            f"{Path(folder).resolve()} holds latents of other images: {found['images']:,}, "
            f"{latents.index['data']}, where {wanted['images']:,}, {data}, are wanted{f' ({what})' if what else ''}. "
            "`diffusers-vae encode DATA --split training`, with the same settings of the data, encodes those that are "
            "trained on"
        )
    return latents


class LatentDataset(Dataset[dict[str, Any]]):
    """Latents that `encode_images` wrote to `folder`, in float32, with labels and captions if the images had them.

    A row is a dict of `mean` and `logvar`, or of `latents`, each (C, h, w), of `label`, int64, and of `captions`, a
    list of one or more. If their numbers differ, batches need a `collate_fn`. Files are mapped into memory, not loaded.

    Args:
        folder: Folder of the cache.
        weights_hash: Required hash of the VAE's weights, as `models.weights_hash` returns it.

    Raises:
        FileNotFoundError: If there is no complete cache.
        ValueError: If a shard is missing or changed, or the latents are of another VAE.
    """

    def __init__(self, folder: str | Path, weights_hash: str | None = None):
        self.folder = Path(os.path.expanduser(folder))
        refuse_odd_name(folder, "the folder of latents")
        self.index = read_index(self.folder)
        self.cache: dict[str, Any] = self.index["cache"]  # description of what the latents were computed from
        if weights_hash is not None and weights_hash != self.weights_hash:
            raise ValueError(
                f"{self.folder.resolve()} holds latents of another VAE, whose weights_hash is {self.weights_hash}, and "
                f"not {weights_hash}: encode the images with this VAE into another folder"
            )
        self._refuse(changed_shards(self.folder, self.index))
        self._refuse(self._other_shapes(range(len(self.index["shards"]))))
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.index["shards"]])
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def _other_shapes(self, numbers: Iterable[int]) -> list[str]:
        """Return the names of shards whose header lacks a tensor, or has another shape or dtype than the index."""
        columns = ["indices"] + ["labels"] * (self.cache["data"]["labels"] is not None)
        texts = ["captions"] * (self.cache["data"]["captions"] is not None)
        columns += ["caption_ends"] * len(texts)
        other = []
        for number in numbers:
            path, rows = shard_path(self.folder, number), self.index["shards"][number]["rows"]
            wanted = dict.fromkeys(self._names, (STORED[self.cache["dtype"]], [rows, *self.latent_shape]))
            wanted |= dict.fromkeys(columns, ("I64", [rows]))
            with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
                found = {name: file.get_slice(name) for name in [*wanted, *texts]}
                if all((found[name].get_dtype(), found[name].get_shape()) == wanted[name] for name in wanted):
                    continue
            other.append(path.name)
        return other

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            more = f" and {len(changed) - LISTED} more" if len(changed) > LISTED else ""
            raise ValueError(
                f"{', '.join(changed[:LISTED])}{more} in {self.folder.resolve()} missing or not as written: delete "
                "what is there of these, and the same encode command writes them again"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what was read, so that workers map the files themselves."""
        read = ("labels", "captions", "indices")
        return {name: value for name, value in vars(self).items() if name not in read} | {"_open": {}}

    @property
    def kind(self) -> Kind:
        """Return what is stored: posterior, sample or mode."""
        return self.cache["kind"]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the stored values."""
        return DTYPES[self.cache["dtype"]]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype in which the encoder ran."""
        return getattr(torch, self.cache.get(*COMPUTED))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape (C, h, w) of the latents of an image."""
        return tuple(self.index["latent_shape"])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Return the name of each class."""
        return None if self.index["classes"] is None else tuple(self.index["classes"])

    @property
    def weights_hash(self) -> str:
        """Return the hash of the VAE's weights."""
        return self.cache["vae"]["weights_hash"]

    @property
    def vae_config(self) -> dict[str, Any]:
        """Return the VAE's config with its scaling_factor and shift_factor, which are not applied to the latents."""
        return self.cache["vae"]["config"]

    @property
    def fingerprint(self) -> str:
        """Return a hash of latents, labels and captions in their order."""
        return digest_of([self.cache, self.index["shards"]])

    @property
    def bytes(self) -> int:
        """Return the size of all shards."""
        return sum(shard["bytes"] for shard in self.index["shards"])

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """Return the classes (N,), int64."""
        return None if self.cache["data"]["labels"] is None else self._column("labels")

    @cached_property
    def indices(self) -> torch.Tensor:
        """Return the indices (N,) into the image set, without unreadable images."""
        return self._column("indices")

    @cached_property
    def captions(self) -> list[tuple[str, ...]] | None:
        """Return one or more captions per image."""
        if self.cache["data"]["captions"] is None:
            return None
        return [tuple(self._captions(*self._position(row))) for row in range(len(self))]

    def _column(self, name: str) -> torch.Tensor:
        return torch.cat([self._shard(number)[name] for number in range(len(self.index["shards"]))])

    def _shard(self, number: int) -> dict[str, torch.Tensor]:
        """Return the mapped tensors of a shard; ValueError for a truncated file, because reading it would end the
        process.
        """
        path, shard = shard_path(self.folder, number), self.index["shards"][number]
        try:
            if path.stat().st_size != shard["bytes"]:
                self._refuse([path.name])
            if number not in self._open:
                self._refuse(self._other_shapes([number]))
                self._open[number] = read_tensors(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot read {path.resolve()}: {error}") from error
        return self._open[number]

    @property
    def _names(self) -> tuple[str, ...]:
        return ("mean", "logvar") if self.kind == "posterior" else ("latents",)

    def _position(self, row: int) -> tuple[int, int]:
        """Return the shard of a row and its index in it."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"there are {len(self)} images, got index {row}")
        row %= len(self)
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return number, row - int(self._starts[number])

    def _captions(self, number: int, index: int) -> list[str]:
        shard = self._shard(number)
        ends = shard["caption_ends"]
        start = int(ends[index - 1]) if index else 0
        with suppress(KeyError, ValueError):
            captions = json.loads(shard["captions"][start : int(ends[index])].numpy().tobytes())
            check_type(captions, list[str], "captions")
            return captions
        self._refuse([shard_path(self.folder, number).name])
        return []

    def __len__(self) -> int:
        return self.index["images"]

    def __getitem__(self, row: int) -> dict[str, Any]:
        number, index = self._position(int(row))
        shard = self._shard(number)
        item: dict[str, Any] = {name: shard[name][index].to(torch.float32, copy=True) for name in self._names}
        if "labels" in shard:
            item["label"] = shard["labels"][index].clone()
        if "captions" in shard:
            item["captions"] = self._captions(number, index)
        return item

    def latents(self, indices: Sequence[int] | torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the unscaled float32 latents (B, C, h, w) of the rows `indices`, on the device of `noise`: mean + std
        * noise for standard normal `noise` (B, C, h, w), otherwise the mean or what is stored. ValueError if noise has
        another shape, or the cache has no posteriors.
        """
        rows = [int(row) for row in indices]
        if noise is None:
            return self._rows("mean" if self.kind == "posterior" else "latents", rows)
        if self.kind != "posterior":
            raise ValueError(f"noise needs a cache of kind posterior, and {self.folder} is of kind {self.kind}")
        if tuple(noise.shape) != (len(rows), *self.latent_shape):
            raise ValueError(f"noise must have the shape {(len(rows), *self.latent_shape)}, got {tuple(noise.shape)}")
        mean, logvar = (self._rows(name, rows).to(noise.device) for name in ("mean", "logvar"))
        return mean + torch.exp(0.5 * logvar) * noise.float()

    def moments(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return the float32 moments (B, 2 C, h, w) of the rows `indices` of a cache of kind posterior."""
        rows = [int(row) for row in indices]
        return torch.cat([self._rows(name, rows) for name in ("mean", "logvar")], 1)

    def _rows(self, name: str, rows: list[int]) -> torch.Tensor:
        found = torch.empty(len(rows), *self.latent_shape)
        positions = np.array([self._position(row) for row in rows]).reshape(-1, 2)
        for number in np.unique(positions[:, 0]).tolist():
            in_shard = torch.from_numpy(positions[:, 0] == number)
            found[in_shard] = self._shard(number)[name][torch.from_numpy(positions[:, 1])[in_shard]].float()
        return found

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read these shards again, by default all. ValueError names those that are missing or differ from the SHA-256
        in the index, or the first with a non-finite value.
        """
        numbers = range(len(self.index["shards"])) if shards is None else list(shards)
        changed = []
        for number in numbers:
            path, shard = shard_path(self.folder, number), self.index["shards"][number]
            if not path.is_file() or described(path) != {name: shard[name] for name in ("bytes", "sha256")}:
                changed.append(path.name)
        self._refuse(changed)
        for number in numbers:
            for name in self._names:
                if not all(part.isfinite().all() for part in self._shard(number)[name].split(CHECKED)):
                    raise ValueError(
                        f"{shard_path(self.folder, number).resolve()} holds a {name} that is not finite: delete the "
                        "file, and the same encode command writes it again"
                    )

    def to_datasets(self) -> datasets.Dataset:
        """Return the rows as a Hugging Face `datasets.Dataset`: `mean` and `logvar`, or `latents`, as float32 Array3D,
        `label` as ClassLabel, and `captions`. They are written to the cache of `datasets` row by row.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("this needs Hugging Face datasets: pip install datasets") from error
        features: dict[str, Any] = {name: datasets.Array3D(self.latent_shape, "float32") for name in self._names}
        if self.cache["data"]["labels"] is not None:
            names = self.index["classes"]
            features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        if self.cache["data"]["captions"] is not None:
            features["captions"] = [datasets.Value("string")]
        return datasets.Dataset.from_generator(
            _generate,
            features=datasets.Features(features),
            gen_kwargs={"folder": str(self.folder.resolve()), "fingerprint": self.fingerprint},
        )


class Verification:
    """Verification of the latents to train on, by the main process: before the first step for up to `VERIFIED_AT_ONCE`
    bytes, otherwise during training. All processes must create it together. It raises the errors of
    `LatentDataset.verify` on all.
    """

    def __init__(self, latents: LatentDataset):
        self._error: Exception | None = None
        self._thread: Thread | None = None
        if latents.bytes <= VERIFIED_AT_ONCE:
            on_main(latents.verify)
        elif process_share()[0] == 0:
            # an interrupted process does not wait for it
            self._thread = Thread(target=self._run, args=[latents], name="verify latents", daemon=True)
            self._thread.start()

    def _run(self, latents: LatentDataset) -> None:
        try:
            for number in range(len(latents.index["shards"])):
                latents.verify([number])
        except Exception as error:  # any type: raised where the latents are used
            self._error = error

    def check(self) -> None:
        """Raise the error that the main process has found so far, if any."""
        if self._error:
            raise self._error

    def finish(self) -> None:
        """Wait for the end, and raise the error on all processes, if any."""

        def wait() -> None:
            if self._thread and self._thread.is_alive():
                logger.info("waiting until all latents are verified")
                self._thread.join()
            self.check()

        on_main(wait)


def _generate(folder: str, fingerprint: str) -> Iterator[dict[str, Any]]:
    """Yield the rows for `datasets`, which caches them by these arguments."""
    latents = LatentDataset(folder)
    if latents.fingerprint != fingerprint:
        raise ValueError(f"the latents in {folder} were changed while they were read")
    for row in range(len(latents)):
        item = latents[row]
        yield {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in item.items()}
