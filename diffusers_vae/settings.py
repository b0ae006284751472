"""Settings of a run as YAML: written, read and compared."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .fields import with_traits
from .storage import write_file
from .untrusted import read_text

_ENCODE = "run diffusers-vae encode --{}, and set latents.folder to what it writes"
REMOVED: dict[str, tuple[Any, str]] = {
    "adversarial.betas": ([0.5, 0.9], "the discriminator's optimizer always has 0.5 and 0.9"),
    "data.buckets": (None, "train on data.crops, or on whole images at one data.resolution"),
    "data.lanes": (None, ""),
    "evaluation.fp16": (False, "after the training, run diffusers-vae fp16 on it"),
    "evaluation.projection": ("pca", "the picture of latents always shows their principal components"),
    "evaluation.weights": (None, ""),
    "latents.batch_size": (64, "the number of images per forward follows from their size"),
    "latents.compute_dtype": (None, _ENCODE.format("compute_dtype")),
    "latents.dtype": ("float32", _ENCODE.format("dtype")),
    "latents.sample_posterior": (True, _ENCODE.format("kind mode")),
    "model.text_heads": (4, "the text encoder has 4 heads, or fewer where model.text_width is less than 32"),
    "objective.perceptual_weights": (None, ""),
    "optimizer.weight_decay": (0.0, "weights never decay"),
    "run.compile": (None, "set run.step to compiled or eager"),
    "run.device_batch_size": (
        None,
        "set run.gradient_accumulation_steps instead, the number of forwards per optimizer step; a dry run prints the "
        "peak memory of a step",
    ),
    "sampling.batch_size": (64, "pictures are generated 64 at a time"),
}
"""Removed settings with their old default, which is ignored in a config.yaml, and advice. Another value is an error,
unless the advice is empty because the setting never changed a result."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run: sections, each a dataclass, one of them `run`."""

    def plain(self) -> dict[str, dict[str, Any]]:
        """Return all settings in types of YAML and JSON."""
        return _plain(asdict(self))

    def save(self, path: Path) -> None:
        """Write all settings as YAML, from which the run can be repeated."""
        write_file(path, to_yaml(self.plain()))


def to_yaml(settings: dict[str, dict[str, Any]]) -> str:
    """Return sections of settings as the text of a config.yaml."""
    return yaml.safe_dump(settings, sort_keys=False)


MAX_NODES, MAX_DEPTH = 100_000, 100  # limits of a YAML file: number of values, nesting depth


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: With the line, for values that YAML 1.1 reads in an unexpected way, such as `020` (16) and `1:30`
            (90), for repeated keys, and for aliases, which let a short file expand without bound.
    """
    text = read_text(path)
    try:
        if hasattr(yaml, "CSafeLoader"):  # libyaml takes a tenth of the time
            with suppress(yaml.YAMLError):  # it cannot read paths that are not UTF-8, and its lines may be off by one
                return _load(text, yaml.CSafeLoader)
        return _load(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {' '.join(str(error.problem or error.context).split())}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged, not valid YAML: {' '.join(str(error).split())}") from error


def _load(text: str, loader: type) -> Any:
    depth = nodes = 0
    for event in yaml.parse(text, Loader=loader):  # before any value is built
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        if nodes > MAX_NODES:
            _refuse(f"must hold at most {MAX_NODES:,} values, got more", event)
        if depth > MAX_DEPTH:
            _refuse(f"nested too deeply: more than {MAX_DEPTH} levels of lists and sections", event)
        if isinstance(event, yaml.AliasEvent):
            _refuse("aliases (*name) are not allowed: write the value itself", event)
    return yaml.load(text, Loader=_strict(loader))


def _refuse(problem: str, where: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


@cache
def _strict(loader: Any) -> type:
    class Strict(loader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    _refuse(f"the key {key.value} is given twice", key)
                seen.add(key.value if isinstance(key.value, str) else None)
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", node.value):
                _refuse(f"write a number without leading zeros or colons, or a text in quotes, got {node.value}", node)
            return super().construct_yaml_int(node)

    Strict.add_constructor("tag:yaml.org,2002:int", Strict.construct_yaml_int)
    for tag in ("binary", "omap", "pairs", "set", "timestamp"):  # no setting has these types, and JSON has none of them
        del Strict.yaml_constructors[f"tag:yaml.org,2002:{tag}"]
    # dates stay text, and 1e-4 is a number
    Strict.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = r"[-+]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    Strict.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+0123456789."))
    return Strict


def read_settings(path: Path, *needed: str) -> dict[str, dict[str, Any]]:
    """Return the sections of a config.yaml.

    Raises:
        ValueError: Naming the file, if it is invalid or lacks a section in `needed`.
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold sections of settings, got {str(settings)[:60]!r}")
    for name, section in settings.items():
        if not isinstance(section, dict):
            raise ValueError(f"{path}: {name} must hold settings, KEY: VALUE, got {str(section)[:60]}")
    run = settings.get("run", {})
    if isinstance(run.get("compile"), bool):  # earlier versions; another value is refused below
        run.setdefault("step", "compiled" if run.pop("compile") else "eager")
    for name, (default, _) in REMOVED.items():
        section, _, option = name.partition(".")
        try:
            refuse_removed(name, settings.get(section, {}).pop(option, default))
        except RemovedSetting as error:
            raise RemovedSetting(f"{path}: {error}") from error
    if missing := sorted(set(needed) - settings.keys()):
        raise ValueError(f"{path} is damaged: it has no section {', '.join(missing)}")
    return settings


