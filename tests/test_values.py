"""Files of any number of channels and any depth: their values survive, in files, in sets, and through a whole run."""

import dataclasses
import io
import json
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import png
import pytest
import tifffile
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from support.files import paths_of
from support.hub import CONFIG, REPO, make_run, uploaded
from support.models import make_vae
from support.runs import tiny
from support.stock import run_without_package

from diffusers_vae import VAE, cli
from diffusers_vae.data import ArrayImages, DataConfig, StoredImages, load_data, look, recommended
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.hub.card import render_card
from diffusers_vae.hub.config import HubConfig
from diffusers_vae.hub.push import push
from diffusers_vae.images.ranges import EXACT, ValueRange, to_model_range
from diffusers_vae.images.raw_files import FileKind, read_kind, read_values, write_values
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig, Source
from diffusers_vae.tasks.autoencoder_data import load_run_data

DEEP = (0, 65535)


def there_and_back(values, low, high):
    """What becomes of values that a model reconstructs without an error."""
    stated = ValueRange(low, high)
    return stated.from_model_range(to_model_range(stated.to_unit(values)), values.dtype)


class TestConversion:
    @pytest.mark.parametrize(
        ("dtype", "low", "high"),
        [("uint16", 0, 65535), ("int16", -32768, 32767), ("uint8", 0, 255), ("uint16", 291, 694), ("bool", 0, 1)],
    )
    def test_all_values_of_a_dtype_come_back(self, dtype, low, high):
        values = np.arange(low, high + 1).astype(dtype)
        back = there_and_back(values, low, high)
        assert back.dtype == values.dtype and np.array_equal(back, values)

    @pytest.mark.parametrize(("dtype", "low"), [("int32", -(2**23)), ("int32", 0), ("uint32", 2**31), ("int64", -5)])
    def test_integers_come_back_up_to_the_bound(self, dtype, low):
        near = np.arange(2**14)
        drawn = np.random.default_rng(0).integers(0, EXACT + 1, 2**18)
        values = (low + np.concatenate([near, EXACT - near, EXACT // 2 + near, EXACT // 4 - near, drawn])).astype(dtype)
        assert np.array_equal(there_and_back(values, low, low + EXACT), values)

    @pytest.mark.slow
    def test_no_wider_range_could_hold_integers(self):
        upper = np.arange(EXACT // 2 + 1, EXACT + 3)  # of [0, EXACT + 2], to 0.5 and above
        assert len(np.unique((upper / (EXACT + 2)).astype(np.float32))) < len(upper)
        wider = ValueRange(0, EXACT + 1)
        for use in (lambda: wider.to_unit(np.int32([5])), lambda: wider.from_model_range(torch.zeros(1), "int32")):
            with pytest.raises(ValueError, match=r"all integers in \[0, 16777217\].* at most 2\^24 = 16,777,216"):
                use()
        assert wider.to_unit(np.float32([EXACT])).item() == pytest.approx(1)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_floats_come_back_within_the_precision_of_float32(self, dtype):
        values = np.random.default_rng(0).uniform(-3.1, 7.3, 10_000).astype(dtype)
        back = there_and_back(values, -3.125, 7.5)
        assert back.dtype == values.dtype
        rounding = 0 if dtype == "float64" else np.finfo(dtype).eps * 7.5
        assert abs(back.astype(float) - values).max() <= 10.625 * 2**-24 + rounding

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_ends_are_those_that_a_file_can_hold(self, dtype):
        ends = np.array([-0.1, 0.1]).astype(dtype)  # one of them lies beyond 0.1
        unit = ValueRange(-0.1, 0.1).to_unit(ends)
        assert unit.tolist() == pytest.approx([0, 1], abs=1e-3) and unit.min() >= 0 and unit.max() <= 1
        assert np.array_equal(ValueRange(-0.1, 0.1).from_model_range(torch.tensor([-9.0, 9.0]), dtype), ends)

    @pytest.mark.parametrize("wrong", [-1.5, 2.5, np.nan, np.inf, -np.inf])
    def test_what_is_outside_is_refused(self, wrong):
        with pytest.raises(ValueError, match=rf"finite and lie in \[-1, 2\], which data.value_range .* got {wrong}"):
            ValueRange(-1, 2).to_unit(np.array([0, wrong, 1]))

    def test_reconstructions_are_clamped_to_the_range_and_the_dtype(self):
        images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])
        assert ValueRange(0, 65535).from_model_range(images, "uint8").tolist() == [0, 0, 255, 255, 255]
        assert ValueRange(10, 20).from_model_range(images.bfloat16(), "int16").tolist() == [10, 10, 15, 20, 20]
        assert ValueRange(0.5, 3.5).from_model_range(images, "uint8").tolist() == [1, 1, 2, 3, 3]
        with pytest.raises(ValueError, match="images must be finite"):
            ValueRange(0, 1).from_model_range(torch.tensor([0.0, float("nan")]), "float32")

    def test_other_values_are_no_images(self):
        with pytest.raises(ValueError, match="real numbers, got complex64"):
            ValueRange(0, 1).to_unit(np.zeros(3, np.complex64))

    @pytest.mark.parametrize("ends", [(1, 1), (2, 1), (0, float("inf")), (float("nan"), 1), (-1.7e308, 1.7e308)])
    def test_ends_must_be_finite_and_increase(self, ends):
        with pytest.raises(ValueError, match="two finite increasing numbers, got"):
            ValueRange(*ends)

    def test_is_kept_in_the_folder_of_a_model(self, tmp_path):
        assert ValueRange.load(tmp_path) is None
        ValueRange(-0.1, 1 / 3).save(tmp_path)
        assert ValueRange.load(tmp_path) == ValueRange(-0.1, 1 / 3)
        for text in ("{", "[1, 2]", '{"low": 3, "high": 2}', '{"low": 0}', '{"low": "a", "high": "b"}'):
            (tmp_path / "value_range.json").write_text(text)
            with pytest.raises(ValueError, match=r"value_range\.json must hold a range"):
                ValueRange.load(tmp_path)


def noise(dtype, *shape):
    """Any values that a dtype can hold."""
    generator = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return generator.normal(0, 100, shape).astype(dtype)
    if np.dtype(dtype).kind == "b":
        return generator.random(shape) < 0.5
    info = np.iinfo(dtype)
    return generator.integers(info.min, info.max, shape, dtype, endpoint=True)


def png_filtered(rows, step):
    """Bytes of the rows of a PNG by the five filters of its specification, 9.2, in turn."""
    above, filtered = np.zeros(rows.shape[1], int), []
    for number, row in enumerate(rows.astype(int)):
        left, corner = (np.concatenate([np.zeros(step, int), line[:-step]]) for line in (row, above))
        distances = [abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)]
        paeth = np.choose(np.argmin(distances, axis=0), [left, above, corner])
        guess = [0 * row, left, above, (left + above) // 2, paeth][number % 5]
        filtered.append(np.concatenate([[number % 5], (row - guess) % 256]))
        above = row
    return np.concatenate(filtered).astype(np.uint8).tobytes()


def write_png(path, width, height, colour, rows):
    """A PNG of 16 bits of these rows, filtered as they say."""
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(p)) + n + p + struct.pack(">I", zlib.crc32(n + p)) for n, p in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


KINDS = [
    FileKind("NPY", dtype, channels, 7, 9, layout)
    for dtype in ("|u1", "<u2", ">i2", "<i4", "<f2", ">f4", "<f8", "|b1")
    for channels, layout in ((1, "HW"), (5, "CHW"), (5, "HWC"))
]
KINDS += [
    FileKind("TIFF", dtype, channels, 7, 9, layout, photometric, ("unspecified",) * extra)
    for dtype in ("|u1", "<u2", "<i2", "<i4", "<f4")
    for channels, layout, photometric, extra in (
        (1, "HW", "MINISBLACK", 0),
        (1, "HW", "MINISWHITE", 0),
        (5, "HWC", "MINISBLACK", 4),
        (5, "CHW", "MINISBLACK", 4),
        (5, "pages", "MINISBLACK", 0),
        (3, "HWC", "RGB", 0),
        (5, "HWC", "RGB", 2),
        (4, "CHW", "SEPARATED", 0),
    )
]
KINDS += [FileKind("TIFF", "<u2", 4, 7, 9, "HWC", "RGB", ("unassalpha",))]
KINDS += [
    FileKind("PNG", dtype, channels, 7, 9, "HW" if channels == 1 else "HWC")
    for dtype in ("|u1", "<u2")
    for channels in (1, 2, 3, 4)
]


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, dataclasses.astuple(kind))))
    def test_come_back_bit_by_bit(self, kind, tmp_path):
        path, values = tmp_path / "first", noise(np.dtype(kind.dtype).newbyteorder("="), kind.channels, 7, 9)
        write_values(path, values, kind)
        assert read_kind(path, kind.channels) == kind
        read, found = read_values(path, kind.channels, lambda: io.BytesIO(path.read_bytes()))
        assert found == kind and read.dtype == values.dtype and np.array_equal(read, values)
        write_values(tmp_path / "second", read, found)
        assert (tmp_path / "second").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize(
        ("name", "channels", "mode", "least", "most"),
        [
            ("16bit.cropped.tif", 1, "1x uint16", 291, 694),
            ("tiff_16bit_RGB.tiff", 3, "3x uint16", 0, 39661),
            ("basn2c16.png", 3, "3x uint16", 0, 65535),
            ("i_trns.png", 1, "1x uint16", 0, 255),
            ("10ct_32bit_128.tiff", 1, "1x float32", np.float32(-3.1409369), np.float32(3.1406841)),
            ("transparent.png", 4, "4x uint8", 0, 255),
            ("uncompressed_la.png", 2, "2x uint8", 0, 255),
        ],
    )
    def test_real_ones_give_their_values_and_come_back(self, name, channels, mode, least, most, shared_data, tmp_path):
        values, kind = read_values(shared_data / "awkward" / name, channels)
        assert (kind.mode, values.min(), values.max()) == (mode, least, most)
        write_values(tmp_path / name, values, kind)
        again, same = read_values(tmp_path / name, channels)
        assert same == kind and np.array_equal(again, values)
        stated = ValueRange(*DEEP) if values.dtype.kind == "u" else ValueRange(-4, 4)
        back = stated.from_model_range(to_model_range(stated.to_unit(values)), values.dtype)
        assert np.abs(back.astype(float) - values).max() <= (0 if values.dtype.kind == "u" else 1e-6)

    def test_others_read_what_is_written(self, tmp_path):
        colours = noise("uint8", 4, 7, 9)
        write_values(tmp_path / "a.png", colours, FileKind("PNG", "|u1", 4, 7, 9, "HWC"))
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == "RGBA" and np.array_equal(np.moveaxis(np.array(image), -1, 0), colours)
        grey = noise("uint16", 1, 7, 9)
        write_values(tmp_path / "b.tif", grey, FileKind("TIFF", "<u2", 1, 7, 9, "HW", "MINISBLACK"))
        with Image.open(tmp_path / "b.tif") as image:
            assert image.mode == "I;16" and np.array_equal(np.array(image), grey[0])
        write_values(tmp_path / "c.npy", grey, FileKind("NPY", ">u2", 1, 7, 9, "HW"))
        assert np.array_equal(np.load(tmp_path / "c.npy"), grey[0])

    def test_photograph_comes_back_as_png(self, shared_data, tmp_path):
        values, kind = read_values(shared_data / "awkward" / "hopper.jpg", 3)
        write_values(tmp_path / "hopper.png", values, kind)
        assert kind.format == "JPEG" and np.array_equal(read_values(tmp_path / "hopper.png", 3)[0], values)

    def test_16_bit_png_is_the_same_by_another_reader(self, shared_data):
        path = shared_data / "awkward" / "basn2c16.png"
        _, _, rows, _ = png.Reader(filename=str(path)).read()
        expected = np.array([list(row) for row in rows]).reshape(32, 32, 3)
        assert np.array_equal(np.moveaxis(read_values(path, 3)[0], 0, -1), expected)

    @pytest.mark.parametrize("channels", [2, 3, 4])
    @pytest.mark.parametrize("interlaced", [False, True])
    def test_16_bit_png_with_every_filter(self, interlaced, channels, tmp_path):
        values = noise("uint16", channels, 40, 24)
        rows = np.moveaxis(values, 0, -1).reshape(40, -1)
        writer = png.Writer(24, 40, greyscale=channels == 2, alpha=channels != 3, bitdepth=16, interlace=interlaced)
        with open(tmp_path / "a.png", "wb") as file:
            writer.write_array(file, rows.ravel().tolist())
        if not interlaced:  # pypng does not filter
            filtered = png_filtered(rows.astype(">u2").view(np.uint8), 2 * channels)
            write_png(tmp_path / "a.png", 24, 40, {2: 4, 3: 2, 4: 6}[channels], filtered)
        assert np.array_equal(read_values(tmp_path / "a.png", channels)[0], values)

    @pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
    def test_damaged_16_bit_png_is_named_and_ends_no_process(self, place, tmp_path):
        path = tmp_path / "a.png"
        write_values(path, noise("uint16", 3, 64, 64), FileKind("PNG", "<u2", 3, 64, 64, "HWC"))
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the image {path}: it is damaged: the checksum"):
            read_values(path, 3)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_ones_are_upright_as_by_pillow(self, orientation, tmp_path):
        colours = np.moveaxis(noise("uint8", 3, 7, 9), 0, -1)
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
        Image.fromarray(colours).save(tmp_path / "a.jpg", exif=exif)
        tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
        for path in tmp_path.iterdir():
            with Image.open(path) as image:
                expected = np.moveaxis(np.array(ImageOps.exif_transpose(image)), -1, 0)
            values, kind = read_values(path, 3)
            assert np.array_equal(values, expected) and (kind.height, kind.width) == expected.shape[1:], path
            write_values(tmp_path / f"again{path.suffix}", values, kind)
            assert np.array_equal(read_values(tmp_path / f"again{path.suffix}", 3)[0], values)

    def test_16_bit_png_is_turned_too(self, tmp_path):
        values = noise("uint16", 3, 7, 9)
        write_values(tmp_path / "a.png", values, FileKind("PNG", "<u2", 3, 7, 9, "HWC"))
        exif = Image.Exif()
        exif[0x112] = 6
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        content = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])  # behind the header
        read, kind = read_values(tmp_path / "a.png", 3)
        assert (kind.height, kind.width) == (9, 7) and np.array_equal(read, np.rot90(values, -1, (1, 2)))

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("p_trns_single.png", "indices of a palette cannot be read unconverted"),
            ("1_trns.png", "1-bit values cannot be read unconverted"),
            (
                "dispose_bgnd.gif",
                "values of GIF with the mode P cannot be read unconverted: convert the file to NPY, PNG, TIFF",
            ),
            ("pil_sample_cmyk.jpg", "values of JPEG with the mode CMYK"),
            ("hopper.Lab.tif", "values of CIELAB cannot be read unconverted"),
            ("multipage.tiff", "the pages of a TIFF must be of one shape and dtype, got 2x10x10, 20x20"),
            ("hopper.jpg", "it has 3 channels, and data.channels, which all files must have, is 1"),
            ("truncated_image.png", "image file is truncated"),
            ("CONTENTS.txt", "cannot identify image file"),
        ],
    )
    def test_awkward_ones_are_refused_by_name(self, name, reason, shared_data):
        path = shared_data / "awkward" / name
        channels = 3 if name == "truncated_image.png" else 1
        with pytest.raises(ValueError) as refused:
            read_values(path, channels)
        assert str(refused.value).startswith(f"cannot read the image {path}: {reason}")

    @pytest.mark.parametrize(
        ("array", "channels", "reason"),
        [
            (
                np.zeros((5, 7, 5)),
                5,
                r"must be \(channels, height, width\).*\(5, 7, 5\): the channel axis is ambiguous",
            ),
            (np.zeros((4, 7, 6)), 5, r"got \(4, 7, 6\): no axis has this size"),
            (np.zeros((7, 6)), 5, "it has 1 channels, and data.channels, .* is 5"),
            (np.zeros((2, 5, 7, 6)), 5, r"got \(2, 5, 7, 6\)"),
            (np.zeros((0, 6)), 1, "it has no pixels"),
            (np.zeros((7, 6), complex), 1, "real numbers, got complex128"),
            (np.array([[{}]], object), 1, "real numbers, got object"),
        ],
    )
    def test_arrays_that_are_no_image(self, array, channels, reason, tmp_path):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match=f"a.npy: .*{reason}"):
            read_values(tmp_path / "a.npy", channels)

    @pytest.mark.parametrize("kind", [KINDS[3], KINDS[26], KINDS[-2]], ids=lambda kind: kind.format)
    def test_damage_and_size_are_told(self, kind, tmp_path, monkeypatch):
        path = tmp_path / "a"
        write_values(path, noise(kind.dtype, kind.channels, 7, 9), kind)
        content = path.read_bytes()
        for end in (len(content) // 2, 20, 3):
            with pytest.raises(ValueError, match=f"cannot read the image {path}: "):
                read_values(path, kind.channels, lambda end=end: io.BytesIO(content[:end]))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 62)
        with pytest.raises(ValueError, match="9x7 pixels are more than 62"):
            read_kind(path, kind.channels)

    @pytest.mark.parametrize(("package", "suffix"), [("tifffile", "tif"), ("png", "png")])
    def test_missing_package_is_named_and_no_bad_image(self, package, suffix, tmp_path, monkeypatch):
        kind = next(kind for kind in KINDS if kind.format[:3] == suffix.upper()[:3])
        write_values(tmp_path / f"a.{suffix}", noise("uint8", 1, 7, 9), kind)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ImportError, match=r"need the package (tifffile|pypng): pip install 'diffusers-vae\[train\]'"
        ):
            if package == "tifffile":
                read_values(tmp_path / "a.tif", 1)
            write_values(tmp_path / "b", noise("uint8", 1, 7, 9), kind)


