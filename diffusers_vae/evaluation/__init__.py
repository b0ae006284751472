"""Evaluation: figures of a model on images, and comparison of two models."""
