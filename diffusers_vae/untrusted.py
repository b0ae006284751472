"""Files of unknown origin: opened, read and parsed within limits, by readers that execute no code."""

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

MAX_TEXT = 2**24  # maximum bytes of a text file: settings, an index, a report, a caption
for _plugin in ("Avif", "Bmp", "Gif", "Ico", "Jpeg", "Jpeg2K", "Mpo", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")  # `Image.init` would import all of Pillow's
with suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
FORMATS = tuple(
    name
    for name in ("BMP", "GIF", "JPEG", "PPM", "PNG", "AVIF", "DIB", "HEIF", "ICO", "JPEG2000", "TGA", "TIFF", "WEBP")
    if name in Image.OPEN
)
"""Formats that are read, by Pillow's names, independent of the file's name; HEIF if pillow-heif is installed. For some
others, Pillow starts programs: Ghostscript executes the code in an EPS."""
SUFFIXES = tuple(
    sorted(suffix for suffix, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO") and suffix != ".pfm")
)
"""Lower-case suffixes of these formats. PFM is excluded: it holds floats of unknown range."""
MAX_PIXELS = 500_000_000
PILLOWS_LIMIT = 2**30 // 4 // 3  # default of `PIL.Image.MAX_IMAGE_PIXELS`
MAX_PAGES = 100  # pages of a file are counted up to this number
NEW_SUBFILE_TYPE = 254  # tag of a TIFF page whose lowest bit marks a thumbnail of another page (TIFF 6.0, section 8)
OF_ONE_FILE = (
    errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EOVERFLOW
)  # fmt: skip
"""Errors that concern one missing or damaged file (EINVAL: a damaged offset is negative). All others, such as EIO,
ESTALE, ENOTCONN or EACCES, concern its storage."""
ADDRESS = re.compile(r" ?<(?:_io\.|Reader )[^>]*>| ?<[^<>]* at 0x[0-9a-fA-F]+>")
"""Object addresses in error messages, which differ from run to run."""


class Unreachable(OSError):
    """Storage does not respond, which is not a fault of the requested file."""


def unreadable(path: str | Path, error: Exception) -> Unreachable | ValueError:
    """Return the error to raise for one from reading the image at `path`: `Unreachable` if its storage failed,
    ValueError if it is missing or damaged. The same fault gives the same text in every run.
    """
    reason = ADDRESS.sub("", str(error).replace(repr(str(path)), "")).rstrip(" :") or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None  # decoders set none
    if isinstance(error, Unreachable) or number not in (None, *OF_ONE_FILE):
        return Unreachable(f"cannot reach the image {path}: {reason}; check its disk, connection and permissions")
    kind = TooMuchText if "MAX_TEXT" in reason else ValueError  # Pillow's errors name its limits
    return kind(f"cannot read the image {path}: {reason}")


def open_beside_others(path: str | Path) -> BinaryIO:
    """Open the file at `path` for reading. Raise `Unreachable` instead of FileNotFoundError if its folder is missing or
    empty, as when a disk is not mounted.
    """
    try:
        return open_regular(path)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder) or not os.listdir(folder):
            raise Unreachable(f"the folder {folder} is missing or empty") from None
        raise


MAX_UNPACKED = 2**30
"""Maximum unpacked bytes of one compressed file in an archive. Files stored without compression have no limit."""


class Reader(io.BufferedReader):
    """Reads the rest of `raw`, which must be seekable, and never allocates more: damaged files claim any length."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > 2**20:
            at = self.tell()
            size = min(size, max(0, self.seek(0, os.SEEK_END) - at))
            self.seek(at)
        return super().read(size)


def open_regular(path: str | Path) -> Reader:
    """Open the file at `path` for reading; ValueError for a pipe, socket or device, which could block or never end."""

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
    """Return the image in an open file of one of the `FORMATS`, of any size; raise Pillow's error otherwise."""
    beginning = file.read(16)
    for factory, accept in map(Image.OPEN.__getitem__, FORMATS):
        # like `Image.open`, which also rejects images above its own limit
        with suppress(SyntaxError, IndexError, TypeError, struct.error):
            fits = accept is None or accept(beginning)
            if fits and not isinstance(fits, str):  # a string names a missing dependency
                file.seek(0)
                return factory(file, "")
    raise UnidentifiedImageError("cannot identify image file")


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError if an image exceeds `MAX_PIXELS` or, if it was changed, `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = MAX_PIXELS if Image.MAX_IMAGE_PIXELS == PILLOWS_LIMIT else Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width}x{height} pixels are more than {limit:,}")


class TooMuchText(ValueError):
    """An image cannot be read because its text or colour profile is too large."""


def read_without_text(read: Callable[[Callable[[], BinaryIO]], T], content: Callable[[], BinaryIO]) -> T:
    """Return the result of `read` for a file that `content` opens. If it raises `TooMuchText`, read again without the
    text and the profile of the PNG: these are never unpacked, and the pixels do not depend on them.
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
    """Return the number of pages of an open TIFF, without thumbnails, or of frames of an animation, at most
    `MAX_PAGES`. Damage after the first page is ignored. The image may be at another page afterwards.
    """
    count = 1
    with suppress(Exception):  # Pillow's decoders raise nearly any error for damaged files
        if image.format in ("AVIF", "GIF", "HEIF", "PNG", "WEBP"):
            return min(getattr(image, "n_frames", 1), MAX_PAGES)
        for page in range(1, MAX_PAGES) if image.format == "TIFF" else ():
            image.seek(page)
            tags: Any = image
            count += not tags.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1
    return count


def refuse_irregular(folder: Path) -> None:
    """Raise ValueError naming a pipe, socket or device in `folder`, for libraries that open files themselves."""
    for parent, _, names in os.walk(folder, followlinks=False):
        for path in (os.path.join(parent, name) for name in names):
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise ValueError(f"{path} must be a regular file, got a pipe, socket or device")


def refuse_odd_name(path: str | Path, name: str) -> None:
    """Raise ValueError if `path`, given as `name`, is not UTF-8: safetensors can write there but not read."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a UTF-8 path, because safetensors reads no other, got {path}") from None


def read_bytes(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """Return the content of a regular file; ValueError naming it if it has more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} must hold at most {limit:,} bytes of text, got more")
    return content


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Return the text of a regular file without its byte order mark; ValueError naming it if it is not UTF-8 or has
    more than `limit` bytes.
    """
    content = read_bytes(path, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{path} must be UTF-8 text, got the byte 0x{byte:02x} at offset {error.start}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; ValueError naming it if it is damaged."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is damaged: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, not valid JSON: {error}") from error


def check_type(value: Any, kind: Any, name: str) -> None:
    """Raise ValueError if a value from JSON, called `name`, is not of type `kind` or is not finite.

    Args:
        kind: A type as in annotations (`list[int]`, `str | None`, ...), a dataclass, a dict with the type of each key,
            or a list with the type of all items. Keys, and fields without a default, are required.
    """
    origin: Any
    python_type: Any = kind  # not narrowed by type checkers
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
"""JSON's names of Python types."""
CODE = r"GLOBAL (\S+)|call reduce|Can only (?:create|build)"
"""Errors of torch for a pickle that does more than assemble tensors."""


def load_pickle(path: Path, file: BinaryIO | None = None, mmap: bool = False, foreign: bool = False) -> Any:
    """Load what torch saved at `path` to the CPU: tensors in lists and dicts. Nothing that the file names is imported
    or called.

    Args:
        file: The same file, if it is already open.
        mmap: Whether to read tensors from the disk when they are used.
        foreign: Whether to replace objects of other classes by placeholders, as in checkpoints of PyTorch Lightning.

    Raises:
        ValueError: Naming a file that holds code, is damaged or is not a checkpoint.
    """
    source = path if file is None else file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about newer protocols, which are either read or refused
            if foreign:
                return _load_with_placeholders(source, mmap)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # any type, for a file that is not a pickle
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        if found := re.search(CODE, said):
            holds = f"holds code, {found[1]}," if found[1] else "holds code"
        elif "Unsupported operand" in said:
            holds = "torch can read only by executing its code (it was saved with a newer pickle protocol)"
        else:
            reason = re.split(r"\n|\. ", said)[0] or type(error).__name__
            raise ValueError(f"{path} is not a torch checkpoint, or is truncated: {reason}") from error
        raise ValueError(
            f"{path} is a pickle that {holds} and is refused. If you trust it, convert its state_dict to .safetensors"
        ) from error


class _Placeholder:
    """Replaces a class or function that a pickle names: it can be called and initialised, and does nothing. `made` is
    the type that a call returns where torch appends or sets items.
    """

    made: Any = None

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        return object.__new__(cls) if cls.made is None else cls.made()

    def __init__(self, *args: Any, **settings: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


MOST_FOREIGN = 64  # maximum number of classes and functions that a checkpoint may name besides those of tensors


def _load_with_placeholders(source: Path | BinaryIO, mmap: bool) -> Any:
    """Return what `torch.load(weights_only=True)` loads, with a placeholder for each name that it does not allow. It
    reports one such name at a time, before it reads tensors; names in modules that it never allows (os, sys) remain an
    error.
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
                name = named[1] if "." in named[1] else f"builtins.{named[1]}"  # torch omits the module
                if name in kinds or len(kinds) == MOST_FOREIGN:
                    raise
                kinds[name] = None
            elif wrong := re.search(r"Can only (append|SETITEM).*\.Placeholder(\d+)'", str(error)):
                kinds[[*kinds][int(wrong[2])]] = list if wrong[1] == "append" else OrderedDict
            else:
                raise
