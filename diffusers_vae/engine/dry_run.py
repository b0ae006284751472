"""Every phase of a run once, on two batches."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from ..processes import Interrupted, on_main
from .loop import find_task_run, run_task
from .step import RunResult, Task


def dry_run(task: Task) -> tuple[RunResult, bool, float | None] | None:
    """Every phase of the run of `task` once, on two batches, in a folder that is deleted again: training, a checkpoint,
    evaluation, pictures, saving, and the second batch again from the checkpoint.

    Returns, on the main process, the result, whether the resumed run gave the same weights bit by bit, and the
    seconds that all of the training would take, without evaluation.
    """
    PartialState(cpu=not torch.accelerator.is_available())
    run = task.config.run
    find_task_run(task)  # which refuses what the run would refuse
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(on_main(lambda: scratch)) / "run"
        try:
            trial = task.few(folder)
            trial.planned = run
            result = run_task(trial)  # what two batches need is read on demand
            newest = max((folder / "checkpoints").glob("images-*"))
            if result:
                before = _tensors_in(newest)
                (folder / "evaluation.json").unlink()
                shutil.rmtree(newest)
            on_main(lambda: None)  # barrier: nobody resumes before the checkpoint is deleted
            run_task(task.few(folder), finish=False)
        except Interrupted as interruption:
            raise Interrupted("the dry run was asked to stop; nothing was kept") from interruption
        if not result:
            return None
        after = _tensors_in(newest)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        total = run.total_images(result.train_images)
        return result, same, total / result.images_per_second if result.images_per_second else None


def _tensors_in(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (path.name, name): tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
