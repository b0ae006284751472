"""Loading, calling and identifying KL autoencoders of diffusers, ours or stock."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from diffusers.models import autoencoders
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from ..images.ranges import RANGE_FILE, ValueRange
from ..messages import hiding_passwords, in_a_line, showable
from ..processes import in_parts
from ..storage import digest_of_tensors
from ..untrusted import check_type, read_json, refuse_irregular, refuse_odd_name
from .mlp import MLPVAE
from .posterior import posterior_from_moments
from .scaling import is_local
from .single_file import load_single_file, read_single_file
from .stock import ModelMixin
from .vae import VAE

logger = logging.getLogger(__name__)

MOST = {"layers": 64, "channels": 2**13, "dim": 2**16, "size": 2**14, "": 2**20}
"""Largest number that a model's config.json may hold under a key that contains this word."""
MOST_BLOCKS = 64  # maximum entries of a list with one entry per block


@dataclass(frozen=True)
class Source:
    """Location of a KL autoencoder."""

    name: str
    """Folder of a model, of a run (its model/ is used) or of a pipeline (its vae/ is used), a Hub repository, or a
    .ckpt or .safetensors file of latent-diffusion, Stable Diffusion or Flux."""
    subfolder: str | None = None
    """Subfolder of `name` that holds the model."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""

    def model(self, dtype: torch.dtype = torch.float32) -> ModelMixin:
        """Load the autoencoder in eval mode without gradients: ours, or any in diffusers with `encode(...).latent_dist`
        and `decode(...).sample`.

        Raises:
            OSError: If there is no model.
            ValueError: If the model is not a KL autoencoder of images, or lacks weights.
        """
        if self._is_file():
            return load_single_file(Path(self.name), dtype).requires_grad_(False)
        name, source = self.config()["_class_name"], self.name
        cached = not Path(source).exists() and not _hub_answers()
        kind: Any = CLASSES[name]
        arguments = {"subfolder": self.inside, "revision": self.revision, "torch_dtype": dtype}
        arguments |= {"output_loading_info": True, "local_files_only": cached}
        try:
            with hiding_passwords():
                try:
                    model, report = kind.from_pretrained(source, **arguments)
                except OSError as error:
                    try:  # some repositories hold only float16 weights
                        model, report = kind.from_pretrained(source, variant="fp16", **arguments)
                    except OSError:
                        raise (_unreachable(error, source, cached) or error) from error
                    logger.warning("%s holds weights in float16 only", showable(source))
        except (ImportError, MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any type: diffusers checks few values of a config
            raise ValueError(
                f"{source} holds a config.json or weights that do not make a valid {name}: {in_a_line(error)}"
            ) from error
        if missing := report["missing_keys"]:  # diffusers would leave them random
            raise ValueError(f"{source} lacks {len(missing)} weights of its {name}, {', '.join(sorted(missing)[:3])}")
        return model.eval().requires_grad_(False)

    def config(self, classes: Collection[str] | None = None) -> dict[str, Any]:
        """Return the config of the autoencoder, with its class as `_class_name`.

        Raises:
            OSError: If there is no model.
            ValueError: If its class is not in `classes` (by default, all that `model` loads) or it has wrong values.
        """
        classes = tuple(CLASSES) if classes is None else classes
        source, folder, subfolder = self.name, Path(self.name), self.inside
        if self._is_file():
            return read_single_file(folder)[0]
        if not folder.exists() and is_local(source):
            raise FileNotFoundError(f"{no_such_path(source)}, and {source} is not a repository NAMESPACE/NAME")
        if folder.is_dir():
            file = folder / (subfolder or "") / "config.json"
            if not file.exists():
                raise FileNotFoundError(
                    f"{folder.resolve()} holds no model: no config.json, no model/config.json (of a run) and no "
                    "vae/config.json (of a pipeline)"
                )
            refuse_irregular(file.parent)
            return _checked(read_json(file), source, classes)
        cached = not _hub_answers()
        try:
            with hiding_passwords():
                config = MLPVAE.load_config(
                    source, subfolder=subfolder, revision=self.revision, local_files_only=cached
                )
        except RecursionError:
            raise ValueError(f"{source}: config.json is damaged: it is nested too deeply") from None
        except OSError as error:
            if unreachable := _unreachable(error, source, cached):
                raise unreachable from None
            if _caused_by(error, RepositoryNotFoundError) and not _caused_by(error, GatedRepoError):
                reason = "there is no such repository, or it is private and HF_TOKEN cannot read it"
            elif _caused_by(error, EntryNotFoundError):
                inside = (
                    f"its subfolder {subfolder}"
                    if subfolder
                    else "it; for a pipeline's VAE, it is in the subfolder vae"
                )
                reason = f"there is no config.json in {inside}"
            else:
                reason = str(error)
            raise OSError(f"{no_such_path(source)}, and {source} cannot be loaded from the Hub: {reason}") from error
        return _checked(config, source, classes)

    def value_range(self) -> ValueRange | None:
        """Return the value range that the model was trained with; None for 8-bit images."""
        if Path(self.name).exists():
            return ValueRange.load(Path(self.name, self.inside or ""))
        with hiding_passwords():
            try:
                file = hf_hub_download(self.name, RANGE_FILE, subfolder=self.subfolder, revision=self.revision)
            except LocalEntryNotFoundError:
                said = "%s is assumed to be a model of 8-bit images: the network is not available to check"
                logger.warning(said, showable(self.name))
                return None
            except EntryNotFoundError:
                return None
        return ValueRange.load(Path(file).parent)

    def check_value_range(self, stated: ValueRange | None) -> None:
        """Raise ValueError if the model was trained with another value range than `stated` in data.value_range."""
        found = self.value_range()
        if found and found != stated:
            raise ValueError(
                f"data.value_range must be {found}, with which {self.name} was trained, got {stated or 'null'}"
            )

    def repository(self) -> tuple[str | None, str | None]:
        """Return the Hub repository and revision, as given or from a path in the Hub's cache, or (None, None)."""
        path = Path(self.name)
        if not path.exists():
            return self.name, self.revision
        return cached_repository(str(path.absolute())) or cached_repository(str(path.resolve())) or (None, None)

    @property
    def inside(self) -> str | None:
        """Return the subfolder that holds the model, also for a run or a pipeline."""
        folder = Path(self.name)
        if self.subfolder is not None or (folder / "config.json").exists():
            return self.subfolder
        return next((name for name in ("model", "vae") if (folder / name / "config.json").exists()), None)

    def _is_file(self) -> bool:
        """Return whether the model is a single file; ValueError if a subfolder or a revision was given with it."""
        path = Path(self.name)
        refuse_odd_name(path, "a model")
        is_file = path.is_file()
        if path.exists() and not path.is_dir() and not is_file:
            raise ValueError(f"{self.name} must be a regular file, got a pipe, socket or device")
        if is_file and (given := self.subfolder or self.revision):
            raise ValueError(f"{self.name} is a file, so it can have no subfolder or revision, got {given}")
        return is_file


