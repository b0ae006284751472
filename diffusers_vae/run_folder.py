"""The folder of a run: whose it is, whether it can be continued, its lock, its log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock
from PIL import Image
from torch import nn

from .checkpoint import acquire, check_fits, find_checkpoint, naming, on_main, tidy, write_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run: sections, each a dataclass, one of them `run`."""

    def plain(self) -> dict[str, dict[str, Any]]:
        """All settings as YAML and JSON know them."""
        return _plain(asdict(self))

    def save(self, path: Path) -> None:
        """Write all settings as YAML, which gives the same run again."""
        write_file(path, yaml.safe_dump(self.plain(), sort_keys=False))


@contextmanager
def only_run_in(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Within, no other run can use the folder."""
    lock = FileLock(output_dir / ".lock")
    on_main(accelerator, partial(acquire, lock, "training in", "run.output_dir"))
    try:
        yield
    finally:
        lock.release()


FREE_SETTINGS = {
    "data.root", "data.num_workers", "data.on_bad_image", "run.output_dir", "run.checkpoint_every",
    "run.keep_checkpoints", "run.allow_config_change", "run.on_nonfinite", "run.tracker",
    "run.gradient_accumulation_steps", "run.device_batch_size", "run.gradient_checkpointing",
    "vae.source", "vae.subfolder", "vae.revision", "latents.folder",
    "objective.perceptual_weights", "model.pretrained", "model.subfolder", "model.revision",
}  # fmt: skip
"""A run may be continued with others of these: they change no result (of an autoencoder the weights count, not where
they lie) or, like the number of processes, only the order in which it is summed."""

KEPT_SETTINGS = ("data.lanes", "run.compile", "run.mixed_precision")
"""Where they are left open, a run goes on with those that it was begun with."""

RESULTS = ("model", "pipeline", "evaluation.json")
FILES = (
    *RESULTS,
    "README.md",
    "bad_images.txt",
    "data.json",
    "evaluation.csv",
    "report.html",
    "metrics.jsonl",
    "nonfinite",
    "pictures",
    "tensorboard",
)


def find_run(
    config: Settings,
    results: tuple[str, ...],
    readable: Callable[[], object],
    build: Callable[[], nn.Module] | None,
) -> tuple[Path | None, bool]:
    """The newest whole checkpoint in the output_dir, and whether the run is finished. Nothing is changed.

    Args:
        config: of the run.
        results: names of what a finished run leaves.
        readable: raises ValueError when evaluation.json, which is written last, cannot be read.
        build: the model that the run trains, if settings alone decide which it is.

    Raises:
        FileExistsError: when the folder is another run's, or holds what a new run would overwrite.
        ValueError: when there are checkpoints, but none that is whole, or it is of another model.
    """
    output_dir = Path(config.run.output_dir)
    checkpoint, damaged = find_checkpoint(output_dir / "checkpoints")
    for problem in damaged:
        logger.warning("%s; it is passed over", problem)
    config_file = output_dir / "config.yaml"
    if not (checkpoint or config_file.exists()):
        if found := [name for name in FILES if (output_dir / name).exists()]:
            raise FileExistsError(
                f"run.output_dir holds files that a run would overwrite, and no config.yaml that says whose they are: "
                f"{', '.join(found)} in {output_dir.resolve()}. Choose another run.output_dir or move them away"
            )
        return None, False
    _check_kind((checkpoint or output_dir) / "config.yaml", config)
    if all((output_dir / name).exists() for name in results) and config_file.exists():
        try:
            readable()
            whole = True
        except ValueError as error:
            logger.warning("evaluation.json cannot be read (%s); the end of the run is done again", error)
            whole = False
        if whole and not _differing(config_file, config):
            return checkpoint, True
    _refuse_changes(config, "settings", _differing((checkpoint or output_dir) / "config.yaml", config))
    if checkpoint:
        if build is not None:
            with torch.device("meta"):
                check_fits(checkpoint, build())
        return checkpoint, False
    if found := [name for name in RESULTS if (output_dir / name).exists()]:
        raise FileExistsError(
            f"run.output_dir holds results, {', '.join(found)}, and no checkpoint from which to continue: "
            f"{output_dir.resolve()}. Choose another run.output_dir or move them away"
        )
    return None, False


def _check_kind(path: Path, config: Settings) -> None:
    """Raise FileExistsError when the config.yaml at `path` is of a run of something else."""
    try:
        stated = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return  # which is told when the settings are compared
    known = {part.name for part in fields(config)}
    if isinstance(stated, dict) and min(len(stated.keys() - known), len(known - stated.keys())) > 1:
        raise FileExistsError(
            f"run.output_dir holds a run of something else, with the settings {', '.join(stated)}, and not "
            f"{', '.join(sorted(known - stated.keys()))}: {path.parent.resolve()}. Choose another run.output_dir"
        )


def _differing(path: Path, config: Settings) -> list[str]:
    """The settings in the YAML file `path` that are not those of `config` and change the result."""
    try:
        stated = _settings(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML, so that it is not known which run the folder holds: {error}") from error
    wanted = _settings(config.plain())
    # of settings that an older version did not have
    sections = {part.name: getattr(config, part.name) for part in fields(config)}
    options = {
        name: {option.name: option.default for option in fields(section) if option.default is not MISSING}
        for name, section in sections.items()
    }
    made = {part.name: asdict(part.default_factory()) for part in fields(config) if part.default_factory is not MISSING}
    defaults = wanted | _settings(_plain(options | made))
    return [
        f"{name}: {old} -> {new}"
        for name in sorted(wanted.keys() | stated.keys())
        if name not in FREE_SETTINGS
        and not (name in KEPT_SETTINGS and wanted.get(name) is None)
        and not name.startswith("hub.")
        and (old := stated.get(name, defaults.get(name))) != (new := wanted.get(name))
    ]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))  # tuples become lists


def _settings(sections: Any) -> dict[str, Any]:
    """By their full names."""
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        return {"config.yaml": sections}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _refuse_changes(config: Settings, what: str, differing: list[str]) -> None:
    if not differing:
        return
    listed = "\n".join(f"  {line}" for line in differing)
    if not config.run.allow_config_change:
        raise FileExistsError(
            f"run.output_dir holds a run with other {what}: {Path(config.run.output_dir).resolve()}\n{listed}\nChoose "
            "another run.output_dir, or continue that run in spite of it with --run.allow_config_change true"
        )
    logger.warning("continuing with other %s:\n%s", what, listed)


def begin(
    config: Settings, checkpoint: Path | None, data: dict[str, dict[str, Any]], build: Callable[[], nn.Module]
) -> None:
    """Bring the files in output_dir to where the run begins or goes on, with `data`: the number of `images` and the
    `fingerprint` of each part of the data set, and the `fingerprint` of whatever else decides what is trained on.
    `build` makes the model that is trained.

    Raises:
        FileExistsError: when the data are not those that the run was begun with.
        ValueError: when the checkpoint is of another model.
    """
    output_dir = Path(config.run.output_dir)
    if checkpoint:
        before = json.loads((checkpoint / "data.json").read_text())
        differing = [name for name in data if before.get(name) != data[name]]
        images = [_changed(name, before[name], data[name]) for name in differing if "images" in data[name]]
        _refuse_changes(config, "images", images)
        _refuse_changes(config, "inputs", [f"another {name}" for name in differing if "images" not in data[name]])
        with torch.device("meta"):
            check_fits(checkpoint, build())
    tidy(output_dir / "checkpoints", checkpoint, config.run.keep_checkpoints)
    config.save(output_dir / "config.yaml")  # first: it says whose the others are
    with naming(output_dir):
        (output_dir / "pictures").mkdir(exist_ok=True)
        (output_dir / "evaluation.json").unlink(missing_ok=True)  # it says that the run is finished
        if not checkpoint:
            (output_dir / "bad_images.txt").unlink(missing_ok=True)
    write_file(output_dir / "data.json", json.dumps(data, indent=2) + "\n")
    write_file(output_dir / "metrics.jsonl", (checkpoint / "metrics.jsonl").read_text() if checkpoint else "")


def _changed(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    same = before["images"] == now["images"]
    return f"{before['images']} {name} images -> {now['images']}" + ", others or changed" * same


class Log:
    """metrics.jsonl and the tracker. Records hold nothing that a second run of the same config would not repeat."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, images_seen: int):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        if accelerator.log_with:
            # what an interrupted run had logged after its checkpoint comes again
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": images_seen + 1}})

    def write(self, kind: str, values: dict[str, float | None]) -> None:
        if self.accelerator.is_main_process:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps({"kind": kind} | values, allow_nan=False) + "\n")
        named = {
            f"{kind}/{name}": value for name, value in values.items() if name != "images_seen" and value is not None
        }
        with naming(self.path.parent / "tensorboard"):
            self.accelerator.log(named, step=values["images_seen"])

    def show(self, pictures: dict[str, Image.Image], images_seen: int) -> None:
        """Save the pictures, by the main process, and show them in the tracker."""
        for name, picture in pictures.items():
            path = self.path.parent / "pictures" / f"{name}.png"
            with naming(path):
                picture.save(path)
        for tracker in self.accelerator.trackers:
            arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}
            with naming(self.path.parent / "tensorboard"):
                tracker.log_images(arrays, step=images_seen, dataformats="NHWC")


class BadImages:
    """The files that were left out since they could not be read, each listed once."""

    def __init__(self, path: Path):
        self.path = path
        self.known = set(path.read_text().splitlines()) if path.exists() else set()

    def add(self, errors: Iterable[str], warn: bool = True) -> None:
        for error in errors:
            line = " ".join(error.split())
            if line in self.known:
                continue
            self.known.add(line)
            if warn:
                logger.warning("%s; left out", line)
            with naming(self.path), self.path.open("a") as file:
                file.write(line + "\n")
