"""The report's figures against torchmetrics, torch.distributions and cases where the truth is known."""

import copy
import dataclasses
import hashlib
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from support.models import tiny_vae
from support.pickles import CONTAINERS, Harm, plant
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.distributions import Laplace as TorchLaplace
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from diffusers_vae import MLPVAE, VAEObjective
from diffusers_vae.data import ArrayImages, DataConfig, load_data, load_split
from diffusers_vae.evaluation.compare import compare
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate, reconstruct
from diffusers_vae.evaluation.float16 import PrecisionReport, measure_precision
from diffusers_vae.evaluation.metrics import mean_interval, psnr, ssim
from diffusers_vae.evaluation.report import (
    EvaluationReport,
    LatentSummary,
    ModelSummary,
    Protocol,
    read_report,
    report_digest,
)
from diffusers_vae.evaluation.swaps import measure_swaps
from diffusers_vae.images.ranges import to_model_range, to_uint8
from diffusers_vae.latents.statistics import LatentStatistics, PosteriorHealth, SwapCosts, measure_latents
from diffusers_vae.losses.objective import Bernoulli, Gaussian, Laplace
from diffusers_vae.losses.perceptual import FILES, LPIPS, InceptionFeatures
from diffusers_vae.models import weights_hash
from diffusers_vae.processes import in_parts, largest_part
from diffusers_vae.reports.tables import comparison_table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits():
    _, heldout = load_data(DataConfig(resolution=16))
    return heldout


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """torch's folder of weights, with files that have the names, keys and shapes of published ones, at random."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    home = tmp_path_factory.mktemp("torch")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), folder / FILES["alex"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_state_dict_from_url", lambda *arguments, **settings: {})
        patch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    torch.save(network.state_dict(), folder / FILES["inception"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield folder


class LinearVAE(ModelMixin, ConfigMixin):
    """p(image | latents) has the mean W latents; q(latents | image) is a normal around `gain` times the exact
    posterior's mean, with `spread` times its std. W's columns are orthogonal, so that the exact posterior is diagonal.
    """

    @register_to_config
    def __init__(self, pixels: int = 64, units: int = 3, std: float = 0.5, gain: float = 1.0, spread: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        orthogonal, _ = torch.linalg.qr(torch.randn(pixels, units, generator=generator))
        self.weight = torch.nn.Parameter(orthogonal * torch.tensor([1.0, 2.0, 3.0])[:units])

    def encode(self, images):
        precision = 1 + (self.weight**2).sum(0) / self.config.std**2
        mean = images.flatten(1) @ self.weight / self.config.std**2 / precision
        logvar = (-precision.log() + 2 * math.log(self.config.spread)).expand_as(mean)
        moments = torch.cat([self.config.gain * mean, logvar], 1)[:, :, None, None]
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, latents):
        side = math.isqrt(self.config.pixels)
        return DecoderOutput(sample=(latents.flatten(1) @ self.weight.T).view(-1, 1, side, side))

    def log_likelihood(self, images):
        covariance = self.weight @ self.weight.T + self.config.std**2 * torch.eye(self.config.pixels)
        exact = MultivariateNormal(torch.zeros(self.config.pixels).double(), covariance.double())
        return exact.log_prob(images.flatten(1).double())


class Features(torch.nn.Module):
    """Features as they come, where torchmetrics expects a network that extracts them."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, features):
        return features


def frechet_distance_of_torchmetrics(images, reconstructions, weights):
    """Between few images, uint8. The distance does not depend on the axes of the features, so it is computed in the
    space that those of the images span: the eigenvalues in 2,048 dimensions take minutes.
    """
    network = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), normalize=False).inception
    features = [network(pixels).double() for pixels in (images, reconstructions)]
    axes, _ = torch.linalg.qr(torch.cat(features).T)
    metric = FrechetInceptionDistance(Features(axes.shape[1]))
    metric.set_dtype(torch.float64)
    for part, real in zip(features, (True, False), strict=True):
        metric.update(part @ axes, real=real)
    return metric.compute().item()


