"""Metrics, latent statistics, evaluation and pictures, on tiny real models and real digits."""

import json

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusers_vae import MLPVAE, VAE
from diffusers_vae.data import ArrayImages, DataConfig, load_data
from diffusers_vae.images import to_model_range, to_uint8
from diffusers_vae.latents import LatentStatistics, measure_latents
from diffusers_vae.metrics import psnr, ssim
from diffusers_vae.pictures import draw_all, latent_picture, loss_picture, manifold_picture, reconstruction_picture


@pytest.fixture(scope="module")
def digits():
    _, heldout = load_data(DataConfig(resolution=16))
    return heldout


def tiny_vae(channels=1, **settings):
    torch.manual_seed(0)
    return VAE(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **settings,
    ).eval()


class TestMetrics:
    def images(self, digits):
        return to_model_range(digits.pixels[:6])

    def test_psnr_is_minus_ten_log_of_the_error_in_unit_range(self, digits):
        images = self.images(digits)
        noisy = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        errors = (((images - noisy) / 2) ** 2).double().mean((1, 2, 3))
        torch.testing.assert_close(psnr(images, noisy).double(), -10 * errors.log10(), rtol=1e-5, atol=0)

    def test_psnr_of_a_copy_is_finite(self, digits):
        images = self.images(digits)
        assert psnr(images, images).tolist() == [100.0] * 6

    def test_values_outside_the_range_count_as_its_ends(self, digits):
        images = self.images(digits)
        assert torch.equal(psnr(images, images * 3 - 0.5), psnr(images, (images * 3 - 0.5).clamp(-1, 1)))
        assert torch.equal(ssim(images, images * 3 - 0.5), ssim(images, (images * 3 - 0.5).clamp(-1, 1)))

    def test_ssim_of_flat_images_is_the_luminance_term(self):
        """Without variance only Wang et al.'s l(x, y) remains, equation 6."""
        a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
        expected = (2 * 0.6 * 0.8 + 0.01**2) / (0.6**2 + 0.8**2 + 0.01**2)  # of 0.2 and 0.6 as values in [0, 1]
        assert ssim(a, b).item() == pytest.approx(expected, rel=1e-3)

    def test_one_value_per_image_whatever_its_neighbours(self, digits):
        images = self.images(digits)
        reconstructions = images.flip(0)
        for metric in (psnr, ssim):
            alone = torch.cat([metric(a[None], b[None]) for a, b in zip(images, reconstructions, strict=True)])
            torch.testing.assert_close(metric(images, reconstructions), alone)
        assert ssim(images, images).tolist() == pytest.approx([1] * 6)


class TestLatentStatistics:
    def test_scaled_latents_have_mean_0_and_std_1(self):
        generator = torch.Generator().manual_seed(0)
        moments = torch.randn(400, 8, 4, 4, generator=generator) * 3 + 2
        moments[:, 4:] = moments[:, 4:] / 6
        statistics = LatentStatistics()
        for part in moments.split(33):
            statistics.update(DiagonalGaussianDistribution(part))
        posterior = DiagonalGaussianDistribution(moments.repeat(600, 1, 1, 1))
        scaled = (posterior.sample(generator).double() - statistics.mean) * statistics.scaling_factor
        assert abs(scaled.mean()) < 1e-3 and abs(scaled.std() - 1) < 1e-3
        mean, std = (torch.tensor(values).view(4, 1, 1) for values in (statistics.latents_mean, statistics.latents_std))
        by_channel = ((posterior.sample(generator).double() - mean) / std).transpose(0, 1).flatten(1)
        assert by_channel.mean(1).abs().max() < 2e-3 and (by_channel.std(1) - 1).abs().max() < 1e-3

    def test_streamed_equals_at_once_far_from_zero(self):
        """float32 sums of squares would lose the variance."""
        moments = torch.full((1000, 2, 1, 1), -30.0)
        moments[:, 0, 0, 0] = 1000 + torch.linspace(-1, 1, 1000)
        statistics = LatentStatistics()
        for part in moments.split(7):
            statistics.update(DiagonalGaussianDistribution(part))
        expected = moments[:, 0].double()
        assert statistics.mean == pytest.approx(expected.mean().item(), rel=1e-12)
        assert statistics.std == pytest.approx(expected.std(correction=0).item(), rel=1e-5)
        assert statistics.scaling_factor == 1 / statistics.std

    def test_does_not_depend_on_batches(self, digits):
        vae = tiny_vae()
        one, two = (measure_latents(vae, digits, batch_size, 50) for batch_size in (50, 7))
        assert one.images == two.images == 50
        assert one.mean == pytest.approx(two.mean, rel=1e-5) and one.std == pytest.approx(two.std, rel=1e-6)


