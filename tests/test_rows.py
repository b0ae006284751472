"""Images in rows, on the Hub and in Parquet, are those of the folder that they were made from."""

import dataclasses
import io
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from safetensors.torch import load_file
from support.files import ByIndex, pixels_of
from support.hub import connect
from support.hub_server import HubServer, User
from support.launches import fork_server, run_forked
from support.runs import TINY_VAE, records, tiny
from torch.utils.data import DataLoader

from diffusers_vae import cli
from diffusers_vae.data import DataConfig, holds_rows, load_data, load_split, look
from diffusers_vae.data.rows import find_columns, find_parts, open_rows, read_labels
from diffusers_vae.evaluation.evaluate import EvaluationConfig
from diffusers_vae.tasks.autoencoder import train

SLOW = pytest.mark.slow
TOKEN = "hf_" + "a" * 34
CLASSES = ["cat", "ship"]
FEATURES = Features({"img": Image(), "label": ClassLabel(names=CLASSES), "text": Value("string")})


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own, and no questions to other servers."""
    connect(monkeypatch, None, tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client in this process talks to."""
    with HubServer({TOKEN: User("ann")}) as server:
        connect(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture
def folder(cifar_folder, tmp_path):
    """Ships and cats to train on and others held out, a caption beside each."""
    root = tmp_path / "images"
    for part, chosen in (("train", slice(15)), ("test", slice(15, 20))):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for path in sorted((cifar_folder / "test" / name).iterdir())[chosen]:
                shutil.copyfile(path, root / part / name / path.name)
                (root / part / name / f"{path.stem}.txt").write_text(f"number {path.stem}")
    return root


def rows_of(folder, suffix=".png"):
    """In the order in which a folder is read."""
    return [
        {
            "img": {"bytes": path.read_bytes(), "path": path.name},
            "label": CLASSES.index(path.parent.name) if path.parent.name in CLASSES else 0,
            "text": f"number {path.stem}",
        }
        for path in sorted(folder.rglob(f"*{suffix}"))
    ]


def tables(folder):
    return {part: Dataset.from_list(rows_of(folder / part), FEATURES) for part in ("train", "test")}


def packed(table):
    content = io.BytesIO()
    table.to_parquet(content)
    return content.getvalue()


def placed(kind, folder, target, hub=None):
    """Where the rows of the folder lie, after they were written there as `kind`."""
    parts = tables(folder)
    if kind == "hub":
        hub.put("datasets/ann/pets", {f"data/{p}-00000-of-00001.parquet": packed(t) for p, t in parts.items()})
        return "ann/pets"
    if kind == "saved":
        DatasetDict(parts).save_to_disk(target)
    if kind == "parquet":
        (target / "data").mkdir(parents=True)
        for name, rows in {"train-0": range(20), "train-1": range(20, 30)}.items():
            parts["train"].select(rows).to_parquet(target / "data" / f"{name}.parquet")
        parts["test"].to_parquet(target / "data" / "test.parquet")
    if kind == "webdataset":
        target.mkdir()
        for part in parts:
            with tarfile.open(target / f"{part}.tar", "w") as archive:
                for path in sorted((folder / part).rglob("*.png")):
                    archive.add(path, path.name)
    return str(target)


def config(root, **settings):
    return DataConfig(
        **{"name": "datasets", "root": str(root), "channels": 3, "resolution": 16, "num_workers": 0} | settings
    )


def by_file(images):
    """Pixels, class and captions of each image, by the name of its file."""
    read = images.read(range(len(images)))
    assert list(read.kept) == list(range(len(images)))
    names = [re.findall(r"[\w-]+\.\w+", images.name(index))[-1] for index in range(len(images))]
    labels = [None] * len(images) if images.labels is None else [images.classes[label] for label in images.labels]
    captions = [None] * len(images) if images.captions is None else images.captions
    found = {n: (bytes(p.numpy()), c, t) for n, p, c, t in zip(names, read.pixels, labels, captions, strict=True)}
    assert len(found) == len(images)
    return found


class TestTheSameAsAFolder:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [pytest.param("hub", marks=SLOW), "parquet", pytest.param("saved", marks=SLOW)])
    @pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])
    def test_images_labels_and_captions(self, kind, limit, folder, tmp_path, hub):
        found = load_data(config(placed(kind, folder, tmp_path / "rows", hub)), memory_limit=limit, captions=True)
        expected = load_data(config(folder, name="folder"), captions=True)
        for own, other in zip(found, expected, strict=True):
            assert by_file(own) == by_file(other) and own.classes == other.classes == tuple(CLASSES)
            assert torch.equal(own.read([3]).pixels, other.read([3]).pixels)  # in the same order
        again = load_data(config(placed("parquet", folder, tmp_path / "copy")), memory_limit=limit)
        assert [part.fingerprint() for part in again] == [part.fingerprint() for part in found]

    @pytest.mark.slow
    def test_webdataset_and_imagefolder(self, folder, tmp_path):
        expected, _ = load_data(config(folder, name="folder"))
        shards = config(placed("webdataset", folder, tmp_path / "rows"))
        train, heldout = load_data(shards)
        pixels = {name: found[0] for name, found in by_file(expected).items()}
        assert len(heldout) == 10 and train.labels is None and "png" in open_names(shards)
        assert sorted(found[0] for found in images_of(train)) == sorted(pixels.values())
        for caption in folder.rglob("*.txt"):  # of which it would read nothing else
            caption.unlink()
        train, _ = load_data(config(folder), memory_limit=0)  # whose images stay where they are
        assert {name: found[0] for name, found in by_file(train).items()} == pixels
        assert train.classes == tuple(CLASSES) and train.store.size(0) == len(train.store.content(0))

    @pytest.mark.parametrize("kind", ["bytes", "large bytes", "struct"])
    def test_bytes_without_the_type(self, kind, folder, tmp_path):
        content = Value("large_binary" if kind == "large bytes" else "binary")
        struct = kind == "struct"
        features = Features({"img": {"path": Value("string"), "bytes": content} if struct else content})
        rows = [{"img": row["img"] if struct else row["img"]["bytes"]} for row in rows_of(folder / "train")]
        Dataset.from_list(rows, features).to_parquet(tmp_path / "a.parquet")
        both, split = load_split(config(tmp_path / "a.parquet", image_column="img"))
        expected, _ = load_data(config(folder, name="folder"))
        assert split == "all" and sorted(f[0] for f in images_of(both)) == sorted(f[0] for f in images_of(expected))
        with pytest.raises(
            ValueError, match=r"data\.image_column must say .* none is of type Image\. The columns of .* are img"
        ):
            load_data(config(tmp_path / "a.parquet"))

    @pytest.mark.slow
    def test_photographs(self, shared_data, tmp_path):
        (tmp_path / "photographs").mkdir()
        with tarfile.open(shared_data / "bsds500-val.tar") as archive:
            files = [member for member in archive.getmembers() if member.name.endswith(".jpg")][:8]
            for file in files:
                (tmp_path / "photographs" / os.path.basename(file.name)).write_bytes(archive.extractfile(file).read())
        Dataset.from_list(rows_of(tmp_path / "photographs", ".jpg"), FEATURES).to_parquet(tmp_path / "a.parquet")
        for settings in ({"resolution": (32, 48)}, {"resolution": 40, "fit": "pad", "channels": 1}):
            found = load_split(config(tmp_path / "a.parquet", **settings), "all")[0]
            expected = load_split(config(tmp_path / "photographs", name="folder", **settings), "all")[0]
            assert {n: f[0] for n, f in by_file(found).items()} == {n: f[0] for n, f in by_file(expected).items()}
        crops = load_data(config(tmp_path / "a.parquet", crops=3))[0]
        assert len(crops) == 21 and len({found[0] for found in images_of(crops)}) == 21

    @pytest.mark.slow
    def test_digits(self, mnist_root, tmp_path):
        mnist, _ = load_data(config(mnist_root, name="mnist", channels=1))
        raw = (mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
        features = Features({"image": Image(), "digit": Value("int64")})
        pixels = np.frombuffer(raw[: 100 * 784], np.uint8).reshape(100, 28, 28)
        rows = {"image": list(pixels), "digit": mnist.labels[:100].tolist()}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
        train, heldout = load_data(config(tmp_path / "a.parquet", channels=1, label_column="digit"))
        assert (len(train), len(heldout)) == (90, 10) and train.classes == tuple("0123456789")
        for part in (train, heldout):
            assert torch.equal(part.pixels, mnist.pixels[part.records.rows])
            assert torch.equal(part.labels, mnist.labels[part.records.rows])
        assert load_data(config(tmp_path / "a.parquet"))[0].labels is None

    def test_awkward_files_and_damage(self, shared_data, tmp_path):
        names = ["orientation_rectangle.jpg", "16bit.cropped.tif", "transparent.png", "hopper.Lab.tif", "rgb.jpg"]
        (tmp_path / "images").mkdir()
        for name in names:
            shutil.copyfile(shared_data / "awkward" / name, tmp_path / "images" / name)
        rows = [{"img": {"bytes": (tmp_path / "images" / name).read_bytes(), "path": name}} for name in names]
        rows.append(
            {"img": {"bytes": (shared_data / "awkward" / "truncated_jpeg.jpg").read_bytes(), "path": "bad.jpg"}}
        )
        rows += [{"img": None}, {"img": {"bytes": None, "path": str(tmp_path / "gone.png")}}]
        pq.write_table(Dataset.from_list(rows, Features({"img": Image()})).data.table, tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"3 of 8 files cannot be read") as error:
            load_data(config(tmp_path / "a.parquet"))
        for words in ("a.parquet, train, row 5 (bad.jpg): ", "train, row 6: there is none in the row", "No such file"):
            assert words in str(error.value)
        skipping = config(tmp_path / "a.parquet", on_bad_image="skip", heldout_fraction=0.4)
        both = load_split(skipping, "all")[0]
        assert len(both.errors) == 3
        expected = by_file(load_split(config(tmp_path / "images", name="folder"), "all")[0])
        assert by_file(both) == expected
        found = look(config(tmp_path / "a.parquet", heldout_fraction=0.4), 10)
        assert len(found.unreadable) == 3 and found.files.formats["TIFF"] == 2


def images_of(images):
    return [(bytes(pixels.numpy()),) for pixels in images.read(range(len(images))).pixels]


def open_names(settings):
    return [name for name, kind in open_rows(settings)["train"].features.items() if isinstance(kind, Image)]


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=SLOW)], ids=["fork", "fresh"])
    def test_workers_read_what_one_process_reads(self, fresh, folder, tmp_path):
        images, _ = load_data(config(placed("parquet", folder, tmp_path / "rows")), memory_limit=0)
        expected = images.read(range(len(images))).pixels
        context = fork_server() if fresh else None
        loader = DataLoader(ByIndex(images), 4, num_workers=2, collate_fn=pixels_of, multiprocessing_context=context)
        assert torch.equal(torch.cat(list(loader)), expected)
        content = pickle.dumps(images)
        assert torch.equal(pickle.loads(content).read([3]).pixels[0], expected[3])
        assert len(content) < 20_000 and images.store.content(0) not in content  # where they lie, not they


