"""Every term of the objective in a step and in a run, compared with its definition."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from support.batches import epoch_batches
from support.runs import TINY_MLP, TINY_VAE, assert_same_gradient, fit, records, tiny, use_random_networks

from diffusers_vae import VAE, cli
from diffusers_vae.data import DataConfig, load_data, step_generator
from diffusers_vae.data.sets import ReadImages
from diffusers_vae.engine.config import OptimizerConfig
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.latents.statistics import draw
from diffusers_vae.losses import equivariance
from diffusers_vae.losses.adversarial import AdversarialConfig, PatchDiscriminator
from diffusers_vae.losses.objective import Gaussian, ObjectiveConfig, VAEObjective, kl_to_standard_normal
from diffusers_vae.losses.perceptual import LPIPS
from diffusers_vae.models import ModelConfig
from diffusers_vae.tasks.autoencoder import summary, train
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.autoencoder_data import load_run_data
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep, build_model

DATA = DataConfig(resolution=24)
VALUES = 24 * 24
JUDGED = AdversarialConfig(weight=30.0, adaptive=False, warmup_images=4, width=8, layers=1)
TERMS = {
    "distortion": {"kl_weight": 0.0},
    "rate": {"kl_weight": 3.0},
    "learned scale": {"kl_weight": 0.0, "scale": "learned"},
    "perceptual": {"kl_weight": 0.0, "perceptual": "squeeze", "perceptual_weight": 0.7},
    "generator": {"kl_weight": 0.0},
    "equivariance": {"kl_weight": 0.0, "equivariance": 1.0},
}


def settings(output_dir, objective, adversarial=None, **run):
    config = tiny(output_dir, TINY_VAE, **run)
    return dataclasses.replace(
        config,
        data=DATA,
        objective=ObjectiveConfig(**{"scale": 0.5} | objective),
        adversarial=adversarial or AdversarialConfig(),
        evaluation=EvaluationConfig(max_images=10),
    )


def step_of(config):
    """A step as a run begins it."""
    accelerator = Accelerator(cpu=True)
    return AutoencoderStep(load_run_data(config, accelerator).config, accelerator)


class Step:
    """The step that a term's settings make of 3 digits, in float64, with equal weights and noise for all of them."""

    def __init__(self, term):
        self.config = settings("unused", TERMS[term], JUDGED if term == "generator" else None)
        data = load_run_data(self.config, Accelerator(cpu=True))
        self.step = AutoencoderStep(data.config, data.accelerator)
        torch.manual_seed(0)
        self.model = build_model(data.config).double()
        self.parts = self.model.autoencoder if term == "learned scale" else self.model
        if self.step.discriminator:
            self.step.discriminator.module.double()
        if self.step.perceptual:
            self.step.perceptual.double()
        self.step.begin(0, 100, 1e-3)
        self.read = ReadImages(data.train_set.pixels[:3].double() / 255, [0, 1, 2])
        self.draws = self.step.random_inputs(3, torch.Generator().manual_seed(1))
        self.draws["noise"] = self.draws["noise"].double()
        self.images = to_model_range(self.read.pixels)

    def __call__(self):
        return self.step(self.model, self.step.batch(self.read, self.draws))

    def along(self, parameters):
        """The derivative of the loss along a random direction of the parameters: by autograd, and by differences."""
        parameters = list(parameters)
        generator = torch.Generator().manual_seed(2)
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        gradients = torch.autograd.grad(self().total_loss, parameters, allow_unused=True)
        by_autograd = sum((g * way).sum().item() for g, way in zip(gradients, ways, strict=True) if g is not None)
        losses = []
        with torch.no_grad():
            for sign in (1, -2):
                for parameter, way in zip(parameters, ways, strict=True):
                    parameter.add_(way, alpha=sign * 1e-8)
                losses.append(self().total_loss.item())
        return by_autograd, (losses[0] - losses[1]) / 2e-8