def deep_folder(root, count=10, channels=5, dtype="uint16", most=65535, side=20):
    """Image files of channels, the first of them the number of the file."""
    root.mkdir(parents=True)
    for number in range(count):
        values = (noise("uint32", channels, side, side + number % 3) % (most + 1)).astype(dtype)
        values[0] = number
        np.save(root / f"{number}.npy", values)
    return root


def config(root, **settings):
    return DataConfig(name="folder", root=str(root), **{"channels": 5, "resolution": 20} | settings)


class TestSets:
    def test_values_are_those_of_the_files(self, tmp_path):
        root = deep_folder(tmp_path / "set")
        train, heldout = load_data(config(root, value_range=DEEP))
        assert isinstance(train, ArrayImages) and train.pixels.dtype == torch.float32 and len(heldout) == 1
        later, _ = load_data(config(root, value_range=DEEP), memory_limit=0)
        assert isinstance(later, StoredImages) and torch.equal(later.read(range(9)).pixels, train.pixels)
        assert later.header(0).mode == "5x uint16" and later.header(0).format == "NPY"
        back = ValueRange(*DEEP).from_model_range(to_model_range(train.pixels), "uint16")
        numbers = [int(path.stem) for path in paths_of(train)]
        assert back[:, 0].min((1, 2)).tolist() == back[:, 0].max((1, 2)).tolist() == numbers
        exact = [place for place, number in enumerate(numbers) if number % 3 == 0]  # the others are cut
        for place in exact:
            assert np.array_equal(back[place], np.load(root / f"{numbers[place]}.npy"))

    def test_archive_gives_the_same(self, tmp_path):
        root = deep_folder(tmp_path / "set")
        with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for path in root.iterdir():
                packed.write(path, path.name)
        for limit in (0, None):
            unpacked, zipped = (load_data(config(place, value_range=DEEP), memory_limit=limit)[0]
                                for place in (root, tmp_path / "set.zip"))  # fmt: skip
            assert torch.equal(unpacked.read(range(9)).pixels, zipped.read(range(9)).pixels)

    def test_8_bits_need_no_range(self, tmp_path):
        train, _ = load_data(config(deep_folder(tmp_path / "set", dtype="uint8", most=255)))
        assert train.pixels.dtype == torch.uint8 and train.pixels.shape == (9, 5, 20, 20)
        assert train.pixels[:, 0].amax((1, 2)).tolist() == [int(path.stem) for path in paths_of(train)]
        grey, _ = load_data(config(deep_folder(tmp_path / "grey", channels=1, dtype="uint8", most=255), channels=1))
        assert grey.pixels.dtype == torch.uint8

    @pytest.mark.parametrize("limit", [None, 0])
    def test_other_depths_do(self, limit, tmp_path):
        root = deep_folder(tmp_path / "set")
        with pytest.raises(ValueError, match=r"0\.npy: data\.value_range, \[low, high\], must state .* got uint16"):
            load_data(config(root), memory_limit=limit)

    def test_values_outside_stop_the_run_or_are_left_out(self, tmp_path):
        root = deep_folder(tmp_path / "set", most=4000)
        values = np.load(root / "4.npy")
        values[3, 5, 6] = 4096
        np.save(root / "4.npy", values)
        with pytest.raises(ValueError, match=r"1 of 10 files .*\n.*4\.npy: values .* in \[0, 4095\], .* got 4096"):
            load_data(config(root, value_range=(0, 4095)))
        parts = load_data(config(root, value_range=(0, 4095), on_bad_image="skip"))
        assert sum(map(len, parts)) == 9
        later = load_data(config(root, value_range=(0, 4095), on_bad_image="skip"), memory_limit=0)
        read = [part.read(range(len(part))) for part in later]
        assert sum(len(part.pixels) for part in read) == 9 and all(part.pixels.dtype == torch.float32 for part in read)
        nothing = next(part for part in later if any("4.npy" in str(path) for path in paths_of(part)))
        place = [path.name for path in paths_of(nothing)].index("4.npy")
        assert nothing.read([place]).pixels.shape == (0, 5, 20, 20)
        assert nothing.read([place]).blank().pixels.dtype == torch.float32

    def test_wrong_channels_are_named(self, tmp_path):
        root = deep_folder(tmp_path / "set", channels=4)
        with pytest.raises(ValueError, match=r"0\.npy: an array of 5 channels must be"):
            load_data(config(root, value_range=DEEP))

    def test_scaled_values_stay_in_the_range(self, tmp_path):
        root = tmp_path / "set"
        root.mkdir()
        edge = np.zeros((5, 30, 30), np.float32)
        edge[:, :, 15:] = 1  # bicubic overshoots here
        for number in range(3):
            np.save(root / f"{number}.npy", edge)
        for settings in ({"resolution": 64}, {"resolution": 16}, {"resolution": 64, "crops": 2}):
            pixels = load_data(config(root, value_range=(0, 1), heldout_fraction=0.4, **settings))[0].pixels
            assert (pixels.min(), pixels.max()) == (0, 1)
        padded = load_data(config(root, value_range=(-1, 1), fit="pad", resolution=40))[0].pixels
        assert (padded[:, :, 0] == 0).all()  # the lowest value

    def test_memory_is_counted_in_bytes(self, tmp_path):
        root = deep_folder(tmp_path / "set")
        bytes_of_it = 10 * 5 * 20 * 20 * 4
        stated = config(root, value_range=DEEP)
        assert isinstance(load_data(stated, memory_limit=bytes_of_it)[0], ArrayImages)
        assert isinstance(load_data(stated, memory_limit=bytes_of_it - 1)[0], StoredImages)

    def test_the_range_is_part_of_what_a_set_is(self, tmp_path):
        root = deep_folder(tmp_path / "set", most=4000)
        for limit in (0, None):
            prints = {load_data(config(root, value_range=(0, high)), memory_limit=limit)[0].fingerprint()
                      for high in (4095, 65535)}  # fmt: skip
            assert len(prints) == 2


