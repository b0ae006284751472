"""A batch of images as it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class ReadImages:
    """What was asked for and could be read."""

    pixels: torch.Tensor
    """(B, C, H, W), uint8 in [0, 255] or float32 in [0, 1]."""
    kept: Sequence[int]
    """Places, in the indices asked for, of the B images."""
    errors: tuple[str, ...] = ()
    """Why the others could not be read, with their names."""
    stop: bool = False
    """Whether that is to stop the run."""
    unreachable: str = ""
    """Why nothing could be read, if that is no fault of the images."""

    def checked(self) -> ReadImages:
        """These; ValueError naming a file that cannot be read and is not to be skipped, OSError when they could not be
        reached. A worker does not raise it itself, since there it would arrive wrapped in a traceback.
        """
        if self.unreachable:
            raise OSError(f"{self.unreachable}. When it can be read again, the same command continues")
        if self.errors and self.stop:
            raise ValueError(
                f"{self.errors[0]}. Mend or remove it, or leave such files out with data.on_bad_image skip"
            )
        return self

    def blank(self) -> ReadImages:
        """One black image, for a process that is left without any and must take part all the same."""
        return ReadImages(self.pixels.new_zeros(1, *self.pixels.shape[1:]), [0])

    def pin_memory(self) -> ReadImages:
        """The same in page-locked memory, from which a device copies without waiting; torch's `DataLoader` calls it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **pinned)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was read, by name."""
        return {"pixels": self.pixels}