class TestGradient:
    @pytest.mark.slow
    @pytest.mark.parametrize("term", TERMS)
    def test_is_that_of_finite_differences_in_encoder_and_decoder(self, term):
        step = Step(term)
        for part in (step.parts.encoder, step.parts.decoder):
            by_autograd, by_differences = step.along(part.parameters())
            assert math.isfinite(by_autograd) and abs(by_autograd) > 1e-3
            assert by_autograd == pytest.approx(by_differences, rel=1e-4)

    def test_of_a_learned_scale(self):
        step = Step("learned scale")
        by_autograd, by_differences = step.along([step.model.slow_log_scale])
        assert by_autograd == pytest.approx(by_differences, rel=1e-6) and abs(by_autograd) > 1

    @pytest.mark.slow
    @pytest.mark.parametrize("term", ["rate", "perceptual", "generator"])
    def test_of_the_term_alone_reaches_the_parts_that_it_depends_on(self, term):
        """What the term adds to the gradient without it; the rate knows no decoder."""
        gradients = []
        for name in ("distortion", term):
            step = Step(name)
            loss, parts = step().total_loss, (step.parts.encoder, step.parts.decoder)
            gradients.append([torch.autograd.grad(loss, list(p.parameters()), retain_graph=True) for p in parts])
        for part, (without, with_it) in zip(("encoder", "decoder"), zip(*gradients, strict=True), strict=True):
            added = torch.cat([(b - a).flatten() for a, b in zip(without, with_it, strict=True)])
            assert added.isfinite().all()
            assert (added.norm() > 1e-4) == (part == "encoder" or term != "rate")


class TestLoss:
    """A term adds its weight times itself, and nothing else."""

    @staticmethod
    def added(term):
        plain, step = Step("distortion")(), Step(term)
        terms = step()
        torch.testing.assert_close(terms.per_image["distortion"], plain.per_image["distortion"], rtol=1e-12, atol=0)
        return (terms.total_loss - plain.total_loss).item(), terms, step

    def test_rate(self):
        added, terms, _ = self.added("rate")
        assert added == pytest.approx(3 * terms.per_image["rate"].mean().item(), rel=1e-9)

    @pytest.mark.slow
    def test_lpips_counts_once_per_value_of_the_image(self):
        added, terms, step = self.added("perceptual")
        with torch.no_grad():
            reconstructions = step.model(step.images, noise=step.draws["noise"]).sample
            distance = LPIPS("squeeze").double()(step.images, reconstructions)
        torch.testing.assert_close(terms.per_image["perceptual"], distance)
        assert added == pytest.approx(0.7 * VALUES * distance.mean().item(), rel=1e-9) and added > 1e-3

    def test_generator(self):
        added, terms, step = self.added("generator")
        with torch.no_grad():
            reconstructions = step.model(step.images, noise=step.draws["noise"]).sample
            judged = -step.step.adversary.discriminator(reconstructions).flatten(1).mean(1)
        torch.testing.assert_close(terms.per_image["generator"], judged)
        assert added == pytest.approx(30 / 4 * judged.mean().item(), rel=1e-9) and added != 0

    def test_equivariance_compares_with_transformed_images(self):
        step = Step("equivariance")
        _, turned = equivariance.draw(step.draws["chances"][0], 1.0, (12, 12), 2)
        with torch.no_grad():
            posterior = step.model.encode(step.images).latent_dist
            latents = posterior.mean + posterior.std * step.draws["noise"]
            reconstructions = step.model.decode(turned.latents(latents)).sample
            error = (turned.images(step.images) - reconstructions).square().flatten(1).sum(1) / (2 * 0.5**2)
            terms = step()
        assert turned.size != (12, 12) and reconstructions.shape[-1] < 24
        assert terms.loss.item() == pytest.approx(error.mean().item(), rel=1e-6)

    def test_equivariance_sees_smaller_images_through_the_encoder_too(self):
        step = Step("equivariance")
        step.step.config = dataclasses.replace(
            step.config, objective=dataclasses.replace(step.config.objective, equivariance=0.5)
        )
        step.draws["chances"] = torch.tensor([[0.9, 0.5, 0.5, 0.1]]).expand(3, -1)
        before, _ = equivariance.draw(step.draws["chances"][0], 0.5, (12, 12), 2)
        height, width = before.size
        with torch.no_grad():
            smaller = before.images(step.images)
            reconstructions = step.model(smaller, noise=step.draws["noise"][..., :height, :width]).sample
            error = (smaller - reconstructions).square().flatten(1).sum(1) / (2 * 0.5**2)
            assert step().loss.item() == pytest.approx(error.mean().item(), rel=1e-9)


