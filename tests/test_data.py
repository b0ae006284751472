"""Where images come from and in which order, on the real sets."""

import dataclasses
import gzip
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from support.batches import epoch_batches
from support.files import ByIndex, paths_of
from support.launches import run_forked
from torchvision import datasets

from diffusers_vae.data import (
    ArrayImages,
    DataConfig,
    FileStore,
    Records,
    StoredImages,
    image_batches,
    load_data,
    load_split,
    step_generator,
)
from diffusers_vae.data.reading import AHEAD, PARTS
from diffusers_vae.data.sets import ReadImages
from diffusers_vae.images.files import read_image


def contents(folder):
    return sorted((path.name, path.stat().st_size) for path in folder.rglob("*"))


def all_pixels(image_set):
    return image_set.read(range(len(image_set))).pixels


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """A folder of large JPEGs, wide and tall, stored upright and turned, of sides that no scale divides, and one of
    their pixels as PNG files.
    """
    jpegs, pngs = tmp_path_factory.mktemp("jpegs"), tmp_path_factory.mktemp("pngs")
    for place, number in enumerate(("01", "05", "09", "23")):
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 3, 8)[place]
        with Image.open(shared_data / "kodak" / f"kodim{number}.png") as image:
            image.crop((0, 0, image.width - 7, image.height - 3)).save(jpegs / f"{place}.jpg", exif=exif)
        pixels = read_image(jpegs / f"{place}.jpg", 3).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(pngs / f"{place}.png", compress_level=1)
    return jpegs, pngs


@pytest.fixture
def offline(monkeypatch):
    """torchvision's downloads fail as they do without a network."""

    def fail(*args, **kwargs):
        raise URLError("no network")

    for module in (datasets.mnist, datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)


def load_and_print_peak(small, large):
    """Load two folders, and print by how many bytes the second has raised the most that this process has held."""
    import resource

    load_data(DataConfig(name="folder", root=str(small)))  # which imports and starts what any folder needs

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_data(DataConfig(name="folder", root=str(large)))
    sys.stdout.write(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit}\n")


class TestDigits:
    def test_parts_hold_every_image_once(self):
        train, heldout = load_data(DataConfig(resolution=10))
        assert (len(train), len(heldout)) == (1617, 180)
        assert train.pixels.dtype == torch.uint8 and train.pixels.shape[1:] == (1, 10, 10)
        assert train.pixels.max() == 255 and train.pixels.min() == 0
        from sklearn.datasets import load_digits

        both = torch.cat([train.pixels, heldout.pixels])
        inside = both[:, :, 1:9, 1:9]
        assert both.sum() == inside.sum()
        ours = sorted(map(bytes, inside.reshape(1797, -1).numpy()))
        theirs = sorted(map(bytes, (load_digits().images.reshape(1797, -1) * (255 / 16)).round().astype(np.uint8)))
        assert ours == theirs

    def test_held_out_part_is_always_the_same(self):
        first, second = (load_data(DataConfig(resolution=8))[1] for _ in range(2))
        assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)

    def test_every_class_is_held_out(self):
        assert set(load_data(DataConfig(resolution=8))[1].labels.tolist()) == set(range(10))

    def test_three_channels_repeat_the_grey_one(self):
        grey, rgb = (load_data(DataConfig("digits", resolution=8, channels=c))[0].pixels for c in (1, 3))
        assert torch.equal(rgb, grey.expand(-1, 3, -1, -1))


