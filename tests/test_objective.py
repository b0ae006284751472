"""The objective against torch.distributions, diffusers' posterior, the articles' losses and its own derivatives."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from sklearn.datasets import load_digits
from torch import distributions

from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.images.ranges import to_unit_range
from diffusers_vae.losses.objective import (
    Bernoulli,
    Gaussian,
    Laplace,
    ObjectiveConfig,
    VAEObjective,
    kl_to_standard_normal,
    rate_per_channel,
)
from diffusers_vae.losses.training_objective import SMALLEST_SCALE, RateController, TrainingObjective
from diffusers_vae.models import MLPVAE, VAE

# each likelihood, and the distribution of an image given its reconstruction that it stands for
REFERENCES = [
    *((Gaussian(std), lambda r, std=std: distributions.Normal(r, std)) for std in (0.05, 1.0, math.sqrt(2))),
    *((Laplace(scale), lambda r, scale=scale: distributions.Laplace(r, scale)) for scale in (0.05, 1.0, 3.0)),
    (Bernoulli(), lambda logits: distributions.Bernoulli(logits=logits, validate_args=False)),
]
LIKELIHOODS = [likelihood for likelihood, _ in REFERENCES]


def make_images(batch=3, channels=1, dtype=torch.float32, seed=0):
    """Random images and reconstructions (batch, channels, 4, 6) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, batch, channels, 4, 6, generator=generator, dtype=dtype) - 1


def compute_terms(objective, images, decoded, posterior, **keywords):
    """The terms for reconstructions `decoded`, or for a Bernoulli likelihood their logits."""
    if isinstance(objective.likelihood, Bernoulli):
        return objective(images, 2 * decoded.sigmoid() - 1, posterior, logits=decoded, **keywords)
    return objective(images, decoded, posterior, **keywords)


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
    terms = compute_terms(VAEObjective(likelihood), images, reconstructions, posterior)
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
    terms = compute_terms(VAEObjective(likelihood), images, torch.full_like(images, 0.3), posterior)
    assert (terms.distortion.neg().exp().sum() * weight).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", [Gaussian(0.05), Laplace(0.05), Bernoulli()], ids=str)
def test_half_precision_reconstructions_are_computed_in_float32(likelihood, dtype):
    images, reconstructions = make_images()
    reconstructions, posterior = reconstructions.to(dtype), DiagonalGaussianDistribution(make_moments())
    terms, expected = (
        compute_terms(VAEObjective(likelihood), images, decoded, posterior)
        for decoded in (reconstructions, reconstructions.float())
    )
    for name in ("distortion", "rate", "loss"):
        assert getattr(terms, name).dtype == torch.float32
        assert torch.equal(getattr(terms, name), getattr(expected, name)), name


# --- loss and elbo


@pytest.mark.parametrize("kl_weight", [0.0, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_loss_is_distortion_and_weighted_rate_without_the_constant(likelihood, kl_weight):
    images, reconstructions = make_images(channels=3)
    posterior = DiagonalGaussianDistribution(make_moments())
    terms = compute_terms(VAEObjective(likelihood, kl_weight), images, reconstructions, posterior)
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
    logits = torch.randn(3, 1, 4, 6, generator=generator)
    output = torch.sigmoid(logits)
    mean, logvar = make_moments().chunk(2, dim=1)
    expected = article(pixels, output) - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
    posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    decoded = logits if isinstance(likelihood, Bernoulli) else 2 * output - 1
    terms = compute_terms(VAEObjective(likelihood), 2 * pixels - 1, decoded, posterior)
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
        terms = compute_terms(VAEObjective(likelihood), images[chosen], reconstructions[chosen], posterior)
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
        (Bernoulli(), lambda images, logits: logits.sigmoid() - to_unit_range(images)),
    ],
    ids=["gaussian", "laplace", "bernoulli"],
)
def test_distortion_has_the_analytic_gradient(likelihood, analytic):
    images, reconstructions = make_images(dtype=torch.float64)
    reconstructions.requires_grad_()
    posterior = DiagonalGaussianDistribution(make_moments(dtype=torch.float64))
    terms = compute_terms(VAEObjective(likelihood), images, reconstructions, posterior)
    (gradient,) = torch.autograd.grad(terms.distortion.sum(), reconstructions)
    torch.testing.assert_close(gradient, analytic(images, reconstructions))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_loss_passes_gradcheck(likelihood):
    images, reconstructions = 0.9 * make_images(batch=2, dtype=torch.float64)

    def loss(reconstructions, moments):
        posterior = DiagonalGaussianDistribution(moments)
        return compute_terms(VAEObjective(likelihood, 0.5), images, reconstructions, posterior).loss

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
    terms = VAEObjective(Gaussian(1.0))(images, output.sample, output.latent_dist)

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


