"""Captions of the images of a folder or an archive, by the conventions that people have."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..messages import problem_list
from ..untrusted import MAX_TEXT
from .files import Files

METADATA = "metadata.jsonl"
KEYS = ("text", "caption")
MAX_METADATA = 2**28
"""Bytes of a metadata file, of over a million images; each folder may have its own."""


def read_captions(below: Files, paths: Sequence[Path]) -> list[tuple[str, ...]] | None:
    """One or more captions of each of the image files `paths`, or None if there are none at all.

    They stand in a `metadata.jsonl`, as Hugging Face's imagefolder has it, in the folder of the image or one above it
    up to the root: a line per image, with `file_name` relative to the file and `text` or `caption`, a string or
    several. Or in a text file beside the image and named like it, a caption a line.

    Raises:
        ValueError: naming what is not as it should be, an image without a caption among others that have one too.
    """
    files = [str(path) for path in paths]
    problems: list[str] = []
    root = "" if str(below.root) == "." else str(below.root)  # as the files' names begin
    found = _from_metadata(below, _folders(root, files), set(files), problems)
    beside = _beside(below, files)
    both = [file for file in files if file in found and file in beside]
    problems += [f"{file} has captions in {beside[file]} and in a {METADATA}" for file in both]
    with ThreadPoolExecutor() as pool:
        texts = dict(zip(beside, pool.map(partial(_from_text, below), beside.values()), strict=True))
    problems += sorted({text for text in texts.values() if isinstance(text, str)})
    found |= texts
    if not found and not problems:
        return None
    problems = problems or [f"{file} has no caption, and others have one" for file in files if file not in found]
    if problems:
        raise ValueError(
            f"the captions below {below.root.resolve()} are not as they should be:\n{problem_list(problems)}"
        )
    return [found[file] for file in files]


def _folders(root: str, files: Sequence[str]) -> list[str]:
    """Of the files, and those above up to `root`."""
    folders: set[str] = {root}
    for folder in {os.path.dirname(file) for file in files}:
        while folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
    return sorted(folders)


def _beside(below: Files, files: Sequence[str]) -> dict[str, str]:
    """The text file beside each image file that has one."""
    one_of_each = {os.path.dirname(file): file for file in files}
    texts = {folder: below.beside(file) for folder, file in one_of_each.items()}
    beside = {}
    for file in files:
        folder, name = os.path.split(file)
        text = os.path.splitext(name)[0] + ".txt"
        if text in texts[folder]:
            beside[file] = os.path.join(folder, text)
    return beside


def _from_text(below: Files, path: str) -> tuple[str, ...] | str:
    """The captions in a text file, or what is wrong with it."""
    text = _read(below, path, MAX_TEXT)
    if isinstance(text, ValueError):
        return str(text)
    return tuple(line.strip() for line in text.split("\n") if line.strip()) or f"{path} holds no caption"


def _read(below: Files, path: str, limit: int) -> str | ValueError:
    try:
        content = below.read(path, limit)
    except ValueError as error:
        return error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return ValueError(f"{path}, line {line} is not UTF-8")


def _from_metadata(
    below: Files, folders: Sequence[str], files: set[str], problems: list[str]
) -> dict[str, tuple[str, ...]]:
    """The captions in the metadata files of the folders, by image file; what is wrong with them joins `problems`."""
    found: dict[str, tuple[str, ...]] = {}
    places: dict[str, str] = {}
    for metadata in (os.path.join(folder, METADATA) for folder in folders):
        if not below.exists(metadata):
            continue
        text = _read(below, metadata, MAX_METADATA)
        if isinstance(text, ValueError):
            problems.append(str(text))
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            place = f"{metadata}, line {number}"
            try:
                name, captions = _row(line)
                name = os.path.normpath(name)
                if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
                    raise ValueError(f"{name} must lie in the folder of the {METADATA} or below it")
                file = os.path.join(os.path.dirname(metadata), name)
                if file in places:
                    raise ValueError(f"{name} has a line already, {places[file]}; several captions go into a list")
                if file not in files and not below.exists(file):  # files of other kinds may be described too
                    raise ValueError(f"there is no file {name}")
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
            places[file] = place
            if captions and file in files:
                found[file] = captions
    return found


def _row(line: str) -> tuple[str, tuple[str, ...]]:
    """File name and captions in a line; ValueError saying what is wrong with it."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f"it must be an object with a file_name, got {line.strip()[:60]}")
    keys = [key for key in KEYS if key in row]
    if not keys:
        return row["file_name"], ()
    if len(keys) == 2:
        raise ValueError(f"{row['file_name']} has both text and caption")
    value = row[keys[0]]
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{keys[0]} of {row['file_name']} must be a string or a list of strings, got {value}")
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError(f"{keys[0]} of {row['file_name']} is empty")
    return row["file_name"], tuple(caption.strip() for caption in captions)