class TestReferences:
    def test_terms_are_those_of_the_objective(self, digits):
        vae = tiny_vae()
        objective = VAEObjective(Gaussian(0.5), kl_weight=0.3)
        report = evaluate(vae, digits, objective, EvaluationConfig(max_images=5, seed=3, round_to_8_bit=False))
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
        assert report.bits_per_dim == pytest.approx(-report.elbo / (math.log(2) * 256) + math.log2(255 / 2))
        assert report.psnr == pytest.approx(psnr(images, reconstructions).mean().item(), rel=1e-5)
        assert report.ssim == pytest.approx(ssim(images, reconstructions).mean().item(), rel=1e-5)
        assert "0.5" in report.density and "normal" in report.density

    @pytest.mark.parametrize(
        ("likelihood", "torchs"),
        [
            (Gaussian(0.2), lambda centre: Normal(centre, 0.2 * 127.5)),
            (Laplace(0.2), lambda centre: TorchLaplace(centre, 0.2 * 127.5)),
        ],
        ids=["gaussian", "laplace"],
    )
    def test_bits_per_dim_is_of_a_density_of_8_bit_values(self, likelihood, torchs, digits):
        """As in the literature: computed by torch on values from 0 to 255."""
        vae = tiny_vae()
        with torch.no_grad():
            vae.quant_conv.bias[4:] = -30  # no noise: the sample is the mode
            levels = digits.pixels[:3].float()
            output = vae(to_model_range(digits.pixels[:3]))
            log_p = torchs((output.sample + 1) * 127.5).log_prob(levels).flatten(1).sum(1)
            rate = vae.encode(to_model_range(digits.pixels[:3])).latent_dist.kl()
        report = evaluate(vae, digits, VAEObjective(likelihood), EvaluationConfig(max_images=3))
        bits = (rate - log_p) / (256 * math.log(2))
        assert report.bits_per_dim == pytest.approx(bits.mean().item(), rel=1e-5)
        assert report.intervals["bits_per_dim"] == pytest.approx(mean_interval(bits.double().numpy()), rel=1e-4)
        assert report.density.endswith("; bits/dim per 8-bit level (2/255)")

    def test_bits_per_dim_of_a_stated_range_and_of_a_probability_have_no_levels(self, digits, tmp_path):
        np.save(tmp_path / "scans.npy", np.random.default_rng(0).uniform(0, 5, (6, 1, 16, 16)).astype(np.float32))
        data = DataConfig(name="array", root=str(tmp_path / "scans.npy"), resolution=16, value_range=(0, 5))
        scans = load_split(data, "all")[0]
        report = evaluate(tiny_vae(), scans, VAEObjective(Gaussian(1.0)), EvaluationConfig(), data)
        assert report.bits_per_dim == pytest.approx(-report.elbo / (math.log(2) * 256))
        assert report.density.endswith("; bits/dim per unit of [-1, 1]")
        model = MLPVAE(16, latent_dim=2)
        report = evaluate(model, digits, VAEObjective(Bernoulli()), EvaluationConfig(max_images=4))
        assert report.bits_per_dim == pytest.approx(-report.elbo / (math.log(2) * 256))
        assert report.density == Bernoulli().density

    @pytest.mark.slow
    @pytest.mark.parametrize("likelihood", [Gaussian(0.4), Bernoulli()])
    def test_elbo_is_a_monte_carlo_estimate_with_torch_distributions(self, likelihood):
        """The mean of log p(x|z) + log p(z) - log q(z|x), z drawn by torch, within 4 standard errors."""
        generator = torch.Generator().manual_seed(0)
        binary = ArrayImages((torch.rand(3, 1, 8, 8, generator=generator) > 0.5).to(torch.uint8) * 255)
        torch.manual_seed(2)
        model = MLPVAE(8, latent_dim=5, hidden_dim=40).eval()
        with torch.no_grad():
            model.logvar.bias.sub_(1)
        report = evaluate(model, binary, VAEObjective(likelihood), EvaluationConfig(draws=2000))
        torch.manual_seed(3)
        estimates = []
        for index in range(3):
            images = to_model_range(binary.pixels[index : index + 1])
            with torch.no_grad():
                found = model.encode(images).latent_dist
                posterior = Independent(Normal(found.mean[0], found.std[0]), 3)
                latents = posterior.sample((4000,))
                decoded = model.decode(latents).sample
                logits = model.decode_logits(latents)
            if isinstance(likelihood, Gaussian):
                density, value = Normal(decoded, likelihood.std), images
            else:
                density, value = TorchBernoulli(logits=logits), (images + 1) / 2
            log_p = Independent(density, 3).log_prob(value.expand_as(decoded))
            prior = Independent(Normal(torch.zeros(5, 1, 1), 1), 3)
            estimates.append((log_p + prior.log_prob(latents) - posterior.log_prob(latents)).double())
        mean = torch.stack(estimates).mean().item()
        error = math.sqrt(sum(e.var().item() / len(e) for e in estimates)) / 3
        assert error < 0.3
        assert report.elbo == pytest.approx(mean, abs=4 * error * math.sqrt(3))

    @pytest.mark.slow
    def test_importance_weighted_bound_is_the_likelihood_of_a_linear_gaussian_model(self):
        """With the exact posterior each draw gives log p(x), Burda et al. 2016; with another the bound lies between."""
        _, images = load_data(DataConfig(resolution=8))
        config = EvaluationConfig(max_images=40, draws=2)
        exact = LinearVAE()
        truth = exact.log_likelihood(to_model_range(images.pixels[:40])).mean().item()
        objective = VAEObjective(Gaussian(0.5))
        report = evaluate(exact, images, objective, config)
        assert report.importance_weighted_bound == pytest.approx(truth, abs=1e-3)
        assert report.elbo == pytest.approx(truth, abs=1)  # its two draws differ
        off = LinearVAE(gain=0.9, spread=1.5)
        bounds = []
        for draws in (2, 20, 2000):
            report = evaluate(off, images, objective, dataclasses.replace(config, draws=draws))
            bounds.append(report.importance_weighted_bound)
            assert report.elbo < bounds[-1]
        assert bounds[0] < bounds[1] < bounds[2] < truth + 0.05
        assert bounds[2] == pytest.approx(truth, abs=0.05) and truth - bounds[0] > 0.2

    def test_one_draw_gives_no_bound(self, digits):
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=3))
        assert report.importance_weighted_bound is None and "importance_weighted_bound" not in report.intervals

    @pytest.mark.slow
    def test_figures_are_those_of_torchmetrics_on_photographs(self, shared_data, networks, tmp_path):
        """Computed from 8-bit files by torchmetrics' own classes."""
        with tarfile.open(shared_data / "bsds500-val.tar") as archive:
            photographs = [member for member in archive.getmembers() if member.name.endswith(".jpg")][:3]
            archive.extractall(tmp_path / "photographs", photographs, filter="data")
        for path in sorted((shared_data / "kodak").glob("*.png"))[:3]:
            (tmp_path / "photographs" / path.name).symlink_to(path)
        root = str(tmp_path / "photographs")
        data = DataConfig(name="folder", root=root, channels=3, resolution=96, heldout_fraction=0.5)
        _, images = load_data(data)
        model, count = tiny_vae(3), 3
        config = EvaluationConfig(rfid=True, batch_size=2, max_images=count)
        report = evaluate(model, images, VAEObjective(Gaussian(1.0)), config)

        saved = []
        for index in range(count):
            with torch.no_grad():
                output = model(to_model_range(images.pixels[index : index + 1])).sample
            Image.fromarray(to_uint8(output)[0].permute(1, 2, 0).numpy()).save(tmp_path / "file.png")
            saved.append(torch.from_numpy(np.array(Image.open(tmp_path / "file.png"))).permute(2, 0, 1)[None])
        pairs = [(images.pixels[index : index + 1].float(), file.float()) for index, file in enumerate(saved)]
        for name, metric in (("psnr", PeakSignalNoiseRatio), ("ssim", StructuralSimilarityIndexMeasure)):
            expected = torch.stack([metric(data_range=255.0)(file, original) for original, file in pairs]).mean()
            assert getattr(report, name) == pytest.approx(expected.item(), rel=1e-5, abs=5e-5)
        expected = frechet_distance_of_torchmetrics(
            images.pixels[:count], torch.cat(saved), networks / FILES["inception"]
        )
        assert report.rfid == pytest.approx(expected, rel=1e-2) and report.rfid > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
    def test_lpips_is_that_of_torchmetrics(self, channels, networks):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (3, channels, 40, 40), generator=generator, dtype=torch.uint8)
        config = EvaluationConfig(lpips=("alex",))
        model = tiny_vae(channels)
        report = evaluate(model, ArrayImages(pixels), VAEObjective(Gaussian(1.0)), config)
        reference = LearnedPerceptualImagePatchSimilarity("alex")
        images = to_model_range(pixels)
        with torch.no_grad():
            reconstructions = to_model_range(to_uint8(model(images).sample))
        expected = reference(reconstructions.expand(-1, 3, -1, -1), images.expand(-1, 3, -1, -1)).item()
        assert report.lpips_alex == pytest.approx(expected, rel=1e-5) and report.lpips_vgg is None
        assert list(report.protocol.networks) == ["alex"] and len(report.protocol.networks["alex"]) == 64
        assert expected > 0 and report.intervals["lpips_alex"][0] < expected < report.intervals["lpips_alex"][1]