class TestColumns:
    """Types of columns, and which of them is meant, without a file."""

    TWO = Features({"a": Image(), "b": Image(), "text": Value("string"), "caption": List(Value("string"))})

    @pytest.mark.parametrize(
        ("features", "settings", "message"),
        [
            (TWO, {}, r"say which column has the images, since a and b could\. The columns of .* are a \("),
            (
                FEATURES,
                {"image_column": "x"},
                r"must be a column with the images, got x, which does not exist",
            ),
            (
                FEATURES,
                {"image_column": "text"},
                r"got text with string\. The columns of .* are img \(Image\), label \(ClassLabel",
            ),
            (FEATURES, {"label_column": "img"}, r"must be .* whole numbers or words, got img with Image"),
            (FEATURES, {"caption_column": "label"}, r"must be .*, got label with ClassLabel of 2"),
            (
                TWO,
                {"image_column": "a"},
                r"must say which .*, since text and caption could.*list of string",
            ),
            (Features({"a": {"path": Value("string")}}), {"image_column": "a"}, r"got a with \{path: string\}"),
        ],
    )
    def test_what_is_not_clear_is_told_with_all_of_them(self, features, settings, message):
        with pytest.raises(ValueError, match=r"data\.\w+_column .*" + message):
            find_columns(features, config("a", **settings), True)

    def test_found(self):
        found = find_columns(FEATURES, config("a"), True)
        assert (found.image, found.label, found.caption) == ("img", "label", "text")
        assert find_columns(FEATURES, config("a"), False).caption is None
        named = find_columns(
            self.TWO, config("a", image_column="b", label_column="text", caption_column="caption"), False
        )
        assert (named.image, named.label, named.caption) == ("b", "text", "caption")

    @pytest.mark.parametrize(
        ("names", "parts"),
        [
            (["all"], ("all",)),
            (["train", "test"], ("train", "test")),
            (["test", "extra", "train", "validation"], ("train", "validation")),
            (["train", "unlabeled"], None),
            (["validation", "test"], None),
        ],
    )
    def test_parts(self, names, parts):
        if parts:
            assert find_parts(names, "a") == parts
        else:
            with pytest.raises(ValueError, match=f"not clear what to train on in a: .* got {', '.join(names)}"):
                find_parts(names, "a")

    @pytest.mark.parametrize("kind", ["ClassLabel", "int64", "string"])
    def test_labels_that_are_missing(self, kind):
        feature = ClassLabel(names=["a", "b", "c"]) if kind == "ClassLabel" else Value(kind)
        values = ["c", "a", "c"] if kind == "string" else [2, 0, 2]

        def table(values):
            return Dataset.from_dict({"label": values}, Features({"label": feature}))

        labels, classes = read_labels("a", {"train": table(values), "test": table([None, None])}, "label")
        all_of_them = kind == "ClassLabel"
        assert labels.tolist() == ([2, 0, 2, -1, -1] if all_of_them else [1, 0, 1, -1, -1])
        assert classes == {"ClassLabel": ("a", "b", "c"), "string": ("a", "c"), "int64": ("0", "2")}[kind]
        with pytest.raises(ValueError, match=r"2 of 4 labels in label of a, train, are missing, first in row 1:"):
            read_labels("a", {"train": table([values[0], None, *values[:1], None])}, "label")
        assert read_labels("a", {"train": table(values[:1])}, "label")[0] is None or all_of_them

    def test_captions_that_are_missing(self, folder, tmp_path):
        rows = rows_of(folder / "train")
        rows[3]["text"], rows[7]["text"] = None, " "
        Dataset.from_list(rows, FEATURES).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(
            ValueError,
            match=r"a\.parquet must have a caption in text that is not empty; not so in\ntrain, row 3\ntrain, row 7",
        ):
            load_data(config(tmp_path / "a.parquet"), captions=True)
        assert load_data(config(tmp_path / "a.parquet"))[0].captions is None

    @pytest.mark.parametrize("name", ["subset", "revision", "image_column", "label_column", "caption_column"])
    def test_settings_of_other_sets(self, name):
        with pytest.raises(
            ValueError, match=rf"data\.{name} x would be ignored with data\.name folder: .* to datasets"
        ):
            DataConfig(name="folder", **{name: "x"})