class TestLook:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "most", "advice"),
        [
            ("uint16", 65535, r"Use --data.value_range '\[0, 65535\]', the full range of the file format$"),
            ("uint16", 4000, r"'\[0, 4095\]' if the values have 12 bits, .*, or '\[0, 65535\]', the full"),
            ("int16", 4000, r"'\[-32768, 32767\]', the full"),
            ("float32", 1, r"'\[0, 1\]', or the physical range of the values"),
            ("float32", 4000, r"'\[0, 4000\]', or the physical range"),
            ("int32", 4000, r"at most 16,777,216 wide"),
        ],
    )
    def test_says_what_a_range_could_be(self, dtype, most, advice, tmp_path):
        root = deep_folder(tmp_path / "set", count=40, dtype=dtype, most=most)
        for path in root.iterdir():
            values = np.load(path)
            values[1, :2, 0] = (0, most)
            values[0] = 0
            np.save(path, values)
        with pytest.raises(
            ValueError, match=rf"data.value_range must state .*{dtype} in 36 of 36 files, 0 to {most:,}. "
        ):
            look(config(root), 100)
        with pytest.raises(ValueError, match=advice):
            look(config(root), 100)

    def test_of_float_tiffs_too(self, shared_data, tmp_path):
        for number in range(3):
            shutil.copyfile(shared_data / "awkward" / "10ct_32bit_128.tiff", tmp_path / f"{number}.tiff")
        with pytest.raises(ValueError, match=r"float32 in 2 of 2 files, -3.14094 to 3.14068. Use .*'\[-4, 4\]'"):
            look(config(tmp_path, channels=1), 10)

    @pytest.mark.slow
    def test_statistics_and_what_is_recommended(self, tmp_path, capsys):
        root = deep_folder(tmp_path / "set")
        stated = config(root, value_range=DEEP)
        found = look(stated, 100)
        train, _ = load_data(stated)
        assert found.mean == pytest.approx(train.pixels.double().mean((0, 2, 3)).tolist(), abs=1e-6)
        assert found.files.modes == {"5x uint16": 10} and found.files.formats == {"NPY": 10}
        choice = recommended(found, stated)
        settings = choice.settings
        assert (
            choice.preset == "rgb-small"
            and settings["data.channels"] == "5"
            and settings["data.value_range"] == "[0, 65535]"
        )
        arguments = ["--data.channels", "5", "--data.value_range", "[0, 65535]", "--out", str(tmp_path / "sheet.png")]
        assert cli.main(["data", str(root), *arguments, "--data.resolution", "20"]) == 0
        told = capsys.readouterr().out
        assert "--data.value_range '[0, 65535]'" in told and "5x uint16 10" in told
        means = [line for line in told.splitlines() if line.startswith("mean")]
        in_files = [float(value.replace(",", "")) for value in means[1].split()[1:]]
        assert in_files == pytest.approx([65535 * value for value in found.mean], rel=0.01)


