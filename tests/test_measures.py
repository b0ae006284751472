"""Metrics, latent statistics and evaluation, on tiny real models and real digits."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusers_vae import MLPVAE, VAE, VAEObjective
from diffusers_vae.data import ArrayImages, DataConfig, load_data
from diffusers_vae.evaluation import EvaluationConfig, EvaluationReport, evaluate
from diffusers_vae.images import to_model_range
from diffusers_vae.latents import LatentStatistics, measure_latents
from diffusers_vae.metrics import psnr, ssim
from diffusers_vae.objective import Bernoulli, Gaussian


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
        c1 = (0.01 * 2) ** 2
        expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
        assert ssim(a, b).item() == pytest.approx(expected, rel=1e-4)

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
        assert (one.count, two.count) == (50 * 4 * 8 * 8,) * 2
        assert one.mean == pytest.approx(two.mean, rel=1e-5) and one.std == pytest.approx(two.std, rel=1e-6)


class TestEvaluation:
    def test_terms_are_those_of_the_objective(self, digits):
        vae = tiny_vae()
        objective = VAEObjective(Gaussian(0.5), kl_weight=0.3)
        report = evaluate(vae, digits, objective, EvaluationConfig(max_images=5, seed=3))
        images = to_model_range(digits.pixels[:5])
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
            seeds = [int(np.random.SeedSequence([3, i]).generate_state(1)[0]) for i in range(5)]
            noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
            terms = objective(images, vae.decode(posterior.mean + posterior.std * noise).sample, posterior)
            reconstructions = vae(images).sample
        assert report.images == 5
        assert report.distortion == pytest.approx(terms.distortion.mean().item(), rel=1e-6)
        assert report.rate == pytest.approx(terms.rate.mean().item(), rel=1e-6)
        assert report.loss == pytest.approx(terms.loss.item(), rel=1e-6)
        assert report.elbo == pytest.approx(-(report.distortion + report.rate))
        assert report.bits_per_dim == pytest.approx(-report.elbo / (math.log(2) * 256))
        assert report.psnr == pytest.approx(psnr(images, reconstructions).mean().item(), rel=1e-5)
        assert report.ssim == pytest.approx(ssim(images, reconstructions).mean().item(), rel=1e-5)
        assert "0.5" in report.density and "normal" in report.density

    def test_uneven_batches_change_nothing(self, digits):
        vae = tiny_vae()
        reports = [evaluate(vae, digits, VAEObjective(), EvaluationConfig(batch_size=size)) for size in (180, 50)]
        for name in ("loss", "distortion", "rate", "psnr", "ssim"):
            one, two = (getattr(report, name) for report in reports)
            assert one == pytest.approx(two, rel=1e-5), name

    def test_repeats_exactly_and_leaves_the_global_generator_alone(self, digits):
        vae = tiny_vae()
        state = torch.get_rng_state()
        reports = [evaluate(vae, digits, VAEObjective(), EvaluationConfig(max_images=9)) for _ in range(2)]
        assert reports[0] == reports[1] and torch.equal(torch.get_rng_state(), state)
        assert json.loads(reports[0].to_json())["psnr"] == reports[0].psnr
        assert EvaluationReport.from_json(reports[0].to_json()) == reports[0]

    def test_bernoulli_says_that_it_is_no_density(self, digits):
        report = evaluate(MLPVAE(16, latent_dim=2), digits, VAEObjective(Bernoulli()), EvaluationConfig(max_images=4))
        assert "no density for grey values" in report.density and report.distortion > 0

    def test_other_precisions_and_no_images_are_refused(self, digits):
        with pytest.raises(ValueError, match=r"evaluated in float32, got one in torch\.bfloat16"):
            evaluate(tiny_vae().bfloat16(), digits, VAEObjective(), EvaluationConfig())
        with pytest.raises(ValueError, match="at least one image"):
            evaluate(tiny_vae(), ArrayImages(digits.pixels[:0]), VAEObjective(), EvaluationConfig())

    def test_seeds_share_no_noise(self, digits):
        """The draw for image 1 under seed 0 is not that for image 0 under seed 1."""
        twice = ArrayImages(digits.pixels[:1].repeat(2, 1, 1, 1))

        def distortion(images, seed):
            config = EvaluationConfig(max_images=images, seed=seed, batch_size=1)
            return evaluate(tiny_vae(), twice, VAEObjective(Gaussian(0.1)), config).distortion

        of_image_1_under_seed_0 = 2 * distortion(2, 0) - distortion(1, 0)
        assert of_image_1_under_seed_0 != pytest.approx(distortion(1, 1), rel=1e-7)

    def test_seed_is_checked_before_it_is_used(self):
        with pytest.raises(ValueError, match=r"evaluation\.seed must lie in \[0, 2\^31\), got -1"):
            EvaluationConfig(seed=-1)

    @pytest.mark.parametrize("name", ["every", "max_images", "batch_size"])
    def test_wrong_settings(self, name):
        with pytest.raises(ValueError, match=f"evaluation.{name} must be at least 1, got 0"):
            EvaluationConfig(**{name: 0})