class TestNetworks:
    NAMES = pytest.mark.parametrize("name", ["alex", "inception"])

    def network(self, name):
        return InceptionFeatures() if name == "inception" else LPIPS(name)

    @NAMES
    def test_weights_that_cannot_be_downloaded(self, name, no_download):
        with pytest.raises(FileNotFoundError, match=rf"\(no network\)\. Put {FILES[name]} into {no_download}"):
            self.network(name)

    @NAMES
    def test_download_of_another_file_is_refused(self, name, no_download, monkeypatch):
        """torch compares the whole SHA-256 before the file gets its name."""

        def download(url, path, digest):
            assert url.endswith(FILES[name]) and len(digest) == 64
            raise RuntimeError(f'invalid hash value (expected "{digest}", got "0")')

        monkeypatch.setattr("torch.hub.download_url_to_file", download)
        with pytest.raises(FileNotFoundError, match=f"invalid hash value .* Put {FILES[name]}"):
            self.network(name)

    @NAMES
    @pytest.mark.parametrize(("container", "protocol"), [*((form, 2) for form in CONTAINERS), ("zip", 4)])
    def test_code_in_a_file_is_not_run(self, name, container, protocol, no_download, tmp_path):
        """In each form that torch knows, and in one that its readers take for different things."""
        no_download.mkdir(parents=True)
        plant(Harm(tmp_path / "harm"), no_download / FILES[name], container, protocol)
        with pytest.raises(ValueError, match=rf"{FILES[name]} is (a pickle that|not a torch checkpoint)"):
            self.network(name)
        assert not (tmp_path / "harm").exists()

    @pytest.mark.slow
    @NAMES
    def test_file_of_other_things_is_named(self, name, no_download, caplog):
        no_download.mkdir(parents=True)
        torch.save({"features.0.weight": torch.zeros(3)}, no_download / FILES[name])
        digest = hashlib.sha256((no_download / FILES[name]).read_bytes()).hexdigest()
        with pytest.raises(ValueError, match=rf"{FILES[name]} does not hold the published weights of {name}"):
            self.network(name)
        assert f"{FILES[name]} is not the published file of {name}: its SHA-256 is {digest}" in caplog.text

    @pytest.mark.slow
    def test_images_that_they_cannot_see(self, networks):
        lpips = LPIPS("alex")
        with pytest.raises(ValueError, match=r"sides of at least 31 pixels, got 28x30"):
            lpips(torch.zeros(1, 3, 28, 30), torch.zeros(1, 3, 28, 30))
        with pytest.raises(ValueError, match="defined for 3 channels, and 1 is repeated to 3, got 5"):
            lpips(torch.zeros(1, 5, 64, 64), torch.zeros(1, 5, 64, 64))

    def test_loading_leaves_the_global_generator_alone(self, networks):
        state = torch.get_rng_state()
        LPIPS("alex")
        assert torch.equal(torch.get_rng_state(), state)


