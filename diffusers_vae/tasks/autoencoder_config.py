"""Settings for training an autoencoder, and the checks between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data import DataConfig
from ..engine.config import OptimizerConfig, RunConfig, RunSettings
from ..evaluation.evaluate import EvaluationConfig
from ..hub.config import HubConfig
from ..losses import equivariance
from ..losses.adversarial import AdversarialConfig, PatchDiscriminator
from ..losses.objective import ObjectiveConfig
from ..models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunSettings):
    """All settings of a run. Data, model and objective have no default, because the settings of one data set,
    architecture or likelihood do not fit another.
    """

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self):
        run = Path(self.run.output_dir)
        if self.model.pretrained and (run / "evaluation.json").exists():  # a finished run needs its source no more
            self.model.made(run / "model")
        height, width = self.data.size
        ratio = self.model.spatial_compression_ratio
        if height % ratio or width % ratio:
            raise ValueError(
                f"data.resolution must be divisible by {ratio}, the downsampling factor of "
                f"{self.model.pretrained or 'model.block_out_channels'}, got {height}x{width}"
            )
        if self.objective.likelihood == "bernoulli" and self.model.architecture != "mlp":
            raise ValueError(
                "objective.likelihood bernoulli needs a decoder that gives probabilities, which the mlp architecture "
                f"does and {self.model.architecture}, whose output is unbounded, does not; use gaussian or laplace"
            )
        for setting in ("objective.equivariance", "adversarial.weight"):
            section, name = setting.split(".")
            if getattr(getattr(self, section), name) and self.model.architecture == "mlp":
                raise ValueError(f"{setting} needs the architecture vae: an MLP has no positions in an image")
        if self.objective.equivariance and not self.model.trains_encoder:
            raise ValueError(
                "objective.equivariance shapes the latents, so the encoder must be trained, and model.train "
                f"{self.model.train} leaves it as it is"
            )
        for name, unused in (("kl_schedule", "constant"), ("free_bits", 0), ("target_rate", None)):
            if getattr(self.objective, name) != unused and not self.model.trains_encoder:
                raise ValueError(
                    f"objective.{name} {getattr(self.objective, name)} shapes the rate, and an encoder that is not "
                    f"trained has always the same: leave it out with model.train {self.model.train}"
                )
        if self.objective.equivariance:
            latents = self.model.latent_shape(self.data.size)[1:]
            if equivariance.smallest(latents)[0] == latents[0]:
                raise ValueError(
                    "objective.equivariance needs latents that can be made smaller, got "
                    f"{latents[0]}x{latents[1]}: take larger images"
                )
        if self.run.gradient_checkpointing and self.model.architecture == "mlp":
            raise ValueError("run.gradient_checkpointing needs the architecture vae: an MLP stores few activations")
        if self.data.caption_column is not None:
            raise ValueError(
                f"data.caption_column {self.data.caption_column} would be ignored, since an autoencoder is trained "
                "without captions: leave it out"
            )
        if self.model.latents and (self.data.changes_images or self.data.streaming):
            raise ValueError(
                "model.latents belong to unchanged images, but training would change them: leave out "
                f"{self.data.changes_images or 'data.streaming'}"
            )
        if self.adversarial.weight:
            PatchDiscriminator.check(self.smallest_size, self.adversarial.layers)
        if self.model.pretrained:
            self._check_pretrained()

    def _check_pretrained(self) -> None:
        """Raise ValueError for settings that contradict the pretrained source, before a run begins."""
        if self.data.channels is None and self.model.image_channels != {1}:  # a grey model must not hide colours
            object.__setattr__(self, "data", replace(self.data, channels=max(self.model.image_channels)))
        if self.data.name == "digits" and self.data.channels not in self.model.image_channels:
            raise ValueError(
                f"model.pretrained {self.model.pretrained} takes images of "
                f"{' and '.join(map(str, self.model.image_channels))} channels, and the images are scikit-learn's "
                "digits, which are grey: name those to train on, with --data.root FOLDER for example"
            )
        with torch.device("meta"):
            vae = self.model.build(self.data.channels or 1, self.data.size)
        adaptive = self.adversarial.weight and self.adversarial.adaptive
        decoder: Any = vae.decoder
        if adaptive and not decoder.conv_out.weight.requires_grad:
            left = f"lora_rank {self.model.lora_rank}" if self.model.lora_rank else f"train {self.model.train}"
            raise ValueError(
                "adversarial.adaptive compares gradients at the decoder's last layer, decoder.conv_out.weight, which "
                f"model.{left} leaves as it is: train it, too, or set adversarial.adaptive to false"
            )

    @property
    def changes_by_step(self) -> str:
        """Settings that make a step another program than the step before; an empty string if there are none."""
        constant = {"kl_schedule": "constant", "target_rate": None, "free_bits": 0, "equivariance": 0}
        changing = [name for name, value in constant.items() if getattr(self.objective, name) != value]
        changing += ["scale"] * (self.objective.scale == "optimal")
        named = [f"objective.{name} {getattr(self.objective, name)}" for name in changing]
        # which joins late, and whose adaptive weight goes through the backward twice
        named += [f"adversarial.weight {self.adversarial.weight}"] * bool(self.adversarial.weight)
        return ", ".join(named)

    def unreached(self, total_images: int) -> list[str]:
        """Return warnings, one sentence each, of settings that take no or only partial effect in a run of
        `total_images` images.
        """
        sections = (self.optimizer, self.objective, self.adversarial)
        return [sentence for section in sections for sentence in section.unreached(total_images)]

    @property
    def smallest_size(self) -> tuple[int, int]:
        """Height and width of the smallest images that the losses receive."""
        if not self.objective.equivariance:
            return self.data.size
        ratio = self.model.spatial_compression_ratio
        height, width = equivariance.smallest(self.model.latent_shape(self.data.size)[1:])
        return height * ratio, width * ratio
