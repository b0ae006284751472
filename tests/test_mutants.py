"""Damaged files of every format are read or refused by name, whatever the damage: nothing ends the process. What the
format's own library reads of them is read too, or refused for a reason that is listed.
"""

import io
import json
import re
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import png
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tifffile
import torch
import yaml
from PIL import Image
from support.hub import connect
from support.models import original, tiny_vae
from support.mutants import digest, outcomes
from support.runs import tiny

from diffusers_vae import VAE, LatentDataset, encode_images
from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.data import ArrayImages, DataConfig, Records, load_split
from diffusers_vae.images.files import read_header, read_image
from diffusers_vae.images.fit import Fit
from diffusers_vae.images.raw_files import FileKind, read_kind, read_values, write_values
from diffusers_vae.models import load_autoencoder
from diffusers_vae.settings import read_yaml

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")

PIXELS = (np.add.outer(np.arange(24) * 5, np.arange(20) * 6)[..., None] + [0, 40, 90]).astype(np.uint8) % 251


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    connect(monkeypatch, None, tmp_path / "cache")


# what this package makes of a file


def as_image(path):
    read_header(path)
    read_image(path, 3, Fit((4, 4)))
    return channels_last(read_image(path, 3).numpy())


def as_values(path):
    read_kind(path, 3)
    return channels_last(read_values(path, 3)[0])


def as_set(name, **settings):
    settings |= {"channels": 3, "resolution": PIXELS.shape[:2], "on_bad_image": "skip", "heldout_fraction": 0.5}

    def read(path):
        images, _ = load_split(DataConfig(name=name, root=str(path), **settings), "all")
        read = images.read(range(len(images)))
        return in_order(channels_last(pixels) for pixels in read.pixels.numpy())

    return read


def as_settings(path):
    with redirect_stderr(io.StringIO()) as said:
        try:
            parse_settings(TRAININGS["train"], ["--config", str(path)])
        except SystemExit:
            raise ValueError(said.getvalue()) from None


def as_model(path):
    return arrays(load_autoencoder(str(path)).state_dict())


def as_latents(path):
    latents = LatentDataset(path)
    assert len(latents.indices) == len(latents.labels) == len(latents.captions) == len(latents)
    with suppress(ValueError):
        latents.verify()
    return [{name: np.asarray(value) for name, value in latents[row].items()} for row in range(len(latents))]


def arrays(tensors):
    return {name: tensor.numpy() for name, tensor in sorted(tensors.items())}


def channels_last(values):
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))


# what the format's own library makes of it, used as its documentation has it


def by_pillow(file):
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))


def by_pypng(path):
    width, height, rows, _ = png.Reader(filename=str(path)).read()
    return np.vstack([np.array(row) for row in rows]).reshape(height, width, -1)


def by_zipfile(path):
    with zipfile.ZipFile(path) as archive:
        return decoded(lambda name=name: archive.read(name) for name in archive.namelist() if name.endswith(".png"))


def by_tarfile(path):
    with tarfile.open(path) as archive:
        return decoded(lambda one=one: archive.extractfile(one).read() for one in archive if one.name.endswith(".png"))


def by_pyarrow(path):
    return decoded(lambda row=row: row["bytes"] for row in pq.read_table(path)["image"].to_pylist())


def decoded(contents):
    """The images that can be read."""
    images = []
    for content in contents:
        with suppress(Exception):
            images.append(by_pillow(io.BytesIO(content())))
    if not images:
        raise ValueError("no image")
    return in_order(images)


def by_numpy(path):
    found = np.load(path, allow_pickle=False)
    return in_order(found if isinstance(found, np.ndarray) else found["images"])


def in_order(images):
    """Sort images by content, since a damaged name changes the order of files."""
    return sorted(images, key=lambda image: image.tobytes())


# undamaged files


def saved(suffix, **settings):
    return lambda path: Image.fromarray(PIXELS).save(path, suffix, **settings)


def tiff(**settings):
    return lambda path: tifffile.imwrite(path, PIXELS, photometric="rgb", rowsperstrip=8, **settings)


def deep_png(path):
    values = np.moveaxis(PIXELS, -1, 0).astype(np.uint16) * 257
    write_values(path, values, FileKind("PNG", "<u2", 3, *PIXELS.shape[:2], "HWC"))


def packed(path):
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    for number in range(6):
        Image.fromarray(PIXELS + np.uint8(number)).save(images / f"{number}.png")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for image in sorted(images.iterdir()):
                archive.write(image, image.name)
    else:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(images, "a" * 120)  # a long name is in a header of its own


def parquet(path):
    from datasets import Dataset, Features
    from datasets import Image as Column

    rows = [io.BytesIO() for _ in range(6)]
    for number, row in enumerate(rows):
        Image.fromarray(PIXELS + np.uint8(number)).save(row, "png")
    images = [{"bytes": row.getvalue(), "path": None} for row in rows]
    Dataset.from_dict({"image": images}, Features({"image": Column()})).to_parquet(path)


def settings(path):
    tiny("run").save(path)


def model(path):
    tiny_vae().save_pretrained(path.parent)
    return path.parent