class TestLoggedLoss:
    """The `loss` in the log of the training is the one in evaluation.json, of the same images and noise."""

    @pytest.mark.slow
    @pytest.mark.parametrize("networks", [False, True], ids=["alone", "with LPIPS and a discriminator"])
    @pytest.mark.parametrize("scale", [0.1, "learned", "optimal"])
    def test_is_that_of_the_evaluation(self, scale, networks):
        objective = {"scale": scale, "kl_weight": 0.3} | ({"perceptual": "squeeze"} if networks else {})
        data = load_run_data(settings("unused", objective, JUDGED if networks else None), Accelerator(cpu=True))
        step = AutoencoderStep(data.config, data.accelerator)
        torch.manual_seed(0)
        model = build_model(data.config)
        heldout = data.heldout.first(6)
        draws = step.random_inputs(6, torch.Generator().manual_seed(1))
        standard = DiagonalGaussianDistribution(torch.zeros(6, 8, 12, 12))
        draws["noise"] = next(draw(standard, range(6), 0, 1))  # the evaluation's
        if scale == "learned":
            torch.nn.init.constant_(model.slow_log_scale, -0.2)
        read = ReadImages(heldout.pixels.float() / 255, list(range(6)))
        step.begin(0, 12, 1e-3)
        step.end(step(model, step.batch(read, draws)).statistics, 6)  # from now on, an optimal scale is known
        step.begin(6, 12, 1e-3)
        terms = step(model, step.batch(read, draws))
        measured = step.measured(model)
        autoencoder = model.autoencoder if scale == "learned" else model
        report = evaluate(autoencoder.eval(), heldout, measured, EvaluationConfig())
        assert scale == 0.1 or report.scale not in (0.1, 1.0)
        assert terms.loss.item() == pytest.approx(report.loss, rel=1e-5)
        assert (terms.total_loss.item() == terms.loss.item()) == (not networks)


class TestTransformations:
    """Of the parts of a step."""

    @staticmethod
    def config(output_dir, micro_steps, **objective):
        config = settings(
            output_dir, {"equivariance": 0.5} | objective, AdversarialConfig(weight=0.1, width=8, layers=1),
            batch_size=24, max_images=80, epochs=9, log_every=1, checkpoint_every=24, keep_checkpoints=9,
            gradient_accumulation_steps=micro_steps, ema_decay=None,
        )  # fmt: skip
        data = dataclasses.replace(DATA, heldout_fraction=0.965)  # 63 images: the third step is of 15
        optimizer = OptimizerConfig(max_grad_norm=None, warmup_images=1000)
        return dataclasses.replace(config, data=data, optimizer=optimizer)

    def test_each_part_has_its_own_and_the_first_that_of_the_whole_step(self):
        one, four = (step_of(self.config("unused", 4, transformations=parts)) for parts in (1, 4))
        one, four = (step.random_inputs(24, torch.Generator().manual_seed(1)) for step in (one, four))
        assert torch.equal(one["noise"], four["noise"]) and len(one["chances"].unique(dim=0)) == 1
        assert torch.equal(one["chances"][:6], four["chances"][:6])
        parts = four["chances"].view(4, 6, -1)
        assert (parts == parts[:, :1]).all() and len(four["chances"].unique(dim=0)) == 4

    def test_a_smaller_batch_is_one_part(self):
        step = step_of(self.config("unused", 4, transformations=4))
        chances = step.random_inputs(15, torch.Generator().manual_seed(1))["chances"]
        assert chances.shape == (15, 4) and len(chances.unique(dim=0)) == 1

    @pytest.mark.slow
    def test_training_does_not_depend_on_how_the_parts_are_cut(self, tmp_path):
        objective = {"transformations": 2, "scale": "optimal", "free_bits": 1.0, "target_rate": 9.0, "kl_weight": 0.1}
        for micro_steps in (2, 4):
            fit(self.config(tmp_path / f"{micro_steps}", micro_steps, **objective))
        assert_same_gradient(tmp_path / "2", tmp_path / "4", 24)
        first, second = (records(tmp_path / name, "train") for name in ("2", "4"))
        assert [record["images_seen"] for record in first] == [24, 48, 63, 87]
        for name in first[0].keys() - {"kind"}:
            assert [record[name] for record in second] == pytest.approx([record[name] for record in first], rel=1e-4)

    @pytest.mark.parametrize("micro_steps", [1, 3])
    def test_forwards_with_images_of_two_parts_are_refused(self, micro_steps, tmp_path):
        with pytest.raises(ValueError, match=rf"multiple of objective\.transformations, 2, .* got 1 x {micro_steps}"):
            fit(self.config(tmp_path / "run", micro_steps, transformations=2))


