"""Pictures of tiny real models, and of autoencoders so simple that every pixel is known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from support.models import tiny_vae

from diffusers_vae import MLPVAE
from diffusers_vae.data import ArrayImages, DataConfig, load_data
from diffusers_vae.images.ranges import to_model_range, to_uint8
from diffusers_vae.reports.charts import (
    loss_picture,
    rate_distortion_curve,
    rate_distortion_picture,
    rate_picture,
    runs_picture,
)
from diffusers_vae.reports.pictures import (
    comparison_picture,
    draw_all,
    interpolation_picture,
    latent_picture,
    manifold_picture,
    reconstruction_picture,
    sample_picture,
    slerp,
    traversal_picture,
)

pytestmark = pytest.mark.usefixtures("drawn_figures")


@pytest.fixture(scope="module")
def digits():
    _, heldout = load_data(DataConfig(resolution=16))
    return heldout


@pytest.fixture
def metrics(tmp_path):
    records = [
        {"kind": "train", "images_seen": 10, "loss": 3.0, "distortion": -4.0, "rate": 2.0, "learning_rate": 0.1},
        {"kind": "evaluation", "images_seen": 10, "loss": 2.0, "distortion": -5.0, "rate": 2.0},
    ]
    return write(tmp_path, records)


def write(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "metrics.jsonl"


class Copying:
    """A perfect autoencoder: the latents of an image are its pixels."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, **config):
        self.config = config

    def encode(self, x):
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, -20)], 1)))

    def decode(self, z):
        return SimpleNamespace(sample=z)


def cells(page, rows, columns, side=64):
    """(rows, columns, side, side, 3) uint8: the images of a page that is not wider than they are."""
    height, width = rows * (side + 2) + 2, columns * (side + 2) + 2
    pixels = np.asarray(page)[-12 - height : -12, -12 - width : -12]
    grid = pixels[2:, 2:].reshape(rows, side + 2, columns, side + 2, 3)[:, :side, :, :side]
    return grid.transpose(0, 2, 1, 3, 4)


def shown(images, side=64):
    """(B, side, side, 3) uint8, as a page shows images (B, C, H, W)."""
    scale = side // images.shape[-1]
    pixels = to_uint8(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def same(one, two):
    return one.size == two.size and np.array_equal(np.asarray(one), np.asarray(two))


class TestSlerp:
    def ends(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 6, 4, 3, 2, generator=generator, dtype=torch.float64) * 3

    def test_interpolation_goes_from_end_to_end(self):
        first, second = self.ends()
        way = slerp(first, second, 7)
        assert way.shape == (6, 7, 4, 3, 2)
        torch.testing.assert_close(way[:, 0], first)
        torch.testing.assert_close(way[:, -1], second)

    def test_equal_steps_of_angle_and_norm_in_one_plane(self):
        first, second = self.ends()
        way = slerp(first, second, 7).flatten(2)
        norms = way.norm(dim=-1)
        torch.testing.assert_close(norms.diff(dim=1), ((norms[:, -1:] - norms[:, :1]) / 6).expand(-1, 6))
        directions = way / norms[..., None]
        angles = (directions[:, 1:] * directions[:, :-1]).sum(-1).acos()
        total = (directions[:, 0] * directions[:, -1]).sum(-1).acos()
        torch.testing.assert_close(angles, (total / 6)[:, None].expand(-1, 6))
        assert (torch.linalg.matrix_rank(way, rtol=1e-9) == 2).all()

    def test_quarter_of_a_circle(self):
        way = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 3)
        torch.testing.assert_close(way[0, 1], torch.tensor([0.5**0.5, 0.5**0.5]))

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ([1.0, 2.0], [1.0, 2.0]),
            ([1.0, 2.0], [3.0, 6.0]),
            ([1.0, 2.0], [1.0, 2.0 + 1e-9]),
            ([1.0, 2.0], [-2.0, -4.0]),
            ([0.0, 0.0], [1.0, 2.0]),
            ([0.0, 0.0], [0.0, 0.0]),
        ],
    )
    def test_straight_where_no_circle_is_singled_out(self, first, second):
        first, second = torch.tensor([[first], [second]], dtype=torch.float64)
        weights = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
        torch.testing.assert_close(slerp(first, second, 5)[0], (1 - weights) * first + weights * second)

    def test_nearly_parallel_vectors_keep_their_angle(self):
        first = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        way = slerp(first, torch.tensor([[1.0, 1e-4]], dtype=torch.float64), 3)
        torch.testing.assert_close(
            torch.atan2(way[0, 1, 1], way[0, 1, 0]).item(), math.atan(1e-4) / 2, rtol=1e-9, atol=0
        )


