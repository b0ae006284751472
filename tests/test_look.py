"""What a look at a data set tells is so."""

import dataclasses
import io
import logging
import shutil
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_vae import cli
from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.data import DataConfig, load_data, look, recommended
from diffusers_vae.images.ranges import ValueRange
from diffusers_vae.reports.tables import look_table


@pytest.fixture
def folder(cifar_folder, shared_data, tmp_path):
    """Cats and ships to train on, a ship and one of the cats held out, and what is wrong with sets."""
    root = tmp_path / "set"
    for part, name, count in (("train", "cat", 16), ("train", "ship", 8), ("val", "ship", 1)):
        (root / part / name).mkdir(parents=True)
        images = sorted((cifar_folder / "test" / name).iterdir())
        for path in images[:count] if part == "train" else images[-count:]:
            shutil.copyfile(path, root / part / name / path.name)
    (root / "val" / "cat").mkdir()
    cat = sorted((root / "train" / "cat").iterdir())[3]
    shutil.copyfile(cat, root / "val" / "cat" / "again.png")
    Image.new("L", (40, 20), 90).save(root / "train" / "ship" / "flat.png")
    for name in ("truncated_jpeg.jpg", "zero_width.gif"):
        shutil.copyfile(shared_data / "awkward" / name, root / "train" / "cat" / name)
    shutil.copyfile(shared_data / "awkward" / "orientation_rectangle.jpg", root / "train" / "cat" / "turned.jpg")
    return root


def config(root, **settings):
    return DataConfig(name="folder", root=str(root), **({"channels": 3, "resolution": 32} | settings))


class TestFolder:
    def test_counts_sizes_and_kinds(self, folder):
        found = look(config(folder), 100)
        assert found.parts == {"training": 27, "held-out": 2} and found.split and found.captions == "none"
        assert found.classes == {"cat": 19, "ship": 10}
        with Image.open(folder / "train" / "cat" / "turned.jpg") as turned:
            width, height = turned.size
        sizes = found.files.sizes
        assert sizes.pop("32x32") == 26 and sizes.pop("20x40") == 1 and sizes.pop(f"{width}x{height}") == 1
        assert found.files.formats == {"PNG": 27, "JPEG": 2} and found.files.modes["L"] == 1

    def test_damage_duplicates_and_emptiness(self, folder):
        found = look(config(folder), 100)
        assert len(found.unreadable) == 2 and all("train/cat/" in text for text in found.unreadable)
        ((first, second),) = found.files.duplicates
        assert first.endswith(".png") and second.endswith("val/cat/again.png") and found.files.leaks == 1
        assert [name.rpartition("/")[2] for name in found.constant] == ["flat.png"]

    def test_statistics_are_those_of_the_pixels(self, folder):
        train, _ = load_data(config(folder, on_bad_image="skip"))
        found = look(config(folder), 100)
        values = train.pixels.double().transpose(0, 1).flatten(1) / 255
        assert found.measured == len(train) == 26
        torch.testing.assert_close(torch.tensor(found.mean, dtype=torch.float64), values.mean(1))
        torch.testing.assert_close(torch.tensor(found.std, dtype=torch.float64), values.std(1, correction=0))
        assert torch.equal(found.shown, train.pixels)
        assert look(config(folder), 5).measured <= 5

    def test_damage_in_an_archive_and_in_captions(self, folder, tmp_path):
        archive = tmp_path / "set.zip"
        with zipfile.ZipFile(archive, "w") as opened:
            for number in range(6):
                buffer = io.BytesIO()
                Image.effect_noise((40, 40), 90).convert("RGB").save(buffer, "BMP")
                opened.writestr(f"{number}.bmp", buffer.getvalue())
            opened.writestr("3.txt", "a caption")
        data = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as opened:
            data[opened.getinfo("2.bmp").header_offset + 2000] ^= 1
        archive.write_bytes(data)
        found = look(config(archive), 100)
        assert [text for text in found.unreadable if "2.bmp" in text] and "has no caption" in found.captions

    def test_without_parts_or_damage(self, cifar_folder):
        found = look(config(cifar_folder / "test" / "ship"), 10)
        assert not found.split and not found.classes and not found.unreadable and not found.files.duplicates

    def test_nothing_can_be_read(self, folder, tmp_path):
        (tmp_path / "bad").mkdir()
        for number in range(4):
            shutil.copyfile(folder / "train" / "cat" / "truncated_jpeg.jpg", tmp_path / "bad" / f"{number}.jpg")
        with pytest.raises(ValueError, match="none of 3 training images can be read: cannot read the image"):
            look(config(tmp_path / "bad"), 10)


