"""The folder of a run: its state, its lock and its log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn

from ..data import Read
from ..messages import showable
from ..processes import gather, on_main, only_user_of
from ..settings import RemovedSetting, differences, other_sections
from ..storage import ODD, append_text, delete_file, make_folder, naming, sync, whole_file, write_file
from ..untrusted import open_regular, read_json
from .checkpoint import check_fits, find_checkpoint, tidy
from .config import RunSettings, S, kept_channels
from .launch import Launch, Speed, launch_summary, peak_memory
from .program import described
from .step import Program, RunResult
from .trackers import Trackers, finish_trackers

T = TypeVar("T")
R = TypeVar("R", bound=RunResult)
logger = logging.getLogger(__name__)
RESULTS = ("model", "pipeline", "evaluation.json")
FILES = (
    *RESULTS,
    "README.md",
    "bad_images.txt",
    "data.json",
    "evaluation.csv",
    "report.html",
    "metrics.jsonl",
    "lora",
    "nonfinite",
    "pictures",
    "tensorboard",
    "trackers.json",
    "wandb",
)


def find_run(
    config: S, finished: Callable[[S], T], build: Callable[[S], nn.Module] | None
) -> tuple[Path | None, T | None]:
    """Return the newest whole checkpoint in the output_dir, and the result of the run if it is finished. Nothing is
    changed.

    Args:
        config: of the run.
        finished: returns the result of a run with an evaluation.json, which is written last; raises ValueError when
            something that the run leaves is missing or damaged.
        build: the model that the run trains, if settings alone decide which it is.

    Raises:
        FileExistsError: when the folder is another run's, holds what a new run would overwrite, or is a finished run's
            that has lost results and the checkpoint from which to make them again.
        ValueError: when there are checkpoints, but none that is whole, or it is of another model.
    """
    output_dir = Path(config.run.output_dir)
    checkpoint, damaged = find_checkpoint(output_dir / "checkpoints")
    for problem in damaged:
        logger.warning("%s; it is passed over", showable(problem))
    config_file = output_dir / "config.yaml"
    if not (checkpoint or config_file.exists()):
        if found := [name for name in FILES if (output_dir / name).exists()]:
            raise FileExistsError(
                f"run.output_dir holds files that a run would overwrite, and no config.yaml of a run: "
                f"{', '.join(found)} in {output_dir.resolve()}. Choose another run.output_dir or move them away"
            )
        return None, None
    stated, missing = other_sections((checkpoint or output_dir) / "config.yaml", config)
    if min(len(stated), len(missing)) > 1:
        raise FileExistsError(
            f"run.output_dir holds a run of something else, with the settings {', '.join(stated)}, and not "
            f"{', '.join(missing)}: {output_dir.resolve()}. Choose another run.output_dir"
        )
    if (output_dir / "evaluation.json").exists():
        try:
            check_whole(output_dir, ["config.yaml"])
            if not differences(config_file, config):
                return checkpoint, finished(config)
        except RemovedSetting:
            raise
        except ValueError as error:
            if not checkpoint:
                raise FileExistsError(
                    f"run.output_dir holds a finished run that is not whole, and no checkpoint from which to make its "
                    f"results again: {error}. Put that back, or a folder of {output_dir / 'checkpoints'}; or choose "
                    "another run.output_dir"
                ) from error
            logger.warning("the run is finished, but not whole: %s. Its end is done again", showable(error))
    _refuse_changes(config, "settings", differences((checkpoint or output_dir) / "config.yaml", config))
    if checkpoint:
        if build is not None:
            with torch.device("meta"):
                check_fits(checkpoint, build(config))
        return checkpoint, None
    if found := [name for name in RESULTS if (output_dir / name).exists()]:
        raise FileExistsError(
            f"run.output_dir holds results, {', '.join(found)}, and no checkpoint from which to continue: "
            f"{output_dir.resolve()}. Choose another run.output_dir or move them away"
        )
    return None, None


def check_whole(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError naming the first of these files in `folder` that is missing, empty, cut off or not what its
    suffix promises.
    """
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            if not path.stat().st_size:
                raise ValueError("it is empty")
            if path.suffix == ".png":
                with Image.open(path, formats=["PNG"]) as picture:
                    picture.verify()  # the checksums of all its parts
            elif path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".html" and not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
                raise ValueError("its end is missing")
        except (OSError, SafetensorError, SyntaxError, ValueError) as error:  # Pillow's own is a SyntaxError
            raise ValueError(f"{path} is damaged: {error}") from error


def _refuse_changes(config: RunSettings, what: str, differing: list[str]) -> None:
    if not differing:
        return
    listed = "\n".join(f"  {showable(line)}" for line in differing)
    if not config.run.allow_config_change:
        raise FileExistsError(
            f"run.output_dir holds a run with other {what}: {Path(config.run.output_dir).resolve()}\n{listed}\nChoose "
            "another run.output_dir, or continue that run in spite of it with --run.allow_config_change true"
        )
    logger.warning("continuing with other %s:\n%s", what, listed)