RUN = {"max_images": 150, "batch_size": 30, "log_every": 30, "checkpoint_every": 30, "keep_checkpoints": 9}
START, WARMUP, WEIGHT, OWN_RATE = 60, 45, 0.3, 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps, all kept, without clipping; a discriminator joins at the third, at full weight in the fifth."""
    config = settings(
        tmp_path_factory.mktemp("run") / "run",
        {
            "scale": "learned", "kl_schedule": "linear", "kl_warmup_images": 100, "perceptual": "squeeze",
            "perceptual_weight": 0.3,
        },
        AdversarialConfig(
            weight=WEIGHT, start_images=START, warmup_images=WARMUP, width=8, layers=2, learning_rate=OWN_RATE
        ),
        ema_decay=None,
        **RUN,
    )  # fmt: skip
    optimizer = OptimizerConfig(schedule="constant", warmup_images=0, max_grad_norm=None)
    config = dataclasses.replace(config, optimizer=optimizer)
    train(config)
    return config


class Recomputed:
    """What the step after `images_seen` images begins with, and its reconstructions and losses, by plain formulas."""

    def __init__(self, run, images_seen):
        self.checkpoint = self.of(run, images_seen)
        state = load_file(self.checkpoint / "model.safetensors")
        self.log_scale = (10 * state.pop("slow_log_scale")[0]).requires_grad_()
        self.model = run.model.build(1, (24, 24))
        self.model.load_state_dict({name.removeprefix("autoencoder."): each for name, each in state.items()})
        self.discriminator = PatchDiscriminator(1, 8, 2)
        self.discriminator.load_state_dict(load_file(self.checkpoint / "discriminator.safetensors"))
        self.discriminator.iterate()
        train_set = load_data(run.data)[0]
        (micro_batch,) = next(epoch_batches(len(train_set), 30, 0, 0, start=images_seen))
        self.images = to_model_range(train_set.pixels[micro_batch.indices])
        noise = torch.randn(30, 4, 12, 12, generator=step_generator(0, 0, images_seen, torch.device("cpu")))
        output = self.model(self.images, noise=noise, return_posterior=True)
        self.reconstructions = output.sample
        error = (self.images - output.sample).square().sum() / 30 / (2 * (2 * self.log_scale).exp())
        rate = kl_to_standard_normal(output.latent_dist).mean()
        distance = LPIPS("squeeze")(self.images, output.sample).mean()
        kl_weight = min(1.0, images_seen / 100)
        self.loss = error + VALUES * self.log_scale + kl_weight * rate + 0.3 * VALUES * distance
        self.judgement = -self.discriminator(output.sample).mean()

    @staticmethod
    def of(run, images_seen):
        return Path(run.run.output_dir) / "checkpoints" / f"images-{images_seen:012d}"

    def factor(self):
        """Esser et al. 2021, equation 7."""
        last = self.model.decoder.conv_out.weight
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (self.loss, self.judgement)]
        return (norms[0] / (norms[1] + 1e-4)).item()


def gradient(run, images_seen, name, beta):
    """That of the step which ended at `images_seen`, out of Adam's averages before and after it."""
    before, after = (
        {
            key.removeprefix("exp_avg."): each
            for key, each in load_file(Recomputed.of(run, seen) / f"{name}.safetensors").items()
            if key.startswith("exp_avg.")
        }
        for seen in (images_seen - 30, images_seen)
    )
    return {key: (each - beta * before.get(key, 0)) / (1 - beta) for key, each in after.items()}


