"""Latents of a data set, computed once and written shard by shard, resumable after any interruption."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from ..data import ImageSet, kept_images, read_ahead
from ..messages import showable
from ..models import VAE, encode, fast_dtype, for_inference, several_at_once, unmeasured, weights_hash
from ..models.stock import ModelMixin
from ..processes import gather_parts, on_main, only_user_of, process_share, sendable
from ..silence import alone
from ..storage import delete_file, digest_of_tensors, naming, save_tensors, whole_file, write_file
from ..untrusted import refuse_odd_name
from .dataset import LatentDataset
from .shards import (
    COMPUTED,
    DTYPES,
    FORMAT,
    HEADER,
    INDEX,
    Kind,
    changed_shards,
    data_identity,
    read_header,
    read_index,
    shard_path,
    whole_shard,
)
from .statistics import draw

logger = logging.getLogger(__name__)
CPU_VALUES, DEVICE_VALUES = 2**21, 2**29
"""Values in the first feature map of a forward that fit into a CPU's caches, and that fill a GPU."""
AT_ONCE = 8 * CPU_VALUES  # for all concurrent forwards on a CPU
GATHERED = 16
"""Number of batches between transfers from the device, and between exchanges of processes. Both stall the device."""


@torch.no_grad()
def encode_images(
    vae: ModelMixin,
    image_set: ImageSet,
    folder: str | Path,
    *,
    kind: Kind = "posterior",
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    shard_images: int = 4096,
    data: str = "",
    progress: bool = False,
) -> LatentDataset:
    """Write the latents of all images under `vae`, in eval mode, to `folder`.

    The same call resumes an interrupted one, and returns at once if all latents exist. Under torch.distributed, all
    processes must call it with the same model. They share the shards, and the files equal those of one process, byte
    for byte on one kind of device.

    Args:
        vae: The autoencoder, on the device to use.
        image_set: The images. Unreadable ones are left out if the set is configured so.
        folder: Folder to write to, on storage that every process sees.
        kind: posterior: mean and logvar; sample: one sample per image, a function of seed and index; mode: the mode.
        dtype: Dtype of the stored values: torch.float32, bfloat16 or float16.
        compute_dtype: Dtype in which the encoder runs. By default the dtype of existing latents in `folder`; for new
            ones, bfloat16 for a float32 `vae` on devices with hardware support (`models.fast_dtype`, docs/latents.md),
            otherwise the dtype of `vae`.
        batch_size: Images per forward. By default, their first feature map has 2^21 values on a CPU (128 images of
            32x32 with 16 channels), which runs small forwards concurrently, and 2^29 elsewhere (64 images of 256x256
            with 128 channels).
        seed: Seed of the samples.
        shard_images: Images per file.
        data: Description of the images, for the index.
        progress: Whether to show a progress bar.

    Raises:
        ArithmeticError: Naming the image, if its latents are not finite or too large for `dtype`.
        OSError: Naming the file, if it cannot be written, which keeps the shards before it; or if another process
            writes to the folder.
        ValueError: If the folder holds other latents, with the differences; if an image cannot be read.
    """
    folder = Path(os.path.expanduser(folder))
    refuse_odd_name(folder, "the folder of latents")
    if vae.config.get("scaling_factor") is not None and (reason := unmeasured(vae.config)):
        logger.warning("the latents are stored with a scaling_factor that was not measured: %s", reason)
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind}")
    names = ", ".join(map(str, DTYPES.values()))
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {names}, got {dtype}")
    if compute_dtype not in (None, *DTYPES.values()):
        raise ValueError(f"compute_dtype must be one of {names} or None, got {compute_dtype}")
    if shard_images < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_size and shard_images must be at least 1, got {batch_size} and {shard_images}")
    if not len(image_set):
        raise ValueError("there must be at least one image to encode, got none")

    def identity() -> dict[str, Any]:
        computed = compute_dtype or _compute_dtype(vae, folder)
        cache: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "seed": seed if kind == "sample" else None,
            "shard_images": shard_images,
            "vae": {
                "class": "AutoencoderKL" if isinstance(vae, VAE) else type(vae).__name__,
                "weights_hash": weights_hash(vae),
                "config": {name: value for name, value in vae.config.items() if not name.startswith("_")},
            },
            "data": data_identity(image_set),
        }
        if computed != torch.float32:
            cache["compute_dtype"] = str(computed).removeprefix("torch.")
        cache = json.loads(json.dumps(cache))  # as read from JSON, without tuples
        if not (folder / INDEX).exists() or "contents" in read_index(folder)["cache"].get("data", {}):
            return cache
        return _of_shards(cache)  # earlier versions did not record the contents of the images

    cache = on_main(identity)
    if on_main(lambda: _is_complete(folder, cache)):
        return LatentDataset(folder)
    with only_user_of(folder, "writing latents to", "folder for the latents"):
        if on_main(lambda: _is_complete(folder, cache)):  # another process may have completed it
            return LatentDataset(folder)
        on_main(lambda: _clear(folder, _of_shards(cache)))
        pixels = len(image_set) * math.prod(cache["data"]["image_shape"][1:])
        fast = for_inference(vae, getattr(torch, cache.get(*COMPUTED)), pixels)
        values = math.prod(cache["data"]["image_shape"][1:]) * vae.config.get("block_out_channels", [1])[0]
        if batch_size is None:
            batch_size = max(1, (CPU_VALUES if vae.device.type == "cpu" else DEVICE_VALUES) // values)
        at_once = max(1, AT_ONCE // (batch_size * values))
        shards = _encode_shards(fast, image_set, folder, _of_shards(cache), batch_size, at_once, progress)

        def finish() -> None:
            if not any(shard["rows"] for shard in shards):
                raise ValueError("no image to encode can be read")
            shape, *_ = [shard.pop("latent_shape") for shard in shards]
            index = {"cache": cache, "data": data, "images": sum(shard["rows"] for shard in shards)}
            classes = None if image_set.classes is None else list(image_set.classes)
            index |= {"latent_shape": shape, "classes": classes, "shards": shards}
            write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")

        on_main(finish)
    return LatentDataset(folder)


def _compute_dtype(vae: ModelMixin, folder: Path) -> torch.dtype:
    """Return the dtype in which the latents in `folder` were computed, or the default for new ones."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        if (header := read_header(path)) and (dtype := DTYPES.get(str(header["cache"].get(*COMPUTED)))):
            return dtype
    return fast_dtype(vae.device) if vae.dtype == torch.float32 else vae.dtype


def _of_shards(cache: dict[str, Any]) -> dict[str, Any]:
    """Return what each shard records: all except the contents of the images, so that repairing a file keeps the
    others.
    """
    return cache | {"data": {name: value for name, value in cache["data"].items() if name != "contents"}}


def _is_complete(folder: Path, cache: dict[str, Any]) -> bool:
    """Return whether `folder` holds all of `cache`; ValueError if it holds something else."""
    if not (folder / INDEX).exists():
        return False
    index = read_index(folder)
    _check_same(folder, index["cache"], cache)
    return not changed_shards(folder, index)


def _clear(folder: Path, cache: dict[str, Any]) -> None:
    """Delete the index and incomplete files; ValueError if the shards are of something else."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        header = read_header(path)
        if header is not None:
            _check_same(folder, header["cache"], cache)
    with naming(folder / INDEX):
        delete_file(folder / INDEX)
    for partial in (*folder.glob(".shard-*.partial"), *folder.glob(f".{INDEX}.partial")):
        delete_file(partial)
    if all(path.name.startswith(("shard-", ".lock", ".tmp")) for path in folder.iterdir()):
        for partial in folder.glob(".tmp??????"):  # temporary files of safetensors
            delete_file(partial)


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    old, new = (_flat(dict([COMPUTED]) | cache) for cache in (found, wanted))
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if different:
        listed = "\n".join(showable(f"{name}: {old.get(name)} there, {new.get(name)} here") for name in different)
        raise ValueError(
            f"{folder.resolve()} holds latents of something else; choose another folder, or delete this one to encode "
            f"again:\n{listed}"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dicts by dotted name."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _encode_shards(
    vae: ModelMixin,
    image_set: ImageSet,
    folder: Path,
    cache: dict[str, Any],
    batch_size: int,
    at_once: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Write the incomplete shards, on a CPU by `at_once` concurrent forwards, and return descriptions of all shards."""
    rank, processes = process_share()
    length = cache["shard_images"]
    count = math.ceil(len(image_set) / length)
    found: dict[int, dict[str, Any]] = {}

    def check() -> Iterator[int]:
        for number in range(rank, count, processes):
            if description := whole_shard(shard_path(folder, number), cache):
                found[number] = description
            yield 0

    for _ in _together(check(), math.ceil(count / processes)):
        pass
    kept = dict(gather_parts(list(found.items())))
    missing = [number for number in range(count) if number not in kept]
    shards = missing[rank::processes]
    images = {number: range(number * length, min((number + 1) * length, len(image_set))) for number in missing}
    batches = {number: math.ceil(len(images[number]) / batch_size) for number in missing}

    def work() -> Iterator[int]:
        for number in shards:
            path = shard_path(folder, number)
            yield from _encode_shard(vae, image_set, images[number], path, cache, batch_size, at_once)
            shard = whole_shard(path, cache)
            assert shard is not None
            found[number] = shard

    steps = max((sum(batches[number] for number in missing[k::processes]) for k in range(processes)), default=0)
    with tqdm(
        total=len(image_set),
        initial=len(image_set) - sum(map(len, images.values())),
        desc="encode",
        unit="img",
        disable=not progress or rank > 0,
    ) as bar:
        for done in _together(work(), steps):
            bar.update(done)
    return [shard for _, shard in gather_parts(list(found.items()))]


def _together(work: Iterator[int], steps: int) -> Iterator[int]:
    """Yield what `work` yields, summed over all processes and `GATHERED` steps, until all have done their `steps`. An
    error on one process is then raised on all, so that none waits for another.
    """
    each = 1 if process_share()[1] == 1 else GATHERED
    for _ in range(0, steps + 1, each):
        error, done = None, 0
        try:
            done = sum(islice(work, each))
        except Exception as raised:
            error = raised
        if process_share()[1] > 1:
            outcomes = gather_parts([(process_share()[0], done, None if error is None else sendable(error))])
            done = sum(outcome[1] for outcome in outcomes)
            error = error or next((outcome[2] for outcome in outcomes if outcome[2]), None)
        if error is not None:
            raise error
        yield done


def _encode_shard(
    vae: ModelMixin,
    image_set: ImageSet,
    images: range,
    path: Path,
    cache: dict[str, Any],
    batch_size: int,
    at_once: int,
) -> Iterator[int]:
    """Write the shard of `images` after its last batch, and yield the number of images after each batch."""
    kept: list[int] = []
    names = ("mean", "logvar") if cache["kind"] == "posterior" else ("latents",)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    waiting: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    checked = 0
    batches = [range(start, min(start + batch_size, images.stop)) for start in images[::batch_size]]

    def read() -> Iterator[tuple[range, list[int], torch.Tensor]]:
        for indices, pixels in read_ahead(image_set, batches):
            readable, batch = kept_images(image_set, indices, pixels, vae.device)
            if not readable:  # one image still gives the shape of the latents
                batch = torch.zeros(1, *cache["data"]["image_shape"], device=vae.device)
            yield indices, readable, batch

    at_once = min(at_once, len(batches))
    encoded = several_at_once(lambda part: encode(vae, part[2]), read(), vae.device, at_once)
    for (indices, readable, _), posterior in encoded:
        if cache["kind"] == "posterior":
            values = (posterior.mean, posterior.logvar)
        elif readable and cache["kind"] == "sample":
            values = (next(draw(posterior, readable, cache["seed"], 1)),)
        else:
            values = (posterior.mode(),)
        for name, value in zip(names, values, strict=True):
            waiting[name].append(value[: len(readable)])
        kept += readable
        last = indices.stop == images.stop
        if last or len(waiting[names[0]]) == GATHERED:
            for name in names:
                values = torch.cat(waiting[name])
                parts[name].append(_stored(values, DTYPES[cache["dtype"]], name, kept[checked:], image_set))
                waiting[name].clear()
            checked = len(kept)
        if not last:
            yield len(indices)
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    tensors["indices"] = torch.tensor(kept, dtype=torch.long)
    if image_set.labels is not None:
        tensors["labels"] = image_set.labels[tensors["indices"]].long()
    if image_set.captions is not None:
        encoded = [json.dumps(image_set.captions[index]).encode() for index in kept]
        tensors["captions"] = torch.from_numpy(np.array(bytearray(b"".join(encoded)), np.uint8))
        tensors["caption_ends"] = torch.tensor(np.cumsum([len(text) for text in encoded]), dtype=torch.long)
    header = {HEADER: json.dumps({"cache": cache, "sha256": digest_of_tensors(tensors)})}
    with alone(f"writing {path.name}"), whole_file(path) as partial:
        save_tensors(partial, {name: tensor.contiguous() for name, tensor in tensors.items()}, header)
    yield len(batches[-1])


def _stored(
    values: torch.Tensor, dtype: torch.dtype, name: str, indices: list[int], image_set: ImageSet
) -> torch.Tensor:
    """Return the values in `dtype` on the CPU; ArithmeticError naming the first image whose values do not fit."""
    stored = values.to(dtype).cpu()
    bad = ~stored.flatten(1).isfinite().all(1)
    if bad.any():
        position = int(bad.nonzero()[0])
        image = image_set.name(indices[position])
        if not values[position].isfinite().all():
            raise FloatingPointError(f"{name} of the latents of {image} is not finite")
        raise OverflowError(
            f"{name} of the latents of {image} does not fit into {str(dtype).removeprefix('torch.')}, which ends at "
            f"{torch.finfo(dtype).max:,.0f}: it goes to {values[position].abs().max():,.0f}. Take bfloat16 or float32"
        )
    return stored