def begin(
    config: RunSettings, checkpoint: Path | None, data: dict[str, dict[str, Any]], build: Callable[[], nn.Module]
) -> None:
    """Prepare the files in output_dir for a run that begins or continues, with `data`: the number of `images`, the
    `fingerprint` and, if they are known, the `contents` of each part of the data set, and the `fingerprint` of whatever
    else decides what is trained on. `build` makes the model that is trained.

    Raises:
        FileExistsError: when the data are not those that the run was begun with.
        ValueError: when the checkpoint is of another model.
    """
    output_dir = Path(config.run.output_dir)
    if checkpoint:
        before = read_json(checkpoint / "data.json")
        differing = [name for name, now in data.items() if not _same(before.get(name), now)]
        images = [_changed(name, before[name], data[name]) for name in differing if "images" in data[name]]
        _refuse_changes(config, "images", images)
        _refuse_changes(config, "inputs", [f"another {name}" for name in differing if "images" not in data[name]])
        with torch.device("meta"):
            check_fits(checkpoint, build())
    tidy(output_dir / "checkpoints", checkpoint, config.run.keep_checkpoints)
    config.save(output_dir / "config.yaml")  # first: it identifies the run
    with naming(output_dir):
        make_folder(output_dir / "pictures")
        delete_file(output_dir / "evaluation.json")  # which marks the run as finished
        if not checkpoint:
            delete_file(output_dir / "bad_images.txt")
    write_file(output_dir / "data.json", json.dumps(data, indent=2) + "\n")
    write_file(
        output_dir / "metrics.jsonl", (checkpoint / "metrics.jsonl").read_text(encoding="utf-8") if checkpoint else ""
    )