@pytest.mark.parametrize("logit", [0.0, 15.0, 17.0, 30.0, 1e4])
@pytest.mark.parametrize("right", [True, False])
def test_bernoulli_has_error_and_gradient_at_every_logit(logit, right):
    """-log sigmoid(l) of a pixel that is 1 has the gradient sigmoid(l) - 1; reconstructions round to 1 at 17."""
    images = torch.ones(1, 1, 1, 1)
    logits = torch.full((1, 1, 1, 1), logit if right else -logit, requires_grad=True)
    error = Bernoulli().error(images, logits).sum()
    (gradient,) = torch.autograd.grad(error, logits)
    exact = math.log1p(math.exp(-logit)) + (0.0 if right else logit)
    probability = 1 / (1 + math.exp(-logit)) if right else 1 - 1 / (1 + math.exp(-logit))
    assert error.item() == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert gradient.item() == pytest.approx(probability - 1, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_bernoulli_takes_mlpvae_even_when_its_sigmoid_saturates(logit):
    model, images = make_model("mlp")
    torch.nn.init.constant_(model.decoder[-1].bias, logit)
    for target in (images, -torch.ones_like(images), torch.ones_like(images)):
        output = model(target, return_logits=True)
        terms = VAEObjective(Bernoulli())(target, output.sample, output.latent_dist, logits=output.logits)
        terms.loss.backward()
        reference = distributions.Bernoulli(logits=output.logits, validate_args=False)
        expected = -reference.log_prob(to_unit_range(target)).flatten(1).sum(1)
        assert terms.distortion.isfinite().all()
        torch.testing.assert_close(terms.distortion, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(output.sample, 2 * output.logits.sigmoid() - 1)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_logits_are_required_by_bernoulli_and_refused_by_others():
    images, decoded = make_images()
    posterior = DiagonalGaussianDistribution(make_moments())
    with pytest.raises(ValueError, match="pass those that MLPVAE returns with return_logits=True"):
        VAEObjective(Bernoulli())(images, decoded, posterior)
    with pytest.raises(ValueError, match=r"logits must be None for the likelihood Gaussian"):
        VAEObjective(Gaussian(0.1))(images, decoded, posterior, logits=decoded)
    with pytest.raises(ValueError, match="logits must have the shape of the images"):
        VAEObjective(Bernoulli())(images, decoded, posterior, logits=decoded[:1])


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 4, 6), (3, 1, 4, 1), (3, 4, 6)])
def test_images_and_reconstructions_of_different_shape_are_refused(shape):
    images, _ = make_images()
    with pytest.raises(ValueError, match=r"must have one shape, got \(3, 1, 4, 6\) and \(" + str(shape)[1:-1]):
        VAEObjective(Gaussian(1.0))(images, torch.zeros(shape), DiagonalGaussianDistribution(make_moments()))


# --- overrides of one call: kl_weight, scale, channel rates


def make_batch(batch=3, dtype=torch.float32):
    """Images, reconstructions and a posterior of two channels that differ in rate: about 20 and 0.1 nats."""
    images, reconstructions = make_images(batch, channels=3, dtype=dtype)
    moments = 0.3 * make_moments(batch, dtype=dtype)[:, [0, 1, 4, 5]]
    moments[:, 0] += 2.5
    return images, reconstructions, DiagonalGaussianDistribution(moments)


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Laplace(0.3)], ids=str)
def test_given_scale_is_that_of_the_likelihood_and_its_logarithm_is_in_the_loss(likelihood):
    batch = make_batch()
    expected = VAEObjective(likelihood, 0.5)(*batch)
    for scale in (0.3, torch.tensor(0.3)):
        terms = VAEObjective(type(likelihood)(2.0))(*batch, kl_weight=0.5, scale=scale)
        torch.testing.assert_close(terms.distortion, expected.distortion)
        torch.testing.assert_close(terms.loss, expected.loss + 72 * math.log(0.3))
        assert torch.equal(terms.rate, expected.rate)
    assert torch.equal(
        VAEObjective(likelihood, 0.5)(*batch, kl_weight=0.0).loss, VAEObjective(likelihood, 0.0)(*batch).loss
    )


