"""Which images each step of a stream has."""

from itertools import chain

import numpy as np
import pytest

from diffusers_vae.data.order import deal, streamed

COUNTS = np.array([30, 7, 100, 1, 64, 33, 90, 12])


def of_stream(counts=COUNTS, lanes=(2, 2), buffer=64, batch_size=8, seed=0, epoch=0, start=0):
    batches = list(streamed(counts, lanes, buffer, batch_size, seed, epoch, start))
    return [indices.tolist() for indices in batches]


class TestStream:
    @pytest.mark.parametrize("lanes", [(1, 1), (2, 1), (1, 3), (4, 2), (3, 5), (16, 1), (64, 8)])
    @pytest.mark.parametrize("batch_size", [1, 8, 13, 400])
    @pytest.mark.parametrize("buffer", [1, 50, 10_000])
    def test_every_image_once_in_whole_batches(self, lanes, batch_size, buffer):
        batches = of_stream(lanes=lanes, batch_size=batch_size, buffer=buffer)
        assert sorted(chain(*batches)) == list(range(COUNTS.sum()))
        assert all(len(batch) == batch_size for batch in batches[:-1])

    @pytest.mark.parametrize("counts", [[1], [5], [8], [16], [1] * 20])
    def test_every_image_once_of_few_images(self, counts):
        assert sorted(chain(*of_stream(np.array(counts)))) == list(range(sum(counts)))

    @pytest.mark.parametrize("lanes", [(1, 1), (2, 2), (3, 5)])
    def test_epoch_is_continued_within(self, lanes):
        whole = of_stream(lanes=lanes)
        for step in range(len(whole)):
            assert of_stream(lanes=lanes, start=8 * step) == whole[step:]
        with pytest.raises(ValueError, match=r"12 images of this epoch were seen, which 8 does not divide"):
            of_stream(start=12)

    def test_pure_function_of_seed_and_epoch(self):
        def flat(seed, epoch):
            return tuple(chain(*of_stream(seed=seed, epoch=epoch)))

        assert flat(1, 2) == flat(1, 2)
        assert len({flat(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9

    @pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 2), (4, 3)])
    def test_a_block_is_read_by_one_worker_of_one_process(self, processes, workers):
        """Except those at the ends of pieces: one for each piece."""
        counts = np.full(400, 20)
        batches = [np.array(batch) for batch in of_stream(counts, (processes, workers), 500, 10 * processes)]
        readers: dict[int, set] = {block: set() for block in range(400)}
        for rank in range(processes):
            for step, (micro,) in enumerate(deal(iter(batches), 0, 0, rank, processes)):
                for index in micro.indices:
                    readers[index // 20].add((rank, step % workers))
        assert sum(len(own) > 1 for own in readers.values()) <= processes * workers - 1
        assert len(set.union(*readers.values())) == processes * workers

    @pytest.mark.parametrize(("lanes", "buffer", "most"), [((1, 1), 40, 3), ((1, 1), 400, 21), ((4, 2), 640, 48)])
    def test_few_blocks_are_needed_at_a_time(self, lanes, buffer, most):
        """As many as the buffer holds, and one more for each piece."""
        counts = np.full(400, 20)
        order = np.array(list(chain(*of_stream(counts, lanes, buffer)))) // 20
        first, last = {}, {}
        for place, block in enumerate(order.tolist()):
            first.setdefault(block, place)
            last[block] = place
        open_at = np.zeros(len(order) + 1, dtype=int)
        for block, place in first.items():
            open_at[place] += 1
            open_at[last[block] + 1] -= 1
        assert open_at.cumsum().max() <= most

    def test_images_are_mixed(self):
        """Neighbours in a block are far from each other, and a batch has images of many blocks."""
        counts = np.full(400, 20)
        batches = of_stream(counts, (2, 1), 1000, 16)
        assert np.mean([len({index // 20 for index in batch}) for batch in batches]) > 12
        order = np.array(list(chain(*batches)))
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
