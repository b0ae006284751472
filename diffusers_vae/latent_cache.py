"""Latents of a data set on disk, computed once: written shard by shard, continued after any interruption, read by the
row without loading them.

A cache is a folder of `shard-NNNNN.safetensors`, each with the latents, labels and captions of a fixed range of images,
and what they were computed from in its header; and index.json, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

from .data import ImageSet, StoredImages, kept_images, read_ahead
from .latents import draw
from .messages import showable
from .models import VAE, encode, fast_dtype, for_inference, several_at_once, unmeasured, weights_hash
from .processes import gather_parts, on_main, only_user_of, process_share, sendable
from .silence import alone
from .storage import delete_file, described, digest_of, naming, save_tensors, whole_file, write_file
from .untrusted import check_type, read_json, refuse_odd_name

if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

FORMAT = 1
COMPUTED = ("compute_dtype", "float32")
"""Key in what a cache was computed from, and what one without it was computed in, as older ones are."""
INDEX = "index.json"
HEADER = "latent_cache"
"""Key in a shard's header; one alone, since safetensors writes several in a random order."""
Kind = Literal["posterior", "sample", "mode"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What safetensors calls them."""
IDENTITY = {
    "format": int,
    "kind": Kind,
    "dtype": Literal[tuple(DTYPES)],
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
"""Types of the description of what a cache was computed from."""
CONTENT = {
    "cache": IDENTITY,
    "data": str,
    "images": int,
    "latent_shape": list[int],
    "classes": list[str] | None,
    "shards": [{"rows": int, "bytes": int, "sha256": str}],
}
"""Types of what index.json holds."""
VERIFIED_AT_ONCE = 2**30
"""Bytes of a cache that is verified before it is trained on; a larger one is while it is."""
LISTED = 20
CPU_VALUES, DEVICE_VALUES = 2**21, 2**29
"""Of the first feature map of a forward: such as stay in a CPU's caches, and such as fill a GPU within its memory."""
AT_ONCE = 8 * CPU_VALUES
"""Of those of all forwards that a CPU does at a time."""
CHECKED = 256
"""Rows that are looked at together, for values that are not finite."""
GATHERED = 16
"""Batches after which latents leave the device, and after which processes hear of each other: both make it wait."""


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
    """The latents of all images under `vae`, in eval mode, written to `folder`.

    The same call continues one that was interrupted, and returns at once when all is there. Under torch.distributed
    all processes must call it, with the same model; they share the shards, and the files are those of one process, byte
    by byte on one kind of device.

    Args:
        vae: on the device where it is to run.
        image_set: the images; those that cannot be read are left out if the set says so.
        folder: to write to, on storage that every process sees.
        kind: posterior: mean and logvar. sample: one draw per image, which depends on seed and index alone. mode: the
            posterior's.
        dtype: of the stored values: torch.float32, bfloat16 or float16.
        compute_dtype: in which the encoder runs: torch.float32, bfloat16 or float16. By default that in which the
            folder was begun, if it was; else for a float32 `vae` bfloat16 on devices that multiply it in hardware
            (`models.fast_dtype`), for others their own. How far bfloat16 is from float32: docs/pipeline.md.
        batch_size: images per forward, of which a CPU does several at a time where they are small; by default as many
            as have 2^21 values in the first feature map on a CPU (128 of 32x32 with 16 channels), 2^29 on another
            device (64 of 256x256 with 128).
        seed: of the draws.
        shard_images: images per file.
        data: which images these are, in words, for the index.
        progress: show a bar.

    Raises:
        ArithmeticError: naming the image, when its latents are not finite or too large for `dtype`.
        OSError: naming the file, when it cannot be written; the shards before it are kept. And when another process
            writes to the folder.
        ValueError: when the folder holds latents of something else, with the differences; when an image cannot be read.
    """
    folder = Path(os.path.expanduser(folder))
    refuse_odd_name(folder, "the folder of latents")
    if vae.config.get("scaling_factor") is not None and (reason := unmeasured(vae.config)):
        logger.warning("the latents are stored with a scaling_factor that was not measured: %s", reason)
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}")
    if compute_dtype not in (None, *DTYPES.values()):
        raise ValueError(
            f"compute_dtype must be one of {', '.join(map(str, DTYPES.values()))} or None, got {compute_dtype}"
        )
    if shard_images < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_size and shard_images must be at least 1, got {batch_size} and {shard_images}")
    if not len(image_set):
        raise ValueError("there must be at least one image to encode, got none")
    cache = on_main(
        lambda: _as_begun(
            folder,
            _identity(vae, image_set, kind, dtype, compute_dtype or _compute_dtype(vae, folder), seed, shard_images),
        )
    )
    if on_main(lambda: _is_complete(folder, cache)):
        return LatentDataset(folder)
    with only_user_of(folder, "writing latents to", "folder for the latents"):
        if on_main(lambda: _is_complete(folder, cache)):  # by whom it was in use
            return LatentDataset(folder)
        on_main(lambda: _clear(folder, _of_shards(cache)))
        fast = for_inference(vae, getattr(torch, cache.get(*COMPUTED)))
        values = math.prod(cache["data"]["image_shape"][1:]) * vae.config.get("block_out_channels", [1])[0]
        if batch_size is None:
            batch_size = max(1, (CPU_VALUES if vae.device.type == "cpu" else DEVICE_VALUES) // values)
        at_once = max(1, AT_ONCE // (batch_size * values))
        shards = _encode_shards(fast, image_set, folder, _of_shards(cache), batch_size, at_once, progress)

        def finish() -> None:
            if not any(shard["rows"] for shard in shards):
                raise ValueError("no image to encode can be read")
            index = {"cache": cache, "data": data, "images": sum(shard["rows"] for shard in shards)}
            index |= {"latent_shape": shards[0].pop("latent_shape")}
            for shard in shards[1:]:
                del shard["latent_shape"]
            index |= {"classes": None if image_set.classes is None else list(image_set.classes), "shards": shards}
            write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")

        on_main(finish)
    return LatentDataset(folder)


def _compute_dtype(vae: ModelMixin, folder: Path) -> torch.dtype:
    """In which the latents in `folder` were begun, or, if none were, in which they are to be computed by default."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        if (header := _header(path)) and (dtype := DTYPES.get(str(header["cache"].get(*COMPUTED)))):
            return dtype
    return fast_dtype(vae.device) if vae.dtype == torch.float32 else vae.dtype


def _identity(
    vae: ModelMixin,
    image_set: ImageSet,
    kind: Kind,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    seed: int,
    shard_images: int,
) -> dict[str, Any]:
    """All that decides what is in a cache."""
    identity = {
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
        "data": _data_identity(image_set),
    }
    if compute_dtype != torch.float32:
        identity["compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    return json.loads(json.dumps(identity))  # as it is read again, without tuples


def _data_identity(image_set: ImageSet) -> dict[str, Any]:
    labels, contents = None if image_set.labels is None else image_set.labels.tolist(), image_set.contents()
    return ({"contents": contents} if contents else {}) | {
        "fingerprint": image_set.fingerprint(),
        "images": len(image_set),
        "image_shape": list(image_set.__getitems__([0]).pixels.shape[1:]),
        "resize": image_set.config.resize if isinstance(image_set, StoredImages) else None,
        "labels": None if labels is None else digest_of([labels, image_set.classes]),
        "captions": None if image_set.captions is None else digest_of(image_set.captions),
    }


def _as_begun(folder: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """All that decides what is in a cache; without the contents of the images if the folder holds all latents of an
    earlier version, which did not record them.
    """
    if not (folder / INDEX).exists() or "contents" in _read_index(folder)["cache"].get("data", {}):
        return cache
    return _of_shards(cache)


def _of_shards(cache: dict[str, Any]) -> dict[str, Any]:
    """What each shard says of the cache: all but the contents of the images, so that a mended file does not cost the
    shards of others.
    """
    return cache | {"data": {name: value for name, value in cache["data"].items() if name != "contents"}}


def _is_complete(folder: Path, cache: dict[str, Any]) -> bool:
    """Whether all that `cache` says is there; ValueError when the folder holds something else."""
    if not (folder / INDEX).exists():
        return False
    index = _read_index(folder)
    _check_same(folder, index["cache"], cache)
    return not _changed(folder, index)


def _clear(folder: Path, cache: dict[str, Any]) -> None:
    """Leaves nothing that is half-written or would pass for complete; ValueError when shards are of something else."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        header = _header(path)
        if header is not None:
            _check_same(folder, header["cache"], cache)
    with naming(folder / INDEX):
        delete_file(folder / INDEX)
    for partial in (*folder.glob(".shard-*.partial"), *folder.glob(f".{INDEX}.partial")):
        delete_file(partial)
    own = ("shard-", ".lock", ".tmp")
    if all(path.name.startswith(own) for path in folder.iterdir()):
        for partial in folder.glob(".tmp??????"):  # of safetensors itself
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
    """Values of nested dicts by dotted name."""
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
    """What each shard holds, after those that were not whole are written, on a CPU by `at_once` forwards at a time."""
    rank, processes = process_share()
    length = cache["shard_images"]
    count = math.ceil(len(image_set) / length)
    found: dict[int, dict[str, Any]] = {}

    def check() -> Iterator[int]:
        for number in range(rank, count, processes):
            if description := _whole(_shard(folder, number), cache):
                found[number] = description
            yield 0

    for _ in _together(check(), math.ceil(count / processes)):
        pass
    kept = dict(gather_parts(list(found.items())))
    missing = [number for number in range(count) if number not in kept]
    own = missing[rank::processes]
    images = {number: range(number * length, min((number + 1) * length, len(image_set))) for number in missing}
    batches = {number: math.ceil(len(images[number]) / batch_size) for number in missing}

    def work() -> Iterator[int]:
        for number in own:
            path = _shard(folder, number)
            yield from _encode_shard(vae, image_set, images[number], path, cache, batch_size, at_once)
            found[number] = _whole(path, cache)
            assert found[number] is not None

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
    """What `work` yields, step by step, of several processes summed over all and some steps; an error in one is raised
    on all after these, so that none waits for another for longer. After `steps`, all have come to their end.
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


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _encode_shard(
    vae: ModelMixin,
    image_set: ImageSet,
    images: range,
    path: Path,
    cache: dict[str, Any],
    batch_size: int,
    at_once: int,
) -> Iterator[int]:
    """Writes the shard of `images` after its last batch, and yields after each batch how many were done."""
    kept: list[int] = []
    names = ("mean", "logvar") if cache["kind"] == "posterior" else ("latents",)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    waiting: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    checked = 0
    batches = [range(start, min(start + batch_size, images.stop)) for start in images[::batch_size]]

    def read() -> Iterator[tuple[range, list[int], torch.Tensor]]:
        for indices, pixels in read_ahead(image_set, batches):
            own, batch = kept_images(image_set, indices, pixels, vae.device)
            if not own:  # the shape of the latents all the same
                batch = torch.zeros(1, *cache["data"]["image_shape"], device=vae.device)
            yield indices, own, batch

    at_once = min(at_once, len(batches))
    for (indices, own, _), posterior in several_at_once(lambda part: encode(vae, part[2]), read(), vae.device, at_once):
        if cache["kind"] == "posterior":
            values = (posterior.mean, posterior.logvar)
        elif own and cache["kind"] == "sample":
            values = (next(draw(posterior, own, cache["seed"], 1)),)
        else:
            values = (posterior.mode(),)
        for name, value in zip(names, values, strict=True):
            waiting[name].append(value[: len(own)])
        kept += own
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
    header = {HEADER: json.dumps({"cache": cache, "sha256": _sum(tensors)})}
    with alone(f"writing {path.name}"), whole_file(path) as partial:
        save_tensors(partial, {name: tensor.contiguous() for name, tensor in tensors.items()}, header)
    yield len(indices)


def _stored(
    values: torch.Tensor, dtype: torch.dtype, name: str, indices: list[int], image_set: ImageSet
) -> torch.Tensor:
    """The values as they are kept; ArithmeticError naming the first image whose values cannot be."""
    stored = values.to(dtype).cpu()
    bad = ~stored.flatten(1).isfinite().all(1)
    if bad.any():
        place = int(bad.nonzero()[0])
        image = image_set.name(indices[place])
        if not values[place].isfinite().all():
            raise FloatingPointError(f"{name} of the latents of {image} is not finite")
        raise OverflowError(
            f"{name} of the latents of {image} does not fit into {str(dtype).removeprefix('torch.')}, which ends at "
            f"{torch.finfo(dtype).max:,.0f}: it goes to {values[place].abs().max():,.0f}. Take bfloat16 or float32"
        )
    return stored


def _sum(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself; None if it is torn or no shard."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            return header if isinstance(header["cache"], dict) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _whole(path: Path, cache: dict[str, Any]) -> dict[str, Any] | None:
    """What the index says of a shard of `cache`; None if it is not there or not whole."""
    header = _header(path)
    if header is None or header["cache"] != cache:
        return None
    tensors = _tensors(path)
    if _sum(tensors) != header.get("sha256"):
        return None
    latents = tensors["mean" if cache["kind"] == "posterior" else "latents"]
    return {"rows": len(latents), "latent_shape": list(latents.shape[1:])} | described(path)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of a shard, mapped: what is not used is not read."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_index(folder: Path) -> dict[str, Any]:
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
            f"{folder.resolve()} holds no latents that are complete: there is no {INDEX}, and {shards} shards. The "
            "same encode command goes on where it was interrupted"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no index of latents ({error}); delete it and encode again") from error
    if (version := index["cache"]["format"]) > FORMAT:
        raise ValueError(
            f"{path} is of format {version}, this version of diffusers_vae reads up to {FORMAT}; install a newer one"
        )
    return index


def _changed(folder: Path, index: dict[str, Any]) -> list[str]:
    """Names of the shards that are missing or of another size than they were written with."""
    changed = []
    for number, shard in enumerate(index["shards"]):
        path = _shard(folder, number)
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            changed.append(path.name)
    return changed


def matching_latents(vae: ModelMixin, image_set: ImageSet, folder: str | Path, data: str) -> LatentDataset:
    """The latents in `folder`, of whatever kind and dtype, if they are those of these images under this VAE.

    Args:
        vae: whose weights count.
        image_set: whose images count, and not their labels and captions.
        folder: that `encode_images` wrote.
        data: which images these are, in words.

    Raises:
        FileNotFoundError: when there is no cache that is complete.
        ValueError: when the latents are of other images or of another VAE.
    """
    latents = LatentDataset(folder, weights_hash(vae))
    found, wanted = latents.cache["data"], json.loads(json.dumps(_data_identity(image_set)))
    compared = ["fingerprint", "images", "image_shape", "resize"]
    compared += ["contents"] * ("contents" in found)  # which earlier versions did not record
    if differing := [name for name in compared if found[name] != wanted.get(name)]:
        digests = ("fingerprint", "contents")
        what = ", ".join(f"{name} {found[name]} and not {wanted[name]}" for name in differing if name not in digests)
        raise ValueError(
            f"{Path(folder).resolve()} holds latents of other images: {found['images']:,}, "
            f"{latents.index['data']}, where {wanted['images']:,}, {data}, are wanted{f' ({what})' if what else ''}. "
            "`diffusers-vae encode DATA "
            "--split training`, with the same settings of the data, encodes those that are trained on"
        )
    return latents


class LatentDataset(Dataset):
    """The latents that `encode_images` wrote to `folder`, in float32, with labels and captions if the images had them.

    A row is a dict of `mean` and `logvar`, or of `latents`, each (C, h, w), and of `label`, int64, and `captions`, a
    list of one or more, so that batches need a `collate_fn` where their numbers differ. Files are mapped into memory,
    not loaded: the system can drop what was read at any time.

    Args:
        folder: of the cache.
        weights_hash: of the VAE that the latents must be of.

    Raises:
        FileNotFoundError: when there is no cache that is complete.
        ValueError: when a shard is missing or changed, or the latents are of another VAE.
    """

    def __init__(self, folder: str | Path, weights_hash: str | None = None):
        self.folder = Path(os.path.expanduser(folder))
        refuse_odd_name(folder, "the folder of latents")
        self.index = _read_index(self.folder)
        self.cache: dict[str, Any] = self.index["cache"]
        """What the latents were computed from."""
        if weights_hash is not None and weights_hash != self.weights_hash:
            raise ValueError(
                f"{self.folder.resolve()} holds latents of another VAE, whose weights_hash is {self.weights_hash}, and "
                f"not {weights_hash}: encode the images with this VAE into another folder"
            )
        self._refuse(_changed(self.folder, self.index))
        self._refuse(self._other_shapes(range(len(self.index["shards"]))))
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.index["shards"]])
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def _other_shapes(self, numbers: Iterable[int]) -> list[str]:
        """Names of those shards that lack a tensor, or have one of another shape or dtype than the index says, by their
        headers.
        """
        columns = ["indices"] + ["labels"] * (self.cache["data"]["labels"] is not None)
        texts = ["captions"] * (self.cache["data"]["captions"] is not None)
        columns += ["caption_ends"] * len(texts)
        other = []
        for number in numbers:
            path, rows = _shard(self.folder, number), self.index["shards"][number]["rows"]
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
        """Without what was read, so that workers map the files themselves."""
        return {name: value for name, value in vars(self).items() if name not in ("labels", "captions", "indices")} | {
            "_open": {}
        }

    @property
    def kind(self) -> Kind:
        """posterior, sample or mode."""
        return self.cache["kind"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored values."""
        return DTYPES[self.cache["dtype"]]

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which the encoder ran."""
        return getattr(torch, self.cache.get(*COMPUTED))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return tuple(self.index["latent_shape"])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each class."""
        return None if self.index["classes"] is None else tuple(self.index["classes"])

    @property
    def weights_hash(self) -> str:
        """Of the VAE, as `models.weights_hash` has it."""
        return self.cache["vae"]["weights_hash"]

    @property
    def vae_config(self) -> dict[str, Any]:
        """Of the VAE: scaling_factor, shift_factor and the rest; the latents are not scaled."""
        return self.cache["vae"]["config"]

    @property
    def fingerprint(self) -> str:
        """The same for the same latents, labels and captions in the same order, and for others another."""
        return digest_of([self.cache, self.index["shards"]])

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard["bytes"] for shard in self.index["shards"])

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """(N,) int64 classes."""
        return None if self.cache["data"]["labels"] is None else self._column("labels")

    @cached_property
    def indices(self) -> torch.Tensor:
        """(N,) places in the image set; images that could not be read are missing."""
        return self._column("indices")

    @cached_property
    def captions(self) -> list[tuple[str, ...]] | None:
        """One or more of each image."""
        if self.cache["data"]["captions"] is None:
            return None
        return [tuple(self._captions(*self._place(row))) for row in range(len(self))]

    def _column(self, name: str) -> torch.Tensor:
        return torch.cat([self._shard(number)[name] for number in range(len(self.index["shards"]))])

    def _shard(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a shard, mapped; ValueError when the file was cut short, since reading what is no longer there
        would end the process.
        """
        path, shard = _shard(self.folder, number), self.index["shards"][number]
        try:
            if path.stat().st_size != shard["bytes"]:
                self._refuse([path.name])
            if number not in self._open:
                self._refuse(self._other_shapes([number]))
                self._open[number] = _tensors(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot read {path.resolve()}: {error}") from error
        return self._open[number]

    @property
    def _names(self) -> tuple[str, ...]:
        """Names of the tensors of latents in a shard."""
        return ("mean", "logvar") if self.kind == "posterior" else ("latents",)

    def _place(self, row: int) -> tuple[int, int]:
        """Shard of a row, and its place there."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"there are {len(self)} images, got index {row}")
        row %= len(self)
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return number, row - int(self._starts[number])

    def _captions(self, number: int, place: int) -> list[str]:
        shard = self._shard(number)
        ends = shard["caption_ends"]
        start = int(ends[place - 1]) if place else 0
        try:
            captions = json.loads(shard["captions"][start : int(ends[place])].numpy().tobytes())
            check_type(captions, list[str], "captions")
        except (KeyError, ValueError):
            self._refuse([_shard(self.folder, number).name])
        return captions

    def __len__(self) -> int:
        return self.index["images"]

    def __getitem__(self, row: int) -> dict[str, Any]:
        number, place = self._place(int(row))
        shard = self._shard(number)
        item: dict[str, Any] = {name: shard[name][place].to(torch.float32, copy=True) for name in self._names}
        if "labels" in shard:
            item["label"] = shard["labels"][place].clone()
        if "captions" in shard:
            item["captions"] = self._captions(number, place)
        return item

    def latents(self, indices: Sequence[int] | torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents (B, C, h, w) of the rows `indices`, unscaled, float32, on the device of `noise`.

        Args:
            indices: of rows, any number of times.
            noise: standard normal (B, C, h, w), for mean + std * noise; without it, the mean or what is stored.

        Raises:
            ValueError: when there is noise and the cache holds no posterior, or it is of another shape.
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
        """Mean and logvar stacked, (B, 2 C, h, w) in float32, of the rows `indices`; of a cache of kind posterior."""
        rows = [int(row) for row in indices]
        return torch.cat([self._rows(name, rows) for name in ("mean", "logvar")], 1)

    def _rows(self, name: str, rows: list[int]) -> torch.Tensor:
        found = torch.empty(len(rows), *self.latent_shape)
        places = np.array([self._place(row) for row in rows]).reshape(-1, 2)
        for number in np.unique(places[:, 0]).tolist():
            here = torch.from_numpy(places[:, 0] == number)
            found[here] = self._shard(number)[name][torch.from_numpy(places[:, 1])[here]].float()
        return found

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read these shards again, by default all.

        Raises:
            OSError: when one cannot be read.
            ValueError: naming those that are missing or whose SHA-256 is not that of the index, or the first with a
                value that is not finite.
        """
        numbers = range(len(self.index["shards"])) if shards is None else list(shards)
        changed = []
        for number in numbers:
            path, shard = _shard(self.folder, number), self.index["shards"][number]
            if not path.is_file() or described(path) != {name: shard[name] for name in ("bytes", "sha256")}:
                changed.append(path.name)
        self._refuse(changed)
        for number in numbers:
            for name in self._names:
                if not all(part.isfinite().all() for part in self._shard(number)[name].split(CHECKED)):
                    raise ValueError(
                        f"{_shard(self.folder, number).resolve()} holds a {name} that is not finite: delete the file, "
                        "and the same encode command writes it again"
                    )

    def to_datasets(self) -> datasets.Dataset:
        """The same rows as a Hugging Face `datasets.Dataset`: `mean` and `logvar`, or `latents`, as Array3D of float32,
        `label` as ClassLabel, `captions`. It is written to the cache of `datasets` row by row, never whole in memory.

        Raises:
            ImportError: when `datasets` is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("this needs Hugging Face datasets: pip install datasets") from error
        features: dict[str, Any] = {name: datasets.Array3D(self.latent_shape, "float32") for name in self._names}
        if self.cache["data"]["labels"] is not None:
            known = self.classes
            features["label"] = datasets.ClassLabel(names=list(known)) if known else datasets.Value("int64")
        if self.cache["data"]["captions"] is not None:
            features["captions"] = [datasets.Value("string")]
        return datasets.Dataset.from_generator(
            _generate,
            features=datasets.Features(features),
            gen_kwargs={"folder": str(self.folder.resolve()), "fingerprint": self.fingerprint},
        )


class Verification:
    """The verification of latents that are trained on, by the main process: of up to `VERIFIED_AT_ONCE` bytes before
    the first step, of more while training goes on. All processes must make one together.

    Raises:
        OSError, ValueError: on all processes, what `LatentDataset.verify` raises.
    """

    def __init__(self, latents: LatentDataset):
        self._error: Exception | None = None
        self._thread: Thread | None = None
        if latents.bytes <= VERIFIED_AT_ONCE:
            on_main(latents.verify)
        elif process_share()[0] == 0:
            # a process that is interrupted does not wait for it
            self._thread = Thread(target=self._run, args=[latents], name="verify latents", daemon=True)
            self._thread.start()

    def _run(self, latents: LatentDataset) -> None:
        try:
            for number in range(len(latents.index["shards"])):
                latents.verify([number])
        except Exception as error:  # of any kind: it is raised where the latents are used
            self._error = error

    def check(self) -> None:
        """Raise what was found so far, on the main process."""
        if self._error:
            raise self._error

    def finish(self) -> None:
        """Wait for the end, and raise what was found on all processes."""

        def wait() -> None:
            if self._thread and self._thread.is_alive():
                logger.info("waiting until all latents are verified")
                self._thread.join()
            self.check()

        on_main(wait)


def _generate(folder: str, fingerprint: str) -> Iterator[dict[str, Any]]:
    """The rows for `datasets`, which keeps what it has written under the name of these arguments."""
    latents = LatentDataset(folder)
    if latents.fingerprint != fingerprint:
        raise ValueError(f"the latents in {folder} were changed while they were read")
    for row in range(len(latents)):
        item = latents[row]
        yield {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in item.items()}