class TestReport:
    @pytest.mark.slow
    def test_uneven_batches_change_nothing(self, digits):
        vae, objective = tiny_vae(), VAEObjective(Gaussian(1.0))
        reports = [evaluate(vae, digits, objective, EvaluationConfig(batch_size=size)) for size in (180, 50)]
        for name in ("loss", "distortion", "rate", "psnr", "ssim"):
            one, two = (getattr(report, name) for report in reports)
            assert one == pytest.approx(two, rel=1e-5), name

    @pytest.mark.slow
    def test_repeats_exactly_and_leaves_the_global_generator_alone(self, digits):
        vae = tiny_vae()
        state = torch.get_rng_state()
        reports = [evaluate(vae, digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=9)) for _ in range(2)]
        assert reports[0] == reports[1] and torch.equal(torch.get_rng_state(), state)
        assert json.loads(reports[0].to_json())["psnr"] == reports[0].psnr
        assert EvaluationReport.from_json(reports[0].to_json()) == reports[0]

    @pytest.mark.slow
    def test_float16_is_tried_when_asked_for(self, digits):
        vae = tiny_vae()
        report, without = (
            evaluate(vae, digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=6, batch_size=4), fp16=fp16)
            for fp16 in (True, False)
        )
        assert report.fp16 == measure_precision(vae, digits, 4, 6) and report.fp16.images == 6
        assert EvaluationReport.from_json(report.to_json()) == report
        assert without == dataclasses.replace(report, fp16=None)

    def test_figures_that_were_changed_are_refused(self, digits, tmp_path):
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=4))
        whole, path = json.loads(report.to_json()), tmp_path / "evaluation.json"
        path.write_text(json.dumps(dict(reversed(whole.items()))))  # neither order nor layout matters
        assert read_report(path) == report
        posterior = whole["posterior"] | {"verdict": "healthy and strong"}
        for change in ({"psnr": whole["psnr"] + 0.01}, {"posterior": posterior}, {"sha256": "ab" * 32}):
            path.write_text(json.dumps(whole | change))
            with pytest.raises(
                ValueError, match=r"evaluation.json .* SHA-256 .* were changed .*measures the model again"
            ):
                read_report(path)

    def test_what_format_1_could_lack_is_needed(self, digits):
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=4))
        for name in ("sha256", "fp16", "fine_tuning", "lpips_squeeze", "kl_weight", "scale"):
            whole = json.loads(report.to_json())
            del whole[name]
            if name != "sha256":
                whole["sha256"] = report_digest(whole)
            with pytest.raises(ValueError, match=name):
                EvaluationReport.from_json(json.dumps(whole))

    def test_a_report_of_format_1_is_refused_by_name(self, digits, tmp_path):
        whole = json.loads(
            evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=4)).to_json()
        )
        whole["format"] = 1
        del whole["sha256"]  # which it could lack
        (tmp_path / "evaluation.json").write_text(json.dumps(whole))
        with pytest.raises(ValueError) as error:
            read_report(tmp_path / "evaluation.json")
        said = str(error.value)
        assert said.startswith(f"{tmp_path / 'evaluation.json'} is ") and "its format is 1 and must be 2" in said
        assert "Delete it and run the training command again" in said and "`diffusers-vae evaluate`" in said

    @pytest.mark.parametrize("text", ["{}", "[]", '{"format": 0}', "", '{"images": 3, "psnr": 20}'])
    def test_what_is_no_report(self, text):
        with pytest.raises(ValueError):
            EvaluationReport.from_json(text)

    def test_figures_that_are_not_finite_are_named(self, digits):
        model = MLPVAE(16, latent_dim=2).eval()
        with torch.no_grad():
            model.decoder[2].bias.fill_(float("nan"))
        report = evaluate(model, digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=4))
        with pytest.raises(ValueError, match="not finite: loss, distortion, elbo, bits_per_dim, psnr"):
            report.to_json()

    def test_csv_holds_the_figures_of_each_image(self, digits):
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=4))
        header, *lines = (line.split(",") for line in report.per_image.to_csv().splitlines())
        assert header == ["image", "loss", "distortion", "rate", "elbo", "psnr", "ssim"]
        assert [line[0] for line in lines] == [f"image {index}" for index in range(4)]
        column = header.index("psnr")
        assert sum(float(line[column]) for line in lines) / 4 == pytest.approx(report.psnr, rel=1e-12)

    @pytest.mark.parametrize("count", [2, 5, 10])
    def test_intervals_cover_the_mean_of_few_images(self, count):
        """Of 2,000 samples, 95 % within three standard errors; a percentile bootstrap covers 52, 85 and 88 %."""
        samples = np.random.default_rng(0).normal(3, 2, (2000, count))
        low, high = np.apply_along_axis(mean_interval, 1, samples).T
        assert np.mean((low < 3) & (high > 3)) == pytest.approx(0.95, abs=0.015)

    def test_protocol_says_what_the_figures_depend_on(self, digits):
        data = DataConfig(resolution=16)
        config = EvaluationConfig(max_images=4, seed=7, reconstruction="sample", round_to_8_bit=False)
        protocol = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), config, data, "held-out").protocol
        assert (protocol.data, protocol.split, protocol.images, protocol.seed) == ("digits", "held-out", 4, 7)
        assert protocol.resolution == [16, 16] and protocol.channels == 1 and "bicubic" in protocol.resize
        assert (protocol.reconstruction, protocol.round_to_8_bit, protocol.dtype) == ("sample", False, "float32")
        assert protocol.fingerprint == digits.fingerprint() and torch.__version__.startswith(protocol.versions["torch"])

    def test_sample_and_rounding_change_the_reconstructions(self, digits):
        def figure(**settings):
            config = EvaluationConfig(max_images=4, **settings)
            return evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), config).psnr

        assert len({figure(), figure(reconstruction="sample"), figure(round_to_8_bit=False)}) == 3

    def test_reconstruct_gives_what_was_measured(self, digits):
        config = EvaluationConfig(max_images=4, reconstruction="sample")
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), config)
        images = to_model_range(digits.pixels[1:3])
        with torch.no_grad():
            found = psnr(images, reconstruct(tiny_vae(), images, [1, 2], config))
        assert found.tolist() == pytest.approx(report.per_image.figures["psnr"][1:3].tolist(), rel=1e-5)

    def test_bernoulli_says_that_it_is_no_density(self, digits):
        report = evaluate(MLPVAE(16, latent_dim=2), digits, VAEObjective(Bernoulli()), EvaluationConfig(max_images=4))
        assert "no density for grey values" in report.density and report.distortion > 0

    def test_bernoulli_counts_all_of_a_confident_error(self, digits):
        """Each pixel of a white image costs 40 nats where the logit is -40; a reconstruction in float32 caps it."""
        model = MLPVAE(16, latent_dim=2)
        torch.nn.init.zeros_(model.decoder[-1].weight)
        torch.nn.init.constant_(model.decoder[-1].bias, -40.0)
        white = ArrayImages(torch.full((2, 1, 16, 16), 255, dtype=torch.uint8))
        report = evaluate(model, white, VAEObjective(Bernoulli()), EvaluationConfig())
        assert report.distortion == pytest.approx(40 * 256, rel=1e-6)

    def test_bernoulli_is_refused_for_a_model_without_logits(self, digits):
        with pytest.raises(ValueError, match="returns probabilities, such as MLPVAE's; the output of VAE is unbounded"):
            evaluate(tiny_vae(), digits, VAEObjective(Bernoulli()), EvaluationConfig(max_images=2))

    def test_no_images_and_too_few_are_refused(self, digits):
        with pytest.raises(ValueError, match="at least one image"):
            evaluate(tiny_vae(), ArrayImages(digits.pixels[:0]), VAEObjective(Gaussian(1.0)), EvaluationConfig())
        with pytest.raises(ValueError, match="at least two images"):
            evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(rfid=True, max_images=1))

    @pytest.mark.slow
    def test_seeds_share_no_noise(self, digits):
        """The draw for image 1 under seed 0 is not that for image 0 under seed 1."""
        twice = ArrayImages(digits.pixels[:1].repeat(2, 1, 1, 1))

        def distortion(images, seed):
            config = EvaluationConfig(max_images=images, seed=seed, batch_size=1)
            return evaluate(tiny_vae(), twice, VAEObjective(Gaussian(0.1)), config).distortion

        of_image_1_under_seed_0 = 2 * distortion(2, 0) - distortion(1, 0)
        assert of_image_1_under_seed_0 != pytest.approx(distortion(1, 1), rel=1e-7)

    def test_every_field_is_in_the_documented_schema(self):
        text = (ROOT / "docs" / "evaluation.md").read_text()
        for kind in (EvaluationReport, LatentSummary, PosteriorHealth, ModelSummary, Protocol, PrecisionReport):
            for field in dataclasses.fields(kind):
                if field.name != "per_image":
                    assert f"`{field.name}`" in text, field.name

    @pytest.mark.parametrize(
        "settings", [{"seed": -1}, {"draws": 0}, {"lpips": ("resnet",)}, {"reconstruction": "best"}]
    )
    def test_wrong_settings_name_themselves(self, settings):
        (name,) = settings
        with pytest.raises(ValueError, match=rf"evaluation\.{name} must"):
            EvaluationConfig(**settings)

    @pytest.mark.parametrize("name", ["every", "max_images", "batch_size"])
    def test_counts_are_at_least_1(self, name):
        with pytest.raises(ValueError, match=f"evaluation.{name} must be at least 1( or null)?, got 0"):
            EvaluationConfig(**{name: 0})


