"""Settings of the commands that measure a model on images: those of its run, where they are not given."""

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
"""Settings of the data that only a training reads."""
MEASURED = {option.name for option in fields(ObjectiveConfig)}.difference(with_traits(ObjectiveConfig, "training"))
"""What an objective is measured with; the rest of it is for training."""
NEEDED = {
    "data": {"name": str, "root": str, "heldout_fraction": float},
    "objective": dict.fromkeys(sorted(MEASURED), object),
}
"""What the config.yaml of a run must hold to be measured on its images."""


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
        help="Which images; by default the held-out ones, but all of a folder that has no part for them and that the "
        "model was not trained on.",
    )
    parser.add_section("data", DataConfig, skip=NOT_MEASURED)


def parse_measuring(parser: Parser, arguments: Sequence[str], models: list[str]) -> tuple[Namespace, list[ModelMixin]]:
    """The settings and the models. Settings that are not given come from the models' runs or, if there are none, from
    the models' configs. The order of the models does not matter.
    """
    given = read_flags(parser, arguments)
    parsed = complete(parser, given, {"data.name": "folder"})  # wrong ones are told before a model is loaded
    sources = [parsed[name] for name in models]
    for source in sources:
        if is_local(source):
            Source(source, parsed.subfolder, parsed.revision).config()
    if "data" not in given and not any(map(config_of_run, sources)):
        first = sources[0]
        why = f"{first} belongs to no run that does" if is_local(first) else f"{no_such_path(first)} whose run does"
        parser.exit(2, message(f"error: name the images with --data: {why}") + "\n")
    loaded = [load(parsed, source) for source in sources]
    runs = {source: run for source in sources if (run := settings_of_run(source, given))}
    other_set = "data.name" in given or "data.root" in given
    known = {
        source: run | ({"data": _data_of_run(run, runs, parsed.data)} if other_set else {})
        for source, run in runs.items()
    } or {source: {"data": data_for(model, parsed, source)} for source, model in zip(sources, loaded, strict=True)}
    found = {}
    for source, sections in known.items():
        stated = {
            f"{section}.{name}": value
            for section in parser.sections
            for name, value in sections.get(section, {}).items()
        }
        found[source] = complete(parser, given, stated, config_of_run(source))
    _refuse_differences(found)
    chosen, parsed = next(iter(found.items()))
    if runs and not other_set and process_share()[0] == 0:  # somebody else may have chosen them
        place = parsed.data.root if parsed.data.name in PLACED else parsed.data.name
        place += f" in {parsed.data.root}" if parsed.data.name not in (*PLACED, "digits") else ""
        print(showable(f"images      {place}, as {config_of_run(chosen)} says"), flush=True)
    same = [run["data"] for run in runs.values() if _same_set(run["data"], vars(parsed.data))]
    if parsed.split is None and same:  # some model was trained on these images, but for the held-out ones
        if {data["heldout_fraction"] for data in same} != {parsed.data.heldout_fraction}:
            raise ValueError(
                "data.heldout_fraction must be that of the training, or a model is measured on what it was trained on; "
                "--split says which images to take all the same"
            )
        parsed.split = "held-out"
    return parsed, loaded


def load_images(parsed: Namespace, sources: Sequence[str], *arguments: Any, **options: Any) -> tuple[ImageSet, str]:
    """The images for the models of `sources`, and which part they are, as `load_split` gives them, with further
    arguments of that; `parsed.data` then states their channels.
    """
    images, split = load_split(parsed.data, parsed.split, *arguments, **options)
    for source in sources:
        refuse_colours(images, parsed.data, source)
    parsed.data = replace(parsed.data, channels=images.channels)
    return images, split


def _data_of_run(run: dict[str, Any], runs: dict[str, Any], asked: DataConfig) -> dict[str, Any]:
    """Settings of a run's data. If `asked` is another set, only those that the run's model needs, and the rest from the
    run that was trained on that set, if there is one.
    """
    if _same_set(run["data"], vars(asked)):
        return run["data"]
    of_model = with_traits(DataConfig, "any_set")
    owner = next((other["data"] for other in runs.values() if _same_set(other["data"], vars(asked))), {})
    if run["data"]["name"] in IN_MEMORY and asked.name in IN_MEMORY:  # which lie beside each other
        owner = {"root": run["data"]["root"]} | owner
    return _read_of(asked, owner | {name: value for name, value in run["data"].items() if name in of_model})


