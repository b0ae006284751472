"""Run commands on several processes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from ..silence import GROUP_TIMEOUT, Patience, report_progress, watched


@contextmanager
def launched(doing: str, patience: Patience, again: str) -> Generator[PartialState]:
    """Watch the processes that `accelerate launch` started until the block ends. An error names the activity, `doing`,
    and ends with `again`, a sentence on what repeating the command does. A single process is not watched.
    """
    with watched(patience, again):
        report_progress(doing)
        yield PartialState(cpu=not torch.accelerator.is_available(), timeout=GROUP_TIMEOUT)
    leave_group()


def leave_group() -> None:
    """Destroy the process group. Otherwise a process that ends first may abort, since the group's threads still run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