class TestAnyAutoencoder:
    def test_stock_gives_the_figures_of_ours(self, digits):
        ours = tiny_vae()
        stock = ours.to_diffusers()
        config = EvaluationConfig(max_images=6)
        reports = [evaluate(model, digits, VAEObjective(Gaussian(1.0)), config) for model in (ours, stock)]
        assert reports[0].psnr == pytest.approx(reports[1].psnr, rel=1e-6)
        assert reports[0].elbo == pytest.approx(reports[1].elbo, rel=1e-6)
        assert reports[0].model.weights_sha256 == reports[1].model.weights_sha256
        assert [report.model.class_name for report in reports] == ["VAE", "AutoencoderKL"]

    def test_hash_tells_weights_apart(self):
        one, other = tiny_vae(), tiny_vae()
        assert weights_hash(one) == weights_hash(other)
        block = other.encoder.mid_block.resnets[0]
        block.norm1, block.norm2 = block.norm2, block.norm1  # the same tensors under other names
        block.norm1.weight.data += 1
        first = weights_hash(other)
        block.norm1.weight.data, block.norm2.weight.data = block.norm2.weight.data, block.norm1.weight.data
        assert len({weights_hash(one), first, weights_hash(other)}) == 3

    def test_another_class_of_diffusers(self, digits):
        torch.manual_seed(0)
        model = AsymmetricAutoencoderKL(
            in_channels=1, out_channels=1, down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=4
        ).eval()
        report = evaluate(model, digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=3))
        assert report.model.class_name == "AsymmetricAutoencoderKL" and math.isfinite(report.elbo)

    def test_one_without_a_posterior_is_refused(self, digits):
        images = ArrayImages(digits.pixels.expand(-1, 3, -1, -1))
        model = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
        with pytest.raises(ValueError, match=r"^the model must be an autoencoder .* the class AutoencoderTiny: give"):
            evaluate(model, images, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=3))

    def test_other_channels_are_refused(self, digits):
        with pytest.raises(ValueError, match="takes images of 3 channels, got 1"):
            stock = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,))
            evaluate(stock, digits, VAEObjective(Gaussian(1.0)), EvaluationConfig())

    def test_half_precision_is_measured_and_stated(self, digits):
        vae, config = tiny_vae(), EvaluationConfig(max_images=6)
        exact = evaluate(vae, digits, VAEObjective(Gaussian(1.0)), config)
        half = evaluate(vae.to(torch.bfloat16), digits, VAEObjective(Gaussian(1.0)), config)
        assert half.protocol.dtype == "bfloat16" and half.psnr != exact.psnr
        assert half.psnr == pytest.approx(exact.psnr, rel=1e-2)


