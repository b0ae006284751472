"""What makes training fast changes nothing else: precision by rule, no waiting, compiling, memory."""

import dataclasses
import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from support.runs import TINY_MLP, TINY_VAE, random_network, tiny, weights, whole
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_vae import VAE
from diffusers_vae.models import fast_dtype, speed_up_norms
from diffusers_vae.objective import ObjectiveConfig
from diffusers_vae.trainer import AutoencoderTask, train

FAST = "bf16" if fast_dtype(torch.device("cpu")) == torch.bfloat16 else "no"


def run_settings(output_dir):
    return yaml.safe_load((Path(output_dir) / "config.yaml").read_text())["run"]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items()) and one.keys() == other.keys()


class TestPrecision:
    @pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="needs /proc")
    def test_rule_is_what_the_processor_says(self):
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        assert (FAST == "bf16") == ("avx512_bf16" in flags.split())

    def test_other_devices_stay_exact(self):
        assert fast_dtype(torch.device("meta")) == torch.float32

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("model", "batch_size", "expected"), [(TINY_VAE, 16, FAST), (TINY_MLP, 255, "no"), (TINY_MLP, 256, FAST)]
    )
    def test_of_a_run_is_by_rule_when_nobody_asks(self, model, batch_size, expected, tmp_path):
        train(tiny(tmp_path / "run", model, batch_size=batch_size, max_images=30, mixed_precision=None))
        assert run_settings(tmp_path / "run")["mixed_precision"] == expected

    def test_of_a_perceptron_goes_by_the_images_in_a_forward(self, tmp_path, monkeypatch):
        cpu = torch.device("cpu")
        for forwards, expected in ((1, True), (2, False)):
            run = tiny(tmp_path, TINY_MLP, batch_size=256, gradient_accumulation_steps=forwards)
            assert AutoencoderTask(run).gains_by_bfloat16(cpu) == expected
        whole = AutoencoderTask(tiny(tmp_path, TINY_MLP, batch_size=256))
        assert not whole.gains_by_bfloat16(torch.device("cuda"))  # never tried
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not whole.gains_by_bfloat16(cpu)
        assert AutoencoderTask(tiny(tmp_path, TINY_VAE)).gains_by_bfloat16(cpu)

    @pytest.mark.slow
    @pytest.mark.parametrize("asked", ["bf16", "no"])
    def test_what_is_asked_for_comes_first(self, asked, tmp_path):
        train(tiny(tmp_path / "run", TINY_VAE, max_images=30, mixed_precision=asked))
        assert run_settings(tmp_path / "run")["mixed_precision"] == asked

    def test_launcher_comes_before_the_rule(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        train(tiny(tmp_path / "run", max_images=30, mixed_precision=None))
        assert run_settings(tmp_path / "run")["mixed_precision"] == "bf16"

    @pytest.mark.slow
    def test_a_run_keeps_its_own(self, tmp_path):
        begun = "no" if FAST == "bf16" else "bf16"
        config = tiny(tmp_path / "run", TINY_VAE, max_images=60, checkpoint_every=30, mixed_precision=begun)
        train(config)
        (tmp_path / "run" / "evaluation.json").unlink()
        AcceleratorState._reset_state(True)
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, mixed_precision=None)))
        assert run_settings(tmp_path / "run")["mixed_precision"] == begun


class TestNorms:
    def test_see_contiguous_images_and_give_the_same(self):
        torch.manual_seed(0)
        vae = VAE(in_channels=1, out_channels=1, block_out_channels=(32,)).eval()  # the layouts of a single channel
        images, layouts = torch.randn(2, 1, 8, 8), []
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(lambda _, inputs, output: layouts.append(inputs[0].is_contiguous()))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = vae(images, return_dict=False)[0]
            assert not all(layouts)
            layouts.clear()
            after = speed_up_norms(speed_up_norms(vae))(images, return_dict=False)[0]
        assert layouts and all(layouts)
        torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
        norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
        assert {len(norm._forward_pre_hooks) for norm in norms} == {1}  # however often it is called

    def test_float32_is_left_alone(self):
        vae = VAE(in_channels=1, out_channels=1, block_out_channels=(32,)).eval()
        images = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            before = vae(images, return_dict=False)[0]
            assert torch.equal(speed_up_norms(vae)(images, return_dict=False)[0], before)


