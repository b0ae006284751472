"""Captions of images in a folder or an archive, in common file conventions."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..messages import problem_list
from ..untrusted import MAX_TEXT
from .files import Files
from .parts import words

METADATA = ("metadata.jsonl", "metadata.csv")
KEYS = ("text", "caption", "prompt")
"""Keys of captions in metadata and JSON; the first one present is used."""
SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes, in any case, of caption files with the name of an image; the first file with captions is used."""
UNREAD = (".cap", ".md", ".prompt", ".tag", ".tags", ".text")
"""Suffixes of files beside an image that may be captions and are not read."""
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".xlsx", ".xml")
TELLING = {"cap", "caption", "captions", "meta", "metadata", "prompt", "prompts"}
"""Words in the names of files that may hold captions."""
FOLDERS = TELLING | {"annotation", "annotations", "text", "texts"}
"""Words in the names of folders that may do so."""
BOX = re.compile(r"\s*\d+(\s+[-+]?\d[\d.eE+-]*){4,}\s*")
"""Line of a text file with the class and position of an object, as for YOLO."""
MAX_METADATA = 2**28
"""Maximum bytes of a metadata file, enough for a million images; each folder may have one."""


def read_captions(below: Files, paths: Sequence[Path]) -> tuple[list[tuple[str, ...]] | None, list[str]]:
    """Return one or more captions per image file, or None if there are none, and notes on ignored files.

    Captions are in a `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder) in the folder of the image, above
    it or beside its archive: one row per image, with `file_name` relative to the file and one of `KEYS`, a string or,
    in JSON, several. Or they are in NAME.txt or NAME.caption beside the image, one caption per line, or NAME.json with
    one of `KEYS`. ValueError listing every problem, such as images without a caption when others have one.
    """
    files = [str(path) for path in paths]
    root = "" if str(below.root) == "." else str(below.root)  # prefix of the files' names
    folders = _folders(root, files)
    metadata = _Metadata(below, files)
    for folder in folders:
        metadata.read_folder(folder)
    if root in below.archives:
        folders.append(os.path.dirname(root))
        metadata.read_folder(folders[-1], others=True)
    beside = _beside(below, files)
    with ThreadPoolExecutor() as pool:
        texts = dict(zip(beside, pool.map(partial(_from_beside, below), beside.values()), strict=True))
    boxes = [text.boxes for text in texts.values() if text.boxes]
    problems = metadata.problems
    for file, text in texts.items():
        if text.captions and file in metadata.found:
            problems.append(f"{file} has captions in {text.source} and in a {metadata.sources[file]}")
    empty = [] if boxes else [f"{text.empty} holds no caption" for text in texts.values() if text.empty]
    problems += sorted({text.problem for text in texts.values() if text.problem}.union(empty))
    unread = [path for text in texts.values() for path in text.unread]
    notes = metadata.notes
    if boxes:
        notes.append(f"hold numbers, such as objects' boxes, not captions: {_counted(boxes)}")
    if unread := [*metadata.unread, *unread, *_others(below, folders, files)]:
        notes.append(f"look like captions and are not read (docs/images.md): {_counted(unread)}")
    found = metadata.found | {file: text.captions for file, text in texts.items() if text.captions}
    if not found and not problems:
        return None, notes
    if not problems and (missing := [file for file in files if file not in found]):
        problems = [f"{len(found):,} of {len(files):,} images have a caption"]
        problems += [f"{file} has no caption, and others have one" for file in missing]
    if problems:
        raise ValueError(f"the captions in {below.root.resolve()} are not valid:\n{problem_list(problems)}")
    return [found[file] for file in files], notes


def _folders(root: str, files: Sequence[str]) -> list[str]:
    """Return the folders of the files, and their parents up to `root`."""
    folders: set[str] = {root}
    for folder in {os.path.dirname(file) for file in files}:
        while folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
    return sorted(folders)


