"""Names that mean a part of a data set: training or held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

TRAINING = ("train", "training", "trn", "trainval")
VALIDATION = ("validation", "valid", "val", "dev")
HELDOUT = (*VALIDATION[:3], "test", "heldout", "dev", "testing", "tst", "eval", "evaluation", "holdout")
"""The first of these that a set has holds the held-out images: a test part has no labels in some sets, and is not meant
for choosing models."""
PLAIN = ("train", *HELDOUT[:5])
"""Names with precedence if there are both kinds: with train and test, Train 2 and val_extra are not used."""
GENERIC = frozenset(
    (
        *("set", "sets", "split", "splits", "part", "parts", "data", "dataset", "file", "files", "sample", "samples"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "shard", "shards"),
        *("jpg", "jpeg", "png"),
    )
)
"""Words that do not distinguish names of parts."""
GLUED = re.compile(rf"({'|'.join((*TRAINING, *HELDOUT))})(?:set|data|images?|imgs?|split|files)")
FOLDS = re.compile(r"(?:folds?|kfold|cv|split)\W*_*\d+|\d+_*\W*fold", re.IGNORECASE)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Start of a word in TrainSet, trainA and MNISTTrain."""
CAPITALS = re.compile(r"(?<=[A-Z]{2})(?=[a-z])")
"""Start of a word in VOCtest."""


@dataclass(frozen=True)
class PartName:
    """Name that means a part."""

    word: str
    """One of `TRAINING` or `HELDOUT`."""
    rest: frozenset[str]
    """The other words, equal in all names of a set's parts: imagenet in imagenet-val-0003."""


@dataclass(frozen=True)
class Split:
    """Sibling names that are parts of one set, each list sorted."""

    training: list[str]
    heldout: list[str]
    unused: list[str] = field(default_factory=list)
    """Names that mean a part but are in neither list."""


def words(name: str, boundary: re.Pattern[str] = CAMEL) -> list[str]:
    """Return the words of a name in lower case, split at digits, punctuation and changes of case."""
    found = " ".join(re.findall(r"[^\W\d_]+", boundary.sub(" ", name))).lower()
    found = re.sub(r"\bh(el|ol)d out\b", r"h\1dout", found)
    return [match[1] if (match := GLUED.fullmatch(word)) else word for word in found.split()]


def part_of(name: str, is_file: bool = False) -> PartName | None:
    """Return the part that whole words of a name mean, as in test2017 and imagenet-val-0003 but not in contest. The
    words after it do not count if `is_file`: shards are named train-000 and train-extra-000.
    """
    for boundary in (CAMEL, CAPITALS):
        found = words(name, boundary)
        matches = [word for word in found if word in TRAINING or word in HELDOUT]
        if not matches:
            continue
        word = matches[0]
        kinds = {"training" if word in TRAINING else "val" if word in VALIDATION else "test" for word in matches}
        if kinds == {"training", "val"}:
            word = "trainval"
        elif len(kinds) > 1 and "training" in kinds:
            return None  # ambiguous, as in train_test_split
        if is_file:
            found = found[: found.index(matches[0])]
        return PartName(word, frozenset(found) - {*matches} - GENERIC)
    return None


def split_of(
    names: Iterable[str], is_file: Callable[[str], bool] = lambda name: False, alone: Callable[[], bool] | None = None
) -> Split | None:
    """Return the parts among names, if there is one training and one held-out part with similar names: train2017 and
    val2017, imagenet-train-000 and imagenet-val-000, but not training_shoes and test_tube.

    Args:
        names: Names of folders, archives, files of arrays or splits.
        is_file: Whether a name belongs to a file, without the suffix.
        alone: Whether only names that mean a part hold images: then, train also matches test_stage_1.
    """
    parts = {name: part for name in sorted(names) if (part := part_of(name, is_file(name)))}
    plain = [name for name in parts if is_plain(name, is_file(name))]
    if {parts[name].word in TRAINING for name in plain} == {True, False}:
        unused = [name for name in parts if name not in plain]
        parts = {name: parts[name] for name in plain}
    else:
        unused = []
    training = {part.rest for part in parts.values() if part.word in TRAINING}
    heldout = {part.rest for part in parts.values() if part.word not in TRAINING}
    pairs = [(one, other) for one in training for other in heldout]
    agreeing = [pair for pair in pairs if pair == (frozenset(), frozenset())]
    agreeing = agreeing or [(one, other) for one, other in pairs if one == other]
    if not agreeing and alone is not None:
        agreeing = [(one, other) for one, other in pairs if one <= other or other <= one]
        agreeing = agreeing if agreeing and alone() else []
    if not agreeing:
        return None
    training, heldout = ({pair[side] for pair in agreeing} for side in (0, 1))
    train = [name for name, part in parts.items() if part.word in TRAINING and part.rest in training]
    train = [name for name in train if parts[name].word != "trainval"] or train
    rest = [name for name, part in parts.items() if part.word not in TRAINING and part.rest in heldout]
    if parts[train[0]].word == "trainval":  # it contains the images of val
        rest = [name for name in rest if parts[name].word not in VALIDATION] or rest
    word = min((parts[name].word for name in rest), key=HELDOUT.index)
    chosen = [name for name in rest if parts[name].word == word]
    refuse_folds(train)
    return Split(train, chosen, sorted({*unused, *parts} - {*train, *chosen}))


def refuse_folds(names: Sequence[str]) -> None:
    """Raise ValueError if names mean folds of a cross-validation, where each holds out what others train on."""
    folds = [name for name in names if FOLDS.search(name)]
    if len(folds) > 1:
        raise ValueError(
            f"{', '.join(folds[:5])} are folds of a cross-validation, and each trains on what another holds out: point "
            "data.root at one of them, or move the others elsewhere"
        )


def is_bare(name: str, is_file: bool = False) -> bool:
    """Return whether a name means a part and nothing else: test, Test Set, val2017."""
    part = part_of(name, is_file)
    return part is not None and not part.rest


def is_plain(name: str, is_file: bool = False) -> bool:
    """Return whether a name, or the beginning of a file's name, is in `PLAIN`."""
    return (re.split("[^a-z]", name, maxsplit=1)[0] if is_file else name) in PLAIN


def is_generic(name: str) -> bool:
    """Return whether a name does not describe its content: images, Photo files."""
    found = words(name)
    return bool(found) and GENERIC.issuperset(found)
