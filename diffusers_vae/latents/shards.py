"""Files of a latent cache.

A cache is a folder of `shard-NNNNN.safetensors`, each with the latents, labels and captions of a fixed range of images
and, in its header, what they were computed from; and index.json, which is written last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open

from ..data import ImageSet, StoredImages
from ..storage import described, digest_of, digest_of_tensors
from ..untrusted import check_type, read_json

FORMAT = 1
COMPUTED = ("compute_dtype", "float32")
"""Key in the description of what a cache was computed from, and the value for older caches, which lack it."""
INDEX = "index.json"
HEADER = "latent_cache"  # only key in a shard's header: safetensors writes several in random order
Kind = Literal["posterior", "sample", "mode"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # names in safetensors
IDENTITY = {
    "format": int,
    "kind": Kind,
    "dtype": Dtype,
    "shard_images": int,
    "vae": {"weights_hash": str, "config": dict},
    "data": {
        "fingerprint": str,
        "images": int,
        "image_shape": list[int],
        "resize": str | None,
        "labels": str | None,
        "captions": str | None,
    },
}
"""Types of the values that describe what a cache was computed from."""
CONTENT = {
    "cache": IDENTITY,
    "data": str,
    "images": int,
    "latent_shape": list[int],
    "classes": list[str] | None,
    "shards": [{"rows": int, "bytes": int, "sha256": str}],
}
"""Types of the values in index.json."""


def data_identity(image_set: ImageSet) -> dict[str, Any]:
    """Return a description of the images that latents are computed from; equal for the same images."""
    labels, contents = None if image_set.labels is None else image_set.labels.tolist(), image_set.contents()
    return ({"contents": contents} if contents else {}) | {
        "fingerprint": image_set.fingerprint(),
        "images": len(image_set),
        "image_shape": list(image_set.read([0]).pixels.shape[1:]),
        "resize": image_set.config.resize if isinstance(image_set, StoredImages) else None,
        "labels": None if labels is None else digest_of([labels, image_set.classes]),
        "captions": None if image_set.captions is None else digest_of(image_set.captions),
    }


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def read_header(path: Path) -> dict[str, Any] | None:
    """Return what a shard records about itself; None if it is damaged or not a shard."""
    if not path.is_file():  # reading a pipe would block
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            return header if isinstance(header["cache"], dict) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def whole_shard(path: Path, cache: dict[str, Any]) -> dict[str, Any] | None:
    """Return the index entry of a shard of `cache`; None if the shard is missing or incomplete."""
    header = read_header(path)
    if header is None or header["cache"] != cache:
        return None
    tensors = read_tensors(path)
    if digest_of_tensors(tensors) != header.get("sha256"):
        return None
    latents = tensors["mean" if cache["kind"] == "posterior" else "latents"]
    return {"rows": len(latents), "latent_shape": list(latents.shape[1:])} | described(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard, mapped into memory."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of index.json; FileNotFoundError if the latents are incomplete or the folder is missing,
    ValueError if it is damaged or of a newer version.
    """
    path = folder / INDEX
    try:
        index = read_json(path)
        check_type(index, {"cache": {"format": int}}, "index")
        if index["cache"]["format"] <= FORMAT:
            check_type(index, CONTENT, "index")
            check_type(index["cache"].get(*COMPUTED), IDENTITY["dtype"], f"index.cache.{COMPUTED[0]}")
            if len(index["latent_shape"]) != 3 or index["images"] != sum(shard["rows"] for shard in index["shards"]):
                raise ValueError("latent_shape must have 3 entries, and images be the sum of all rows")
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder.resolve()}") from error
        shards = len(list(folder.glob("shard-*.safetensors")))
        raise FileNotFoundError(
            f"{folder.resolve()} holds no complete latents: no {INDEX}, and {shards} shards. The "
            "same encode command resumes where it was interrupted"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or not an index of latents ({error}); delete it and encode again"
        ) from error
    if (version := index["cache"]["format"]) > FORMAT:
        raise ValueError(
            f"{path} is of format {version}, this version of diffusers_vae reads up to {FORMAT}; install a newer one"
        )
    return index


def changed_shards(folder: Path, index: dict[str, Any]) -> list[str]:
    """Return the names of shards that are missing or have another size than they were written with."""
    shards = [(shard_path(folder, number), shard["bytes"]) for number, shard in enumerate(index["shards"])]
    return [path.name for path, size in shards if not path.is_file() or path.stat().st_size != size]