def assert_close(found, expected):
    assert len(found) == len(expected)
    for name, each in expected.items():
        difference = (found[name] - each).norm()
        assert difference <= 1e-3 * each.norm() + 1e-8, (name, difference, each.norm())
        # of logits within the margins, the hinge gives the last bias as much from images as from reconstructions
        assert each.norm() > 1e-5 or name == "main.6.bias"


def discriminator_at(run, images_seen):
    """Its convolutions' weights, before the spectral norm."""
    state = load_file(Recomputed.of(run, images_seen) / "discriminator.safetensors")
    return {name: each for name, each in state.items() if name.endswith("original")}


def weight(images_seen, factor):
    return WEIGHT * min(1.0, (images_seen - START + 1) / WARMUP) * factor


@pytest.mark.slow
class TestTwoPhases:
    @pytest.mark.parametrize("images_seen", [60, 90])
    def test_the_discriminators_gradient_is_of_its_own_loss(self, images_seen, run):
        step = Recomputed(run, images_seen)
        real, fake = step.discriminator(step.images), step.discriminator(step.reconstructions.detach())
        loss = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
        named = dict(step.discriminator.named_parameters())
        expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        assert_close(gradient(run, images_seen + 30, "discriminator_optimizer", 0.5), expected)

    @pytest.mark.parametrize("images_seen", [30, 60, 90, 120])
    def test_the_models_gradient_is_of_its_own_loss(self, images_seen, run):
        """With what the discriminator was before it stepped, by the weight that the step before decided."""
        step = Recomputed(run, images_seen)
        factor = Recomputed(run, images_seen - 30).factor() if images_seen > START else 0.0
        loss = step.loss + max(0.0, weight(images_seen, factor)) * step.judgement
        named = {f"autoencoder.{name}": each for name, each in step.model.named_parameters()}
        gradients = torch.autograd.grad(loss, [step.log_scale, *named.values()])
        expected = {"slow_log_scale": 10 * gradients[0].view(1), **dict(zip(named, gradients[1:], strict=True))}
        assert_close(gradient(run, images_seen + 30, "optimizer", 0.9), expected)

    def test_the_discriminator_moves_from_its_start_on(self, run):
        torch.manual_seed(0)
        fresh = PatchDiscriminator(1, 8, 2).state_dict()
        states = [discriminator_at(run, seen) for seen in range(30, 151, 30)]
        assert all(torch.equal(each, fresh[name]) for name, each in states[0].items())
        for before, after, moves in zip(states[:-1], states[1:], (False, True, True, True), strict=True):
            assert all(torch.equal(before[name], after[name]) != moves for name in before)

    def test_its_learning_rate_has_a_warm_up_of_its_own(self, run):
        """Adam's first step is the learning rate, whatever the gradient."""
        before, after = (discriminator_at(run, seen) for seen in (60, 90))
        moved = max((after[name] - before[name]).abs().max().item() for name in before)
        assert moved == pytest.approx(OWN_RATE / WARMUP, rel=1e-3)

    def test_the_adaptive_weight_is_logged_and_is_that_of_the_step_before(self, run):
        logged = [record["adversarial_weight"] for record in records(run.run.output_dir, "train")]
        assert logged[:3] == [0, 0, 0]
        for images_seen, found in zip((90, 120), logged[3:], strict=True):
            factor = Recomputed(run, images_seen - 30).factor()
            assert found == pytest.approx(weight(images_seen, factor), rel=1e-3)

    def test_the_logged_loss_is_the_objectives_alone(self, run):
        for record in records(run.run.output_dir, "train"):
            left_out = VALUES * 0.5 * math.log(2 * math.pi)
            expected = record["distortion"] - left_out + record["kl_weight"] * record["rate"]
            assert record["loss"] == pytest.approx(expected, rel=1e-5) and record["perceptual"] > 0

    def test_no_term_is_counted_before_the_start(self, run):
        for record in records(run.run.output_dir, "train"):
            judged = record["images_seen"] > START
            assert (record["generator"] != 0) == (record["discriminator"] != 0) == judged


