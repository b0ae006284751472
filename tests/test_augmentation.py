"""Training images that are others in every epoch, against those of the files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.files import paths_of
from torchvision.transforms.v2 import functional

from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.data.order import MicroBatch
from diffusers_vae.images.files import read_image
from diffusers_vae.tasks.text_to_image_config import TextToImageConfig


@pytest.fixture(scope="module")
def photographs(shared_data, tmp_path_factory):
    """Twelve of Kodak at a sixteenth of their area, of both orientations, and a square."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in (1, 2, 3, 4, 5, 7, 9, 10, 17, 18, 19, 20):
        pixels = read_image(shared_data / "kodak" / f"kodim{number:02d}.png", 3)
        small = functional.resize(pixels, [side // 4 for side in pixels.shape[1:]])
        functional.to_pil_image(small).save(folder / f"{number}.png")
    functional.to_pil_image(small[:, :128, :128]).save(folder / "square.png")
    return folder


def config(root, **settings):
    settings = {"channels": 3, "resolution": 64, "num_workers": 0} | settings
    return DataConfig(name="folder", root=str(root), **settings)


def batch(indices, seed=0, epoch=0):
    return MicroBatch(list(indices), 0, len(indices), 1.0, seed, epoch)


def read(images, **place):
    return images.read_batch(batch(range(len(images)), **place)).pixels


class TestFlips:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("settings", "ways"),
        [
            ({"horizontal_flip": True}, [(), (-1,)]),
            ({"vertical_flip": True}, [(), (-2,)]),
            ({"horizontal_flip": True, "vertical_flip": True}, [(), (-1,), (-2,), (-1, -2)]),
        ],
    )
    @pytest.mark.parametrize("limit", [0, None])
    def test_images_are_flipped_each_way_equally_often(self, settings, ways, limit, photographs):
        train, heldout = load_data(config(photographs, **settings), memory_limit=limit)
        plain, plain_heldout = load_data(config(photographs))
        assert torch.equal(read(heldout), read(plain_heldout))
        counts = dict.fromkeys(ways, 0)
        for epoch in range(40):
            for found, own in zip(read(train, epoch=epoch), read(plain), strict=True):
                (way,) = (way for way in ways if torch.equal(found, own.flip(way)))
                counts[way] += 1
        expected = 40 * len(train) / len(ways)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts.values())

    @pytest.mark.slow
    def test_images_are_measured_without_flips(self, photographs):
        train, _ = load_data(config(photographs, horizontal_flip=True))
        plain, _ = load_data(config(photographs))
        every = range(len(train))
        assert torch.equal(train.read(every).pixels, plain.read(every).pixels)
        assert train.fingerprint() == plain.fingerprint()


SETTINGS = {"horizontal_flip": True, "color_jitter": (0.3, 0.2, 0.1, 0.05)}


class TestPureFunction:
    @pytest.mark.slow
    def test_augmentation_is_a_pure_function_of_seed_epoch_and_index(self, photographs):
        train, _ = load_data(config(photographs, **SETTINGS))
        whole = read(train, seed=3, epoch=5)
        assert torch.equal(read(train, seed=3, epoch=5), whole)
        parts = [train.read_batch(batch(part, 3, 5)).pixels for part in ([0, 1, 2, 3, 4], range(5, len(train)))]
        assert torch.equal(torch.cat(parts), whole)
        assert not any(torch.equal(read(train, seed=seed, epoch=epoch), whole) for seed, epoch in ((3, 6), (4, 5)))

    def test_global_random_state_is_neither_used_nor_changed(self, photographs):
        train, _ = load_data(config(photographs, **SETTINGS))
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = read(train)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert torch.equal(read(train), first)