class TestRefused:
    """In one line that says what to do."""

    @pytest.mark.parametrize(
        ("root", "settings", "message"),
        [
            (
                "ann/none",
                {},
                r"must be a folder here, or exist on the Hub and be visible .*`hf auth login`, or set HF_TOKEN",
            ),
            (
                "ann/private",
                {},
                r"be visible to you .*/datasets/ann/private; if it is private, log in with `hf auth login`",
            ),
            ("ann/gated", {}, r"it is gated\. Ask for access on http.*/ann/gated, and log in with `hf auth login`"),
            pytest.param(
                "ann/two", {}, r"data\.subset must name one of its configurations, got None .*\['a', 'b'\]", marks=SLOW
            ),
            ("ann/two", {"subset": "c"}, r"data\.subset must name one of .*, got c .*Available: \['a', 'b'\]"),
            pytest.param(
                "ann/two",
                {"revision": "v9"},
                r"data\.revision must be a branch, a tag or a commit of it, got v9",
                marks=SLOW,
            ),
            pytest.param("ann/broken", {}, r"cannot load the data set ann/broken: .*not a parquet file", marks=SLOW),
            pytest.param(
                "ann/empty", {}, r"cannot load the data set ann/empty: .*doesn't contain any data files", marks=SLOW
            ),
        ],
    )
    def test_wrong_sets_of_the_hub_are_named(self, root, settings, message, folder, hub):
        content = packed(tables(folder)["test"])
        card = "\n".join(
            ["---", "configs:", *(f"- config_name: {n}\n  data_files: {n}.parquet" for n in "ab"), "---", ""]
        )
        hub.put("datasets/ann/two", {"README.md": card.encode(), "a.parquet": content, "b.parquet": content})
        hub.put("datasets/ann/private", {"a.parquet": content}, private=True)
        hub.put("datasets/ann/gated", {"a.parquet": content}, gated=True)
        hub.put("datasets/ann/broken", {"a.parquet": content[:-500]})
        hub.put("datasets/ann/empty", {"README.md": b"---\nlicense: mit\n---\n"})
        with pytest.raises((OSError, ValueError), match=message) as error:
            load_data(config(root, **settings))
        assert "\n" not in str(error.value)
        if root == "ann/two":
            assert len(load_split(config(root, subset="b"), "all")[0]) == 10

    @pytest.mark.slow
    def test_with_a_token_it_is_loaded(self, folder, hub, monkeypatch):
        hub.put("datasets/ann/private", {"a.parquet": packed(tables(folder)["test"])}, private=True, gated=True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert len(load_split(config("ann/private"), "all")[0]) == 10

    @pytest.mark.slow
    def test_without_a_connection_what_is_in_the_cache(self, folder, tmp_path, hub, monkeypatch):
        root = placed("hub", folder, tmp_path, hub)
        commit = hub.repos["datasets/ann/pets"].at("main").oid
        expected, _ = load_data(config(root))
        for name in ("datasets.config", "huggingface_hub.constants"):  # which would retry for long
            monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)
        for revision in (None, commit):
            assert load_data(config(root, revision=revision))[0].fingerprint() == expected.fingerprint()
        with pytest.raises(
            OSError, match=f"cannot tell without .* whether data.revision v1 of {root} is .* {commit}; if"
        ):
            load_data(config(root, revision="v1"))
        with pytest.raises(
            OSError, match=r"there is no .*/ann/other, .* connection to http.* must hold, or .* in the cache"
        ):
            load_data(config("ann/other"))

    def test_wrong_folders_and_files_are_named(self, folder, tmp_path):
        (tmp_path / "a.csv").write_text("words")
        saved = placed("saved", folder, tmp_path / "saved")
        Dataset.from_list(rows_of(folder / "test"), FEATURES).to_parquet(tmp_path / "a.parquet")
        for root, settings, message in [
            (
                "nowhere",
                {},
                "must be a data set on the Hub, NAMESPACE/NAME, a folder or a .parquet file, got .*not there",
            ),
            (tmp_path / "a.csv", {}, "which is another file"),
            (tmp_path / "a.parquet", {"subset": "x"}, r"data\.subset must be null for .*a\.parquet, got x"),
            (folder, {"revision": "x"}, r"data\.revision must be null for .*images, got x"),
            (saved, {"revision": "x"}, r"data\.revision must be null for .*saved, got x"),
            (tmp_path / "cut", {}, r"cannot load the data set .*cut: .*parquet"),
        ]:
            (tmp_path / "cut").mkdir(exist_ok=True)
            (tmp_path / "cut" / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-200])
            with pytest.raises((OSError, ValueError), match=message):
                load_data(config(root, **settings))


