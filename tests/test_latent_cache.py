"""Latents on disk: those of stock diffusers, the same files whatever happens in between, and never stale ones."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from filelock import FileLock
from PIL import Image
from programs import crash_encode
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.files import paths_of
from support.launches import fork_server, run_forked
from support.models import tiny_vae
from torch.utils.data import DataLoader

from diffusers_vae import VAE, LatentDataset, encode_images
from diffusers_vae.data import ArrayImages, DataConfig, FileStore, Records, StoredImages, load_data
from diffusers_vae.evaluation.evaluate import draw
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.latents import dataset
from diffusers_vae.latents.dataset import Verification
from diffusers_vae.models import fast_dtype, weights_hash

BF16, FP16 = torch.bfloat16, torch.float16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""How far float32 results of a network may be from those of other batch sizes, numbers of threads and kernels."""
SPACING = {torch.float32: 0.0, BF16: 2**-7, FP16: 2**-10}
"""Relative distance of neighbouring values of a dtype: results that differ by less may be rounded to either."""


@pytest.fixture(scope="module")
def digits():
    """45 real digits, two of which have two captions."""
    train, _ = load_data(DataConfig(resolution=8))
    captions = [(f"a {train.classes[label]}",) + ("überall",) * (label == 3) for label in train.labels[:45]]
    return ArrayImages(train.pixels[:45], Records(train.labels[:45], train.classes, captions))


@pytest.fixture(scope="module")
def vae():
    return tiny_vae(sample_size=8)


def encode(vae, images, folder, **settings):
    """In 3 shards, of 2, 2 and 1 batches, in float32 on every device."""
    known = {"shard_images": 20, "batch_size": 10, "compute_dtype": torch.float32}
    return encode_images(vae, images, folder, **known | settings)


@pytest.fixture(scope="module")
def whole(vae, digits, tmp_path_factory):
    """The folder of an encoding without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    encode(vae, digits, folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir() if path.name != ".lock"}


def stock_posteriors(vae, pixels, size=10):
    """The posterior of the stock class with the same weights, batch by batch."""
    stock = AutoencoderKL.from_config(vae.config)
    stock.load_state_dict(vae.state_dict())
    with torch.no_grad():
        return [stock.eval().encode(to_model_range(batch)).latent_dist for batch in pixels.split(size)]


def assert_stored(found, reference, dtype):
    """Latents of a cache are those of stock, rounded to the dtype of the cache."""
    assert found.dtype == torch.float32 and torch.equal(found, found.to(dtype).float())
    torch.testing.assert_close(found, reference, rtol=1e-5 + SPACING[dtype], atol=1e-5)


def in_files(images, folder):
    """The digits as a set of PNG files, read on demand, in the same order."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, pixels in zip(paths, images.pixels, strict=True):
        Image.fromarray(pixels[0].numpy()).save(path)
    config = DataConfig(name="folder", root=str(folder), resolution=8, channels=1, on_bad_image="skip")
    rows = np.arange(len(paths))
    return StoredImages(config, dataclasses.replace(images.records, store=FileStore(folder, paths, {}), rows=rows))