@pytest.mark.parametrize("likelihood", [Gaussian(1.0), Laplace(1.0)], ids=str)
def test_optimal_scale_is_where_a_learned_one_has_no_gradient(likelihood):
    images, reconstructions, posterior = make_batch(dtype=torch.float64)
    optimum = likelihood.optimal_scale(likelihood.deviation(images, reconstructions).mean().item())

    def gradient(factor):
        scale = torch.tensor(optimum * factor, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(
            VAEObjective(likelihood)(images, reconstructions, posterior, scale=scale).loss, scale
        )

    assert abs(gradient(1.0)[0]) < 1e-9
    assert gradient(0.9)[0] < -1 and gradient(1.1)[0] > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reconstructions_and_scale_are_computed_in_float32(dtype):
    images, reconstructions, posterior = make_batch()
    log_scale = torch.tensor(-4.0, requires_grad=True)
    with torch.autocast("cpu", dtype):
        images, reconstructions = images.to(dtype), reconstructions.to(dtype)
        terms = VAEObjective(Gaussian(1.0))(images, reconstructions, posterior, scale=log_scale.exp())
    expected = VAEObjective(Gaussian(1.0))(
        images.float(), reconstructions.float(), posterior, scale=log_scale.detach().exp()
    )
    terms.loss.backward()
    assert terms.loss.dtype == torch.float32 and log_scale.grad.isfinite()
    torch.testing.assert_close(terms.loss.detach(), expected.loss)


@pytest.mark.slow
@pytest.mark.parametrize("free_bits", [0.0, 1.0])
@pytest.mark.parametrize("likelihood", [Gaussian(1.0), Laplace(1.0)], ids=str)
def test_loss_with_scale_and_free_bits_passes_gradcheck(likelihood, free_bits):
    images, reconstructions, posterior = make_batch(2, torch.float64)

    def loss(reconstructions, moments, log_scale):
        objective = VAEObjective(likelihood, 0.5, free_bits)
        return objective(images, reconstructions, DiagonalGaussianDistribution(moments), scale=log_scale.exp()).loss

    log_scale = torch.tensor(-1.0, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (reconstructions, posterior.parameters, log_scale)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_free_bits_leave_a_channel_below_alone_and_press_one_above_as_before():
    images, reconstructions, posterior = make_batch()
    moments = posterior.parameters.requires_grad_()

    def terms_of(objective, **kwargs):
        posterior = DiagonalGaussianDistribution(moments)
        terms = objective(images, reconstructions, posterior, **kwargs)
        return terms, torch.autograd.grad(terms.loss, moments)[0]

    rates = rate_per_channel(posterior).detach().mean(0)
    assert rates[1] < 1 < rates[0]
    plain, gradient = terms_of(VAEObjective(Gaussian(1.0)))
    terms, freed = terms_of(VAEObjective(Gaussian(1.0), free_bits=1.0))
    assert torch.equal(terms.rate, plain.rate) and torch.equal(terms.distortion, plain.distortion)
    torch.testing.assert_close(terms.loss, plain.loss + 1.0 - rates[1])  # the sum of max(free bits, rate)
    torch.testing.assert_close(freed[:, [0, 2]], gradient[:, [0, 2]])  # mean and log-variance of channel 0
    assert (freed[:, [1, 3]] == 0).all() and (gradient[:, [1, 3]] != 0).all()

    others = torch.tensor([0.5, 1.5])
    _, freed = terms_of(VAEObjective(Gaussian(1.0), free_bits=1.0), channel_rates=others)
    assert (freed[:, [0, 2]] == 0).all() and (freed[:, [1, 3]] != 0).all()
    with pytest.raises(ValueError, match=r"one per latent channel, \(2,\), got \(3,\)"):
        terms_of(VAEObjective(Gaussian(1.0), free_bits=1.0), channel_rates=torch.ones(3))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_free_bits_are_decided_by_the_mean_over_the_images(order):
    """Channel 0 has 1.6 nats on average, channel 1 has 0.8: of one image alone, both would be decided otherwise."""
    rates = torch.tensor([[0.2, 1.5], [3.0, 0.1]])[order]
    posterior = DiagonalGaussianDistribution(torch.cat([(2 * rates).sqrt(), torch.zeros(2, 2)], 1)[..., None, None])
    images = torch.zeros(2, 1, 4, 4)
    objectives = [VAEObjective(Gaussian(1.0), free_bits=free_bits) for free_bits in (0.0, 1.0)]
    losses = [objective(images, images, posterior).loss for objective in objectives]
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(1.0 - 0.8), rtol=0, atol=1e-5)


def test_bernoulli_is_refused_a_scale():
    images, reconstructions, posterior = make_batch()
    with pytest.raises(ValueError, match=r"has no scale: leave it out, got 0\.5"):
        VAEObjective(Bernoulli())(images, reconstructions, posterior, logits=reconstructions, scale=0.5)


# --- schedules


def test_schedules_at_their_corners():
    def weights(places, **settings):
        config = ObjectiveConfig(kl_weight=2.0, **settings)
        return [config.kl_weight_at(place, 800) for place in places]

    assert weights((0, 400, 799, 800)) == [2.0] * 4
    warmup = {"kl_warmup_images": 100}
    assert weights((0, 25, 50, 100, 101, 800), kl_schedule="linear", **warmup) == [0.0, 0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = weights((0, 25, 50, 75, 100, 800), kl_schedule="cosine", **warmup)
    half = math.sqrt(0.5)
    assert cosine == pytest.approx([0, 1 - half, 1, 1 + half, 2, 2])
    cyclical = weights((0, 50, 100, 199, 200, 250, 799, 800), kl_schedule="cyclical")
    assert cyclical == [0.0, 1.0, 2.0, 2.0, 0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_warm_up_rises_from_nothing_to_the_weight(schedule):
    config = ObjectiveConfig(kl_weight=0.3, kl_schedule=schedule, kl_warmup_images=90)
    weights = [config.kl_weight_at(place, 200) for place in range(201)]
    assert weights[:91] == sorted(set(weights)) and weights[0] == 0
    assert set(weights[90:]) == {0.3}


def test_cyclical_repeats_itself_in_every_part():
    config = ObjectiveConfig(kl_schedule="cyclical", kl_cycles=3)
    weights = [config.kl_weight_at(place, 300) for place in range(300)]
    assert weights[:100] == weights[100:200] == weights[200:]
    assert weights[:51] == sorted(weights[:51]) and set(weights[50:100]) == {1.0}


def binary_cross_entropy(reconstructions, images):
    return F.binary_cross_entropy_with_logits(reconstructions, (images + 1) / 2)


@pytest.mark.parametrize(
    ("settings", "mean_loss"),
    [
        ({"likelihood": "gaussian", "scale": 0.1}, F.mse_loss),
        ({"likelihood": "laplace", "scale": 0.3}, F.l1_loss),
        ({"likelihood": "bernoulli"}, binary_cross_entropy),
    ],
    ids=["gaussian", "laplace", "bernoulli"],
)
def test_kl_weight_per_value_gives_the_gradients_of_a_loss_of_means(settings, mean_loss):
    """In the same ratio to each other: of the reconstructions and of the moments."""
    images, reconstructions = make_images(4, seed=3)
    reconstructions = (0.9 * reconstructions).requires_grad_()
    moments = make_moments(4, seed=3).requires_grad_()
    posterior = DiagonalGaussianDistribution(moments)
    config = ObjectiveConfig(kl_weight=0.7, **settings)
    terms = compute_terms(config.build(), images, reconstructions, posterior)
    weight = config.kl_weight_per_value(images[0].numel())
    of_means = mean_loss(reconstructions, images) + weight * posterior.kl().mean()
    inputs = (reconstructions, moments)
    ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (terms.loss, of_means))
    factor = ours[0].norm() / theirs[0].norm()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, factor * other)


@pytest.mark.parametrize("scale", ["learned", "optimal"])
def test_kl_weight_per_value_is_unknown_while_the_scale_moves(scale):
    assert ObjectiveConfig(scale=scale).kl_weight_per_value(72) is None


# --- training: what depends on the run


EVERYTHING = [
    {},
    {"likelihood": "laplace", "scale": "optimal", "free_bits": 1.0, "target_rate": 30.0},
    {"scale": "optimal", "kl_schedule": "cyclical"},
    {"scale": "learned", "kl_schedule": "cosine", "kl_warmup_images": 20, "free_bits": 1.0},
]


def run_steps(objective, steps, parts=((0, 8),), first=0):
    """The readings, loss and gradients of steps of 8 images, each cut into parts and put together as the loop does."""
    results = []
    for step in range(first, first + steps):
        images, reconstructions = make_images(8, channels=3, seed=step)
        moments = make_moments(8, seed=step)
        moments[:, 0] += step  # a channel that crosses the free bits
        moments = (0.3 * moments).requires_grad_()
        reconstructions = (reconstructions * 0.8**step + images * (1 - 0.8**step)).requires_grad_()
        learned = objective.config.scale == "learned"
        log_scale = torch.tensor(-0.1 * step, requires_grad=True) if learned else None
        readings, statistics, total = objective.begin_step(8 * step, 64), {}, 0.0
        for start, end in parts:
            posterior = DiagonalGaussianDistribution(moments[start:end])
            terms = objective(images[start:end], reconstructions[start:end], posterior, log_scale)
            share = (end - start) / 8
            total = total + share * terms.loss
            for name, value in terms.statistics.items():
                statistics[name] = statistics.get(name, 0) + share * value
        total.backward()
        objective.end_step(statistics, 8)
        results.append(
            (readings, total.detach(), moments.grad, reconstructions.grad, log_scale.grad if learned else None)
        )
    return results


@pytest.mark.parametrize("settings", EVERYTHING, ids=str)
def test_training_does_not_depend_on_how_a_step_is_cut(settings):
    config = ObjectiveConfig(**settings)
    whole, cut = (run_steps(TrainingObjective(config), 6, parts) for parts in (((0, 8),), ((0, 3), (3, 8))))
    torch.testing.assert_close(cut, whole)
    assert all(isinstance(value, float) for readings, *_ in whole for value in readings.values())


@pytest.mark.parametrize("settings", EVERYTHING, ids=str)
def test_training_goes_on_bit_equal_from_its_state(settings):
    config = ObjectiveConfig(**settings)
    through, first, second = (TrainingObjective(config) for _ in range(3))
    for untouched in (True, False):
        expected = run_steps(through, 3, first=0 if untouched else 3)
        if untouched:
            run_steps(first, 3)
            second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    torch.testing.assert_close(run_steps(second, 3, first=3), expected, rtol=0, atol=0)
    assert second.state() == through.state()
    log_scale = -1.0 if config.scale == "learned" else None
    assert second.measured(log_scale) == through.measured(log_scale)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "bernoulli"])