class TestCommands:
    def test_where_rows_are(self, folder, tmp_path):
        for kind, held in (("parquet", True), ("saved", True), ("webdataset", False)):
            assert holds_rows(placed(kind, folder, tmp_path / kind)) == held
        (tmp_path / "parquet" / "README.md").write_text("words")
        assert holds_rows(str(tmp_path / "parquet")) and holds_rows(str(tmp_path / "gone.parquet"))
        shutil.copyfile(next(folder.rglob("*.png")), tmp_path / "parquet" / "a.png")
        assert not holds_rows(str(tmp_path / "parquet")) and not holds_rows(str(folder))
        assert holds_rows("ann/pets") and not holds_rows(str(tmp_path / "gone")) and not holds_rows("./pets")

    @pytest.mark.slow
    def test_data(self, folder, tmp_path, hub, capsys):
        shutil.copyfile(*sorted((folder / "train" / "cat").glob("*.png"))[:2])
        root = placed("hub", folder, tmp_path, hub)
        flags = ["--data.channels", "3", "--out", str(tmp_path / "sheet.png")]
        assert cli.main(["data", root, "--data.image_column", "img", *flags]) == 0
        told = capsys.readouterr().out
        assert "30 training, 10 held-out (the set's own parts)" in told and "ann/pets, train, row 1 (" in told
        assert "--data.name datasets --data.root ann/pets" in told and "--data.image_column img" in told
        assert cli.main(["data", root, "--data.image_column", "text", *flags]) == 1
        assert "are img (Image)" in capsys.readouterr().err


