"""Damaged files of every format are read or refused by name, whatever the damage: nothing ends the process."""

import sys
import tarfile
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest
import tifffile
from PIL import Image

from diffusers_vae.data import DataConfig, load_split
from diffusers_vae.images import read_header, read_image
from diffusers_vae.values import FileKind, read_kind, read_values, write_values

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")

PIXELS = (np.add.outer(np.arange(24) * 5, np.arange(20) * 6)[..., None] + [0, 40, 90]).astype(np.uint8) % 251


def as_image(path):
    read_header(path)
    read_image(path, 3, scaled=lambda height, width: (4, 4))


def as_values(path):
    read_kind(path, 3)
    read_values(path, 3)


def as_either(path):
    try:
        as_image(path)
    finally:
        as_values(path)


def as_folder(path):
    load_split(DataConfig(name="folder", root=str(path), channels=3, resolution=8, on_bad_image="skip"), "all")


def as_arrays(path):
    load_split(DataConfig(name="array", root=str(path), channels=3, resolution=8), "all")


def as_array_or_image(path):
    try:
        as_arrays(path)
    finally:
        as_values(path)


def save(suffix, **settings):
    return lambda path: Image.fromarray(PIXELS).save(path, suffix, **settings)


def tiff(**settings):
    return lambda path: tifffile.imwrite(path, PIXELS, photometric="rgb", rowsperstrip=8, **settings)


def deep_png(path):
    values = np.moveaxis(PIXELS, -1, 0).astype(np.uint16) * 257
    write_values(path, values, FileKind("PNG", "<u2", 3, *PIXELS.shape[:2], "HWC"))


def packed(path):
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    for number in range(3):
        Image.fromarray(PIXELS + np.uint8(number)).save(images / f"{number}.png")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for image in sorted(images.iterdir()):
                archive.write(image, image.name)
    else:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(images, "a" * 120)  # a long name is in a header of its own


FORMATS = {
    "png": (save("png"), as_either),
    "16-bit.png": (deep_png, as_either),
    "jpg": (save("jpeg"), as_either),
    "tif": (tiff(), as_either),
    "deflated.tif": (tiff(compression="deflate", predictor=False), as_either),
    "webp": (save("webp", lossless=True), as_either),
    "gif": (save("gif"), as_image),
    "npy": (lambda path: np.save(path, np.stack([PIXELS] * 3)), as_array_or_image),
    "npz": (lambda path: np.savez_compressed(path, images=np.stack([PIXELS] * 3)), as_arrays),
    "zip": (packed, as_folder),
    "tar": (packed, as_folder),
}


def check(name, tmp_path, seeds):
    from support.mutants import outcomes

    write, read = FORMATS[name]
    path = tmp_path / f"file.{name}"
    write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name != "npy":  # as an image it has four axes
            read(path)
        found = outcomes(path, seeds, read)
    counts = Counter(what if what in ("read", "refused") else "wrong" for what in found.values())
    wrong = {seed: what for seed, what in found.items() if what not in ("read", "refused")}
    assert not wrong, f"{name}: {counts}\n" + "\n".join(f"seed {seed}: {what}" for seed, what in wrong.items())
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_mutants_are_read_or_refused_by_name(name, tmp_path):
    assert sum(check(name, tmp_path, range(20)).values()) == 20


@pytest.mark.soak
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutants_are_read_or_refused_by_name(name, tmp_path, capsys):
    counts = check(name, tmp_path, range(1000, 1300))
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {dict(counts)}\n")