@dataclass
class _Beside:
    """Content of the files beside an image."""

    captions: tuple[str, ...] = ()
    source: str = ""
    """The file with the captions."""
    problem: str = ""
    empty: str = ""
    """A file without text."""
    boxes: str = ""
    """A file with numbers."""
    unread: list[str] = field(default_factory=list)
    """Files that turned out not to be captions."""


def _beside(below: Files, files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files beside each image file that may hold its captions, in the order of `SUFFIXES`."""
    names: dict[str, dict[str, str]] = {}
    for folder, file in {os.path.dirname(file): file for file in files}.items():
        for name in sorted(below.beside(file)):
            stem, suffix = os.path.splitext(os.path.join(folder, name))
            names.setdefault(stem, {})[suffix.lower()] = stem + suffix  # .txt wins over .TXT
    stems = {file: names.get(os.path.splitext(file)[0], {}) for file in files}
    beside = {file: [named[suffix] for suffix in SUFFIXES if suffix in named] for file, named in stems.items()}
    return {file: found for file, found in beside.items() if found}


def _from_beside(below: Files, paths: Sequence[str]) -> _Beside:
    """Return the first captions found in the files beside each image."""
    found = _Beside()
    for path in paths:
        captions: tuple[str, ...] = ()
        if path.lower().endswith(".json"):
            with suppress(RecursionError, ValueError):  # such files often hold something else
                captions = _captions(json.loads(below.read(path)))[1]
            found.unread += [] if captions else [path]
        else:
            text = _read(below, path, MAX_TEXT)
            if isinstance(text, ValueError):
                return _Beside(problem=str(text))
            captions = tuple(line.strip() for line in text.split("\n") if line.strip())
            if captions and all(map(BOX.fullmatch, captions)):
                found.boxes, captions = path, ()
            elif not captions:
                found.empty = path
        if captions:
            return replace(found, captions=captions, source=path, empty="")
    return found


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


class _Metadata:
    """Captions in metadata files."""

    def __init__(self, below: Files, files: Sequence[str]):
        self.below, self.files = below, {*files}
        self.found: dict[str, tuple[str, ...]] = {}
        self.sources: dict[str, str] = {}
        """Metadata file of each image file that has captions in one."""
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.unread: list[str] = []
        self.rows: dict[str, str] = {}
        """File and line number of each image file's row."""

    def read_folder(self, folder: str, others: bool = False) -> None:
        """Read the metadata files in a folder, which may also describe `others` than the files of the set."""
        for path in (os.path.join(folder, name) for name in METADATA):
            if self.below.exists(path):
                text = _read(self.below, path, MAX_METADATA)
                if isinstance(text, ValueError):
                    self.problems.append(str(text))
                else:
                    self._read_rows(path, (_csv_rows if path.endswith(".csv") else _json_rows)(text), others)

    def _read_rows(self, path: str, rows: Iterator[tuple[int, dict[str, Any] | ValueError]], others: bool) -> None:
        keys: set[str] = set()
        described = False
        for number, row in rows:
            try:
                if isinstance(row, ValueError):
                    raise row
                if path.endswith(".csv") and "file_name" not in row:  # any table may have this name
                    self.unread.append(path)
                    return
                keys |= row.keys()
                captions = _row(row)
                described |= bool(captions)
                name = os.path.normpath(row["file_name"])
                if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
                    raise ValueError(f"{name} must lie in the folder of the {os.path.basename(path)} or below it")
                file = self._find(os.path.join(os.path.dirname(path), name), name)
                if file in self.rows:
                    raise ValueError(f"{name} already has a row, {self.rows[file]}; put several captions into a list")
                if file is None and not others:
                    raise ValueError(f"there is no file {name}")
            except ValueError as error:
                self.problems.append(f"{path}, line {number}: {error}")
                continue
            if file is not None:
                self.rows[file] = f"{path}, line {number}"
            if captions and file in self.files:
                self.found[file], self.sources[file] = captions, os.path.basename(path)
        if keys and not described:
            self.notes.append(
                f"no captions in {path}, which has none of {', '.join(KEYS)}, but {', '.join(sorted(keys)[:10])}"
            )

    def _find(self, file: str, name: str) -> str | None:
        """Return the file that a row names, if it exists. A file in an archive may be named as if it was unpacked
        beside it.
        """
        if file in self.files or self.below.exists(file):  # other kinds of files may be described too
            return file
        found = self.below.unpacked.get(file, ())
        if len(found) > 1:
            raise ValueError(f"{name} lies in several archives: {', '.join(found[:3])}")
        return found[0] if found else None


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the number and object of each line that is not empty."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"invalid JSON: {error.msg} at column {error.colno}")
            continue
        if isinstance(row, dict) and isinstance(row.get("file_name"), str) and row["file_name"]:
            yield number, row
        else:
            yield number, ValueError(f"it must be an object with a file_name, got {line.strip()[:60]}")


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the last line and the fields of each row, without empty fields except file_name."""
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ";\t" if mark in header and "," not in header), ",")
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in rows:
            names = {name: value for name, value in row.items() if name and (value or name == "file_name")}
            if "file_name" in names and not names["file_name"]:
                yield rows.line_num, ValueError("file_name is empty")
            else:
                yield rows.line_num, names
    except csv.Error as error:
        yield rows.line_num, ValueError(f"invalid CSV: {error}")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the captions in a row; ValueError if they are of a wrong type or empty."""
    key, captions = _captions(row)
    if key is not None and not captions:
        texts = row[key] if isinstance(row[key], list) else [row[key]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} of {row['file_name']} must be a string or a list of strings, got {row[key]}")
        raise ValueError(f"{key} of {row['file_name']} is empty")
    return captions


def _captions(row: Any) -> tuple[str | None, tuple[str, ...]]:
    """Return the first of `KEYS` in an object, and its captions: none if they are empty or not text."""
    key = next((key for key in KEYS if isinstance(row, dict) and key in row), None)
    value = None if key is None else row[key]
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(text, str) and text.strip() for text in captions):
        return key, ()
    return key, tuple(text.strip() for text in captions)


