"""Files that claim more than they hold, are no files, or name others: refused by name, within memory, at once."""

import json
import lzma
import os
import struct
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from datasets import Features
from datasets import Image as ImageType
from PIL import Image
from support.hub import connect
from support.models import tiny_vae

from diffusers_vae import cli
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.data.files import Files
from diffusers_vae.images.files import read_header, read_image
from diffusers_vae.images.raw_files import read_kind, read_values
from diffusers_vae.latents.dataset import LatentDataset
from diffusers_vae.latents.encode import encode_images
from diffusers_vae.models import load_autoencoder
from diffusers_vae.untrusted import MAX_TEXT, MAX_UNPACKED

LARGE = 2**28
"""Bytes that do not fit into `little_memory`."""


def folder_config(root, **settings):
    return DataConfig(name="folder", root=str(root), **{"channels": 1, "resolution": 8, "num_workers": 0} | settings)


def change_directory(archive, name, offset, value):
    """Write a number of four bytes into the entry of a file in the directory of a zip archive."""
    content = bytearray(archive.read_bytes())
    at = content.index(b"PK\1\2")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\1\2", at + 4)
    content[at + offset : at + offset + 4] = struct.pack("<I", value)
    archive.write_bytes(content)


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for number in range(10):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / f"{number}.png")
    return root


@pytest.fixture(params=["pipe", "device"])
def odd_file(request, tmp_path):
    """Makes a path to what can be read for ever."""
    if os.name == "nt":
        pytest.skip("needs pipes in the file system")

    def make(path):
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return path

    return make


class TestZip:
    def bomb(self, tmp_path, stated):
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened, opened.open("1.png", "w") as entry:
            for _ in range(LARGE // 2**20):
                entry.write(bytes(2**20))
        change_directory(archive, "1.png", 24, stated)
        return archive

    @pytest.mark.slow
    def test_no_more_is_unpacked_than_is_stated(self, tmp_path, little_memory):
        (member,) = Files(self.bomb(tmp_path, 100)).members.values()
        with pytest.raises(ValueError, match="it is damaged in the archive"):
            member.read()

    @pytest.mark.slow
    def test_more_than_the_limit_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"a.zip: 1.png unpacks to 1,073,741,825 bytes, .* at most 1,073,741,824"):
            Files(self.bomb(tmp_path, MAX_UNPACKED + 1))

    def test_entries_that_share_bytes_are_refused(self, images, tmp_path):
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as opened:
            for path in sorted(images.iterdir()):
                opened.write(path, path.name)
        assert len(Files(archive).members) == 10
        change_directory(archive, "7.png", 42, 0)  # where its content lies
        with pytest.raises(ValueError, match=r"a.zip: [07].png overlaps what follows it"):
            Files(archive)

    def test_texts_have_a_limit_of_their_own(self, images, tmp_path):
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.write(images / "1.png", "1.png")
            opened.writestr("1.txt", bytes(MAX_TEXT + 1))
        with pytest.raises(ValueError, match=r"1.txt: it must hold at most 16,777,216 bytes of text, got 16,777,217"):
            Files(archive).read(str(archive / "1.txt"))


class TestTiff:
    @pytest.mark.slow
    @pytest.mark.parametrize("compression", ["deflate", "lzma", "packbits"])
    def test_no_more_is_unpacked_than_the_strips_hold(self, compression, tmp_path, request):
        path, grey = tmp_path / "a.tif", np.zeros((16, 16), np.uint8)
        tifffile.imwrite(path, grey, compression="deflate", predictor=False)
        assert np.array_equal(read_values(path, 1)[0][0], grey)
        codes = {"deflate": 8, "lzma": 34925, "packbits": 32773}
        strip = {
            "deflate": lambda: zlib.compress(bytes(LARGE), 9),
            "lzma": lambda: lzma.compress(bytes(LARGE), preset=0),
            "packbits": lambda: b"\x81\0" * (LARGE // 128),
        }[compression]()
        content = path.read_bytes()
        changed = bytearray(content + strip)
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages[0].tags
            values = {"StripOffsets": len(content), "StripByteCounts": len(strip), "Compression": codes[compression]}
            for name, value in values.items():  # as LONG, in its entry
                changed[tags[name].offset + 2 : tags[name].offset + 12] = struct.pack("<HII", 4, 1, value)
        path.write_bytes(changed)
        request.getfixturevalue("little_memory")
        with pytest.raises(ValueError, match=r"a.tif: it is damaged: a strip or tile of 256 bytes unpacks to more"):
            read_values(path, 1)

    @pytest.mark.slow
    def test_other_channels_are_refused_before_they_are_read(self, tmp_path, request):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, np.zeros((16, 2048, 2048), np.uint8), compression="deflate", photometric="minisblack")
        request.getfixturevalue("little_memory")
        with pytest.raises(ValueError, match="it has 16 channels, and"):
            read_values(path, 3)


