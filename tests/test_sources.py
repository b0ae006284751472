"""What holds of images wherever they come from: each is read once an epoch, by any number of processes and workers, and
a killed run reads on where it was.
"""

import dataclasses
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from programs.epochs import Steps, checksums, noted, train
from safetensors.torch import load_file
from support.files import pack, tarred
from support.hub import connect
from support.hub_server import HubServer
from support.launches import Launch
from support.runs import TINY_VAE, tiny
from torch.utils.data import DataLoader

from diffusers_vae.data import DataConfig, MicroBatch, Read, TrainingSet, deal, load_data

TRAIN, HELDOUT = 53, 9
BATCH, EPOCHS = 8, 2
TOTAL = EPOCHS * TRAIN + 20
"""Images of a run: two epochs and a part of the third."""
CLASSES = ("cat", "ship")
SOURCES = {
    "folder": {},
    "tar": {},
    "zip": {},
    "shards": {},
    "array": {"name": "array"},
    "parquet": {"name": "datasets"},
    "hub": {"name": "datasets"},
    "stream": {"name": "datasets", "streaming": True, "shuffle_buffer": 16},
    "hub_stream": {"name": "datasets", "streaming": True, "shuffle_buffer": 1000},
    "crops": {"crops": "random"},
    "augmented": {"horizontal_flip": True, "vertical_flip": True, "color_jitter": (0.3, 0.3, 0.3, 0.1)},
}
STREAMS = [name for name in SOURCES if "stream" in name]
CHANGING = ("crops", "augmented")
"""Sources that change each image in every epoch."""


def rows(folder: Path) -> Dataset:
    """A table of the images of a folder of classes."""
    files = sorted(folder.rglob("*.png"))
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [CLASSES.index(file.parent.name) for file in files],
    }
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))}))


@pytest.fixture(scope="module")
def roots(cifar_folder, tmp_path_factory):
    """The same images in every kind of source."""
    root = tmp_path_factory.mktemp("sources")
    folder = root / "folder"
    for part, count, begin in (("train", TRAIN, 0), ("test", HELDOUT, TRAIN)):
        for place in range(begin, begin + count):
            name = CLASSES[place % 2]
            file = sorted((cifar_folder / "train" / name).iterdir())[place]
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            (folder / part / name / file.name).write_bytes(file.read_bytes())
    table = root / "parquet"
    table.mkdir()
    for number in range(2):
        rows(folder / "train").shard(2, number).to_parquet(table / f"train-{number}.parquet", batch_size=5)
    rows(folder / "test").to_parquet(table / "test-0.parquet")
    (root / "array").mkdir()
    for part, shards in (("train", 2), ("test", 1)):
        files = sorted((folder / part).rglob("*.png"))
        for number in range(shards):
            own = files[number::shards]
            np.save(root / "array" / f"{part}-{number}.npy", [np.asarray(PIL.Image.open(file)) for file in own])
            np.save(root / "array" / f"{part}-{number}.labels.npy", [file.parent.name for file in own])
    packed = {kind: pack(kind, folder, root / kind) for kind in ("tar", "zip")} | {"shards": root / "shards"}
    packed["shards"].mkdir()
    for part in ("train", "test"):
        for name in CLASSES:
            (root / "of one class" / part).mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder / part / name, root / "of one class" / part / name / name)
            tarred(root / "of one class" / part / name, packed["shards"] / f"{part}-{name}.tar")
    packed["array"] = root / "array"
    with pytest.MonkeyPatch.context() as patch, HubServer({}) as hub:
        connect(patch, hub.url, root / "cache")
        hub.put("datasets/ann/animals", {f"data/{file.name}": file.read_bytes() for file in table.iterdir()})
        packed |= dict.fromkeys(("parquet", "stream"), table) | dict.fromkeys(("hub", "hub_stream"), "ann/animals")
        yield dict.fromkeys(SOURCES, folder) | packed


def config_of(name: str, roots: dict[str, Path], **settings) -> DataConfig:
    known = {"name": "folder", "root": str(roots[name]), "channels": 3, "resolution": 16, "num_workers": 2}
    return DataConfig(**known | SOURCES[name] | settings)


def steps_from(images_seen: int, train_set: TrainingSet, rank: int, processes: int) -> Iterator[tuple[int, MicroBatch]]:
    """The images seen before each step of a run that begins or continues at `images_seen`, and what one process reads
    for it.
    """
    while images_seen < TOTAL:
        epoch, start = divmod(images_seen, len(train_set))
        for (micro_batch,) in deal(train_set.batches(BATCH, 0, epoch, start), 0, epoch, rank, processes):
            if images_seen < TOTAL:
                yield images_seen, micro_batch
            images_seen += micro_batch.count


@dataclasses.dataclass(frozen=True)
class ByMicroBatch:
    """A training set as `DataLoader` reads one: what the sampler gives goes to `read`."""

    train_set: TrainingSet

    def __getitems__(self, micro_batch: MicroBatch) -> Read:
        return self.train_set.read_batch(micro_batch)