def _read_of(asked: DataConfig, known: dict[str, Any]) -> dict[str, Any]:
    """The settings in `known` that the set `asked` for reads, and value_range, without which the model would get other
    values than it was trained on.
    """
    ignored = unread(DataConfig, vars(asked) | known | {"name": asked.name}).keys() - {"value_range"}
    ignored |= {"root"} if asked.name == "digits" else set()
    ignored |= {"channels"} if known.get("channels") == 1 else set()  # images in colour are not made grey unasked
    return {name: value for name, value in known.items() if name not in ignored}


def _same_set(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two settings of data mean the same images, wherever those of a named set lie."""
    return one["name"] == other["name"] and (one["name"] in IN_MEMORY or _place(one) == _place(other))


def _refuse_differences(found: dict[str, Namespace]) -> None:
    """Raise ValueError when runs, by their source, differ in a setting that decides what is compared."""
    if len(found) < 2:
        return
    (first, one), (second, other) = found.items()
    if not _same_set(vars(one.data), vars(other.data)):
        raise ValueError(
            "two models are compared on the same images: name them with --data, since the run of "
            f"{first} used {one.data.name} in {one.data.root}, and that of {second} used {other.data.name} in "
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
            f"two models are compared under one protocol: give {' '.join(sorted(flags))}, since "
            f"{'; '.join(sorted(lines))}"
        )


def data_for(model: ModelMixin, parsed: Namespace, source: str) -> dict[str, Any]:
    """How images are read for a model of no run."""
    known = {"resolution": list(size_of(model))}
    if (channels := model.config.get("in_channels", 3)) != 1:  # images in colour are not made grey unasked
        known["channels"] = channels
    stated = Source(source, parsed.subfolder, parsed.revision).value_range()
    return known | ({"value_range": [stated.low, stated.high]} if stated else {})


def _place(data: dict[str, Any]) -> tuple[str, Path]:
    """Of a set of images: two settings with the same place mean the same."""
    on_hub = data["name"] == "datasets" and is_hub_id(data["root"])
    return data["name"], Path(data["root"]) if on_hub else Path(data["root"]).resolve()


def of_another_set(known: dict[str, Any], asked: DataConfig) -> dict[str, Any]:
    """Settings of a run's data, without what is of its own set alone where `asked` is another."""
    if "name" not in known or _place(known) == _place(vars(asked)):
        return known
    of_set = ["streaming", *with_traits(asked, "of_rows")]
    return _read_of(asked, {name: value for name, value in known.items() if name not in of_set})


def settings_of_run(source: str, given: Namespace | None = None) -> dict[str, dict[str, Any]]:
    """Data, objective and evaluation of the run that a folder, or its model/, is of; empty if there is none. The weight
    to which a target_rate has moved is read from its evaluation.json, unless `given` states one.
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
    """The evaluation of the finished run that a folder, or its model/, belongs to."""
    file = config_of_run(source)
    path = file and file.parent / "evaluation.json"
    return read_report(path) if path and path.exists() else None


def objective_of(parsed: Namespace, *sources: str) -> VAEObjective:
    """The objective to measure with. A learned or optimal scale has the value with which a source's run ended.

    Raises:
        ValueError: when no source has a finished run, or two runs ended with different values.
    """
    if not isinstance(parsed.objective.scale, str):
        return parsed.objective.build()
    scales = {source: report.scale for source in sources if (report := report_of_run(source))}
    if len(set(scales.values())) > 1:
        raise ValueError(
            "two models are compared under one protocol: give --objective.scale VALUE, since "
            f"objective.scale {parsed.objective.scale} is "
            f"{' and '.join(f'{scale:g} for {source}' for source, scale in scales.items())}"
        )
    return parsed.objective.build(next(iter(scales.values()), None))


def name_of(source: str) -> str:
    """Of a model for people: a repository, or the folder without what all runs call theirs."""
    path = Path(source)
    if not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name in ("model", "vae") else path.name
