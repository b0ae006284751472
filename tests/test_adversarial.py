"""The discriminator against pix2pix written out, its losses against their papers, and a step however it is cut."""

import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_vae.losses.adversarial import (
    AdversarialConfig,
    Adversary,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    frozen,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)
from diffusers_vae.models import VAE

KINDS = ["hinge", "non-saturating"]
NORMS = ["spectral", "batch"]


def make_images(batch=3, channels=1, side=12, seed=0, dtype=torch.float32):
    return 2 * torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1


def make_logits(seed, batch=3, dtype=torch.float64):
    return 2 * torch.randn(batch, 1, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_discriminator(channels=1, width=4, layers=2, norm="spectral"):
    torch.manual_seed(0)
    return PatchDiscriminator(channels, width, layers, norm)


def make_generator():
    torch.manual_seed(1)
    return VAE(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, latent_channels=2)


def make_adversary(**settings):
    config = AdversarialConfig(weight=0.5, **settings)
    return Adversary(config, make_discriminator(norm=config.norm))


def gradients_of(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_equal(one, other):
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- architecture


def pix2pix(channels, width):
    """NLayerDiscriminator with three layers and batch norm, written out."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 8 * width, 4, 1, 1, bias=False), nn.BatchNorm2d(8 * width), nn.LeakyReLU(0.2),
        nn.Conv2d(8 * width, 1, 4, 1, 1),
    )  # fmt: skip


def test_is_the_discriminator_of_pix2pix():
    discriminator, reference = PatchDiscriminator(3, norm="batch"), pix2pix(3, 64)
    count = sum(parameter.numel() for parameter in discriminator.parameters())
    assert count == sum(parameter.numel() for parameter in reference.parameters()) == 2_765_633
    missing, unexpected = reference.load_state_dict(discriminator.main.state_dict(), strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} <= {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    images = make_images(2, 3, 40)
    torch.testing.assert_close(discriminator(images), reference(images))
    for name, values in discriminator.named_parameters():
        if name.endswith("weight"):
            center = 1.0 if values.ndim == 1 else 0.0
            assert values.mean().item() == pytest.approx(center, abs=0.01), name
            assert values.std().item() == pytest.approx(0.02, rel=0.2), name


@pytest.mark.slow
def test_with_spectral_norm_is_pix2pix_with_every_weight_divided_by_its_singular_value():
    discriminator = make_discriminator(3, layers=3)
    discriminator.iterate()
    values = make_images(2, 3, 40)
    for layer in discriminator.main:
        if isinstance(layer, nn.Conv2d):
            weight = layer.parametrizations.weight.original
            for _ in range(200):
                discriminator.iterate()
            weight = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
            values = F.conv2d(values, weight, layer.bias, layer.stride, 1)
        else:
            values = F.leaky_relu(values, 0.2)
    torch.testing.assert_close(discriminator(make_images(2, 3, 40)), values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_published_side(layers, side):
    images = make_images(1, 2, 128).requires_grad_()
    logits = make_discriminator(2, layers=layers)(images)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    seen = images.grad[0] != 0
    rows, columns = seen[0].any(1).nonzero(), seen[0].any(0).nonzero()
    assert seen.sum() == 2 * side * side
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == side


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_images_that_leave_no_patch_are_refused_and_the_smallest_give_one(layers):
    discriminator, smallest = make_discriminator(layers=layers), 3 * 2**layers
    assert discriminator(make_images(side=smallest)).shape == (3, 1, 1, 1)
    assert discriminator.main[-1].in_channels == 4 * min(2**layers, 8)
    with pytest.raises(ValueError, match=f"at least {smallest} pixels, got {smallest - 1}x{smallest - 1}"):
        discriminator(make_images(side=smallest - 1))
    with pytest.raises(ValueError, match=f"at least {smallest} pixels, got {smallest}x{smallest - 1}"):
        PatchDiscriminator.check((smallest, smallest - 1), layers)


# --- power iterations


@pytest.mark.parametrize("norm", NORMS)
def test_no_forward_changes_a_buffer(norm):
    adversary, images = make_adversary(norm=norm, r1_weight=1.0), make_images()
    discriminator = adversary.discriminator.train()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    adversary.generator_loss(images)
    adversary.discriminator_loss(images, -images)[0].mean().backward()
    assert_equal(before, discriminator.state_dict())
    assert torch.equal(discriminator(images), discriminator.eval()(images))


def test_every_begin_of_a_step_is_one_power_iteration_the_same_everywhere():
    one, other = make_adversary(start_images=10), make_adversary(start_images=10)
    layer = one.discriminator.main[2]
    weight = layer.parametrizations.weight.original.detach().flatten(1)
    v = layer.parametrizations.weight[0]._v.clone()
    one.begin_step(9)
    assert torch.equal(layer.parametrizations.weight[0]._v, v)  # not active yet
    one.begin_step(10)
    u = F.normalize(weight @ v, dim=0)
    torch.testing.assert_close(layer.parametrizations.weight[0]._u, u)
    torch.testing.assert_close(layer.parametrizations.weight[0]._v, F.normalize(weight.T @ u, dim=0))
    other.discriminator(make_images())
    with torch.autocast("cpu", torch.bfloat16):
        other.begin_step(10)
    assert_equal(one.discriminator.state_dict(), other.discriminator.state_dict())


@pytest.mark.slow
def test_after_many_iterations_the_largest_singular_value_is_one():
    discriminator = make_discriminator(layers=3)
    with torch.no_grad():
        discriminator.main[2].parametrizations.weight.original[0] *= 30
    for _ in range(500):
        discriminator.iterate()
    for layer in discriminator.main:
        if isinstance(layer, nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-3, atol=0)


# --- losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_their_definitions(kind):
    real, fake = make_logits(0), make_logits(1)
    if kind == "hinge":
        of_generator, of_real, of_fake = -fake, (1 - real).clamp(min=0), (1 + fake).clamp(min=0)
    else:
        of_generator, of_real, of_fake = -fake.sigmoid().log(), -real.sigmoid().log(), -(1 - fake.sigmoid()).log()
    torch.testing.assert_close(generator_loss(kind, fake), of_generator.mean((1, 2, 3)))
    expected = ((of_real + of_fake) / 2).mean((1, 2, 3))
    torch.testing.assert_close(discriminator_loss(kind, real, fake), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_push_logits_apart_and_together(kind):
    real, fake = make_logits(0).requires_grad_(), make_logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: generator_loss(kind, values), (fake,))
    assert torch.autograd.gradcheck(lambda *values: discriminator_loss(kind, *values), (real, fake))
    (up,) = torch.autograd.grad(generator_loss(kind, fake).sum(), fake)
    of_real, of_fake = torch.autograd.grad(discriminator_loss(kind, real, fake).sum(), (real, fake))
    assert (up < 0).all() and (of_real <= 0).all() and (of_fake >= 0).all() and of_real.any() and of_fake.any()


def test_lecam_penalty_equals_its_definition_and_has_its_gradient():
    real, fake = make_logits(0).requires_grad_(), make_logits(1).requires_grad_()
    expected = (real - -0.3).clamp(min=0) ** 2 + (0.7 - fake).clamp(min=0) ** 2
    torch.testing.assert_close(lecam_penalty(real, fake, 0.7, -0.3), expected.mean((1, 2, 3)))
    assert torch.autograd.gradcheck(lambda *values: lecam_penalty(*values, 0.7, -0.3), (real, fake))


def test_r1_penalty_of_a_linear_discriminator_is_half_its_squared_weight_over_the_patches():
    linear = nn.Conv2d(1, 1, 4, stride=4).double()  # four patches that do not overlap
    penalty = r1_penalty(linear, make_images(3, 1, 8, dtype=torch.float64))
    torch.testing.assert_close(penalty, (0.5 * linear.weight.square().sum() / 4).expand(3))
    penalty.sum().backward()
    torch.testing.assert_close(linear.weight.grad, 3 * linear.weight.detach() / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_r1_penalty_is_of_every_image_alone_and_float32_under_autocast(dtype):
    discriminator, images = make_discriminator(), make_images(5, 1, 20)
    expected = torch.cat([r1_penalty(discriminator, images[i : i + 1]) for i in range(5)])
    with torch.autocast("cpu", dtype):
        penalty = r1_penalty(discriminator, images)
    assert penalty.dtype == torch.float32 and not images.requires_grad
    torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=0)


def test_adaptive_weight_equals_the_gradients_norms():
    gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert adaptive_weight(gradient, gradient / 5).item() == pytest.approx(5, rel=1e-3)
    assert adaptive_weight(torch.full((4,), 0.3), torch.zeros(4)).item() == pytest.approx(0.6 / 1e-4)
    assert adaptive_weight(1e9 * gradient, gradient).item() == pytest.approx(1e9, rel=1e-3)
    assert adaptive_weight(0 * gradient, gradient).item() == 0


def assert_finite_differences(function, values):
    """The gradient of function at values, a few of them changed in place, against central differences."""
    (gradient,) = torch.autograd.grad(function(), values)
    gradient, flat, eps = gradient.flatten(), values.detach().view(-1), 1e-6
    assert gradient.any()
    for place in range(0, len(flat), max(1, len(flat) // 5)):
        before, around = flat[place].item(), []
        for change in (eps, -eps):
            flat[place] = before + change
            around.append(function().item())
        flat[place] = before
        difference = (around[0] - around[1]) / (2 * eps)
        assert difference == pytest.approx(gradient[place].item(), rel=1e-4, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_has_the_gradient_of_its_finite_differences(kind, norm):
    adversary = make_adversary(loss=kind, norm=norm, lecam_weight=0.1, r1_weight=10.0)
    discriminator = adversary.discriminator.double()
    adversary.restore({"factor": 1.0, "real_average": 0.5, "fake_average": -0.5, "average_weight": 0.3})
    images, reconstructions = make_images(dtype=torch.float64), make_images(seed=1, dtype=torch.float64)
    reconstructions.requires_grad_()
    assert_finite_differences(lambda: adversary.generator_loss(reconstructions).mean(), reconstructions)
    for layer in (discriminator.main[0], discriminator.main[2]):
        weight = layer.parametrizations.weight.original if norm == "spectral" else layer.weight
        assert_finite_differences(lambda: adversary.discriminator_loss(images, reconstructions)[0].mean(), weight)


@pytest.mark.slow
def test_learns_to_tell_images_from_reconstructions():
    adversary, images = make_adversary(lecam_weight=0.01, r1_weight=0.01, adaptive=False), make_images(8)
    reconstructions = F.avg_pool2d(images, 3, stride=1, padding=1)
    optimizer = torch.optim.Adam(adversary.discriminator.parameters(), lr=1e-2, betas=(0.5, 0.9))
    losses = []
    for step in range(60):
        adversary.begin_step(8 * step)
        loss, statistics = adversary.discriminator_loss(images, reconstructions)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        adversary.end_step(statistics)
        losses.append(loss.mean().item())
    assert losses[-1] < 0.5 < losses[0]
    assert adversary.state()["real_average"] > adversary.state()["fake_average"]


# --- precision


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("norm", NORMS)
def test_logits_are_float32_under_autocast(norm, device):
    discriminator, images = make_discriminator(norm=norm).to(device), make_images().to(device)
    with torch.autocast(device, torch.bfloat16):
        discriminator.iterate()  # CUDA's autocast, not the CPU's, has products of matrix and vector in half precision
    expected = discriminator(images)
    with torch.autocast(device, torch.bfloat16):
        logits, of_half = discriminator(images), discriminator(images.bfloat16())
    assert logits.dtype == of_half.dtype == torch.float32
    assert not torch.equal(logits, expected)  # the convolutions were in half precision
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    with torch.autocast(device, torch.float16):
        assert torch.equal(discriminator(images), expected)
        assert torch.is_autocast_enabled(device)


# --- isolation


def one_step(adversary, generator, images, order, autocast=False):
    """Gradients of generator and discriminator after the backwards that `order` names."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reconstructions = generator(images).sample
        for name in order:
            if name == "generator":
                adversary.generator_loss(reconstructions).mean().backward(retain_graph=True)
            else:
                adversary.discriminator_loss(images, reconstructions)[0].mean().backward(retain_graph=True)
    return gradients_of(generator), gradients_of(adversary.discriminator)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_neither_partys_backward_leaves_a_trace_in_the_others_gradients(norm, autocast):
    def step(*order):
        return one_step(make_adversary(norm=norm, r1_weight=1.0), make_generator(), make_images(), order, autocast)

    of_generator, nothing = step("generator")
    assert of_generator and not nothing
    nothing, of_discriminator = step("discriminator")
    assert of_discriminator and not nothing
    assert len(of_discriminator) == len(list(make_discriminator(norm=norm).parameters()))
    for order in (("generator", "discriminator"), ("discriminator", "generator")):
        both = step(*order)
        assert_equal(both[0], of_generator)
        assert_equal(both[1], of_discriminator)


def test_frozen_gives_back_what_was_and_lets_the_gradient_through():
    discriminator, images = make_discriminator(), make_images().requires_grad_()
    discriminator.main[0].bias.requires_grad_(False)
    with pytest.raises(KeyError), frozen(discriminator):
        logits = discriminator(images)
        raise KeyError
    left = [name for name, parameter in discriminator.named_parameters() if not parameter.requires_grad]
    assert left == ["main.0.bias"]
    logits.sum().backward()  # after the with: what counts is when the forward was
    assert images.grad.any() and not gradients_of(discriminator)


# --- a step


def run_steps(adversary, cuts, sides=(12, 12, 12)):
    """Gradients, readings and states of a step for each of `sides`, to which its 8 images of 12 pixels a side are
    scaled; they come in micro-batches of the numbers `cuts`.
    """
    generator = make_generator()
    optimizer = torch.optim.SGD(adversary.discriminator.parameters(), lr=0.1)
    seen = []
    for step, side in enumerate(sides):
        images, size = F.interpolate(make_images(8, seed=step), (side, side)), (side / 12) ** 2
        readings, total = adversary.begin_step(8 * step), {}
        for part in images.split(cuts):
            share = len(part) / len(images)
            reconstructions = generator(part).sample
            error = (reconstructions - part).square().flatten(1).sum(1)
            judged = adversary.generator_loss(reconstructions)
            statistics = adversary.gradients(error, judged, generator.decoder.conv_out.weight, size)
            loss, of_discriminator = adversary.discriminator_loss(part, reconstructions)
            ((error + adversary.weight_for(size) * judged).mean() * share).backward()
            (loss.mean() * share).backward()
            for name, value in (statistics | of_discriminator).items():
                total[name] = total.get(name, 0) + share * value
        adversary.end_step(total)
        seen.append((gradients_of(generator), gradients_of(adversary.discriminator), readings, adversary.state()))
        optimizer.step()
        optimizer.zero_grad()
        generator.zero_grad()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_however_its_batch_is_cut(kind):
    settings = {"loss": kind, "lecam_weight": 0.3, "r1_weight": 1.0, "warmup_images": 32}
    whole, *cuts = (run_steps(make_adversary(**settings), cuts, (12, 24, 16)) for cuts in ([8], [3, 5], [2, 3, 3]))
    for cut in cuts:
        for one, other in zip(whole, cut, strict=True):
            for expected, gradients in zip(one[:2], other[:2], strict=True):
                for name in expected:
                    torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=2e-5)
            assert other[2] == pytest.approx(one[2], rel=1e-5)
            assert other[3] == pytest.approx(one[3], rel=1e-5, abs=1e-6)
    assert len({one[2]["adversarial_weight"] for one in whole}) == 3


@pytest.mark.slow
def test_the_generators_gradient_keeps_its_part_where_the_size_changes_from_step_to_step():
    """Half of the reconstruction's, within a factor of 3. With the factor of the step before it, it would be up to 16
    times that.
    """
    adversary, generator, images = make_adversary(), make_generator(), make_images(side=48)
    last_layer, found, before = generator.decoder.conv_out.weight, [], []
    for step, side in enumerate((48, 12, 48, 24, 12, 36, 24)):
        resized, size = F.interpolate(images, (side, side)), (side / 48) ** 2
        reconstructions = generator(resized).sample
        losses = (reconstructions - resized).square().sum() / 3, adversary.generator_loss(reconstructions).mean()
        norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm().item() for loss in losses]
        adversary.begin_step(step)
        found.append(adversary.weight_for(size) * norms[1] / norms[0])
        before.append(norms[0] / norms[1])
        adversary.end_step(adversary.gradients(*losses, last_layer, size))
    assert found[0] == 0 and all(0.5 / 3 < each < 0.5 * 3 for each in found[1:])
    ratios = [after / now for after, now in pairwise(before)]
    assert max(ratios) > 6 and min(ratios) < 1 / 6


