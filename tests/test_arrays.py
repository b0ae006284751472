"""Images in NumPy's arrays are those of the same images in files."""

import dataclasses
import os
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.files import ByIndex
from support.launches import run_forked
from torch.utils.data import DataLoader

from diffusers_vae import cli
from diffusers_vae.data import ArrayImages, DataConfig, StoredImages, load_data, load_split, look
from diffusers_vae.images.ranges import ValueRange, to_model_range

NAMES = ("cat", "ship")


def config(root, **settings):
    settings = {"channels": 3, "resolution": 16, "num_workers": 0} | settings
    return DataConfig(name="array", root=str(root), **settings)


def pixels_of(image_set):
    return image_set.read(range(len(image_set))).pixels


def sorted_pixels(image_set):
    return sorted(map(bytes, pixels_of(image_set).numpy()))


@pytest.fixture(scope="module")
def cifar(cifar_folder):
    """40 cats and ships, (40, 32, 32, 3), and what they are."""
    paths = [path for name in NAMES for path in sorted((cifar_folder / "test" / name).iterdir())[:20]]
    return np.stack([np.asarray(Image.open(path)) for path in paths]), np.array([path.parent.name for path in paths])


@pytest.fixture
def folder(cifar, tmp_path):
    """The same, as files."""
    for index, (pixels, name) in enumerate(zip(*cifar, strict=True)):
        (tmp_path / "files" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "files" / name / f"{index:02}.png")
    return tmp_path / "files"


def save(kind, folder, images, labels):
    """Written in one of many ways; the settings to read it."""
    folder.mkdir(exist_ok=True)
    if kind.startswith("npz"):
        (np.savez_compressed if "compressed" in kind else np.savez)(folder / "a.npz", pictures=images, y=labels)
        return {"root": folder / "a.npz", "label_column": "y"}
    if kind == "shards":
        for start in (0, 15, 30):
            np.save(folder / f"{start}.npy", images[start : start + 15])
            np.save(folder / f"{start}.labels.npy", labels[start : start + 15])
        return {"root": folder}
    laid = np.moveaxis(images, -1, 1) if "channels first" in kind else images
    laid = np.asfortranarray(laid) if "Fortran" in kind else laid
    np.save(folder / "a.npy", laid)
    np.save(folder / "a.labels.npy", labels)
    return {"root": folder / "a.npy"}


KINDS = ["npy", "npy, channels first", "npy, Fortran", "npz", "npz, compressed", "shards"]
LIMITS = pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])


@pytest.mark.slow
@LIMITS
@pytest.mark.parametrize("kind", KINDS)
def test_are_those_of_files(kind, limit, cifar, folder, tmp_path):
    settings = save(kind, tmp_path / "arrays", *cifar)
    for change in ({}, {"channels": 1}, {"resolution": (8, 12)}, {"resolution": 40, "fit": "pad"}):
        own, _ = load_split(config(**settings, **change), "all", memory_limit=limit)
        expected, _ = load_split(dataclasses.replace(config(folder, **change), name="folder"), "all")
        assert isinstance(own, ArrayImages if limit is None else StoredImages) and len(own) == 40
        assert sorted_pixels(own) == sorted_pixels(expected)
    assert own.classes == expected.classes == NAMES
    label_of = {bytes(image): label for image, label in zip(pixels_of(expected).numpy(), expected.labels, strict=True)}
    assert [label_of[bytes(image)] for image in pixels_of(own).numpy()] == own.labels.tolist()
    assert len({own.name(index) for index in range(40)}) == 40


