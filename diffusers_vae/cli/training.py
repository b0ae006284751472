"""`train` and `train-text-to-image`: start or continue a run, or a dry run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from ..engine.step import RunResult
from ..hub.config import HubConfig
from ..hub.push import check_can_push, push
from ..messages import message, showable
from ..processes import Interrupted, lossy_output
from ..reports.tables import report_table
from ..tasks.autoencoder import TrainResult
from .chosen import choose
from .launched import leave_group
from .parser import TRAININGS, Training, parse_settings

RESUME_ME = 75  # EX_TEMPFAIL in sysexits.h: "the user is invited to try again later"


@lossy_output()
def run_train(arguments: Sequence[str]) -> int:
    """Train an autoencoder. `training/train_vae.py` calls this function."""
    return _run_training(TRAININGS["train"], arguments)


@lossy_output()
def run_train_text_to_image(arguments: Sequence[str]) -> int:
    """Train a text-to-image model. `training/train_text_to_image.py` calls this function."""
    written_out = {"--vae": "--vae.source", "--latents": "--latents.folder"}
    names = [argument.partition("=") for argument in arguments]
    return _run_training(
        TRAININGS["train-text-to-image"],
        [f"{written_out.get(name, name)}{equals}{value}" for name, equals, value in names],
    )


def _run_training(training: Training, arguments: Sequence[str]) -> int:
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    first = os.environ.get("RANK", "0") == "0"
    chosen, stated = choose(training, arguments)
    if first and stated:
        print(stated, flush=True)
    config, dry = parse_settings(training, arguments, chosen)
    hub = getattr(config, "hub", HubConfig())
    if hub.push and first:
        check_can_push(hub)  # fail before training, not after days of it
    try:
        if dry:
            _describe_dry_run(training.dry_run(config))
        elif result := training.train(config):  # None on other processes
            _describe(result)
            if hub.push:
                print(showable(f"published   {push(result.output_dir, hub)}"))
    except Interrupted as interruption:
        if first:
            print(message(interruption), file=sys.stderr)
        leave_group()
        return RESUME_ME
    leave_group()
    return 0


def _describe_dry_run(outcome: tuple[RunResult, bool, float | None] | None) -> None:
    if outcome is None:
        return
    result, same, seconds = outcome
    _describe_size(result, ", evaluation included")
    print(f"resumed from a checkpoint: {'bit-identical' if same else 'NOT bit-identical, see run.deterministic'}")
    if seconds is not None:
        speed = f"{result.images_per_second:,.0f} images/s, which later steps exceed"
        print(f"at the speed of the second step ({speed}), training would take {seconds / 60:,.1f} min")
    print("dry run: every phase ran, nothing was kept")


def _describe_size(result: RunResult, phases: str = "") -> None:
    memory = "" if result.memory is None else f", at most {result.memory / 2**20:,.0f} MiB of memory{phases}"
    print(f"\n{result.parameters:,} parameters, latents {'x'.join(map(str, result.latent_shape))}{memory}")


def _describe(result: RunResult) -> None:
    _describe_size(result)
    if isinstance(result, TrainResult):
        print(report_table(asdict(replace(result.report, per_image=None))))
        print(showable(f"report      {result.output_dir / 'report.html'}"))
    if (error := getattr(result, "heldout_error", None)) is not None:
        print(f"held-out squared error of the prediction {error:.4f}")
    print(showable(f"pictures    {result.output_dir / 'pictures'}"))
    print(showable(f"evaluation  {result.output_dir / 'evaluation.json'}"))
    print(showable(f"{result.saved:<12}{result.output_dir / result.saved}"))
    print(showable(f"load it     {result.load_line}"))