def test_the_factor_is_limited_at_the_size_of_the_images():
    limited, free = make_adversary(max_factor=100.0), make_adversary()
    statistics = {"reconstruction_gradient": torch.full((4,), 1e4), "generator_gradient": torch.full((4,), 10.0)}
    for adversary in (limited, free):
        adversary.begin_step(0)
        adversary.end_step(statistics)
    assert limited.begin_step(3) == {"adversarial_weight": 50}
    assert free.begin_step(3)["adversarial_weight"] == pytest.approx(500, rel=1e-3)
    assert limited.weight_for(0.5) == 50
    assert limited.weight_for(0.01) == free.weight_for(0.01) == pytest.approx(5, rel=1e-3)


def test_the_weight_makes_the_generators_gradient_as_large_as_that_of_the_step_before():
    adversary, generator, images = make_adversary(start_images=8, warmup_images=16), make_generator(), make_images()
    last_layer = generator.decoder.conv_out.weight
    reconstructions = generator(images).sample
    error, judged = (reconstructions - images).square().sum() / 3, adversary.generator_loss(reconstructions)
    assert adversary.begin_step(0) == {"adversarial_weight": 0.0} and not adversary.active
    assert adversary.gradients(error, judged, last_layer) == {}
    adversary.end_step({})
    assert adversary.begin_step(8) == {"adversarial_weight": 0.0} and adversary.active
    statistics = adversary.gradients(error, judged, last_layer)
    adversary.end_step(statistics)
    assert adversary.begin_step(15) == {"adversarial_weight": adversary.weight_for()}
    (judged.mean() * adversary.weight_for()).backward(retain_graph=True)
    by_generator = last_layer.grad.norm().item()
    last_layer.grad = None
    error.backward()
    assert by_generator == pytest.approx(0.5 * 8 / 16 * last_layer.grad.norm().item(), rel=0.01)
    assert last_layer.grad.norm().item() == pytest.approx(statistics["reconstruction_gradient"].norm().item())