def _others(below: Files, folders: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return ignored files, beside the images or above them, that may hold captions by their names."""
    found = []
    keys: dict[str, set[str]] = {}
    for file in files:
        folder, name = os.path.split(file)
        keys.setdefault(folder, set()).add(name.partition(".")[0])
    stems = {os.path.splitext(file)[0] for file in files}
    for folder in folders:
        for name in sorted(below.names_in(folder)):
            path, (stem, suffix) = os.path.join(folder, name), os.path.splitext(name)
            suffix = suffix.lower()
            if not suffix and FOLDERS.intersection(words(name)) and os.path.isdir(path):
                inside = sorted(os.listdir(path))
                texts = [inner for inner in inside if inner.lower().endswith(SUFFIXES[:2])]
                found += [os.path.join(path, inner) for inner in ([*filter(_is_telling, inside)] or texts)]
            elif name not in METADATA and not (suffix in SUFFIXES and os.path.join(folder, stem) in stems):
                like_an_image = suffix in (*SUFFIXES, *UNREAD) and name.partition(".")[0] in keys.get(folder, ())
                found += [path] * (like_an_image or _is_telling(name))
    return found


def _is_telling(name: str) -> bool:
    stem, suffix = os.path.splitext(name)
    return suffix.lower() in TABLES and bool(TELLING.intersection(words(stem)))


def _counted(paths: Sequence[str]) -> str:
    """Return the number of files of each suffix, with an example."""
    kinds: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        kinds.setdefault(os.path.splitext(path)[1], []).append(path)
    return "; ".join(
        files[0] if len(files) == 1 else f"{len(files):,} files such as {files[0]}" for files in kinds.values()
    )