def test_begin_step_sets_the_discriminators_learning_rate_by_both_schedules():
    step = step_of(settings("unused", {}, dataclasses.replace(JUDGED, start_images=10, learning_rate=1e-4)))
    highest = step.config.optimizer.learning_rate
    for images_seen, part, expected in ((0, 0.5, 0), (10, 0.5, 1e-4 * 0.5 / 4), (50, 0.1, 1e-5), (50, 1.0, 1e-4)):
        readings = step.begin(images_seen, 100, part * highest)
        (group,) = step.discriminator.optimizer.param_groups
        assert group["lr"] == pytest.approx(expected)
        assert readings["adversarial_weight"] == 30 * step.adversary.rise


def test_the_first_line_says_when_each_term_joins(tmp_path):
    """So that a warm-up in images is not taken for one in steps, nor a start found to lie behind the end afterwards."""
    objective = {"kl_weight": 2.88, "kl_schedule": "linear", "kl_warmup_images": 5000}
    config = settings(tmp_path, objective, AdversarialConfig(weight=0.1, start_images=7000))
    data = load_run_data(config, Accelerator(cpu=True))
    said = summary(build_model(data.config), data)
    assert "kl_weight 2.88 (w = 0.0025 in F.mse_loss + w * KL)" in said  # 2.88 * 2 * 0.5^2 / 576
    assert said.endswith(", after 5,000 images; a discriminator after 7,000 images")


def test_the_first_line_names_no_weight_for_means_with_a_scale_that_moves(tmp_path):
    data = load_run_data(settings(tmp_path, {"scale": "learned"}), Accelerator(cpu=True))
    assert summary(build_model(data.config), data).endswith("; kl_weight 1")