@pytest.mark.slow
@LIMITS
def test_grey_images_with_integers_as_labels(limit, mnist_root, tmp_path):
    reference, _ = load_data(DataConfig(name="mnist", root=str(mnist_root), resolution=28))
    images, labels = reference.pixels[:100, 0].numpy(), reference.labels[:100].numpy()
    for laid in (images, images[:, None], images[..., None]):
        np.save(tmp_path / "train.npy", laid)
        np.save(tmp_path / "train.labels.npy", labels.astype(">i2"))
        np.save(tmp_path / "test.npy", laid[:20])
        np.save(tmp_path / "test.labels.npy", labels[:20].astype(np.uint8))
        for channels in (1, 3):
            parts = load_data(config(tmp_path, channels=channels, resolution=28), memory_limit=limit)
            assert [len(part) for part in parts] == [100, 20]
            for part in parts:
                place = [int(part.name(index).rpartition(" ")[2]) for index in range(len(part))]
                assert part.classes == tuple("0123456789") and part.labels.tolist() == labels[place].tolist()
                expected = reference.pixels[place].expand(-1, channels, -1, -1)
                assert torch.equal(pixels_of(part), expected) and place != sorted(place)


class TestReading:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_by_threads_and_processes_at_once(self, kind, cifar, tmp_path):
        images, _ = load_data(config(**save(kind, tmp_path / "arrays", *cifar)), memory_limit=0)
        expected = pixels_of(images)
        with ThreadPoolExecutor(4) as pool:
            read = pool.map(lambda index: images.read([index]).pixels, range(len(images)))
            assert torch.equal(torch.cat(list(read)), expected)
        loader = DataLoader(ByIndex(images), 9, num_workers=2, collate_fn=lambda read: read.pixels)
        assert torch.equal(torch.cat(list(loader)), expected)
        packed = pickle.dumps(images)
        assert len(packed) < 4000 and torch.equal(pixels_of(pickle.loads(packed)), expected)

    def test_parts_by_the_names_of_files(self, cifar, tmp_path):
        images, labels = cifar
        for name, part in (("train-000", slice(20)), ("train-001", slice(20, 30)), ("val_0", slice(30, 40))):
            np.save(tmp_path / f"{name}.npy", images[part])
            np.save(tmp_path / f"{name}.labels.npy", labels[part])
        train_set, heldout = load_data(config(tmp_path, resolution=32))
        assert sorted_pixels(train_set) == sorted(bytes(np.moveaxis(image, -1, 0)) for image in images[:30])
        assert (len(heldout), heldout.labels.tolist(), heldout.classes) == (10, [1] * 10, NAMES)
        assert load_split(config(tmp_path))[1] == "held-out"
        (tmp_path / "val_0.npy").rename(tmp_path / "other.npy")
        (tmp_path / "val_0.labels.npy").unlink()
        with pytest.raises(ValueError, match=r"not clear what to train on .*other\.npy, train-000\.npy"):
            load_data(config(tmp_path))
        (tmp_path / "other.npy").unlink()
        assert load_split(config(tmp_path))[1] == "all"

    @pytest.mark.slow
    def test_crops_are_of_its_own_resolution(self, cifar, folder, tmp_path):
        cut = {"crops": 3, "resolution": 8}
        sets = [load_data(config(**save("npy", tmp_path / "a", *cifar), **cut), memory_limit=at)[0] for at in (0, None)]
        assert torch.equal(*map(pixels_of, sets)) and len(sets[0]) == 108
        for index in range(0, 108, 20):
            place = int(sets[0].name(index).split("image ")[1].split(",")[0])
            shifts = np.lib.stride_tricks.sliding_window_view(cifar[0][place], (8, 8, 3)).reshape(-1, 8, 8, 3)
            assert bytes(pixels_of(sets[0])[index].permute(1, 2, 0).numpy()) in set(map(bytes, shifts))

    def test_bool_is_black_and_white(self, cifar, tmp_path):
        np.save(tmp_path / "masks.npy", cifar[0][..., 0] > 128)
        both, _ = load_split(config(tmp_path / "masks.npy", channels=1, resolution=32), "all")
        assert sorted_pixels(both) == sorted(bytes((image > 128).astype(np.uint8) * 255) for image in cifar[0][..., 0])

    def test_fingerprint_is_of_the_images(self, cifar, tmp_path):
        images, labels = cifar
        found = []
        for name in ("one", "two"):
            found.append(load_data(config(**save("npy", tmp_path / name, images, labels)), memory_limit=0)[0])
        assert found[0].fingerprint() == found[1].fingerprint()
        other = images.copy()
        other[-1, -1, -1, -1] ^= 1
        for changed in (other, images[::-1], images.astype(bool), images[:39]):
            settings = save("npy", tmp_path / "two", changed, labels[: len(changed)])
            assert load_data(config(**settings), memory_limit=0)[0].fingerprint() != found[0].fingerprint()
        rows = [found[0].store.identity(row) for row in range(40)]
        assert len(set(rows)) == 40


