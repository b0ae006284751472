"""What makes a model fast leaves its answers as they are, and the model that it was given."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import hooks_of, tiny_vae

from diffusers_vae import MLPVAE
from diffusers_vae.models import decode, encode, for_inference, several_at_once

DTYPES = (torch.float32, torch.bfloat16)


def images(channels=1, side=40):
    """40 pixels a side: feature maps above and below the size at which the layout of a norm changes."""
    return torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestForInference:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_as_near_to_float32_as_a_plain_cast(self, channels):
        vae = tiny_vae(channels)
        sample = images(channels)
        with torch.no_grad():
            exact = encode(vae, sample).parameters
            expected = decode(vae, exact[:, :4])
            fast = for_inference(vae, torch.bfloat16)
            plain = encode(tiny_vae(channels).bfloat16(), sample).parameters
            found = encode(fast, sample).parameters
            decoded = decode(fast, exact[:, :4])
        assert found.dtype == torch.float32
        assert 0 < (found - exact).std() < 1.2 * (plain - exact).std() < 0.02 * exact.std()
        assert 0 < (decoded - expected).std() < 0.03 * expected.std()

    def test_only_norms_of_small_feature_maps_are_contiguous_on_a_cpu(self):
        fast, layouts = for_inference(tiny_vae(3), torch.bfloat16), {}

        def note(module, inputs):
            if inputs[0].ndim == 4:
                layouts.setdefault(inputs[0].shape[-1], set()).add(inputs[0].is_contiguous())

        for module in fast.encoder.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            encode(fast, images(3))
        assert layouts == {40: {False}, 20: {True}}

    def test_the_model_is_left_as_it_was(self):
        vae = tiny_vae()
        vae.encoder.conv_in.weight.requires_grad_(True)
        before = {name: (tensor.clone(), tensor.stride()) for name, tensor in vae.state_dict().items()}
        fast = for_inference(vae, torch.bfloat16)
        assert fast is not vae and fast.dtype == torch.bfloat16 and not fast.training
        for name, tensor in vae.state_dict().items():
            assert tensor.stride() == before[name][1] and torch.equal(tensor, before[name][0])
        assert not hooks_of(vae)

    def test_returns_the_model_itself_where_nothing_changes(self):
        for dtype in (torch.float32, torch.float16):
            vae = tiny_vae().to(dtype)
            assert for_inference(vae, dtype) is vae

    def test_mlp(self):
        torch.manual_seed(0)
        vae = MLPVAE(image_size=8, hidden_dim=16, latent_dim=2).eval()
        with torch.no_grad():
            exact, found = (encode(for_inference(vae, dtype), images(side=8)).mean for dtype in DTYPES)
        torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)
        assert not torch.equal(found, exact)


class TestSeveralAtOnce:
    @pytest.fixture(params=[1, 2, 3, 12])
    def threads(self, request):
        before = torch.get_num_threads()
        torch.set_num_threads(request.param)
        yield request.param
        torch.set_num_threads(before)

    @pytest.mark.slow
    def test_gives_what_one_after_the_other_gives(self, threads):
        vae = tiny_vae()
        batches = [images(side=8 * count) for count in range(1, 8)]
        found = list(several_at_once(lambda batch: encode(vae, batch).parameters, batches, vae.device, 8))
        assert [batch for batch, _ in found] == batches
        for batch, parameters in found:
            assert not parameters.requires_grad
            with torch.no_grad():
                torch.testing.assert_close(parameters, encode(vae, batch).parameters)

    @pytest.mark.parametrize("most", [1, 2, 8])
    def test_so_many_at_a_time_share_the_threads(self, most, threads):
        """All come together, or the barrier breaks."""
        expected = {
            1: {1: (1, 1), 2: (1, 1), 8: (1, 1)},
            2: {1: (1, 2), 2: (2, 1), 8: (2, 1)},
            3: {1: (1, 3), 2: (1, 3), 8: (3, 1)},
            12: {1: (1, 12), 2: (2, 6), 8: (6, 2)},
        }
        workers, each = expected[threads][most]
        meeting = threading.Barrier(workers, timeout=20)

        def meet(item):
            meeting.wait()
            return torch.get_num_threads()

        found = list(several_at_once(meet, range(3 * workers), torch.device("cpu"), most))
        assert found == [(item, each) for item in range(3 * workers)]

    def test_torch_has_its_threads_back(self, threads):
        for _ in several_at_once(lambda item: item, range(5), torch.device("cpu"), 8):
            break
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == threads

    def test_items_are_not_made_far_ahead(self, threads):
        made = []
        items = (made.append(item) or item for item in range(50))
        for item, _ in several_at_once(lambda item: item, items, torch.device("cpu"), 8):
            assert len(made) <= item + 1 + min(threads, 8)

    def test_an_error_comes_in_its_turn(self, threads):
        def fail(item):
            if item == 2:
                raise OverflowError("too large")
            time.sleep(0.01)

        seen = []
        with pytest.raises(OverflowError, match="too large"):
            for item, _ in several_at_once(fail, range(9), torch.device("cpu"), 8):
                seen.append(item)
        assert seen == [0, 1]
