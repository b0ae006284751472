"""Precision by rule, steps that do not wait for the device, less memory, compiling: faster, with the same results."""

import dataclasses
import os
import platform
import tempfile
from functools import partial
from getpass import getuser
from pathlib import Path

import pytest
import torch
import yaml
from functorch.compile import make_boxed_func
from support.models import hooks_of, same
from support.runs import TINY_MLP, TINY_VAE, at, fit, interrupted_at, records, tensors, tiny
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_vae import VAE
from diffusers_vae.engine.launch import SharedCores, launched
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.models import ModelConfig, fast_dtype, speed_up_norms
from diffusers_vae.tasks.autoencoder import fast_in_bfloat16

SMALLEST_VAE = ModelConfig(
    block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
)  # the compiler takes as long for every layer
FAST = "bf16" if fast_dtype(torch.device("cpu")) == torch.bfloat16 else "no"


def run_settings(output_dir):
    return yaml.safe_load((Path(output_dir) / "config.yaml").read_text())["run"]


class TestPrecision:
    @pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="needs /proc")
    def test_rule_is_what_the_processor_says(self):
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        assert (FAST == "bf16") == ("avx512_bf16" in flags.split())

    def test_other_devices_stay_exact(self):
        assert fast_dtype(torch.device("meta")) == torch.float32

    @pytest.mark.parametrize(
        ("model", "batch_size", "expected"), [(TINY_VAE, 16, FAST), (TINY_MLP, 255, "no"), (TINY_MLP, 256, FAST)]
    )
    def test_of_a_run_is_by_rule_when_nobody_asks(self, model, batch_size, expected, tmp_path):
        fit(tiny(tmp_path / "run", model, batch_size=batch_size, max_images=30, mixed_precision=None))
        assert run_settings(tmp_path / "run")["mixed_precision"] == expected

    def test_of_an_mlp_goes_by_the_images_in_a_forward(self, tmp_path, monkeypatch):
        cpu = torch.device("cpu")
        for forwards, expected in ((1, True), (2, False)):
            run = tiny(tmp_path, TINY_MLP, batch_size=256, gradient_accumulation_steps=forwards)
            assert fast_in_bfloat16(run, cpu) == expected
        whole = tiny(tmp_path, TINY_MLP, batch_size=256)
        assert not fast_in_bfloat16(whole, torch.device("cuda"))  # never tried
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not fast_in_bfloat16(whole, cpu)
        assert fast_in_bfloat16(tiny(tmp_path, TINY_VAE), cpu)

    @pytest.mark.slow
    @pytest.mark.parametrize("asked", ["bf16", "no"])
    def test_what_is_asked_for_comes_first(self, asked, tmp_path):
        fit(tiny(tmp_path / "run", TINY_VAE, max_images=30, mixed_precision=asked))
        assert run_settings(tmp_path / "run")["mixed_precision"] == asked

    def test_launcher_comes_before_the_rule(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        fit(tiny(tmp_path / "run", max_images=30, mixed_precision=None))
        assert run_settings(tmp_path / "run")["mixed_precision"] == "bf16"

    @pytest.mark.slow
    def test_resumed_run_keeps_its_own(self, tmp_path):
        begun = "no" if FAST == "bf16" else "bf16"
        config = tiny(tmp_path / "run", TINY_VAE, max_images=60, checkpoint_every=30, mixed_precision=begun)
        fit(config)
        again = interrupted_at(30, tmp_path / "run", tmp_path / "again")
        fit(at(config, again, mixed_precision=None))
        assert run_settings(again)["mixed_precision"] == begun
        assert same(tensors(again, 60, "model"), tensors(tmp_path / "run", 60, "model"))


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
        assert len(hooks_of(vae)) == 2 * len(norms)  # the test's own and one more, however often it is called

    def test_float32_is_left_alone(self):
        torch.manual_seed(0)
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


class TestNoWaiting:
    @pytest.mark.slow
    @pytest.mark.parametrize("model", [TINY_VAE, TINY_MLP])
    @pytest.mark.parametrize("scale", [0.5, "learned"])
    def test_steps_ask_nothing_of_the_device(self, model, scale, tmp_path):
        counts = []
        for steps in (3, 9):
            config = tiny(tmp_path / str(steps), model, max_images=30 * steps, log_every=10**6, checkpoint_every=10**6)
            with _Questions() as questions:
                fit(dataclasses.replace(config, objective=ObjectiveConfig(scale=scale)))
            counts.append(questions.count)
        assert counts[0] > 0 and abs(counts[1] - counts[0]) < 3  # those of the end, and not of six more steps

    @pytest.mark.slow
    def test_a_step_that_is_not_finite_is_named_before_anything_is_written(self, tmp_path):
        config = tiny(tmp_path / "run", TINY_VAE, max_images=300, log_every=10**6, checkpoint_every=120)
        explodes = dataclasses.replace(config.optimizer, learning_rate=1e30, warmup_images=0, max_grad_norm=None)
        with pytest.raises(FloatingPointError, match="before step 2, not finite"):
            fit(dataclasses.replace(config, optimizer=explodes))
        assert not list((tmp_path / "run" / "checkpoints").glob("images-*"))
        assert (tmp_path / "run" / "nonfinite" / "step-000000002-process-0.safetensors").exists()


class TestMemory:
    @pytest.mark.slow
    def test_gradient_checkpointing_leaves_no_trace_in_the_weights(self, tmp_path):
        fit(tiny(tmp_path / "plain", TINY_VAE, max_images=90))
        fit(tiny(tmp_path / "other", TINY_VAE, max_images=90, gradient_checkpointing=True))
        for name in ("model", "ema", "optimizer"):
            assert same(tensors(tmp_path / "plain", 90, name), tensors(tmp_path / "other", 90, name))

    def test_mlp_has_no_gradient_checkpointing(self, tmp_path):
        with pytest.raises(ValueError, match="gradient_checkpointing needs the architecture vae"):
            tiny(tmp_path, TINY_MLP, gradient_checkpointing=True)


class TestCompiling:
    """The compiler takes about half a minute for a perceptron and more than a minute for convolutions, which are
    therefore compiled only before a release.
    """

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch):
        """Where programs are kept for the next time: torch would take one for more instructions than it may use now."""
        instructions = torch.backends.cpu.get_cpu_capability()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor-{getuser()}-{instructions}")

    @pytest.mark.slow
    @pytest.mark.parametrize(("model", "count"), [(SMALLEST_VAE, 4), (TINY_MLP, 1)], ids=["convolutions", "mlp"])
    def test_programs_are_of_one_size_of_batch_each(self, model, count, tmp_path, monkeypatch):
        """Forward and backward for each size, or the whole step for the full batch alone. Nothing is left for Python to
        do in between, and no size is left open: a run that is continued has the same programs, whichever size comes
        first.
        """
        programs = []

        def keep(graph, inputs):
            programs.append(inputs)
            return make_boxed_func(graph.forward)

        config = tiny(tmp_path / "eager", model, max_images=130, batch_size=40)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout_fraction=0.95))  # 90 images
        fit(config)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=aot_autograd(fw_compiler=keep)))
        fit(at(config, tmp_path / "traced", step="compiled"))
        assert len(programs) == count and all(
            isinstance(value, torch.Tensor) for inputs in programs for value in inputs
        )
        losses = [[record["loss"] for record in records(tmp_path / name, "train")] for name in ("eager", "traced")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def compared(self, config, images_seen):
        runs = [f"{config.run.output_dir}-{compiled}" for compiled in (False, True)]
        for compiled, run in enumerate(runs):
            fit(at(config, run, step=("eager", "compiled")[compiled]))
        losses = [[record["loss"] for record in records(run, "train")] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        eager, compiled = (tensors(run, images_seen, "ema") for run in runs)
        assert not same(eager, compiled)  # rounded otherwise: it was compiled
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3)

    @pytest.mark.soak
    def test_convolutions_give_the_losses_of_the_same_program(self, tmp_path):
        self.compared(tiny(tmp_path / "run", SMALLEST_VAE, max_images=120), 120)

    @pytest.mark.slow
    def test_mlp_gives_the_losses_of_the_same_program_and_resumes_bit_identical(self, tmp_path):
        config = tiny(
            tmp_path / "run", max_images=6021, checkpoint_every=1500, keep_checkpoints=4
        )  # 200 steps and some
        self.compared(config, 6021)
        again = interrupted_at(3027, tmp_path / "run-True", tmp_path / "again")
        fit(at(config, again, step="auto"))  # it keeps its own
        assert run_settings(again)["step"] == "compiled"
        for name in ("model", "ema", "optimizer"):
            assert same(tensors(again, 6021, name), tensors(tmp_path / "run-True", 6021, name))

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
        config = tiny(tmp_path, step="compiled")
        config = dataclasses.replace(config, objective=ObjectiveConfig(**({"scale": 0.5} | objective)))
        with pytest.raises(ValueError, match=r"run.step compiled needs .* got objective\." + next(iter(objective))):
            fit(config)


class TestThreads:
    @pytest.mark.parametrize("launcher", [None, "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"])
    def test_one_is_what_a_user_says_or_a_launcher_by_default(self, launcher, tmp_path, monkeypatch):
        """Launchers set OMP_NUM_THREADS to 1 where nobody has; without one, it is somebody's wish."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if launcher:
            monkeypatch.setenv(launcher, {"LOCAL_WORLD_SIZE": "1"}.get(launcher, "no"))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with launched(tiny(tmp_path).run, lambda device: False) as launch:
                assert launch.accelerator.device.type != "cpu" or torch.get_num_threads() == (cores if launcher else 1)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize(
        ("before", "waited", "after"),
        [
            (4, (0, 0, 0, 0), 4),
            (4, (2, 2, 3, 3), 4),
            (4, (20, 20, 20, 20), 3),
            (4, (60, 50, 50, 50), 2),
            (2, (50, 50), 1),
        ],
    )
    def test_fewer_where_others_take_the_cores(self, before, waited, after, tmp_path, caplog):
        """Linux reports how long each thread waited for a core; `waited` is the percentage of the time."""
        names = [os.getpid(), *range(1, len(waited))]  # the main thread's is that of the process

        def write(run, share):
            for name, part in zip(names, share, strict=True):
                (tmp_path / str(name)).mkdir(exist_ok=True)
                (tmp_path / str(name) / "schedstat").write_text(f"{10**9 + run * (100 - part)} {run * part} 7\n")

        threads = torch.get_num_threads()
        torch.set_num_threads(before)
        try:
            write(0, waited)
            cores = SharedCores(True, window=0, tasks=tmp_path)
            for _ in range(SharedCores.FIRST_STEPS):
                write(10**7, waited)
                assert cores.adjusted() == []
            assert cores.adjusted() == ([] if after == before else [f"threads {before} -> {after}"])
            assert torch.get_num_threads() == after and ("taskset" in caplog.text) == (after != before)
            write(2 * 10**7, waited if after == before else [0] * len(waited))
            assert cores.adjusted() == []  # from look to look
        finally:
            torch.set_num_threads(threads)

    def test_are_kept_where_nothing_may_change_the_result_or_is_known(self, tmp_path):
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            for cores in (SharedCores(False, window=0), SharedCores(True, window=0, tasks=tmp_path), SharedCores(True)):
                assert all(cores.adjusted() == [] for _ in range(20)) and torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
