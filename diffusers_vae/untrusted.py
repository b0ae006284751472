"""Files of unknown origin: opened, read and parsed within limits, by readers that run no code."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import pickle
import re
import stat
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from PIL import Image, UnidentifiedImageError

T = TypeVar("T")

MAX_TEXT = 2**24  # largest size in bytes of a text: settings, an index, a report, a caption
for _plugin in ("Avif", "Bmp", "Gif", "Ico", "Jpeg", "Jpeg2K", "Mpo", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")  # `Image.init` would import all of Pillow's
with suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
FORMATS = tuple(
    name
    for name in ("BMP", "GIF", "JPEG", "PPM", "PNG", "AVIF", "DIB", "HEIF", "ICO", "JPEG2000", "TGA", "TIFF", "WEBP")
    if name in Image.OPEN
)
"""Pillow's names of the formats that are read, whatever a file's name says; HEIF if pillow-heif is installed. For
some others, Pillow starts programs: Ghostscript runs what an EPS holds."""
SUFFIXES = tuple(
    sorted(suffix for suffix, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO") and suffix != ".pfm")
)
"""Lower-case suffixes of these formats. A PFM holds floats, whose range nothing states."""
MAX_PIXELS = 500_000_000
PILLOWS_LIMIT = 2**30 // 4 // 3  # default of `PIL.Image.MAX_IMAGE_PIXELS`
MAX_PAGES = 100  # number up to which the pages of a file are counted
NEW_SUBFILE_TYPE = 254  # tag of a TIFF page whose lowest bit marks a thumbnail of another page (TIFF 6.0, section 8)
OF_ONE_FILE = (
    errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EOVERFLOW
)  # fmt: skip
"""Errors of one file that is missing or damaged (EINVAL: a damaged offset leads to before its beginning). All others,
as EIO, ESTALE, ENOTCONN or EACCES, are of its storage."""
ADDRESS = re.compile(r" ?<(?:_io\.|Reader )[^>]*>| ?<[^<>]* at 0x[0-9a-fA-F]+>")
"""Objects in the text of an error, which differ from start to start."""


class Unreachable(OSError):
    """Storage that does not answer, which is no fault of the file that was asked for."""


def unreadable(path: str | Path, error: Exception) -> Unreachable | ValueError:
    """The error to raise for one from reading the image at `path`: `Unreachable` when its storage failed, ValueError
    when it is missing or damaged. The same fault gives the same text at every start.
    """
    reason = ADDRESS.sub("", str(error).replace(repr(str(path)), "")).rstrip(" :") or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None  # that of a decoder has none
    if isinstance(error, Unreachable) or number not in (None, *OF_ONE_FILE):
        return Unreachable(f"cannot reach the image {path}: {reason}; see to its disk, connection or permissions")
    kind = TooMuchText if "MAX_TEXT" in reason else ValueError  # the names of Pillow's limits, in its errors
    return kind(f"cannot read the image {path}: {reason}")


def open_beside_others(path: str | Path) -> BinaryIO:
    """The file at `path`, to read from; `Unreachable`, and not FileNotFoundError, when its folder is not there or is
    empty, as where a disk is not mounted.
    """
    try:
        return open_regular(path)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder) or not os.listdir(folder):
            raise Unreachable(f"the folder {folder} is not there or is empty") from None
        raise


MAX_UNPACKED = 2**30
"""Bytes that one compressed file in an archive may unpack to. What is stored without compression has no limit."""


class Reader(io.BufferedReader):
    """Reads what `raw`, which can seek, still holds, and never allocates more: damaged files claim any length."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > 2**20:
            at = self.tell()
            size = min(size, max(0, self.seek(0, os.SEEK_END) - at))
            self.seek(at)
        return super().read(size)


def open_regular(path: str | Path) -> Reader:
    """The file at `path` to read from; ValueError for a pipe, socket or device, which could block or never end."""

    def regular(path: str, flags: int) -> int:
        number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        mode = os.fstat(number).st_mode
        if stat.S_ISREG(mode):
            return number
        os.close(number)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path} must be a file, got a folder")
        raise ValueError(f"{path} must be a regular file, got a pipe, socket or device")

    return Reader(io.FileIO(os.fspath(path), "r", opener=regular))