def _same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Return whether a part of the data is unchanged. Earlier versions did not record `contents` and `lanes`."""
    return before is not None and {name: now[name] for name in ("contents", "lanes") if name in now} | before == now


def _changed(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    same = before["images"] == now["images"]
    return f"{before['images']} {name} images -> {now['images']}" + ", others or changed" * same


class Run(Generic[S, R]):
    """The folder of a run, locked, as `opened` gives it.

    Attributes:
        config: its settings, with those that an earlier start has settled.
        checkpoint: the newest whole one, from which it continues.
        result: what it left behind, if it is finished.
        output_dir: path of the folder.
        launch: the processes that train.
        bad_images: after `begin`.
    """

    bad_images: BadImages

    def __init__(self, config: S, launch: Launch, checkpoint: Path | None, result: R | None):
        self.config, self.launch, self.checkpoint, self.result = config, launch, checkpoint, result
        self.output_dir = Path(config.run.output_dir)
        self.main = launch.accelerator.is_main_process
        self.speed = Speed()

    def begin(self, config: S, data: dict[str, dict[str, Any]], build: Callable[[], nn.Module]) -> None:
        """Prepare the files of the folder with the settled settings. See `begin`."""
        self.config = config
        on_main(lambda: begin(config, self.checkpoint, data, build))
        self.bad_images = BadImages(self.output_dir / "bad_images.txt")

    def announce(self, summary: str, program: Program, warnings: Iterable[str], image_errors: Iterable[str]) -> None:
        """Log on the main process what is trained and how its steps run, `warnings` of a run that begins, and
        unreadable images.
        """
        if self.main:
            self.bad_images.add(image_errors, warn=False)
            accelerator, run = self.launch.accelerator, self.config.run
            launch = launch_summary(accelerator, run), described(run, program, accelerator)
            logger.info("%s; %s, %s", summary, *launch)
            for sentence in () if self.checkpoint else warnings:
                logger.warning("%s", sentence)

    def complete(self, result: R, skipped: int, train_images: int, image_errors: Iterable[str]) -> R | None:
        """Report skipped steps and unreadable images; return the result with memory and speed on the main process."""
        errors = gather([*image_errors, *self.bad_images.listed])
        if not self.main:
            return None
        self.bad_images.add((line for lines in errors for line in lines), warn=False)
        if skipped:
            logger.warning("%d steps were skipped, since loss or gradient were not finite", skipped)
        if listed := self.bad_images.listed:
            path = showable(self.bad_images.path)
            logger.warning("%d files could not be read and were left out: %s", len(listed), path)
        return replace(
            result,
            memory=peak_memory(self.launch.accelerator.device),
            train_images=train_images,
            images_per_second=self.speed.images_per_second(),
        )


@contextmanager
def opened(
    config: S,
    launch: Launch,
    finished: Callable[[S], R],
    build: Callable[[S], nn.Module] | None = None,
    *,
    temporary: bool = False,
) -> Generator[Run[S, R]]:
    """Lock the folder `run.output_dir` within the context, and find the run that it holds. See `find_run` and
    `only_user_of` for arguments and errors.
    """
    accelerator = launch.accelerator
    settings = replace(config.run, mixed_precision=accelerator.mixed_precision)
    config = kept_channels(replace(config, run=settings))
    with only_user_of(Path(settings.output_dir), "training in", "run.output_dir"):
        try:
            checkpoint, result = on_main(partial(find_run, config, finished, build))
            if result:
                logger.info("%s holds this run, finished", showable(settings.output_dir))
            elif checkpoint and accelerator.is_main_process:
                shown = "its first checkpoint, to compare the results" if temporary else showable(checkpoint)
                logger.info("continuing from %s", shown)
            yield Run(config, launch, checkpoint, result)
        finally:
            finish_trackers(accelerator)


class Log:
    """metrics.jsonl and the trackers, since `checkpoint`, at which `images_seen` images were seen. Records hold nothing
    that a second run of the same config would not repeat.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, images_seen: int, checkpoint: Path | None = None):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        self.saved(checkpoint)
        lines = (checkpoint / self.path.name).read_text(encoding="utf-8").splitlines() if checkpoint else []
        self.trackers = Trackers(accelerator, output_dir, images_seen, list(map(json.loads, lines)))

    def saved(self, checkpoint: Path | None) -> None:
        """Remember that `checkpoint` holds all records so far."""
        self.checkpoint, self.since = checkpoint, []

    def restore(self) -> None:
        """Write metrics.jsonl again if somebody has deleted it: what the checkpoint holds, and what came since."""
        if self.path.exists():
            return
        before, lost = "", ""
        try:
            if self.checkpoint:
                before = (self.checkpoint / self.path.name).read_text(encoding="utf-8")
        except OSError as error:
            lost = f", without the records up to its checkpoint ({error})"
        logger.warning("%s was deleted during the run; it is written again%s", self.path, lost)
        write_file(self.path, before + "".join(self.since))

    def write(self, kind: str, values: Mapping[str, float | None]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.restore()
        record = {"kind": kind, **values}
        self.since.append(json.dumps(record, allow_nan=False) + "\n")
        append_text(self.path, self.since[-1])
        if kind == "evaluation":  # the last record of a run that is finished
            sync(self.path)
        self.trackers.log(record)

    def show(self, pictures: dict[str, Image.Image], images_seen: int) -> None:
        """Save the pictures, by the main process, and show them in the trackers."""
        for name, picture in pictures.items():
            path = self.path.parent / "pictures" / f"{name}.png"
            with whole_file(path) as partial:  # on the disk before the run counts as finished
                picture.save(partial, "PNG")
        self.trackers.show(pictures, images_seen)


MOST_BAD = 0.1
"""Share of unreadable images above which the storage is assumed to be faulty. In data sets from the web, a few in a
hundred are damaged."""
JUDGED_FROM = 200
"""Number of images that a process reads before their share is judged. If 5 in 100 are damaged, more than a tenth of
200 are damaged in 2 runs of 1,000."""


class BadImages:
    """Unreadable files that were left out, each listed once."""

    def __init__(self, path: Path):
        self.path = path
        self.asked = self.bad = 0
        self.last = ""
        text = ""
        if path.exists():
            with open_regular(path) as file:
                text = file.read().decode(errors=ODD)
        whole, _, torn = text.rpartition("\n")
        self.listed = set(whole.splitlines())
        if torn:  # the process ended in the middle of a line
            append_text(path, "\n")

    def judge(self, read: Read, asked: int) -> None:
        """List the unreadable ones of the `asked` images.

        Raises:
            OSError: when they could not be reached.
            ValueError: when they are not to be left out, or are more than `MOST_BAD` of those so far.
        """
        self.add(read.checked().errors)
        self.asked, self.bad = self.asked + asked, self.bad + len(read.errors)
        self.last = [self.last, *read.errors][-1]
        if self.asked >= JUDGED_FROM and self.bad > MOST_BAD * self.asked:
            raise ValueError(
                f"training stopped: at most {MOST_BAD:.0%} of the images may be left out since they cannot be read, "
                f"got {self.bad} of the {self.asked} read so far, {self.last} among them. {self.advice}"
            )

    @property
    def advice(self) -> str:
        """Advice for the case that too many images cannot be read."""
        return (
            f"{self.path} lists them. If their disk is missing or fails, the same command continues once it is back; "
            "else remove or mend these files"
        )

    def add(self, errors: Iterable[str], warn: bool = True) -> None:
        lines = dict.fromkeys(" ".join(error.split()) for error in errors)
        new = [line for line in lines if line not in self.listed]
        self.listed.update(new)
        for line in new:
            if warn:
                logger.warning("%s; left out", showable(line))
        if new:
            append_text(self.path, "".join(f"{line}\n" for line in new))
            sync(self.path)  # a run that is continued reads them from here
