"""Servers that are forked from pytest itself, since it has imported what they need."""

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence


def fork(serve: Callable[[], object], kept: Sequence[int]) -> int:
    """Fork this process, which must not have started threads of torch, and run `serve` in the child until it raises
    EOFError or SystemExit. The child keeps only the standard files and those with the numbers `kept`. Return its pid.
    """
    number = os.fork()
    if not number:
        code = 1
        try:
            _leave_parent(kept)
            serve()
        except (EOFError, KeyboardInterrupt, SystemExit):
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return number


def _leave_parent(kept: Sequence[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2 and number not in (null, *kept):
            os.dup2(null, number, inheritable=False)  # and not closed, since the object that has the number may do so
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)  # not captured
    logging.root.handlers.clear()
    gc.freeze()
    gc.enable()