def test_training_without_options_is_bit_equal_to_the_objective(likelihood):
    images, reconstructions, posterior = make_batch()
    config = ObjectiveConfig(likelihood, kl_weight=0.3)
    objective = TrainingObjective(config)
    assert objective.begin_step(0, 100) == {} and objective.state() == {}
    logits = {"logits": reconstructions} if likelihood == "bernoulli" else {}
    terms, expected = (each(images, reconstructions, posterior, **logits) for each in (objective, config.build()))
    for name in ("distortion", "rate", "loss"):
        assert torch.equal(getattr(terms, name), getattr(expected, name)), name
    assert terms.statistics == {} and objective.measured() == config.build()


def test_free_bits_press_all_channels_first_and_then_those_of_the_step_before():
    images, reconstructions, posterior = make_batch()
    objective = TrainingObjective(ObjectiveConfig(free_bits=1.0))
    plain = VAEObjective(Gaussian(0.05))(images, reconstructions, posterior)
    objective.begin_step(0, 100)
    terms = objective(images, reconstructions, posterior)
    torch.testing.assert_close(terms.loss, plain.loss)
    objective.end_step(terms.statistics, 3)
    objective.begin_step(3, 100)
    freed = objective(images, reconstructions, posterior).loss
    torch.testing.assert_close(freed, plain.loss + 1.0 - terms.statistics["channel_rates"][1])


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_optimal_scale_is_that_of_the_images_before(likelihood):
    images, reconstructions, posterior = make_batch()
    objective = TrainingObjective(ObjectiveConfig(likelihood, scale="optimal"))
    assert objective.begin_step(0, 9000) == {"scale": 1.0}
    terms = objective(images, reconstructions, posterior)
    error = (images - reconstructions).abs()
    expected = (error.mean() if likelihood == "laplace" else (error**2).mean().sqrt()).item()
    objective.end_step(terms.statistics, 3)
    assert objective.begin_step(3, 9000)["scale"] == pytest.approx(expected)  # not drawn to where it began
    objective.end_step({"deviation": torch.tensor(0.0), "size": torch.tensor(1.0)}, 10**6)
    assert objective.begin_step(10**6, 10**7)["scale"] == pytest.approx(SMALLEST_SCALE)

    def mean_of(
        batches,
    ):  # of two plateaus, the later one as long as the half-life: half of what the first one has left
        objective = TrainingObjective(ObjectiveConfig("laplace", scale="optimal"))
        for deviation in (0.4, 0.2):
            for images in batches:
                objective.end_step({"deviation": torch.tensor(deviation), "size": torch.tensor(1.0)}, images)
        return objective.measured().likelihood.scale

    assert mean_of([1000]) == pytest.approx(0.4 / 3 + 0.2 * 2 / 3)
    assert mean_of([100] * 10) == pytest.approx(mean_of([1000]))  # counted in images


