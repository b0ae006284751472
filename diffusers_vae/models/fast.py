"""Blocks of diffusers' autoencoders for a GPU: channels-last, with group norm and SiLU as one kernel."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

M = TypeVar("M", bound=nn.Module)


def _kernel() -> Any:
    """Return Triton's group norm, or None if no GPU supports it."""
    if not torch.cuda.is_available() or not find_spec("triton"):
        return None
    from .norms import group_norm

    return group_norm


group_norm: Any = _kernel()


def fast(vae: M, on: bool = True, *, compiled: bool = False) -> M:
    """Make `vae` faster on a CUDA GPU, in place, and return it: a `VAE`, or an `AutoencoderKL` of stock diffusers, such
    as a pipeline's. Outputs agree within rounding; config, parameters and saved files do not change.

    Convolutions are channels-last, as cuDNN computes them, and keep that layout from block to block. Group norm and
    SiLU are one Triton kernel with float32 inside. Attention is computed in parts. On a CPU, and where Triton is not
    installed, all blocks compute as before.

    Args:
        vae: The autoencoder. Modules of classes that are not in `AutoencoderKL` do not change.
        on: Whether to make it faster; False restores the stock blocks.
        compiled: Whether to also compile encoder and decoder with torch.compile, which takes about 15 s per image size
            and pays off for thousands of images.
    """
    wanted = on and group_norm is not None
    modules: list[tuple[str, Any]] = list(vae.named_modules())
    for name, module in modules:
        if wanted and (kind := _fast_kind(name, module)):
            module.__class__ = kind
        elif not wanted and type(module) in _STOCK:
            module.__class__ = _STOCK[type(module)]
        if type(module) is Attention:
            before, after = (_STOCK_ATTENTION, _Attention) if wanted else (_Attention, _STOCK_ATTENTION)
            if type(module.processor) is before:
                _set_processor(module, after())
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last if wanted else torch.contiguous_format)
    for part in (getattr(vae, "encoder", None), getattr(vae, "decoder", None)):
        _compile(part, on and compiled)
    return vae


def _set_processor(attention: Any, processor: Any) -> None:
    attention.set_processor(processor)


def _compile(part: Any, on: bool) -> None:
    if part is not None:
        part._compiled_call_impl = None  # private in torch 2.7 to 2.14
        if on:
            part.compile()


def _fast_kind(name: str, module: nn.Module) -> type | None:
    """Return the fast class for `module`, which has this `name` in the autoencoder, or None."""
    if type(module) is nn.Conv2d and name.endswith("coder.conv_in"):
        return _FirstConvolution
    if type(module) is nn.GroupNorm and name.endswith("coder.conv_norm_out"):
        return _NormSiLU
    if type(module) is nn.SiLU and name.endswith("coder.conv_act"):
        return _Done
    if type(module) is ResnetBlock2D and _is_plain(module):
        return _Resnet
    if type(module) is Upsample2D and type(module.conv) is nn.Conv2d and module.norm is None and module.interpolate:
        return _Upsample
    return None


def _is_plain(block: Any) -> bool:
    """Return whether a block is a plain autoencoder block: no embedding or resampling, group norm and SiLU."""
    return (
        block.time_emb_proj is None
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm in ("default", "group")  # without an embedding, both do nothing
        and type(block.norm1) is type(block.norm2) is nn.GroupNorm
        and type(block.nonlinearity) is nn.SiLU
    )


def _normalised(norm: nn.GroupNorm, x: torch.Tensor, silu: bool) -> torch.Tensor:
    """Return the group norm of `x`, followed by SiLU if requested."""
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)[0]


def _takes(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and group_norm is not None


class _FirstConvolution(nn.Conv2d):
    """Convolution with channels-last output for one-channel images as well, whose layout is ambiguous."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        return output.contiguous(memory_format=torch.channels_last) if _takes(output) else output


class _NormSiLU(nn.GroupNorm):
    """Group norm followed by SiLU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _normalised(self, input, True) if _takes(input) else super().forward(input)


class _Done(nn.SiLU):
    """SiLU that `_NormSiLU` has already computed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if _takes(input) else super().forward(input)


class _Resnet(ResnetBlock2D):
    """`ResnetBlock2D` that keeps the layout. Stock makes the input of a shortcut contiguous in training."""

    def forward(self, input_tensor: torch.Tensor, temb: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _takes(input_tensor):
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden_states = self.conv1(_normalised(self.norm1, input_tensor, True))
        hidden_states = self.conv2(self.dropout(_normalised(self.norm2, hidden_states, True)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class _Upsample(Upsample2D):
    """`Upsample2D` by interleaved copies. The compiled gradient of stock's is summed in random order."""

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if output_size is not None or not _takes(hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        batch, channels, height, width = hidden_states.shape
        rows = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None]
        twice = rows.expand(batch, height, 2, width, 2, channels).reshape(batch, 2 * height, 2 * width, channels)
        convolution: Any = self.conv
        return convolution(twice.permute(0, 3, 1, 2))


class _Attention:
    """Attention processor of an autoencoder, over the positions of a feature map."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plain = encoder_hidden_states is None and attention_mask is None and attn.spatial_norm is None
        if not (plain and _takes(hidden_states) and hidden_states.ndim == 4 and attn.heads == 1):
            return _STOCK_ATTENTION()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        from .attention import attention

        norm = attn.group_norm
        positions = hidden_states if norm is None else _normalised(norm, hidden_states, False)
        positions = positions.flatten(2).transpose(1, 2)
        query, key, value = attn.to_q(positions), attn.to_k(positions), attn.to_v(positions)
        output = attn.to_out[1](attn.to_out[0](attention(query, key, value)))
        output = output.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            output = output + hidden_states
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


_STOCK_ATTENTION: Any = AttnProcessor2_0
_STOCK: dict[type, Any] = {kind: kind.__base__ for kind in (_FirstConvolution, _NormSiLU, _Done, _Resnet, _Upsample)}
