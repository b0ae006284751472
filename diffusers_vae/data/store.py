"""Where images lie: their names, their bytes and their pixels, by row."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from ..images import Header, read_header, read_image
from .files import Member

if TYPE_CHECKING:
    from .sources import DataConfig


class Store(Protocol):
    """Images of any size, a row each, for any process and thread to read on its own."""

    def name(self, row: int) -> str:
        """For people: its file, or where else it lies."""
        ...

    def key(self, row: int) -> str:
        """The same wherever the set lies, and another for every row: places of crops depend on it."""
        ...

    def identity(self, row: int) -> bytes:
        """The same for the same image, as far as can be told without reading it."""
        ...

    def size(self, row: int) -> int:
        """Bytes, as stored."""
        ...

    def content(self, row: int) -> bytes:
        """As stored; ValueError naming it when it is damaged."""
        ...

    def header(self, row: int) -> Header:
        """What it says of itself; ValueError naming it when that tells that it cannot be read."""
        ...

    def read(
        self,
        row: int,
        config: DataConfig,
        transform: Callable[[torch.Tensor], torch.Tensor],
        scaled: Callable[[int, int], tuple[int, int]] | None,
    ) -> torch.Tensor:
        """Its pixels, through `transform`: `images.read_image`."""
        ...


class FileStore:
    """Image files below `root`, those of `members` in archives."""

    def __init__(self, root: Path, paths: Sequence[Path], members: Mapping[str, Member]):
        self.root, self.paths = root, paths
        self.members = {str(path): members[str(path)] for path in paths if str(path) in members}

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def key(self, row: int) -> str:
        return self.paths[row].relative_to(self.root).as_posix()

    def identity(self, row: int) -> bytes:
        return f"{self.key(row)}\0{self.size(row)}\0".encode(errors="surrogateescape")

    def size(self, row: int) -> int:
        member = self._member(row)
        return self.paths[row].stat().st_size if member is None else member.size

    def content(self, row: int) -> bytes:
        member = self._member(row)
        try:
            return self.paths[row].read_bytes() if member is None else member.read()
        except ValueError as error:
            raise ValueError(f"cannot read the image {self.paths[row]}: {error}") from error

    def header(self, row: int) -> Header:
        member = self._member(row)
        return read_header(self.paths[row], member and member.open)

    def read(
        self,
        row: int,
        config: DataConfig,
        transform: Callable[[torch.Tensor], torch.Tensor],
        scaled: Callable[[int, int], tuple[int, int]] | None,
    ) -> torch.Tensor:
        member = self._member(row)
        content = member and (lambda: io.BytesIO(member.read()))
        return read_image(self.paths[row], config.channels, transform, scaled, content)

    def _member(self, row: int) -> Member | None:
        return self.members.get(str(self.paths[row])) if self.members else None
