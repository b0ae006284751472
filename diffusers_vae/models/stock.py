"""Typed declarations of diffusers' model classes (0.36 to 0.42), which have hardly any types, for type checkers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Self

    class ModelMixin(nn.Module):
        """`ModelMixin`, `ConfigMixin` and `PeftAdapterMixin` in one."""

        config: Any
        dtype: torch.dtype
        device: torch.device
        peft_config: dict[str, Any]

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self: ...
        @classmethod
        def from_config(cls, config: Any) -> Self: ...
        @classmethod
        def load_config(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> dict[str, Any]: ...
        def register_to_config(self, **kwargs: Any) -> None: ...
        def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None: ...
        def to_json_string(self) -> str: ...
        def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int: ...
        def enable_gradient_checkpointing(self) -> None: ...
        def add_adapter(self, adapter_config: Any) -> None: ...
        def save_lora_adapter(self, save_directory: str | PathLike[str]) -> None: ...
        def fuse_lora(self) -> None: ...
        def unload_lora(self) -> None: ...
        def to(self, *args: Any, **kwargs: Any) -> Self: ...
        def fuse_qkv_projections(self) -> None: ...
        def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any: ...
        def decode(
            self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
        ) -> Any: ...

    class ConfigMixin: ...

    class AttentionMixin: ...

    class AutoencoderMixin: ...

    class FromOriginalModelMixin: ...

    class PeftAdapterMixin: ...

    class AutoencoderKL(ModelMixin):
        """Stock autoencoder, with the methods that `VAE` borrows."""

        encoder: nn.Module
        decoder: nn.Module
        use_slicing: bool
        use_tiling: bool
        tile_sample_min_size: int
        tile_latent_min_size: int
        tile_overlap_factor: float

        @classmethod
        def from_single_file(cls, *args: Any, **kwargs: Any) -> Self: ...
else:
    from diffusers import AutoencoderKL
    from diffusers.configuration_utils import ConfigMixin as ConfigMixin
    from diffusers.loaders import FromOriginalModelMixin as FromOriginalModelMixin
    from diffusers.loaders import PeftAdapterMixin as PeftAdapterMixin
    from diffusers.models.attention import AttentionMixin as AttentionMixin
    from diffusers.models.autoencoders.vae import AutoencoderMixin as AutoencoderMixin
    from diffusers.models.modeling_utils import ModelMixin as ModelMixin


def signature_of(reference: Any) -> Callable[[F], F]:
    """Return a decorator that gives a method the signature of `reference`, which pipelines inspect."""
    return cast(Callable[[F], F], wraps(reference, assigned=()))


def borrow(name: str) -> Any:
    """Return the method `name` of stock `AutoencoderKL`, even a private one, for a class with the same parts."""
    return getattr(AutoencoderKL, name)
