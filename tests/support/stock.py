"""Programs that run where diffusers_vae cannot be imported. This module imports nothing of it or of torch, since the
process that programs are forked from imports it.
"""

import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

PRELOADED = "AutoModel", "AutoPipelineForText2Image", "DiffusionPipeline", "StableDiffusionImg2ImgPipeline"


def run_without_package(code: str, folder: Path) -> None:
    """Run `code` in `folder`, in a process of its own where stock diffusers is imported and diffusers_vae cannot be. It
    computes with one thread, as tests do, so that results are the same bit by bit.
    """
    error = _server().submit(_run, code, folder).result()
    assert not error, error


@cache
def _server() -> ProcessPoolExecutor:
    """A process that has imported diffusers and computed nothing: for as long as the tests run."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)


def _start() -> None:
    sys.modules["diffusers_vae"] = None
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import diffusers

    for name in PRELOADED:
        getattr(diffusers, name)


def _run(code: str, folder: Path) -> str:
    """Fork, and run `code` in the child; its error, if there is one."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        error = ""
        try:
            os.chdir(folder)
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
        os.write(writing, error.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        error = file.read()
    status = os.waitpid(child, 0)[1]
    return error or (f"exit status {status}" if status else "")