def learned_from(settings, *parts):
    """The state after one step cut into (images, seed, encoded_whole, size), and the controller's for those alone."""
    objective, total, count = TrainingObjective(ObjectiveConfig(**settings)), {}, sum(part[0] for part in parts)
    objective.begin_step(0, 1000)
    for number, seed, encoded_whole, size in parts:
        images, reconstructions = make_images(number, channels=3, seed=seed)
        posterior = DiagonalGaussianDistribution(make_moments(number, seed=seed))
        terms = objective(images, reconstructions, posterior, encoded_whole=encoded_whole, size=size)
        for name, value in terms.statistics.items():
            total[name] = total.get(name, 0) + number / count * value.double()
    objective.end_step(total, count)
    return objective.state()


RATES = {"free_bits": 1.0, "target_rate": 30.0}


def test_rates_are_learned_from_images_that_were_encoded_whole():
    alone = learned_from(RATES, (6, 0, True, 1.0))
    for cut in ([(2, 1, False, 0.25)], [(1, 1, False, 0.25), (1, 2, False, 0.5)]):
        mixed = learned_from(RATES, *cut, (6, 0, True, 0.1))  # smaller after the encoder
        assert mixed["channel_rates"] == pytest.approx(alone["channel_rates"], rel=1e-6)
        assert mixed["rate_error"] == pytest.approx(alone["rate_error"], rel=1e-6)
        assert mixed["rate_integral"] == pytest.approx(alone["rate_integral"], rel=1e-6)
    assert learned_from(RATES, (8, 0, False, 0.25)) == TrainingObjective(ObjectiveConfig(**RATES)).state()


