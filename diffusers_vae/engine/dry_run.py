"""Dry runs: every phase of a run once, on two batches."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from ..processes import Interrupted, on_main
from .config import RunConfig
from .step import RunResult
from .trackers import check_installed


def dry_run(
    run: RunConfig, find: Callable[[], object], train: Callable[[Path, bool], RunResult | None]
) -> tuple[RunResult, bool, float | None] | None:
    """Go through every phase of a run on two batches in a temporary folder: training, a checkpoint, evaluation,
    pictures, saving, and the second batch again from the checkpoint.

    Args:
        run: settings of the whole run.
        find: looks for the run in its folder, like `folder.find_run`, and raises the same errors.
        train: trains on two batches in a folder, with a checkpoint after each, and returns the result on the main
            process; if the second argument is False, up to the last checkpoint.

    Returns on the main process: the result, whether the resumed run gave bit-identical weights, and an estimate of
    the training time in seconds, without evaluation.
    """
    check_installed(run.trackers)
    PartialState(cpu=not torch.accelerator.is_available())
    find()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(on_main(lambda: scratch)) / "run"
        try:
            result = train(folder, True)
            newest = max((folder / "checkpoints").glob("images-*"))
            before = _tensors_in(newest) if result else {}
            if result:
                (folder / "evaluation.json").unlink()
                shutil.rmtree(newest)
            on_main(lambda: None)  # barrier: nobody resumes before the checkpoint is deleted
            train(folder, False)
        except Interrupted as interruption:
            raise Interrupted("the dry run was asked to stop; nothing was kept") from interruption
        if not result:
            return None
        after = _tensors_in(newest)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert result.train_images is not None
        total = run.total_images(result.train_images)
        return result, same, total / result.images_per_second if result.images_per_second else None


def _tensors_in(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (path.name, name): tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
