"""Settings for training a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from ..data import DataConfig
from ..engine.config import OptimizerConfig, RunConfig, RunSettings
from ..fields import at_home, check, setting
from ..losses.diffusion import DiffusionConfig
from ..models import Source


@dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder of the latents; --vae MODEL is short for --vae.source MODEL."""

    source: str = setting("runs/digits/model", "free")
    """Trained autoencoder: folder of a run, model or pipeline, or Hub repository."""
    subfolder: str | None = setting(None, "free")
    """Subfolder of `source` that holds the model."""
    revision: str | None = setting(None, "free")
    """Branch, tag or commit of the repository `source`."""

    def __post_init__(self):
        at_home(self, "source")

    @property
    def location(self) -> Source:
        """Source, subfolder and revision as one object."""
        return Source(self.source, self.subfolder, self.revision)


@dataclass(frozen=True)
class LatentsConfig:
    """Latents of the training images, encoded once; --latents DIR is short for --latents.folder DIR."""

    folder: str | None = setting(None, "free")
    """Folder of the latents, from `diffusers-vae encode DATA --split training` or to write them to; null: latents/ in
    run.output_dir."""

    def __post_init__(self):
        at_home(self, "folder")


@dataclass(frozen=True)
class CaptionConfig:
    """Captions of the images.

    Captions beside the images of a folder, in metadata.jsonl or .txt files, are used unchanged. Otherwise, labels are
    put into phrases.
    """

    phrases: tuple[str, ...] | None = None
    """Captions from labels, with {name}, the label in words, or {number}, in digits, all used for each image
    (docs/images.md); null: built-in ones."""
    max_length: int = setting(16, at_least=3)
    """Maximum number of tokens of a caption, start and end included."""

    def __post_init__(self):
        check("captions", self)
        if self.phrases is not None:
            if not self.phrases:
                raise ValueError("captions.phrases must name one phrase at least, or be null")
            for phrase in self.phrases:
                try:
                    said = phrase.format(name="a", number=0) != phrase.format(name="b", number=1)
                except (IndexError, KeyError, ValueError) as error:
                    raise ValueError(
                        f"a phrase of captions.phrases may have {{name}} and {{number}}, no other braces, got {phrase}"
                    ) from error
                if not said:
                    raise ValueError(f"a phrase in captions.phrases must hold {{name}} or {{number}}, got {phrase!r}")


@dataclass(frozen=True)
class DenoiserConfig:
    """The U-Net and the text encoder, stock `UNet2DConditionModel` and `CLIPTextModel`, both trained from scratch."""

    block_out_channels: tuple[int, ...] = setting((64, 128), at_least=1)
    """Width per resolution of the U-Net, which attends to the prompt at all but the highest, or at the only one."""
    layers_per_block: int = setting(1, at_least=1)
    """Residual layers per resolution, with one more on the way up."""
    attention_heads: int = setting(1, at_least=1)
    """Number of heads per attention of the U-Net, a divisor of every width."""
    norm_num_groups: int = setting(32, at_least=1)
    """Number of groups of the group norms, a divisor of every width."""
    text_width: int = setting(128, at_least=1)
    """Width of the text encoder, a multiple of 8; it has 4 attention heads, or fewer if they would be narrower than
    8."""
    text_layers: int = setting(2, at_least=1)
    """Number of layers of the text encoder."""

    def __post_init__(self):
        check("model", self)
        for name in ("attention_heads", "norm_num_groups"):
            for width in self.block_out_channels:
                if width % getattr(self, name):
                    raise ValueError(
                        f"model.block_out_channels must be divisible by model.{name}, got {width} and "
                        f"{getattr(self, name)}"
                    )
        if self.text_width % 8:
            raise ValueError(f"model.text_width must be divisible by 8, got {self.text_width}")

    @property
    def text_heads(self) -> int:
        """Number of attention heads of the text encoder."""
        return min(4, self.text_width // 8)


@dataclass(frozen=True)
class SamplingConfig:
    """Pictures in pictures/, and the scheduler that is saved in the pipeline."""

    scheduler: Literal["ddim", "pndm", "dpm-solver"] = "ddim"
    """Scheduler: DDIM (Song et al. 2021), PNDM (Liu et al. 2022) or DPM-Solver++ (Lu et al. 2022)."""
    steps: int = setting(25, at_least=1, at_most=1000)
    """Number of denoising steps per picture in pictures/."""
    prompts: tuple[str, ...] | None = None
    """Prompts, one row of the grid each; null: up to ten labels in the first phrase, or captions of the first held-out
    images."""
    seeds: int = setting(4, at_least=1)
    """Number of seeds, one column of the grid each, for every guidance scale."""
    guidance: tuple[float, ...] = setting((1.0, 2.0, 4.0, 7.5), at_least=1)
    """Classifier-free guidance scales, side by side; 1 is no guidance."""
    heldout_images: int = setting(1000, at_least=1)
    """Maximum number of held-out images on which the loss is measured."""
    every: int | None = setting(None, at_least=1)
    """Number of images between grids during training; null: only one at the end."""

    def __post_init__(self):
        if self.prompts is not None and not self.prompts:
            raise ValueError("sampling.prompts must hold one prompt at least, or be null")
        check("sampling", self)


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig(RunSettings):
    """All settings of a run."""

    data: DataConfig
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=partial(OptimizerConfig, learning_rate=1e-3))
    run: RunConfig = field(default_factory=partial(RunConfig, output_dir="runs/digits-t2i", epochs=60, batch_size=64))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self):
        if changing := self.data.changes_images or "data.streaming" * self.data.streaming:
            raise ValueError(f"latents are encoded once, from unchanged images: leave out {changing}")

    def unreached(self, total_images: int) -> list[str]:
        """Return warnings, one sentence each, of settings that take no or only partial effect in a run of
        `total_images` images.
        """
        return self.optimizer.unreached(total_images)