class BlockVAE(ModelMixin, ConfigMixin):
    """Latent channel k is `scale` times block k of an image, 8 columns wide; the decoder shows it `weights[k]` times.

    With another image's channel k, an error of (1 - w)^2 becomes one of 1 + w^2, in variances of the block. With
    `grey`, the decoder shows the mean of the image's channels.
    """

    @register_to_config
    def __init__(self, weights=(1.0,), scale: float = 1.0, grey: bool = False):
        super().__init__()
        self.shown = torch.nn.Parameter(torch.tensor(weights).view(-1, 1, 1))

    def encode(self, images):
        blocks = images.shape[1] * len(self.config.weights)
        mean = self.config.scale * images.unflatten(3, (-1, 8)).movedim(3, 2).reshape(-1, blocks, 8, 8)
        logvar = torch.full_like(mean, -6 + 2 * math.log(self.config.scale))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, logvar], 1)))

    def decode(self, latents):
        blocks = latents.unflatten(1, (-1, len(self.config.weights))) / self.config.scale * self.shown
        images = blocks.movedim(2, 3).flatten(3)
        return DecoderOutput(sample=images.mean(1, keepdim=True).expand_as(images) if self.config.grey else images)


def random_images(channels, width, count=70):
    generator = torch.Generator().manual_seed(0)
    return ArrayImages(torch.randint(256, (count, channels, 8, width), generator=generator, dtype=torch.uint8))


class TestHealth:
    def statistics(self, mean, logvar):
        found = LatentStatistics()
        for part in torch.cat([mean, logvar], 1).split(33):
            found.update(DiagonalGaussianDistribution(part))
        return found

    def test_a_matched_posterior_is_healthy(self):
        """Means and noise whose variances sum to 1: the aggregate posterior is N(0, I)."""
        generator = torch.Generator().manual_seed(0)
        mean = 0.8 * torch.randn(4000, 3, 2, 2, generator=generator)
        health = self.statistics(mean, torch.full_like(mean, math.log(0.36))).health()
        assert health.verdict == "healthy" and "nothing to change" in health.advice
        assert health.units == health.active_units == 12 and health.empty_share == 0
        assert health.aggregate_distance < 0.05
        expected = 0.5 * (mean**2 + 0.36 - 1 - math.log(0.36)).mean(0)
        assert health.rate_per_channel == pytest.approx(expected.sum((1, 2)).tolist(), rel=1e-5)
        assert health.rate_per_position == [pytest.approx(row, rel=1e-5) for row in expected.sum(0).tolist()]

    @pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (3.0, 1.0), (0.0, 0.09), (-100.0, 1e-3)])
    def test_information_is_that_of_a_gaussian_channel_at_any_scale(self, shift, scale):
        """0.5 log(1 + signal / noise) nats a unit (Shannon 1948), whatever the mean and the scale of the latents."""
        generator = torch.Generator().manual_seed(0)
        mean = torch.randn(4000, 2, 3, 3, generator=generator, dtype=torch.float64)
        mean = (mean - mean.mean(0)) / mean.std(0, correction=0)
        logvar = torch.full_like(mean, math.log(0.25 * scale**2))
        health = self.statistics(shift + scale * mean, logvar).health()
        assert health.information_per_channel == pytest.approx([9 * 0.5 * math.log(5)] * 2, rel=1e-4)
        assert health.unused_channels == []

    @pytest.mark.parametrize("side", [8, 64])
    @pytest.mark.parametrize("dead", ["the prior", "the same for all images"])
    def test_a_dead_channel_is_unused_at_any_size(self, dead, side):
        mean = 0.98 * torch.randn(60, 4, side, side, generator=torch.Generator().manual_seed(0))
        logvar = torch.full_like(mean, math.log(0.04))
        mean[:, 2] = 0.0 if dead == "the prior" else 2.0
        if dead == "the prior":
            logvar[:, 2] = 0.0
        health = self.statistics(mean, logvar).health()
        assert health.verdict == "partly collapsed" and health.unused_channels == [2]
        assert "1 of 4 channels" in health.advice
        assert health.active_units == 3 * side**2 and health.empty_share == (0.25 if dead == "the prior" else 0)

    def test_units_equal_to_the_prior_are_collapsed(self):
        mean = torch.randn(500, 4, 1, 1, generator=torch.Generator().manual_seed(0))
        mean[:, 2] = 0
        logvar = torch.full_like(mean, -2)
        logvar[:, 2] = 0
        health = self.statistics(mean, logvar).health()
        assert health.verdict == "partly collapsed" and health.unused_channels == [2]
        assert "1 of 4 units are unused" in health.advice and "This is normal" in health.advice
        for constant in (0.0, 3.0):
            health = self.statistics(0 * mean + constant, 0 * mean).health()
            assert health.verdict == "collapsed" and health.active_units == 0
            assert "lower objective.kl_weight" in health.advice

    @pytest.mark.parametrize("scale", [1.0, 0.09])
    def test_information_in_few_units_is_not_collapsed(self, scale):
        """36 units of 1 nat among 4,096; with a std of 0.09 and precise posteriors, 455 nats."""
        mean = torch.zeros(300, 1, 64, 64)
        logvar = torch.zeros_like(mean)
        signal = torch.randn(300, 36, generator=torch.Generator().manual_seed(0))
        mean.flatten(2)[:, 0, :36] = signal * scale * (1 - math.exp(-2)) ** 0.5
        logvar.flatten(2)[:, 0, :36] = -2.0 + 2 * math.log(scale)
        health = self.statistics(mean, logvar).health()
        assert health.verdict == "healthy" and health.information_per_channel == [pytest.approx(36, rel=0.05)]

    def test_one_image_tells_nothing_of_it(self, digits):
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=1))
        assert report.posterior.verdict == "unknown" and report.intervals == {} and report.posterior.swaps is None

    def test_samples_far_from_the_prior_are_reported(self):
        mean = 3 + torch.randn(500, 2, 2, 2, generator=torch.Generator().manual_seed(0))
        health = self.statistics(mean, torch.full_like(mean, -2)).health()
        assert health.verdict == "healthy" and "do not decode to images" in health.advice

    def test_far_from_unit_scale_is_exploding(self):
        mean = 50 * torch.randn(100, 2, 2, 2, generator=torch.Generator().manual_seed(0))
        health = self.statistics(mean, torch.zeros_like(mean)).health()
        assert health.verdict == "exploding" and "Raise objective.kl_weight" in health.advice

    def test_distance_is_that_of_the_marginals(self):
        """All means 3, no noise: every unit is N(3, 0), sqrt(9 + 1) from N(0, 1)."""
        mean = torch.full((10, 2, 1, 1), 3.0)
        health = self.statistics(mean, torch.full_like(mean, -30)).health()
        assert health.aggregate_distance == pytest.approx(math.sqrt(10), rel=1e-4)
        assert health.verdict == "collapsed"  # the same for all images