class TestEncode:
    @pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
    def test_posterior_is_that_of_stock(self, dtype, vae, digits, tmp_path):
        latents = encode(vae, digits, tmp_path, dtype=dtype)
        expected = stock_posteriors(vae, digits.pixels)
        for name in ("mean", "logvar"):
            found = torch.stack([row[name] for row in latents])
            assert_stored(found, torch.cat([getattr(posterior, name) for posterior in expected]), dtype)
        assert latents.dtype == dtype and latents.latent_shape == (4, 4, 4) and latents.kind == "posterior"

    @pytest.mark.parametrize("dtype", [torch.float32, BF16])
    def test_mode_and_sample_are_those_of_stock(self, dtype, vae, digits, tmp_path):
        expected = stock_posteriors(vae, digits.pixels)
        mode = encode(vae, digits, tmp_path / "mode", kind="mode", dtype=dtype)
        assert_stored(mode.latents(range(45)), torch.cat([posterior.mode() for posterior in expected]), dtype)
        indices = list(range(45))
        samples = [next(draw(posterior, indices[10 * i : 10 * i + 10], 3, 1)) for i, posterior in enumerate(expected)]
        sample = encode(vae, digits, tmp_path / "sample", kind="sample", seed=3, dtype=dtype)
        assert_stored(sample.latents(range(45)), torch.cat(samples), dtype)
        assert (sample.latents([0]) - mode.latents([0])).abs().max() > 0.1

    def test_noise_of_a_sample_does_not_depend_on_batches_and_shards(self, vae, digits, tmp_path):
        first = encode(vae, digits, tmp_path / "a", kind="sample")
        second = encode(vae, digits, tmp_path / "b", kind="sample", batch_size=7, shard_images=45)
        torch.testing.assert_close(first.latents(range(45)), second.latents(range(45)), **CLOSE)

    def test_logvar_is_clamped_as_stock_does(self, digits, tmp_path):
        vae = tiny_vae(sample_size=8)
        with torch.no_grad():
            vae.quant_conv.weight[4:] *= 1e3
        (row, *_) = encode(vae, digits, tmp_path)
        assert row["logvar"].min() == -30 and row["logvar"].max() == 20
        # of what lies between, 1e3 times as large as usual, the error is as well
        expected = stock_posteriors(vae, digits.pixels)[0].logvar[0]
        torch.testing.assert_close(row["logvar"], expected, rtol=1e-5, atol=1e-2)

    def test_what_goes_with_the_images(self, whole, vae, digits):
        latents = LatentDataset(whole)
        assert len(latents) == 45 and latents.classes[:2] == ("zero", "one")
        assert torch.equal(latents.labels, digits.labels) and latents.labels.dtype == torch.int64
        assert latents.captions == digits.captions and latents.indices.tolist() == list(range(45))
        assert latents.weights_hash == weights_hash(vae) and latents.vae_config["scaling_factor"] == 0.18215
        for row in (0, 19, 20, 44, -1):
            assert latents[row]["label"] == digits.labels[row]
            assert latents[row]["captions"] == list(digits.captions[row])
        for row in (45, -46):
            with pytest.raises(IndexError, match=f"there are 45 images, got index {row}"):
                latents[row]

    def test_images_without_labels_and_captions(self, vae, digits, tmp_path):
        latents = encode(vae, ArrayImages(digits.pixels), tmp_path)
        assert latents.labels is latents.captions is latents.classes is None
        assert set(latents[0]) == {"mean", "logvar"}

    def test_no_image_is_refused(self, vae, tmp_path):
        with pytest.raises(ValueError, match="at least one image to encode, got none"):
            encode(vae, ArrayImages(torch.zeros(0, 1, 8, 8, dtype=torch.uint8)), tmp_path)

    def test_leftovers_of_a_writer_that_was_killed_are_deleted(self, vae, digits, tmp_path):
        (tmp_path / ".tmpAb1_cd").write_bytes(b"half")  # of safetensors
        encode(vae, digits, tmp_path)
        assert not (tmp_path / ".tmpAb1_cd").exists()

    @pytest.mark.slow
    def test_unreadable_images_are_missing_rows(self, vae, digits, whole, tmp_path):
        """All of a shard and some of another cannot be read; the rest is encoded as in the whole set."""
        images = in_files(digits, tmp_path / "files")
        for index in (3, *range(20, 40)):
            paths_of(images)[index].write_bytes(b"no image")
        latents, expected = encode(vae, images, tmp_path / "out"), LatentDataset(whole)
        kept = [index for index in range(45) if index != 3 and not 20 <= index < 40]
        assert latents.indices.tolist() == kept and len(images.errors) == 21
        assert torch.equal(latents.labels, digits.labels[kept])
        assert latents.captions == [digits.captions[index] for index in kept]
        torch.testing.assert_close(latents.latents(range(24)), expected.latents(kept), rtol=1e-4, atol=1e-5)
        assert [shard["rows"] for shard in latents.index["shards"]] == [19, 0, 5]
        for path in paths_of(images):
            path.write_bytes(b"no image")
        with pytest.raises(ValueError, match="no image to encode can be read"):
            encode(vae, images, tmp_path / "none")

    def test_what_does_not_fit_is_named(self, digits, tmp_path):
        vae = tiny_vae(sample_size=8)
        with torch.no_grad():
            vae.quant_conv.weight[:4] *= 1e6
        with pytest.raises(OverflowError, match=r"mean of the latents of image 0 does not fit into float16.*65,504"):
            encode(vae, digits, tmp_path, dtype=FP16)
        assert not list(tmp_path.glob("shard*"))
        encode(vae, digits, tmp_path, dtype=BF16)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("batch_size", [10, 1])
    def test_what_is_not_finite_is_named(self, batch_size, value, vae, digits, tmp_path):
        """It is looked for after some batches, all of a shard or fewer."""
        images = ArrayImages(digits.pixels / 255.0)
        images.pixels[38, 0, 3, 3] = value
        with pytest.raises(FloatingPointError, match="latents of image 38 is not finite"):
            encode(vae, images, tmp_path, batch_size=batch_size)
        assert [path.name for path in tmp_path.glob("*shard*")] == ["shard-00000.safetensors"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "mean"}, "kind must be one of posterior, sample, mode, got mean"),
            ({"dtype": torch.float64}, "dtype must be one of .*got torch.float64"),
            ({"compute_dtype": torch.int8}, "compute_dtype must be one of .*or None, got torch.int8"),
            ({"shard_images": 0}, "must be at least 1, got 10 and 0"),
            ({"batch_size": 0}, "must be at least 1, got 0 and 20"),
        ],
    )
    def test_wrong_settings(self, settings, message, vae, digits, tmp_path):
        with pytest.raises(ValueError, match=message):
            encode(vae, digits, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_mnist_is_that_of_stock(self, vae, shared_data, tmp_path):
        train, _ = load_data(DataConfig(name="mnist", root=str(shared_data), resolution=28))
        images = ArrayImages(train.pixels[:1000], Records(train.labels[:1000], train.classes))
        latents = encode(vae, images, tmp_path, shard_images=300, batch_size=100)
        means = torch.cat([posterior.mean for posterior in stock_posteriors(vae, images.pixels, 100)])
        torch.testing.assert_close(latents.latents(range(1000)), means, **CLOSE)
        assert latents.latent_shape == (4, 14, 14) and torch.equal(latents.labels, train.labels[:1000])


class TestComputeDtype:
    @pytest.mark.parametrize(("dtype", "within"), [(BF16, 0.02), (FP16, 0.003)])
    def test_close_to_float32_and_the_model_as_it_was(self, dtype, within, digits, whole, tmp_path):
        vae = tiny_vae(sample_size=8)
        before, images = weights_hash(vae), to_model_range(digits.pixels[:2])
        with torch.no_grad():
            moments = vae.encode(images).latent_dist.parameters
        latents = encode(vae, digits, tmp_path, compute_dtype=dtype)
        found, exact = (cache.moments(range(45)) for cache in (latents, LatentDataset(whole)))
        assert 0 < (found - exact).std() < within * exact.std()
        assert latents.compute_dtype == dtype and LatentDataset(whole).compute_dtype == torch.float32
        assert weights_hash(vae) == before and vae.dtype == torch.float32
        with torch.no_grad():  # computes as before, in float32
            assert torch.equal(vae.encode(images).latent_dist.parameters, moments)

    @pytest.mark.slow
    def test_draws_are_float32(self, vae, digits, tmp_path):
        """The mean and the noise are not rounded to the precision of the encoder when they are added."""
        posterior = encode(vae, digits, tmp_path / "posterior", compute_dtype=BF16)
        sample = encode(vae, digits, tmp_path / "sample", kind="sample", seed=3, compute_dtype=BF16)
        known = DiagonalGaussianDistribution(posterior.moments(range(45)))
        expected = next(draw(known, list(range(45)), 3, 1))
        torch.testing.assert_close(sample.latents(range(45)), expected, rtol=1e-6, atol=1e-6)
        assert (expected - expected.bfloat16().float()).abs().max() > 1e-3

    @pytest.mark.slow
    def test_default_is_what_is_fast_and_a_models_own_below_float32(self, vae, digits, tmp_path):
        latents = encode(vae, digits, tmp_path / "fast", compute_dtype=None)
        assert latents.compute_dtype == fast_dtype(vae.device)
        half = copy.deepcopy(vae).half()
        assert encode(half, digits, tmp_path / "half", compute_dtype=None).compute_dtype == FP16

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, BF16])
    def test_default_continues_as_begun(self, dtype, vae, digits, tmp_path):
        before = contents(encode(vae, digits, tmp_path, compute_dtype=dtype).folder)
        (tmp_path / "shard-00001.safetensors").unlink()
        encode(vae, digits, tmp_path, compute_dtype=None).verify()
        assert contents(tmp_path) == before

    def test_float32_is_not_said_as_in_caches_of_older_versions(self, whole, vae, digits, tmp_path):
        assert "compute_dtype" not in json.loads((whole / "index.json").read_text())["cache"]
        cache = json.loads((encode(vae, digits, tmp_path, compute_dtype=BF16).folder / "index.json").read_text())
        assert cache["cache"]["compute_dtype"] == "bfloat16"

    @pytest.mark.slow
    def test_default_batches_are_sized_by_values(self, tmp_path):
        """A batch has 2^21 values in the first feature map, on a CPU: of 256x256 in 8 channels, 4 images."""
        vae = VAE(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
                  mid_block_add_attention=False)  # fmt: skip
        sizes = []
        vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        encode(vae, ArrayImages(torch.zeros(10, 1, 256, 256, dtype=torch.uint8)), tmp_path, batch_size=None)
        assert sorted(sizes) == [2, 4, 4]