class TestArrays:
    @pytest.mark.parametrize("shape", ["(100000, 64, 64)", "(-1, 64, 64)", "([" * 2000])
    @pytest.mark.parametrize("suffix", ["npy", "npz"])
    def test_claims_of_the_header(self, suffix, shape, tmp_path, little_memory):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64 * 64)
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(content)
        if suffix == "npz":
            with zipfile.ZipFile(path, "w") as packed:
                packed.writestr("images.npy", content)
        with pytest.raises(ValueError, match=f"{path}"):
            load_data(DataConfig(name="array", root=str(path), resolution=64))

    @pytest.mark.slow
    def test_length_of_the_header_is_not_believed(self, tmp_path, little_memory):
        archive = zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED)
        with archive as packed, packed.open("images.npy", "w") as entry:
            entry.write(b"\x93NUMPY\2\0" + struct.pack("<I", LARGE))
            for _ in range(LARGE // 2**20):
                entry.write(b" " * 2**20)
        with pytest.raises(ValueError, match=r"cannot read .*a\.npz"):
            load_data(DataConfig(name="array", root=str(tmp_path / "a.npz"), resolution=64))

    def test_compressed_arrays_have_a_limit(self, tmp_path):
        path = tmp_path / "a.npz"
        np.savez_compressed(path, images=np.zeros((4, 64, 64), np.uint8))
        change_directory(path, "images.npy", 24, MAX_UNPACKED + 1)
        with pytest.raises(ValueError, match=r"a.npz: images.npy unpacks to .* store it without compression"):
            load_data(DataConfig(name="array", root=str(path), resolution=64))


class TestOddFiles:
    @pytest.mark.parametrize("read", [read_image, read_header, read_kind, read_values])
    def test_images(self, read, odd_file, tmp_path):
        path = odd_file(tmp_path / "a.png")
        with pytest.raises(ValueError, match=f"cannot read the image {path}: .*must be a regular file"):
            read(path) if read is read_header else read(path, 1)

    @pytest.mark.parametrize("name", ["3.png", "a.zip", "a.tar"])
    def test_files_of_a_folder(self, name, images, odd_file):
        path = odd_file(images / name)
        with pytest.raises(ValueError, match=f"{path}.*must be a regular file"):
            load_data(folder_config(images))

    @pytest.mark.parametrize("name", ["3.txt", "metadata.jsonl"])
    def test_captions(self, name, images, odd_file):
        odd_file(images / name)
        with pytest.raises(ValueError, match=f"{name} must be a regular file"):
            load_data(folder_config(images), captions=True)

    def test_classes_beside_the_images(self, images, odd_file):
        for number in range(10):
            (images / f"{number}.cls").write_text("3")
        odd_file(images / "5.cls")
        with pytest.raises(ValueError, match=r"5.cls must be a regular file"):
            load_data(folder_config(images))

    @pytest.mark.parametrize("name", ["a.npy", "a.npz", "b.labels.npy"])
    def test_arrays(self, name, odd_file, tmp_path):
        np.save(tmp_path / "b.npy", np.zeros((5, 8, 8), np.uint8))
        path = odd_file(tmp_path / name)
        with pytest.raises(ValueError, match=f"{path}.*must be a regular file"):
            load_data(DataConfig(name="array", root=str(tmp_path), resolution=8))

    def test_parquet(self, odd_file, tmp_path):
        path = odd_file(tmp_path / "train.parquet")
        with pytest.raises(ValueError, match=f"{path} must be a regular file"):
            load_data(DataConfig(name="datasets", root=str(tmp_path), resolution=8))

    @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
    def test_models_in_one_file(self, name, odd_file, tmp_path):
        path = odd_file(tmp_path / name)
        with pytest.raises(ValueError, match=f"{path} must be a regular file"):
            load_autoencoder(str(path))

    @pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
    def test_models(self, name, odd_file, tmp_path):
        tiny_vae().save_pretrained(tmp_path)
        path = odd_file(tmp_path / name)
        with pytest.raises(ValueError, match=f"{path} must be a regular file"):
            load_autoencoder(str(tmp_path))

    def test_settings(self, odd_file, tmp_path, capsys):
        path = odd_file(tmp_path / "a.yaml")
        with pytest.raises(SystemExit):
            cli.main(["train", "--config", str(path), "--dry_run"])
        assert f"{path} must be a regular file" in capsys.readouterr().err


class TestNames:
    @pytest.mark.parametrize("name", ["../../secret.png", "{outside}", "sub/../../secret.png"])
    def test_rows_name_files_of_their_set_only(self, name, tmp_path, monkeypatch):
        connect(monkeypatch, None, tmp_path / "cache")
        root, outside = tmp_path / "a" / "set", tmp_path / "secret.png"
        root.mkdir(parents=True)
        for path in (outside, root / "1.png"):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
        paths = ["1.png", name.format(outside=outside), str(root / "1.png")]
        features = Features({"img": ImageType()})  # in a Parquet that `datasets` writes, there would be bytes
        images = pa.array([{"bytes": None, "path": path} for path in paths], features.arrow_schema.field("img").type)
        pq.write_table(pa.Table.from_arrays([images], schema=features.arrow_schema), root / "train.parquet")
        with pytest.raises(ValueError, match=r"1 of 3 files(.|\n)*row 1 .*outside of the folder of the set, .*secret"):
            load_data(DataConfig(name="datasets", root=str(root), channels=1, resolution=8, num_workers=0))

    @pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png"])
    def test_metadata_names_files_below_it_only(self, name, images):
        Image.new("L", (8, 8)).save(images.parent / "secret.png")
        (images / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}) + "\n")
        with pytest.raises(ValueError, match=r"jsonl, line 1: .* must lie in the folder of the metadata.jsonl"):
            load_data(folder_config(images), captions=True)


