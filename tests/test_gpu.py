"""What runs on a CUDA GPU alone: captured steps, Triton's group norm, blocks for inference. Skipped without one, except
the kernels, which Triton's interpreter runs on a CPU.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from support.models import same
from support.runs import TINY_MLP, TINY_VAE, at, fit, interrupted_at, records, tensors, tiny
from torch.nn import functional as F

from diffusers_vae import fast

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def off(value, reference):
    """Relative distance."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def check_group_norm(device):
    from diffusers_vae.models.norms import group_norm

    torch.manual_seed(0)
    for shape, groups in (((2, 8, 5, 7), 4), ((1, 96, 6, 6), 32), ((3, 64, 40), 32), ((1, 8, 33, 34), 4)):
        for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            for layout in range(2):
                x = (torch.randn(shape, device=device) * 2 + 30).to(dtype)  # whose square loses digits
                if layout:
                    x = x.transpose(1, -1).contiguous().transpose(1, -1)
                for silu in (True, False):
                    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
                    dy = torch.randn(shape, device=device).to(dtype)
                    own = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
                    y = group_norm(*own, groups, 1e-6, silu)[0]
                    y.backward(dy)
                    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
                    z = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-6)
                    z = F.silu(z) if silu else z
                    z.backward(dy.double())
                    assert y.dtype == dtype and y.stride() == x.stride() and off(y, z) < most
                    for value, reference in zip(own, exact, strict=True):
                        assert off(value.grad, reference.grad) < most
                        assert value.grad.dtype == value.dtype


@pytest.mark.slow
def test_group_norm_by_the_interpreter_is_exact_in_every_layout():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    tests = Path(__file__).resolve().parent
    code = "from test_gpu import check_group_norm; check_group_norm('cpu')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tests.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tests)


@gpu
def test_group_norm_is_exact_in_every_layout():
    check_group_norm("cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_attention_is_softmax_of_scaled_products_whatever_the_parts(device, dtype, most, monkeypatch):
    from diffusers_vae.models import attention

    torch.manual_seed(0)
    own = [(3 * torch.randn(2, 50, 64, device=device)).to(dtype).requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in own]
    gradient = torch.randn(2, 50, 64, device=device)
    reference = F.scaled_dot_product_attention(*exact)
    reference.backward(gradient.double())
    for scores in (attention.SCORES, 1500):  # in one part, and in parts of 15 rows
        monkeypatch.setattr(attention, "SCORES", scores)
        for tensor in own:
            tensor.grad = None
        output = attention.attention(*own)
        output.backward(gradient.to(dtype))
        assert output.dtype == dtype and off(output, reference) < most
        for value, wanted in zip(own, exact, strict=True):
            assert off(value.grad, wanted.grad) < most


def stock(channels=3):
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip


class TestFast:
    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_gives_the_same_and_can_be_taken_away(self, channels, device, tmp_path):
        vae = stock(channels).to(device)
        images = torch.randn(2, channels, 32, 32, device=device)
        plain = copy.deepcopy(vae)
        with torch.no_grad():
            expected = plain(images).sample
            assert fast(vae) is vae
            assert off(vae(images).sample, expected) < 5e-3  # convolutions in TF32
            assert [name for name, _ in vae.named_parameters()] == [name for name, _ in plain.named_parameters()]
            vae.save_pretrained(tmp_path)
            fast(vae, False)
            assert torch.equal(vae(images).sample, expected)
        loaded = AutoencoderKL.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], value.cpu()) for name, value in plain.state_dict().items())
        assert [type(module) for module in vae.modules()] == [type(module) for module in plain.modules()]

    @gpu
    def test_keeps_the_layout_and_gives_the_gradient_of_stock(self):
        plain, quick = stock().cuda().train(), fast(stock().cuda().train())
        assert not any(type(module) in (ResnetBlock2D, Upsample2D) for module in quick.modules())
        images, layouts = torch.randn(2, 3, 32, 32, device="cuda"), []
        for module in quick.decoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda _, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
                )
        for vae in (plain, quick):
            vae(images).sample.square().mean().backward()
        assert layouts and all(layouts)
        for (name, value), (_, wanted) in zip(quick.named_parameters(), plain.named_parameters(), strict=True):
            assert off(value.grad, wanted.grad) < 2e-2 or wanted.grad.norm() < 1e-6, name


@gpu
class TestCaptured:
    def config(self, output_dir, model=TINY_VAE, **run):
        return tiny(output_dir, model, **({"batch_size": 30, "max_images": 150, "ema_decay": 0.9} | run))

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @pytest.mark.parametrize("model", [TINY_VAE, TINY_MLP])
    def test_gives_the_losses_of_eager_steps(self, model, precision, tmp_path, caplog):
        """Over 200 steps, some of them on the smaller batch at the end of an epoch."""
        caplog.set_level("INFO")
        losses = []
        for mode in ("eager", "graph"):
            fit(self.config(tmp_path / mode, model, max_images=6000, mixed_precision=precision, step=mode))
            losses.append([record["loss"] for record in records(tmp_path / mode, "train")])
        assert "one CUDA graph per step" in caplog.text and "cannot be captured" not in caplog.text
        assert losses[0] == pytest.approx(losses[1], rel=1e-3 if precision == "no" else 2e-2)

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @pytest.mark.parametrize("step", ["eager", "graph"])
    def test_resumes_bit_identical(self, step, precision, tmp_path):
        config = self.config(
            tmp_path / "run", mixed_precision=precision, step=step, deterministic=precision == "no",
            checkpoint_every=60, keep_checkpoints=9,
        )  # fmt: skip
        fit(config)
        again = interrupted_at(60, tmp_path / "run", tmp_path / "again")
        fit(at(config, again))
        for name in ("model", "ema", "optimizer"):
            assert same(tensors(again, 150, name), tensors(tmp_path / "run", 150, name))

    def test_by_rule(self, tmp_path, caplog):
        caplog.set_level("INFO")
        fit(self.config(tmp_path / "run"))
        assert "one CUDA graph per step" in caplog.text
        caplog.clear()
        fit(self.config(tmp_path / "skips", on_nonfinite="skip"))
        assert "eager steps" in caplog.text


def test_graph_without_a_gpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"run\.step graph needs a CUDA GPU, got cpu: set run\.step to auto"):
        fit(tiny(tmp_path / "run", step="graph"))