class TestResume:
    def test_what_is_complete_is_not_written_again(self, vae, digits, whole):
        before = times(whole)
        latents = encode(vae, digits, whole)
        assert times(whole) == before and latents.fingerprint == LatentDataset(whole).fingerprint

    def test_what_is_complete_may_be_read_only(self, vae, digits, whole, tmp_path):
        for name, content in contents(whole).items():
            (tmp_path / name).write_bytes(content)
        encode(vae, digits, tmp_path)
        assert not (tmp_path / ".lock").exists()

    def test_after_an_error_finished_shards_stay(self, vae, digits, tmp_path):
        images = in_files(digits, tmp_path / "files")
        expected = contents(encode(vae, images, tmp_path / "whole").folder)
        images.config = dataclasses.replace(images.config, on_bad_image="stop")
        content = paths_of(images)[33].read_bytes()
        paths_of(images)[33].write_bytes(b"x" * len(content))
        with pytest.raises(ValueError, match=r"33\.png"):
            encode(vae, images, tmp_path / "out")
        (before,) = times(tmp_path / "out").items()
        with pytest.raises(
            FileNotFoundError, match=r"no complete latents: no index\.json, and 1 shards.*same encode command"
        ):
            LatentDataset(tmp_path / "out")
        paths_of(images)[33].write_bytes(content)
        encode(vae, images, tmp_path / "out").verify()
        assert contents(tmp_path / "out") == expected and before in times(tmp_path / "out").items()

    @pytest.mark.parametrize("index", [True, False])
    @pytest.mark.parametrize("damage", ["gone", "short", "empty", "changed"])
    def test_torn_shards_are_written_again(self, damage, index, vae, digits, whole, tmp_path):
        for name, content in contents(whole).items():
            (tmp_path / name).write_bytes(content)
        torn, left = tmp_path / "shard-00001.safetensors", tmp_path / ".shard-00002.safetensors.partial"
        content = torn.read_bytes()
        ruined = {"short": content[:-7], "empty": b"", "changed": content[:-9] + b"\0" + content[-8:], "gone": b""}
        torn.write_bytes(ruined[damage])
        assert ruined[damage] != content
        left.write_bytes(b"half")
        if damage == "gone":
            torn.unlink()
        if not index:
            (tmp_path / "index.json").unlink()
        if index and damage == "changed":  # which its size does not show
            with pytest.raises(ValueError, match=r"shard-00001\.safetensors in .* missing or not as written"):
                LatentDataset(tmp_path).verify()
            torn.unlink()
        elif index:
            with pytest.raises(ValueError, match=r"shard-00001\.safetensors in .* missing or not as written"):
                LatentDataset(tmp_path)
        before = times(tmp_path)
        encode(vae, digits, tmp_path).verify()
        assert contents(tmp_path) == contents(whole)
        after = times(tmp_path)
        assert after["shard-00000.safetensors"] == before["shard-00000.safetensors"]

    @pytest.mark.parametrize("index", [True, False])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("weights", r"vae\.weights_hash: \w{64} there, \w{64} here"),
            ("config", r"vae\.config\.scaling_factor: 0\.18215 there, 0\.5 here"),
            ("pixels", r"data\.fingerprint: \w{64} there, \w{64} here"),
            ("fewer", r"data\.images: 45 there, 44 here"),
            ("labels", r"data\.labels: \w{64} there, None here"),
            ("classes", r"data\.labels: \w{64} there, \w{64} here"),
            ("captions", r"data\.captions: \w{64} there, \w{64} here"),
            ("kind", "kind: posterior there, mode here"),
            ("dtype", "\ndtype: float32 there, bfloat16 here"),
            ("compute_dtype", "\ncompute_dtype: float32 there, bfloat16 here"),
            ("shard_images", "shard_images: 20 there, 30 here"),
        ],
    )
    def test_another_cache_is_refused(self, change, message, index, vae, digits, whole, tmp_path):
        for name, content in contents(whole).items():
            if index or name != "index.json":
                (tmp_path / name).write_bytes(content)
        settings = {"kind": "mode", "dtype": BF16, "compute_dtype": BF16, "shard_images": 30}
        settings = {change: settings[change]} if change in settings else {}
        images = ArrayImages(digits.pixels, digits.records)
        if change == "weights":
            vae = tiny_vae(sample_size=8)
            with torch.no_grad():
                vae.decoder.conv_out.bias[0] += 1e-3
        elif change == "config":
            vae = tiny_vae(sample_size=8, scaling_factor=0.5)
        elif change == "pixels":
            images.pixels = images.pixels.clone()
            images.pixels[44, 0, 0, 0] += 1
        elif change == "fewer":
            images = digits.first(44)
        elif change == "labels":
            images.records = dataclasses.replace(digits.records, labels=None)
        elif change == "classes":
            images.records = dataclasses.replace(digits.records, classes=(*digits.classes[:-1], "ten"))
        elif change == "captions":
            captions = [*digits.captions[:-1], ("another",)]
            images.records = dataclasses.replace(digits.records, captions=captions)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message) as error:
            encode(vae, images, tmp_path, **settings)
        assert "choose another folder, or delete this one" in str(error.value)
        assert len(str(error.value).splitlines()) == 2 + (change == "fewer") * 3
        assert contents(tmp_path) == before

    @pytest.mark.slow
    def test_seed_counts_for_samples_only_and_the_way_of_reading_for_files(self, vae, digits, tmp_path):
        encode(vae, digits, tmp_path / "mode", kind="mode", seed=1)
        encode(vae, digits, tmp_path / "mode", kind="mode", seed=2)
        encode(vae, digits, tmp_path / "sample", kind="sample", seed=1)
        with pytest.raises(ValueError, match="seed: 1 there, 2 here"):
            encode(vae, digits, tmp_path / "sample", kind="sample", seed=2)
        images = in_files(digits, tmp_path / "files")
        encode(vae, images, tmp_path / "out")
        images.config = dataclasses.replace(images.config, fit="pad")
        with pytest.raises(ValueError, match=r"data\.resize: scaled to cover .* there, scaled if too large .* here"):
            encode(vae, images, tmp_path / "out")

    def test_a_file_in_the_place_of_the_folder(self, vae, digits, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(NotADirectoryError, match="folder for the latents must be a folder, got the file"):
            encode(vae, digits, tmp_path / "out")

    @pytest.mark.slow
    def test_folder_that_is_written_by_another_is_refused(self, vae, digits, tmp_path, impatient_locks):
        with (
            FileLock(tmp_path / ".lock"),
            pytest.raises(OSError, match="another process is writing latents to"),
        ):
            encode(vae, digits, tmp_path)
        assert 0 < max(impatient_locks) < 60
        encode(vae, digits, tmp_path)

    @pytest.mark.slow
    def test_full_disk(self, vae, digits, whole, small_disk):
        out, filler = small_disk / "out", small_disk / "filler"
        size = (whole / "shard-00000.safetensors").stat().st_size
        filler.write_bytes(b"x" * (2**18 - int(size * 1.8)))
        with pytest.raises(OSError, match=rf"cannot write {out}/shard-00001\.safetensors: .*[Nn]o space"):
            encode(vae, digits, out)
        assert sorted(contents(out)) == ["shard-00000.safetensors"]
        filler.unlink()
        encode(vae, digits, out)
        assert contents(out) == contents(whole)

    @pytest.mark.soak
    @pytest.mark.skipif(os.name == "nt", reason="needs fork")
    @pytest.mark.parametrize("processes", [1, 2, 3])
    def test_encoding_killed_at_random_moments_ends_with_the_same_files(self, processes, tmp_path, capsys):
        """Within a write too. What happens at every operation in turn is in test_crash_points.py."""
        assert crash_encode.main([str(tmp_path), f"--processes={processes}", "--trials=20"]) == 0, (
            capsys.readouterr().out
        )


def memory(name):
    """A line of this process's status, in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def read_all_latents(folder):
    """Print the size of the latents in a folder, the growth of memory by a few of them, and of the process's own by
    all, in MiB.
    """
    latents = LatentDataset(folder)
    noise = torch.randn(10, *latents.latent_shape)
    latents.latents(range(10), noise)  # which starts what computes
    before = memory("VmRSS")
    latents.latents([0, 70, 130, 199])
    few, before = memory("VmRSS") - before, memory("RssAnon")
    for rows in torch.randperm(200).split(10):
        latents.latents(rows, noise)
    sys.stdout.write(f"{latents.bytes / 2**20} {few} {memory('RssAnon') - before}\n")


class TestDataset:
    def test_latents_are_mean_plus_std_times_noise(self, vae, digits, whole):
        latents = LatentDataset(whole)
        rows = [44, 3, 3, 19, 20]
        mean, logvar = (torch.stack([latents[row][name] for row in rows]) for name in ("mean", "logvar"))
        noise = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(latents.latents(rows), mean)
        expected = mean + torch.exp(0.5 * logvar) * noise
        torch.testing.assert_close(latents.latents(torch.tensor(rows), noise), expected, rtol=1e-6, atol=1e-6)
        posteriors = stock_posteriors(vae, digits.pixels)
        torch.manual_seed(7)
        sample = posteriors[0].sample()
        torch.manual_seed(7)
        torch.testing.assert_close(latents.latents(range(10), torch.randn(10, 4, 4, 4)), sample, **CLOSE)
        assert latents.latents([]).shape == (0, 4, 4, 4)

    def test_noise_that_does_not_fit(self, vae, digits, whole, tmp_path):
        with pytest.raises(ValueError, match=r"noise must have the shape \(2, 4, 4, 4\), got \(1, 4, 4, 4\)"):
            LatentDataset(whole).latents([0, 1], torch.zeros(1, 4, 4, 4))
        mode = encode(vae, digits, tmp_path, kind="mode")
        with pytest.raises(ValueError, match=r"needs a cache of kind posterior, and .* is of kind mode"):
            mode.latents([0], torch.zeros(1, 4, 4, 4))

    def test_what_is_read_is_nobody_elses(self, whole):
        latents = LatentDataset(whole)
        first = latents[0]["mean"].clone()
        latents[0]["mean"].zero_()
        latents.latents([0]).zero_()
        assert torch.equal(latents[0]["mean"], first)

    def test_another_vae_is_refused(self, whole, vae):
        assert len(LatentDataset(whole, weights_hash(vae))) == 45
        with pytest.raises(ValueError, match=f"weights_hash is {weights_hash(vae)}, and not abc"):
            LatentDataset(whole, "abc")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"cache": {"format": 1}}', "\0"])
    def test_damaged_index(self, text, tmp_path):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json is damaged or not an index of latents"):
            LatentDataset(tmp_path)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (["shards"], {}, "index.shards must be of the type array"),
            (["shards", 1], [], r"index.shards\[1\] must be of the type object"),
            (["shards", 1, "bytes"], "many", r"index.shards\[1\].bytes must be of the type integer"),
            (["images"], 44, "images be the sum of all rows"),
            (["images"], "45", "index.images must be of the type integer"),
            (["latent_shape"], 4, "index.latent_shape must be of the type array"),
            (["latent_shape"], [4, 4], "latent_shape must have 3 entries"),
            (["classes"], 3, "index.classes must be of the type array"),
            (["cache"], [], "index.cache must be of the type object"),
            (["cache", "format"], "1", "index.cache.format must be of the type integer"),
            (["cache", "kind"], [], "index.cache.kind must be one of posterior, sample, mode"),
            (["cache", "dtype"], "float64", "index.cache.dtype must be one of float32"),
            (["cache", "compute_dtype"], ["x"], "index.cache.compute_dtype must be one of float32"),
            (["cache", "vae"], None, "index.cache.vae must be of the type object"),
            (["cache", "data"], {}, "index.cache.data lacks fingerprint"),
        ],
    )
    def test_wrong_types_in_an_index_are_named(self, place, value, message, whole, tmp_path):
        index = part = json.loads((whole / "index.json").read_text())
        *outer, last = place
        for key in outer:
            part = part[key]
        part[last] = value
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=rf"index\.json is damaged or not an index of latents \(.*{message}.*encode"
        ):
            LatentDataset(tmp_path)

    def test_no_cache(self, whole, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            LatentDataset(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="holds no complete latents"):
            LatentDataset(tmp_path)
        index = json.loads((whole / "index.json").read_text())
        index["cache"]["format"] = 2
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="is of format 2, this version of diffusers_vae reads up to 1"):
            LatentDataset(tmp_path)

    def test_fingerprint(self, vae, digits, whole, tmp_path):
        first = LatentDataset(whole).fingerprint
        assert encode(vae, digits, tmp_path / "a").fingerprint == first
        images = ArrayImages(digits.pixels, Records(digits.labels, digits.classes))
        assert encode(vae, images, tmp_path / "b").fingerprint != first

    def test_pickled_small_and_equal(self, whole):
        latents = LatentDataset(whole)
        assert latents.labels is not None and latents.captions and latents[30]
        assert len(pickle.dumps(latents)) < 10_000
        assert torch.equal(pickle.loads(pickle.dumps(latents))[30]["mean"], latents[30]["mean"])

    @pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fork", "fresh"])
    def test_workers_read_the_same(self, fresh, vae, digits, tmp_path):
        latents = encode(vae, ArrayImages(digits.pixels, Records(digits.labels)), tmp_path)
        assert latents[0]["label"] == digits.labels[0]  # opened before
        context = fork_server() if fresh else None
        batches = list(DataLoader(latents, 8, num_workers=2, multiprocessing_context=context))
        assert torch.equal(torch.cat([batch["mean"] for batch in batches]), latents.latents(range(45)))
        assert torch.equal(torch.cat([batch["label"] for batch in batches]), digits.labels)

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
    def test_files_are_mapped_and_not_loaded(self, tmp_path):
        """A pass over 100 MB in random order: memory of the process's own, and all of it for a few rows."""
        vae = VAE(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=4, layers_per_block=1,
                  latent_channels=16, mid_block_add_attention=False)  # fmt: skip
        pixels = torch.zeros(200, 1, 64, 64, dtype=torch.uint8)
        encode(vae, ArrayImages(pixels), tmp_path / "latents", shard_images=60)
        told = run_forked(read_all_latents, tmp_path / "latents", log=tmp_path / "log")
        size, few, own = map(float, told.splitlines()[-1].split())
        assert size > 95 and few < 20 and own < 20, (size, few, own)


def damaged(whole, folder, damage):
    """A copy of a cache, the second of whose shards has a flipped bit, or holds a value that is not finite and is not
    noticed by its hash.
    """
    folder.mkdir()
    for name, content in contents(whole).items():
        (folder / name).write_bytes(content)
    path = folder / "shard-00001.safetensors"
    if damage == "flipped bit":
        content = bytearray(path.read_bytes())
        content[-3000] ^= 1
        path.write_bytes(content)
    else:
        with safe_open(path, "pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        tensors["logvar"][7, 0, 0, 0] = damage
        save_file(tensors, path, header)
        index = json.loads((folder / "index.json").read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        index["shards"][1] |= {"bytes": path.stat().st_size, "sha256": digest}
        (folder / "index.json").write_text(json.dumps(index))
    return LatentDataset(folder)


def read_what_was_cut_off(folder):
    """Read a shard after it was cut short, as it is mapped: without a check the process is ended by SIGBUS."""
    latents = LatentDataset(folder)
    row = latents[25]
    with open(folder / "shard-00001.safetensors", "r+b") as file:
        file.truncate(4096)
    for read in (lambda: latents[25], lambda: latents.latents([3, 25]), lambda: latents.moments([25]), latents.verify):
        try:
            read()
        except ValueError as error:
            assert "shard-00001.safetensors in" in str(error), error
        else:
            raise AssertionError("what is gone was read")
    assert row["mean"].isfinite().all() and latents[3]["mean"].isfinite().all()
    sys.stdout.write("survived")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((f'"{name}"', f'"{name[:-1]}_"') for name in ("indices", "labels", "caption_ends", "captions", "mean")),
        ('"I64"', '"U64"'),
        ('"F32"', '"I32"'),
        ('["', "[,"),
    ],
)
def test_a_shard_whose_tensors_are_not_what_they_were_is_named(old, new, whole, tmp_path):
    for file, content in contents(whole).items():
        changed = content.replace(old.encode(), new.encode())  # in a header, or in the captions
        (tmp_path / file).write_bytes(changed if file.startswith("shard") else content)
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors.* missing or not as written"):
        LatentDataset(tmp_path)[0]


class TestVerification:
    @pytest.mark.parametrize("at_once", [True, False])
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("flipped bit", r"shard-00001\.safetensors in .* missing or not as written: delete"),
            (float("nan"), r"shard-00001\.safetensors holds a logvar that is not finite: delete the file"),
            (float("-inf"), r"shard-00001\.safetensors holds a logvar that is not finite: delete the file"),
        ],
    )
    def test_damage_is_named(self, damage, message, at_once, whole, tmp_path, monkeypatch):
        """Before the training, or while it goes on: then at its end at the latest."""
        latents = damaged(whole, tmp_path / "latents", damage)
        if at_once:
            with pytest.raises(ValueError, match=message):
                Verification(latents)
            return
        monkeypatch.setattr(dataset, "VERIFIED_AT_ONCE", latents.bytes - 1)
        verification = Verification(latents)
        for raises in (verification.finish, verification.check):
            with pytest.raises(ValueError, match=message):
                raises()

    @pytest.mark.parametrize("at_once", [True, False])
    def test_whole_latents_are_let_through(self, at_once, whole, monkeypatch):
        monkeypatch.setattr(dataset, "VERIFIED_AT_ONCE", 2**30 * at_once)
        verification = Verification(LatentDataset(whole))
        verification.check()
        verification.finish()

    @pytest.mark.slow
    @pytest.mark.skipif(os.name == "nt", reason="mapped files cannot be cut short")
    def test_shard_that_is_cut_short_while_it_is_mapped_is_an_error(self, vae, digits, tmp_path):
        folder = encode(vae, digits, tmp_path / "latents").folder
        assert "survived" in run_forked(read_what_was_cut_off, folder, log=tmp_path / "log")

    def test_shard_with_other_rows_than_the_index_states_is_an_error(self, whole, tmp_path):
        for name, content in contents(whole).items():
            (tmp_path / name).write_bytes(content)
        index = json.loads((whole / "index.json").read_text())
        index["shards"][0]["rows"], index["shards"][1]["rows"] = 19, 21
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors in .* not as written"):
            LatentDataset(tmp_path).latents([39])


