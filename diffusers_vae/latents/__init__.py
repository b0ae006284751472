"""The latents of a model: described, written to disk, read."""
