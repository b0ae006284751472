"""Trackers show every record and every picture once, of a run that was killed too: read back by their own libraries,
without a network.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import time
from functools import partial

import pytest
from support.launches import Launch, run_forked
from support.runs import TINY_VAE, at, fit, interrupted_at, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_vae.engine.config import RunConfig
from diffusers_vae.engine.dry_run import dry_run
from diffusers_vae.engine.trackers import wandb_rows
from diffusers_vae.evaluation.evaluate import EvaluationConfig
from diffusers_vae.storage import watch
from diffusers_vae.tasks.autoencoder import train

LOCAL = ["tensorboard", "wandb", "trackio", "mlflow"]
"""Trackers that need no server."""
INSTALLED = [name for name in LOCAL if importlib.util.find_spec(name)]


def needs(*names):
    missing = [name for name in names if name not in INSTALLED]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install -e '.[dev]'")


def work_offline(folder, flush_seconds):
    """Let trackers work in `folder`, without a network."""
    os.environ |= {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": str(flush_seconds),
        "WANDB__DISABLE_STATS": "true", "WANDB__DISABLE_META": "true", "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip


def measured(output_dir, trackers):
    """Settings of 10 steps, with checkpoints after 90, 180 and 270 images, measured after 240 and at the end."""
    config = tiny(output_dir, TINY_VAE, checkpoint_every=90, keep_checkpoints=9, tracker=trackers)
    return dataclasses.replace(config, evaluation=EvaluationConfig(every=240, max_images=16))


def train_until(record, config, folder, wait=0.0):
    """Train; end as by `kill -9` before that record is written to metrics.jsonl, `wait` seconds after the last one,
    time for trackers to write what they hold.
    """
    work_offline(folder, wait / 3)
    written = 0

    def kill(operation, path, _):
        nonlocal written
        if operation == "write" and path.name == "metrics.jsonl":
            written += 1
            if written == record:
                time.sleep(wait)
                os.kill(os.getpid(), signal.SIGKILL)

    watch(kill)
    train(config)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run, in run/, that was killed twice and continued: at 270 images, where the checkpoint was that
    at 180 and all trackers had what came after it, and at 300, where some had not yet written what came before that at
    270.
    """
    folder = tmp_path_factory.mktemp("killed")
    config = measured(folder / "run", tuple(INSTALLED))
    for record, wait in ((5, 1.5), (3, 0)):
        launch = Launch(partial(train_until, record, config, folder, wait), folder / "log")
        assert launch.wait() == [-signal.SIGKILL], launch.output()
    run_forked(train_until, None, config, folder, log=folder / "log")
    assert "failed" not in (folder / "log").read_text()
    return folder


def expected(output_dir):
    """What trackers have to show of metrics.jsonl: [images_seen, value] of each metric."""
    found = {}
    for record in map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines()):
        for name, value in record.items():
            if name not in ("kind", "images_seen") and value is not None:
                found.setdefault(f"{record['kind']}/{name}", []).append([record["images_seen"], value])
    return found


def read(name, folder):
    """Write what the only run of a tracker in `folder` has: metrics, as `expected` gives them, and images_seen of each
    picture.
    """
    work_offline(folder, 0)
    (folder / f"{name}.json").write_text(json.dumps(READERS[name](folder)))


def read_tensorboard(folder):
    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    metrics = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return metrics, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def read_wandb(folder):
    files = sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "one run, by its id"
    metrics, pictures, steps = {}, {}, []
    for row in (row for file in files for row in wandb_rows(file)):
        steps.append(row.step.num)
        values = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in row.item}
        images_seen = values.pop(("images_seen",))
        for (name, *inner), value in values.items():
            if inner == ["path"]:
                assert any((folder / "run" / "wandb").glob(f"*/files/{value}"))
                pictures.setdefault(name, []).append(images_seen)
            elif not inner and not name.startswith("_"):
                metrics.setdefault(name, []).append([images_seen, value])
    assert steps == sorted(set(steps)), "W&B drops what does not rise"
    return metrics, pictures


def read_trackio(folder):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("diffusers-vae")
    metrics, pictures = {}, {}
    for row in SQLiteStorage.get_logs("diffusers-vae", run.name):
        for name, value in row.items():
            if isinstance(value, dict):
                assert (folder / "trackio" / "media" / value["file_path"]).is_file()
                pictures.setdefault(name, []).append(row["step"])
            elif name not in ("step", "timestamp"):
                metrics.setdefault(name, []).append([row["step"], value])
    return metrics, pictures


def read_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("diffusers-vae")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["run.batch_size"] == "30"
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    pictures = {}
    for at_images in client.list_artifacts(run.info.run_id, "pictures"):
        for file in client.list_artifacts(run.info.run_id, at_images.path):
            _, images_seen, name = file.path.split("/")
            pictures.setdefault(name.removesuffix(".png"), []).append(int(images_seen))
    return {name: [[point.step, point.value] for point in points] for name, points in history.items()}, pictures


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in LOCAL])
def test_run_that_was_killed_shows_every_record_and_picture_once(name, killed):
    run_forked(read, name, killed, log=killed / "log")
    metrics, pictures = json.loads((killed / f"{name}.json").read_text())
    wanted = expected(killed / "run")
    assert [images_seen for images_seen, _ in wanted["train/loss"]] == [90, 180, 270, 300]
    assert metrics.keys() == wanted.keys()
    for metric, points in wanted.items():
        for point, right in zip(sorted(metrics[metric]), points, strict=True):
            assert point == pytest.approx(right, rel=1e-6), metric
    drawn = {path.stem: [240, 300] for path in (killed / "run" / "pictures").glob("*.png")}
    assert {picture: sorted(images_seen) for picture, images_seen in pictures.items()} == drawn
    assert "reconstructions" in drawn


@pytest.mark.slow
def test_tracker_that_is_added_later_shows_the_records_before(tmp_path):
    config = tiny(tmp_path / "run", max_images=300, checkpoint_every=150, keep_checkpoints=9)
    fit(config)
    interrupted_at(150, tmp_path / "run", tmp_path / "again")
    fit(at(config, tmp_path / "again", tracker=["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "again" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [90, 180, 270, 300]


def test_missing_package_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    message = "run.tracker must name installed trackers, got comet_ml: run `pip install comet-ml`, or set"
    with pytest.raises(ValueError, match=message):
        fit(tiny(tmp_path / "run", tracker="comet_ml"))
    with pytest.raises(ValueError, match=message):
        dry_run(RunConfig(tracker="comet_ml"), find=lambda: None, train=lambda folder, finish: None)
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_an_error():
    with pytest.raises(ValueError, match=r"run\.tracker must be among tensorboard, .*, a list of them or null, got tb"):
        RunConfig(tracker=["tensorboard", "tb"])


def test_list_of_one_tracker_and_its_name_are_the_same():
    assert RunConfig(tracker=["wandb"]) == RunConfig(tracker="wandb")
    assert RunConfig(tracker=[]) == RunConfig(tracker=None)
    assert RunConfig(tracker=["wandb", "mlflow", "wandb"]).trackers == ["wandb", "mlflow"]
