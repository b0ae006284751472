"""Pixel ranges, image files of every kind, and picture grids."""

import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from torchvision.transforms.v2 import functional as transforms

from diffusers_vae.images.files import read_header, read_image
from diffusers_vae.images.fit import Fit
from diffusers_vae.images.grid import shown_channels, to_pil
from diffusers_vae.images.ranges import to_model_range, to_uint8, to_unit_range
from diffusers_vae.images.raw_files import read_kind, read_values

# --- ranges


def test_all_256_values_survive_the_round_trip():
    pixels = torch.arange(256).to(torch.uint8)
    images = to_model_range(pixels)
    assert images.dtype == torch.float32
    assert (images[0], images[255]) == (-1, 1)
    torch.testing.assert_close(to_unit_range(images), pixels / 255)
    torch.testing.assert_close(images, to_model_range(pixels / 255))
    assert torch.equal(to_uint8(images), pixels)
    assert torch.equal(to_uint8(images.half()), pixels)


@pytest.mark.parametrize(
    "laid",
    [
        lambda pixels: pixels[7],
        lambda pixels: pixels[:0],
        lambda pixels: pixels.reshape(16, 16).T,
        lambda pixels: pixels[:3].expand(2, 3),
        lambda pixels: pixels.reshape(2, 2, 8, 8)[:, :, ::2].to(memory_format=torch.channels_last),
    ],
    ids=["one", "none", "turned", "repeated", "channels_last"],
)
def test_to_model_range_is_the_same_to_the_bit_however_pixels_lie(laid):
    pixels = laid(torch.arange(256, dtype=torch.uint8))
    images = to_model_range(pixels)
    expected = pixels.float() / 127.5 - 1
    assert torch.equal(images, expected) and images.dtype == torch.float32
    assert pixels.ndim < 4 or images.stride() == expected.stride()


def test_to_uint8_clamps_and_rounds():
    levels = torch.tensor([-40.0, -0.1, 0.4, 0.6, 127.4, 127.6, 254.6, 255.1, 600.0])
    assert to_uint8(levels / 127.5 - 1).tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]


def test_unit_range_is_not_clamped():
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    assert to_unit_range(images).tolist() == [-1.0, 0.0, 0.5, 1.0, 1.5]
    assert torch.equal(to_model_range(to_unit_range(images)), images)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_pixels_of_unstated_range_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"uint8 .* or floating point .* got {dtype}"):
        to_model_range(torch.ones(3, dtype=dtype))


# --- files with known pixels


def picture(rows, dtype=np.uint8):
    return Image.fromarray(np.array(rows, dtype))


def palette_picture(rows, palette):
    image = picture(rows)
    image.putpalette(palette)
    return image