def test_images_count_in_an_optimal_scale_by_their_number_of_values():
    settings = {"scale": "optimal"}
    whole, quarter = learned_from(settings, (10, 0, True, 1.0)), learned_from(settings, (10, 0, False, 0.25))
    assert quarter["deviation_weight"] == pytest.approx(1 - 0.5 ** (2.5 / 1000))
    mean = {name: state["deviation"] / state["deviation_weight"] for name, state in (("w", whole), ("q", quarter))}
    assert mean["q"] == pytest.approx(mean["w"])
    other = learned_from(settings, (10, 1, True, 1.0))
    mixed = learned_from(settings, (10, 0, False, 0.25), (10, 1, True, 1.0))
    expected = (0.25 * mean["w"] + other["deviation"] / other["deviation_weight"]) / 1.25
    assert mixed["deviation"] / mixed["deviation_weight"] == pytest.approx(expected)


def test_measured_objective_has_the_full_weight_and_the_present_scale():
    config = ObjectiveConfig(kl_weight=0.2, scale="learned", kl_schedule="linear", kl_warmup_images=50, free_bits=2.0)
    objective = TrainingObjective(config)
    objective.begin_step(10, 100)
    assert objective.measured(math.log(0.3)) == VAEObjective(Gaussian(pytest.approx(0.3)), 0.2, scale_varies=True)
    with pytest.raises(ValueError, match=r"log_scale belongs to objective\.scale learned, got None"):
        objective.measured()
    with pytest.raises(ValueError, match=r"got 0\.1 with objective\.scale 0\.05"):
        TrainingObjective(ObjectiveConfig()).measured(0.1)


def test_faults_of_a_run_are_refused():
    objective = TrainingObjective(ObjectiveConfig(target_rate=5.0))
    with pytest.raises(ValueError, match="must be finite, got rate nan"):
        objective.end_step({"rate": torch.tensor(math.nan)}, 8)


def test_parts_that_a_run_did_not_use_before_begin_anew():
    objective = TrainingObjective(ObjectiveConfig(target_rate=5.0))
    begun = objective.state()
    objective.restore({"channel_rates": [1.0]})
    assert objective.state() == begun


# --- the controller of the rate


