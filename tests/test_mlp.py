"""MLPVAE held against the perceptron of the articles, and its interface against VAE's."""

import pytest
import torch
from support.models import same
from torch import nn

from diffusers_vae import MLPVAE
from diffusers_vae.images.ranges import to_model_range, to_unit_range
from diffusers_vae.models import VAEOutput


class Perceptron(nn.Module):
    """As the articles define it: on flattened [0, 1] pixels, mean and log-variance by layers of their own."""

    def __init__(self, pixels, hidden_dim, latent_dim):
        super().__init__()
        self.hidden = nn.Linear(pixels, hidden_dim)
        self.mean, self.logvar = nn.Linear(hidden_dim, latent_dim), nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, pixels), nn.Sigmoid()
        )

    def encode(self, pixels):
        hidden = torch.relu(self.hidden(pixels.flatten(1)))
        return self.mean(hidden), self.logvar(hidden)


CONFIGS = {
    "article": {"latent_dim": 2},
    "colour": {"image_size": (6, 10), "in_channels": 3, "hidden_dim": 16, "latent_dim": 5, "scaling_factor": 2.0},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return MLPVAE(**request.param).eval()


def random_pixels(model):
    size = model.config.image_size
    shape = (3, model.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def random_images(model):
    return to_model_range(random_pixels(model)).to(model.dtype)


def generator():
    return torch.Generator().manual_seed(2)


@torch.no_grad()
def test_equal_to_the_articles(model):
    """The same seed gives the same initial weights."""
    torch.manual_seed(0)
    reference = Perceptron(model.decoder[2].out_features, model.config.hidden_dim, model.config.latent_dim)
    assert model.num_parameters() == sum(parameter.numel() for parameter in reference.parameters())

    pixels = random_pixels(model)
    posterior = model.encode(to_model_range(pixels)).latent_dist
    mean, logvar = reference.encode(pixels)
    torch.testing.assert_close(posterior.mean, mean[:, :, None, None])
    torch.testing.assert_close(posterior.logvar, logvar[:, :, None, None])
    rate = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=1)  # as the articles write it
    torch.testing.assert_close(posterior.kl(), rate)

    probabilities = to_unit_range(model.decode(posterior.mode()).sample)
    torch.testing.assert_close(probabilities.flatten(1), reference.decoder(mean))


@torch.no_grad()
def test_shapes_and_ranges(model):
    images = random_images(model)
    posterior = model.encode(images).latent_dist
    assert posterior.mean.shape == posterior.sample().shape == (3, model.config.latent_dim, 1, 1)
    far = torch.full_like(posterior.mean, 1000.0)
    sample = torch.cat([model.decode(latents).sample for latents in (posterior.mean, far, -far)])
    assert sample.shape == (9, *images.shape[1:])
    assert sample.min() == -1 and sample.max() == 1


@torch.no_grad()
def test_forward(model):
    images = random_images(model)
    (posterior,) = model.encode(images, return_dict=False)
    (reconstructions,) = model.decode(posterior.mode(), return_dict=False)
    assert torch.equal(model(images).sample, reconstructions)
    assert torch.equal(model(images, return_dict=False)[0], reconstructions)
    drawn = model(images, sample_posterior=True, generator=generator()).sample
    assert torch.equal(drawn, model.decode(posterior.sample(generator())).sample)
    assert not torch.equal(drawn, reconstructions)
    output = model(images, return_posterior=True)
    assert type(output) is VAEOutput
    sample, latent_dist = model(images, return_posterior=True, return_dict=False)
    assert torch.equal(sample, output.sample) and torch.equal(sample, reconstructions)
    assert torch.equal(latent_dist.mean, posterior.mean) and torch.equal(output.latent_dist.mean, posterior.mean)


@pytest.mark.parametrize("save", [{}, {"safe_serialization": False}, {"max_shard_size": "3KB"}])
def test_save_and_load(model, save, tmp_path):
    model.register_to_config(scaling_factor=0.7, shift_factor=-0.2)
    model.save_pretrained(tmp_path / "vae", **save)
    loaded, report = MLPVAE.from_pretrained(tmp_path, subfolder="vae", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.scaling_factor == 0.7 and loaded.config.shift_factor == -0.2
    assert loaded.image_shape == model.image_shape
    assert same(model.state_dict(), loaded.state_dict())
    assert torch.equal(model(random_images(model)).sample, loaded(random_images(model)).sample)


def test_autocast(model):
    nn.init.constant_(model.decoder[2].bias, -8)  # near -1, bfloat16 knows -1 and -0.996 only
    with torch.autocast("cpu", torch.bfloat16):
        output = model(random_images(model).bfloat16(), return_posterior=True)
    assert output.latent_dist.mean.dtype == output.latent_dist.kl().dtype == torch.float32
    assert output.sample.dtype == torch.float32
    assert (output.sample > -1).all() and (output.sample < -0.996).all()
    (output.sample.sum() + output.latent_dist.kl().sum()).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@torch.no_grad()
def test_half_model(model, dtype):
    model = model.to(dtype)
    posterior = model.encode(random_images(model)).latent_dist
    assert posterior.mean.dtype == torch.float32
    assert model.decode(posterior.sample()).sample.dtype == torch.float32


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(1, 1, 30, 28), "image_size is 28x28, got 30x28"),
        (torch.zeros(1, 1, 1, 784), "image_size is 28x28, got 1x784"),
        (torch.zeros(1, 3, 28, 28), "images must have 1 channels as in the model's config, got 3"),
        (torch.zeros(28, 28), r"\(batch, channels, height, width\), got \(28, 28\)"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), r"torch.uint8; diffusers_vae\.images\.ranges\.to_model_range"),
        (torch.zeros(1, 1, 28, 28).half(), "model's dtype, torch.float32, got torch.float16"),
    ],
)
def test_wrong_images(images, message):
    model = MLPVAE()
    for call in (model.encode, model):
        with pytest.raises(ValueError, match=message):
            call(images)


@pytest.mark.parametrize(
    "latents, message",
    [
        (torch.zeros(1, 3, 1, 1), "latents must have 2 channels as in the model's config, got 3"),
        (torch.zeros(1, 2, 2, 1), r"shape \(batch, 2, 1, 1\), got \(1, 2, 2, 1\)"),
        (torch.zeros(1, 2), r"got \(1, 2\)"),
        (torch.zeros(1, 2, 1, 1, dtype=torch.int64), "latents must be floating point, got torch.int64"),
    ],
)
def test_wrong_latents(latents, message):
    with pytest.raises(ValueError, match=message):
        MLPVAE().decode(latents)
