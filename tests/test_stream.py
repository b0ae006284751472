"""Streams of Parquet files: their images, the row groups that are in memory, and what is refused."""

import collections
import dataclasses
import functools
import gc
import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from pyarrow import parquet
from support.batches import epoch_batches
from support.files import ByIndex
from support.runs import ROOT, fit, tiny
from torch.utils.data import DataLoader

from diffusers_vae.data import DataConfig, image_batches, load_data
from diffusers_vae.data.order import MicroBatch, deal
from diffusers_vae.images.files import read_image


def config(root, **settings):
    settings = {"channels": 3, "resolution": 16, "shuffle_buffer": 24, "num_workers": 0} | settings
    return DataConfig(name="datasets", root=str(root), streaming=True, **settings)


def table(files):
    columns = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}
    return Dataset.from_dict(columns, Features({"image": Image()}))


@pytest.fixture(scope="module")
def files(cifar_folder):
    return sorted((cifar_folder / "train" / "ship").iterdir())[:130]


@pytest.fixture(scope="module")
def root(files, tmp_path_factory):
    """Three files with 5 or 4 row groups of 10 images or less, and one of held-out ones."""
    root = tmp_path_factory.mktemp("stream")
    for number, own in enumerate((files[:43], files[43:80], files[80:120])):
        table(own).to_parquet(root / f"train-{number}.parquet", batch_size=10)
    table(files[120:]).to_parquet(root / "test.parquet", batch_size=10)
    return root


@pytest.fixture(autouse=True)
def quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()


def pixels_of(images, indices=None):
    return images.read(range(len(images)) if indices is None else indices).pixels


class TestImages:
    @pytest.mark.slow
    def test_images_are_those_of_the_files(self, root, files):
        train, heldout = load_data(config(root, resolution=32))
        assert (len(train), len(heldout)) == (120, 10)
        for images, own in ((train, files[:120]), (heldout, files[120:])):
            expected = {bytes(read_image(file, 3).numpy()) for file in own}
            assert {bytes(pixels.numpy()) for pixels in pixels_of(images)} == expected and len(expected) == len(own)
        by_name = {f"train-{part}.parquet, row {row}": file for part, row, file in self.places(files)}
        for index in (0, 57, 119):
            name = train.name(index).split(", ", 1)[1]
            assert torch.equal(pixels_of(train, [index])[0], read_image(by_name[name], 3))

    def places(self, files):
        for part, own in enumerate((files[:43], files[43:80], files[80:120])):
            for row, file in enumerate(own):
                yield part, row, file

    def test_without_a_held_out_part_row_groups_are_held_out(self, root, tmp_path):
        (tmp_path / "one.parquet").symlink_to(root / "train-0.parquet")
        train, heldout = load_data(config(tmp_path, heldout_fraction=0.3))
        assert (len(train), len(heldout)) == (30, 13)
        names = [{images.name(index) for index in range(len(images))} for images in (train, heldout)]
        assert not names[0] & names[1] and len(names[0] | names[1]) == 43
        assert sorted(index for batch in train.batches(8, 0, 0, 0) for index in batch) == list(range(30))

    def test_columns_of_bytes_are_read_as_images(self, files, tmp_path):
        own = pyarrow.table({"png": [file.read_bytes() for file in files[:20]], "other": [1] * 20})
        parquet.write_table(own, tmp_path / "a.parquet", row_group_size=7)
        images, _ = load_data(config(tmp_path / "a.parquet", image_column="png"))
        assert len(images) == 18 and pixels_of(images).shape == (18, 3, 16, 16)
        with pytest.raises(
            ValueError, match=r"data\.image_column must say which column has the images.* png \(binary\)"
        ):
            load_data(config(tmp_path / "a.parquet"))

    @pytest.mark.slow
    def test_threads_and_other_processes_read_the_same(self, root):
        train, _ = load_data(config(root))
        expected = pixels_of(train)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda index: pixels_of(train, [index])[0], range(len(train))))
        assert torch.equal(torch.stack(found), expected)
        assert torch.equal(pixels_of(pickle.loads(pickle.dumps(train)), [7, 80]), expected[[7, 80]])
        loader = DataLoader(ByIndex(train), 4, num_workers=2, collate_fn=lambda read: read.pixels)
        assert torch.equal(torch.cat(list(loader)), expected)

    def test_images_are_measured_in_their_own_order(self, root):
        train, _ = load_data(config(root))
        parts = [part for _, _, part in image_batches(train, 8, 50, torch.device("cpu"))]
        assert torch.equal(torch.cat(parts), pixels_of(train, range(50)) / 127.5 - 1)
        assert torch.equal(pixels_of(train.first(30)), pixels_of(train, range(30))) and len(train.first(30)) == 30

    def test_fingerprint_is_of_the_files_wherever_they_lie(self, root, files, tmp_path):
        first = load_data(config(root))[0].fingerprint()
        moved = tmp_path / "moved"
        moved.mkdir()
        for file in root.iterdir():
            (moved / file.name).write_bytes(file.read_bytes())
        train, heldout = load_data(config(moved))
        assert train.fingerprint() == first != heldout.fingerprint()
        table(files[1:44]).to_parquet(moved / "train-0.parquet", batch_size=10)
        assert load_data(config(moved))[0].fingerprint() != first