class TestModels:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("layers_per_block", 10**9, "layers_per_block must be at most 64, got 1,000,000,000"),
            ("block_out_channels", [8, 10**9], "block_out_channels must be at most 8,192, got 1,000,000,000"),
            ("down_block_types", ["DownEncoderBlock2D"] * 10**5, "down_block_types must have at most 64 entries"),
            ("latent_channels", 2**62, "latent_channels must be at most 8,192"),
            ("norm_num_groups", 2**40, "norm_num_groups must be at most 1,048,576"),
        ],
    )
    def test_settings_that_no_model_has_are_refused(self, key, value, message, tmp_path):
        tiny_vae().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(ValueError, match=f"{tmp_path}: config.json: {message}"):
            load_autoencoder(str(tmp_path))


class TestLatents:
    @pytest.fixture
    def cache(self, tmp_path):
        digits, _ = load_data(DataConfig(resolution=8))
        encode_images(tiny_vae(), digits.first(12), tmp_path, shard_images=5)
        return tmp_path

    @pytest.mark.parametrize("change", ["images", "rows", "latent_shape"])
    def test_index_must_agree_with_the_shards(self, change, cache):
        path = cache / "index.json"
        index = json.loads(path.read_text())
        if change == "latent_shape":
            index["latent_shape"] = [4, 10**5, 10**5]
        else:
            index["images"] = 10**9
        if change == "rows":
            index["shards"][1]["rows"] = 10**9 - 7
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index.json is damaged|shard-0000\d.safetensors.*not as written"):
            LatentDataset(cache)