def test_values_that_are_cut_are_told(shared_data, tmp_path):
    """Images of 16 bits, grey and in colour; Pillow does not tell the depth of the latter."""
    for name in ("basn2c16.png", "tiff_16bit_RGB.tiff", "16bit.cropped.tif", "rgb.jpg", "hopper.jpg"):
        shutil.copyfile(shared_data / "awkward" / name, tmp_path / name)
    found = look(config(tmp_path), 8)
    assert {name: found.files.modes[name] for name in ("RGB;16", "I;16", "RGB")} == {"RGB;16": 2, "I;16": 1, "RGB": 2}
    assert "16-bit values are scaled to 8 bits" in look_table(found)


def x_rays(root, bits, suffix="png", shape=(40, 32)):
    """Pictures of so many bits in files of 16, the brightest of which holds the largest value."""
    root.mkdir()
    for number in range(8):
        values = np.random.default_rng(number).integers(0, 2 ** (bits - (number > 0)), shape).astype(np.uint16)
        values.flat[0] = 2 ** (bits - (number > 0)) - 1
        if suffix == "tif":
            tifffile.imwrite(root / f"{number}.tif", values, photometric="rgb" if values.ndim == 3 else "minisblack")
        else:
            Image.fromarray(values).save(root / f"{number}.{suffix}")
    return root


class TestDepth:
    """Of files of 16 bits that hold fewer."""

    @pytest.mark.parametrize(("suffix", "bits", "high"), [("png", 12, 4095), ("tif", 10, 1023), ("png", 13, 16383)])
    def test_a_range_is_proposed_and_everything_is_measured_in_it(self, suffix, bits, high, tmp_path):
        found = look(config(x_rays(tmp_path / "set", bits, suffix), channels=1), 100)
        assert found.value_range == ValueRange(0, high) and found.proposed == (0, 2**bits - 1) and not found.constant
        assert f"[0, {high}], proposed because 16-bit files hold only 0 to {2**bits - 1:,}" in look_table(found)
        settings = recommended(found, config(tmp_path / "set", channels=3)).settings
        assert settings["data.value_range"] == f"[0, {high}]" and settings["data.channels"] == "1"
        stated = config(tmp_path / "set", channels=1, value_range=(0, high))
        assert found.mean == look(stated, 100).mean and look(stated, 100).proposed is None

    def test_colours_are_proposed_as_three_channels(self, tmp_path):
        found = look(config(x_rays(tmp_path / "set", 12, "tif", (20, 24, 3)), channels=1), 100)
        assert found.value_range == ValueRange(0, 4095) and len(found.mean) == 3
        assert recommended(found, config(tmp_path / "set")).settings["data.channels"] == "3"

    @pytest.mark.parametrize(("name", "high"), [("16bit.cropped.tif", 1023), ("i_trns.png", 255)])
    def test_awkward_files(self, name, high, shared_data, tmp_path):
        for number in range(2):
            shutil.copyfile(shared_data / "awkward" / name, tmp_path / f"{number}-{name}")
        assert look(config(tmp_path, channels=1, heldout_fraction=0.5), 8).value_range == ValueRange(0, high)

    def test_nothing_is_proposed_for_whole_depth_or_beside_8_bits(self, tmp_path):
        assert look(config(x_rays(tmp_path / "whole", 16), channels=1), 100).value_range is None
        mixed = x_rays(tmp_path / "mixed", 12)
        Image.effect_noise((32, 32), 90).save(mixed / "photo.png")
        found = look(config(mixed, channels=1), 100)
        assert found.value_range is None and "16-bit values are scaled to 8 bits" in look_table(found)

    @pytest.mark.parametrize("kind", ["npy", "signed", "signed tif", "whole"])
    def test_files_that_need_a_range_are_told_a_fitting_one(self, kind, tmp_path):
        for number in range(4):
            values = np.random.default_rng(number).integers(0, 4096, (16, 16))
            values.flat[:2] = 0, 4095
            if kind == "signed tif":
                tifffile.imwrite(tmp_path / f"{number}.tif", (values - 1024).astype(np.int16))
            else:
                scaled = {"npy": values, "signed": values - 1024, "whole": values * 16 - 2**15}[kind]
                np.save(tmp_path / f"{number}.npy", scaled.astype(np.uint16 if kind == "npy" else np.int16))
        with pytest.raises(ValueError, match=r"data\.value_range must state") as caught:
            look(config(tmp_path, channels=1), 100)
        first = {"npy": "[0, 4095]", "whole": "[-32768, 32767]"}.get(kind, "[-1024, 3071]")
        assert str(caught.value).partition("--data.value_range '")[2].startswith(first)

    @pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])
    @pytest.mark.parametrize(
        ("stated", "said"),
        [
            ({}, "state data.value_range, which `diffusers-vae data` proposes"),
            ({"value_range": (0, 65535)}, "data.value_range [0, 65535] is too wide"),
            ({"value_range": (0, 4095)}, None),
        ],
    )
    def test_a_training_warns_of_images_that_use_little_of_their_depth(self, stated, said, limit, tmp_path, caplog):
        root = x_rays(tmp_path / "set", 12)
        with caplog.at_level(logging.WARNING):
            load_data(config(root, channels=1, **stated), progress=True, memory_limit=limit)
        assert (
            (caplog.messages == []) if said is None else ("less than a quarter" in caplog.text and said in caplog.text)
        )