RED_GREEN_BLUE = [255, 0, 0, 0, 255, 0, 0, 0, 255]
GREY16 = [[0, 257, 1000], [32896, 60000, 65535]]
GREY16_TO_8 = [[0, 1, 4], [128, 233, 255]]
COLOURS = [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [250, 128, 0], [255, 255, 255]]]
FILES = {  # name: picture, what `save` is told, and the expected pixels: rows of grey values or of (red, green, blue)
    "1.png": (picture([[0, 1, 0], [1, 0, 1]], bool), {}, [[0, 255, 0], [255, 0, 255]]),
    "L.png": (picture([[0, 7, 128], [200, 254, 255]]), {}, [[0, 7, 128], [200, 254, 255]]),
    "L.bmp": (picture([[0, 7, 128], [200, 254, 255]]), {}, [[0, 7, 128], [200, 254, 255]]),
    "L-transparent.png": (picture([[0, 7, 128]]), {"transparency": 7}, [[0, 255, 128]]),
    "LA.png": (picture([[[0, 255], [0, 0], [5, 51]]]), {}, [[0, 255, 205]]),
    "P.png": (
        palette_picture([[2, 1, 0]], RED_GREEN_BLUE),
        {},
        [[[0, 0, 255], [0, 255, 0], [255, 0, 0]]],
    ),
    "P-transparent.png": (
        palette_picture([[2, 1, 0]], RED_GREEN_BLUE),
        {"transparency": b"\xff\x00\x33"},  # index 1 is transparent, 2 one fifth opaque
        [[[204, 204, 255], [255, 255, 255], [255, 0, 0]]],
    ),
    "RGB.png": (picture(COLOURS), {}, COLOURS),
    "RGB.webp": (picture(COLOURS), {"lossless": True}, COLOURS),
    "RGB-transparent.png": (
        picture([[[0, 0, 0], [0, 255, 52], [9, 9, 9]]]),
        {"transparency": (0, 255, 52)},
        [[[0, 0, 0], [255, 255, 255], [9, 9, 9]]],
    ),
    "RGBA.png": (
        picture([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 100, 51]]]),
        {},
        [[[255, 0, 0], [255, 255, 255], [255, 204, 224]]],
    ),
    "CMYK.tif": (
        Image.frombytes("CMYK", (4, 1), bytes([0, 0, 0, 0, 0, 255, 255, 0, 255, 255, 0, 0, 0, 0, 0, 255])),
        {},
        [[[255, 255, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]]],
    ),
    "I16.png": (picture(GREY16, np.uint16), {}, GREY16_TO_8),
    "I16.tif": (picture(GREY16, np.uint16), {}, GREY16_TO_8),
    "I16-big-endian.tif": (picture(GREY16, ">u2"), {}, GREY16_TO_8),
    "I16-transparent.png": (picture(GREY16, np.uint16), {"transparency": 1000}, [[0, 1, 255], [128, 233, 255]]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_reads_every_kind_of_pixel(name, channels, tmp_path):
    image, options, expected = FILES[name]
    image.save(tmp_path / name, **options)
    pixels = read_image(tmp_path / name, channels)
    expected = torch.tensor(expected)
    if expected.ndim == 2:  # grey
        expected = expected[..., None].expand(-1, -1, channels)
    elif channels == 1:  # luma, ITU-R BT.601
        expected = (expected * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True).round()
    torch.testing.assert_close(pixels, expected.permute(2, 0, 1).to(torch.uint8), rtol=0, atol=0)


UPRIGHT = {  # EXIF orientation: how the stored rows and columns are turned upright
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_turns_images_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.array(COLOURS, np.uint8)
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png", 3)
    assert np.array_equal(pixels.permute(1, 2, 0), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_reads_the_first_frame(suffix, tmp_path):
    first, second = (Image.new("RGB", (3, 2), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"frames.{suffix}", save_all=True, append_images=[second], **options)
    with Image.open(tmp_path / f"frames.{suffix}") as image:
        assert image.n_frames == 2
    assert read_image(tmp_path / f"frames.{suffix}", 3).flatten(1).T.unique(dim=0).tolist() == [[255, 0, 0]]


# --- decoded at a reduced scale


@pytest.fixture(scope="module")
def photograph():
    """Asymmetric, with detail, and of sides that no scale divides."""
    generator = torch.Generator().manual_seed(0)
    coarse = (torch.rand(1, 3, 19, 27, generator=generator) * 300 - 20).clamp(0, 255)
    pixels = torch.nn.functional.interpolate(coarse, (229, 331), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


class Scaled(Fit):
    """Scales to the size and cuts nothing off; asked with the size of the upright image."""

    def scaled_size(self, height, width):
        assert (height < width) == (self.size[0] < self.size[1])
        return self.size

    def __call__(self, pixels):
        return pixels


def reduced_and_whole(path, channels, size):
    """The file scaled to `size`, after it was decoded at a reduced scale and whole, and their PSNR in dB."""
    whole, reduced = read_image(path, channels), read_image(path, channels, Scaled(size))
    whole = transforms.resize(whole, list(size), transforms.InterpolationMode.BICUBIC, antialias=True)
    assert reduced.dtype == whole.dtype
    assert reduced.shape == whole.shape
    return reduced, whole, 10 * torch.log10(255**2 / (reduced.float() - whole.float()).square().mean())


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_reduced_images_are_upright_and_in_place(orientation, photograph, tmp_path):
    """A shift by a quarter of a pixel would show: the last decoded row and column lie beyond the image in part."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    for short, long in ((9, 13), (19, 27), (38, 55)):  # from an eighth, a quarter and a half
        size = (short, long) if orientation < 5 else (long, short)
        reduced, whole, psnr = reduced_and_whole(tmp_path / "turned.jpg", 3, size)
        assert not torch.equal(reduced, whole)
        assert psnr > 42


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_reduced_images_of_every_mode(mode, channels, photograph, tmp_path):
    photograph.convert(mode).save(tmp_path / "image.jpg", quality=90, progressive=True)
    assert reduced_and_whole(tmp_path / "image.jpg", channels, (28, 41))[2] > 42


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", ["08", "13"])  # of much detail
def test_reduced_photographs_are_close_to_those_decoded_whole(number, channels, shared_data, tmp_path):
    with Image.open(shared_data / "kodak" / f"kodim{number}.png") as image:
        image.save(tmp_path / "photograph.jpg", quality=90)
    for size in ((21, 32), (42, 64), (85, 128)):  # the worst case: just three times as large when decoded
        assert reduced_and_whole(tmp_path / "photograph.jpg", channels, size)[2] > 45


@pytest.mark.parametrize(
    ("name", "size"),
    [("image.jpg", (39, 55)), ("image.jpg", (38, 56)), ("image.jpg", (500, 700)), ("image.png", (9, 9))],
)
def test_other_images_are_decoded_whole(name, size, photograph, tmp_path):
    """Those less than six times as large, and those that are no JPEG."""
    photograph.save(tmp_path / name)
    assert torch.equal(read_image(tmp_path / name, 3, Scaled(size)), read_image(tmp_path / name, 3))


# --- faults


def refusal(path, channels=3):
    """What follows the path in the message that refuses a file."""
    with pytest.raises(ValueError, match=re.escape(f"cannot read the image {path}: ")) as caught:
        read_image(path, channels)
    return str(caught.value).removeprefix(f"cannot read the image {path}: ")


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "float"), (np.int32, "32-bit integer")])
def test_pixels_without_a_stated_range_are_refused(dtype, kind, tmp_path):
    Image.fromarray(np.array([[-3.1, 0.5, 3.1]], dtype)).save(tmp_path / "raw.tif")
    assert refusal(tmp_path / "raw.tif").startswith(f"{kind} pixels have no stated range")


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channel_counts_are_refused(channels, tmp_path):
    Image.new("RGBA", (3, 2)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=rf"channels must be 1 \(grey\) or 3 \(RGB\), got {channels}"):
        read_image(tmp_path / "image.png", channels)


def test_files_that_are_no_image_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text's.jpg").write_text("no image\n" * 100)
    for name in ("empty.png", "text's.jpg"):
        assert refusal(tmp_path / name) == "cannot identify image file"
    assert refusal(tmp_path / "missing.png").endswith("No such file or directory")
    assert refusal(tmp_path)


FORMATS = ["png", "jpg", "gif", "tif", "bmp", "webp"] + ["avif"] * features.check("avif")


@pytest.fixture
def noise():
    """A picture that compresses badly, so that a cut goes through its pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8))


@pytest.mark.parametrize("suffix", FORMATS)
def test_truncated_files_are_refused(suffix, noise, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    noise.save(path)
    content = path.read_bytes()
    for part in (0.1, 0.5, 0.8):
        path.write_bytes(content[: int(part * len(content))])
        assert refusal(path)
        with pytest.raises(ValueError, match=re.escape(f"cannot read the image {path}: ")):
            read_image(path, 3, Fit((8, 6)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_read_or_refused_by_name(suffix, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # damage can enlarge the claimed size
    path = tmp_path / f"damaged.{suffix}"
    noise.save(path)
    content, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(min(len(damaged), 300))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            pixels = read_image(path, 3)
            assert pixels.dtype == torch.uint8
            assert pixels.ndim == 3
        except ValueError as error:
            assert str(error).startswith(f"cannot read the image {path}: ")
            refused += 1
    assert refused


def claim(path: Path, width: int, height: int) -> Path:
    """A GIF file of a few bytes that claims a size."""
    header = b"GIF89a" + struct.pack("<HH", width, height) + bytes([0x80, 0, 0]) + bytes(6)
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\x00" + b"\x02\x02D\x01\x00" + b";"
    path.write_bytes(header + frame)
    return path


@pytest.mark.parametrize("side", [22_361, 65_535])
def test_decompression_bombs_are_refused_within_memory(side, tmp_path, little_memory):
    assert refusal(claim(tmp_path / "bomb.gif", side, side)) == f"{side}x{side} pixels are more than 500,000,000"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("height", "width"), [(9_000, 11_400), (13_500, 13_500)])  # the second, Pillow refuses itself
def test_large_photographs_are_read(suffix, height, width, tmp_path, recwarn):
    Image.new("1", (width, height), 1).save(tmp_path / f"large.{suffix}")
    pixels = read_image(tmp_path / f"large.{suffix}", 1, Fit((9, 11)))
    assert (pixels == 255).all() and pixels.shape == (1, 1, 9, 11)
    assert not recwarn.list


TEXT = "node " * 300_000  # more than 1 MB
MUCH_TEXT = {
    "zTXt": lambda info: info.add_text("workflow", TEXT, zip=True),
    "iTXt": lambda info: info.add_itxt("workflow", TEXT, zip=True),
    "tEXt": lambda info: [info.add_text(f"page {number}", TEXT) for number in range(45)],  # more than 64 MB
    "zTXt behind the pixels": lambda info: info.add(b"zTXt", b"workflow\0\0" + zlib.compress(TEXT.encode()), True),
    "iCCP": lambda info: info.add(b"iCCP", b"profile\0\0" + zlib.compress(TEXT.encode())),
}


@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=[pytest.mark.slow] * (name == "tEXt")) for name in MUCH_TEXT]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pngs_with_much_text_are_read(where, dtype, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (6, 5)).astype(dtype) * (257 if dtype == np.uint16 else 1)
    info = PngImagePlugin.PngInfo()
    MUCH_TEXT[where](info)
    path = tmp_path / "comfy.png"
    Image.fromarray(values).save(path, pnginfo=info)
    assert np.array_equal(read_image(path, 1)[0].numpy(), values // (257 if dtype == np.uint16 else 1))
    assert np.array_equal(read_values(path, 1)[0][0], values)
    assert (read_header(path).height, read_kind(path, 1).width) == values.shape


def test_text_that_would_not_fit_into_memory_is_not_unpacked(tmp_path, little_memory):
    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(bytes(2**20)) for _ in range(40)]) + packer.flush()
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"bomb\0\0" + packed)
    Image.new("L", (5, 4), 77).save(tmp_path / "bomb.png", pnginfo=info)
    assert (read_image(tmp_path / "bomb.png", 1) == 77).all()


def test_a_damaged_png_with_much_text_is_refused(tmp_path, noise):
    info = PngImagePlugin.PngInfo()
    MUCH_TEXT["zTXt"](info)
    noise.save(tmp_path / "comfy.png", pnginfo=info)
    content = (tmp_path / "comfy.png").read_bytes()
    (tmp_path / "comfy.png").write_bytes(content[: len(content) // 2])
    assert refusal(tmp_path / "comfy.png")


def test_pixel_limit_can_be_lifted(tmp_path, monkeypatch):
    Image.new("L", (30, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert refusal(tmp_path / "large.png") == "30x20 pixels are more than 599"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(tmp_path / "large.png", 1).shape == (1, 20, 30)


# --- real awkward files; what is expected of each stands in its folder's CONTENTS.txt

REFUSED = {
    "10ct_32bit_128.tiff",  # float
    "CONTENTS.txt",
    "decompression_bomb.gif",
    "hopper.heif",  # needs a plug-in
    "truncated_image.png",
    "truncated_jpeg.jpg",
    "zero_width.gif",
}


@pytest.fixture(scope="session")
def awkward(shared_data):
    return shared_data / "awkward"


@pytest.mark.parametrize("channels", [1, 3])
def test_awkward_files_give_one_image_or_one_named_error(channels, awkward):
    entry = re.compile(r"^(\S+)\n.*\n  opens as: \S+ \S+ (\d+)x(\d+), \d+ frame\(s\)(; orientation [5-8])?", re.M)
    sizes = {
        name: (int(width), int(height)) if turned else (int(height), int(width))
        for name, width, height, turned in entry.findall((awkward / "CONTENTS.txt").read_text())
    }
    refused = set()
    for path in sorted(awkward.iterdir()):
        try:
            pixels = read_image(path, channels)
        except ValueError as error:
            assert str(error).startswith(f"cannot read the image {path}: ")
            refused.add(path.name)
        else:
            assert pixels.dtype == torch.uint8
            assert tuple(pixels.shape) == (channels, *sizes[path.name]), path.name
    assert refused == REFUSED


def test_awkward_files_are_all_in_the_table_of_the_docs(awkward):
    """With an error for those, and only those, that are refused."""
    rows = (Path(__file__).parents[1] / "docs" / "images.md").read_text().split("| --- | --- | --- |\n")[1]
    refused, shown = set(), set()
    for row in rows.split("\n\n")[0].splitlines():
        _, outcome, names = row.strip("| ").split(" | ")
        (refused if "**error**" in outcome else shown).update(re.findall(r"`([^`]+)`", names))
    assert refused == REFUSED - {"CONTENTS.txt"}
    assert shown | refused == {path.name for path in awkward.iterdir()} - {"CONTENTS.txt"}


def stored(path):
    """The values of an image file as they lie in it."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image).astype(np.int64))


def test_awkward_16_bit_files_are_scaled_by_their_depth(awkward):
    values = stored(awkward / "16bit.cropped.tif")
    assert (values.min(), values.max()) == (291, 694)
    assert torch.equal(read_image(awkward / "16bit.cropped.tif", 1)[0].long(), (values / 257).round().long())
    values = stored(awkward / "i_trns.png")
    expected = torch.where(values == 255, 255, (values / 257).round().long())  # 255 is its transparent value
    assert torch.equal(read_image(awkward / "i_trns.png", 1)[0].long(), expected)
    assert expected.unique().tolist() == [0, 1, 255]


def test_awkward_1_bit_file_becomes_black_and_white(awkward):
    assert read_image(awkward / "1_trns.png", 1).unique().tolist() == [0, 255]


@pytest.mark.slow
def test_awkward_photograph_is_turned_upright(awkward):
    path = awkward / "Landscape_6.jpg"
    assert torch.equal(read_image(path, 3).permute(1, 2, 0).long(), stored(path).rot90(-1))


def test_awkward_lab_and_cmyk_are_converted_by_colour(awkward):
    lab, rgb = (read_image(awkward / name, 3).float() for name in ("hopper.Lab.tif", "hopper.jpg"))
    assert (lab - rgb).abs().mean() < 4  # the same photograph
    red, green, blue = read_image(awkward / "pil_sample_cmyk.jpg", 3).float().mean((1, 2))
    assert red < 128  # a dark picture, not its negative
    assert red > 2 * max(green, blue)


@pytest.mark.parametrize("name", ["transparent.png", "transparent.gif", "transparent.webp", "uncompressed_la.png"])
def test_awkward_transparency_shows_white(name, awkward):
    with Image.open(awkward / name) as image:
        alpha = torch.from_numpy(np.array(image.convert("RGBA"))[..., 3])
    assert 0 < (alpha == 0).sum() < alpha.numel()
    assert (read_image(awkward / name, 3)[:, alpha == 0] == 255).all()


# --- pictures


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("batch", "columns", "scale"), [(6, 3, 1), (5, 2, 3), (4, 4, 1), (3, 8, 2)])
def test_grid_shows_every_image_between_white_lines(batch, columns, scale, channels):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (batch, channels, 4, 5), generator=generator).to(torch.uint8)
    height, width = 4 * scale, 5 * scale
    columns_shown, rows = min(columns, batch), -(-batch // columns)
    expected = torch.full((3, 2 + rows * (height + 2), 2 + columns_shown * (width + 2)), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        expected[:, top : top + height, left : left + width] = large
    grid = to_pil(to_model_range(pixels), columns, scale)
    assert grid.mode == "RGB"
    assert np.array_equal(np.asarray(grid), expected.permute(1, 2, 0))


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (16, 3)])
def test_grid_of_n_channels_shows_the_first_as_grey_or_the_first_three_as_colours(channels, shown):
    images = torch.rand(4, channels, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for channel in range(channels):
        others = images.clone()
        others[:, channel] *= -1
        assert (to_pil(others, 2) != to_pil(images, 2)) == (channel < shown)
    assert to_pil(images, 2) == to_pil(images[:, :shown], 2)
    said = shown_channels(channels)
    assert said == {1: "", 2: "channel 1 of 2 as grey", 3: ""}.get(
        channels, f"channels 1-3 of {channels} as red, green, blue"
    )


def test_grid_of_one_image_is_the_image():
    pixels = torch.arange(12).view(1, 1, 3, 4).to(torch.uint8)
    assert np.array_equal(np.asarray(to_pil(to_model_range(pixels), 8))[..., 0], pixels[0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_grid_takes_model_output_as_it_is(dtype):
    images = torch.tensor([-7.0, -1.0, 1.0, 7.0], dtype=dtype).view(4, 1, 1, 1).requires_grad_()
    assert np.asarray(to_pil(images, 4))[2, 2::3, 0].tolist() == [0, 0, 255, 255]
