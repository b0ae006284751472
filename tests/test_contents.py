"""Images that were edited in place, with the same names and sizes, do not pass for the old ones."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from support.files import pack
from support.models import TINY
from support.runs import TINY_VAE, fit, tiny

from diffusers_vae import VAE, encode_images
from diffusers_vae.data import DataConfig, StoredImages, load_data, store
from diffusers_vae.engine.checkpoint import MANIFEST
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.latents.dataset import LatentDataset, matching_latents
from diffusers_vae.losses.objective import Gaussian, VAEObjective
from diffusers_vae.storage import described, digest_of

COUNT, SIDE = 24, 40


def pictures(root, suffix="bmp"):
    root.mkdir(parents=True)
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{number:02}.{suffix}")
    return root


def edit(path, at=0.5):
    """Change one byte of a file in place."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def arrays(folder, target):
    """All pictures of a folder in one NPY; target gets its suffix."""
    values = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    np.save(target.with_suffix(".npy"), values)
    return target.with_suffix(".npy")


def parquet(folder, target, by_path=False):
    """All pictures of a folder in the rows of a table."""
    files = sorted(folder.iterdir())
    values = [
        {"bytes": None if by_path else path.read_bytes(), "path": str(path) if by_path else path.name} for path in files
    ]
    Dataset.from_dict({"image": values}, Features({"image": ImageFeature()})).to_parquet(target.with_suffix(".parquet"))
    return target.with_suffix(".parquet")


def placed(kind, folder, target):
    """(data.name, data.root) of the pictures of a folder, as a set of that kind."""
    if kind in ("folder", "tar", "zip", "zip, stored"):
        return "folder", pack(kind, folder, target)
    return ("array", arrays(folder, target)) if kind == "npy" else ("datasets", parquet(folder, target))


def loaded(name, root, **settings):
    settings = {"channels": 3, "resolution": 16, "num_workers": 0} | settings
    return load_data(DataConfig(name=name, root=str(root), **settings), memory_limit=0)


def told(sets):
    """What tells the parts of a set from others."""
    return [(part.fingerprint(), part.contents()) for part in sets]


