"""Dataclass fields of settings: their bounds, which setting enables them, and whether they may change on resume."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def at_home(config: Any, *names: str) -> None:
    """Expand a leading ~ in these path settings of a section to the user's home directory."""
    for name in names:
        if isinstance(path := getattr(config, name), str):
            object.__setattr__(config, name, os.path.expanduser(path))


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
Trait = Literal["free", "kept", "training", "of_rows", "any_set", "local"]
"""Kinds of settings. free: a resumed run may use another value, because it changes at most the rounding (for an
autoencoder, its weights count and not their path). kept: a resumed run keeps its earlier value where the new one is
null or auto. training: no measurement reads it. of_rows: it applies to one data set of rows. any_set: a model needs it
on other data sets too, or it controls how files are read. local: it is not part of a recipe, such as a path."""


def setting(default: Any, *traits: Trait, **bounds: float) -> Any:
    """Return a dataclass field of a setting with these traits, with numbers within `bounds`."""
    return only_with(default, *traits, **bounds)


def only_with(default: Any, *traits: Trait, **others: Any) -> Any:
    """Return a dataclass field that is read only when `others`, settings of the same section, have certain values: one
    of a tuple, for True anything but None, 0 or false, for False one of these. Names in `BOUNDS` bound its numbers.
    """
    bounds = {name: others.pop(name) for name in BOUNDS if name in others}
    return field(default=default, metadata={"traits": traits, "bounds": bounds, "only_with": others})


def with_traits(section: Any, *traits: Trait) -> list[str]:
    """Return the names of the settings of a section that have any of these traits."""
    return [option.name for option in fields(section) if {*traits} & {*option.metadata.get("traits", ())}]


def unread(kind: type, values: Mapping[str, Any]) -> dict[str, tuple[str, bool | tuple[Any, ...]]]:
    """Return the settings in `values`, of the section `kind`, that differ from their defaults but are not read. Each
    maps to the setting that switches it off and the values of that setting with which it is read.
    """
    found = {}
    for option in fields(kind):
        value = values[option.name]
        if value == option.default or shown(value) == shown(option.default):  # a list may stand for a tuple
            continue
        for other, wanted in option.metadata.get("only_with", {}).items():
            value = values[other]
            if bool(value) != wanted if isinstance(wanted, bool) else value not in wanted:
                found.setdefault(option.name, (other, wanted))
    return found


def _refuse_unread(section: str, config: Any) -> None:
    found = unread(type(config), vars(config))
    defaults = {option.name: option.default for option in fields(config)}
    for other, wanted in dict.fromkeys(found.values()):
        names = [name for name, reason in found.items() if reason == (other, wanted)]
        given = ", ".join(f"{section}.{name} {shown(getattr(config, name))}" for name in names)
        reset = " ".join(f"--{section}.{name} {shown(defaults[name])}" for name in names)
        if isinstance(wanted, bool):
            instead = f"{'set' if wanted else 'leave out'} {section}.{other}"
        else:
            instead = f"set {section}.{other} to {' or '.join(map(shown, wanted))}"
        raise ValueError(
            f"{given} would be ignored with {section}.{other} {shown(getattr(config, other))}: {instead}, or keep the "
            f"default{'s' if names[1:] else ''}, {reset}"
        )


def check(section: str, config: Any) -> None:
    """Raise ValueError naming a setting of a section that is not a valid choice, is out of bounds or is not read."""
    kinds = _kinds(type(config))
    for option in fields(config):
        value, kind, bounds = getattr(config, option.name), kinds[option.name], option.metadata.get("bounds", {})
        if value is None:
            right = NoneType in alternatives(kind)
        elif isinstance(value, str):
            choices = [
                choice for part in alternatives(kind) if get_origin(part) is Literal for choice in get_args(part)
            ]
            right = not choices or value in choices
        else:
            numbers = value if isinstance(value, (tuple, list)) else [value]
            within = (
                math.isfinite(n) and all(BOUNDS[name](n, bound) for name, bound in bounds.items()) for n in numbers
            )
            right = not bounds or (numbers and all(within))
        if not right:
            raise ValueError(f"{section}.{option.name} must be {in_words(kind, bounds)}, got {value}")
    _refuse_unread(section, config)


_kinds = cache(get_type_hints)


def shown(value: Any) -> str:
    """Return a value as YAML and flags write it."""
    return value if isinstance(value, str) else json.dumps(value)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_whole(kind: Any) -> bool:
    """Return whether values of a type are whole numbers."""
    return isinstance(kind, type) and issubclass(kind, int) and kind is not bool


def in_words(kind: Any, bounds: Mapping[str, float] = MappingProxyType({})) -> str:
    """Return a description of the values of a type, such as "a positive number", with numbers within `bounds`."""
    *words, last = [word for part in alternatives(kind) for word in _words(part, bounds)]
    return f"{', '.join(words)} or {last}" if words else last


def _words(kind: Any, bounds: Mapping[str, float]) -> list[str]:
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    if bounds and kind is not NoneType:
        low, *high = [f"2^{int(bound).bit_length() - 1}" if bound > 2**20 else bound for bound in bounds.values()]
        if high:
            return [f"in {'(' if 'above' in bounds else '['}{low}, {high[0]}{')' if 'below' in bounds else ']'}"]
        return [("positive" if "above" in bounds else f"at least {low}") + " and finite" * (kind is float)]
    if get_origin(kind) is tuple:
        return [f"a list such as {example_of(kind)}"]
    return [WORDS.get(kind, "a whole number of at least 1" if is_whole(kind) else "another value")]


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}


def example_of(kind: Any) -> str:
    """Return an example value of a type as written in a shell."""
    kind = alternatives(kind)[0]
    if get_origin(kind) is Literal:
        return str(get_args(kind)[0])
    if get_origin(kind) is tuple:
        of = get_args(kind)
        several = {int: ["32", "64"], float: ["0", "1"]}.get(of[0], [example_of(of[0])])
        return f"'[{', '.join(several * (len(of) // 2) if of[1] is not ... else several)}]'"
    return {bool: "true", float: "0.5", str: "TEXT"}.get(kind, "3")