@pytest.fixture
def nothing_temporary(monkeypatch, tmp_path):
    """No folder for temporary files, in which a process that is killed would leave what it has unpacked."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no folder"))


class TestNamedSets:
    @pytest.mark.slow
    def test_mnist_packed_in_a_read_only_root(self, shared_data):
        before = contents(shared_data / "MNIST")
        train, heldout = load_data(DataConfig(name="mnist", root=str(shared_data), resolution=28))
        assert (len(train), len(heldout)) == (60_000, 10_000)
        assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
        assert heldout.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
        assert train.pixels.double().mean() / 255 == pytest.approx(0.13066, abs=5e-6)
        assert contents(shared_data / "MNIST") == before

    @pytest.mark.slow
    def test_mnist_unpacked_equals_torchvision(self, mnist_root):
        train, _ = load_data(DataConfig(name="mnist", root=str(mnist_root), resolution=28))
        reference = datasets.MNIST(mnist_root, train=True)
        assert torch.equal(train.pixels[:, 0], reference.data) and torch.equal(train.labels, reference.targets)

    def test_shortened_fashion_mnist_is_read(self, shared_data, nothing_temporary):
        root = shared_data / "fashion-mnist-10k"
        train, heldout = load_data(DataConfig(name="fashion-mnist", root=str(root), resolution=28))
        assert (len(train), len(heldout)) == (10_000, 10_000)
        assert train.pixels.double().mean() / 255 == pytest.approx(0.28631, abs=5e-6)

    @pytest.mark.slow
    def test_qmnist_layout_is_read(self, mnist_root, tmp_path):
        """QMNIST's files hold a table of labels, and its test part begins with MNIST's 10,000."""
        reference = datasets.MNIST(mnist_root, train=False)
        raw = tmp_path / "QMNIST" / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 300), ("test", 10_100)):
            rows = np.arange(count) % 10_000
            images = reference.data.numpy()[rows]
            table = np.zeros((count, 8), ">i4")
            table[:, 0] = reference.targets.numpy()[rows]
            header = struct.pack(">4i", 2051, count, 28, 28)
            with gzip.open(raw / f"qmnist-{part}-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(header + images.tobytes())
            (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(struct.pack(">3i", 0x0C02, count, 8) + table.tobytes())
        train, heldout = load_data(DataConfig(name="qmnist", root=str(tmp_path), resolution=28))
        assert (len(train), len(heldout)) == (300, 10_000)
        assert torch.equal(heldout.pixels[:, 0], reference.data)
        assert torch.equal(heldout.labels, reference.targets)

    @pytest.mark.slow
    @pytest.mark.parametrize("packed", [False, True])
    def test_cifar10_is_read(self, packed, cifar_folder, tmp_path, monkeypatch, nothing_temporary):
        """Real pixels in CIFAR-10's own batch format; torchvision's sums of the whole set are exchanged for theirs."""
        import hashlib
        import pickle

        files = sorted((cifar_folder / "test").rglob("*.png"))[:60]
        pixels = torch.stack([read_image(file, 3) for file in files])
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        sums = {}
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for i, name in enumerate(names):
            rows = pixels[10 * i : 10 * i + 10].flatten(1).numpy()
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
        sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        meta = {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]}
        monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
        root = tmp_path
        if packed:
            root = tmp_path / "packed"
            root.mkdir()
            with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
                archive.add(folder, folder.name)
            packed_sum = hashlib.md5((root / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
            monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", packed_sum)
        train, heldout = load_data(DataConfig(name="cifar10", root=str(root), channels=3))
        assert torch.equal(torch.cat([train.pixels, heldout.pixels]), pixels)
        assert heldout.labels.tolist() == list(range(10)) and heldout.classes == tuple("0123456789")
        if packed:
            assert [path.name for path in root.iterdir()] == ["cifar-10-python.tar.gz"]
        grey, _ = load_data(DataConfig(name="cifar10", root=str(root), channels=1))
        assert grey.pixels.shape == (50, 1, 32, 32)

    @pytest.mark.parametrize(
        ("name", "files"),
        [
            ("mnist", ["MNIST/raw", "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
            ("qmnist", ["QMNIST/raw", "qmnist-train-images-idx3-ubyte.gz", "qmnist-test-labels-idx2-int.gz"]),
            ("fashion-mnist", ["FashionMNIST/raw", "train-images-idx3-ubyte.gz"]),
            ("cifar10", ["cifar-10-python.tar.gz"]),
        ],
    )
    def test_missing_files_are_named(self, name, files, tmp_path, offline):
        with pytest.raises(FileNotFoundError) as error:
            load_data(DataConfig(name=name, root=str(tmp_path)))
        for file in [*files, str(tmp_path)]:
            assert file in str(error.value)

    @pytest.mark.slow
    def test_damaged_archive_is_named(self, shared_data, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for file in (shared_data / "MNIST" / "raw").iterdir():
            (raw / file.name).write_bytes(file.read_bytes())
        damaged = raw / "t10k-images-idx3-ubyte.gz"
        damaged.write_bytes(damaged.read_bytes()[:100_000])
        with pytest.raises(ValueError, match="t10k-images-idx3-ubyte"):
            load_data(DataConfig(name="mnist", root=str(tmp_path)))

    def test_truncated_idx_file_is_refused(self, mnist_root, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for file in (mnist_root / "MNIST" / "raw").iterdir():
            (raw / file.name).write_bytes(file.read_bytes()[: 5_000_000 if "train-images" in file.name else None])
        with pytest.raises(ValueError, match="MNIST/raw is damaged"):
            load_data(DataConfig(name="mnist", root=str(tmp_path)))

    def test_damaged_cifar10_archive_is_kept_and_named(self, tmp_path, offline):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged"):
            load_data(DataConfig(name="cifar10", root=str(tmp_path)))
        assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"not an archive"

    def test_damaged_cifar10_folder_is_named(self, tmp_path, offline):
        (tmp_path / "cifar-10-batches-py").mkdir()
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"no batch")
        with pytest.raises(ValueError, match="cifar-10-batches-py is damaged or not CIFAR-10"):
            load_data(DataConfig(name="cifar10", root=str(tmp_path)))

    def test_parts_that_there_are_not(self):
        with pytest.raises(ValueError, match="split must be held-out, training or all, got test"):
            load_split(DataConfig(), "test")


class TestArrayImages:
    @pytest.fixture
    def digits(self):
        return load_data(DataConfig(resolution=8))[0]

    @pytest.mark.parametrize("indices", [[5, 3, 700, 5], range(7, 60), torch.tensor([9, 0, 1616]), [], range(0)])
    def test_takes_indices_of_every_kind(self, indices, digits):
        read = digits.read(indices)
        expected = [digits.pixels[int(index)].tolist() for index in indices]
        assert read.pixels.tolist() == expected and list(read.kept) == list(range(len(indices)))
        assert read.pixels.dtype == torch.uint8 and read.pixels.shape[1:] == (1, 8, 8)

    @pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
    def test_pixels_on_a_device(self, device, digits):
        if device != "cpu" and not getattr(torch, device).is_available():
            pytest.skip(f"needs {device}")
        store, rows, crops = FileStore(Path(), [Path("a"), Path("b")], {}), np.array([0, 1]), np.array([4, 5])
        records = Records(digits.labels, digits.classes, [("d",)], store, rows, crops)
        moved = ArrayImages(digits.pixels, records, ("c is broken",)).to(device)
        assert moved.pixels.device.type == device and moved.labels.device.type == "cpu"
        assert torch.equal(moved.read([5, 3]).pixels.cpu(), digits.pixels[[5, 3]])
        assert moved.fingerprint() == digits.fingerprint() and moved.classes == digits.classes
        assert moved.errors == ("c is broken",) and moved.captions == [("d",)] and moved.name(1) == "b, crop 5"


class TestReadImages:
    @dataclasses.dataclass(frozen=True)
    class More(ReadImages):
        moments: torch.Tensor | None = None

    def test_pins_all_tensors(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # pinning itself needs a device
        read = self.More(torch.tensor([1, 2]), [0, 2], ("b is broken",), True, moments=torch.tensor([3.0, 4.0]))
        pinned = read.pin_memory()
        assert type(pinned) is self.More and pinned.pixels.tolist() == [2, 3] and pinned.moments.tolist() == [4, 5]
        assert (pinned.kept, pinned.errors, pinned.stop) == (read.kept, read.errors, read.stop)
        assert self.More(torch.tensor([1]), [0]).pin_memory().moments is None

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_loader_pins(self):
        digits, _ = load_data(DataConfig(resolution=8))
        loader = torch.utils.data.DataLoader(
            ByIndex(digits), batch_sampler=[[5, 3]], collate_fn=lambda read: read, pin_memory=True
        )
        (read,) = loader
        assert read.pixels.is_pinned() and torch.equal(read.pixels, digits.pixels[[5, 3]])


class TestFolder:
    @pytest.mark.slow
    def test_train_and_test_subfolders_with_classes(self, cifar_folder):
        """Folders come sorted by class; what is measured on the first images must not be of one class alone."""
        train, heldout = load_data(DataConfig(name="folder", root=str(cifar_folder), channels=3))
        assert (len(train), len(heldout)) == (4000, 1000)
        assert torch.bincount(train.labels).tolist() == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
        horse = sorted((cifar_folder / "test" / "horse").iterdir())[3]
        (place,) = (heldout.pixels == read_image(horse, 3)).flatten(1).all(1).nonzero().flatten().tolist()
        assert heldout.labels[place] == 7
        assert all(len(part.labels[:100].unique()) == 10 for part in (train, heldout))

    @pytest.mark.slow
    def test_training_folder_alone_keeps_its_labels(self, cifar_folder, tmp_path):
        (tmp_path / "train").symlink_to(cifar_folder / "test")
        (tmp_path / ".trash").mkdir()
        Image.new("L", (16, 16)).save(tmp_path / "train" / "frog" / "._hidden.png")
        train, heldout = load_data(DataConfig(name="folder", root=str(tmp_path), channels=3))
        (tmp_path / "train" / "frog" / "._hidden.png").unlink()
        assert (len(train), len(heldout)) == (900, 100) and len(train.labels.unique()) == 10

    @pytest.mark.slow
    def test_flat_folder_is_split(self, cifar_folder):
        root = cifar_folder / "test" / "frog"
        train, heldout = load_data(DataConfig(name="folder", root=str(root), channels=3, heldout_fraction=0.25))
        assert (len(train), len(heldout)) == (84, 28) and train.labels is None
        everything = torch.cat([train.pixels, heldout.pixels]).flatten(1)
        assert len(everything.unique(dim=0)) == 112

    @pytest.mark.slow
    def test_read_on_demand_equals_in_memory(self, cifar_folder):
        config = DataConfig(name="folder", root=str(cifar_folder / "test"), channels=3, resolution=24)
        memory, _ = load_data(config)
        disk, _ = load_data(config, memory_limit=0)
        assert isinstance(memory, ArrayImages) and isinstance(disk, StoredImages)
        indices = [5, 3, 700]
        assert torch.equal(memory.read(indices).pixels, disk.read(indices).pixels)
        assert [memory.name(i) for i in indices] == [disk.name(i) for i in indices]
        assert torch.equal(memory.labels, disk.labels)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("resolution", [48, (40, 80), (80, 40)])
    @pytest.mark.parametrize("fit", ["crop", "pad"])
    def test_large_jpegs_are_as_if_decoded_whole(self, fit, resolution, channels, photographs):
        """As the same pixels in PNG files, which are always decoded whole."""
        jpegs, pngs = (
            load_data(
                DataConfig(name="folder", root=str(root), resolution=resolution, channels=channels, fit=fit),
                memory_limit=0,
            )
            for root in photographs
        )
        for reduced, whole in zip(jpegs, pngs, strict=True):
            assert [path.stem for path in paths_of(reduced)] == [path.stem for path in paths_of(whole)]
            for read, expected in zip(*map(all_pixels, (reduced, whole)), strict=True):
                assert not torch.equal(read, expected) and read.shape == expected.shape
                assert (read.float() - expected.float()).square().mean() < 255**2 / 10**4.5  # 45 dB
                assert torch.equal(read.sum(0) == 0, expected.sum(0) == 0) or fit == "crop"  # the borders

    def test_protocol_says_how_large_jpegs_are_decoded(self, tmp_path):
        words = DataConfig(name="folder", root=str(tmp_path)).resize
        assert words.startswith("scaled to cover (bicubic") and "JPEGs that are 6 times as large or more" in words
        assert "JPEG" not in DataConfig().resize + DataConfig(name="folder", root=str(tmp_path), crops=2).resize

    BROKEN = ("truncated_jpeg.jpg", "truncated_image.png")  # which only decoding shows
    REFUSED = ("decompression_bomb.gif", "zero_width.gif", "10ct_32bit_128.tiff")

    def awkward(self, shared_data, **settings):
        return DataConfig(name="folder", root=str(shared_data / "awkward"), channels=3, **settings)

    def test_awkward_files_are_all_named_at_once(self, shared_data):
        with pytest.raises(ValueError, match="5 of 30 files cannot be read") as error:
            load_data(self.awkward(shared_data))
        assert all(name in str(error.value) for name in self.BROKEN + self.REFUSED)
        assert "hopper.jpg" not in str(error.value)

    def test_awkward_files_can_be_left_out(self, shared_data, caplog):
        train, heldout = load_data(self.awkward(shared_data, on_bad_image="skip"), progress=True)
        assert len(train) + len(heldout) == 25
        errors = "\n".join(train.errors + heldout.errors)
        assert len(train.errors + heldout.errors) == 5 and all(name in errors for name in self.BROKEN + self.REFUSED)
        assert "5 of 30 files cannot be read and are left out" in caplog.text
        for part in (train, heldout):  # pixels, labels and names still belong together
            index = len(part) - 1
            expected = StoredImages(self.awkward(shared_data), part.records).read([index])
            assert torch.equal(part.read([index]).pixels, expected.pixels)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
    def test_large_images_do_not_take_the_memory_all_at_once(self, tmp_path):
        """Four of 36 million pixels each, read by as many threads or more."""
        small, large = tmp_path / "small", tmp_path / "large"
        for folder, side in ((small, 100), (large, 6000)):
            folder.mkdir()
            Image.new("L", (side, side)).save(folder / "0.png", compress_level=1)
            for number in range(1, 4):
                os.link(folder / "0.png", folder / f"{number}.png")
        told = run_forked(load_and_print_peak, small, large, log=tmp_path / "log")
        # bytes a pixel: decoded, as float32 and resized take 10, two at a time 20; malloc keeps nothing above 32 MB
        assert float(told.splitlines()[-1]) / 6000**2 < 16

    def test_headers_of_a_large_set_are_checked_before_training(self, shared_data):
        with pytest.raises(ValueError, match="3 of 30 files cannot be read") as error:
            load_data(self.awkward(shared_data), memory_limit=0)
        assert all(name in str(error.value) for name in self.REFUSED)

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives an error of the disk")
    def test_storage_that_fails_is_no_bad_image(self, cifar_folder, tmp_path):
        folder = tmp_path / "images"
        shutil.copytree(cifar_folder / "test" / "ship", folder)
        config = DataConfig(name="folder", root=str(folder), channels=3, on_bad_image="skip")
        train, heldout = load_data(config, memory_limit=0)
        missing, failing = paths_of(heldout)[3], paths_of(train)[5]
        missing.unlink()
        failing.unlink()
        failing.symlink_to("/proc/self/mem")
        read = heldout.read([2, 3, 4]).checked()
        assert list(read.kept) == [0, 2] and str(missing) in read.errors[0]
        failure = rf"cannot reach the image {failing}: .*Input/output error"
        with pytest.raises(OSError, match=rf"{failure}.* the same command continues"):
            train.read([4, 5, 6]).checked()
        for limit in (0, None):
            with pytest.raises(OSError, match=failure):
                load_data(config, memory_limit=limit)
        for settings in ({"value_range": (0, 255)}, {"channels": 5}):  # by other readers
            with pytest.raises(OSError, match=failure):
                load_data(dataclasses.replace(config, **settings), memory_limit=0)

    def test_damage_in_a_large_set_is_named_when_it_is_read(self, cifar_folder, tmp_path):
        for path in (cifar_folder / "test" / "ship").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = DataConfig(name="folder", root=str(tmp_path), channels=3)
        _, heldout = load_data(config, memory_limit=0)
        broken = paths_of(heldout)[3]
        broken.write_bytes(broken.read_bytes()[:800])
        with pytest.raises(ValueError, match=rf"cannot read the image {broken}: .*data\.on_bad_image skip"):
            list(image_batches(heldout, 8, None, torch.device("cpu")))
        _, heldout = load_data(dataclasses.replace(config, on_bad_image="skip"), memory_limit=0)
        read = heldout.read([2, 3, 4])
        assert list(read.kept) == [0, 2] and str(broken) in read.errors[0]
        (_, indices, images), *_ = image_batches(heldout, 8, None, torch.device("cpu"))
        assert indices == [0, 1, 2, 4, 5, 6, 7] and len(images) == 7

    def test_a_folder_of_which_no_file_can_be_read_is_refused(self, tmp_path):
        for name in "abc":
            (tmp_path / f"{name}.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match="no image is left to train on"):
            load_data(DataConfig(name="folder", root=str(tmp_path), on_bad_image="skip"))

    @pytest.mark.slow
    def test_fingerprint_is_of_the_images_in_their_order(self, cifar_folder, tmp_path):
        folder = tmp_path / "folder"
        for name in ("ship", "frog"):
            shutil.copytree(cifar_folder / "test" / name, folder / name)
        (tmp_path / "moved").symlink_to(folder)
        for limit in (0, None):
            first, moved, fewer = (
                load_data(DataConfig(name="folder", root=str(root), channels=3), memory_limit=limit)[0].fingerprint()
                for root in (folder, tmp_path / "moved", folder / "ship")
            )
            assert first == moved != fewer
        digits = load_data(DataConfig(resolution=8))[0]
        changed = digits.pixels.clone()
        changed[7, 0, 3, 3] ^= 1
        assert ArrayImages(changed).fingerprint() != digits.fingerprint()

    def test_class_named_like_a_part_is_not_taken_for_one(self, cifar_folder, tmp_path):
        for name, source in (("train", "ship"), ("plane", "airplane")):
            (tmp_path / name).symlink_to(cifar_folder / "test" / source)
        with pytest.raises(ValueError, match=r"not clear what to train on in .* got plane, train"):
            load_data(DataConfig(name="folder", root=str(tmp_path), channels=3))

    def test_links_in_a_circle_are_read_once(self, cifar_folder, tmp_path):
        for source in ("ship", "frog"):
            (tmp_path / source).symlink_to(cifar_folder / "test" / source)
        (tmp_path / "circle").symlink_to(tmp_path)
        train, heldout = load_data(DataConfig(name="folder", root=str(tmp_path), channels=3))
        assert len(train) + len(heldout) == 106 + 112

    def test_missing_and_empty_folders_are_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not there"):
            load_data(DataConfig(name="folder", root=str(tmp_path / "missing")))
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(FileNotFoundError, match="no image below"):
            load_data(DataConfig(name="folder", root=str(tmp_path)))

    def test_a_split_that_leaves_nothing_to_train_on_is_refused(self, tmp_path):
        Image.new("L", (16, 16)).save(tmp_path / "only.png")
        with pytest.raises(ValueError, match="no image is left to train on"):
            load_data(DataConfig(name="folder", root=str(tmp_path)))


class TestCrops:
    @pytest.fixture
    def folder(self, tmp_path):
        """Images whose pixels tell their row (red) and column (green), with captions, in two parts and two classes."""
        for part in ("train", "val"):
            for name, height, width in (("a", 40, 60), ("b", 60, 40), ("c", 16, 90), ("d", 10, 12), ("e", 24, 24)):
                path = tmp_path / part / ("tall" if height > width else "wide") / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.zeros((height, width, 3), np.uint8)
                pixels[..., 0], pixels[..., 1] = np.mgrid[:height, :width]
                Image.fromarray(pixels).save(path)
                path.with_suffix(".txt").write_text(name)
        return tmp_path

    def load(self, folder, limit=None, **settings):
        settings = {"resolution": 16, "channels": 3, "crops": 7} | settings
        return load_data(DataConfig(name="folder", root=str(folder), **settings), captions=True, memory_limit=limit)

    def pixels(self, image_set):
        return image_set.read(range(len(image_set))).pixels

    def test_crops_are_parts_of_the_image_at_its_own_resolution(self, folder):
        for part in self.load(folder):
            assert len(part) == 35 and len(set(map(part.name, range(35)))) == 35
            places = {name: [] for name in "abcde"}
            for index, pixels in enumerate(part.pixels):
                assert part.name(index) == f"{paths_of(part)[index]}, crop {index // 5}"
                if (name := paths_of(part)[index].stem) == "d":
                    continue
                top, left = pixels[:2, 0, 0].tolist()
                whole = read_image(paths_of(part)[index], 3)
                assert torch.equal(pixels, whole[:, top : top + 16, left : left + 16])
                places[name].append((top, left))
            assert {top for top, _ in places["c"]} == {0} and all(len(set(places[name])) > 3 for name in "abce")

    def test_crops_of_large_jpegs_have_all_their_pixels(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
        for name in "ab":
            Image.fromarray(noise).save(tmp_path / f"{name}.jpg")
        whole = read_image(tmp_path / "a.jpg", 3).unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        for pixels in self.pixels(self.load(tmp_path)[0]):
            assert (whole == pixels).flatten(1).all(1).sum() == 1

    @pytest.mark.slow
    def test_places_of_crops_are_uniform_and_reach_the_borders(self, folder):
        shutil.rmtree(folder / "val")
        for name in "abd":
            next(folder.rglob(f"{name}.png")).unlink()
            next(folder.rglob(f"{name}.txt")).unlink()
        train, heldout = self.load(folder, crops=3000)
        part = train if paths_of(train)[0].stem == "e" else heldout
        for channel in (0, 1):
            counts = torch.bincount(part.pixels[:, channel, 0, 0].long(), minlength=9)
            assert len(counts) == 9 and (counts - 3000 / 9).abs().max() < 90  # five times the deviation

    def test_small_images_are_scaled_to_cover(self, folder):
        part, _ = self.load(folder)
        whole = next(path for path in paths_of(part) if path.stem == "d")
        starts = set()
        for index, pixels in enumerate(part.pixels):
            if paths_of(part)[index] == whole:
                rows, columns = pixels[0, :, 8].tolist(), pixels[1, 8].tolist()
                assert (rows[0], rows[-1]) == (0, 9) and rows == sorted(rows)
                assert columns[-1] - columns[0] in (8, 9, 10) and columns == sorted(columns)
                starts.add(columns[0])
        assert starts <= {0, 1, 2} and len(starts) > 1

    def test_read_on_demand_equal_those_in_memory(self, folder):
        for memory, disk in zip(self.load(folder), self.load(folder, limit=0), strict=True):
            assert isinstance(memory, ArrayImages) and isinstance(disk, StoredImages)
            assert torch.equal(memory.pixels, self.pixels(disk))
            assert torch.equal(memory.labels, disk.labels) and memory.captions == disk.captions
            assert paths_of(memory) == paths_of(disk) and (memory.records.crops == disk.records.crops).all()
            for index, path in enumerate(paths_of(disk)):
                assert disk.captions[index] == (path.stem,)
                assert disk.classes[disk.labels[index]] == path.parent.name

    def test_first_part_is_a_fair_sample(self, folder):
        for limit in (0, None):
            for part in self.load(folder, limit):
                names = [path.stem for path in paths_of(part)]
                assert all(sorted(names[start : start + 5]) == list("abcde") for start in range(0, 35, 5))
                first = part.first(12)
                assert len(first) == 12 and torch.equal(self.pixels(first), self.pixels(part)[:12])
                assert first.name(11) == part.name(11) and first.captions == part.captions[:12]

    def test_a_crop_depends_on_its_file_and_number_alone(self, folder):
        """A crop is of its file and its number alone: not of how many there are, nor of the other files."""

        def by_name(part):
            numbered = zip(paths_of(part), part.records.crops, part.pixels, strict=True)
            return {(path.stem, crop): pixels for path, crop, pixels in numbered}

        before = by_name(self.load(folder)[0])
        for name in "bd":
            for path in folder.rglob(f"{name}.*"):
                path.unlink()
        after = by_name(self.load(folder, crops=3)[0])
        assert len(after) == 9 and all(torch.equal(before[place], pixels) for place, pixels in after.items())

    def test_both_parts_together(self, folder):
        for path in (folder / "val").rglob("a.*"):
            path.unlink()
        train, heldout = self.load(folder)
        config = DataConfig(name="folder", root=str(folder), resolution=16, channels=3, crops=7)
        for limit in (0, None):
            both, _ = load_split(config, "all", memory_limit=limit)
            assert torch.equal(self.pixels(both), torch.cat([train.pixels, heldout.pixels]))
            assert [both.name(index) for index in (34, 40)] == [train.name(34), heldout.name(5)]

    def test_a_split_folder_shares_no_file(self, folder):
        train, heldout = self.load(folder / "train", heldout_fraction=0.4)
        assert (len(train), len(heldout)) == (21, 14) and not set(paths_of(train)) & set(paths_of(heldout))

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [0, None])
    def test_fingerprint_is_of_the_crops(self, limit, folder, tmp_path):
        (tmp_path / "moved").symlink_to(folder)
        places = ((folder, 7), (tmp_path / "moved", 7), (folder, 8), (folder, 1), (folder, None))
        first, moved, *others = (self.load(root, limit, crops=crops)[0].fingerprint() for root, crops in places)
        assert first == moved and len({first, *others}) == 4

    @pytest.mark.slow
    def test_bad_files_are_left_out_with_all_their_crops(self, folder):
        good, _ = self.load(folder)
        broken = next((folder / "train").rglob("b.png"))
        for damage, limit in ((b"no image", 0), (b"no image", None), (broken.read_bytes()[:70], None)):
            broken.write_bytes(damage)
            train, _ = self.load(folder, limit, on_bad_image="skip")
            kept = [index for index, path in enumerate(paths_of(good)) if path != broken]
            assert torch.equal(self.pixels(train), good.pixels[kept]) and len(train.errors) == 1
            assert [train.name(index) for index in range(28)] == [good.name(index) for index in kept]
        disk, _ = self.load(folder, 0, on_bad_image="skip")  # damage that only decoding shows
        read = disk.read(range(35))
        assert list(read.kept) == kept and len(read.errors) == 1 and torch.equal(read.pixels, good.pixels[kept])

    def test_crops_are_named_in_the_protocol(self, folder):
        words = DataConfig(name="folder", root=str(folder), crops=7).resize
        assert words.startswith("cut out at 7 places of each") and "bicubic" in words

    def test_strips_are_not_enlarged_whole(self, tmp_path, little_memory):
        """That would take 60,000 x 64 x 64 pixels."""
        for name in "ab":
            Image.new("L", (60_000, 1)).save(tmp_path / f"{name}.png")
        assert self.load(tmp_path, crops=3, resolution=64, channels=1)[0].pixels.shape == (3, 1, 64, 64)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"crops": 0}, r"data\.crops must be at least 1, random or null, got 0"),
            ({"crops": 2, "name": "mnist"}, r"data\.crops 2 would be ignored with data\.name mnist"),
            ({"crops": 2, "fit": "pad"}, r"data\.fit pad would be ignored with data\.crops 2"),
        ],
    )
    def test_wrong_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"name": "folder"} | settings)


class TestClassesAndCaptions:
    @pytest.fixture
    def folder(self, tmp_path):
        """train/ and test/ with two classes, of which test/ lacks one; images in folders and files of other kinds."""
        for place in ("train/cat/1", "train/cat/2", "train/dog/1", "test/dog/1"):
            path = tmp_path / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), len(list(tmp_path.rglob("*.png")))).save(path)
        (tmp_path / "train" / "notes.txt").write_text("no image is named so")
        (tmp_path / "train" / "clip.mp4").write_bytes(b"")
        return tmp_path

    def load(self, root, captions=True, **settings):
        return load_data(DataConfig(name="folder", root=str(root), resolution=8), captions=captions, **settings)

    def described(self, image_set):
        """Captions by file."""
        return {path.stem + path.parent.name: own for path, own in zip(paths_of(image_set), image_set.captions)}  # noqa: B905

    @pytest.mark.parametrize("limit", [0, None])
    def test_classes_are_the_same_in_all_parts(self, folder, limit):
        train, test = self.load(folder, False, memory_limit=limit)
        assert train.classes == test.classes == ("cat", "dog") and test.labels.tolist() == [1]
        assert [train.classes[label] for label in train.labels] == [path.parent.name for path in paths_of(train)]
        assert train.captions is test.captions is None
        together, _ = load_split(DataConfig(name="folder", root=str(folder), resolution=8), "all")
        assert together.classes == train.classes and sorted(together.labels.tolist()) == [0, 0, 1, 1]

    @pytest.mark.slow
    def test_classes_of_named_sets(self, shared_data):
        assert load_data(DataConfig())[0].classes[4] == "four"
        fashion = load_data(DataConfig(name="fashion-mnist", root=str(shared_data / "fashion-mnist-10k")))[1]
        assert fashion.classes[fashion.labels[0]] == "ankle boot" and len(fashion.classes) == 10

    def test_captions_are_read_from_text_files(self, folder):
        texts = {"train/cat/1": "a cat\n\n a grey cat \r\n", "train/cat/2": "\ufeffchat étendu", "train/dog/1": "a dog"}
        for place, text in (texts | {"test/dog/1": "another"}).items():
            (folder / f"{place}.txt").write_text(text, encoding="utf-8", newline="")
        assert self.load(folder, False)[0].captions is None
        for limit in (0, None):
            train, test = self.load(folder, memory_limit=limit)
            assert self.described(train) == {
                "1cat": ("a cat", "a grey cat"),
                "2cat": ("chat étendu",),
                "1dog": ("a dog",),
            }
            assert self.described(test) == {"1dog": ("another",)}
        together, _ = load_split(DataConfig(name="folder", root=str(folder), resolution=8), "all", captions=True)
        assert together.captions == train.captions + test.captions

    METADATA = (
        '{"file_name": "train/cat/1.png", "text": "a cat"}\n\n{"file_name": "./train/cat/2.png", "text": ["b", " c"]}\n'
        '{"file_name": "train/clip.mp4", "text": "no image"}\n'
    )

    def test_metadata_in_the_root_and_below(self, folder):
        (folder / "metadata.jsonl").write_text(self.METADATA)
        (folder / "train" / "dog" / "metadata.jsonl").write_text('{"file_name": "1.png", "caption": "d", "id": 3}')
        (folder / "test" / "metadata.jsonl").write_text('{"file_name": "dog/1.png", "text": "e"}\n')
        train, test = self.load(folder)
        assert self.described(train) == {"1cat": ("a cat",), "2cat": ("b", "c"), "1dog": ("d",)}
        assert self.described(test) == {"1dog": ("e",)}

    def test_metadata_without_captions_is_none(self, folder):
        (folder / "metadata.jsonl").write_text('{"file_name": "train/cat/1.png", "label": 3}\n')
        assert self.load(folder)[0].captions is None

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"file_name": "test/dog/1.png", "text": "x"', r"metadata\.jsonl, line 5: invalid JSON: .* at column 44"),
            ('["test/dog/1.png"]', r"line 5: it must be an object with a file_name, got \[\"test/dog"),
            ('{"text": "x"}', "line 5: it must be an object with a file_name"),
            ('{"file_name": "test/dog/2.png", "text": "x"}', "line 5: there is no file test/dog/2.png"),
            ('{"file_name": "test/dog/1.png", "text": " "}', "line 5: text of test/dog/1.png is empty"),
            ('{"file_name": "test/dog/1.png", "caption": []}', "line 5: caption of test/dog/1.png is empty"),
            ('{"file_name": "test/dog/1.png", "text": 3}', "must be a string or a list of strings, got 3"),
            ('{"file_name": "train/cat/1.png", "text": "a"}', "already has a row, .*line 1; put several captions into"),
            ('{"file_name": "test/dog/1.png", "text": "\udcff"}', r"metadata\.jsonl, line 5 is not UTF-8"),
            ("", r"train/dog/1\.png has no caption, and others have one\n.*test/dog/1\.png has no caption"),
        ],
    )
    def test_wrong_metadata_is_refused(self, line, message, folder):
        content = (self.METADATA + line).encode(errors="surrogateescape")
        (folder / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"captions in {folder} are not valid:\n(.|\n)*{message}"):
            self.load(folder)
        assert self.load(folder, False)[0].captions is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b" \n", r"1\.txt holds no caption"),
            (b"a\nb\xff", r"1\.txt, line 2 is not UTF-8"),
            (b"a", "no caption, and others"),
        ],
    )
    def test_wrong_text_files_are_refused(self, text, message, folder):
        (folder / "train" / "cat" / "1.txt").write_bytes(text)
        with pytest.raises(ValueError, match=message):
            self.load(folder)

    def test_an_image_with_both_kinds_of_captions_is_refused(self, folder):
        (folder / "metadata.jsonl").write_text(self.METADATA)
        (folder / "train" / "cat" / "1.txt").write_text("a cat")
        with pytest.raises(ValueError, match=r"1\.png has captions in .*1\.txt and in a metadata\.jsonl"):
            self.load(folder)

    def test_many_problems_are_listed_in_part(self, folder):
        (folder / "metadata.jsonl").write_text("{}\n" * 50)
        with pytest.raises(ValueError, match=r"line 20: (.|\n)*and 30 more$") as error:
            self.load(folder)
        assert "line 21" not in str(error.value)

    def test_captions_stay_with_their_images_when_others_are_left_out(self, folder):
        for path in folder.rglob("*.png"):
            path.with_suffix(".txt").write_text(f"{path.parent.name} {path.stem}")
        (folder / "train" / "cat" / "1.png").write_bytes(b"no image")
        config = DataConfig(name="folder", root=str(folder), resolution=8, on_bad_image="skip")
        for limit in (0, None):
            train, _ = load_data(config, captions=True, memory_limit=limit)
            assert self.described(train) == {"2cat": ("cat 2",), "1dog": ("dog 1",)}
            assert [train.classes[label] for label in train.labels] == [path.parent.name for path in paths_of(train)]


class TestSize:
    """Image files are resized when they are read."""

    def image(self, height, width):
        return torch.arange(height * width).remainder(256).to(torch.uint8).view(1, height, width)

    @pytest.fixture
    def fitted(self, tmp_path):
        """The pixels (1, height, width) of a grey image (1, H, W) in a folder that is read by these settings."""

        def fit(image, **settings):
            for name in ("a", "b"):  # one to train on, the other held out
                Image.fromarray(image[0].numpy()).save(tmp_path / f"{name}.png", compress_level=1)
            config = DataConfig(name="folder", root=str(tmp_path), **settings)
            (train, heldout), (kept, _) = (load_data(config, memory_limit=limit) for limit in (0, None))
            read = all_pixels(train)[0]
            assert torch.equal(all_pixels(heldout)[0], read) and torch.equal(all_pixels(kept)[0], read)
            return read

        return fit

    def test_images_of_the_right_size_are_untouched(self, fitted):
        image = self.image(16, 24)
        assert torch.equal(fitted(image, resolution=(16, 24)), image)

    def test_pad_keeps_the_pixels_and_adds_black(self, fitted):
        image = self.image(28, 28)
        padded = fitted(image, fit="pad")
        assert torch.equal(padded[:, 2:30, 2:30], image)
        padded[:, 2:30, 2:30] = 0
        assert padded.sum() == 0

    @pytest.mark.parametrize("fit", ["crop", "pad"])
    @pytest.mark.parametrize("size", [(1, 1), (2, 1), (30, 750), (100, 40), (500, 321), (9, 400)])
    def test_any_size_comes_out_right(self, size, fit, fitted):
        assert fitted(self.image(*size), resolution=(16, 24), fit=fit).shape == (1, 16, 24)

    @pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (2, 90_000)])
    def test_strips_are_not_enlarged_whole(self, size, fitted, little_memory):
        """That would take 200,000 x 32 x 32 pixels."""
        assert fitted(self.image(*size)).shape == (1, 32, 32)

    def test_crop_keeps_the_aspect_and_the_centre(self, fitted):
        disc = torch.zeros(1, 60, 180, dtype=torch.uint8)
        disc[:, 20:40, 80:100] = 255
        shown = fitted(disc, resolution=30) > 127
        rows, columns = shown[0].any(1).nonzero().flatten(), shown[0].any(0).nonzero().flatten()
        assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (10, 19)

    def test_pad_shrinks_what_is_too_large(self, fitted):
        shrunk = fitted(torch.full((1, 64, 128), 255, dtype=torch.uint8), resolution=32, fit="pad")
        assert (shrunk[:, 8:24] == 255).all() and shrunk[:, :8].sum() == 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"resolution": 4}, "at least 8"),
            ({"name": "imagenet"}, r"data\.name must be digits, .* or null, got imagenet"),
            ({"name": "digits", "channels": 0}, r"data\.channels must be at least 1 or null, got 0"),
            ({"name": "digits", "channels": 4}, r"data\.channels 4 is for files, and the images of digits have 1 or 3"),
            ({"value_range": (0, 16)}, r"data\.value_range \[0, 16\] would be ignored with data\.name digits"),
            (
                {"name": "folder", "value_range": (1, 1)},
                r"data\.value_range must be .* two finite increasing .*\[1, 1\]",
            ),
            (
                {"name": "folder", "value_range": (0, float("inf"))},
                r"data\.value_range must be \[low, high\], two finite",
            ),
            ({"name": "folder", "value_range": (0, 1, 2)}, r"data\.value_range must be \[low, high\], two finite"),
            ({"fit": "Crop"}, r"data\.fit must be crop or pad, got Crop"),
            ({"heldout_fraction": 0.0}, r"data\.heldout_fraction must be in \(0, 1\), got 0"),
            ({"num_workers": -1}, "at least 0"),
            ({"on_bad_image": "ignore"}, r"data\.on_bad_image must be stop or skip, got ignore"),
        ],
    )
    def test_wrong_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**settings)


class TestOrder:
    def indices(self, batches):
        return [index for step in batches for micro in step for index in micro.indices if micro.share]

    @pytest.mark.parametrize("length", [1, 7, 64, 100, 131])
    @pytest.mark.parametrize(("processes", "micro_steps"), [(1, 1), (2, 1), (1, 4), (4, 2)])
    def test_an_epoch_has_every_image_once(self, length, processes, micro_steps):
        ranks = [list(epoch_batches(length, 16, 0, 0, rank, processes, micro_steps)) for rank in range(processes)]
        assert sorted(index for rank in ranks for index in self.indices(rank)) == list(range(length))
        for step in zip(*ranks, strict=True):  # every process takes part in every step, with as many forwards
            assert all(len(micro_batches) == micro_steps for micro_batches in step)
            assert all(micro.indices for micro_batches in step for micro in micro_batches)
            assert sum(micro.share for micro_batches in step for micro in micro_batches) == pytest.approx(1)

    def test_images_of_a_step_do_not_depend_on_processes(self):
        alone = [sorted(self.indices([step])) for step in epoch_batches(100, 16, 3, 5)]
        shared = zip(*(epoch_batches(100, 16, 3, 5, rank, 2, 2) for rank in range(2)), strict=True)
        assert [sorted(self.indices(steps)) for steps in shared] == alone

    @pytest.mark.parametrize(("length", "start"), [(100, 0), (100, 48), (101, 96), (100, 50)])
    def test_order_goes_on_where_it_was(self, length, start):
        whole = self.indices(epoch_batches(length, 16, 3, 1))
        rest = epoch_batches(length, 16, 3, 1, start=start)
        assert self.indices(rest) == whole[start:]

    @pytest.mark.parametrize(("processes", "micro_steps"), [(1, 1), (2, 1), (1, 4), (4, 2)])
    def test_noise_of_an_image_does_not_depend_on_how_a_batch_is_cut(self, processes, micro_steps):
        def noise_of_images(processes, micro_steps):
            found = {}
            for rank in range(processes):
                for step, micro_batches in enumerate(epoch_batches(37, 16, 3, 5, rank, processes, micro_steps)):
                    generator = step_generator(3, 5, 16 * step, torch.device("cpu"))
                    noise = torch.randn(micro_batches[0].count, 2, 3, generator=generator)
                    for micro in micro_batches:
                        for place, index in enumerate(micro.indices if micro.share else []):
                            found[index] = noise[micro.first + place]
            return found

        alone, cut = noise_of_images(1, 1), noise_of_images(processes, micro_steps)
        assert alone.keys() == cut.keys() == set(range(37))
        assert all(torch.equal(alone[index], cut[index]) for index in alone)
        assert len(torch.stack(list(alone.values())).unique(dim=0)) == 37

    def test_noise_is_standard_normal_and_of_seed_epoch_and_place(self):
        def draw(*place):
            return torch.randn(1000, 4, 8, 8, generator=step_generator(*place, torch.device("cpu")))

        assert torch.equal(draw(0, 1, 32), draw(0, 1, 32))
        noise = [draw(*place) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
        correlations = torch.corrcoef(torch.stack(noise).flatten(1)).abs()
        assert (correlations - torch.eye(4)).max() < 0.01
        assert noise[0].mean().abs() < 0.01 and (noise[0].std() - 1).abs() < 0.01

    def test_order_is_a_pure_function_of_seed_and_epoch(self):
        def order(seed, epoch):
            return self.indices(epoch_batches(50, 8, seed, epoch))

        assert order(1, 2) == order(1, 2)
        assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9

    def test_image_batches_are_in_order_and_in_model_range(self):
        images, _ = load_data(DataConfig(resolution=8))
        batches = list(image_batches(images, 40, 100, torch.device("cpu")))
        assert [indices[0] for _, indices, _ in batches] == [0, 40, 80] and len(batches[-1][2]) == 20
        shares = [image_batches(images, 40, 100, torch.device("cpu"), rank, 2) for rank in range(2)]
        assert [[indices[0] for _, indices, _ in share] for share in shares] == [[0, 80], [40]]
        joined = torch.cat([batch for _, _, batch in batches])
        assert joined.min() == -1 and joined.max() == 1
        assert torch.equal(((joined + 1) * 127.5).round().to(torch.uint8), images.pixels[:100])

    def test_batches_are_read_ahead_in_order_and_no_further(self):
        """Each once, by whatever thread is first; an error comes where its batch would."""

        class Slow(ArrayImages):
            def read(self, indices):
                read.append(indices[0])
                if indices[0] == 0:
                    later.wait(10)  # so that others overtake it
                later.set()
                if indices[0] == 12:
                    raise OSError("gone")
                return super().read(indices)

        read, later = [], threading.Event()
        images = Slow(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1))
        found = image_batches(images, 2, None, torch.device("cpu"))
        assert next(found)[1] == [0, 1] and sorted(read)[-1] <= 2 * AHEAD
        seen = []
        with pytest.raises(OSError, match="gone"):
            for _, indices, pixels in found:
                seen += indices
                assert ((pixels.flatten() + 1) * 127.5).round().tolist() == indices
        assert seen == list(range(2, 12)) and len(set(read)) == len(read)

    @pytest.mark.parametrize("processes", [1, 2, 3, 7])
    def test_parts_are_the_same_for_any_number_of_processes(self, processes):
        images, _ = load_data(DataConfig(resolution=8))
        seen = {}
        for rank in range(processes):
            for part, indices, _ in image_batches(images, 5, 901, torch.device("cpu"), rank, processes):
                seen.setdefault((part, rank), []).extend(indices)
        assert len(seen) == PARTS  # no part on two processes
        in_order = [index for place in sorted(seen) for index in seen[place]]
        assert in_order == list(range(901))
        assert {len(indices) for indices in seen.values()} <= {10, 15, 11, 6}


class TestChannels:
    """Of sets that leave them open."""

    @pytest.mark.parametrize(
        ("modes", "channels"),
        [
            (("L", "L"), 1), (("1", "LA"), 1), (("I;16", "L"), 1), (("L", "L", "RGB"), 3), (("RGBA", "L"), 3),
            (("P", "L"), 3), (("CMYK", "L"), 3),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("memory_limit", [0, None])
    def test_are_those_of_the_files(self, modes, channels, memory_limit, tmp_path):
        for place, mode in enumerate((*modes, modes[0])):
            image = Image.fromarray(np.zeros((9, 12), np.uint16)) if mode == "I;16" else Image.new(mode, (12, 9))
            image.save(tmp_path / f"{place}.{'tif' if mode in ('CMYK', 'LA') else 'png'}")
        parts = load_data(DataConfig(root=str(tmp_path), resolution=8), memory_limit=memory_limit)
        assert [part.channels for part in parts] == [channels, channels]
        assert all_pixels(parts[0]).shape[1] == channels

    @pytest.mark.parametrize("memory_limit", [0, 20_000, None])
    def test_are_those_of_the_few_in_colour_among_many_in_grey(self, memory_limit, tmp_path):
        for place in range(320):
            Image.new("L", (8, 8)).save(tmp_path / f"{place}.bmp")
        train, _ = load_data(DataConfig(root=str(tmp_path), resolution=8, channels=1), memory_limit=0)
        last = train.name(len(train) - 1)
        Image.new("RGB", (8, 8), (9, 8, 7)).save(last)
        train, heldout = load_data(DataConfig(root=str(tmp_path), resolution=8), memory_limit=memory_limit)
        assert train.channels == heldout.channels == 3 and all_pixels(train)[-1, :, 0, 0].tolist() == [9, 8, 7]
        assert train.files == f"320 images of {tmp_path.name}, RGB and grey, 8x8; read as 8x8 RGB"

    @pytest.mark.parametrize(("shape", "channels"), [((9, 8, 8), 1), ((9, 8, 8, 3), 3), ((9, 3, 8, 8), 3)])
    @pytest.mark.parametrize("settings", [{}, {"value_range": (0, 255)}])
    def test_are_those_of_arrays(self, shape, channels, settings, tmp_path):
        np.save(tmp_path / "images.npy", np.zeros(shape, np.uint8))
        train, _ = load_data(DataConfig(root=str(tmp_path / "images.npy"), resolution=8, **settings))
        assert train.channels == channels and all_pixels(train).shape[1] == channels

    def test_are_those_of_files_whose_values_are_taken_as_they_are(self, tmp_path):
        for place in range(3):
            Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / f"{place}.png")
        train, _ = load_data(DataConfig(root=str(tmp_path), resolution=8, value_range=(0, 4095)))
        assert train.channels == 1 and all_pixels(train).min() == 1

    def test_are_known_of_named_sets(self):
        assert [DataConfig(name).channels for name in ("digits", "mnist", "cifar10")] == [1, 1, 3]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({}, "RGB and grey, 8x8 to 30x40; read as 8x8 RGB, resized"),
            ({"channels": 1, "fit": "pad"}, "RGB and grey, 8x8 to 30x40; read as 8x8 grey, padded"),
            ({"crops": 5, "channels": 3}, "RGB and grey, 8x8 to 30x40; read as 8x8 RGB, 5 crops of each"),
            ({"crops": "random", "channels": 3}, "8x8 to 30x40; read as 8x8 RGB, one random crop of each"),
        ],
    )
    def test_what_the_files_are_and_what_is_made_of_them_is_said(self, settings, words, tmp_path):
        Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
        for name in "bcd":
            Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
        config = DataConfig(root=str(tmp_path), resolution=8, heldout_fraction=0.25, **settings)
        train, heldout = load_data(config)
        assert train.files == heldout.files and train.files.startswith(f"4 images of {tmp_path.name}, ")
        assert words in train.files
