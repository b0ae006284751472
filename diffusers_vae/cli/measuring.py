"""Settings of the commands that measure a model on images. Settings without a flag come from the model's run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from ..data import IN_MEMORY, PLACED, DataConfig, ImageSet, is_hub_id, load_split, refuse_colours
from ..evaluation.evaluate import EvaluationConfig
from ..evaluation.report import EvaluationReport, read_report
from ..fields import unread, with_traits
from ..losses.objective import ObjectiveConfig, VAEObjective
from ..messages import message, showable
from ..models import Source, is_local, no_such_path
from ..models.stock import ModelMixin
from ..processes import process_share
from ..settings import config_of_run, read_settings
from ..untrusted import check_type
from .arguments import add_loading, complete, load, read_flags, size_of
from .parser import Parser

NOT_MEASURED = {*with_traits(DataConfig, "training")}
"""Settings of the data that only training reads."""
MEASURED = {option.name for option in fields(ObjectiveConfig)}.difference(with_traits(ObjectiveConfig, "training"))
"""Settings of the objective that measuring reads. The others affect training only."""
NEEDED = {
    "data": {"name": str, "root": str, "heldout_fraction": float},
    "objective": dict.fromkeys(sorted(MEASURED), object),
}
"""Settings, with their types, that config.yaml must hold for measuring a run."""


def add_measuring(parser: Parser) -> None:
    """Add the flags of a command that measures a model on images."""
    add_loading(parser)
    parser.add_argument("--out", type=str | None, default=None, help="Folder for the results.")
    add_images(parser)
    for name, kind in (("objective", ObjectiveConfig), ("evaluation", EvaluationConfig)):
        parser.add_section(name, kind, skip=with_traits(kind, "training"))


def add_images(parser: Parser) -> None:
    """Add the flags that choose the images."""
    parser.add_argument(
        "--split",
        type=Literal["held-out", "training", "all"] | None,
        default=None,
        help="Images to measure; null: the held-out images, or all images if a folder has no held-out part and the "
        "model was not trained on it.",
    )
    parser.add_section("data", DataConfig, skip=NOT_MEASURED)


def parse_measuring(parser: Parser, arguments: Sequence[str], models: list[str]) -> tuple[Namespace, list[ModelMixin]]:
    """Return the settings and the models. Settings without a flag come from the models' runs or, without runs, from the
    models' configs. The order of the models does not change the settings.
    """
    given = read_flags(parser, arguments)
    parsed = complete(parser, given, {"data.name": "folder"})  # report wrong settings before loading a model
    sources = [parsed[name] for name in models]
    for source in sources:
        if is_local(source):
            Source(source, parsed.subfolder, parsed.revision).config()
    if "data" not in given and not any(map(config_of_run, sources)):
        first = sources[0]
        if is_local(first):
            why = f"name the images with --data: {first} does not belong to a run, whose images would be used"
        else:
            why = f"{no_such_path(first)}. For a model on the Hub, name the images with --data"
        parser.exit(2, message(f"error: {why}") + "\n")
    loaded = [load(parsed, source) for source in sources]
    runs = {source: run for source in sources if (run := settings_of_run(source, given))}
    other_set = "data.name" in given or "data.root" in given
    stored = {
        source: run | ({"data": _data_of_run(run, runs, parsed.data)} if other_set else {})
        for source, run in runs.items()
    } or {source: {"data": data_for(model, parsed, source)} for source, model in zip(sources, loaded, strict=True)}
    found = {}
    for source, sections in stored.items():
        stated = {
            f"{section}.{name}": value
            for section in parser.sections
            for name, value in sections.get(section, {}).items()
        }
        found[source] = complete(parser, given, stated, config_of_run(source))
    _refuse_differences(found)
    chosen, parsed = next(iter(found.items()))
    if runs and not other_set and process_share()[0] == 0:  # the run may belong to another user
        origin = parsed.data.root if parsed.data.name in PLACED else parsed.data.name
        origin += f" in {parsed.data.root}" if parsed.data.name not in (*PLACED, "digits") else ""
        print(showable(f"images      {origin}, as stated in {config_of_run(chosen)}"), flush=True)
    same = [run["data"] for run in runs.values() if _same_set(run["data"], vars(parsed.data))]
    if parsed.split is None and same:  # a model was trained on these images, except the held-out ones
        if {data["heldout_fraction"] for data in same} != {parsed.data.heldout_fraction}:
            raise ValueError(
                "data.heldout_fraction must be the same as in training, or a model is measured on images that it was "
                "trained on; use --split to choose the images explicitly"
            )
        parsed.split = "held-out"
    return parsed, loaded


def load_images(parsed: Namespace, sources: Sequence[str], *arguments: Any, **options: Any) -> tuple[ImageSet, str]:
    """Return the images for the models in `sources`, and the name of their part. `arguments` and `options` go to
    `load_split`. The number of channels is written to `parsed.data`.
    """
    images, split = load_split(parsed.data, parsed.split, *arguments, **options)
    for source in sources:
        refuse_colours(images, parsed.data, source)
    parsed.data = replace(parsed.data, channels=images.channels)
    return images, split


def _data_of_run(run: dict[str, Any], runs: dict[str, Any], asked: DataConfig) -> dict[str, Any]:
    """Return the data settings of `run`. If `asked` names another set, take from `run` only the settings that its model
    needs, and the others from the run in `runs` that was trained on that set, if any.
    """
    if _same_set(run["data"], vars(asked)):
        return run["data"]
    of_model = with_traits(DataConfig, "any_set")
    owner = next((other["data"] for other in runs.values() if _same_set(other["data"], vars(asked))), {})
    if run["data"]["name"] in IN_MEMORY and asked.name in IN_MEMORY:  # downloaded to the same folder
        owner = {"root": run["data"]["root"]} | owner
    return _read_of(asked, owner | {name: value for name, value in run["data"].items() if name in of_model})


def _read_of(asked: DataConfig, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in `stored` that apply to the set in `asked`. value_range is always kept, because the model
    was trained on values in this range.
    """
    ignored = unread(DataConfig, vars(asked) | stored | {"name": asked.name}).keys() - {"value_range"}
    ignored |= {"root"} if asked.name == "digits" else set()
    ignored |= {"channels"} if stored.get("channels") == 1 else set()  # colour images become grey only on request
    return {name: value for name, value in stored.items() if name not in ignored}