class TestPictures:
    @pytest.fixture
    def metrics(self, tmp_path):
        records = [
            {"kind": "train", "images_seen": 10, "loss": 3.0, "distortion": -4.0, "rate": 2.0, "learning_rate": 0.1},
            {"kind": "evaluation", "images_seen": 10, "loss": 2.0, "distortion": -5.0, "rate": 2.0},
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / "metrics.jsonl"

    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_every_channel_count(self, channels, digits, metrics):
        images = ArrayImages(digits.pixels.expand(-1, channels, -1, -1), digits.labels)
        pictures = draw_all(tiny_vae(channels), images, metrics, 60, 100, 0)
        assert set(pictures) == {"reconstructions", "samples", "loss", "latents"}
        for name, picture in pictures.items():
            assert picture.mode == "RGB" and np.asarray(picture).std() > 5, name

    def test_one_latent_unit_has_no_plane(self, digits, metrics):
        pictures = draw_all(MLPVAE(16, latent_dim=1).eval(), digits, metrics, 60, 100, 0)
        assert set(pictures) == {"reconstructions", "samples", "loss"}

    def test_two_latent_units_are_drawn_as_they_are(self, digits, metrics, monkeypatch):
        monkeypatch.delattr("diffusers_vae.pictures.PCA")
        model = MLPVAE(16, latent_dim=2).eval()
        assert "manifold" in draw_all(model, digits, metrics, 60, 100, 0)
        unlabelled = ArrayImages(digits.pixels)
        plain, coloured = (np.asarray(latent_picture(model, images, 60, 100)) for images in (unlabelled, digits))
        assert len(np.unique(coloured.reshape(-1, 3), axis=0)) > len(np.unique(plain.reshape(-1, 3), axis=0))

    def test_reconstructions_stand_under_their_originals(self, digits):
        """A model that gives back black for anything leaves every second row black."""
        model = MLPVAE(16, latent_dim=2).eval()
        with torch.no_grad():
            model.decoder[2].weight.zero_()
            model.decoder[2].bias.fill_(-100)
        images = to_model_range(digits.pixels[:32])
        pixels = np.asarray(reconstruction_picture(model, images, 10).convert("L"))
        body = pixels[-12 - 4 * 66 : -12, -12 - 16 * 66 : -12]  # 4 rows and 16 columns of 64 pixels and lines
        bright = [(row > 200).mean() for row in np.array_split(body, 4)]
        assert min(bright[0::2]) > 1.5 * max(bright[1::2])

    def test_large_images_are_shown_pixel_by_pixel(self):
        images = torch.linspace(-1, 1, 256).expand(6, 3, 256, 256)
        page = reconstruction_picture(tiny_vae(3), images, 2)
        assert page.width < 1200 and page.height > 2 * 258
        row = np.asarray(page)[page.height - 12 - 258 - 100, :, 0]
        ramp = np.asarray(to_uint8(images[0, 0, 0]))
        assert any(np.array_equal(row[start : start + 256], ramp) for start in range(page.width - 256))

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
        pixels = np.asarray(manifold_picture(model, 16, 6).convert("L")).astype(float)
        body = pixels[int(0.15 * pixels.shape[0]) :]
        left, right = np.array_split(body, 2, axis=1)
        upper, lower = np.array_split(body, 2)
        assert right[right < 250].mean() > left[left < 250].mean() + 20
        assert upper[upper < 250].mean() > lower[lower < 250].mean() + 20

    def test_loss_curve_shows_held_out_values_far_from_training(self, tmp_path):
        """Clipped, a held-out loss of 45 would look like one of 60 beside a training loss of 27: overfitting unseen."""
        panels = []
        for heldout in (45, 60):
            train = {"kind": "train", "distortion": 1.0, "rate": 2.0, "learning_rate": 0.1}
            records = [train | {"images_seen": i, "loss": 30 - 0.1 * i} for i in range(30)]
            records.append({"kind": "evaluation", "images_seen": 29, "loss": heldout, "distortion": 3, "rate": 3})
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            picture = np.asarray(loss_picture(tmp_path / "metrics.jsonl"))
            panels.append(picture[: picture.shape[0] // 2, : picture.shape[1] // 2])
        assert panels[0].shape != panels[1].shape or not np.array_equal(*panels)

    def test_pictures_repeat_exactly(self, digits, metrics):
        first, second = (draw_all(tiny_vae(), digits, metrics, 60, 100, 0) for _ in range(2))
        assert all(np.array_equal(np.asarray(first[name]), np.asarray(second[name])) for name in first)