class TestValues:
    """Arrays of any dtype and number of channels, with data.value_range."""

    @LIMITS
    @pytest.mark.parametrize(
        ("dtype", "low", "high", "channels"),
        [("<u2", 0, 65535, 5), (">u2", 0, 4095, 1), (">i2", -1000, 3000, 3), ("<f4", -1, 1, 3), ("<f8", 0, 1, 2)],
    )
    def test_are_those_of_the_array(self, dtype, low, high, channels, limit, tmp_path):
        chance = np.random.default_rng(0)
        values = (low + (high - low) * chance.random((30, channels, 9, 10))).astype(dtype)
        for laid in (values, np.moveaxis(values, 1, -1), np.asfortranarray(values)):
            np.save(tmp_path / "a.npy", laid)
            settings = {"resolution": (9, 10), "channels": channels, "value_range": (low, high)}
            part, _ = load_data(config(tmp_path / "a.npy", **settings), memory_limit=limit)
            place = [int(part.name(index).rpartition(" ")[2]) for index in range(len(part))]
            pixels = pixels_of(part)
            assert pixels.dtype == torch.float32
            expected = (values[place].astype(np.float64) - low) / (high - low)
            assert np.abs(pixels.numpy() - expected).max() < 1e-7
            back = ValueRange(low, high).from_model_range(to_model_range(pixels), dtype)
            most = 1e-6 * (high - low) if np.dtype(dtype).kind == "f" else 0
            assert np.abs(back.astype(np.float64) - values[place]).max() <= most

    def test_of_8_bits_and_more_channels_need_no_range(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 256, (20, 9, 10, 5), dtype=np.uint8)
        np.save(tmp_path / "a.npy", values)
        both, _ = load_split(config(tmp_path / "a.npy", resolution=(9, 10), channels=5), "all")
        assert sorted_pixels(both) == sorted(bytes(np.moveaxis(image, -1, 0)) for image in values)
        with pytest.raises(ValueError, match=r"with 4 channels for data\.channels 4, got \(20, 9, 10, 5\)"):
            load_data(config(tmp_path / "a.npy", channels=4))

    @LIMITS
    def test_wrong_ones_are_named(self, limit, tmp_path):
        values = np.zeros((30, 9, 10), np.float32)
        values[17, 3, 3], values[18, 0, 0] = np.nan, 1.5
        np.save(tmp_path / "a.npy", values)
        settings = {"root": tmp_path / "a.npy", "channels": 1, "value_range": (0, 1)}
        wrong = r"a\.npy, image 17: values must be finite and lie in \[0, 1\], which data\.value_range states, got nan"
        with pytest.raises(ValueError, match=wrong):
            both, _ = load_split(config(**settings), "all", memory_limit=limit)
            both.read(sorted(range(30), key=lambda index: both.rows[index])).checked()
        both, _ = load_split(config(**settings, on_bad_image="skip"), "all", memory_limit=limit)
        read = both.read(range(len(both)))
        assert len(read.kept) == 28 and len((*both.errors, *read.errors)) == 2

    def test_which_range_may_be_meant(self, tmp_path):
        np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 4000, (30, 9, 10), dtype=np.uint16))
        with pytest.raises(ValueError, match=r"uint16 in 27 of 27 .*'\[0, 4095\]'.* or '\[0, 65535\]'"):
            look(config(tmp_path / "a.npy", channels=1), 100)


