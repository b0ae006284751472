"""Detection of silent processes and reading workers: a warning after a minute, an error after five.

A process is silent if it is stopped, if its machine is unreachable, or if it works alone without reporting progress,
using CPU time, reading or writing. Slow work is not silence.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from .messages import message

T = TypeVar("T")
logger = logging.getLogger(__name__)

GROUP_TIMEOUT = timedelta(days=1)
"""Timeout of a process group. It is long because `watched` limits how long processes wait for each other."""
CONTINUES = "The same command continues from the newest checkpoint"


@dataclass(frozen=True)
class Patience:
    """Seconds of silence before a warning names the process or worker, and before the run ends with an error."""

    warning: float = 60.0
    end: float = 300.0

    @property
    def tick(self) -> float:
        """Seconds between two checks."""
        return min(1.0, self.warning / 4)


PATIENCE = Patience()


@dataclass
class _Doing:
    """What this process does, whether it works without waiting for others, and how often it reported progress."""

    what: str = "its start"
    alone: bool = False
    marks: int = 0


_doing = _Doing()


def report_progress(what: str | None = None) -> None:
    """Report that this process makes progress, and that it does `what` from now on."""
    _doing.marks += 1
    if what is not None:
        _doing.what = what


@contextmanager
def alone(what: str | None = None) -> Generator[None]:
    """Report that this process waits for no other in this context, so that silence is its own fault."""
    before = _doing.what, _doing.alone
    report_progress(what)
    _doing.alone = True
    try:
        yield
    finally:
        _doing.what, _doing.alone = before
        report_progress()


class _Clock:
    """Seconds since the last check, at most two ticks: if a scheduler stops all processes, none of them is silent."""

    def __init__(self, tick: float):
        self.tick, self.at = tick, time.monotonic()

    def seconds(self) -> float:
        now = time.monotonic()
        elapsed, self.at = now - self.at, now
        return min(elapsed, 2 * self.tick)


class _Activity:
    """Whether processes work: use more than 2 % of a core, or read and write more than 8 KiB per second."""

    def __init__(self, processes: Callable[[], list[psutil.Process]]):
        self.processes, self.level = processes, 0.0
        self.before = self._used()

    def seen(self, seconds: float) -> bool:
        """Return whether there was work in the `seconds` since the last call."""
        used = self._used()
        self.level = max(0.0, self.level + max(0.0, used - self.before) - seconds)
        self.before = used
        worked = self.level > 1
        if worked:
            self.level = 0.0
        return worked

    def _used(self) -> float:
        """Return the work so far, in seconds of the least activity that counts as work."""
        used = -time.thread_time() / 0.02  # exclude the check itself, if this process runs it
        for process in self.processes():
            try:
                cpu = process.cpu_times()
                used += (cpu.user + cpu.system) / 0.02
                if hasattr(process, "io_counters"):  # not on macOS
                    io = process.io_counters()
                    # not read_chars, which inspecting processes increases
                    used += (io.read_bytes + getattr(io, "write_chars", io.write_bytes)) / 8192
            except psutil.Error:  # it has ended
                continue
        return used


class _OwnWork:
    """Whether this process makes progress: it reports progress, it works, or a child process works."""

    def __init__(self, patience: Patience):
        self.patience, self.marks = patience, _doing.marks
        self.this_process = _Activity(lambda: [psutil.Process()])
        self.children: _Activity | None = None
        self.quiet = 0.0

    def look(self, seconds: float) -> float:
        """Return the number of seconds without progress. The last check was `seconds` ago."""
        worked = self.this_process.seen(seconds) or self.marks != _doing.marks
        self.marks = _doing.marks
        if self.quiet < self.patience.warning / 2:  # listing children is slow where there are many processes
            self.children = None
        elif self.children is None:
            self.children = _Activity(lambda: psutil.Process().children(recursive=True))
        else:
            worked = worked or self.children.seen(seconds)
        self.quiet = 0.0 if worked else self.quiet + seconds
        return self.quiet


@dataclass(frozen=True)
class Meeting:
    """Processes of a launch, and the store through which they communicate."""

    store: dist.Store
    rank: int
    processes: int
    address: str


def meet(patience: Patience, again: str = CONTINUES) -> Meeting | None:
    """Wait until all processes of the launch have started. Return None if there is only one.

    Raises:
        TimeoutError: Naming the processes that did not start.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        return None
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _connect(rank, patience, again)
    store.set(str(rank), json.dumps(vars(_Beat(0, 0.0, _doing.what))))
    clock, waited, warned, pause = _Clock(patience.tick), 0.0, False, 0.001
    everyone = [str(process) for process in range(processes)]
    try:
        while not store.check(everyone):
            time.sleep(pause)
            pause = min(2 * pause, 0.05, patience.tick)
            waited += clock.seconds()
            if waited > patience.end or (waited > patience.warning and not warned):
                missing = [process for process in everyone if not store.check([process])]
                text = f"{processes - len(missing)} of {processes} processes have started within {waited:.0f} s"
                text += f", missing: process {', '.join(missing[:8])}{', ...' * (len(missing) > 8)}"
                if waited > patience.end:
                    raise TimeoutError(f"only {text}. Find out why it did not start. {again}")
                logger.warning("waiting: %s", text)
                warned = True
    except dist.DistError as error:
        raise ConnectionError(f"process 0, at {address}, has ended before all had started") from error
    return Meeting(store, rank, processes, address)