def read_by(
    processes: int, workers: int, config: DataConfig, images_seen: int = 0, lanes: tuple[int, int] | None = None
) -> Steps:
    """What a run reads by this number of processes with this number of workers each, from `images_seen` on; of a
    stream, in the order of a run that was begun with `lanes`.
    """
    train_set, _ = load_data(config, memory_limit=0)
    if config.streaming:
        train_set.lanes = lanes or (processes, max(1, workers))
    steps: Steps = {}
    for rank in range(processes):
        own = pickle.loads(pickle.dumps(train_set))  # nothing that another process has read or opened
        seen, micro_batches = zip(*steps_from(images_seen, own, rank, processes), strict=True)
        found = DataLoader(
            ByMicroBatch(own), batch_sampler=micro_batches, num_workers=workers, collate_fn=checksums,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        for before, micro_batch, sums in zip(seen, micro_batches, found, strict=True):
            assert len(sums) == len(micro_batch.indices)
            steps.setdefault(before, []).append(sums if micro_batch.share else [])
    return steps


def together(steps: Steps) -> dict[int, Counter]:
    """The images of each step over all processes."""
    return {seen: Counter(checksum for own in ranks for checksum in own) for seen, ranks in sorted(steps.items())}


def everything(steps: Steps) -> set[str]:
    return {checksum for images in together(steps).values() for checksum in images}


@pytest.fixture(scope="module")
def whole(roots):
    """What two processes with two workers each read, by source; a stream is cut into as many pieces, as a run does."""
    found: dict[str, Steps] = {}

    def read(name: str) -> Steps:
        if name not in found:
            found[name] = read_by(2, 2, config_of(name, roots))
        return found[name]

    return read


@pytest.fixture(scope="module")
def alone(roots):
    """What one process without workers reads, by source."""
    found: dict[str, Steps] = {}

    def read(name: str) -> Steps:
        if name not in found:
            found[name] = read_by(1, 0, config_of(name, roots))
        return found[name]

    return read


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
class TestEverySource:
    def test_two_processes_read_every_image_once_an_epoch(self, name, whole):
        epochs = [Counter() for _ in range(EPOCHS + 1)]
        for seen, images in together(whole(name)).items():
            assert 0 < images.total() <= BATCH
            epochs[seen // TRAIN] += images
        assert [epoch.total() for epoch in epochs[:EPOCHS]] == [TRAIN] * EPOCHS
        assert epochs[EPOCHS].total() >= TOTAL - EPOCHS * TRAIN
        if name not in CHANGING:
            assert all(len(epoch) == TRAIN for epoch in epochs[:EPOCHS]) and epochs[0] == epochs[1] >= epochs[2]

    def test_epochs_have_orders_of_their_own(self, name, whole):
        first, second = (
            [images for seen, images in together(whole(name)).items() if seen // TRAIN == epoch] for epoch in (0, 1)
        )
        assert first != second

    def test_continued_within_an_epoch_reads_the_same(self, name, roots, whole):
        expected = whole(name)
        middle = min(seen for seen in expected if seen > 1.4 * TRAIN)
        found = read_by(2, 2, config_of(name, roots), middle)
        assert found == {seen: ranks for seen, ranks in expected.items() if seen >= middle}

    def test_images_of_a_step_do_not_depend_on_processes(self, name, roots, whole, alone):
        expected = together(whole(name))
        if name in STREAMS:  # its order depends on the pieces, which a run keeps, whatever the number of processes
            assert together(read_by(1, 0, config_of(name, roots), lanes=(2, 2))) == expected
            assert together(alone(name)) != expected and everything(alone(name)) == everything(whole(name))
        else:
            assert together(alone(name)) == expected


@pytest.mark.slow
def test_every_source_has_the_same_images(alone):
    alike = ("folder", "tar", "zip", "shards", "array", "parquet", "hub", "stream", "hub_stream")
    found = [everything(alone(name)) for name in alike]
    assert all(own == found[0] for own in found) and len(found[0]) == TRAIN


@pytest.fixture(scope="module")
def runs(roots, tmp_path_factory):
    """For a source, the folder of runs of two processes with two workers each, one without interruption and one killed
    within the second epoch and continued, and, unless it is a stream, of a run of one process.
    """
    folder = tmp_path_factory.mktemp("runs")
    ways = [("whole", 2, [None]), ("killed", 2, [TRAIN + 4 * BATCH, None]), ("alone", 1, [None])]

    def run(name: str) -> Path:
        for way, processes, deaths in [] if (folder / name).exists() else ways[: 2 if name in STREAMS else 3]:
            place = folder / name / way
            place.mkdir(parents=True)
            config = tiny(place / "run", TINY_VAE, max_images=TOTAL, batch_size=BATCH, checkpoint_every=3 * BATCH)
            config = dataclasses.replace(config, data=config_of(name, roots))
            for die_at in deaths:
                launch = Launch(partial(train, config, die_at), place / "log", processes)
                assert launch.wait() == [0 if die_at is None else -signal.SIGKILL] * processes, launch.output()
        return folder / name

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "stream"])
class TestTraining:
    def test_steps_have_the_images_that_are_read_without_training(self, name, runs, whole, alone):
        assert noted(runs(name) / "whole") == whole(name)
        if name not in STREAMS:
            assert noted(runs(name) / "alone") == alone(name)

    def test_killed_and_continued_run_is_bit_identical(self, name, runs):
        whole, killed = (noted(runs(name) / way) for way in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        again = 0
        for seen, ranks in whole.items():
            for own, found in zip(ranks, killed[seen], strict=True):
                assert found in (own, own + own)  # what was done after the last checkpoint is done again
                again += found != own
        assert again
        last = max((runs(name) / "whole" / "run" / "checkpoints").iterdir()).name
        assert int(last.removeprefix("images-")) >= TOTAL
        for file in (f"checkpoints/{last}/{kind}.safetensors" for kind in ("model", "ema", "optimizer")):
            first, second = (load_file(runs(name) / way / "run" / file) for way in ("whole", "killed"))
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        first, second = ((runs(name) / way / "run" / "metrics.jsonl").read_text() for way in ("whole", "killed"))
        assert first == second