def load_autoencoder(name: str, dtype: torch.dtype = torch.float32) -> ModelMixin:
    """Load the autoencoder in a folder, file or repository. See `Source.model`."""
    return Source(name).model(dtype)


OF_IMAGES = ("AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE")
CLASSES = {
    "AutoencoderKL": VAE,
    **{
        name: getattr(autoencoders, name) for name in OF_IMAGES if hasattr(autoencoders, name)
    },  # missing in some versions
    "MLPVAE": MLPVAE,
}
"""Classes that a config.json may name: those with a Gaussian posterior over images. No other class is imported."""
OTHERS = tuple(
    kind
    for name, kind in vars(autoencoders).items()
    if isinstance(kind, type) and issubclass(kind, ModelMixin) and name not in CLASSES
)
"""Other autoencoders in diffusers: for video, sound or proteins, or without a posterior."""
CONFIG = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"), int),
    **dict.fromkeys(("block_out_channels", "down_block_out_channels", "up_block_out_channels"), list[int]),
    **dict.fromkeys(("down_block_types", "up_block_types"), list[str]),
    **dict.fromkeys(("scaling_factor", "shift_factor"), float | None),
    **dict.fromkeys(("latents_mean", "latents_std"), list[float] | None),
    **dict.fromkeys(("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), bool | None),
    "decoder_block_out_channels": list[int] | None,
    "act_fn": str,
}
"""Types of optional values of a config.json. sample_size and image_size are a side, or height and width."""


def _hub_answers() -> bool:
    """Return within seconds whether the Hub accepts connections; its client would retry for half a minute. Return True
    behind a proxy, which only the client can use.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if getproxies().keys() & {address.scheme, "all"}:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=3).close()
    except OSError:
        return False
    return True


def _unreachable(error: BaseException, source: str, cached: bool) -> OSError | None:
    """Return the error for a file that the Hub did not deliver, or was not asked for if `cached`; None for other
    causes.
    """
    if not cached and not _caused_by(error, LocalEntryNotFoundError):
        return None
    offline = " HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else " Check the connection"
    return OSError(
        f"{no_such_path(source)}, and the Hub could not be reached for the files of {source} that its cache on this "
        f"machine lacks.{offline}"
    )


def _caused_by(error: BaseException | None, kind: type[Exception]) -> bool:
    """Return whether `error`, or one that caused it, is of this class."""
    return error is not None and (isinstance(error, kind) or _caused_by(error.__cause__ or error.__context__, kind))


def no_such_path(source: str) -> str:
    """Return the text of an error for a missing path, with similar paths."""
    path = gone = Path(source)
    while not gone.parent.is_dir():
        gone = gone.parent
    try:
        names = get_close_matches(gone.name, os.listdir(gone.parent))
    except OSError:
        names = []
    similar = [gone.parent / name / path.relative_to(gone) for name in names]
    listed = " or ".join(str(each) for each in similar if each.exists())
    return f"there is no file or folder {path.resolve()}" + (f" (did you mean {listed}?)" if listed else "")


def filled_in(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return the config of an AutoencoderKL in `source` with all optional values; ValueError if it is invalid."""
    try:
        with torch.device("meta"):
            return VAE.from_config(config).config
    except Exception as error:  # any type, as above
        raise ValueError(
            f"{source} holds a config.json that does not make a valid AutoencoderKL: {in_a_line(error)}"
        ) from error


def _checked(config: Any, source: str, classes: Collection[str]) -> dict[str, Any]:
    """Return the config; ValueError for a class not in `classes`, or a value that no model has."""
    where = f"{source}: config.json"
    check_type(config, dict, where)
    if config.get("_class_name") == "FlaxAutoencoderKL":  # same weights; removed from diffusers
        config = config | {"_class_name": "AutoencoderKL"}
    if not isinstance(name := config.get("_class_name"), str) or name not in classes:
        raise ValueError(f"{source} must hold {_supported(name, classes)}")
    kinds = {key: kind for key, kind in CONFIG.items() if key in config}
    for key in ("sample_size", "image_size"):
        if key in config:
            kinds[key] = list[int] if isinstance(config[key], (list, tuple)) else int
    check_type(config, kinds, where)
    for key, value in config.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        if len(several) > (most := MOST_BLOCKS if "block" in key else MOST["channels"]):
            raise ValueError(f"{where}: {key} must have at most {most:,} entries, got {len(several):,}")
        most = next(most for part, most in MOST.items() if part in key)
        for number in several:
            if isinstance(number, (int, float)) and abs(number) > most:
                raise ValueError(f"{where}: {key} must be at most {most:,}, got {number:,}")
    return config


def _supported(name: str | None, classes: Collection[str]) -> str:
    """Return why an autoencoder of the class `name` is not supported, and what to do."""
    return (
        f"an autoencoder of images that this package supports, got the class {name}: give a model of the "
        f"class {' or '.join([', '.join([*classes][:-1])] * (len(classes) > 1) + [[*classes][-1]])}"
        + (f", and use {name} in diffusers" if any(name == kind.__name__ for kind in OTHERS) else "")
    )


SNAPSHOT = re.compile(r"(.*[/\\])?models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})([/\\].*)?")
"""Pattern of a path in the Hub's cache."""


def cached_repository(path: str) -> tuple[str, str] | None:
    """Return repository and commit of a path in the Hub's cache; None for any other path."""
    found = SNAPSHOT.fullmatch(path)
    return found and (found["id"].replace("--", "/"), found["revision"])


def encode(model: ModelMixin, images: torch.Tensor) -> DiagonalGaussianDistribution:
    """Return the float32 posterior of images (B, C, H, W) in [-1, 1] under any autoencoder; ValueError if the model has
    no posterior or takes another number of channels. Like `decode` and `decode_logits`, it runs the batch in parts if
    memory is short.
    """
    if isinstance(model, OTHERS):
        raise ValueError(f"the model must be {_supported(type(model).__name__, CLASSES)}")
    channels = getattr(model.config, "in_channels", images.shape[1])
    if channels != images.shape[1]:
        raise ValueError(
            f"the model takes images of {channels} channels, got {images.shape[1]}; data.channels sets how images are "
            "read"
        )

    def moments(part: torch.Tensor) -> torch.Tensor:
        encoded = model.encode(part.to(model.dtype))
        if not hasattr(encoded, "latent_dist"):
            raise ValueError(f"a KL autoencoder must have encode(...).latent_dist, unlike {type(model).__qualname__}")
        return encoded.latent_dist.parameters

    return posterior_from_moments(_joined(in_parts(model, moments, images)))


def decode(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Return float32 reconstructions (B, C, H, W) in [-1, 1] of latents (B, C, h, w) of any floating dtype."""
    return _joined(in_parts(model, lambda part: model.decode(part.to(model.dtype)).sample.float(), latents))


def decode_logits(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Return the float32 logits of the probabilities that pixels are on, for latents of any floating dtype; ValueError
    if the model has no logits.
    """
    logits: Any = getattr(model, "decode_logits", None)
    if logits is None:
        raise ValueError(
            "a Bernoulli likelihood needs a decoder that returns probabilities, such as MLPVAE's; the output of "
            f"{type(model).__qualname__} is unbounded: use gaussian or laplace"
        )
    return _joined(in_parts(model, lambda part: logits(part.to(model.dtype)).float(), latents))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


LATENT_PARTS = ("encoder", "quant_conv")  # the parts of a `VAE` that determine its latents


def weights_hash(model: torch.nn.Module, parts: Collection[str] | None = None) -> str:
    """Return the SHA-256 of all weights, or of those in the submodules `parts`, with names, shapes and dtypes."""
    weights = model.state_dict().items()
    return digest_of_tensors(
        {name: tensor for name, tensor in weights if parts is None or name.partition(".")[0] in parts}
    )