class TestColorJitter:
    @pytest.mark.slow
    @pytest.mark.parametrize("channels", [1, 3])
    def test_brightness_changes_within_its_bounds(self, channels, photographs):
        """Brightness alone is a factor, of each image another."""
        train, _ = load_data(config(photographs, channels=channels, color_jitter=(0.2, 0, 0, 0)))
        plain, _ = load_data(config(photographs, channels=channels))
        dark = [pixels.double().clamp(max=200).mean() for pixels in read(plain)]
        light = [pixels.double() for pixels in read(train)]
        factors = []
        for own, found in zip(read(plain).double(), light, strict=True):
            inside = (own > 20) & (own < 200)
            factors.append((found[inside].mean() / own[inside].mean()).item())
            assert (found[inside] - own[inside] * factors[-1]).abs().max() <= 1.5
        assert len(dark) == len(factors) == len({round(factor, 3) for factor in factors})
        assert all(0.79 < factor < 1.21 for factor in factors) and max(factors) - min(factors) > 0.1

    def test_values_of_float_images_stay_in_their_range(self, photographs, tmp_path):
        """float32 in [0, 1], as they are with a stated range."""
        for path in photographs.glob("*.png"):
            np.save(tmp_path / f"{path.stem}.npy", (read_image(path, 3).numpy() / 255).astype(np.float32))
        settings = {"value_range": (0.0, 1.0), "color_jitter": (0.3, 0.3, 0.3, 0.1), "vertical_flip": True}
        pixels = read(load_data(config(tmp_path, **settings))[0])
        assert pixels.dtype == torch.float32 and pixels.min() >= 0 and pixels.max() <= 1 and pixels.std() > 0.1


class TestRandomCrops:
    def places(self, images, sizes=(64, 64), **place):
        """Where in its file each crop was cut out."""
        found = []
        for path, pixels in zip(paths_of(images), read(images, **place), strict=True):
            whole = read_image(path, 3)
            height, width = sizes
            alike = (whole[0].unfold(1, width, 1) == pixels[0, 0]).all(2).nonzero().tolist()  # in their first line
            (where,) = [(y, x) for y, x in alike if torch.equal(whole[:, y : y + height, x : x + width], pixels)]
            found.append(where)
        return found

    @pytest.mark.slow
    def test_crops_differ_in_every_epoch(self, photographs):
        train, _ = load_data(config(photographs, crops="random"))
        epochs = [self.places(train, epoch=epoch) for epoch in range(3)]
        assert len(set(epochs[0] + epochs[1] + epochs[2])) > 2 * len(train)
        assert self.places(train, epoch=1) == epochs[1] != self.places(train, seed=1, epoch=1)

    def test_crops_of_held_out_images_do_not_change(self, photographs):
        _, heldout = load_data(config(photographs, crops="random"))
        pixels = [heldout.read([0]).pixels for _ in range(2)]
        assert torch.equal(*pixels) and pixels[0].shape == (1, 3, 64, 64)

    def test_smaller_images_are_enlarged(self, photographs):
        train, _ = load_data(config(photographs, crops="random", resolution=(160, 144)))
        assert read(train).shape == (len(train), 3, 160, 144)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "mnist", "horizontal_flip": True}, r"data\.horizontal_flip makes another sign of a digit"),
            ({"name": "digits", "vertical_flip": True}, r"data\.vertical_flip makes another sign of a digit"),
            ({"channels": 5, "color_jitter": (0, 0, 0, 0)}, r"data\.color_jitter is for grey or RGB .* got .* 5"),
            (
                {"color_jitter": (0, 0, 0, 0.7)},
                r"data\.color_jitter must be .* hue at most 0\.5, got \[0, 0, 0, 0\.7\]",
            ),
            ({"crops": "all"}, r"data\.crops must be at least 1, random or null, got all"),
        ],
    )
    def test_wrong_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**{"name": "folder", "channels": 3, "resolution": 64} | settings)

    def test_text_to_image_refuses_what_changes_images(self, photographs):
        with pytest.raises(ValueError, match=r"encoded once, from unchanged images: leave out data\.horizontal"):
            TextToImageConfig(data=config(photographs, horizontal_flip=True))


def test_name_of_the_file(photographs):
    train, _ = load_data(config(photographs, crops="random"))
    assert Path(train.name(0)).parent == photographs
