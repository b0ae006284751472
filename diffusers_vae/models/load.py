"""Any KL autoencoder of diffusers, ours or stock: loaded, called, and told from others."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models import autoencoders
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin

from ..messages import hiding_passwords, showable
from ..processes import in_parts
from ..untrusted import check_type, read_json, refuse_irregular, refuse_odd_name
from .mlp import MLPVAE
from .single_file import load_single_file, read_single_file
from .vae import VAE, posterior_from_moments

logger = logging.getLogger(__name__)

MOST = {"layers": 64, "channels": 2**13, "dim": 2**16, "size": 2**14}
"""The largest number in a model's config.json under a key with this in its name."""
MOST_OTHERWISE = 2**20
MOST_BLOCKS = 64
"""Entries of a list in a config.json with one for each block."""


def load_autoencoder(
    source: str, subfolder: str | None = None, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> ModelMixin:
    """The KL autoencoder in `source`, in eval mode and without gradients: ours, or any of diffusers with
    `encode(...).latent_dist` and `decode(...).sample`.

    Args:
        source: a model's folder, a run's (its model/ is taken), a pipeline's (its vae/ is taken), a repository on the
            Hub, or a .ckpt or .safetensors file of latent-diffusion, Stable Diffusion or Flux.
        subfolder: where in `source` the model lies.
        revision: of the repository.
        dtype: of the weights.

    Raises:
        OSError: when there is no model.
        ValueError: when it is no KL autoencoder of images, or lacks weights.
    """
    if _is_file(source, subfolder, revision):
        return load_single_file(Path(source), dtype).requires_grad_(False)
    config = read_config(source, subfolder, revision)
    name = config["_class_name"]
    kind = CLASSES[name]
    arguments = {"revision": revision, "torch_dtype": dtype, "output_loading_info": True}
    place = find_subfolder(source, subfolder)
    try:
        with hiding_passwords():
            try:
                model, report = kind.from_pretrained(source, subfolder=place, **arguments)
            except OSError as error:
                try:  # some repositories hold no other weights
                    model, report = kind.from_pretrained(source, subfolder=place, variant="fp16", **arguments)
                except OSError:
                    raise (_unreachable(error, source) or error) from None
                logger.warning("%s holds its weights in float16 only", showable(source))
    except (ImportError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: diffusers checks few of a config's values
        raise ValueError(
            f"{source} holds a config.json or weights of which no {name} can be made: {_in_a_line(error)}"
        ) from error
    if missing := report["missing_keys"]:  # diffusers leaves them random
        raise ValueError(f"{source} lacks {len(missing)} weights of its {name}, {', '.join(sorted(missing)[:3])}")
    return model.eval().requires_grad_(False)


CLASSES = {
    name: kind
    for name, kind in vars(autoencoders).items()
    if isinstance(kind, type) and issubclass(kind, ModelMixin) and hasattr(kind, "encode")
} | {"MLPVAE": MLPVAE, "AutoencoderKL": VAE}
"""Classes that a config.json may name; no other is looked up."""
CONFIG = {
    "in_channels": int,
    "out_channels": int,
    "latent_channels": int,
    "block_out_channels": list[int],
    "scaling_factor": float | None,
    "shift_factor": float | None,
    "latents_mean": list[float] | None,
    "latents_std": list[float] | None,
    "force_upcast": bool | None,
}
"""Values of a config.json that are read here, where it has them."""


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _unreachable(error: BaseException, source: str) -> OSError | None:
    """What to say where diffusers misses a file, or cannot load it, because the Hub did not answer."""
    cause: BaseException | None = error
    while cause and type(cause).__name__ != "LocalEntryNotFoundError":
        cause = cause.__cause__ or cause.__context__
    return cause and OSError(
        f"there is no file or folder {Path(source).resolve()}, and the Hub could not be reached for the files of "
        f"{source} that its cache on this machine lacks: check the connection, and HF_HUB_OFFLINE, and try again"
    )


def filled_in(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The config of an AutoencoderKL in `source`, with what a config.json may leave out; ValueError when none can be
    made of it.
    """
    try:
        with torch.device("meta"):
            return VAE.from_config(config).config
    except Exception as error:  # of any kind, as above
        raise ValueError(
            f"{source} holds a config.json of which no AutoencoderKL can be made: {_in_a_line(error)}"
        ) from error


def read_config(source: str, subfolder: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The config of the autoencoder that `load_autoencoder` finds, with its class as `_class_name`.

    Raises:
        OSError: when there is no model.
        ValueError: when it is none of an autoencoder, or has wrong values.
    """
    folder, place = Path(source), find_subfolder(source, subfolder)
    if _is_file(source, subfolder, revision):
        return read_single_file(folder)[0]
    if not folder.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"there is no file or folder {folder.resolve()}, and {source} is no repository's NAMESPACE/NAME"
        )
    if folder.is_dir() and not (folder / (place or "") / "config.json").exists():
        raise FileNotFoundError(
            f"{folder.resolve()} holds no model: neither config.json nor model/config.json (of a run) nor "
            "vae/config.json (of a pipeline) is there"
        )
    if folder.is_dir():
        refuse_irregular(folder / (place or ""))
        return _checked(read_json(folder / (place or "") / "config.json"), source)
    try:
        with hiding_passwords():
            config = MLPVAE.load_config(source, subfolder=place, revision=revision)
    except RecursionError:
        raise ValueError(f"{source}: config.json is damaged, it is nested too deeply") from None
    except OSError as error:
        raise _unreachable(error, source) or OSError(
            f"there is no file or folder {folder.resolve()}, and from the Hub {source} cannot be loaded (the "
            f"autoencoder of a pipeline lies in its subfolder vae): {error}"
        ) from error
    return _checked(config, source)


def _checked(config: Any, source: str) -> dict[str, Any]:
    """The config of the autoencoder in `source`; ValueError naming the class that is none, or the key whose value no
    model has, and which might fill any memory.
    """
    where = f"{source}: config.json"
    check_type(config, dict, where)
    if not isinstance(name := config.get("_class_name"), str) or name not in CLASSES:
        raise ValueError(f"{source} must hold an autoencoder of diffusers or of this package, got the class {name}")
    check_type(config, {key: kind for key, kind in CONFIG.items() if key in config}, where)
    for key, value in config.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        if len(several) > (most := MOST_BLOCKS if "block" in key else MOST["channels"]):
            raise ValueError(f"{where}: {key} must have at most {most:,} entries, got {len(several):,}")
        most = next((most for part, most in MOST.items() if part in key), MOST_OTHERWISE)
        for number in several:
            if isinstance(number, (int, float)) and abs(number) > most:
                raise ValueError(f"{where}: {key} must be at most {most:,}, got {number:,}")
    return config


def _is_file(source: str, subfolder: str | None, revision: str | None) -> bool:
    """Whether the model is a single file; ValueError when it is, and has to have a subfolder or a revision."""
    path = Path(source)
    refuse_odd_name(path, "a model")
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise ValueError(f"{source} must be a regular file, got a pipe, socket or device")
        return False
    if subfolder or revision:
        raise ValueError(f"{source} is a file, which has no subfolder or revision, got {subfolder or revision}")
    return True


SNAPSHOT = re.compile(r"(.*[/\\])?models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})([/\\].*)?")
"""Path in the Hub's cache."""


def cached_repository(path: str) -> tuple[str, str] | None:
    """Repository and commit of a folder or file in the Hub's cache, by its path; None for any other path."""
    found = SNAPSHOT.fullmatch(path)
    return found and (found["id"].replace("--", "/"), found["revision"])


def find_repository(source: str, revision: str | None) -> tuple[str | None, str | None]:
    """Repository on the Hub and revision that `load_autoencoder` takes `source` from: as given or, where `source` is a
    folder or file of the Hub's cache, as its path states; (None, None) for any other folder or file.
    """
    path = Path(source)
    if not path.exists():
        return source, revision
    return cached_repository(str(path.absolute())) or cached_repository(str(path.resolve())) or (None, None)


def find_subfolder(source: str, subfolder: str | None) -> str | None:
    """`subfolder`, or where the model lies in the folder of a run or a pipeline."""
    folder = Path(source)
    if subfolder is not None or (folder / "config.json").exists():
        return subfolder
    return next((name for name in ("model", "vae") if (folder / name / "config.json").exists()), None)


def encode(model: ModelMixin, images: torch.Tensor) -> DiagonalGaussianDistribution:
    """The posterior, in float32, of images (B, C, H, W) in [-1, 1] under any autoencoder of diffusers. This function,
    `decode` and `decode_logits` run parts of the batch where memory does not suffice for all of it.

    Raises:
        ValueError: when the model has none, or takes images of other channels.
    """
    channels = getattr(model.config, "in_channels", images.shape[1])
    if channels != images.shape[1]:
        raise ValueError(
            f"the model takes images of {channels} channels, got {images.shape[1]}; data.channels says how images are "
            "read"
        )

    def moments(part: torch.Tensor) -> torch.Tensor:
        encoded = model.encode(part.to(model.dtype))
        if not hasattr(encoded, "latent_dist"):
            raise ValueError(f"a KL autoencoder has encode(...).latent_dist, which {type(model).__qualname__} has not")
        return encoded.latent_dist.parameters

    return posterior_from_moments(_joined(in_parts(model, moments, images)))


def decode(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Reconstructions in float32 of latents of any floating dtype."""
    return _joined(in_parts(model, lambda part: model.decode(part.to(model.dtype)).sample.float(), latents))


def decode_logits(model: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Logits, float32, of the probabilities that pixels are on, for latents of any floating dtype.

    Raises:
        ValueError: when the model has no logits.
    """
    if not hasattr(model, "decode_logits"):
        raise ValueError(
            "a Bernoulli likelihood needs a decoder that gives probabilities, such as that of MLPVAE; that of "
            f"{type(model).__qualname__} is unbounded: use gaussian or laplace"
        )
    return _joined(in_parts(model, lambda part: model.decode_logits(part.to(model.dtype)).float(), latents))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


LATENT_PARTS = ("encoder", "quant_conv")
"""The parts of a `VAE` that decide its latents."""


def weights_hash(model: torch.nn.Module, parts: Collection[str] | None = None) -> str:
    """SHA-256 of all weights with their names, shapes and dtypes, the same however they were saved.

    With `parts`, of those of these submodules: ("encoder", "quant_conv") decide the latents of a `VAE`. One that the
    model has not is passed over.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if parts is not None and name.partition(".")[0] not in parts:
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