class RemovedSetting(ValueError):
    """A setting that was removed has a value that must not be ignored."""


def refuse_removed(name: str, value: Any) -> None:
    """Raise RemovedSetting if `value` of the removed setting `name` must not be ignored."""
    default, advice = REMOVED[name]
    if advice and value != default:
        raise RemovedSetting(f"{name} was removed, got {value}: {advice}")


def config_of_run(source: str) -> Path | None:
    """Return the config.yaml of the run whose folder or model/ is `source`, or None if there is none. A published run
    has it beside the model.
    """
    for folder in (Path(source), Path(source).resolve().parent):
        file = folder / "config.yaml"
        if file.is_file() and ((folder / "model").is_dir() or (folder / "config.json").is_file()):
            return file
    return None


def begun_with(output_dir: str, section: str, name: str) -> Any:
    """Return the setting `name` of the run in output_dir from its config.yaml or, if that is unreadable, from a
    checkpoint's. None if there is no run.
    """
    folder = Path(output_dir)
    for path in (folder, *sorted(folder.glob("checkpoints/images-*"), reverse=True)):
        with suppress(OSError, ValueError):  # the error is reported when the run is opened
            return read_settings(path / "config.yaml", section)[section].get(name)
    return None


def other_sections(path: Path, config: Settings) -> tuple[list[str], list[str]]:
    """Return the sections that only the config.yaml at `path` has, and those that only `config` has."""
    sections = {part.name for part in fields(config)}
    try:
        stated = read_settings(path)
    except (OSError, ValueError):  # reported when the settings are compared
        return [], []
    return [name for name in stated if name not in sections], sorted(sections - stated.keys())


def differences(path: Path, config: Settings) -> list[str]:
    """Return a line for each setting that changes the result and differs between the file at `path` and `config`."""
    stated = _by_full_name(read_settings(path))
    wanted = _by_full_name(config.plain())
    # defaults of settings that an older version did not have
    sections = {part.name: getattr(config, part.name) for part in fields(config)}
    options = {
        name: {option.name: option.default for option in fields(section) if option.default is not MISSING}
        for name, section in sections.items()
    }
    ignored = {
        f"{name}.{option}"
        for name, section in sections.items()
        for option in with_traits(section, "free", "kept")
        if option in with_traits(section, "free") or getattr(section, option) in (None, "auto")
    }
    made = {part.name: asdict(part.default_factory()) for part in fields(config) if part.default_factory is not MISSING}
    defaults = wanted | _by_full_name(_plain(options | made))
    return [
        f"{name}: {old} -> {new}"
        for name in sorted(wanted.keys() | stated.keys())
        if name not in ignored
        and not name.startswith("hub.")
        and (old := stated.get(name, defaults.get(name))) != (new := wanted.get(name))
    ]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))  # tuples become lists


def _by_full_name(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