class TestErrors:
    def refused(self, match, root, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load_data(config(root, **settings))

    @pytest.mark.parametrize(
        ("array", "match"),
        [
            (np.zeros((9, 8, 8), np.float32), r"a\.npy holds float32.*first 9 images.* \[0\.0, 0\.0\].*value_range"),
            (np.zeros((9, 8, 8), ">u2"), "holds uint16, and nothing states"),
            (np.zeros((9, 8, 8), complex), "must hold real numbers, got complex128"),
            (np.array([{}, None]), "holds Python objects, which are not unpickled"),
            (np.zeros((8, 8), np.uint8), r"images must be \(N, channels.*with 1 or 3 channels.*got \(8, 8\)"),
            (np.zeros((8, 8, 3), np.uint8), r"got \(8, 8, 3\)"),
            (np.zeros((9, 4, 8, 8), np.uint8), r"got \(9, 4, 8, 8\)"),
            (np.zeros((9, 3, 8, 1), np.uint8), "not clear where the channels of .*a.npy lie"),
            (np.zeros((0, 8, 8), np.uint8), r"a\.npy is empty: its shape is \(0, 8, 8\)"),
        ],
    )  # fmt: skip
    def test_what_are_no_images(self, array, match, tmp_path):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        self.refused(match, tmp_path / "a.npy")
        self.refused(match, tmp_path)

    def test_damage(self, cifar, tmp_path):
        file = tmp_path / "a.npy"
        np.save(file, cifar[0])
        whole = file.read_bytes()
        for content in (whole[:-1], whole[:1000], whole[:50], whole[:5], b"", b"words" * 100, pickle.dumps([1])):
            file.write_bytes(content)
            self.refused(rf"cannot read {file}: ", file)
        for name in ("npz", "npz, compressed"):
            save(name, tmp_path, *cifar)
            whole = (tmp_path / "a.npz").read_bytes()
            flipped = bytearray(whole)
            flipped[5000] ^= 1
            for content in (whole[:-1000], whole[:50], bytes(flipped), b"", b"words"):
                (tmp_path / "a.npz").write_bytes(content)
                self.refused(rf"cannot read {tmp_path / 'a.npz'}", tmp_path / "a.npz")

    def test_a_file_that_is_changed_while_it_is_read(self, cifar, tmp_path):
        settings = save("npy", tmp_path / "arrays", *cifar)
        images, _ = load_data(config(**settings), memory_limit=0)
        for size, reason in (
            (settings["root"].stat().st_size - 1, "mmap length is greater than file size"),
            (100, "EOF"),
        ):
            os.truncate(settings["root"], size)
            with pytest.raises(ValueError, match=rf"cannot read .*a\.npy, image \d+: {reason}"):
                images.read([0, 1]).checked()
        np.save(settings["root"], cifar[0][:5])
        with pytest.raises(ValueError, match=r"image \d+: the file was changed: it now holds \(5, 32, 32, 3\) uint8"):
            images.read([0, 1]).checked()

    def test_nothing_is_unpickled(self, tmp_path):
        np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object), x=np.zeros((9, 8, 8), np.uint8))
        self.refused("Python objects", tmp_path / "a.npz", image_column="images")
        self.refused("[Oo]bject arrays cannot be loaded", tmp_path / "a.npz", label_column="images")
        np.save(tmp_path / "b.npy", np.zeros((9, 8, 8), np.uint8))
        np.save(tmp_path / "b.labels.npy", np.array([{}] * 9))
        self.refused(r"cannot read .*b\.labels\.npy: .*Python objects", tmp_path / "b.npy")

    def test_which_array_of_several(self, cifar, tmp_path):
        file = tmp_path / "a.npz"
        np.savez(file, x_train=cifar[0], y_train=cifar[1], x_test=cifar[0][:5])
        self.refused(
            r"several arrays .*data\.image_column, of x_train \(40, 32, 32, 3\) uint8; y_train \(40,\) <U4; x", file
        )
        self.refused("has no array images; name one", file, image_column="images")
        self.refused(r"has no array y: it holds x_train", file, image_column="x_train", label_column="y")
        both, _ = load_split(config(file, image_column="x_train", label_column="y_train"), "all")
        assert len(both) == 40 and both.classes == NAMES
        assert load_data(config(file, image_column="x_test"))[0].labels is None
        np.savez(file, y_train=cifar[1])
        self.refused("no array with the shape of images", file)
        np.save(tmp_path / "b.npy", cifar[0])
        self.refused(r"key of an array in an \.npz, got x", tmp_path / "b.npy", image_column="x")
        self.refused(r"got y; labels of .*b\.npy lie in .*b\.labels\.npy", tmp_path / "b.npy", label_column="y")

    def test_labels(self, cifar, tmp_path):
        np.save(tmp_path / "a.npy", cifar[0])
        for labels in (np.arange(39), np.zeros((40, 10), np.uint8), np.linspace(0, 1, 40)):
            np.save(tmp_path / "a.labels.npy", labels)
            self.refused(r"one integer or text for each of the 40 images .*got shape .*a\.labels\.npy", tmp_path)
        np.save(tmp_path / "a.labels.npy", np.arange(40))
        np.save(tmp_path / "b.npy", cifar[0])
        self.refused(r"b\.npy has no b\.labels\.npy beside it", tmp_path)
        (tmp_path / "a.npy").unlink()
        self.refused(r"a\.labels\.npy are labels of a\.npy, which is missing", tmp_path)
        for labels, classes in (
            ([b"a\xc3\xa9", b"b"], ("aé", "b")),
            ([9, 10], ("9", "10")),
            ([False, True], ("False", "True")),
        ):
            np.save(tmp_path / "a.npy", cifar[0])
            np.save(tmp_path / "a.labels.npy", np.array(labels * 20))
            found = load_split(config(tmp_path / "a.npy"), "all")[0]
            places = [int(found.name(index).rpartition(" ")[2]) for index in range(40)]
            assert found.classes == classes and found.labels.tolist() == [place % 2 for place in places]

    def test_places(self, tmp_path):
        self.refused("which is not there", tmp_path / "a.npy")
        self.refused(r"no array in .*none of \.npy, \.npz", tmp_path)
        with pytest.raises(
            ValueError, match=r"crops 2 would be ignored with data\.name mnist: set data\.name to folder or array"
        ):
            DataConfig(name="mnist", crops=2)