@pytest.mark.parametrize("whole", [2**32, 2**15], ids=["whole", "samples"])
@pytest.mark.parametrize(
    "kind", ["folder", "tar", "zip", "zip, stored", "npy", pytest.param("rows", marks=pytest.mark.slow), "stream"]
)
def test_an_edited_image_is_told_and_a_copy_is_recognised(kind, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WHOLE", whole)
    settings = {"streaming": True, "shuffle_buffer": 4} if kind == "stream" else {}
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = pictures(tmp_path / "a" / "set")
    name, root = placed(kind, folder, tmp_path / "a" / "packed")
    before = told(loaded(name, root, **settings))
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # of another time
    moved = tmp_path / "b" / root.relative_to(tmp_path / "a")
    assert told(loaded(name, moved, **settings)) == before
    for path in folder.iterdir():
        edit(path, 1)  # the last byte, which is a sample too
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a" / "set", tmp_path / "b" / "set")
    name, root = placed(kind, tmp_path / "b" / "set", tmp_path / "b" / "packed")
    for (_, old), (_, new) in zip(before, told(loaded(name, root, **settings)), strict=True):
        assert old != new


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_one_byte_anywhere_counts_up_to_the_limit(kind, tmp_path):
    folder = pictures(tmp_path / "set")
    first = told(loaded("folder", folder))
    assert told(loaded("folder", pack(kind, folder, tmp_path / "packed"))) == first
    for number, at in enumerate((0.02, 0.5, 0.77)):
        edit(folder / f"{number:02}.bmp", at)
        root = folder if kind == "folder" else pack(kind, folder, tmp_path / f"packed-{number}")
        found = told(loaded("folder", root))
        assert [fingerprint for fingerprint, _ in found] == [fingerprint for fingerprint, _ in first]
        assert found != first
        first = found


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_samples_tell_edited_pictures(suffix, tmp_path, monkeypatch):
    """A PNG by its checksums at the end; of a BMP, a strip that is as high as the gap between two samples."""
    monkeypatch.setattr(store, "WHOLE", 2**14)
    root = tmp_path / "set"
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    for number in range(8):
        Image.fromarray(noise).save(root / f"{number}.{suffix}", compress_level=0)
    before = told(loaded("folder", root))
    size = (root / "3.png" if suffix == "png" else root / "3.bmp").stat().st_size
    noise[40:75, 10:20] ^= 1
    for number in range(8):
        Image.fromarray(noise).save(root / f"{number}.{suffix}", compress_level=0)
    assert (root / f"3.{suffix}").stat().st_size == size
    assert all(
        old[0] == new[0] and old[1] != new[1] for old, new in zip(before, told(loaded("folder", root)), strict=True)
    )


@pytest.mark.slow
def test_files_that_rows_name_count(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = pictures(tmp_path / "set")
    table = parquet(folder, folder / "rows", by_path=True)
    before = told(loaded("datasets", table))
    for path in folder.glob("*.bmp"):
        edit(path)
    after = told(loaded("datasets", table))
    assert all(old[0] == new[0] and old[1] != new[1] for old, new in zip(before, after, strict=True))


def test_a_file_that_is_deleted_later_still_counts(tmp_path):
    train, _ = loaded("folder", pictures(tmp_path / "set"))
    before = train.contents()
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    assert train.contents() == before
    assert isinstance(train, StoredImages)


class TestLatents:
    @pytest.fixture
    def vae(self):
        return VAE(**TINY).eval()

    def encode(self, vae, root, folder):
        return encode_images(vae, loaded("folder", root)[0], folder, shard_images=10)

    def test_of_edited_images_are_refused(self, vae, tmp_path):
        root, folder = pictures(tmp_path / "set"), tmp_path / "latents"
        self.encode(vae, root, folder)
        shutil.copytree(root, tmp_path / "copy")
        assert len(matching_latents(vae, loaded("folder", tmp_path / "copy")[0], folder, "images")) == 22
        for path in root.iterdir():
            edit(path)
        with pytest.raises(ValueError, match=r"something else.*\n *data\.contents: \w{64} there, \w{64} here"):
            self.encode(vae, root, folder)
        with pytest.raises(ValueError, match="holds latents of other images"):
            matching_latents(vae, loaded("folder", root)[0], folder, "images")

    @pytest.mark.parametrize("complete", [True, False])
    def test_of_an_earlier_version_are_recognised_and_continued(self, complete, vae, tmp_path):
        """Which recorded no contents."""
        root, folder = pictures(tmp_path / "set"), tmp_path / "latents"
        self.encode(vae, root, folder)
        index = json.loads((folder / "index.json").read_text())
        del index["cache"]["data"]["contents"]
        (folder / "index.json").write_text(json.dumps(index))
        if not complete:
            (folder / "index.json").unlink()
            (folder / "shard-00001.safetensors").unlink()
        kept = (folder / "shard-00000.safetensors").stat().st_mtime_ns
        assert len(self.encode(vae, root, folder)) == 22
        assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == kept
        assert ("contents" in LatentDataset(folder).cache["data"]) != complete
        assert len(matching_latents(vae, loaded("folder", root)[0], folder, "images")) == 22


@pytest.mark.slow
def test_a_run_is_not_continued_on_edited_images(tmp_path):
    """But on a copy, and, of an earlier version, by names and sizes."""
    root = pictures(tmp_path / "set")
    data = DataConfig(name="folder", root=str(root), channels=3, resolution=16, crops="random", num_workers=0)

    def config(output_dir, end, place=root):
        settings = {"max_images": end, "batch_size": 10, "checkpoint_every": 10, "log_every": 10}
        run = tiny(tmp_path / output_dir, TINY_VAE, **settings, allow_config_change=False)
        return dataclasses.replace(run, data=dataclasses.replace(data, root=str(place)))

    fit(config("run", 40))
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert all(len(part["contents"]) == 64 for part in recorded.values())
    shutil.copytree(root, tmp_path / "copy")
    for name in ("old", "copied"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    for path in (tmp_path / "old" / "checkpoints").glob("*/data.json"):
        earlier = json.loads(path.read_text())
        for part in earlier.values():
            del part["contents"]
        path.write_text(json.dumps(earlier))
        manifest = json.loads((path.parent / MANIFEST).read_text())
        manifest["files"][path.name] = described(path)
        manifest["sha256"] = digest_of([manifest["format"], manifest["files"]])
        (path.parent / MANIFEST).write_text(json.dumps(manifest))
    edit(next(root.iterdir()))
    with pytest.raises(FileExistsError, match=r"images -> \d+, others or changed"):
        fit(config("run", 40))
    fit(config("old", 40))
    fit(config("copied", 40, tmp_path / "copy"))


@pytest.mark.slow
def test_reports_tell_edited_images(tmp_path):
    root, vae = pictures(tmp_path / "set"), VAE(**TINY).eval()

    def fingerprint():
        report = evaluate(
            vae,
            loaded("folder", root)[1],
            VAEObjective(Gaussian(1.0)),
            EvaluationConfig(max_images=2),
            None,
            None,
            "vae",
        )
        return report.protocol.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    for path in root.iterdir():
        edit(path)
    assert fingerprint() != before