def single_file(path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = VAE(block_out_channels=(32,), mid_block_add_attention=False, layers_per_block=1, **blocks)
    safetensors.numpy.save_file(arrays(original(vae.to_diffusers())), path)


def latents(path):
    pixels = torch.from_numpy(PIXELS[None, None, :16, :16, 0])
    captions = [("a caption", "another")]
    images = ArrayImages(pixels, Records(torch.tensor([0]), ("a", "b"), captions))
    encode_images(tiny_vae(), images, path.parent)
    return path.parent


class Format(NamedTuple):
    write: Callable[[Path], Path | None]
    """Returns the folder that is read, where it is not the file."""
    read: Callable[[Path], object]
    library: Callable[[Path], object] | None = None
    few: int = 12
    """Mutants in a quick test; none of what another reads in the same way."""


FORMATS = {
    "a.png": Format(saved("png"), as_image, by_pillow),
    "values.png": Format(saved("png"), as_values, by_pypng, 0),
    "a.16-bit.png": Format(deep_png, as_image, by_pillow, 0),
    "values.16-bit.png": Format(deep_png, as_values, by_pypng),
    "a.jpg": Format(saved("jpeg"), as_image, by_pillow),
    "values.jpg": Format(saved("jpeg"), as_values, by_pillow, 0),
    "a.tif": Format(tiff(), as_image, by_pillow),
    "values.tif": Format(tiff(), as_values, tifffile.imread),
    "a.deflated.tif": Format(tiff(compression="deflate", predictor=False), as_image, by_pillow, 0),
    "values.deflated.tif": Format(tiff(compression="deflate", predictor=False), as_values, tifffile.imread),
    "a.webp": Format(saved("webp", lossless=True), as_image, by_pillow),
    "values.webp": Format(saved("webp", lossless=True), as_values, by_pillow, 0),
    "a.gif": Format(saved("gif"), as_image, by_pillow),
    "values.npy": Format(lambda path: np.save(path, PIXELS), as_values, np.load),
    "a.npy": Format(lambda path: np.save(path, np.stack([PIXELS] * 3)), as_set("array"), by_numpy),
    "a.npz": Format(lambda path: np.savez_compressed(path, images=np.stack([PIXELS] * 3)), as_set("array"), by_numpy),
    "a.zip": Format(packed, as_set("folder"), by_zipfile),
    "a.tar": Format(packed, as_set("folder"), by_tarfile),
    "a.parquet": Format(parquet, as_set("datasets"), by_pyarrow, 5),
    "stream.parquet": Format(parquet, as_set("datasets", streaming=True), by_pyarrow, 5),
    "any.yaml": Format(settings, read_yaml, lambda path: yaml.safe_load(path.read_text())),
    "settings.yaml": Format(settings, as_settings, few=5),
    "diffusion_pytorch_model.safetensors": Format(model, as_model, safetensors.numpy.load_file, 5),
    "original.safetensors": Format(single_file, as_model, safetensors.numpy.load_file, 5),
    "shard-00000.safetensors": Format(latents, as_latents, safetensors.numpy.load_file),
    "index.json": Format(latents, as_latents, lambda path: json.loads(path.read_text())),
}


REASONS = {
    "no image is left to (train on|hold out)": "a set needs a readable image in both parts",
    "it has no end": "tarfile takes a damaged header for the end, and leaves out what follows",
    "overlaps what follows|encrypted or packed|unpacks to": "the archive's directory is wrong: all of it is refused",
    "data.image_column must say": "the type of the column is lost, which pyarrow does not need to know",
    "it has . channels|cannot be read unconverted": "the image does not have the channels or colours of data.channels",
    "it has no pixels|data type that is not supported|pages of a TIFF": "tifffile gives an empty array",
    "lacks . weights|Missing key": "a tensor has lost its name, and the model its weights",
    "missing or not as written|not an index of latents": "a key, a tensor or a value of the cache is not what it was",
}
"""What a refusal of a file says that the format's own library reads, and why it is right."""


@contextmanager
def undamaged(name, folder):
    """A file, what is read of it, itself or its folder, and how."""
    path, kind = folder / name, FORMATS[name]
    source = kind.write(path) or path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.read(source)  # imports what it needs, before the process forks
        yield path, source, kind


def assert_safe(found):
    wrong = {seed: what for seed, what in found.items() if not what.startswith(("read ", "refused: "))}
    assert not wrong, "\n".join(f"seed {seed}: {what}" for seed, what in wrong.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.few])
def test_mutants_are_read_or_refused_by_name(name, tmp_path):
    with undamaged(name, tmp_path) as (path, source, kind):
        found = outcomes(path, range(kind.few), kind.read, source)
    assert len(found) == kind.few
    assert_safe(found)


@pytest.mark.soak
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_library_reads_is_read_or_refused_for_a_reason(name, tmp_path, capsys):
    seeds = range(1000, 1300)
    with undamaged(name, tmp_path) as (path, source, kind):
        found = outcomes(path, seeds, kind.read, source)
        others = outcomes(path, seeds, named(kind.library), path) if kind.library else {}
        whole = f"read {digest(kind.read(source))}"
        whole_by_library = f"read {digest(kind.library(path))}" if kind.library else None
    assert_safe(found)
    ours, theirs = ({seed for seed in found if what.get(seed, "").startswith("read")} for what in (found, others))
    refused = [found[seed] for seed in theirs - ours]
    reasons = Counter(reason for text in refused for pattern, reason in REASONS.items() if re.search(pattern, text))
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: of {len(found)}, {len(ours)} are read, {len(theirs)} by the library\n")
        sys.stdout.writelines(f"    {count} refused: {reason}\n" for reason, count in reasons.items())
    assert not [text for text in refused if not any(re.search(pattern, text) for pattern in REASONS)]
    unharmed = {seed for seed in ours if others.get(seed) == whole_by_library}
    assert not [seed for seed in unharmed if found[seed] != whole]


def named(read):
    """`read`, with whatever it raises as an error that names the file."""

    def attempt(path):
        try:
            return read(path)
        except Exception as error:
            raise ValueError(f"{path.name}: {error}") from error

    return attempt