class TestRecommended:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["small", "grey", "photographs", "stream", "digits", "mnist"])
    def test_is_a_command_that_is_taken(self, kind, folder, shared_data, mnist_root):
        if kind == "grey":
            shutil.rmtree(folder)
            folder.mkdir()
            for side in (24, 28, 26):
                Image.effect_noise((side, side), 50).save(folder / f"{side}.png")
        if kind == "photographs":
            folder = shared_data / "kodak"
        data = config(folder, heldout_fraction=0.3)
        if kind in ("digits", "mnist"):
            data = DataConfig(name=kind, root=None if kind == "digits" else str(mnist_root))
        if kind == "stream":
            images = [{"bytes": path.read_bytes(), "path": path.name} for path in (shared_data / "kodak").glob("*.png")]
            table = Dataset.from_dict({"image": images}, Features({"image": ImageFeature()}))
            table.to_parquet(folder / "a.parquet", batch_size=4)
            data = DataConfig(
                name="datasets", root=str(folder / "a.parquet"), streaming=True, channels=3, resolution=64
            )
            data = dataclasses.replace(data, heldout_fraction=0.3)
        found = look(data, 8)
        if kind == "stream":  # of which no more is read
            assert found.parts == {"training": 17, "held-out": 7} and sum(found.files.sizes.values()) == 8
        choice = recommended(found, data)
        flags = [part for name, value in choice.settings.items() for part in (f"--{name}", value)]
        parsed = parse_settings(TRAININGS["train"], ["--preset", choice.preset, *flags])[0]
        expected = {"small": (32, 3, "rgb-small"), "grey": (32, 1, "mnist-vae"), "photographs": (64, 3, "rgb-small")}
        expected["stream"] = expected["photographs"]
        expected |= {"digits": (32, 1, "digits"), "mnist": (32, 1, "mnist-vae")}
        assert (parsed.data.resolution, parsed.data.channels, choice.preset) == expected[kind]
        assert parsed.data.on_bad_image == ("skip" if kind == "small" else "stop")
        assert parsed.data.crops == {"photographs": 100, "stream": "random"}.get(kind)
        assert parsed.data.horizontal_flip == (kind in ("photographs", "stream"))
        assert parsed.data.streaming == (kind == "stream")
        assert parsed.data.fit == ("pad" if kind in ("mnist", "grey") else "crop")
        assert parsed.data.heldout_fraction == (0.1 if kind in ("digits", "mnist") else 0.3)


@pytest.mark.slow
def test_command(folder, tmp_path, capsys):
    picture = tmp_path / "new" / "sheet.png"
    assert cli.main(["data", str(folder), "--data.channels", "3", "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "27 training, 2 held-out (the set's own parts)" in told and "again.png" in told
    assert f"--data.root {folder} --run.output_dir runs/set --data.channels 3 --data.on_bad_image skip" in told
    with Image.open(picture) as sheet:
        assert sheet.width > 16 * 32
    assert cli.main(["data", str(folder), "--out", str(folder / "sheet.png")]) == 1
    assert "or it would be read as an image of the set" in capsys.readouterr().err
    assert cli.main(["data", str(tmp_path / "nowhere")]) == 1
    assert "which is not there" in capsys.readouterr().err