@pytest.mark.slow
class TestSchedules:
    def test_kl_weight_is_logged(self, run):
        found = [record["kl_weight"] for record in records(run.run.output_dir, "train")]
        assert found == [run.objective.kl_weight_at(seen, 150) for seen in range(0, 150, 30)]
        assert len(set(found)) == 5

    def test_a_learned_scale_is_measured_by(self, run):
        """And what is saved is stock's."""
        state = load_file(Recomputed.of(run, 150) / "model.safetensors")
        scale = math.exp(10 * state["slow_log_scale"].item())
        self.assert_measured_by(run, scale)
        assert scale != pytest.approx(1, rel=0.01)
        _, missing = AutoencoderKL.from_pretrained(
            Path(run.run.output_dir) / "model", output_loading_info=True, low_cpu_mem_usage=False
        )
        assert not any(missing.values())

    def test_an_optimal_scale_is_measured_by(self, tmp_path):
        config = settings(tmp_path / "run", {"scale": "optimal", "kl_weight": 1e-3}, ema_decay=None, **RUN)
        train(config)
        found = [record["scale"] for record in records(tmp_path / "run", "train")]
        assert found[0] == 1 and len(set(found)) == 5
        saved = json.loads((Recomputed.of(config, 150) / "progress.json").read_text())["task"]["objective"]
        self.assert_measured_by(config, math.sqrt(saved["deviation"] / saved["deviation_weight"]))

    @staticmethod
    def assert_measured_by(config, scale):
        report = json.loads((Path(config.run.output_dir) / "evaluation.json").read_text())
        assert report["scale"] == pytest.approx(scale, rel=1e-6)
        assert report["density"].startswith(f"normal density with std {report['scale']:g} over pixels in [-1, 1];")
        model = VAE.from_pretrained(Path(config.run.output_dir) / "model")
        objective = VAEObjective(Gaussian(report["scale"]), 1.0)
        again = evaluate(model, load_data(DATA)[1], objective, config.evaluation)
        assert again.distortion == pytest.approx(report["distortion"], rel=1e-5)

    def test_evaluate_measures_the_run_by_its_scale(self, run, tmp_path, capsys):
        assert cli.main(["evaluate", run.run.output_dir, "--out", str(tmp_path)]) == 0
        (again,) = tmp_path.rglob("evaluation.json")
        of_run, again = (json.loads(path.read_text()) for path in (Path(run.run.output_dir) / again.name, again))
        assert again["density"] == of_run["density"]
        for name in ("distortion", "rate", "loss", "scale", "kl_weight"):
            assert again[name] == pytest.approx(of_run[name], rel=1e-6)

    @pytest.mark.parametrize(("target", "up"), [(1e-3, True), (1e6, False)])
    def test_a_target_rate_moves_the_kl_weight(self, target, up, tmp_path):
        """Up where the rate is above, down where it is below, and the run is measured with what it came to."""
        config = settings(tmp_path / "run", {"target_rate": target, "kl_weight": 0.1}, ema_decay=None, **RUN)
        fit(config)
        found = [record["kl_weight"] for record in records(tmp_path / "run", "train")]
        if up:
            train(config)  # what is left of it: to measure
            found.append(json.loads((tmp_path / "run" / "evaluation.json").read_text())["kl_weight"])
        assert found[0] == 0.1 and len(set(found)) == len(found) == 5 + up
        assert found == sorted(found, reverse=not up)