@pytest.mark.slow
def test_commands(cifar, tmp_path, capsys):
    settings = save(
        "npy", tmp_path / "arrays", np.concatenate([cifar[0], cifar[0][:2]]), np.concatenate([cifar[1], cifar[1][:2]])
    )
    arguments = ["data", str(settings["root"]), "--data.channels", "3", "--out", str(tmp_path / "sheet.png")]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "a.npy, image 40" in told and "--data.name array" in told and "RGB" in told


def memory_in_use() -> float:
    """Memory of this process in MB: its own pages and those of files."""
    status = Path("/proc/self/status").read_text()
    return sum(int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1000 for name in ("RssAnon", "RssFile"))


def read_large_array(file: Path) -> None:
    """Print how many MB more are in use after all images were read, one by one."""
    settings = config(file, resolution=8)
    small, _ = load_data(settings, memory_limit=0)
    small.read(range(20))
    before = memory_in_use()
    images, _ = load_data(settings, memory_limit=0)
    assert not any(images.read([index]).pixels.any() for index in range(len(images)))
    sys.stdout.write(f"{memory_in_use() - before}\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_large_array_takes_no_memory(tmp_path):
    """After all of a file of 128 MB was read, neither own pages nor those of the file stay in memory."""
    count = 680
    with (tmp_path / "a.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * 256 * 256 * 3)
    told = run_forked(read_large_array, tmp_path / "a.npy", log=tmp_path / "log")
    assert float(told.splitlines()[-1]) < 16
