"""Fields of settings, which state what a setting is: free on resume, of training only, switched off by another one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, Literal


def at_home(config: Any, *names: str) -> None:
    """Replace a leading ~ of the paths in these fields of a section by the user's home directory."""
    for name in names:
        if isinstance(path := getattr(config, name), str):
            object.__setattr__(config, name, os.path.expanduser(path))


Trait = Literal["free", "kept", "training", "of_rows", "any_set"]
"""What a setting is. free: a run may be continued with another value, since it changes no result (of an autoencoder the
weights count, not their location) or only the rounding. kept: where it is null, a run that is continued keeps its
value. training: no measurement reads it. of_rows: it belongs to one data set of rows. any_set: a model needs it on
other data sets too, or it says how files are read."""


def setting(default: Any, *traits: Trait) -> Any:
    """Return a dataclass field of a setting with these traits."""
    return only_with(default, *traits)


def only_with(default: Any, *traits: Trait, **others: bool | tuple[Any, ...]) -> Any:
    """Return a dataclass field that is read only where `others`, settings of the same section, have certain values: one
    of a tuple, or, for True, any that switches something on (not None, 0 or false), and for False none that does.
    """
    return field(default=default, metadata={"traits": traits, "only_with": others})


def with_traits(section: Any, *traits: Trait) -> list[str]:
    """Return the names of the settings of a section that have any of these traits."""
    return [option.name for option in fields(section) if {*traits} & {*option.metadata.get("traits", ())}]


def unread(kind: type, values: Mapping[str, Any]) -> dict[str, tuple[str, bool | tuple[Any, ...]]]:
    """Return the settings in `values`, of the section `kind`, that differ from their defaults and are not read: for
    each, the setting that switches it off, and the values of that one with which it is read.
    """
    found = {}
    for option in fields(kind):
        value = values[option.name]
        if value == option.default or shown(value) == shown(option.default):  # a list for a tuple
            continue
        for other, wanted in option.metadata.get("only_with", {}).items():
            value = values[other]
            if bool(value) != wanted if isinstance(wanted, bool) else value not in wanted:
                found.setdefault(option.name, (other, wanted))
    return found


def refuse_unread(section: str, config: Any) -> None:
    """Raise ValueError naming the settings of a section that are not read, and what switches them off."""
    found = unread(type(config), vars(config))
    for other, wanted in dict.fromkeys(found.values()):
        names = [name for name, reason in found.items() if reason == (other, wanted)]
        defaults = {option.name: option.default for option in fields(config)}
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


def shown(value: Any) -> str:
    """A value as it is written in YAML and flags."""
    return value if isinstance(value, str) else json.dumps(value)
