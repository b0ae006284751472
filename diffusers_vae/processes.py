"""Processes of a launch, or a single process: ranks, work done once for all, gathered values, signals."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.distributed as dist
from filelock import FileLock

from .silence import alone
from .storage import acquire

T = TypeVar("T")
P = TypeVar("P", bound=tuple[Any, ...])
logger = logging.getLogger(__name__)


def process_share() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: (0, 1) unless torch.distributed is running."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(value: T) -> list[T]:
    """Return the values of all processes in rank order, on every process. Values must be picklable."""
    processes = process_share()[1]
    if processes == 1:
        return [value]
    everyone: list[Any] = [None] * processes
    dist.all_gather_object(everyone, value)
    return everyone


def gather_parts(parts: list[P]) -> list[P]:
    """Return the parts (index, ...) of all processes, sorted by index, on every process, without padding or repetition:
    a sum over them does not depend on the number of processes.
    """
    return sorted((part for of_rank in gather(parts) for part in of_rank), key=lambda part: part[0])


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process. Return its result, or raise its error as converted by `sendable`, on all."""
    rank, processes = process_share()
    if processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            with alone():
                outcome = [work(), None]
        except Exception as error:
            failure, outcome = error, [None, sendable(error)]
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise failure or error
    return result


def sendable(error: Exception) -> Exception:
    """Return an error in a form that can be sent to other processes: FloatingPointError, OverflowError, ValueError and
    OSErrors unchanged, any other as a RuntimeError with its type and text.
    """
    if type(error) in (FloatingPointError, OverflowError, ValueError) or isinstance(error, OSError):
        return error
    return RuntimeError(f"process {process_share()[0]}: {type(error).__name__}: {error}")


NO_MEMORY = r"out of memory|can't allocate memory|could not create a primitive|CUDNN_STATUS_NOT_SUPPORTED|bad_alloc"
"""Error messages of torch, oneDNN and cuDNN when memory runs out."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on the CPU or another device."""
    said = isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error))
    return bool(said) or isinstance(error, MemoryError)


_FITTING: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
"""Largest number of images per forward that fits into memory, for models that once ran out of it."""


def in_parts(model: torch.nn.Module, function: Callable[..., T], *batches: Any) -> list[T]:
    """Return the results of `function`, which runs `model`, for consecutive parts of equally long `batches`. The whole
    batch is one part unless memory runs out: then parts are halved, down to one image. Later calls for the same model
    start with that size.
    """
    results: list[T] = []
    count, start = len(batches[0]), 0
    while start < count:
        size = min(_FITTING.get(model, count), count - start)
        try:
            results.append(function(*(batch[start : start + size] for batch in batches)))
            start += size
            continue
        except (MemoryError, RuntimeError) as error:
            if size < 2 or not out_of_memory(error):
                raise
        # outside of the except block, where the traceback no longer holds tensors
        smaller = _FITTING[model] = min(size // 2, _FITTING.get(model, size))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("not enough memory for a forward of %d images: continuing with %d", size, smaller)
    return results


def largest_part(model: torch.nn.Module, batch_size: int) -> int:
    """Return the images per forward of `model` for batches of `batch_size`, as `in_parts` found on any process."""
    return min(gather(min(_FITTING.get(model, batch_size), batch_size)))


@contextmanager
def one_first(first: bool, what: str) -> Generator[None]:
    """Run the body on the processes that are `first` while the others wait, then on the others."""
    if not first:
        gather(None)
    with alone(what):
        yield
    if first:
        gather(None)


@contextmanager
def only_user_of(folder: Path, doing: str, setting: str) -> Generator[None]:
    """Lock the folder in this context: no other launch can be `doing` something there. Raises as `storage.acquire`."""
    lock = FileLock(folder / ".lock")
    on_main(partial(acquire, lock, doing, setting))
    try:
        yield
    finally:
        lock.release()


def launched_alone() -> bool:
    """Return whether `accelerate launch` started this process alone. The launcher then adds its own traceback at any
    exit code except 0, and at SIGINT, when it does not wait for this process. (As in Accelerate 1.14.)
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ


class Interrupted(BaseException):
    """A signal stopped the run. Not an Exception, like KeyboardInterrupt, so that nothing handles it as an error."""


class Signals:
    """Handles SIGTERM, SIGINT and SIGUSR1, which clusters and spot machines send, and SIGHUP, which a closing terminal
    sends, inside a `with` block. The first signal is recorded if `wait` is set and raises Interrupted otherwise; the
    second ends the process at once.
    """

    def __init__(self):
        self.wait, self.reason = False, ""
        self.interrupted: Interrupted | None = None
        self.parent = os.getppid()
        command = ""
        with suppress(psutil.Error):
            command = " ".join(psutil.Process(self.parent).cmdline())
        # `accelerate launch` with one process exits without passing a signal on, and the run would go on without it
        self.launched = any(launcher in command for launcher in ("accelerate", "torchrun", "torch.distributed"))

    def __enter__(self) -> Signals:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            self.previous = {number: signal.signal(number, self._note) for number in self.numbers()}
        return self

    @staticmethod
    def numbers() -> list[int]:
        """Return the signals that this system has, without SIGHUP where `nohup` ignores it."""
        names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
        found = [getattr(signal, name) for name in names if hasattr(signal, name)]
        return [number for number in found if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.interrupted and isinstance(error, Exception):  # C code, as in an import, may replace the error
            raise self.interrupted from error

    def _note(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name
        for other in self.previous:
            signal.signal(other, signal.SIG_DFL)
        if not self.wait:
            self.interrupted = Interrupted(f"asked to stop ({self.reason}). The same command continues")
            raise self.interrupted
        said = f"\n{self.reason}: finishing the step and saving; a second signal stops at once\n"
        if launched_alone():
            said += "`accelerate launch` does not wait for this; `diffusers-vae train` does\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, said.encode())

    def asked(self) -> bool:
        """Return whether this process is to stop. `reason` then holds why."""
        if self.launched and os.getppid() != self.parent:
            self.reason = "the launcher has ended"
        return bool(self.reason)


class _Lossy:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # tqdm asks which handlers of logging write to the terminal
        return self.stream == getattr(other, "stream", other)

    def __hash__(self) -> int:
        return hash(self.stream)


@contextmanager
def lossy_output() -> Generator[None]:
    """Ignore failed writes to the terminal in this context: a full disk under a log must not end training."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Lossy(stream) for stream in before)  # None in a program without a console
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def ignore_signals(worker: int) -> None:
    """Ignore signals in a reading worker: a training process needs its images to finish the step."""
    for number in Signals.numbers():
        signal.signal(number, signal.SIG_IGN)