def test_without_adaption_the_weight_is_the_configs_and_nothing_is_measured():
    adversary = make_adversary(adaptive=False, warmup_images=10)
    assert adversary.begin_step(4) == {"adversarial_weight": 0.25}
    assert adversary.gradients(torch.ones(3), torch.ones(3), None) == {}
    assert adversary.discriminator_loss(make_images(), make_images(seed=1))[1] == {}
    adversary.end_step({})
    assert adversary.begin_step(100) == {"adversarial_weight": 0.5}


def test_penalties_are_weighted_and_lecam_averages_those_of_the_steps_before_without_bias():
    adversary, logits = make_adversary(lecam_weight=0.7, r1_weight=3.0, adaptive=False), [3.0, -1.0, 5.0, 0.5]
    images, reconstructions = make_images(), make_images(seed=1)
    without = make_adversary(adaptive=False)
    for each in (adversary, without):
        each.begin_step(0)
    plain = without.discriminator_loss(images, reconstructions)[0]
    plain = plain + 3 * r1_penalty(without.discriminator, images)
    torch.testing.assert_close(adversary.discriminator_loss(images, reconstructions)[0], plain)
    for value in logits:
        adversary.end_step({"real_logits": torch.tensor(value), "fake_logits": torch.tensor(-value)})
    decays = [0.99**age for age in (3, 2, 1, 0)]
    mean = sum(decay * value for decay, value in zip(decays, logits, strict=True)) / sum(decays)
    assert adversary.state()["real_average"] == pytest.approx(mean)
    assert adversary.state()["fake_average"] == pytest.approx(-mean)
    real, fake = adversary.discriminator(images), adversary.discriminator(reconstructions)
    loss, statistics = adversary.discriminator_loss(images, reconstructions)
    torch.testing.assert_close(loss, plain + 0.7 * lecam_penalty(real, fake, mean, -mean))
    torch.testing.assert_close(statistics["real_logits"], real.mean())
    torch.testing.assert_close(statistics["fake_logits"], fake.mean())