def open_image(file: BinaryIO) -> Image.Image:
    """The image in an open file of one of the `FORMATS`, whatever its size; an error of Pillow otherwise."""
    beginning = file.read(16)
    for factory, accept in map(Image.OPEN.__getitem__, FORMATS):
        # as `Image.open` does it, which also refuses what is larger than its own limit
        with suppress(SyntaxError, IndexError, TypeError, struct.error):
            fits = accept is None or accept(beginning)
            if fits and not isinstance(fits, str):  # text says what is missing to read it
                file.seek(0)
                return factory(file, "")
    raise UnidentifiedImageError("cannot identify image file")


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for an image of more than `MAX_PIXELS` or, if it was changed, `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = MAX_PIXELS if Image.MAX_IMAGE_PIXELS == PILLOWS_LIMIT else Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width}x{height} pixels are more than {limit:,}")


class TooMuchText(ValueError):
    """An image that cannot be read for the text or the colour profile that it holds."""


def read_without_text(read: Callable[[Callable[[], BinaryIO]], T], content: Callable[[], BinaryIO]) -> T:
    """What `read` returns of a file that `content` opens. If it raises `TooMuchText`, it reads again, without the text
    and the profile of the PNG: these are never unpacked, and the pixels do not depend on them.
    """
    try:
        return read(content)
    except TooMuchText:
        with content() as file:
            data = file.read()
        kept, at = [data[:8]], 8
        while at + 8 <= len(data):  # PNG, third edition, 5.3
            length, name = struct.unpack_from(">I4s", data, at)
            if name not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
                kept.append(data[at : at + 12 + length])
            at += 12 + length
        return read(lambda: io.BytesIO(b"".join(kept)))


def count_pages(image: Image.Image) -> int:
    """Number of pages of an open TIFF, thumbnails left out, or of frames of an animation, at most `MAX_PAGES`. Damage
    behind the first is ignored, and the image may stand at another page afterwards.
    """
    count = 1
    with suppress(Exception):  # on a damaged file Pillow's decoders raise nearly anything
        if image.format in ("AVIF", "GIF", "HEIF", "PNG", "WEBP"):
            return min(getattr(image, "n_frames", 1), MAX_PAGES)
        for page in range(1, MAX_PAGES) if image.format == "TIFF" else ():
            image.seek(page)
            tags: Any = image
            count += not tags.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1
    return count


def refuse_irregular(folder: Path) -> None:
    """Raise ValueError naming a pipe, socket or device below `folder`, for libraries that open files themselves."""
    for parent, _, names in os.walk(folder, followlinks=False):
        for path in (os.path.join(parent, name) for name in names):
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise ValueError(f"{path} must be a regular file, got a pipe, socket or device")


def refuse_odd_name(path: str | Path, name: str) -> None:
    """Raise ValueError when `path`, given as `name`, is not UTF-8: safetensors can write there, but not read."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a UTF-8 path, since safetensors reads no other, got {path}") from None


def read_bytes(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """The content of a regular file; ValueError naming it when it has more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} must hold at most {limit:,} bytes of text, got more")
    return content


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The text of a regular file without its byte order mark; ValueError naming it when it is not UTF-8, or has more
    than `limit` bytes.
    """
    content = read_bytes(path, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{path} must be UTF-8 text, got the byte 0x{byte:02x} at place {error.start}") from error


def read_json(path: Path) -> Any:
    """The content of the JSON file at `path`; ValueError naming it when it is damaged."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is damaged: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON: {error}") from error


def check_type(value: Any, kind: Any, name: str) -> None:
    """Raise ValueError when a value from JSON, called `name`, is not of the type `kind`, or is not finite.

    Args:
        kind: a type as in annotations (`list[int]`, `str | None`, ...), a dataclass, a dict with the type of
            each key, or a list of the type of all items. Keys, and fields without a default, must be there.
    """
    origin: Any
    python_type: Any = kind  # which a type checker does not narrow
    origin, parts = (list, kind) if isinstance(kind, list) else (get_origin(kind), get_args(kind))
    if isinstance(kind, dict) or is_dataclass(kind):
        check_type(value, dict, name)
        kinds: dict[str, Any] = kind if isinstance(kind, dict) else get_type_hints(kind)
        optional = [] if kinds is kind else [field.name for field in fields(python_type) if _has_default(field)]
        for key, part in kinds.items():
            if key in value:
                check_type(value[key], part, f"{name}.{key}")
            elif key not in optional:
                raise ValueError(f"{name} lacks {key}")
    elif origin in (list, dict):
        check_type(value, origin, name)
        for key, item in value.items() if origin is dict else enumerate(value):
            check_type(item, parts[-1], f"{name}[{key}]")
    elif origin in (Union, UnionType):
        if value is not None:
            check_type(value, next(part for part in parts if part is not NoneType), name)
    elif origin is Literal:
        if value not in parts:
            raise ValueError(f"{name} must be one of {', '.join(map(str, parts))}, got {value!r:.60}")
    elif not isinstance(value, (int, float) if kind is float else python_type) or (
        isinstance(value, bool) and kind is not bool
    ):
        wanted = NAMES.get(python_type) or python_type.__name__
        raise ValueError(f"{name} must be of the type {wanted}, got {value!r:.60}")
    elif kind is float and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, got {value!r:.60}")


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


NAMES = {dict: "object", list: "array", str: "string", float: "number", int: "integer", bool: "boolean"}
"""JSON's names of types of Python."""
CODE = r"GLOBAL (\S+)|call reduce|Can only (?:create|build)"
"""What torch says of a pickle that does more than to put tensors together."""


def load_pickle(path: Path, file: BinaryIO | None = None, mmap: bool = False, foreign: bool = False) -> Any:
    """What torch saved at `path`, on the CPU: tensors in lists and dicts. Nothing that the file names is imported or
    called; ValueError names a file that holds code, is damaged or is something else.

    Args:
        file: the same, if it is open already.
        mmap: read tensors from the disk when they are used.
        foreign: put placeholders for objects of other classes, such as in checkpoints of PyTorch Lightning.
    """
    source = path if file is None else file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a newer protocol, which either is read or is refused
            if foreign:
                return _load_with_placeholders(source, mmap)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # of any kind, for a file that is no pickle
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        if found := re.search(CODE, said):
            holds = f"holds code, {found[1]}," if found[1] else "holds code"
        elif "Unsupported operand" in said:
            holds = "torch reads only with whatever code it may hold (it was saved with a newer pickle protocol)"
        else:
            reason = re.split(r"\n|\. ", said)[0] or type(error).__name__
            raise ValueError(f"{path} is no checkpoint of torch, or was cut off: {reason}") from error
        raise ValueError(
            f"{path} is a pickle that {holds} and is refused. If you trust it, convert its state_dict to .safetensors"
        ) from error


class _Placeholder:
    """Stands for a class or function that a pickle names: may be called and set up, and does nothing. `made` is what a
    call gives where torch appends or sets items.
    """

    made: Any = None

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        return object.__new__(cls) if cls.made is None else cls.made()

    def __init__(self, *args: Any, **settings: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


MOST_FOREIGN = 64  # largest number of classes and functions that a checkpoint may name beside those of tensors


def _load_with_placeholders(source: Path | BinaryIO, mmap: bool) -> Any:
    """What `torch.load(weights_only=True)` loads with a placeholder for each name that it does not allow. It reports
    one such name at a time, before it reads tensors; those of modules that it never allows (os, sys) stay an error.
    """
    kinds: dict[str, type | None] = {}
    while True:
        classes = {
            name: type(f"Placeholder{number}", (_Placeholder,), {"made": made})
            for number, (name, made) in enumerate(kinds.items())
        }
        if not isinstance(source, Path):
            source.seek(0)
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in classes.items()]):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if named := re.search(r"Unsupported global: GLOBAL (.+?) was not an allowed global", str(error)):
                name = named[1] if "." in named[1] else f"builtins.{named[1]}"  # which torch leaves out
                if name in kinds or len(kinds) == MOST_FOREIGN:
                    raise
                kinds[name] = None
            elif wrong := re.search(r"Can only (append|SETITEM).*\.Placeholder(\d+)'", str(error)):
                kinds[[*kinds][int(wrong[2])]] = list if wrong[1] == "append" else OrderedDict
            else:
                raise