DEEP = ModelConfig(block_out_channels=(8,) * 4, norm_num_groups=4)


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "resolution", "objective", "adversarial", "message"),
        [
            (TINY_MLP, 24, {}, {"weight": 1.0}, r"^adversarial\.weight needs the architecture vae"),
            (
                DEEP,
                8,
                {"equivariance": 0.5},
                {},
                "equivariance needs latents that can be made smaller, got 1x1",
            ),
            (TINY_MLP, 24, {"equivariance": 0.5}, {}, r"^objective\.equivariance needs the architecture vae"),
            (TINY_VAE, 20, {}, {"weight": 1.0}, r"at least 24 pixels, got 20x20: .*adversarial\.layers"),
            (TINY_VAE, 24, {"equivariance": 0.5}, {"weight": 1.0, "layers": 2}, r"at least 12 pixels, got 6x6"),
        ],
    )
    def test_settings(self, model, resolution, objective, adversarial, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig(
                data=DataConfig(resolution=resolution),
                model=model,
                objective=ObjectiveConfig(**objective),
                adversarial=AdversarialConfig(**adversarial),
            )

    def test_equivariance_of_an_encoder_that_is_not_trained(self, tmp_path):
        TINY_VAE.build(1, (8, 8)).save_pretrained(tmp_path)
        for trained in ("decoder", ("decoder.*", "post_quant_conv.*")[:1]):
            with pytest.raises(
                ValueError, match=r"objective\.equivariance .* encoder must be trained, and model\.train"
            ):
                TrainConfig(
                    data=DataConfig(resolution=8),
                    model=ModelConfig(pretrained=str(tmp_path), train=trained),
                    objective=ObjectiveConfig(equivariance=0.5),
                )

    @pytest.mark.parametrize("objective", [{"kl_schedule": "cyclical"}, {"free_bits": 1.0}, {"target_rate": 20.0}])
    def test_what_shapes_the_rate_of_an_encoder_that_is_not_trained(self, objective, tmp_path):
        """The rate cannot move: a controller would take the weight to its bound, and the report would tell that."""
        TINY_VAE.build(1, (8, 8)).save_pretrained(tmp_path)
        data, objective = DataConfig(resolution=8), ObjectiveConfig(**objective)
        for trained in ("decoder", ("decoder.*",)):
            with pytest.raises(ValueError, match=r"objective\.\w+ .* shapes the rate, .* model\.train"):
                TrainConfig(data=data, model=ModelConfig(pretrained=str(tmp_path), train=trained), objective=objective)
        TrainConfig(data=data, model=ModelConfig(pretrained=str(tmp_path)), objective=objective)

    @pytest.mark.parametrize(
        ("size", "objective"), [(16, {}), (24, {"equivariance": 0.5})], ids=["small", "made small by equivariance"]
    )
    def test_images_that_lpips_cannot_see(self, size, objective, tmp_path):
        config = settings(tmp_path / "run", {"perceptual": "squeeze"} | objective)
        smallest = 6 if objective else size
        with pytest.raises(ValueError, match=f"squeeze needs sides of at least 17 pixels, got {smallest}x{smallest}"):
            fit(dataclasses.replace(config, data=DataConfig(resolution=size)))
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}

    def test_missing_weights_of_lpips(self, no_download, tmp_path):
        """Nothing is left that stands in the way of the next start, once they are there."""
        config = settings(tmp_path / "run", {"perceptual": "squeeze"}, max_images=30)
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match=f"Put squeezenet1_1-b8a52dc0.pth into {no_download}"):
                fit(config)
            assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
        use_random_networks(no_download.parents[1])
        step_of(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [({}, {"free_bits": 1.0}), ({"target_rate": 5.0}, {}), ({"scale": "optimal"}, {})]
)
def test_run_goes_on_with_another_objective_when_that_is_allowed(before, after, tmp_path, caplog):
    run = {"batch_size": 30, "ema_decay": None}
    fit(settings(tmp_path / "run", before, max_images=30, **run))
    fit(settings(tmp_path / "run", after, max_images=60, allow_config_change=True, **run))
    assert "saved with other settings of the objective" in caplog.text
    assert [record["images_seen"] for record in records(tmp_path / "run", "train")][-1] == 60


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["then without", "then with"])
def test_run_goes_on_with_or_without_a_discriminator_when_that_is_allowed(first, tmp_path):
    """A new one: it begins as in a new run, and moves. An interval that was not logged does not matter."""
    judged = dataclasses.replace(JUDGED, layers=2)
    run = {"batch_size": 30, "log_every": 40, "checkpoint_every": 30, "keep_checkpoints": 9, "ema_decay": None}
    fit(settings(tmp_path / "run", {}, judged if first else None, max_images=60, **run))
    then = settings(
        tmp_path / "run", {}, None if first else judged, max_images=120, allow_config_change=True, **run
    )  # fmt: skip
    with pytest.raises(FileExistsError, match=r"adversarial\.weight"):
        fit(dataclasses.replace(then, run=dataclasses.replace(then.run, allow_config_change=False)))
    fit(then)
    for images_seen, there in ((60, first), (90, not first), (120, not first)):
        assert (Recomputed.of(then, images_seen) / "discriminator.safetensors").exists() == there
    found = [("generator" in record, record["images_seen"]) for record in records(tmp_path / "run", "train")]
    assert found == [(first, 60), (not first, 90), (not first, 120)]
    if not first:
        before, after = (discriminator_at(then, seen) for seen in (90, 120))
        assert not any(torch.equal(before[name], after[name]) for name in before)
        torch.manual_seed(0)
        fresh = PatchDiscriminator(1, 8, 2).state_dict()
        for name in before:
            # one step of Adam from its beginning
            expected = then.optimizer.learning_rate_at(60, 120)
            assert (before[name] - fresh[name]).abs().max() == pytest.approx(expected, rel=0.01)