@pytest.mark.slow
def test_goes_on_bit_by_bit_from_a_state_that_was_written_as_json():
    settings = {"lecam_weight": 0.3, "r1_weight": 1.0}
    adversary = make_adversary(**settings)
    run_steps(adversary, [8])
    state, weights = json.loads(json.dumps(adversary.state())), adversary.discriminator.state_dict()
    other = make_adversary(**settings)
    other.discriminator.load_state_dict({name: value.clone() for name, value in weights.items()})
    other.restore(state)
    for one, again in zip(run_steps(adversary, [8]), run_steps(other, [8]), strict=True):
        assert_equal(one[0], again[0])
        assert_equal(one[1], again[1])
        assert one[2:] == again[2:]


# --- config


def test_rises_from_the_start_over_the_warm_up():
    config = AdversarialConfig(weight=0.5, start_images=100, warmup_images=50)
    rises = [config.rise(images_seen) for images_seen in (0, 99, 100, 124, 149, 150, 10_000)]
    assert rises == [0, 0, 0.02, 0.5, 1, 1, 1]
    assert [AdversarialConfig(weight=0.5, start_images=100).rise(images_seen) for images_seen in (99, 100)] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"weight": value}, "adversarial.weight must be at least 0 and finite") for value in (-1.0, math.nan)),
        ({"r1_weight": math.inf}, "adversarial.r1_weight must be at least 0 and finite, got inf"),
        ({"lecam_weight": -0.1}, "adversarial.lecam_weight must be at least 0 and finite, got -0.1"),
        ({"start_images": -1}, "adversarial.start_images must be at least 0, got -1"),
        ({"warmup_images": -1}, "adversarial.warmup_images must be at least 0, got -1"),
        ({"layers": 0}, "adversarial.layers must be at least 1, got 0"),
        ({"width": 0}, "adversarial.width must be at least 1, got 0"),
        ({"loss": "wasserstein"}, "adversarial.loss must be hinge or non-saturating, got wasserstein"),
        ({"max_factor": 0.0}, "adversarial.max_factor must be positive and finite or null, got 0.0"),
        ({"norm": "group"}, "adversarial.norm must be spectral or batch, got group"),
        ({"learning_rate": 0.0}, "adversarial.learning_rate must be positive and finite or null, got 0.0"),
    ],
    ids=str,
)
def test_config_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**settings)