class TestSwaps:
    """What the decoder loses with the latents of another image."""

    def measure(self, model, channels=1):
        images = random_images(channels, 8 * len(model.config.weights))
        return evaluate(model, images, VAEObjective(Gaussian(1.0)), EvaluationConfig()).posterior

    @pytest.mark.parametrize(("weight", "cost"), [(0.0, 0.0), (0.0047, 0.041), (0.007, 0.061), (0.5, 6.85)])
    def test_a_channel_is_unused_exactly_where_a_swap_costs_less_than_a_twentieth_of_a_decibel(self, weight, cost):
        """10 log10(1 + 2 w / e), where e is the error without a swap, in variances of a block."""
        health = self.measure(BlockVAE((0.9, weight)))
        assert health.swaps.channels[1] == pytest.approx(cost, rel=0.1, abs=1e-6)
        assert health.unused_channels == ([1] if cost < 0.05 else [])
        assert health.information_per_channel[1] > 100  # which the decoder ignores
        assert health.verdict == ("healthy" if cost > 0.05 else "partly collapsed")

    @pytest.mark.parametrize("scale", [1e-3, 0.09])
    def test_the_scale_of_the_latents_does_not_matter(self, scale):
        health, same = (self.measure(BlockVAE((0.9, 0.8), each)) for each in (scale, 1.0))
        assert health.verdict == "healthy"
        assert health.swaps.channels == pytest.approx(same.swaps.channels, rel=1e-3)
        assert health.information_per_channel == pytest.approx(same.information_per_channel, rel=1e-3)

    def test_a_decoder_that_ignores_informative_latents_reconstructs_poorly(self, digits):
        vae = tiny_vae()
        with torch.no_grad():
            vae.decoder.conv_out.weight.zero_()
        posterior = evaluate(vae, digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=20)).posterior
        assert posterior.swaps.all == 0 and posterior.verdict == "poor reconstruction"
        assert "hardly resemble their images" in posterior.advice

    def test_a_model_without_colours_reconstructs_poorly(self):
        tints = random_images(3, 8).pixels // 6
        images = ArrayImages(random_images(1, 8).pixels // 2 + 50 + tints)
        grey, colourful = (
            evaluate(BlockVAE((0.9,), grey=grey), images, VAEObjective(Gaussian(1.0)), EvaluationConfig()).posterior
            for grey in (True, False)
        )
        assert grey.swaps.colour == pytest.approx(0, abs=1e-6) and grey.verdict == "poor reconstruction"
        assert "colours" in grey.advice
        assert colourful.swaps.colour > 10 and colourful.verdict == "healthy"

    def test_grey_images_have_no_colours_to_lose(self):
        images = ArrayImages(random_images(1, 8).pixels.expand(-1, 3, -1, -1))
        health = evaluate(BlockVAE((0.9,)), images, VAEObjective(Gaussian(1.0)), EvaluationConfig()).posterior
        assert health.swaps.colour is None and health.verdict == "healthy"

    def test_channels_that_say_the_same_are_not_called_useless(self):
        """Each of many alone costs little, all together much."""
        swaps = SwapCosts(images=64, all=10.0, colour=None, channels=[0.03] * 4)
        mean = torch.randn(50, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        statistics = LatentStatistics()
        for logvar in (-2.0, -1e-4):  # much information, and next to none
            statistics.update(DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, logvar)], 1)))
            health = statistics.health(swaps)
            assert health.verdict == "partly collapsed" and "all of them together cost 10.00 dB" in health.advice

    def test_images_that_cannot_be_read_are_left_out(self, tmp_path):
        for number in range(5):
            Image.new("L", (16, 16), 50 * number).save(tmp_path / f"{number}.png")
        data = DataConfig(name="folder", root=str(tmp_path), channels=1, resolution=16, on_bad_image="skip")
        images, _ = load_data(data, memory_limit=0)
        (tmp_path / images.name(1)).write_bytes(b"damaged")
        assert measure_swaps(tiny_vae(), images, 2).images == len(images) - 1 == 3

    def test_images_are_spread_over_those_that_are_measured(self, digits):
        assert (
            evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig()).posterior.swaps.images == 64
        )
        few = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), EvaluationConfig(max_images=5))
        assert few.posterior.swaps.images == 5
        again = EvaluationReport.from_json(few.to_json())
        assert again.posterior == few.posterior


