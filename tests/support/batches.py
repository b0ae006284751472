"""Micro-batches of an epoch."""

from diffusers_vae.data import deal, shuffled


def epoch_batches(length, batch_size, seed, epoch, rank=0, processes=1, micro_steps=1, start=0):
    return deal(shuffled(length, batch_size, seed, epoch, start), seed, epoch, rank, processes, micro_steps)
