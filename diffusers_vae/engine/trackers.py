"""The trackers of a run: each gets every record and every set of pictures once, however often the run is killed."""

from __future__ import annotations

import json
import logging
import os
import struct
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate import tracking as accelerate
from PIL import Image

from ..settings import read_settings
from ..silence import alone
from ..storage import write_file
from ..untrusted import read_json

logger = logging.getLogger(__name__)
PROJECT = "diffusers-vae"
"""Project, or experiment, in which trackers put runs."""


def check_installed(names: Iterable[str]) -> None:
    """Raise ValueError if Accelerate does not know one of these trackers or its package is not installed."""
    available = {str(name) for name in accelerate.get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        packages = " ".join(missing).replace("_", "-").replace("aim", "'aim<4'")
        raise ValueError(
            f"run.tracker must name installed trackers, got {', '.join(missing)}: run `pip install {packages}`, or set "
            "--run.tracker null"
        )


@dataclass(frozen=True)
class Row:
    """What a tracker shows of a record of metrics.jsonl, or the pictures that follow a record.

    Rows of a run have the same numbers whenever it is repeated: record n has 2n, the pictures after it have 2n + 1.
    """

    number: int
    images_seen: int
    values: dict[str, float] = field(default_factory=dict[str, float])
    pictures: Mapping[str, Image.Image] = field(default_factory=dict[str, Image.Image])


def row_of(number: int, record: Mapping[str, Any]) -> Row:
    """Return the row of the record `number`, counted from 1."""
    values = {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name not in ("kind", "images_seen") and value is not None
    }
    return Row(2 * number, record["images_seen"], values)


@dataclass(frozen=True)
class Begun:
    """A run that begins or continues.

    Attributes:
        output_dir: its folder.
        settings: by full name.
        images_seen: where it continues.
        rows: number of the last row before that.
    """

    output_dir: Path
    settings: dict[str, Any]
    images_seen: int
    rows: int

    @property
    def name(self) -> str:
        """Name of the run in trackers."""
        return self.output_dir.resolve().name


class RunTracker:
    """A tracker of Accelerate and its run. Trackers differ in how a run is continued, in which of its rows they can
    state, and in how they take pictures.

    Attributes:
        kept: `id` of the run and `last`, the number of the last row that was handed over; stays on the disk.
        tracker: of Accelerate.
        last: number of the last row that the tracker has.
    """

    def __init__(self, run: Begun, kept: dict[str, Any]):
        self.kept = kept
        self.tracker = self.begin(run)
        self.last: int = kept.get("last", 0)

    def begin(self, run: Begun) -> Any:
        """Return the tracker of Accelerate, which has not started."""
        raise NotImplementedError

    def started(self, run: Begun) -> None:
        """Note the id that the tracker gave to the run, and what it has; state settings of a new run."""

    def missing(self, row: Row) -> Row | None:
        """Return what the tracker does not have of a row."""
        return row if row.number > self.last else None

    def log(self, row: Row) -> None:
        """Log values, or pictures."""
        if row.values:
            self.tracker.log(row.values, step=row.images_seen)
        if row.pictures:
            self.show(row)

    def show(self, row: Row) -> None:
        """Log pictures."""
        raise NotImplementedError


class TensorBoard(RunTracker):
    """Event files in output_dir/tensorboard; what came after the checkpoint is withdrawn and comes again."""

    def begin(self, run: Begun) -> Any:
        self.has = run.rows + 1 if any(run.output_dir.glob("tensorboard/*")) else 0
        return accelerate.TensorBoardTracker("tensorboard", run.output_dir, purge_step=run.images_seen + 1)

    def started(self, run: Begun) -> None:
        self.last = self.has

    def show(self, row: Row) -> None:
        arrays = {name: np.asarray(picture)[None] for name, picture in row.pictures.items()}
        self.tracker.log_images(arrays, step=row.images_seen, dataformats="NHWC")
        self.tracker.tracker.flush()


class WandB(RunTracker):
    """Steps of W&B only rise, and it drops what is logged at an earlier one: they are the numbers of rows, and
    `images_seen` is the x-axis.
    """

    def begin(self, run: Begun) -> Any:
        self.folder = run.output_dir / "wandb"
        return accelerate.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.kept["id"],
            name=run.name,
            resume="allow",
            dir=str(run.output_dir),
            config=run.settings,
        )

    def started(self, run: Begun) -> None:
        wandb_run = self.tracker.tracker
        wandb_run.define_metric("images_seen", hidden=True)
        wandb_run.define_metric("*", step_metric="images_seen")
        if wandb_run.offline:
            files = self.folder.glob(f"*run-*-{self.kept['id']}/run-{self.kept['id']}.wandb")
            self.last = max((row.step.num for file in files for row in wandb_rows(file)), default=0)
        else:
            self.last = wandb_run.step - 1

    def log(self, row: Row) -> None:
        import wandb

        pictures = {name: wandb.Image(picture) for name, picture in row.pictures.items()}
        values = row.values | pictures | {"images_seen": row.images_seen}
        self.tracker.log(values, step=row.number, commit=True)


