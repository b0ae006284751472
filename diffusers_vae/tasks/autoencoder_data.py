"""Inputs of an autoencoder's run: images, a pretrained autoencoder, and the settings that follow from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import ArrayImages, ImageSet, StoredImages, load_data, refuse_colours
from ..data.stream import StreamedImages
from ..engine.program import settled
from ..engine.step import Program
from ..evaluation.evaluate import load_judges
from ..latents.dataset import Verification, matching_latents
from ..messages import showable
from ..models import VAE, weights_hash
from ..processes import one_first
from ..settings import begun_with, read_yaml
from ..untrusted import read_json
from .autoencoder_config import TrainConfig
from .encoded import ImagesWithLatents

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Published autoencoder to fine-tune, as it was when the run was started."""

    source: str
    """Source as in `model.pretrained`."""
    model: VAE
    weights_hash: str
    repository: str | None
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Inputs of a run: training and held-out images, and the pretrained autoencoder."""

    config: TrainConfig
    """Settings, with definite values of data.channels and run.step."""
    accelerator: Accelerator
    train_set: ImageSet | ImagesWithLatents
    heldout: ImageSet
    workers: int
    """Number of processes that read images."""
    pretrained: Pretrained | None = None
    verification: Verification | None = None

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.train_set)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Return what identifies the inputs: `images`, `fingerprint`, `contents` if they are known, and the `lanes` of
        a stream.
        """
        parts: dict[str, dict[str, Any]] = {
            name: {"images": len(part), "fingerprint": part.fingerprint()}
            | ({"contents": contents} if (contents := part.contents()) else {})
            for name, part in (("training", self.train_set), ("held-out", self.heldout))
        }
        if isinstance(self.train_set, StreamedImages):
            parts["training"]["lanes"] = list(self.train_set.lanes)
        if self.pretrained:
            parts["pretrained autoencoder"] = {"fingerprint": self.pretrained.weights_hash}
        return parts

    def image_errors(self) -> Iterator[str]:
        """Yield the reason for each image that was left out so far."""
        yield from self.train_set.errors
        yield from self.heldout.errors


def load_run_data(
    config: TrainConfig,
    accelerator: Accelerator,
    memory_limit: int | None = None,
    checkpoint: Path | None = None,
) -> RunData:
    """Load images and a pretrained autoencoder on all processes, and settle the settings that depend on them.

    Args:
        config: settings of the run.
        accelerator: accelerator of the launch.
        memory_limit: see `load_data`.
        checkpoint: checkpoint from which the run continues.
    """
    forwards = accelerator.num_processes * config.run.gradient_accumulation_steps
    if forwards % config.objective.transformations:
        raise ValueError(
            "the number of processes times run.gradient_accumulation_steps must be a multiple of "
            f"objective.transformations, {config.objective.transformations}, since the images of a forward share a "
            f"transformation, got {accelerator.num_processes} x {config.run.gradient_accumulation_steps}"
        )
    with one_first(accelerator.is_local_main_process, "reading the data set"):
        images, heldout = load_data(config.data, accelerator.is_local_main_process, memory_limit)
    if accelerator.is_main_process:
        logger.info("%s", showable(images.files))
    if isinstance(images, StreamedImages):
        images.lanes = _lanes_of(checkpoint) or (forwards, max(1, config.data.num_workers))
        if accelerator.is_main_process:
            _warn_of_another_order(config)
    if config.data.channels is None and config.model.pretrained:
        refuse_colours(images, config.data, config.model.pretrained)
    config = replace(config, data=replace(config.data, channels=images.channels))
    load_judges(config.evaluation, images.channels, config.data.size)  # are missed now, not after days
    on_demand = isinstance(images, StoredImages) or images.augmentation
    if isinstance(images, ArrayImages) and not on_demand and accelerator.device.type == "cuda":
        free = torch.cuda.mem_get_info(accelerator.device)[0]
        if images.pixels.nbytes <= free / 8:  # a step then copies nothing but its indices
            images = images.to(accelerator.device)
    train_set: ImageSet | ImagesWithLatents = images
    pretrained = verification = None
    if config.model.pretrained:
        pretrained = _load_pretrained(config)
        if config.model.latents:
            train_set = _with_latents(config, config.model.latents, pretrained.model, images)
            verification = Verification(train_set.latents)
    run = settled(config.run, program_of(config), len(train_set), accelerator)
    config = replace(config, run=run)
    return RunData(
        config=config,
        accelerator=accelerator,
        train_set=train_set,
        heldout=heldout,
        workers=config.data.num_workers if on_demand else 0,
        pretrained=pretrained,
        verification=verification,
    )


def program_of(config: TrainConfig) -> Program:
    """Return the properties that decide how the steps of a run are executed."""
    height, width = config.data.size
    values = config.run.batch_size * height * width * config.model.width
    types = ("cuda", "cpu") if config.model.architecture == "mlp" else ("cuda",)
    return Program(values, config.changes_by_step, types)


def _lanes_of(checkpoint: Path | None) -> tuple[int, int] | None:
    """Return the lanes of the stream that a checkpoint was trained on; earlier versions kept them in config.yaml."""
    if not checkpoint:
        return None
    lanes = read_json(checkpoint / "data.json")["training"].get("lanes")
    lanes = lanes or read_yaml(checkpoint / "config.yaml")["data"].get("lanes")
    return lanes and tuple(lanes)


def _warn_of_another_order(config: TrainConfig) -> None:
    """Warn if a stream continues, by `run.allow_config_change`, with other settings that decide its order."""
    run = config.run
    now = {"data.shuffle_buffer": config.data.shuffle_buffer, "run.batch_size": run.batch_size}
    for name, value in now.items():
        begun = begun_with(run.output_dir, *name.split("."))
        if begun not in (None, value):
            logger.warning(
                "the order of a stream depends on %s, %s -> %s: where the run goes on within an epoch, some images "
                "are seen twice in it and others not at all",
                name,
                begun,
                value,
            )


def _load_pretrained(config: TrainConfig) -> Pretrained:
    source = config.model.source
    pretrained = source.model()
    assert isinstance(pretrained, VAE)
    source.check_value_range(config.data.stated_range)
    repository, revision = source.repository()
    return Pretrained(
        source=source.name,
        model=pretrained,
        weights_hash=weights_hash(pretrained),
        repository=repository,
        revision=revision,
    )


def _with_latents(config: TrainConfig, folder: str, pretrained: VAE, images: ImageSet) -> ImagesWithLatents:
    latents = matching_latents(pretrained, images, folder, f"training images of {config.data.described}")
    if latents.kind != "posterior":
        raise ValueError(
            f"model.latents needs mean and logvar, and {folder} holds latents of kind {latents.kind}: encode with "
            "--kind posterior"
        )
    return ImagesWithLatents(images, latents)
