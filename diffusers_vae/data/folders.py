"""Image files of a folder or an archive, divided into training and held-out parts."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..messages import problem_list
from .files import ARCHIVES, COMPRESSED, Files
from .kinds import IMAGE_SUFFIXES
from .parts import TRAINING, is_bare, is_generic, is_plain, part_of, refuse_folds, split_of
from .store import left_out

LISTED = 5
"""Maximum number of names in a note."""
PACKED = "\0"
"""Suffix of an archive's name among the names of folders."""
Names = tuple[str, ...]
"""Names of nested folders and archives, outermost first."""


@dataclass(frozen=True)
class Division:
    """Image files by part."""

    parts: list[list[Path]]
    """Training and held-out files or, without parts, one list of all files, to be split later; each list is sorted."""
    folders: dict[str, Names]
    """Names of the folders from the set to each folder with images, without those of parts and archives."""
    others: list[Path]
    """Other files in the same folders and below, which are not images by their suffix."""
    notes: list[str]
    """Notes on what is not used, or used despite its name."""


@dataclass
class _Roles:
    """Roles of the folders of a set, with their names as in `Division.folders`."""

    training: dict[str, Names] = field(default_factory=dict)
    heldout: dict[str, Names] = field(default_factory=dict)
    undivided: dict[str, Names] = field(default_factory=dict)
    splits: list[Names] = field(default_factory=list)
    """Folders that contain parts."""
    unused: list[Names] = field(default_factory=list)
    beside: list[Names] = field(default_factory=list)
    """Folders with images beside parts."""
    doubtful: list[Names] = field(default_factory=list)
    """Folders named like a part, without another part beside them."""


def divide(files: Files) -> Division:
    """Find the image files of a set, which have one of `IMAGE_SUFFIXES`, and its parts.

    Parts are sibling folders or archives with the names of parts (`parts.split_of`), in the root or further down: in a
    folder without siblings, or in sibling folders that each contain parts. Files outside of them are used for training.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If it is unclear what to train on.
    """
    folder, entries, holders, images = _first_with_several(files)
    unused_files: list[str] = []
    beside: list[Path] = []

    def images_below(path: Path) -> list[Path]:
        """Return the images; add all other files to `beside`."""
        below = files.below(path)
        beside.extend(found for found in below if not _is_image(found))
        return [found for found in below if _is_image(found)]

    def holds_images(path: Path) -> bool:
        return any(map(_is_image, files.below(path)))

    def alone() -> bool:
        others = [path for path in holders if part_of(path.name, not entries[path]) is None]
        return not images and not any(map(holds_images, others))

    names = {path.name: path for path in holders}
    split = split_of(names, lambda name: not entries[names[name]], alone)
    chosen = [names[name] for name in (*split.training, *split.heldout)] if split else holders
    _refuse_both_kinds(folder, {path: entries[path] for path in chosen})
    if split:
        others = [path for path in holders if path not in chosen]
        unused = [
            path for path in others if path.name in split.unused or not entries[path] or _shows_images(files, path)
        ]
        roles = _Roles(unused=[(path.name,) for path in unused], beside=[()] if images else [])
        parts = []
        for role, group in ((roles.training, split.training), (roles.heldout, split.heldout)):
            found = []
            for path in (names[name] for name in group):
                inside = images_below(path)
                role |= {at: _bare(left) for at, left in _folders(files, inside, path).items()}
                found += inside
            parts.append(_checked(found, [names[name] for name in group], beside, files))
    else:
        inner = {path: entries[path] for path in holders}
        _refuse_unclear(folder, folder == files.root, inner, images, holds_images)
        found = images_below(folder)
        roles = _Roles()
        _assign([(at, left, ()) for at, left in _folders(files, found, folder).items()], (), roles)
        refuse_folds(["/".join(names) for names in roles.splits])
        parts = [_checked(found, [folder], beside, files)]
        if roles.heldout:
            trained = roles.training | roles.undivided
            parts = [[image for image in found if os.path.dirname(image) in role] for role in (trained, roles.heldout)]
        else:
            parts, unused_files = _by_file_names(found) or (parts, [])
    folders = roles.training | roles.heldout | roles.undivided
    return Division(parts, folders, beside, _notes(files, folder, roles, unused_files))