class TestComparison:
    def reports(self, digits, **settings):
        config = EvaluationConfig(max_images=40, **settings)
        better, worse = MLPVAE(16, latent_dim=2).eval(), MLPVAE(16, latent_dim=2).eval()
        with torch.no_grad():
            worse.decoder[2].bias.sub_(5)
            better.decoder[2].bias.copy_(to_model_range(digits.pixels.float().mean(0) / 255).flatten() * 3)
        return [evaluate(model, digits, VAEObjective(Gaussian(1.0)), config) for model in (worse, better)]

    def test_a_model_with_itself_differs_in_nothing(self, digits):
        report = self.reports(digits)[0]
        for difference in compare(report, report).differences.values():
            assert difference.mean == 0 and difference.interval == [0, 0]
            assert difference.second_is_better in (0, None)

    def test_one_image_has_no_interval(self, digits):
        config = EvaluationConfig(max_images=1)
        report = evaluate(tiny_vae(), digits, VAEObjective(Gaussian(1.0)), config)
        comparison = json.loads(compare(report, report).to_json())
        assert comparison["differences"]["psnr"] == {"mean": 0.0, "interval": [], "second_is_better": 0.0}
        assert "PSNR" in comparison_table(comparison)

    def test_differences_are_paired(self, digits):
        first, second = self.reports(digits)
        comparison = compare(first, second, show=3)
        values = second.per_image.figures["psnr"] - first.per_image.figures["psnr"]
        difference = comparison.differences["psnr"]
        assert difference.mean == pytest.approx(second.psnr - first.psnr) == pytest.approx(values.mean())
        assert difference.interval[0] < difference.mean < difference.interval[1]
        assert difference.second_is_better == (values > 0).mean() and values.mean() > 0
        assert comparison.differences["distortion"].second_is_better > 0.5
        assert comparison.differences["rate"].second_is_better is None
        assert comparison.most_different == np.argsort(-abs(values), kind="stable")[:3].tolist()
        held = json.loads(comparison.to_json())
        assert held["differences"]["psnr"]["mean"] == difference.mean
        assert held["first"]["psnr"] == first.psnr and held["second"]["psnr"] == second.psnr

    def test_reports_of_two_protocols_are_refused(self, digits):
        first = self.reports(digits)[0]
        other = self.reports(digits, seed=1)[1]
        with pytest.raises(ValueError, match="under one protocol, got two: seed: 0 and 1"):
            compare(first, other)


class TestMemory:
    """Where it does not suffice for a batch, parts of it are measured."""

    @pytest.mark.slow
    def test_evaluation_that_does_not_fit_is_of_smaller_batches(self, digits):
        def allocate(module, inputs):
            torch.empty(2**45 if len(inputs[0]) > 16 else 1, dtype=torch.uint8)  # 32 TiB

        torch.manual_seed(0)
        model, objective = tiny_vae().eval(), VAEObjective(Gaussian(0.5))
        whole = evaluate(copy.deepcopy(model), digits, objective, EvaluationConfig())
        model.encoder.register_forward_pre_hook(allocate)
        halved = evaluate(model, digits, objective, EvaluationConfig())
        assert whole.protocol.batch_size == 64 and halved.protocol.batch_size == 16
        assert halved.per_image.indices == whole.per_image.indices
        for name, values in whole.per_image.figures.items():
            np.testing.assert_allclose(halved.per_image.figures[name], values, rtol=1e-4, atol=2e-5)  # SSIM is near 0
        latents = measure_latents(model, digits)
        for factor in (halved.latents.scaling_factor, latents.scaling_factor):
            assert factor == pytest.approx(whole.latents.scaling_factor, rel=1e-6)
        compare(whole, halved)  # not another protocol

    @pytest.mark.slow
    @pytest.mark.parametrize("batch_size", [1, 7])
    def test_figures_are_the_same_up_to_rounding_whatever_the_batch_size(self, batch_size, digits):
        torch.manual_seed(0)
        model, objective = tiny_vae().eval(), VAEObjective(Gaussian(0.5))
        reports = [evaluate(model, digits, objective, EvaluationConfig(20, 20, size)) for size in (64, batch_size)]
        assert reports[1].protocol.batch_size == batch_size
        for name, values in reports[0].per_image.figures.items():
            np.testing.assert_allclose(
                reports[1].per_image.figures[name], values, rtol=1e-4, atol=1e-4
            )  # SSIM is near 0

    def test_part_is_halved_until_it_fits_and_kept_at_that(self):
        model, sizes = torch.nn.Identity(), []

        def double(part, names):
            sizes.append(len(part))
            torch.empty(2**45 if len(part) > 3 else 1, dtype=torch.uint8)  # 32 TiB
            return 2 * part, names

        for expected in ([10, 5, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2]):
            parts = in_parts(model, double, torch.arange(10), [*"abcdefghij"])
            assert torch.cat([part for part, _ in parts]).equal(2 * torch.arange(10))
            assert [name for _, names in parts for name in names] == [*"abcdefghij"] and sizes == expected
            sizes.clear()
        assert [largest_part(each, 64) for each in (model, torch.nn.Identity())] == [2, 64]

    def test_one_image_too_large_and_other_errors_are_raised(self):
        def fail(part):
            torch.empty(2**45, dtype=torch.uint8)

        with pytest.raises(RuntimeError, match="can't allocate memory"):
            in_parts(torch.nn.Identity(), fail, torch.arange(4))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            in_parts(torch.nn.Identity(), lambda part: torch.ones(1, 2) @ torch.ones(1, 2), torch.arange(4))