def train_from(hub, cache, config, finish):
    """Train on what the Hub at the URL `hub` has, reading on demand."""
    connect(pytest.MonkeyPatch(), hub, cache)
    train(config, memory_limit=0, finish=finish)


@pytest.mark.slow
def test_run_of_two_processes_on_the_hub_is_that_of_the_folder(hub, folder, tmp_path):
    """By two workers each, which read on demand what was downloaded once."""
    root, settings = placed("hub", folder, tmp_path, hub), {"batch_size": 8, "max_images": 50, "log_every": 8}
    revision = hub.repos[f"datasets/{root}"].at("main").oid
    for name, data in {"rows": config(root, revision=revision), "folder": config(folder, name="folder")}.items():
        run = dataclasses.replace(
            tiny(tmp_path / name, TINY_VAE, **settings),
            data=dataclasses.replace(data, num_workers=2),
            evaluation=EvaluationConfig(max_images=4),
        )
        finish = name == "rows"  # with a card
        run_forked(train_from, hub.url, tmp_path / "home", run, finish, log=tmp_path / f"{name}.log", processes=2)
    (last,) = {max((tmp_path / name / "checkpoints").iterdir()).name for name in ("rows", "folder")}
    first, second = (load_file(tmp_path / n / "checkpoints" / last / "ema.safetensors") for n in ("rows", "folder"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    logs = [records(tmp_path / name, "train") for name in ("rows", "folder")]
    assert logs[0] == logs[1] and len(logs[0]) > 5
    assert len([request for request, _ in hub.requests if request.startswith("GET /lfs/")]) == 2  # a file for each part
    card = (tmp_path / "rows" / "README.md").read_text()
    assert f"datasets:\n- {root}\n" in card and f"trained on {root}" in card
