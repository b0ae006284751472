"""The objective of a denoiser, and captions as tokens, against stock and against the papers' formulas."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from diffusers.training_utils import compute_snr
from transformers import CLIPTokenizer

from diffusers_vae.losses.diffusion import DiffusionConfig, DiffusionObjective
from diffusers_vae.tasks.tokenizer import END, START, caption_tokenizer

CAPTIONS = ["a handwritten seven", "the digit 7", "a handwritten eight", "the digit 8", "café, naïve!"]


def batch(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise, prediction = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(3))
    return latents, noise, prediction, torch.randint(1000, (count,), generator=generator)


class TestObjective:
    def test_noise_is_added_as_the_paper_has_it(self):
        """Ho et al. 2020, equation 4, with Stable Diffusion's betas."""
        latents, noise, _, timesteps = batch()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
        expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        torch.testing.assert_close(DiffusionObjective().noisy(latents, noise, timesteps), expected.float())

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_what_is_predicted_gives_the_latents_back(self, prediction_type):
        """The scheduler's own step, from the right prediction, finds the latents; and the loss is 0 there alone."""
        objective = DiffusionObjective(prediction_type)
        latents, noise, other, _ = batch(1)
        timesteps = torch.tensor([400])
        right = noise
        if prediction_type == "v_prediction":
            alpha = objective.scheduler.alphas_cumprod[400]
            right = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        noisy = objective.noisy(latents, noise, timesteps)
        torch.testing.assert_close(
            objective.scheduler.step(right, 400, noisy).pred_original_sample, latents, atol=1e-4, rtol=0
        )
        assert objective(right, latents, noise, timesteps).loss < 1e-10
        assert objective(other, latents, noise, timesteps).loss > 0.5

    def test_loss_is_the_mean_of_the_errors(self):
        latents, noise, prediction, timesteps = batch()
        terms = DiffusionObjective()(prediction, latents, noise, timesteps)
        torch.testing.assert_close(terms.loss, ((prediction - noise) ** 2).mean())
        torch.testing.assert_close(terms.error, ((prediction - noise) ** 2).mean((1, 2, 3)))

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_min_snr_weighs_the_latents_by_the_clipped_ratio(self, prediction_type):
        """Hang et al. 2023: in terms of predicted latents, the weight is min(SNR, gamma), whatever is predicted."""
        objective = DiffusionObjective(prediction_type, min_snr_gamma=5.0)
        timesteps = torch.arange(1000)
        snr = compute_snr(objective.scheduler, timesteps)
        per_latents = {"epsilon": snr, "v_prediction": snr + 1}[prediction_type]  # squared error of x0 to that of it
        torch.testing.assert_close(objective.weights(timesteps) * per_latents, snr.clamp(max=5.0))

    def test_without_min_snr_all_weigh_the_same(self):
        assert (DiffusionObjective().weights(torch.arange(1000)) == 1).all()

    def test_samplers_do_not_clip_latents(self):
        assert DiffusionObjective().scheduler.config.clip_sample is False

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"prediction_type": "sample"}, "diffusion.prediction_type must be"),
            ({"min_snr_gamma": 0.0}, "diffusion.min_snr_gamma must be positive"),
            ({"min_snr_gamma": float("inf")}, "got inf"),
            ({"caption_dropout": 1.0}, "diffusion.caption_dropout must be in"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, named):
        with pytest.raises(ValueError, match=named):
            DiffusionConfig(**settings)


class TestTokenizer:
    def test_words_of_the_captions_are_few_tokens(self):
        tokenizer = caption_tokenizer(CAPTIONS, 16)
        assert tokenizer.tokenize("a handwritten seven") == ["a</w>", "handwritten</w>", "seven</w>"]
        assert [len(tokens) for tokens in tokenizer(CAPTIONS[:4]).input_ids] == [5, 5, 5, 5]

    def test_any_text_is_told_from_its_end(self):
        """No character is unknown: in CLIP, that would read as the end."""
        tokenizer = caption_tokenizer(CAPTIONS, 32)
        for text in ("zebra 漢字 🙂", "Ünïcode", "a\tb\nc", "<tag> & 100%"):
            tokens = tokenizer(text).input_ids
            assert tokens[0] == tokenizer.convert_tokens_to_ids(START)
            assert tokens.index(tokenizer.convert_tokens_to_ids(END)) == len(tokens) - 1

    def test_saved_it_tokenises_the_same(self, tmp_path):
        tokenizer = caption_tokenizer(CAPTIONS, 16)
        tokenizer.save_pretrained(tmp_path)
        again = CLIPTokenizer.from_pretrained(tmp_path)
        texts = [*CAPTIONS, "something else"]
        assert again(texts).input_ids == tokenizer(texts).input_ids and again.model_max_length == 16

    def test_empty_prompt_is_start_and_ends(self):
        tokens = caption_tokenizer(CAPTIONS, 8)("", padding="max_length").input_ids
        assert len(tokens) == 8 and len(set(tokens[1:])) == 1 != tokens[0]

    @pytest.mark.slow
    def test_is_the_same_in_every_process(self):
        """A run that is continued builds it anew: the text encoder's rows must mean the same words. Forked processes
        would not do, as they share the order in which Python and the tokenizer's own tables keep what they hash.
        """
        code = (
            "import json, sys; from diffusers_vae.tasks.tokenizer import caption_tokenizer\n"
            "print(json.dumps(caption_tokenizer(json.load(sys.stdin), 16).get_vocab()))"
        )
        words = [f"{a}{b} {b}{a}er {a}ing" for a in ("ba", "lo", "mir") for b in ("ka", "tun", "or", "x")]
        found = [caption_tokenizer(words, 16).get_vocab() for _ in range(2)]
        environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
        start = {"capture_output": True, "text": True, "check": True, "env": environment}
        done = subprocess.run([sys.executable, "-c", code], input=json.dumps(words), **start)
        found.append(json.loads(done.stdout))
        assert len(found[0]) > 500 and all(vocabulary == found[0] for vocabulary in found)

    @pytest.mark.slow
    def test_a_temporary_folder_that_is_full_is_named(self, small_disk, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
        (small_disk / "filler").write_bytes(b"x" * (2**18 - 2**12))
        with pytest.raises(OSError, match=rf"cannot write {small_disk}/\w+: No space left on device\. Set TMPDIR to"):
            caption_tokenizer(["a photograph"] * 10, 16)
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