class _Questions(TorchDispatchMode):
    """Counts how often a value is asked for that a GPU would have to be waited for."""

    ASKING = ("_local_scalar_dense", "is_nonzero", "nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in self.ASKING
        return function(*arguments, **(keywords or {}))


@pytest.mark.slow
class TestNoWaiting:
    @pytest.mark.parametrize("model", [TINY_VAE, TINY_MLP])
    @pytest.mark.parametrize("scale", [0.5, "learned"])
    def test_steps_ask_nothing_of_the_device(self, model, scale, tmp_path):
        counts = []
        for steps in (3, 9):
            config = tiny(tmp_path / str(steps), model, max_images=30 * steps, log_every=10**6, checkpoint_every=10**6)
            with _Questions() as questions:
                train(dataclasses.replace(config, objective=ObjectiveConfig(scale=scale)))
            counts.append(questions.count)
        assert counts[0] > 0 and abs(counts[1] - counts[0]) < 3  # those of evaluation, and not of six more steps

    def test_a_step_that_is_not_finite_is_named_before_anything_is_written(self, tmp_path):
        config = tiny(tmp_path / "run", TINY_VAE, max_images=300, log_every=10**6, checkpoint_every=120)
        explodes = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_images=0, max_grad_norm=None)
        with pytest.raises(FloatingPointError, match="before step 2, not finite"):
            train(dataclasses.replace(config, optimizer=explodes))
        assert not list((tmp_path / "run" / "checkpoints").glob("images-*"))
        assert (tmp_path / "run" / "nonfinite" / "step-000000002-process-0.safetensors").exists()


@pytest.mark.slow
class TestMemory:
    @pytest.mark.parametrize("other", [{"gradient_checkpointing": True}, {"device_batch_size": "auto"}])
    def test_what_saves_it_leaves_no_trace_in_the_weights(self, other, tmp_path):
        train(tiny(tmp_path / "plain", TINY_VAE, max_images=90))
        AcceleratorState._reset_state(True)
        train(tiny(tmp_path / "other", TINY_VAE, max_images=90, **other))
        assert same(weights(tmp_path / "plain"), weights(tmp_path / "other"))

    @pytest.mark.slow
    def test_trying_leaves_no_trace_in_a_discriminator(self, tmp_path):
        for name, other in (("plain", {}), ("tried", {"device_batch_size": "auto"})):
            AcceleratorState._reset_state(True)
            config = tiny(tmp_path / name, TINY_VAE, max_images=120, **other)
            train(whole(config, random_network(tmp_path / f"{name}-network")))
        assert same(weights(tmp_path / "plain"), weights(tmp_path / "tried"))

    def test_auto_and_a_number_contradict_each_other(self, tmp_path):
        with pytest.raises(ValueError, match="leave one of the two out, got 2"):
            tiny(tmp_path, device_batch_size="auto", gradient_accumulation_steps=2)

    def test_perceptrons_keep_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="gradient_checkpointing needs the architecture vae"):
            tiny(tmp_path, TINY_MLP, gradient_checkpointing=True)


class TestCompiling:
    @pytest.mark.slow
    @pytest.mark.parametrize("model", [TINY_VAE, TINY_MLP])
    def test_gives_the_losses_of_the_same_program(self, model, tmp_path):
        for name in ("eager", "compiled"):
            AcceleratorState._reset_state(True)
            train(tiny(tmp_path / name, model, max_images=120, compile=name == "compiled"))
        losses = [
            json.loads((tmp_path / name / "evaluation.json").read_text())["loss"] for name in ("eager", "compiled")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
        assert not same(eager, compiled)  # rounded otherwise: it was compiled
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3)

    @pytest.mark.slow
    def test_is_bit_identical_after_an_interruption(self, tmp_path):
        config = tiny(tmp_path / "run", max_images=300, batch_size=40, checkpoint_every=40, keep_checkpoints=9)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, compile=True))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout_fraction=0.95))  # 90 images
        train(config)
        whole_run = weights(tmp_path / "run")
        for path in (tmp_path / "run" / "checkpoints").iterdir():
            if int(path.name.removeprefix("images-")) > 130:
                shutil.rmtree(path)
        (tmp_path / "run" / "evaluation.json").unlink()
        AcceleratorState._reset_state(True)
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, compile=None)))  # it keeps its own
        assert run_settings(tmp_path / "run")["compile"] is True
        assert same(whole_run, weights(tmp_path / "run"))

    @pytest.mark.parametrize(
        "objective",
        [
            {"kl_schedule": "linear", "kl_warmup_images": 100},
            {"target_rate": 3.0},
            {"free_bits": 0.1},
            {"scale": "optimal"},
        ],
    )
    def test_needs_steps_that_are_the_same(self, objective, tmp_path):
        config = tiny(tmp_path, compile=True)
        with pytest.raises(ValueError, match=r"run.compile needs .* got objective\." + next(iter(objective))):
            dataclasses.replace(config, objective=ObjectiveConfig(**({"scale": 0.5} | objective)))