def simulated_rates(controller, fastest, steps=674):
    """The rates of a simulated model in a run with a cosine schedule: the length of the default one.

    The rate falls with the root of its weight and follows it within `fastest` steps at the highest learning rate, and
    more slowly at lower ones. What the model learns raises the weight that a rate needs, 100 times over the run.
    """
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0)).tolist()
    rates, log_rate = [], 0.0
    for step in range(steps):
        progress = step / steps
        learning_rate = min(1, (step + 1) / 62, (1 + math.cos(math.pi * progress)) / 2)
        learned = progress + math.sin(math.pi * progress) / math.pi  # the sum of the schedule's learning rates
        settled = math.log(30 * 10**learned) - 0.5 * math.log(controller.kl_weight)
        log_rate += (settled - log_rate) * learning_rate / fastest
        controller.update(math.exp(log_rate) * (1 + 0.03 * noise[step]))
        rates.append(math.exp(log_rate))
    return rates


@pytest.mark.parametrize("fastest", [10, 40])
@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [5.0, 300.0])
def test_controller_reaches_its_target_while_the_model_learns_and_slows_down(target, start, fastest):
    rates = simulated_rates(RateController(target, start), fastest)
    assert max(rates[-150:]) < 1.05 * target and min(rates[-150:]) > 0.95 * target
    assert rates[-1] == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("rate", [1e9, 1e-9, 0.0, -1e-9])
def test_controller_leaves_its_bound_within_a_few_steps(rate):
    controller = RateController(10.0, 0.1)
    for _ in range(10_000):
        controller.update(rate)
    bound = controller.kl_weight
    assert bound == pytest.approx(1e7 if rate > 10 else 1e-9)
    other_side = 1.0 if rate > 10 else 100.0
    for _ in range(20):
        controller.update(other_side)
    assert abs(math.log(controller.kl_weight / bound)) > 1  # after no time that grows with the 10,000 steps


def test_controller_moves_by_ratios():
    # a rate twice too high raises the weight by as much as one half of the target lowers it, at any target
    moves = []
    for target, factor in ((5.0, 2), (5.0, 1 / 2), (5000.0, 2)):
        controller = RateController(target, 0.1)
        controller.update(target * factor)
        moves.append(math.log(controller.kl_weight / 0.1))
    assert moves[0] == pytest.approx(-moves[1]) == pytest.approx(moves[2]) and moves[0] > 0


def test_controller_of_a_resumed_run_is_bit_equal():
    def weights(objective, steps):
        values = []
        for step in steps:
            values.append(objective.begin_step(8 * step, 480)["kl_weight"])
            rate = torch.tensor(20 + 30 * math.cos(step) / (step + 1))
            objective.end_step({"encoded_whole": torch.tensor(1.0), "rate": rate}, 8)
        return values

    through, before, after = (TrainingObjective(ObjectiveConfig(target_rate=20.0)) for _ in range(3))
    expected = weights(through, range(60))
    begun = weights(before, range(30))
    after.restore(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert begun + weights(after, range(30, 60)) == expected and len(set(expected)) > 50


@pytest.mark.slow
@pytest.mark.parametrize(("target", "start"), [(25.0, 1.0), (10.0, 0.1)])
def test_controller_brings_a_real_autoencoder_to_its_target(target, start):
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    torch.manual_seed(0)
    model = MLPVAE(image_size=(8, 8), hidden_dim=64, latent_dim=8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    objective = TrainingObjective(ObjectiveConfig(scale=0.2, kl_weight=start, target_rate=target))
    generator, rates = torch.Generator().manual_seed(0), []
    for step in range(1000):
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        objective.begin_step(64 * step, 64_000)
        output = model(batch, sample_posterior=True, return_posterior=True, generator=generator)
        terms = objective(batch, output.sample, output.latent_dist)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        objective.end_step(terms.statistics, 64)
        rates.append(terms.rate.mean().item())
    windows = np.array(rates).reshape(20, 50).mean(1) / target
    assert abs(windows - 1)[10:].max() < 0.2  # no big swings
    assert abs(windows - 1)[16:].max() < 0.05
    assert abs(math.log(objective.measured().kl_weight / start)) > 0.5  # and not by where it began


# --- config


@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Laplace(0.5), Bernoulli()], ids=str)
def test_config_builds_the_objective_that_it_describes(likelihood):
    name = type(likelihood).__name__.lower()
    config = ObjectiveConfig(name, scale=None if name == "bernoulli" else 0.5, kl_weight=0.1)
    assert config.build() == VAEObjective(likelihood, kl_weight=0.1)