class TestDatasets:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["posterior", "mode"])
    def test_rows_are_the_same(self, kind, vae, digits, tmp_path):
        import datasets

        latents = encode(vae, digits, tmp_path / "latents", kind=kind, dtype=FP16)
        found = latents.to_datasets()
        names = ["mean", "logvar"] if kind == "posterior" else ["latents"]
        assert found.column_names == [*names, "label", "captions"] and len(found) == 45
        for name in names:
            assert found.features[name] == datasets.Array3D((4, 4, 4), "float32")
        assert found.features["label"].names == list(digits.classes)
        for row, expected in zip(found.with_format("torch"), latents, strict=True):
            assert all(torch.equal(row[name], expected[name]) for name in (*names, "label"))
            assert list(row["captions"]) == expected["captions"]

    @pytest.mark.slow
    def test_another_cache_in_the_same_folder_is_not_taken_for_the_first(self, vae, digits, tmp_path):
        folder = tmp_path / "latents"
        first = encode(vae, digits, folder, kind="mode").to_datasets()
        for path in folder.iterdir():
            path.unlink()
        second = encode(vae, ArrayImages(digits.pixels.flip(0)), folder, kind="mode").to_datasets()
        assert second.column_names == ["latents"] and first[0]["latents"] != second[0]["latents"]
