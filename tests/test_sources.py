"""What holds of images wherever they come from: each once an epoch, and a killed run goes on as if it was not."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from programs.epochs import BATCH, EPOCHS, PART
from support.files import pack, tarred
from support.hub_server import HubServer, User
from support.runs import weights

ROOT = Path(__file__).parents[1]
TRAIN, HELDOUT = 53, 9
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
    "buckets": {"buckets": 4},
    "crops": {"crops": "random"},
    "augmented": {"horizontal_flip": True, "vertical_flip": True, "color_jitter": (0.3, 0.3, 0.3, 0.1)},
}
DIFFERS = ("crops", "augmented")
"""Those of which an image is another in every epoch."""


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
    return dict.fromkeys(SOURCES, folder) | packed | dict.fromkeys(("parquet", "stream", "hub", "hub_stream"), table)


@pytest.fixture(scope="module")
def runs(roots, tmp_path_factory):
    """By source and way, the steps of each run: the images seen before, and of each process the checksums."""
    folder = tmp_path_factory.mktemp("runs")
    token = "hf_" + "a" * 34
    with HubServer({token: User("ann")}) as hub:
        files = {f"data/{file.name}": file.read_bytes() for file in roots["hub"].iterdir()}
        hub.put("datasets/ann/animals", files)
        places = {name: str(root) for name, root in roots.items()}
        places |= {"hub": "ann/animals", "hub_stream": "ann/animals"}
        settings = {
            name: {"name": "folder", "root": places[name], "channels": 3, "resolution": 16, "images": TRAIN} | own
            for name, own in SOURCES.items()
        }
        (folder / "sources.json").write_text(json.dumps(settings))
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "cache"),
            "HF_TOKEN": token,
            "PYTHONPATH": str(ROOT / "tests"),
        }
        program = [
            sys.executable,
            str(ROOT / "tests" / "programs" / "epochs.py"),
            str(folder),
            str(folder / "sources.json"),
        ]
        ended = subprocess.run(program, env=environment, capture_output=True, text=True)
        assert not ended.returncode, ended.stdout + ended.stderr
    return folder


def steps_of(run: Path) -> dict[int, list[list[str]]]:
    """Of each step, by the images seen before, the checksums of each process."""
    steps: dict[int, list[list[str]]] = {}
    for rank, file in enumerate(sorted(run.glob("seen-*.txt"))):
        for line in file.read_text().splitlines():
            seen, checksum = line.split()
            steps.setdefault(int(seen), [[], []])[rank].append(checksum)
    return steps


def first_time(steps: dict[int, list[list[str]]]) -> dict[int, Counter]:
    """The images of each step, of one that was taken twice the half."""
    return {seen: Counter(checksum for own in ranks for checksum in own) for seen, ranks in sorted(steps.items())}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
class TestEverySource:
    """By two processes with two workers each."""

    def test_every_image_once_an_epoch(self, name, runs):
        steps = first_time(steps_of(runs / name / "whole"))
        epochs = [Counter() for _ in range(EPOCHS)]
        for seen, images in steps.items():
            assert sum(images.values()) <= BATCH
            if seen < EPOCHS * TRAIN:
                epochs[seen // TRAIN] += images
        assert all(sum(epoch.values()) == TRAIN for epoch in epochs)
        if name not in DIFFERS:
            assert all(len(epoch) == TRAIN for epoch in epochs) and epochs[0] == epochs[1]
        assert sum(sum(images.values()) for images in steps.values()) >= EPOCHS * TRAIN + PART

    def test_epochs_have_orders_of_their_own(self, name, runs):
        steps = first_time(steps_of(runs / name / "whole"))
        first, second = ([images for seen, images in steps.items() if seen // TRAIN == epoch] for epoch in (0, 1))
        assert first != second

    def test_killed_and_continued_is_the_same(self, name, runs):
        whole, killed = (steps_of(runs / name / way) for way in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        again = 0
        for seen, ranks in whole.items():
            for own, found in zip(ranks, killed[seen], strict=True):
                assert found in (own, own + own)  # what was done after the last checkpoint is done again
                again += found != own
        assert again
        first, second = (weights(runs / name / way / "run") for way in ("whole", "killed"))
        assert all(torch.equal(first[key], second[key]) for key in first)
        first, second = ((runs / name / way / "run" / "metrics.jsonl").read_text() for way in ("whole", "killed"))
        assert first == second

    def test_order_does_not_depend_on_processes(self, name, runs):
        whole, alone = (first_time(steps_of(runs / name / way)) for way in ("whole", "alone"))
        if "streaming" in SOURCES[name]:  # whose pieces are as many as there were processes
            assert sum(whole.values(), Counter()).keys() == sum(alone.values(), Counter()).keys()
        else:
            assert whole == alone


@pytest.mark.slow
def test_the_same_images_from_everywhere(runs):
    alike = ("folder", "tar", "zip", "shards", "array", "parquet", "hub", "stream", "hub_stream")
    seen = [sum(first_time(steps_of(runs / name / "alone")).values(), Counter()).keys() for name in alike]
    assert all(own == seen[0] for own in seen) and len(seen[0]) == TRAIN