def pictures(count, side=16, seed=0):
    """PNG files of noise, which does not compress, all of one size."""
    chance = np.random.default_rng(seed)
    for pixels in chance.integers(0, 256, (count, side, side, 3), dtype=np.uint8):
        content = io.BytesIO()
        Picture.fromarray(pixels).save(content, "PNG", compress_level=0)
        yield content.getvalue()


def noise(*of):
    columns = {"image": [{"bytes": content, "path": None} for content in pictures(*of)]}
    return Dataset.from_dict(columns, Features({"image": Image()}))


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """12 row groups of 10 images each, all of one size, in 3 files, and one group that is held out."""
    root = tmp_path_factory.mktemp("equal")
    for number in range(3):
        noise(40, 16, number).to_parquet(root / f"train-{number}.parquet", batch_size=10)
    noise(10, 16, 3).to_parquet(root / "test.parquet", batch_size=10)
    return root


class TestRowGroups:
    """Which are read, and how long they stay in memory: that of Arrow, which is exact."""

    @pytest.fixture
    def kept(self, monkeypatch):
        """Counts the row groups in memory."""
        at_once = functools.partialmethod(parquet.ParquetFile.__init__, pre_buffer=False)  # by no thread that lingers
        monkeypatch.setattr(parquet.ParquetFile, "__init__", at_once)
        one = sum(map(len, pictures(10)))
        gc.collect()
        before = pyarrow.total_allocated_bytes()
        return lambda: round((pyarrow.total_allocated_bytes() - before) / one)

    @pytest.fixture
    def reads(self, monkeypatch):
        """How often each row group was read since: by what `reader` says, and the first image in it."""
        counts, read = collections.Counter(), parquet.ParquetFile.read_row_group

        def counted(file, *arguments, **settings):
            found = read(file, *arguments, **settings)
            counts[counts.reader, found.column(0)[0].as_py()["bytes"]] += 1
            return found

        counts.reader = 0
        monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
        return counts

    @pytest.mark.slow
    def test_each_row_group_is_read_once_an_epoch_and_few_are_kept(self, equal, reads, kept):
        train, _ = load_data(config(equal))
        for reads.reader in range(3):
            most = 0
            for (micro_batch,) in deal(train.batches(8, 0, reads.reader, 0), 0, reads.reader):
                train.read_batch(micro_batch)
                most = max(most, kept())
            assert 2 <= most <= 24 // 10 + 2 and kept() == 0
        assert set(reads.values()) == {1} and len(reads) == 3 * 12

    @pytest.mark.slow
    def test_as_few_row_groups_of_a_large_set_are_kept(self, equal, kept, tmp_path):
        for number in range(30):
            (tmp_path / f"train-{number}.parquet").symlink_to(equal / f"train-{number % 3}.parquet")
        train, most = load_data(config(tmp_path, heldout_fraction=0.1))[0], 0
        for (micro_batch,) in deal(train.batches(8, 0, 0, 0), 0, 0):
            train.read_batch(micro_batch)
            most = max(most, kept())
        assert len(train) == 1080 and 2 <= most <= 24 // 10 + 2

    @pytest.mark.slow
    def test_each_row_group_is_read_by_one_worker(self, root, reads):
        """Except those at the ends of the 4 pieces and of the last batch."""
        train, _ = load_data(config(root))
        train.lanes = 2, 2
        for reads.reader in ((rank, worker) for rank in range(2) for worker in range(2)):
            own = pickle.loads(pickle.dumps(train))  # nothing that another process has in memory
            rank, worker = reads.reader
            for step, (micro_batch,) in enumerate(deal(own.batches(8, 0, 0, 0), 0, 0, rank, 2)):
                if step % 2 == worker:
                    own.read_batch(micro_batch)
        assert len({reader for reader, _ in reads}) == 4 and len({group for _, group in reads}) == 13
        assert 13 <= reads.total() <= 13 + 4

    @pytest.mark.slow
    def test_row_groups_shared_with_another_process_are_let_go(self, equal, kept):
        train, _ = load_data(config(equal))
        for index in [0, *range(25, 120)]:
            train.read([index])
        assert kept() == 0

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="needs the memory of processes without what they share")
    @pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.soak)])
    def test_memory_of_a_run_is_flat(self, times, tmp_path):
        """Over 10 epochs, and over a larger set, whose files are a fifth of the memory, or as much as all of it."""
        sets = []
        for name, files, epochs in (("small", 1, 10), ("large", times, 1)):
            (tmp_path / name).mkdir()
            noise(200, 128).to_parquet(tmp_path / name / "train-0.parquet", batch_size=20)
            for number in range(1, files):
                os.link(tmp_path / name / "train-0.parquet", tmp_path / name / f"train-{number}.parquet")
            sets += [tmp_path / name, str(epochs)]
        program = [sys.executable, ROOT / "tests" / "programs" / "memory.py", tmp_path / "run", *sets]
        settings = ["--every=4", "--channels=3", "--shuffle_buffer=100"]
        done = subprocess.run([*program, *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [[used for seen, used in of_set if seen > 300] for of_set in json.loads(done.stdout.splitlines()[-1])]
        small, large = (np.array(used) for used in found)
        assert len(small) >= 7 and len(large) >= 7
        assert small.max() < 1.05 * small[0] and large.max() < 1.05 * large[0] and large.max() < 1.05 * small.max()


class TestErrors:
    @pytest.mark.slow
    def test_a_damaged_row_is_named(self, files, tmp_path):
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files[:40]]
        images[7]["bytes"] = images[7]["bytes"][:500]
        images[20]["bytes"] = None
        damaged = Dataset.from_dict({"image": images}, Features({"image": Image()}))
        damaged.to_parquet(tmp_path / "a.parquet", batch_size=10)
        train, heldout = load_data(config(tmp_path, on_bad_image="skip"))
        read = [images.read(range(len(images))) for images in (train, heldout)]
        errors = " ".join(error for own in read for error in own.errors)
        assert sum(len(own.kept) for own in read) == 38
        assert "a.parquet, row 7: image file is truncated" in errors and "row 20: there is none in the row" in errors
        train, heldout = load_data(config(tmp_path))
        with pytest.raises(ValueError, match=r"cannot read the image .*a\.parquet, row (7|20)"):
            for own in (train, heldout):
                own.read(range(len(own))).checked()

    def test_files_of_one_name_are_told_apart(self, root, tmp_path):
        """As the Hub has them after its conversion: SPLIT/0000.parquet."""
        for split in ("train", "test"):
            (tmp_path / "default" / split).mkdir(parents=True)
            content = (root / ("test.parquet" if split == "test" else "train-0.parquet")).read_bytes()
            (tmp_path / "default" / split / "0000.parquet").write_bytes(content)
        train, heldout = load_data(config(tmp_path))
        assert (len(train), len(heldout)) == (43, 10)
        names = {images.name(index) for images in (train, heldout) for index in range(len(images))}
        assert len(names) == 53 and any(name.endswith("train/0000.parquet, row 3") for name in names)

    def test_a_damaged_file_is_named(self, root, tmp_path):
        content = (root / "train-0.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(content[:-100])
        with pytest.raises((ValueError, OSError), match=r"a\.parquet"):
            load_data(config(tmp_path))

    def test_files_that_are_gone_are_an_error_not_bad_images(self, root, tmp_path):
        for file in root.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        train, heldout = load_data(config(tmp_path, on_bad_image="skip"))
        for file in tmp_path.iterdir():
            file.unlink()
        with pytest.raises(OSError, match=r"cannot read row group \d of .*parquet: .* the same command continues"):
            train.read([3]).checked()
        with pytest.raises(OSError, match="the same command continues"):
            next(image_batches(heldout, 4, None, torch.device("cpu")))

    def test_other_kinds_of_files_are_refused(self, files, tmp_path):
        for file in files[:3]:
            (tmp_path / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ValueError, match=r"data\.streaming needs Parquet files, got .* of the kind imagefolder"):
            load_data(config(tmp_path))

    def test_columns_of_different_types_are_refused(self, root, files, tmp_path):
        (tmp_path / "train-0.parquet").symlink_to(root / "train-0.parquet")
        own = Dataset.from_dict({"image": [b"x"] * 3}, Features({"image": Value("binary")}))
        own.to_parquet(tmp_path / "train-1.parquet")
        with pytest.raises(ValueError, match="must be of the same type in all files, and is not so in"):
            load_data(config(tmp_path, image_column="image"))

    def test_too_few_images_are_refused(self, files, tmp_path):
        table(files[:1]).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="must have images to train on and others to hold out, got 0 and 1"):
            load_data(config(tmp_path))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"name": "folder"},
                r"data\.streaming true would be ignored with data\.name folder: set data\.name to datasets",
            ),
            ({"crops": 3}, r"with data\.streaming true, data\.crops must be random or null, got 3"),
            (
                {"label_column": "a"},
                r"label_column a would be ignored with data\.streaming true: leave out data\.streaming",
            ),
            ({"shuffle_buffer": 0}, r"data\.shuffle_buffer must be at least 1, got 0"),
        ],
    )
    def test_wrong_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"name": "datasets", "streaming": True} | settings)


@pytest.mark.slow
def test_run_continued_in_another_order_warns(root, tmp_path, caplog):
    run = tiny(tmp_path / "run", batch_size=8, max_images=24, log_every=8, checkpoint_every=8)
    run = dataclasses.replace(run, data=config(root))
    fit(run)
    assert "order of a stream" not in caplog.text
    assert json.loads((tmp_path / "run" / "data.json").read_text())["training"]["lanes"] == [1, 1]
    longer = dataclasses.replace(run.run, max_images=48, allow_config_change=True)
    fit(dataclasses.replace(run, run=longer, data=config(root, shuffle_buffer=99)))
    assert "the order of a stream depends on data.shuffle_buffer, 24 -> 99" in caplog.text


def test_a_stream_has_another_order_than_a_set_that_is_prepared(root):
    train, _ = load_data(config(root))
    batches = [batch.tolist() for batch in train.batches(8, 0, 0, 0)]
    assert batches != [micro.indices for (micro,) in epoch_batches(120, 8, 0, 0)]
    assert torch.equal(train.read_batch(MicroBatch(batches[0], 0, 8, 1.0)).pixels, pixels_of(train, batches[0]))