def class_names(division: Division) -> list[list[str | None]]:
    """Return the class of each file of each part: the first differing folder above it that names no part, or None."""
    parts = []
    for part in division.parts:
        folders = {at: division.folders[at] for at in dict.fromkeys(os.path.dirname(path) for path in part)}
        while (first := _common(folders.values())) and (
            is_bare(first) or is_generic(first) or (part_of(first) and all(names[1:] for names in folders.values()))
        ):
            folders = {at: names[1:] for at, names in folders.items()}
        parts.append(folders)
    while _common(names for folders in parts if all(folders.values()) for names in folders.values()):
        parts = [
            {at: names[1:] for at, names in folders.items()} if all(folders.values()) else folders for folders in parts
        ]
    return [
        [next(iter(folders[os.path.dirname(path)]), None) for path in part]
        for folders, part in zip(parts, division.parts, strict=True)
    ]


def _common(folders: Iterable[Names]) -> str | None:
    """Return the first name, if all have the same one."""
    firsts = {names[0] if names else None for names in folders}
    return firsts.pop() if len(firsts) == 1 else None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _first_with_several(files: Files) -> tuple[Path, dict[Path, bool], list[Path], list[Path]]:
    """Return the first folder that contains more than one folder or archive, its entries with whether each is a folder,
    the folders and archives among them, and the images.
    """
    folder = files.root
    while True:
        entries = dict(sorted(files.inside(folder).items()))
        holders = [path for path, inner in entries.items() if inner or _is_archive(path)]
        images = [path for path, inner in entries.items() if not inner and _is_image(path)]
        packed = [path for path in entries if path.name.lower().endswith(COMPRESSED)]
        if len(holders) != 1 or images or (packed and not is_bare(holders[0].name)):
            return folder, entries, holders, images
        folder = holders[0]


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVES and path.is_file()  # archives in archives are not read


def _shows_images(files: Files, path: Path) -> bool:
    """Return whether a folder contains images, or its first folder does, and so on. The folder may be large."""
    for _ in range(LISTED):
        entries = sorted(files.inside(path).items())
        if any(_is_image(found) and not inner for found, inner in entries):
            return True
        path = next((found for found, inner in entries if inner), path)
    return False


def _folders(files: Files, images: Sequence[Path], base: Path) -> dict[str, Names]:
    """Return the folders of the images, each with the names from `base` to it."""
    found: dict[str, Names] = {}
    for at in dict.fromkeys(os.path.dirname(image) for image in images):
        path, names = base, []
        for name in Path(at).relative_to(base).parts:
            path /= name
            names.append(name + PACKED if str(path) in files.archives else name)
        found[at] = tuple(names)
    return found


def _bare(names: Names) -> Names:
    """Return the names without those of archives."""
    return tuple(name for name in names if not name.endswith(PACKED))


def _assign(folders: Sequence[tuple[str, Names, Names]], above: Names, roles: _Roles) -> None:
    """Add the roles of folders below `above`. Each has its remaining names, and the names so far that count."""
    inside: dict[str, list[tuple[str, Names, Names]]] = defaultdict(list)
    images = []
    for at, left, so_far in folders:
        if left:
            inside[left[0]].append((at, left[1:], so_far))
        else:
            images.append((at, left, so_far))
    names = {name.rstrip(PACKED): name for name in inside}
    split = split_of(names, lambda name: names[name].endswith(PACKED), lambda: not images and all(map(part_of, names)))
    if split:
        roles.splits.append(above)
        for role, group in ((roles.training, split.training), (roles.heldout, split.heldout)):
            role |= {at: so_far + _bare(left) for name in group for at, left, so_far in inside[names[name]]}
        others = names.keys() - {*split.training, *split.heldout}
        roles.unused += [(*above, name) for name in sorted(others)]
        roles.beside += [above] if images else []
        return
    if packed := [name for name in inside if name.endswith(PACKED)]:  # count their content as beside them
        beside = [(at, (name, *left), rest) for name in inside for at, left, rest in inside[name] if name not in packed]
        _assign([*images, *beside, *(entry for name in packed for entry in inside[name])], above, roles)
        return
    roles.undivided |= {at: so_far for at, _, so_far in images}
    if len(inside) > 1 or images:
        roles.doubtful += [(*above, name) for name in inside if part_of(name)]
    for name, group in inside.items():
        _assign([(at, left, (*so_far, name)) for at, left, so_far in group], (*above, name), roles)


