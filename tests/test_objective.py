"""The objective against torch.distributions, diffusers' posterior, the articles' losses and its own derivatives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import distributions

from diffusers_vae.images import to_unit_range
from diffusers_vae.models import MLPVAE, VAE
from diffusers_vae.objective import (
    Bernoulli,
    Gaussian,
    Laplace,
    ObjectiveConfig,
    VAEObjective,
    kl_to_standard_normal,
)

# each likelihood, and the distribution of an image given its reconstruction that it stands for
REFERENCES = [
    *((Gaussian(std), lambda r, std=std: distributions.Normal(r, std)) for std in (0.05, 1.0, math.sqrt(2))),
    *((Laplace(scale), lambda r, scale=scale: distributions.Laplace(r, scale)) for scale in (0.05, 1.0, 3.0)),
    (Bernoulli(), lambda r: distributions.Bernoulli(probs=to_unit_range(r), validate_args=False)),
]
LIKELIHOODS = [likelihood for likelihood, _ in REFERENCES]


def make_images(batch=3, channels=1, dtype=torch.float32, seed=0):
    """Random images and reconstructions (batch, channels, 4, 6) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, batch, channels, 4, 6, generator=generator, dtype=dtype) - 1


def make_moments(batch=3, dtype=torch.float32, seed=0):
    return torch.randn(batch, 8, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_model(name):
    """A tiny model with random weights, and images that fit it."""
    torch.manual_seed(0)
    if name == "vae":
        model = VAE(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    else:
        model = MLPVAE(image_size=(4, 6), hidden_dim=8, latent_dim=2)
    return model, make_images()[0]


# --- rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rate_equals_torch_distributions_and_diffusers(dtype):
    posterior = DiagonalGaussianDistribution(make_moments(dtype=dtype))
    prior = distributions.Normal(0, 1)
    expected = distributions.kl_divergence(distributions.Normal(posterior.mean, posterior.std), prior)
    rate = kl_to_standard_normal(posterior)
    assert rate.dtype == dtype
    torch.testing.assert_close(rate, expected.flatten(1).sum(1))
    torch.testing.assert_close(rate, posterior.kl())


def test_rate_is_zero_only_at_the_standard_normal():
    assert torch.equal(kl_to_standard_normal(DiagonalGaussianDistribution(torch.zeros(3, 8, 2, 3))), torch.zeros(3))
    for size in (1e-3, 1.0, 10.0):
        assert (kl_to_standard_normal(DiagonalGaussianDistribution(size * make_moments(100))) > 0).all()


def test_rate_of_a_nearly_collapsed_posterior_keeps_its_sign_and_size():
    logvar = torch.linspace(-1e-3, 1e-3, 101).view(-1, 1, 1, 1)
    rate = kl_to_standard_normal(DiagonalGaussianDistribution(torch.cat([torch.zeros_like(logvar), logvar], dim=1)))
    assert (rate >= 0).all()
    torch.testing.assert_close(rate, logvar.flatten() ** 2 / 4, rtol=1e-3, atol=1e-10)  # the series of exp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rate_of_half_precision_moments_is_computed_in_float32(dtype):
    moments = make_moments(dtype=torch.float64).mul(3).to(dtype)
    moments[0, 4:] = 15  # exp(15) is beyond float16
    expected = kl_to_standard_normal(DiagonalGaussianDistribution(moments.double()))
    rate = kl_to_standard_normal(DiagonalGaussianDistribution(moments))
    assert rate.isfinite().all()
    torch.testing.assert_close(rate, expected.float())


# --- distortion


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("likelihood", "reference"), REFERENCES, ids=map(str, LIKELIHOODS))
def test_distortion_equals_torch_distributions(likelihood, reference, channels, dtype):
    images, reconstructions = make_images(channels=channels, dtype=dtype)
    posterior = DiagonalGaussianDistribution(make_moments(dtype=dtype))
    terms = VAEObjective(likelihood)(images, reconstructions, posterior)
    value = to_unit_range(images) if isinstance(likelihood, Bernoulli) else images
    expected = -reference(reconstructions).log_prob(value).flatten(1).sum(1)
    assert terms.distortion.dtype == dtype
    torch.testing.assert_close(terms.distortion, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_density_sums_to_one_over_a_pixel(likelihood):
    if isinstance(likelihood, Bernoulli):
        pixels, weight = torch.tensor([-1.0, 1.0], dtype=torch.float64), 1.0
    else:
        pixels = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
        weight = (pixels[1] - pixels[0]).item()
    images = pixels.view(-1, 1, 1, 1)
    posterior = DiagonalGaussianDistribution(torch.zeros(len(images), 2, 1, 1))
    terms = VAEObjective(likelihood)(images, torch.full_like(images, 0.3), posterior)
    assert (terms.distortion.neg().exp().sum() * weight).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", [Gaussian(0.05), Laplace(0.05), Bernoulli()], ids=str)
def test_half_precision_reconstructions_are_computed_in_float32(likelihood, dtype):
    images, reconstructions = make_images()
    reconstructions, posterior = reconstructions.to(dtype), DiagonalGaussianDistribution(make_moments())
    terms = VAEObjective(likelihood)(images, reconstructions, posterior)
    expected = VAEObjective(likelihood)(images, reconstructions.float(), posterior)
    for name in ("distortion", "rate", "loss"):
        assert getattr(terms, name).dtype == torch.float32
        assert torch.equal(getattr(terms, name), getattr(expected, name)), name


# --- loss and elbo


@pytest.mark.parametrize("kl_weight", [0.0, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_loss_is_distortion_and_weighted_rate_without_the_constant(likelihood, kl_weight):
    images, reconstructions = make_images(channels=3)
    posterior = DiagonalGaussianDistribution(make_moments())
    terms = VAEObjective(likelihood, kl_weight)(images, reconstructions, posterior)
    assert terms.distortion.shape == terms.rate.shape == terms.elbo.shape == (3,)
    assert terms.loss.shape == ()
    constant = likelihood.constant() * 3 * 4 * 6
    torch.testing.assert_close(terms.loss + constant, (terms.distortion + kl_weight * terms.rate).mean())
    assert torch.equal(terms.elbo, -(terms.distortion + terms.rate))  # whatever the kl_weight


@pytest.mark.parametrize(
    ("likelihood", "article"),
    [
        (Gaussian(math.sqrt(2)), lambda pixels, output: F.mse_loss(output, pixels, reduction="sum")),
        (Bernoulli(), lambda pixels, output: F.binary_cross_entropy(output, pixels, reduction="sum")),
        (Laplace(1.0), lambda pixels, output: F.l1_loss(2 * output - 1, 2 * pixels - 1, reduction="sum")),
    ],
    ids=["squared error", "cross entropy", "absolute error"],
)
def test_loss_is_the_number_that_the_articles_print(likelihood, article):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 1, 4, 6, generator=generator)  # [0, 1], as in the articles
    output = torch.sigmoid(torch.randn(3, 1, 4, 6, generator=generator))
    mean, logvar = make_moments().chunk(2, dim=1)
    expected = article(pixels, output) - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
    posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    terms = VAEObjective(likelihood)(2 * pixels - 1, 2 * output - 1, posterior)
    torch.testing.assert_close(terms.loss, expected / 3)


def test_elbo_of_an_exact_posterior_is_the_log_likelihood():
    # latent ~ N(0, 1), image ~ N(latent, std^2): posterior and marginal are known. The expectation over the posterior
    # is a Gauss-Hermite quadrature, one node per image of the batch.
    std, image = 0.7, 0.4
    shrink = 1 / (1 + std**2)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(20))
    logvar = math.log(shrink * std**2)
    latents = (image * shrink + math.exp(logvar / 2) * nodes).view(-1, 1, 1, 1)
    moments = torch.tensor([image * shrink, logvar], dtype=torch.float64).view(1, 2, 1, 1).expand(len(nodes), 2, 1, 1)
    terms = VAEObjective(Gaussian(std))(torch.full_like(latents, image), latents, DiagonalGaussianDistribution(moments))
    expected = distributions.Normal(0.0, math.sqrt(1 + std**2)).log_prob(torch.tensor(image, dtype=torch.float64))
    torch.testing.assert_close((terms.elbo * weights).sum() / weights.sum(), expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_terms_of_an_image_do_not_depend_on_its_batch(likelihood):
    images, reconstructions = make_images(batch=4)
    moments = make_moments(batch=4)

    def terms_of(chosen):
        posterior = DiagonalGaussianDistribution(moments[chosen])
        terms = VAEObjective(likelihood)(images[chosen], reconstructions[chosen], posterior)
        return torch.stack([terms.distortion, terms.rate, terms.elbo])

    whole = terms_of([0, 1, 2, 3])
    assert len(whole[0].unique()) == len(whole[1].unique()) == 4
    torch.testing.assert_close(terms_of([2, 0, 3, 1]), whole[:, [2, 0, 3, 1]])
    torch.testing.assert_close(torch.cat([terms_of([0]), terms_of([1, 2, 3])], dim=1), whole)


# --- gradients


def test_rate_has_the_analytic_gradient():
    moments = make_moments().requires_grad_()
    posterior = DiagonalGaussianDistribution(moments)
    (gradient,) = torch.autograd.grad(kl_to_standard_normal(posterior).sum(), moments)
    torch.testing.assert_close(gradient, torch.cat([posterior.mean, posterior.logvar.expm1() / 2], dim=1))


@pytest.mark.parametrize(
    ("likelihood", "analytic"),
    [
        (Gaussian(0.3), lambda images, r: (r - images) / 0.3**2),
        (Laplace(0.3), lambda images, r: (r - images).sign() / 0.3),
        (Bernoulli(), lambda images, r: (r - images) / (1 - r**2)),  # (p - x) / (p (1 - p)) / 2 with r = 2p - 1
    ],
    ids=["gaussian", "laplace", "bernoulli"],
)
def test_distortion_has_the_analytic_gradient(likelihood, analytic):
    images, reconstructions = make_images(dtype=torch.float64)
    reconstructions.requires_grad_()
    posterior = DiagonalGaussianDistribution(make_moments(dtype=torch.float64))
    terms = VAEObjective(likelihood)(images, reconstructions, posterior)
    (gradient,) = torch.autograd.grad(terms.distortion.sum(), reconstructions)
    torch.testing.assert_close(gradient, analytic(images, reconstructions))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_loss_passes_gradcheck(likelihood):
    images, reconstructions = 0.9 * make_images(batch=2, dtype=torch.float64)

    def loss(reconstructions, moments):
        return VAEObjective(likelihood, 0.5)(images, reconstructions, DiagonalGaussianDistribution(moments)).loss

    moments = make_moments(batch=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (reconstructions.requires_grad_(), moments.requires_grad_()))


def part_gradients(model, output):
    """The gradients of a scalar with respect to the parameters of encoder and decoder; None where it has none."""
    parts = {"encoder": ("encoder.", "mean.", "logvar.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    for part, prefixes in parts.items():
        parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)]
        parts[part] = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
    return parts["encoder"], parts["decoder"]


@pytest.mark.parametrize("name", ["vae", "mlp"])
def test_each_term_moves_its_own_parameters(name):
    model, images = make_model(name)
    output = model(images, sample_posterior=True, return_posterior=True, generator=torch.Generator().manual_seed(0))
    terms = VAEObjective()(images, output.sample, output.latent_dist)

    encoder, decoder = part_gradients(model, terms.rate.mean())
    assert all(gradient is not None for gradient in encoder)
    assert any(gradient.abs().max() > 1e-4 for gradient in encoder)
    assert all(gradient is None for gradient in decoder)

    for part in part_gradients(model, terms.distortion.mean()):
        assert all(gradient is not None for gradient in part)
        assert any(gradient.abs().max() > 1e-4 for gradient in part)
    posterior = output.latent_dist
    for moment in torch.autograd.grad(terms.distortion.sum(), (posterior.mean, posterior.logvar)):
        assert (moment != 0).all()  # the draw carries the gradient to both


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", ["vae", "mlp"])
def test_gradient_of_the_loss_is_the_weighted_sum_of_its_terms(name, kl_weight):
    model, images = make_model(name)
    output = model(images, sample_posterior=True, return_posterior=True, generator=torch.Generator().manual_seed(0))
    terms = VAEObjective(Laplace(0.5), kl_weight)(images, output.sample, output.latent_dist)
    loss, distortion, rate = (
        torch.autograd.grad(value.mean(), list(model.encoder.parameters()), retain_graph=True)
        for value in (terms.loss, terms.distortion, terms.rate)
    )
    for of_loss, of_distortion, of_rate in zip(loss, distortion, rate, strict=True):
        torch.testing.assert_close(of_loss, of_distortion + kl_weight * of_rate, rtol=1e-4, atol=1e-5)


# --- faults


def test_bernoulli_refuses_the_unbounded_decoder_of_vae():
    model, images = make_model("vae")
    torch.nn.init.constant_(model.decoder.conv_out.bias, 1.0)  # as soon as it leaves [-1, 1]
    output = model(images, return_posterior=True)
    with pytest.raises(ValueError, match=r"needs reconstructions that are probabilities.*use MLPVAE"):
        VAEObjective(Bernoulli())(images, output.sample, output.latent_dist)


@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_bernoulli_takes_mlpvae_even_when_its_sigmoid_saturates(logit):
    model, images = make_model("mlp")
    torch.nn.init.constant_(model.decoder[-1].bias, logit)
    for target in (images, -torch.ones_like(images), torch.ones_like(images)):
        output = model(target, return_posterior=True)
        terms = VAEObjective(Bernoulli())(target, output.sample, output.latent_dist)
        terms.loss.backward()
        reference = distributions.Bernoulli(probs=to_unit_range(output.sample), validate_args=False)
        expected = -reference.log_prob(to_unit_range(target)).flatten(1).sum(1)
        assert terms.distortion.isfinite().all()
        torch.testing.assert_close(terms.distortion, expected, rtol=1e-5, atol=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("inf"), -1.01])
def test_bernoulli_refuses_what_is_no_probability(value):
    images, reconstructions = make_images()
    reconstructions[1, 0, 2, 3] = value
    with pytest.raises(ValueError, match="probabilities"):
        VAEObjective(Bernoulli())(images, reconstructions, DiagonalGaussianDistribution(make_moments()))


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 4, 6), (3, 1, 4, 1), (3, 4, 6)])
def test_images_and_reconstructions_of_different_shape_are_refused(shape):
    images, _ = make_images()
    with pytest.raises(ValueError, match=r"must have one shape, got \(3, 1, 4, 6\) and \(" + str(shape)[1:-1]):
        VAEObjective()(images, torch.zeros(shape), DiagonalGaussianDistribution(make_moments()))


# --- config


@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Laplace(0.5), Bernoulli()], ids=str)
def test_config_builds_the_objective_that_it_describes(likelihood):
    name = type(likelihood).__name__.lower()
    config = ObjectiveConfig(name, scale=None if name == "bernoulli" else 0.5, kl_weight=0.1)
    assert config.build() == VAEObjective(likelihood, kl_weight=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"scale": scale}, "objective.scale must be positive") for scale in (0.0, -1.0, math.nan, math.inf)),
        *(({"kl_weight": weight}, "objective.kl_weight must be at least 0") for weight in (-0.1, math.nan, math.inf)),
        ({"likelihood": "bernoulli", "scale": 0.5}, "bernoulli likelihood has no scale"),
        ({"likelihood": "gausian"}, "objective.likelihood must be gaussian, laplace or bernoulli, got 'gausian'"),
    ],
    ids=str,
)
def test_config_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


def test_integer_images_and_another_batchs_posterior_are_refused():
    images = torch.zeros(2, 1, 8, 8)
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"floating point in \[-1, 1\], got torch.uint8"):
        VAEObjective()(images.to(torch.uint8), images, posterior)
    with pytest.raises(ValueError, match="of the 2 images, got one of 1"):
        VAEObjective()(images, images, posterior)