class TestReconstructions:
    def test_perfect_reconstructions_have_a_grey_difference(self, digits):
        images = to_model_range(digits.pixels[:32])
        original, reconstruction, difference = cells(reconstruction_picture(Copying(), images, 10), 6, 16)[:3]
        assert np.array_equal(original, shown(images[:16])) and np.array_equal(reconstruction, original)
        assert (difference == 128).all()

    def test_differences_are_four_times_and_signed(self, digits):
        """A model that gives back black for anything is too dark by as much as the image is bright."""
        model = MLPVAE(16, latent_dim=2).eval()
        with torch.no_grad():
            model.decoder[2].weight.zero_()
            model.decoder[2].bias.fill_(-100)
        images = (to_model_range(digits.pixels[:16]) + 1) / 8 - 1  # up to -0.75
        original, reconstruction, difference = cells(reconstruction_picture(model, images, 10), 3, 16)
        assert (reconstruction == 0).all() and (original > 0).any()
        assert np.array_equal(difference, shown(-4 * (images + 1)))

    def test_large_images_are_shown_pixel_by_pixel(self):
        images = torch.linspace(-1, 1, 256).expand(6, 3, 256, 256)
        page = reconstruction_picture(Copying(), images, 2)
        assert page.width < 1300
        assert np.array_equal(cells(page, 3, 4, 256)[0], shown(images[:4], 256))

    def test_more_than_three_channels_are_shown_as_colours(self):
        images = torch.rand(16, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        five, three = (reconstruction_picture(Copying(), part, 10) for part in (images, images[:, :3]))
        assert np.array_equal(cells(five, 3, 16), cells(three, 3, 16))
        assert five.height > three.height  # the title says it
        two, one = (reconstruction_picture(Copying(), images[:, :channels], 10) for channels in (2, 1))
        assert np.array_equal(cells(two, 3, 16), cells(one, 3, 16))


class TestWaysThroughTheLatents:
    def test_interpolations_are_spherical_around_the_shift(self, digits):
        first, second = to_model_range(digits.pixels[:8]).split(4)
        for config, centre in (({}, 0), ({"shift_factor": None}, 0), ({"shift_factor": 0.3, "scaling_factor": 2}, 0.3)):
            drawn = cells(interpolation_picture(Copying(**config), first, second, 10), 4, 11)
            assert np.array_equal(drawn[:, 0], shown(first)) and np.array_equal(drawn[:, -1], shown(second))
            middle = slerp(first - centre, second - centre, 3)[:, 1] + centre
            assert np.abs(drawn[:, 5].astype(int) - shown(middle)).max() <= 1

    def test_traversals_of_channels_shift_one_each(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(6, 3, 16, 16, generator=generator) * torch.tensor([0.1, 0.4, 0.2])[:, None, None]
        drawn = cells(traversal_picture(Copying(), images, 4), 6, 11).astype(int)  # two images for each channel
        for row, channel in enumerate([1, 1, 2, 2, 0, 0]):  # by their rates
            image = images[[0, 3][row % 2]]
            kept = [other for other in range(3) if other != channel]
            assert (drawn[row, ..., kept] == shown(image[None])[0][None][..., kept].transpose(3, 0, 1, 2)).all()
            shifted = image[None, channel : channel + 1] + 3 * images[:, channel].std(correction=0)
            assert np.abs(drawn[row, -1, ..., channel] - shown(shifted)[0, ..., 0]).max() <= 1
            assert np.abs(drawn[row, 5] - shown(image[None])[0]).max() <= 1

    def test_traversals_of_units_go_through_the_prior(self):
        images = torch.tensor([[0.1, 0.5, -0.3], [0.1, 0.7, 0.3]])[:, :, None, None]
        drawn = cells(traversal_picture(Copying(), images, 4), 6, 11)[:, :, 0, 0].astype(int)
        for row, unit in enumerate([1, 1, 2, 2, 0, 0]):
            values = torch.linspace(-3, 3, 11).clamp(-1, 1)
            assert np.abs(drawn[row, :, unit] - to_uint8(values).numpy()).max() <= 1
            kept = [other for other in range(3) if other != unit]
            assert (drawn[row][:, kept] == to_uint8(images[row % 2, kept, 0, 0]).numpy()).all()

    def test_traversals_are_of_the_channels_with_the_largest_rate(self):
        images = torch.linspace(0.1, 0.9, 20)[None, :, None, None].expand(3, -1, -1, -1)
        drawn = cells(traversal_picture(Copying(), images, 4, max_channels=5), 5, 11)
        assert (drawn == drawn[:, :1]).all()  # the three that are seen are not among them

    def test_samples_are_of_the_prior_and_the_seed(self):
        draws = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        drawn = cells(sample_picture(Copying(), (1, 8, 8), 10, 3, 32), 2, 16)
        assert np.array_equal(drawn.reshape(32, 64, 64, 3), shown(draws))

    def test_manifold_spans_the_prior(self):
        """With a decoder that adds the units, the picture brightens to the right and to the top, as axes do."""
        model = MLPVAE(8, latent_dim=2).eval()
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.zero_()
            model.decoder[0].weight[:2] = torch.eye(2)
            model.decoder[0].bias[:2] = 3
            model.decoder[2].weight[:, :2] = 1
            model.decoder[2].bias.fill_(-6)
        drawn = cells(manifold_picture(model, 16, 8), 8, 8)[:, :, 0, 0, 0].astype(int)
        assert (np.diff(drawn, axis=1) > 0).all() and (np.diff(drawn, axis=0) < 0).all()


class TestLatents:
    @pytest.mark.slow
    def test_two_latent_units_are_drawn_as_they_are(self, digits, monkeypatch):
        monkeypatch.delattr("sklearn.decomposition.PCA")
        model = MLPVAE(16, latent_dim=2).eval()
        unlabelled = ArrayImages(digits.pixels)
        plain, coloured = (np.asarray(latent_picture(model, images, 60, 100)) for images in (unlabelled, digits))
        assert len(np.unique(coloured.reshape(-1, 3), axis=0)) > len(np.unique(plain.reshape(-1, 3), axis=0))


class TestCurves:
    @pytest.mark.slow
    def test_held_out_values_far_from_training_are_seen(self, tmp_path):
        """Clipped, a held-out loss of 45 would look like one of 60 beside a training loss of 27: overfitting unseen."""
        losses, ways = [], []
        for heldout in (45, 60):
            train = {"kind": "train", "rate": 2.0, "learning_rate": 0.1}
            records = [train | {"images_seen": i, "loss": 30 - 0.1 * i, "distortion": 30 - 0.1 * i} for i in range(30)]
            far = {"kind": "evaluation", "images_seen": 29, "loss": heldout, "distortion": heldout, "rate": 3}
            metrics = write(tmp_path, [*records, far])
            picture = np.asarray(loss_picture(metrics))
            losses.append(picture[: picture.shape[0] // 2, : picture.shape[1] // 2])
            ways.append(np.asarray(rate_distortion_picture(metrics)))
        assert losses[0].shape != losses[1].shape or not np.array_equal(*losses)
        assert ways[0].shape != ways[1].shape or not np.array_equal(*ways)

    @pytest.mark.slow
    def test_runs_side_by_side(self, tmp_path):
        """Every run and every panel is seen, and held-out values too."""
        runs = {}
        for name, rate in (("first", 3.0), ("second", 5.0), ("third", 8.0)):
            (tmp_path / name).mkdir()
            records = [{"kind": "train", "images_seen": i, "loss": 9 - i, "rate": rate + i} for i in range(5)]
            runs[name] = write(tmp_path / name, [*records, {"kind": "evaluation", "images_seen": 4, "rate": rate}])
        panels = {"loss": "loss", "rate": "rate"}
        pictures = [runs_picture(dict(list(runs.items())[:count]), panels) for count in (2, 3)]
        assert len({picture.tobytes() for picture in pictures}) == 2
        assert runs_picture(runs, panels | {"scale": "scale"}).height > pictures[1].height

    @pytest.mark.slow
    @pytest.mark.parametrize("kinds", [[], ["train"], ["evaluation"]])
    def test_short_runs(self, kinds, tmp_path):
        records = [{"kind": kind, "images_seen": 10, "loss": 3, "distortion": 4, "rate": 2} for kind in kinds]
        picture = rate_distortion_picture(write(tmp_path, records))
        points = np.asarray(picture)[100:-100, 100:-200]  # inside the axes, away from the colour bar
        coloured = (points.max(-1).astype(int) - points.min(-1) > 60).any()
        assert coloured == bool(kinds)

    @pytest.mark.slow
    def test_curve_marks_every_verdict(self):
        points = [("a", 0.001, 900.0, "collapsed"), ("b", 200.0, -900.0, "healthy"), ("c", 0.001, 900.0, "collapsed")]
        colours = {tuple(colour) for colour in np.asarray(rate_distortion_curve(points)).reshape(-1, 3)}
        assert {(214, 39, 40), (44, 160, 44)} <= colours and (148, 103, 189) not in colours

    @pytest.mark.slow
    def test_rates_show_unused_channels_and_positions(self):
        def reds(picture):
            red, *others = np.moveaxis(np.asarray(picture).astype(int), -1, 0)
            return (red - np.maximum(*others) > 100).sum()  # text is drawn with soft edges

        alive, silent = (rate_picture([2.0, 0.005, 1.0], [[3.0]], unused) for unused in ([], [1]))
        assert reds(alive) == 0 and reds(silent) > 0
        assert reds(rate_picture([0.005, 0.004], [[0.009]], [0, 1])) > 10_000  # bars, too
        spatial = rate_picture([2.0, 0.5], [[1.0, 0.5, 0.5], [0.2, 0.2, 0.1]])
        assert spatial.width > 1.3 * alive.width


class TestComparison:
    def test_rows_of_originals_reconstructions_and_differences(self, digits):
        images = to_model_range(digits.pixels[:2])
        a, b = images * 0.9, images.flip(0)
        drawn = cells(comparison_picture(images, a, b, ("a", "b"), ["1", "2"]), 2, 5, 128)
        for place, expected in enumerate([images, a, 4 * (a - images), b, 4 * (b - images)]):
            assert np.array_equal(drawn[:, place], shown(expected, 128)), place

    @pytest.mark.slow
    def test_of_large_images_the_part_that_differs_most(self):
        image = torch.rand(1, 3, 300, 400, generator=torch.Generator().manual_seed(0)) * 2 - 1
        other = image.clone()
        other[:, :, 100:160, 200:260] *= -1
        drawn = cells(comparison_picture(image, image, other, ("a", "b"), [""]), 1, 5, 208)[0]
        ((top, left),) = [
            (top, left)
            for top in range(0, 93, 8)
            for left in range(0, 193, 8)
            if np.array_equal(drawn[0], shown(image[..., top : top + 208, left : left + 208], 208)[0])
        ]
        assert top <= 100 and left + 208 >= 260
        assert (drawn[2] == 128).all() and not np.array_equal(drawn[3], drawn[1])


class TestAll:
    ALWAYS = frozenset({"reconstructions", "samples", "traversals", "interpolations"})
    CURVES = frozenset({"loss", "rate_distortion"})

    @pytest.mark.slow
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_every_channel_count_is_drawn(self, channels, digits, metrics):
        """Exactly alike each time, without a trace in the global generators."""
        images = ArrayImages(digits.pixels.expand(-1, channels, -1, -1), digits.records)
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        model = tiny_vae(channels)
        torch.set_rng_state(state[0])
        pictures = draw_all(model, images, metrics, 60, 100, 0, [3.0] * 4, [[1.5] * 8] * 8)
        assert set(pictures) == self.ALWAYS | self.CURVES | {"latents", "rates"}
        for name, picture in pictures.items():
            assert picture.mode == "RGB" and np.asarray(picture).std() > 5, name
        assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
        if channels == 3:
            again = draw_all(model, images, metrics, 60, 100, 0, [3.0] * 4, [[1.5] * 8] * 8)
            for name, picture in pictures.items():
                assert same(picture, again[name]), name

    def test_what_does_not_apply_is_left_out(self, digits):
        assert set(draw_all(MLPVAE(16, latent_dim=1).eval(), digits, None, 60, 100, 0)) == self.ALWAYS
        few = ArrayImages(digits.pixels[:1])
        pictures = draw_all(MLPVAE(16, latent_dim=2).eval(), few, None, 60, 100, 0)
        assert set(pictures) == self.ALWAYS - {"interpolations"} | {"manifold"}

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [AutoencoderKL, AsymmetricAutoencoderKL])
    def test_stock_autoencoders(self, kind, digits):
        blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
        if kind is AsymmetricAutoencoderKL:
            blocks = {
                "down_block_out_channels": (8, 8),
                "up_block_out_channels": (8, 8),
                "norm_num_groups": 4,
                "layers_per_down_block": 1,
                "layers_per_up_block": 1,
            }
        model = kind(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **blocks,
        ).eval()
        assert set(draw_all(model, digits, None, 60, 2, 0)) == self.ALWAYS