@pytest.mark.parametrize("scale", ["learned", "optimal", "0.2", "2", "1e-1"])
def test_scale_is_read_from_flags_and_yaml(scale, tmp_path):
    config, _ = parse_settings(TRAININGS["train"], ["--objective.scale", scale])
    assert config.objective.scale == (scale if scale in ("learned", "optimal") else float(scale))
    config.save(tmp_path / "config.yaml")
    again, _ = parse_settings(TRAININGS["train"], ["--config", str(tmp_path / "config.yaml")])
    assert again == config and type(again.objective.scale) is type(config.objective.scale)


def test_config_measures_a_scale_of_a_run_only_with_its_value():
    config = ObjectiveConfig("laplace", scale="optimal", kl_weight=0.1, free_bits=1.0)
    assert config.build(0.5) == VAEObjective(Laplace(0.5), kl_weight=0.1, scale_varies=True)
    with pytest.raises(ValueError, match="scale optimal has a value only in the run that trains it"):
        config.build()
    with pytest.raises(ValueError, match=r"objective\.scale is 0\.05, not learned or optimal: leave out 0\.5"):
        ObjectiveConfig().build(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"scale": scale}, "objective.scale must be positive") for scale in (0.0, -1.0, math.nan, math.inf)),
        *(({"kl_weight": weight}, "objective.kl_weight must be at least 0") for weight in (-0.1, math.nan, math.inf)),
        (
            {"likelihood": "bernoulli", "scale": 0.5},
            r"scale 0\.5 would be ignored with objective\.likelihood bernoulli",
        ),
        ({"likelihood": "gausian"}, "objective.likelihood must be gaussian, laplace or bernoulli, got gausian"),
        ({"likelihood": "bernoulli", "scale": "learned"}, "set objective.likelihood to gaussian or laplace"),
        ({"scale": "best"}, "objective.scale must be positive and finite, learned, optimal or null, got best"),
        ({"kl_schedule": "ramp"}, "objective.kl_schedule must be constant, linear, cosine or cyclical, got ramp"),
        ({"kl_schedule": "linear"}, "rises over objective.kl_warmup_images, which must be at least 1, got 0"),
        ({"kl_warmup_images": 5}, "kl_warmup_images 5 would be ignored with objective.kl_schedule constant"),
        ({"kl_schedule": "cyclical", "kl_warmup_images": 5}, "set objective.kl_schedule to linear or cosine"),
        (
            {"kl_schedule": "cosine", "kl_warmup_images": 5, "kl_cycles": 2},
            "kl_cycles 2 would be ignored with objective.kl_schedule cosine",
        ),
        ({"kl_schedule": "cyclical", "kl_cycles": 0}, "objective.kl_cycles must be at least 1, got 0"),
        *(({"free_bits": bits}, "objective.free_bits must be at least 0 and finite") for bits in (-1.0, math.nan)),
        *(({"target_rate": rate}, "objective.target_rate must be positive") for rate in (0.0, math.nan, math.inf)),
        ({"target_rate": 9.0, "kl_schedule": "cyclical"}, "changes the weight of the rate, and so does a cyclical"),
        ({"perceptual": "vgg19"}, "objective.perceptual must be alex, vgg, squeeze or null, got vgg19"),
        ({"perceptual": "vgg", "perceptual_weight": 0.0}, "objective.perceptual_weight must be positive and finite"),
        ({"perceptual_weight": 2.0}, r"perceptual_weight 2\.0 would be ignored with objective\.perceptual null"),
        ({"equivariance": 1.5}, r"objective.equivariance must be in \[0, 1\], got 1.5"),
        ({"equivariance": 0.5, "transformations": 0}, r"objective.transformations must be at least 1, got 0"),
        ({"transformations": 2}, r"transformations 2 would be ignored with objective\.equivariance 0\.0"),
        (
            {"kl_weight": 0.0, "free_bits": 1.0},
            "free_bits 1.0 would be ignored with objective.kl_weight 0.0: set objective.kl_weight",
        ),
        ({"kl_weight": 0.0, "target_rate": 9.0}, "target_rate 9.0 would be ignored with objective.kl_weight 0.0"),
        (
            {"kl_weight": 0.0, "kl_schedule": "cyclical"},
            "kl_schedule cyclical would be ignored with objective.kl_weight 0.0",
        ),
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
        VAEObjective(Gaussian(1.0))(images.to(torch.uint8), images, posterior)
    with pytest.raises(ValueError, match="of the 2 images, got one of 1"):
        VAEObjective(Gaussian(1.0))(images, images, posterior)