def _connect(rank: int, patience: Patience, again: str) -> dist.Store:
    """Return the store of the launch, which the launcher or process 0 holds."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    began, warned = time.monotonic(), False
    while True:
        try:
            if rank:  # no signal interrupts a store that waits for its master
                socket.create_connection((host, port), timeout=1).close()
            # a second master at a port of this process, or of its launcher, joins the first
            store = dist.TCPStore(
                host, port, None, rank == 0, timedelta(seconds=5), wait_for_workers=False, multi_tenant=True
            )
            store.set_timeout(timedelta(seconds=patience.warning))
            return dist.PrefixStore(f"diffusers_vae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        except (OSError, dist.DistError) as error:
            if rank == 0:
                raise
            waited = time.monotonic() - began
            if waited > patience.end:
                raise TimeoutError(
                    f"process 0 must answer at {host}:{port} within {patience.end:.0f} s, and process {rank} "
                    f"waited without an answer. Find out why it did not start. {again}"
                ) from error
            if waited > patience.warning and not warned:
                logger.warning("process %d waits for process 0, which does not answer at %s:%d", rank, host, port)
                warned = True
            time.sleep(min(0.05, patience.tick))


@dataclass(frozen=True)
class _Beat:
    """What a process reports to the others every tick."""

    number: int
    quiet: float  # seconds without progress
    what: str
    left: bool = False  # whether it has finished
    ends: bool = False  # whether all processes must end because of an error


@contextmanager
def watched(patience: Patience, again: str = CONTINUES) -> Generator[None]:
    """Wait until all processes of the launch have started. Then end this process, with an error that names the culprit,
    if one of them falls silent in this context.

    No exception reaches a thread that waits in a collective, so the process exits at once with status 1. Durable files
    are complete on the disk at any time.

    Args:
        again: Sentence that describes what the same command does afterwards.

    Raises:
        TimeoutError: Naming the processes that did not start.
    """
    if (meeting := meet(patience, again)) is None:
        yield
        return
    watch = _Watch(meeting, patience, again)
    threads = [threading.Thread(target=work, daemon=True) for work in (watch.talk, watch.judge)]
    for thread in threads:
        thread.start()
    try:
        yield
        watch.left = True
    finally:
        watch.done.set()
        for thread in threads:  # a thread that is alive while Python exits may abort the process
            thread.join(5)


@dataclass
class _Watch:
    """Two threads, because the one that talks to the store hangs if the store is stopped."""

    meeting: Meeting
    patience: Patience
    again: str
    done: threading.Event = field(default_factory=threading.Event)
    beats: dict[int, _Beat] = field(default_factory=dict)  # the last one of each watched process
    exchanges: int = 0
    quiet: float = 0.0
    left: bool = False
    ends: bool = False

    def __post_init__(self):
        # the main process watches all and the others watch it, which keeps the store's load low
        self.others = list(range(1, self.meeting.processes)) if self.meeting.rank == 0 else [0]

    def talk(self) -> None:
        store, done = self.meeting.store, False
        while not done:
            done = self.done.wait(self.patience.tick)
            beat = _Beat(self.exchanges, self.quiet, _doing.what, self.left, self.ends)
            try:
                store.set(str(self.meeting.rank), json.dumps(vars(beat)))
                found = store.multi_get([str(process) for process in self.others])
            except dist.DistError:  # the others hear nothing and report it
                continue
            self.beats = {process: _Beat(**json.loads(text)) for process, text in zip(self.others, found, strict=True)}
            self.exchanges += 1

    def judge(self) -> None:
        patience, clock, work = self.patience, _Clock(self.patience.tick), _OwnWork(self.patience)
        exchanges, unheard, warned, numbers = -1, 0.0, set[Any](), dict[int, int]()
        silent = dict.fromkeys(self.others, 0.0)
        while not self.done.wait(patience.tick):
            seconds = clock.seconds()
            self.quiet = work.look(seconds)
            unheard += seconds
            if exchanges != self.exchanges:
                for process, beat in self.beats.items():
                    if beat.ends:
                        self._end()
                    heard = beat.left or beat.number != numbers.get(process)
                    silent[process] = 0.0 if heard else silent[process] + unheard
                    numbers[process] = beat.number
                exchanges, unheard = self.exchanges, 0.0
            for key, lasted, text in self._silences(silent, unheard):
                if lasted >= patience.end:
                    self._end(text)
                if lasted < patience.warning:
                    warned.discard(key)
                elif key not in warned:
                    logger.warning("%s; the run ends with an error after %.0f s", text, patience.end)
                    warned.add(key)

    def _silences(self, silent: dict[int, float], unheard: float) -> Iterator[tuple[Any, float, str]]:
        """Yield (key, seconds of silence, description) for everything that can be silent."""
        rank, beats = self.meeting.rank, self.beats
        for process, seconds in silent.items():
            what = beats[process].what if process in beats else "its start"
            yield process, seconds, f"process {process} has not been heard from for {seconds:.0f} s, last in {what}"
        who = "the launcher" if rank == 0 else f"process 0, last in {beats[0].what if beats else 'its start'},"
        text = f"has not been heard from for {unheard:.0f} s, nor has the store at {self.meeting.address}"
        yield "store", unheard, f"{who} {text}"
        if _doing.alone:
            yield "alone", self.quiet, f"process {rank} has made no progress for {self.quiet:.0f} s in {_doing.what}"
        elif rank == 0 and len(beats) == len(self.others):
            quiet = min(self.quiet, *(beat.quiet for beat in beats.values()))
            doing = {0: _doing.what} | {process: beat.what for process, beat in beats.items()}
            parts = "; ".join(f"process {process} in {what}" for process, what in doing.items())
            yield "all", quiet, f"no process has made progress for {quiet:.0f} s: {parts}"

    def _end(self, text: str | None = None) -> None:
        """End this process, after giving the others time to notice, so that they do not report a lost connection."""
        if text:
            _say_error(f"{text}. {self.again}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide this process's lost connections
        self.ends = True
        time.sleep(6 * self.patience.tick)
        os._exit(1)


def _say_error(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; the process ends anyway
        os.write(2, f"\n{message(f'error: {text}')}\n".encode())  # the main thread may hold sys.stderr


class WorkerWatch:
    """Watches, in a thread, the reading worker that the main thread waits for. If it is silent, all `workers` are
    killed, which ends the wait. `describe` formats a batch for messages.
    """

    def __init__(self, workers: Sequence[BaseProcess], describe: Callable[[Any], str], patience: Patience):
        self.workers, self.describe, self.patience = workers, describe, patience
        self.waiting: tuple[int, Any] | None = None
        self.verdict = ""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def wait(self, worker: int, batch: Any, take: Callable[[], T]) -> T:
        """Return the result of `take`, which waits for `worker` to read the batch; TimeoutError if it was silent."""
        self.waiting = worker, batch
        try:
            return take()
        except Exception as error:
            if self.verdict:
                raise TimeoutError(self.verdict) from error
            raise
        finally:
            self.waiting = None

    def close(self) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        clock, waiting, activity = _Clock(self.patience.tick), None, None
        waited, silent, warned = 0.0, 0.0, False
        while not self.done.wait(self.patience.tick):
            seconds = clock.seconds()
            if waiting is not self.waiting:
                waiting, waited, silent, warned = self.waiting, 0.0, 0.0, False
                activity = _Activity(partial(self._process, waiting[0])) if waiting else None
            elif waiting and activity:
                report_progress()  # the worker is watched, and this process only waits
                waited += seconds
                silent = 0.0 if activity.seen(seconds) else silent + seconds
                if waited >= self.patience.warning and not warned:
                    logger.warning("reading is slow: %.0f s so far for %s", waited, self._words(*waiting))
                    warned = True
                if silent >= self.patience.end:
                    self._end(f"reading made no progress for {silent:.0f} s: {self._words(*waiting)}")

    def _process(self, worker: int) -> list[psutil.Process]:
        with suppress(psutil.Error):  # it has ended, and torch reports it
            return [psutil.Process(self.workers[worker].pid)]
        return []

    def _words(self, worker: int, batch: Any) -> str:
        status = "".join(process.status() for process in self._process(worker))
        who = f"worker {worker} of {len(self.workers)} (process {self.workers[worker].pid}, {status})"
        return f"{self.describe(batch)} in {_doing.what}, by {who}"

    def _end(self, text: str) -> None:
        self.verdict = f"{text}. Check that these files can be read. {CONTINUES}"
        for worker in self.workers:  # others may be stopped too, and Python waits for them at exit
            worker.kill()
        if not self.done.wait(10):  # the system cannot end it, and Python could not exit before it
            _say_error(self.verdict)
            os._exit(1)