def _by_file_names(images: list[Path]) -> tuple[list[list[Path]], list[str]] | None:
    """Split images if all file names mean a part, such as train_001.png; also return the names of unused ones."""
    if not all(part_of(image.stem, True) for image in images[:LISTED]):
        return None  # the usual case
    split = split_of({image.stem for image in images}, lambda name: True)
    if split is None or not all(part_of(image.stem, True) for image in images):
        return None
    parts = ({*split.training}, {*split.heldout})
    return [[image for image in images if image.stem in names] for names in parts], split.unused


def _checked(found: list[Path], folders: Sequence[Path], beside: Sequence[Path], files: Files) -> list[Path]:
    if not found:
        raise FileNotFoundError(no_image(files, folders, beside))
    return found


def no_image(files: Files, folders: Sequence[Path], found: Sequence[Path]) -> str:
    """Return the error text for folders without an image, with files that look like images."""
    where = ", ".join(str(folder.resolve()) for folder in folders[:3])
    ignored = left_out(files, found)
    more = f". {len(ignored)} files look like images:\n{problem_list(ignored)}" if ignored else ""
    written = f", without what diffusers_vae wrote: {_listed(files.outputs)}" if files.outputs else ""
    return f"no image below {where}: none of {', '.join(IMAGE_SUFFIXES)}{written}{more}"


def _refuse_both_kinds(folder: Path, holders: Mapping[Path, bool]) -> None:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path, inner in holders.items():
        if (part := part_of(path.name, not inner)) and not part.rest:
            groups[part.word].append(path)
    for word, group in groups.items():
        if len({holders[path] for path in group}) > 1:
            raise ValueError(
                f"{word} exists as a folder and as archives in {folder.resolve()}: "
                f"{_listed(path.name for path in group)}. Move one elsewhere"
            )


def _refuse_unclear(
    folder: Path,
    is_root: bool,
    holders: Mapping[Path, bool],
    images: Sequence[Path],
    holds_images: Callable[[Path], bool],
) -> None:
    """Raise ValueError if a part is beside images that are not its counterpart."""
    found = {path: part_of(path.name, not inner) for path, inner in holders.items()}
    parts = {path: part.word for path, part in found.items() if part and not part.rest}
    for path, word in list(parts.items()):
        if word in TRAINING and not (is_root and is_plain(path.name, not holders[path])):
            del parts[path]
    others = [path for path in holders if path not in parts] if parts else []
    if images or len({*parts.values()}) > 1 or any(map(holds_images, others)):
        parts = {path: word for path, word in parts.items() if holds_images(path)}
    if parts and (images or len({*parts.values()}) > 1 or any(map(holds_images, others))):
        names = sorted(path.name for path in (*images, *others, *parts))
        raise ValueError(
            f"it is not clear what to train on in {folder.resolve()}: its images must lie in a part to train on and "
            f"one that is held out, such as train/ and test/, or in neither, got {', '.join(names[:10])}. Point "
            "data.root inside, or rename or move folders"
        )


def _notes(files: Files, folder: Path, roles: _Roles, unused_files: Sequence[str]) -> list[str]:
    """Return notes on what is not used, or used despite its name."""
    notes = []

    def named(found: Sequence[Names]) -> str:
        return _listed(os.path.join(*names) + os.sep for names in found)

    if roles.unused:
        notes.append(f"unused, because other parts are used: {named(roles.unused)} in {folder.resolve()}")
    if unused_files:
        notes.append(f"unused, because other parts are used: {_listed(unused_files)} in {folder.resolve()}")
    if roles.beside:
        found = _listed(str(folder.joinpath(*names).resolve()) for names in roles.beside)
        notes.append(f"unused, because there are parts beside them: the images in {found}")
    doubtful = [names for names in roles.doubtful if any(at[: len(names)] == names for at in roles.undivided.values())]
    if doubtful:
        notes.append(
            f"used for training despite the name of a part, because no other part is beside it: {named(doubtful)} in "
            f"{folder.resolve()}"
        )
    if files.outputs:
        notes.append(f"left out, because diffusers_vae wrote it: {_listed(sorted(files.outputs))}")
    return notes


def _listed(names: Iterable[str]) -> str:
    names = [*names]
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