WANDB_BLOCK = 2**15


def wandb_rows(path: Path) -> Generator[Any]:
    """Yield the rows, with `step` and `item`, in a file of W&B, up to its end or where it was cut off. W&B, as of 0.31,
    has no function for it: the file is a log of LevelDB, after 7 bytes, whose entries are protocol buffers.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    data, at, entry = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := WANDB_BLOCK - at % WANDB_BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)  # kind: 1 whole, 2 first part, 3 another, 4 last
        part = data[at + 7 : at + 7 + length]
        if len(part) < length or kind not in (1, 2, 3, 4):
            return
        at, entry = at + 7 + length, part if kind in (1, 2) else entry + part
        if kind in (1, 4):
            record = messages.Record()
            record.ParseFromString(entry)
            if record.WhichOneof("record_type") == "history":
                yield record.history


class Trackio(RunTracker):
    """Writes what is logged half a second later: what it has is read in its database, if that is on this machine."""

    has: set[tuple[str, int]] | None = None

    def begin(self, run: Begun) -> Any:
        self.run_name = f"{run.name}-{self.kept['id'][:8]}"  # the name under which it finds the run again
        settings: dict[str, Any] = {"name": self.run_name, "resume": "allow", "embed": False, "config": run.settings}
        return accelerate.TrackioTracker(PROJECT, **settings)

    def started(self, run: Begun) -> None:
        from trackio import utils
        from trackio.sqlite_storage import SQLiteStorage  # as of 0.43, trackio.Api does not return what was logged

        storage = getattr(utils, "get_storage_mode", lambda: "sqlite")()  # on network drives it is another
        if storage == "sqlite" and not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys():
            rows = SQLiteStorage.get_logs(PROJECT, self.run_name)
            self.has = {(name, row["step"]) for row in rows for name in row}

    def missing(self, row: Row) -> Row | None:
        return super().missing(row) if self.has is None else without(row, self.has)

    def log(self, row: Row) -> None:
        import trackio

        pictures = {name: trackio.Image(picture) for name, picture in row.pictures.items()}
        self.tracker.tracker.log(row.values | pictures, step=row.images_seen)  # Accelerate 1.10 forgets the step


class MLflow(RunTracker):
    """States what it has. Pictures are artifacts, which are written again."""

    def begin(self, run: Begun) -> Any:
        return accelerate.MLflowTracker(PROJECT, run_id=self.kept.get("run_id"), run_name=run.name)

    def started(self, run: Begun) -> None:
        import mlflow

        run_id = self.tracker.tracker.info.run_id
        if "run_id" not in self.kept:
            self.kept["run_id"] = run_id
            self.tracker.store_init_configuration(run.settings)
        client = mlflow.MlflowClient()
        names = client.get_run(run_id).data.metrics
        self.has = {(name, metric.step) for name in names for metric in client.get_metric_history(run_id, name)}

    def missing(self, row: Row) -> Row | None:
        return without(row, self.has)

    def show(self, row: Row) -> None:
        import mlflow

        for name, picture in row.pictures.items():
            mlflow.log_image(picture, artifact_file=f"pictures/{row.images_seen:012d}/{name}.png")


def without(row: Row, has: set[tuple[str, int]]) -> Row | None:
    """Return what a tracker lacks of a row if it has these names at these numbers of images."""
    values = {name: value for name, value in row.values.items() if (name, row.images_seen) not in has}
    pictures = {name: picture for name, picture in row.pictures.items() if (name, row.images_seen) not in has}
    return Row(row.number, row.images_seen, values, pictures) if values or pictures else None


class Comet(RunTracker):
    """Keeps the key of an experiment that it is given."""

    def begin(self, run: Begun) -> Any:
        return accelerate.CometMLTracker(PROJECT, experiment_key=self.kept["id"])

    def started(self, run: Begun) -> None:
        self.tracker.tracker.set_name(run.name)
        self.tracker.store_init_configuration(run.settings)

    def show(self, row: Row) -> None:
        for name, picture in row.pictures.items():
            self.tracker.tracker.log_image(picture, name=name, step=row.images_seen)


class Aim(RunTracker):
    """A repository in output_dir."""

    def begin(self, run: Begun) -> Any:
        resumed = {"run_hash": self.kept["run_hash"], "force_resume": True} if "run_hash" in self.kept else {}
        return accelerate.AimTracker(run.name, run.output_dir, experiment=PROJECT, **resumed)

    def started(self, run: Begun) -> None:
        self.kept["run_hash"] = self.tracker.tracker.hash
        self.tracker.store_init_configuration(run.settings)

    def show(self, row: Row) -> None:
        self.tracker.log_images(dict(row.pictures), step=row.images_seen)


class ClearML(RunTracker):
    """Continues a task whose steps are not shifted, and takes nothing by itself from other libraries."""

    def begin(self, run: Begun) -> Any:
        resumed = {"continue_last_task": 0} if "task_id" in self.kept else {}
        return accelerate.ClearMLTracker(
            run.name,
            project_name=PROJECT,
            task_name=run.name,
            reuse_last_task_id=self.kept.get("task_id", False),
            auto_connect_frameworks=False,
            auto_connect_arg_parser=False,
            **resumed,
        )

    def started(self, run: Begun) -> None:
        if "task_id" not in self.kept:
            self.kept["task_id"] = self.tracker.tracker.id
            self.tracker.store_init_configuration(run.settings)

    def show(self, row: Row) -> None:
        arrays = {name: np.asarray(picture) for name, picture in row.pictures.items()}
        self.tracker.log_images(arrays, step=row.images_seen)


class SwanLab(RunTracker):
    """Keeps the id of a run that it is given."""

    def begin(self, run: Begun) -> Any:
        project: dict[str, Any] = {"id": self.kept["id"][:21], "name": run.name}
        return accelerate.SwanLabTracker(PROJECT, resume="allow", config=run.settings, **project)

    def show(self, row: Row) -> None:
        pictures = {name: [picture] for name, picture in row.pictures.items()}
        self.tracker.log_images(pictures, step=row.images_seen)


TRACKERS: dict[str, type[RunTracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
    "comet_ml": Comet,
    "aim": Aim,
    "clearml": ClearML,
    "swanlab": SwanLab,
}


class Trackers:
    """The trackers of a run that begins or continues, on its main process.

    They can be before or behind the checkpoint: they may have rows that come again, and may have lost rows when the run
    was killed. Those come again from metrics.jsonl, and the newest pictures from their files. trackers.json keeps the
    ids of their runs.

    Args:
        accelerator: holds the trackers that have not failed.
        output_dir: folder of the run, with its config.yaml.
        images_seen: where it continues.
        records: those of metrics.jsonl so far.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, images_seen: int, records: Sequence[Mapping[str, Any]]
    ):
        self.accelerator, self.path, self.running = accelerator, output_dir / "trackers.json", list[RunTracker]()
        self.records = len(records)
        if not (accelerator.log_with and accelerator.is_main_process):
            return
        self.kept: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        settings = read_settings(output_dir / "config.yaml")
        flat = {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
        run = Begun(output_dir, flat, images_seen, 2 * len(records))
        rows = list(self._rows(output_dir / "pictures", records))
        for name in map(str, accelerator.log_with):
            with leaving_out(accelerator, name), alone(f"starting {name}"):
                self._start(name, run, rows)

    def _rows(self, folder: Path, records: Sequence[Mapping[str, Any]]) -> Generator[Row]:
        for number, record in enumerate(records, 1):
            yield row_of(number, record)
            if record["kind"] == "evaluation" and self.kept.get("pictures") == record["images_seen"]:
                pictures = {path.stem: Image.open(path, formats=["PNG"]) for path in sorted(folder.glob("*.png"))}
                yield Row(2 * number + 1, record["images_seen"], pictures=pictures)

    def _start(self, name: str, run: Begun, rows: Iterable[Row]) -> None:
        kept = self.kept.setdefault(name, {"id": uuid.uuid4().hex})
        self._keep()  # first: a run that is killed now has begun in the tracker, perhaps
        running = TRACKERS[name](run, kept)
        running.tracker.start()
        running.started(run)
        self._keep()
        self.accelerator.trackers.append(running.tracker)
        self.running.append(running)
        for row in rows:
            if missing := running.missing(row):
                running.log(missing)

    def _keep(self) -> None:
        if self.kept.keys() - {"tensorboard"}:
            write_file(self.path, json.dumps(self.kept, indent=2) + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the next record of metrics.jsonl."""
        self.records += 1
        if self.running:
            self._log(row_of(self.records, record))

    def show(self, pictures: Mapping[str, Image.Image], images_seen: int) -> None:
        """Log pictures, whose files have been saved."""
        if self.running:
            self.kept["pictures"] = images_seen
            self._log(Row(2 * self.records + 1, images_seen, pictures=pictures))

    def _log(self, row: Row) -> None:
        for running in self.running:
            with leaving_out(self.accelerator, running.tracker.name):
                if running.tracker in self.accelerator.trackers and (missing := running.missing(row)):
                    running.log(missing)
                    running.kept["last"] = row.number
        if any(running.kept.get("last") == row.number for running in self.running):
            self._keep()


@contextmanager
def leaving_out(accelerator: Accelerator, name: str) -> Generator[None]:
    """Let a tracker that fails within, by whatever, log nothing from now on: it never ends a training."""
    try:
        yield
    except Exception as error:
        accelerator.trackers = [tracker for tracker in accelerator.trackers if tracker.name != name]
        logger.warning(
            "the tracker %s failed and logs nothing from now on: %s: %s. The training goes on, with all records in "
            "metrics.jsonl",
            name,
            type(error).__name__,
            error,
        )


def finish_trackers(accelerator: Accelerator) -> None:
    """Let all trackers write what they have and end."""
    for tracker in [*accelerator.trackers]:
        with leaving_out(accelerator, tracker.name):
            tracker.finish()
