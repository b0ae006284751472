"""Commands on several processes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from ..silence import GROUP_TIMEOUT, Patience, report_progress, watched


@contextmanager
def launched(doing: str, patience: Patience, again: str) -> Generator[PartialState]:
    """Watch the processes that `accelerate launch` started while they work. An error names what was `doing`, and
    ends with the sentence `again`, which says what the same command does. A single process is not watched.
    """
    with watched(patience, again):
        report_progress(doing)
        yield PartialState(cpu=not torch.accelerator.is_available(), timeout=GROUP_TIMEOUT)
    leave_group()


def leave_group() -> None:
    """Without it, a process that ends before the others may abort, since the group's threads still run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
