"""Metrics, perceptual distances and latent statistics, on tiny real models and real digits."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from support.models import tiny_vae
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.evaluation.float16 import measure_precision
from diffusers_vae.evaluation.metrics import frechet_distance, psnr, ssim
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.latents.statistics import LatentStatistics, measure_latents
from diffusers_vae.losses.perceptual import LPIPS, InceptionFeatures, PerceptualLoss


@pytest.fixture(scope="module")
def digits():
    _, heldout = load_data(DataConfig(resolution=16))
    return heldout


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

    def test_ssim_counts_the_windows_of_all_pixels_with_a_reflected_border(self, digits):
        """By the definition, in NumPy: Wang et al. 2004, equation 13, with a border of 5 pixels."""
        pair = self.images(digits)[:2, 0].double().numpy() / 2 + 0.5
        taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
        window = np.outer(taps, taps) / taps.sum() ** 2

        def mean(values):
            padded = np.pad(values, 5, mode="reflect")
            return (np.lib.stride_tricks.sliding_window_view(padded, (11, 11)) * window).sum((2, 3))

        a, b = pair
        of_a, of_b = mean(a), mean(b)
        variances = mean(a * a) - of_a**2 + mean(b * b) - of_b**2
        similar = (2 * of_a * of_b + 0.01**2) * (2 * (mean(a * b) - of_a * of_b) + 0.03**2)
        expected = (similar / ((of_a**2 + of_b**2 + 0.01**2) * (variances + 0.03**2))).mean()
        images = self.images(digits)
        assert ssim(images[:1], images[1:2]).item() == pytest.approx(expected, rel=1e-4)

    def test_one_value_per_image_whatever_its_neighbours(self, digits):
        images = self.images(digits)
        reconstructions = images.flip(0)
        for metric in (psnr, ssim):
            alone = torch.cat([metric(a[None], b[None]) for a, b in zip(images, reconstructions, strict=True)])
            torch.testing.assert_close(metric(images, reconstructions), alone)
        assert ssim(images, images).tolist() == pytest.approx([1] * 6)


class TestPerceptualLoss:
    def pair(self, channels=3, count=3, **kind):
        generator = torch.Generator().manual_seed(0)
        images, noise = torch.rand(2, count, channels, 24, 20, generator=generator).mul(2).sub(1).to(**kind)
        return images, images + 0.3 * noise

    @pytest.mark.slow
    def test_is_that_of_torchmetrics(self):
        images, reconstructions = self.pair()
        reconstructions = reconstructions.clamp(-1, 1)
        measure, loss = LPIPS("squeeze"), PerceptualLoss("squeeze")
        expected = learned_perceptual_image_patch_similarity(images, reconstructions, "squeeze", "none")
        for ours in (measure, loss):
            torch.testing.assert_close(ours(images, reconstructions), expected)
        assert expected.min() > 1e-3

    def test_one_value_per_image_whatever_its_neighbours(self):
        images, reconstructions = self.pair()
        loss = PerceptualLoss("squeeze")
        pairs = zip(images.split(1), reconstructions.split(1), strict=True)
        torch.testing.assert_close(loss(images, reconstructions), torch.cat([loss(*pair) for pair in pairs]))
        assert loss(images, images).tolist() == [0, 0, 0]

    @pytest.mark.slow
    @pytest.mark.parametrize("channels", [1, 2, 3])
    def test_gradient_is_that_of_finite_differences(self, channels):
        loss = PerceptualLoss("squeeze").double().train()
        images, reconstructions = self.pair(channels, 2, dtype=torch.float64)
        reconstructions.requires_grad_()
        loss(images, reconstructions).sum().backward()
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            way = 1e-6 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                change = (loss(images, reconstructions + way) - loss(images, reconstructions - way)).sum() / 2
            assert change.item() == pytest.approx((reconstructions.grad * way).sum().item(), rel=1e-4)
        assert not any(parameter.requires_grad for parameter in loss.parameters())

    def test_trains_nothing_of_its_own_and_drops_nothing_out(self):
        loss = PerceptualLoss("squeeze")
        pair = self.pair()
        before = loss(*pair)
        assert torch.equal(loss.train()(*pair), before)
        assert not any(parameter.requires_grad for parameter in loss.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_is_computed_in_float32(self, dtype):
        loss = PerceptualLoss("squeeze")
        images, reconstructions = self.pair()
        expected = loss(images, reconstructions.to(dtype).float())
        with torch.autocast("cpu", dtype):
            assert torch.equal(loss(images, reconstructions.to(dtype)), expected)
        assert expected.dtype == torch.float32

    @pytest.mark.slow
    def test_channels_are_as_stated(self):
        loss = PerceptualLoss("squeeze")
        images, reconstructions = self.pair(4)
        alone = [loss(images[:, k : k + 1], reconstructions[:, k : k + 1]) for k in range(4)]
        torch.testing.assert_close(loss(images, reconstructions), torch.stack(alone).mean(0))
        repeated = (images[:, [k] * 3] for k in (0, 1))
        torch.testing.assert_close(loss(images[:, :1], images[:, 1:2]), loss(*repeated))

    def test_smallest_size(self):
        loss = PerceptualLoss("squeeze")
        loss.check((17, 99))
        assert loss(torch.zeros(1, 3, 17, 99), torch.ones(1, 3, 17, 99)).isfinite().all()
        with pytest.raises(ValueError, match="LPIPS with squeeze needs sides of at least 17 pixels, got 99x16"):
            loss.check((99, 16))

    def test_missing_weights_say_which_file_goes_where(self, no_download):
        with pytest.raises(FileNotFoundError, match=rf"Put squeezenet1_1\S+pth into {no_download}"):
            PerceptualLoss("squeeze")


class Features(torch.nn.Module):
    """Features as they come, where torchmetrics expects a network that extracts them."""

    num_features = 20

    def forward(self, features):
        return features


class TestFrechetDistance:
    def features(self, count):
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(20, 20, generator=generator).double()
        first, second = (torch.randn(count, 20, generator=generator).double() @ mix for _ in range(2))
        return first, 0.7 * second + 0.3

    def test_is_that_of_torchmetrics_where_covariances_have_full_rank(self):
        first, second = self.features(300)
        reference = FrechetInceptionDistance(Features())
        reference.update(first, real=True)
        reference.update(second, real=False)
        assert frechet_distance(first, second) == pytest.approx(reference.compute().item(), abs=1e-6)

    @pytest.mark.parametrize("count", [5, 300])
    def test_of_equal_covariances_is_that_of_the_means(self, count):
        first, _ = self.features(count)
        assert frechet_distance(first, first) == pytest.approx(0, abs=2e-6)
        assert frechet_distance(first, first + 0.5) == pytest.approx(20 * 0.25, abs=1e-6)

    def test_does_not_depend_on_a_turn_when_there_are_few_images(self):
        first, second = self.features(6)
        turn, _ = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)).double())
        assert frechet_distance(first @ turn, second @ turn) == pytest.approx(frechet_distance(first, second), abs=2e-6)

    def test_of_other_channels_is_refused(self):
        with pytest.raises(ValueError, match="FID is defined for 3 channels, and 1 is repeated to 3, got 4"):
            InceptionFeatures.check(4, (64, 64))


class TestLatentStatistics:
    @pytest.mark.slow
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

    def test_images_none_of_which_can_be_read_are_refused(self, tmp_path):
        for number in range(4):
            Image.new("L", (16, 16), number).save(tmp_path / f"{number}.png")
        data = DataConfig(name="folder", root=str(tmp_path), channels=1, resolution=16, on_bad_image="skip")
        images, _ = load_data(data, memory_limit=0)
        for path in tmp_path.iterdir():
            path.write_bytes(b"damaged")
        for measure, message in (
            (measure_latents, "no image to measure the latents of, or none that can be read"),
            (measure_precision, "no image to measure the activations of can be read"),
        ):
            with pytest.raises(ValueError, match=message):
                measure(tiny_vae(), images, 2)

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
        one, two = (measure_latents(vae, digits.first(50), batch_size) for batch_size in (50, 7))
        assert one.images == two.images == 50
        assert one.mean == pytest.approx(two.mean, rel=1e-5) and one.std == pytest.approx(two.std, rel=1e-6)
