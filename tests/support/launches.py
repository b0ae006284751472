"""Launches of one or several processes that skip the imports: forked from a server that has imported everything and
computed nothing, since a process that has computed must not be forked. The server itself is forked from pytest once
its tests are collected.
"""

import contextlib
import importlib
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

from .forks import fork

TESTS = Path(__file__).parents[1]
INTERRUPTED = 75


def fork_server() -> multiprocessing.context.ForkServerContext:
    """The way to start processes that share no memory with this one, as by spawn, without its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(TESTS)  # of the server alone
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def fork_the_server() -> None:
    """Fork the server off this process, which has imported what tests do and computed nothing, instead of starting an
    interpreter. It imports the rest when the first launch asks for it.
    """
    start = multiprocessing.util.spawnv_passfds

    def start_by_fork(path: str, arguments: Sequence[str], kept: Sequence[int]) -> int:
        if "forkserver" in arguments[-1]:
            return fork(partial(_serve, arguments[-1], kept), kept)
        return start(path, arguments, kept)

    with mock.patch("multiprocessing.util.spawnv_passfds", start_by_fork):
        fork_server()


def _serve(program: str, kept: Sequence[int]) -> None:
    importlib.reload(multiprocessing.forkserver)  # the parent holds a lock of it
    if kept[0] not in select.select(kept, [], [])[0]:  # the socket; pytest has ended without a launch
        raise EOFError
    exec(program, {})


class Launch:
    """`work`, a function that can be pickled, in each of `processes` as `accelerate launch` would start them, with gloo
    between them. What they print goes to the file `log`. Each has `threads` threads of torch. Of the `ranks` alone, if
    given; the others never start.
    """

    def __init__(
        self,
        work: Callable[[], object],
        log: Path,
        processes: int = 1,
        threads: int = 1,
        ranks: Sequence[int] | None = None,
    ):
        self.log = log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        context = fork_server()
        for rank in range(processes) if ranks is None else ranks:
            named = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            named = {name: str(value) for name, value in named.items()} if processes > 1 else {}
            process = context.Process(target=_enter, args=(work, log, environment | named, threads), daemon=False)
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether none of the processes has ended."""
        return all(process.is_alive() for process in self.processes)

    def send(self, number: int, order: Sequence[int] | None = None, pause: Callable[[], float] = float) -> None:
        """Send a signal to all processes, in the `order` of their ranks, with a `pause` after each."""
        for rank in order or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)
            time.sleep(pause())

    def wait(self, timeout: float = 120, grace: float = 20) -> list[int]:
        """Exit codes; negative for a signal. When one fails, the others are killed after `grace` seconds, as launchers
        do.

        Raises:
            TimeoutError: when none has failed after `timeout` seconds; all are killed.
        """
        end, failed, late = time.monotonic() + timeout, False, False
        while any(process.is_alive() for process in self.processes):
            if not failed and any(process.exitcode for process in self.processes):
                failed, end = True, time.monotonic() + grace
            if time.monotonic() > end:
                late = late or not failed
                self.send(signal.SIGKILL)
            for process in self.processes:
                process.join(0.01)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.close()
        if late:
            raise TimeoutError(self.output())
        return codes

    def output(self) -> str:
        """What the processes have printed so far."""
        return self.log.read_text() if self.log.exists() else ""


def run_forked(work: Callable[..., object], *arguments: object, log: Path, processes: int = 1, threads: int = 1) -> str:
    """What `work` prints in a launch that ends well."""
    launch = Launch(partial(work, *arguments), log, processes, threads)
    codes = launch.wait()
    assert not any(codes), (codes, launch.output())
    return launch.output()


def command(*arguments: object) -> None:
    """The command `diffusers-vae` as the work of a launch, whose processes end with its exit code."""
    from diffusers_vae import cli

    code = cli.main([str(argument) for argument in arguments])
    sys.stdout.flush()
    os._exit(code)


def without_output(kind: str, work: Callable[[], object]) -> None:
    """Do `work` where nothing can be printed: to a "full disk" or a "closed pipe"."""
    if kind == "full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    os.dup2(target, 1)
    os.dup2(target, 2)
    work()


def _enter(work: Callable[[], object], log: Path, environment: dict[str, str], threads: int) -> None:
    assert "support.preloaded" in sys.modules, "the server has imported nothing, so that each launch imports everything"
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()  # of the server: that of the test which started it
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # workers start as in any other launch, not from a server
    import torch

    from diffusers_vae.engine.loop import Interrupted

    torch.set_num_threads(threads)
    logging.basicConfig(level="INFO", format="%(message)s")
    code = 1
    try:
        work()
        code = 0
    except Interrupted as interruption:
        sys.stdout.write(f"{interruption}\n")
        code = INTERRUPTED
    except BaseException:
        logging.exception("rank %s", environment.get("RANK", 0))
    finally:
        sys.stdout.flush()
        os._exit(code)
