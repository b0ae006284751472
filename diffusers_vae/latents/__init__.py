"""Latents of a model: statistics, writing to disk, reading."""