def _same_set(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two data settings name the same images. The folder of a named set does not matter."""
    return one["name"] == other["name"] and (one["name"] in IN_MEMORY or _location(one) == _location(other))


def _refuse_differences(found: dict[str, Namespace]) -> None:
    """Raise ValueError if the settings of two runs, with their sources as keys, differ in what is compared."""
    if len(found) < 2:
        return
    (first, one), (second, other) = found.items()
    if not _same_set(vars(one.data), vars(other.data)):
        raise ValueError(
            "two models must be compared on the same images: name them with --data, since the run of "
            f"{first} used {one.data.name} in {one.data.root}, and the run of {second} used {other.data.name} in "
            f"{other.data.root}"
        )
    lines, flags = [], []
    for section in ("data", "objective", "evaluation"):
        no_matter = {"name", "streaming", *with_traits(one[section], "free", "training")}  # the sets are the same
        for name in vars(one[section]).keys() - no_matter:
            values = [
                parsed.data.size if name == "resolution" else vars(parsed[section])[name] for parsed in (one, other)
            ]
            if values[0] != values[1]:
                shown = [json.dumps(value) for value in values]
                lines.append(f"{section}.{name} is {shown[0]} for {first} and {shown[1]} for {second}")
                flags.append(f"--{section}.{name} VALUE")
    if lines:
        raise ValueError(
            f"two models must be compared under one protocol: give {' '.join(sorted(flags))}, since "
            f"{'; '.join(sorted(lines))}"
        )


def data_for(model: ModelMixin, parsed: Namespace, source: str) -> dict[str, Any]:
    """Return the data settings for a model without a run."""
    settings = {"resolution": list(size_of(model))}
    if (channels := model.config.get("in_channels", 3)) != 1:  # colour images become grey only on request
        settings["channels"] = channels
    stated = Source(source, parsed.subfolder, parsed.revision).value_range()
    return settings | ({"value_range": [stated.low, stated.high]} if stated else {})


def _location(data: dict[str, Any]) -> tuple[str, Path]:
    """Return the name and location of a data set. Settings with equal locations name the same images."""
    on_hub = data["name"] == "datasets" and is_hub_id(data["root"])
    return data["name"], Path(data["root"]) if on_hub else Path(data["root"]).resolve()


def of_another_set(stored: dict[str, Any], asked: DataConfig) -> dict[str, Any]:
    """Return the data settings of a run, without those specific to its set if `asked` names another set."""
    if "name" not in stored or _location(stored) == _location(vars(asked)):
        return stored
    of_set = ["streaming", *with_traits(asked, "of_rows")]
    return _read_of(asked, {name: value for name, value in stored.items() if name not in of_set})


def settings_of_run(source: str, given: Namespace | None = None) -> dict[str, dict[str, Any]]:
    """Return the sections data, objective and evaluation of the run in a folder, or around a model/; {} without a run.
    If the run had a target_rate, kl_weight is read from evaluation.json, unless it is in `given`.
    """
    file = config_of_run(source)
    if file is None:
        return {}
    settings = read_settings(file, "data", "objective", "evaluation")
    check_type(settings, NEEDED, str(file))
    data, evaluation = (
        {name: value for name, value in settings[section].items() if name not in with_traits(kind, "training")}
        for section, kind in (("data", DataConfig), ("evaluation", EvaluationConfig))
    )
    objective = {name: settings["objective"][name] for name in MEASURED}
    stated = given is not None and "objective.kl_weight" in given
    moved = settings["objective"].get("target_rate") is not None and not stated
    if moved and (report := report_of_run(source)):
        objective["kl_weight"] = report.kl_weight
    return {"data": data, "objective": objective, "evaluation": evaluation}


def report_of_run(source: str) -> EvaluationReport | None:
    """Return the evaluation of the finished run in a folder, or around a model/; None without one."""
    file = config_of_run(source)
    path = file and file.parent / "evaluation.json"
    return read_report(path) if path and path.exists() else None


def objective_of(parsed: Namespace, *sources: str) -> VAEObjective:
    """Return the objective to measure with. A learned or optimal scale has its final value in a source's run.

    Raises:
        ValueError: when no source has a finished run, or two runs ended with different values.
    """
    if not isinstance(parsed.objective.scale, str):
        return parsed.objective.build()
    scales = {source: report.scale for source in sources if (report := report_of_run(source))}
    if len(set(scales.values())) > 1:
        raise ValueError(
            "two models must be compared under one protocol: give --objective.scale VALUE, since "
            f"objective.scale {parsed.objective.scale} is "
            f"{' and '.join(f'{scale:g} for {source}' for source, scale in scales.items())}"
        )
    return parsed.objective.build(next(iter(scales.values()), None))


def name_of(source: str) -> str:
    """Return a short name of a model: its repository or folder, where the folder of a run stands for its model/."""
    path = Path(source)
    if not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name in ("model", "vae") else path.name
