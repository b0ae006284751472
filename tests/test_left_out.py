"""Each file of a folder or archive that looks like an image is read, or named with what to do about it."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, features
from support.files import pack
from support.models import TINY

from diffusers_vae import VAE, cli
from diffusers_vae.data import IMAGE_SUFFIXES, DataConfig, load_data, look
from diffusers_vae.images.files import read_image
from diffusers_vae.reports.tables import look_table

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
READ = {  # suffix: format
    ".jfif": "JPEG", ".JPE": "JPEG", ".JPG": "JPEG", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".PNG": "PNG",
    ".apng": "PNG", ".pnm": "PPM", ".dib": "DIB", ".tga": "TGA", ".ico": "ICO", ".TIF": "TIFF",
} | ({".avif": "AVIF"} if features.check("avif") else {})  # fmt: skip
NAMED = {  # files that are not read: the advice
    "photo.jxl": "convert it", "scan.dcm": "convert it", "shot.CR2": "convert it", "depth.pfm": "convert it",
    "page.svg": "convert it", "volume.nii.gz": "convert it", "wget.jpg.1": "rename it to end in .jpg",
    "tweet.jpg_large": "rename it to end in .jpg", "query.png?size=large": "rename it to end in .png",
    "blob": "give it the suffix of its format",
}  # fmt: skip
OTHER = ("README", "photo.jpg.txt", "photo.jpg.json", "labels.csv", "photo.jpg_mask.txt", ".hidden.heic", "Thumbs.db")


def config(root, **settings):
    return DataConfig(name="folder", root=str(root), **({"channels": 3, "resolution": 16} | settings))


@pytest.fixture
def folder(tmp_path, shared_data):
    root = tmp_path / "photos"
    (root / "b").mkdir(parents=True)
    for suffix, kind in READ.items():
        NOISE.save(root / f"image-{suffix[1:].lower()}{suffix}", kind)
    for name in (*NAMED, *OTHER):
        (root / "b" / name).write_bytes(b"no image" * 20)
    NOISE.save(root / "b" / "blob", "PNG")
    shutil.copyfile(shared_data / "awkward" / "hopper.heif", root / "b" / "IMG_0001.HEIC")
    return root


def names(listed):
    """The names of files, in a list of paths and advice."""
    return {text.rpartition(": ")[0].rpartition("/")[2] for text in listed}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_every_file_is_read_or_named(kind, folder, tmp_path, caplog):
    root = folder if kind == "folder" else pack(kind, folder, tmp_path / "packed")
    expected = set(NAMED) | ({"IMG_0001.HEIC"} if ".heic" not in IMAGE_SUFFIXES else set())
    with caplog.at_level(logging.WARNING):
        train, heldout = load_data(config(root), progress=True)
    assert len(train) + len(heldout) == len(READ) + (".heic" in IMAGE_SUFFIXES)
    (warning,) = caplog.messages
    assert warning.startswith(f"{len(expected)} files look like images and are left out:\n")
    found = look(config(root), 10)
    assert names(found.left_out) == expected and sorted(found.left_out) == sorted(warning.splitlines()[1:])
    for text in found.left_out:
        assert NAMED.get(text.rpartition(": ")[0].rpartition("/")[2], "pip install pillow-heif") in text
    assert f"left out      {len(expected)}\n" in look_table(found)


def test_a_folder_of_such_files_alone_names_them(tmp_path, shared_data):
    if ".heic" in IMAGE_SUFFIXES:
        pytest.skip("pillow-heif is installed")
    shutil.copyfile(shared_data / "awkward" / "hopper.heif", tmp_path / "IMG_0001.HEIC")
    with pytest.raises(FileNotFoundError, match=r"1 files look like images:\n.*IMG_0001.HEIC: pip install pillow-heif"):
        load_data(config(tmp_path))


def test_heic_is_read_once_its_package_is_installed(tmp_path, shared_data):
    pytest.importorskip("pillow_heif")
    shutil.copyfile(shared_data / "awkward" / "hopper.heif", tmp_path / "IMG_0001.HEIC")
    pixels = read_image(tmp_path / "IMG_0001.HEIC", 3).float()
    reference = read_image(shared_data / "awkward" / "hopper.jpg", 3).float()
    assert (pixels - reference).abs().mean() < 8  # the same photograph


class TestPages:
    @pytest.fixture
    def paged(self, tmp_path):
        """Files with several images: stacks and animations; and one with a thumbnail, which is no page."""
        root = tmp_path / "paged"
        root.mkdir()
        first, second = NOISE, NOISE.rotate(180)
        for name in ("stack.tif", "animated.gif", "animated.webp", "animated.apng"):
            first.save(root / name, save_all=True, append_images=[second, first])
        if features.check("avif"):
            first.save(root / "animated.avif", save_all=True, append_images=[second, first])
        with tifffile.TiffWriter(root / "preview.tif") as file:
            file.write(np.asarray(first), photometric="rgb")
            file.write(np.asarray(first)[::4, ::4], photometric="rgb", subfiletype=1)
        first.save(root / "one.tif")
        return root

    @pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])
    @pytest.mark.parametrize("kind", ["folder", "zip"])
    def test_files_of_several_are_named(self, kind, limit, paged, tmp_path, caplog):
        root = paged if kind == "folder" else pack(kind, paged, tmp_path / "packed")
        several = {path.name for path in paged.iterdir()} - {"one.tif", "preview.tif"}
        with caplog.at_level(logging.WARNING):
            load_data(config(root), progress=True, memory_limit=limit)
        (warning,) = caplog.messages
        head, *listed = warning.splitlines()
        assert head == f"{len(several)} files hold several pages or frames; only the first is read:"
        assert names(listed) == several and all(text.endswith(": 3") for text in listed)
        found = look(config(root), 10)
        assert sorted(found.files.paged) == sorted(listed)
        assert f"pages         {len(several)} files have several pages" in look_table(found)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damage_behind_the_first_page_is_ignored(self, paged):
        content = (paged / "stack.tif").read_bytes()
        (paged / "stack.tif").write_bytes(content[: len(content) * 2 // 3])
        for name in ("animated.gif", "animated.webp", "animated.apng", "animated.avif"):
            (paged / name).unlink(missing_ok=True)
        assert not look(config(paged, heldout_fraction=0.4), 10).unreadable


class TestReconstruct:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
    def test_folders_are_listed_as_sets_are(self, kind, folder, tmp_path, caplog):
        for name in (".trash/old.png", "__MACOSX/._image.png"):
            (folder / name).parent.mkdir()
            (folder / name).write_bytes(b"no image")
        (folder / "c").mkdir()
        for at in list(folder.glob("image-j*")):
            shutil.move(at, folder / "c" / at.name)
        pack("zip", folder / "c", folder / "more")
        shutil.rmtree(folder / "c")
        if kind != "folder":
            packed = Path(pack(kind, folder, tmp_path / "packed"))
        model = tmp_path / "model"
        VAE(**TINY).save_pretrained(model)
        root, out = folder if kind == "folder" else packed, tmp_path / "out"
        assert cli.main(["reconstruct", str(model), str(root), "--out", str(out)]) == 0
        left = {suffix for suffix in READ if kind == "folder" or not suffix.lower().startswith(".j")}
        expected = {f"image-{suffix[1:].lower()}" for suffix in left}
        expected |= {"IMG_0001"} if ".heic" in IMAGE_SUFFIXES else set()
        assert {path.stem for path in out.iterdir()} == expected
        assert "files look like images and are left out" in caplog.text
