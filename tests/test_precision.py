"""Float16: activations against those of the layers called by hand, and models made to fail in each way."""

import dataclasses
import math

import pytest
import torch
from support.models import hooks_of, tiny_vae

from diffusers_vae import MLPVAE
from diffusers_vae.data import ArrayImages, DataConfig, load_data
from diffusers_vae.evaluation.float16 import EXACT, LARGEST, measure_precision
from diffusers_vae.evaluation.metrics import psnr
from diffusers_vae.images.ranges import to_model_range

IMAGES = 6


@pytest.fixture(scope="module")
def digits():
    _, heldout = load_data(DataConfig(resolution=16))
    return ArrayImages(heldout.pixels[:IMAGES])


def reaching(value, digits):
    """A VAE of which one layer, inside a residual block whose output stays small, reaches `value`."""
    vae = tiny_vae()
    layer, seen = vae.decoder.up_blocks[1].resnets[0].conv1, []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.abs().max().item()))
    with torch.no_grad():
        vae(to_model_range(digits.pixels))
        layer.weight.mul_(value / seen[0])
        layer.bias.mul_(value / seen[0])
    hook.remove()
    return vae


class TestActivations:
    @pytest.mark.slow
    def test_blocks_reach_what_their_layers_give(self, digits):
        vae, images = tiny_vae(), to_model_range(digits.pixels)
        report = measure_precision(vae, digits, 4)
        encoder, decoder = vae.encoder, vae.decoder
        with torch.no_grad():
            first = encoder.conv_in(images)
            posterior = vae.encode(images).latent_dist
            given = decoder.conv_in(vae.post_quant_conv(posterior.mode()))
            expected = {
                "encoder.conv_in": first,
                "encoder.conv_out": encoder(images),
                "quant_conv": vae.quant_conv(encoder(images)),
                "post_quant_conv": vae.post_quant_conv(posterior.mode()),
                "decoder.conv_in": given,
                "decoder.conv_out": vae.decode(posterior.mode()).sample,
            }
            outputs = {
                "encoder.down_blocks.0": encoder.down_blocks[0](first),
                "decoder.mid_block": decoder.mid_block(given),
            }
        for name, tensor in expected.items():
            assert report.blocks[name] == pytest.approx(tensor.abs().max().item(), rel=1e-5), name
        for name, tensor in outputs.items():  # of which a layer inside may reach more
            assert report.blocks[name] >= tensor.abs().max().item() * (1 - 1e-5), name
        assert report.images == IMAGES

    def test_blocks_are_named_in_the_order_in_which_they_run(self, digits):
        ends = ["conv_norm_out", "conv_act", "conv_out"]
        names = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", *ends]
        expected = [f"encoder.{name}" for name in names] + ["quant_conv", "post_quant_conv"]
        names = ["conv_in", "mid_block", "up_blocks.0", "up_blocks.1", *ends]
        assert list(measure_precision(tiny_vae(), digits, 4).blocks) == expected + [f"decoder.{name}" for name in names]

    @pytest.mark.slow
    def test_batches_change_nothing_and_later_images_count(self, digits):
        one, two = (measure_precision(tiny_vae(), digits, size) for size in (IMAGES, 1))
        assert one.blocks == pytest.approx(two.blocks, rel=1e-5) and one.verdict == two.verdict
        few = measure_precision(tiny_vae(), digits, 1, max_images=1)
        assert few.images == 1 and all(few.blocks[name] <= two.blocks[name] for name in two.blocks)
        assert few.blocks != two.blocks and few.fp16_psnr >= two.fp16_psnr


class TestVerdict:
    def test_a_tiny_vae_is_safe(self, digits):
        report = measure_precision(tiny_vae(), digits, 4)
        assert report.safe and report.overflow is None and EXACT < report.fp16_psnr < 100
        assert report.advice == "Float16 is safe: force_upcast can be false."

    def test_what_overflows_is_named(self, digits):
        report = measure_precision(reaching(1e5, digits), digits, 4)
        assert report.blocks["decoder.up_blocks.1"] == pytest.approx(1e5, rel=1e-3)
        assert max(value for name, value in report.blocks.items() if name != "decoder.up_blocks.1") < 100
        assert (report.overflow, report.fp16_psnr, report.verdict) == ("decoder.up_blocks.1", None, "overflows")
        assert not report.safe and report.advice == "Float16 overflows in decoder.up_blocks.1: keep force_upcast true."

    @pytest.mark.slow
    @pytest.mark.parametrize(("value", "verdict"), [(LARGEST / 4.1, "safe"), (LARGEST / 3.9, "close"), (6e4, "close")])
    def test_a_quarter_of_what_float16_holds_is_left_free(self, value, verdict, digits):
        report = measure_precision(reaching(value, digits), digits, 4)
        assert (report.overflow, report.verdict, report.safe) == (None, verdict, verdict == "safe")
        assert math.isfinite(report.fp16_psnr)

    def test_a_weight_that_overflows_shows_in_float16_only(self, digits):
        vae = tiny_vae()
        block = vae.encoder.down_blocks[1].resnets[0]
        with torch.no_grad():
            block.norm1.weight.mul_(1e-6)
            block.conv1.weight.mul_(1e6)
        report = measure_precision(vae, digits, 4)
        assert max(report.blocks.values()) < 100
        assert (report.overflow, report.verdict) == ("encoder.down_blocks.1", "overflows")

    @pytest.mark.slow
    def test_details_that_float16_loses(self, digits):
        vae = tiny_vae()
        with torch.no_grad():
            vae.decoder.up_blocks[1].resnets[-1].conv2.bias.fill_(3000)  # which the last norm takes away again
        report = measure_precision(vae, digits, 4)
        assert report.overflow is None and max(report.blocks.values()) * 4 < LARGEST
        assert report.verdict == "inexact" and report.fp16_psnr < EXACT and not report.safe

    def test_exact_is_within_a_step_of_8_bits(self):
        black = torch.full((1, 1, 8, 8), -1.0)
        assert psnr(black, black + 2 / 255).item() == pytest.approx(EXACT, rel=1e-5)

    @pytest.mark.slow
    def test_what_float32_cannot_do_either(self, digits):
        vae = tiny_vae()
        with torch.no_grad():
            vae.decoder.conv_in.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"not finite in float32 already, first in decoder\.conv_in"):
            measure_precision(vae, digits, 4)


class TestModels:
    @pytest.mark.slow
    def test_stock_gives_the_report_of_ours(self, digits):
        ours = tiny_vae()
        of_ours, of_stock = (measure_precision(model, digits, 4) for model in (ours, ours.to_diffusers()))
        assert of_stock.blocks == pytest.approx(of_ours.blocks, rel=1e-5)
        assert of_stock.fp16_psnr == pytest.approx(of_ours.fp16_psnr, rel=1e-3)
        same = {"blocks": of_ours.blocks, "fp16_psnr": of_ours.fp16_psnr}
        assert dataclasses.replace(of_stock, **same) == of_ours

    def test_mlp(self, digits):
        torch.manual_seed(0)
        report = measure_precision(MLPVAE(16, latent_dim=3).eval(), digits, 4)
        assert list(report.blocks) == [
            "encoder.0",
            "encoder.1",
            "mean",
            "logvar",
            "decoder.0",
            "decoder.1",
            "decoder.2",
        ]
        assert report.safe

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_model_is_left_as_it_was(self, dtype, digits):
        vae = tiny_vae().to(dtype)
        before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
        measure_precision(vae, digits, 4)
        assert all(
            tensor.dtype == dtype and torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items()
        )
        assert not hooks_of(vae)