class TestModels:
    @pytest.mark.slow
    def test_published_with_its_range(self, hub, tmp_path, monkeypatch):
        run = make_run(tmp_path / "runs" / "tiny", make_vae(), (8, 8), CONFIG)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in ("constants", "file_download"):  # of older versions, the latter
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", address, raising=False)
        ValueRange(0, 4095).save(run / "model")
        card = render_card(run, HubConfig(repo_id=REPO))
        assert r"values in \[0, 4095\]" in card and f"diffusers-vae reconstruct {REPO} FILES" in card
        push(run, HubConfig(repo_id=REPO, license="mit"))
        assert json.loads(uploaded(hub)["value_range.json"]) == {"low": 0, "high": 4095}
        assert Source(REPO).value_range() == Source(str(run)).value_range() == ValueRange(0, 4095)
        (run / "model" / "value_range.json").unlink()
        assert Source(str(run)).value_range() is None and "value_range" not in render_card(run)
        push(run, HubConfig(repo_id=REPO, license="mit"))
        assert "value_range.json" not in uploaded(hub)  # of the model before
        assert Source(REPO).value_range() is None

    @pytest.mark.slow
    def test_fine_tuning_keeps_to_the_range(self, tmp_path):
        make_vae().save_pretrained(tmp_path / "vae")
        ValueRange(0, 4095).save(tmp_path / "vae")
        root = deep_folder(tmp_path / "set", channels=1, dtype="uint8", most=255)  # which need not state any
        settings = tiny(tmp_path / "run", ModelConfig(pretrained=str(tmp_path / "vae")))
        for stated, told in ((None, "null"), (DEEP, r"\[0, 65535\]")):
            other = dataclasses.replace(settings, data=config(root, channels=1, value_range=stated))
            with pytest.raises(ValueError, match=rf"data.value_range must be \[0, 4095\], with which .*, got {told}"):
                load_run_data(other, Accelerator(cpu=True))
        same = dataclasses.replace(settings, data=config(root, channels=1, value_range=(0, 4095)))
        load_run_data(same, Accelerator(cpu=True))

    def test_evaluation_does_not_round_to_8_bits(self, tmp_path):
        stated = config(deep_folder(tmp_path / "set", most=60), value_range=(0, 60))
        _, heldout = load_data(stated)
        torch.manual_seed(0)
        vae = VAE(in_channels=5, out_channels=5, block_out_channels=(8,), norm_num_groups=4).eval()
        reports = [
            evaluate(vae, heldout, ObjectiveConfig().build(), EvaluationConfig(round_to_8_bit=rounded), stated)
            for rounded in (True, False)
        ]
        assert reports[0] == reports[1] and not reports[0].protocol.round_to_8_bit
        assert reports[0].protocol.value_range == "[-1, 1], which stands for [0, 60] in the files"

    @pytest.mark.slow
    @pytest.mark.parametrize("stated", [(0, 4095), None])
    def test_reconstructions_are_of_the_kind_that_came_in(self, stated, tmp_path, capsys):
        vae = VAE(in_channels=5, out_channels=5, block_out_channels=(8, 8), norm_num_groups=4,
                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
        vae.save_pretrained(tmp_path / "vae")
        if stated:
            ValueRange(*stated).save(tmp_path / "vae")
        (tmp_path / "in").mkdir()
        dtypes = ("uint16", "int16", "float32", "uint8") if stated else ("uint8",)
        for kind in (kind for kind in KINDS if kind.channels == 5 and np.dtype(kind.dtype).name in dtypes):
            name = f"{kind.layout}-{kind.photometric}-{np.dtype(kind.dtype).name}.{kind.format.lower()}"
            values = noise("uint8", 5, 7, 9).astype(np.dtype(kind.dtype).newbyteorder("="))
            write_values(tmp_path / "in" / name.replace("tiff", "tif"), values, kind)
        arguments = ["reconstruct", str(tmp_path / "vae"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
        assert cli.main(arguments) == 0
        names = sorted(path.name for path in (tmp_path / "in").iterdir())
        assert names == sorted(path.name for path in (tmp_path / "out").iterdir()) and len(names) >= 6
        for name in names:
            kinds = [read_kind(tmp_path / folder / name, 5) for folder in ("in", "out")]
            assert kinds[0] == kinds[1]
            values, _ = read_values(tmp_path / "out" / name, 5)
            assert values.min() >= 0 and values.max() <= 4095
            assert values.dtype == np.uint8 or len(np.unique(values)) > 50
        assert ("dB over [0, 4095]" in capsys.readouterr().out) == bool(stated)

        np.save(tmp_path / "wrong.npy", np.full((5, 8, 8), 4096, np.uint16))
        assert cli.main([*arguments[:2], str(tmp_path / "wrong.npy"), *arguments[3:]]) == 1
        rule = r"values must be finite and lie in [0, 4095]" if stated else "values must have 8 bits"
        told = capsys.readouterr().err
        assert f"wrong.npy: {rule}" in told and ("got 4096" if stated else "got uint16") in told


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """Images of 16 bits: 8 of the file above 8 random ones, which are lost by anything that rounds to 8 bits."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared_data / "bsds500-val.tar") as packed:
        members = [member for member in packed if member.name.endswith(".jpg")]
        packed.extractall(folder, sorted(members, key=lambda member: member.name)[:12], filter="data")
    generator, found = np.random.default_rng(0), []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            crop = np.array(image)[:49, :53].astype(np.uint16)  # sides that the model must pad
        found.append(np.moveaxis((crop << 8) | generator.integers(0, 256, crop.shape, np.uint16), -1, 0))
    return found


CHANNELS = {"16 bits": 3, "5 channels": 5}


@pytest.fixture(scope="module")
def runs(photographs, tmp_path_factory):
    """By kind, a folder with photographs in set/ and a run on them in run/."""
    folders = {}
    for kind, channels in CHANNELS.items():
        folder = folders[kind] = tmp_path_factory.mktemp("deep")
        (folder / "set").mkdir()
        for number, values in enumerate(photographs):
            file = FileKind("PNG", "<u2", 3, *values.shape[1:], "HWC")
            if channels == 5:
                grey = values.mean(0)
                edges = np.hypot(*np.gradient(grey)).clip(0, 65535)
                values = np.concatenate([values, np.stack([grey, edges]).astype(np.uint16)])
                file = FileKind("TIFF", "<u2", 5, *values.shape[1:], "HWC", "MINISBLACK", ("unspecified",) * 4)
            write_values(folder / "set" / f"{number}.{'png' if channels == 3 else 'tif'}", values, file)
        flags = [
            "--data.name", "folder", "--data.root", folder / "set", "--data.channels", channels,
            "--data.value_range", "[0, 65535]", "--data.resolution", "32", "--model.architecture", "vae",
            "--model.block_out_channels", "[8, 8]", "--model.norm_num_groups", "4", "--run.mixed_precision", "no",
            "--objective.likelihood", "gaussian", "--objective.scale", "0.1", "--run.max_images", "64",
            "--run.batch_size", "8", "--run.tracker", "null", "--run.output_dir", folder / "run",
        ]  # fmt: skip
        AcceleratorState._reset_state(True)  # of the run before
        assert cli.main(["train", *map(str, flags)]) == 0
    return folders


@pytest.mark.slow
class TestWholeRun:
    """Photographs of BSDS500 as sets of 16 bits and of five channels: trained on, saved, loaded, and written again."""

    def test_stock_diffusers_loads_what_was_trained(self, runs, tmp_path):
        program = "import torch; from diffusers import AutoencoderKL\n"
        for kind, channels in CHANNELS.items():
            model = runs[kind] / "run" / "model"
            assert json.loads((model / "value_range.json").read_text()) == {"low": 0, "high": 65535}
            assert "value_range" not in json.loads((model / "config.json").read_text())
            assert r"values in \[0, 65535\]" in (runs[kind] / "run" / "README.md").read_text()
            program += (
                f"vae = AutoencoderKL.from_pretrained({str(model)!r})\n"
                f"assert vae(torch.zeros(1, {channels}, 16, 16)).sample.shape[1] == {channels}\n"
            )
        run_without_package(program, tmp_path)

    def test_info_states_the_values_of_files(self, runs, capsys):
        assert cli.main(["info", str(runs[next(iter(CHANNELS))] / "run")]) == 0
        assert "in files [0, 65535], mapped to [-1, 1]" in capsys.readouterr().out

    @pytest.mark.parametrize("kind", CHANNELS)
    def test_evaluated_again_is_the_same(self, kind, runs, tmp_path):
        assert cli.main(["evaluate", str(runs[kind] / "run"), "--out", str(tmp_path / "again")]) == 0
        reports = [
            json.loads((folder / "evaluation.json").read_text()) for folder in (runs[kind] / "run", tmp_path / "again")
        ]
        assert reports[0]["psnr"] == pytest.approx(reports[1]["psnr"]) and not reports[0]["protocol"]["round_to_8_bit"]

    @pytest.mark.parametrize("kind", CHANNELS)
    def test_reconstructions_are_files_of_16_bits(self, kind, runs, tmp_path):
        root, channels = runs[kind] / "set", CHANNELS[kind]
        assert cli.main(["reconstruct", str(runs[kind] / "run"), str(root), "--out", str(tmp_path)]) == 0
        vae = AutoencoderKL.from_pretrained(runs[kind] / "run" / "model")
        for path in root.iterdir():
            values, file = read_values(path, channels)
            reconstruction, same = read_values(tmp_path / path.name, channels)
            assert same == file and reconstruction.dtype == np.uint16  # and so the kind, depth and size
            assert np.array_equal(there_and_back(values, *DEEP), values)  # whatever is wrong is the model's
            images = to_model_range(ValueRange(*DEEP).to_unit(values))[None]
            padded = torch.nn.functional.pad(images, (0, 1, 0, 1), "replicate")
            with torch.no_grad():
                expected = vae(padded).sample[0, :, :49, :53]
            error = reconstruction - 65535 * (expected.numpy().clip(-1, 1) / 2 + 0.5)
            assert np.abs(error).max() < 2  # half a unit of 16 bits, and what float32 rounds otherwise
            assert len(np.unique(reconstruction & 255)) > 100  # more than 8 bits are there
