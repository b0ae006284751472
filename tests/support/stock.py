"""Run code in a process where diffusers_vae cannot be imported. This module imports nothing of it: on Linux the process
is forked from another that was forked from pytest before the package was imported.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from .forks import fork

PRELOADED = "AutoModel", "AutoPipelineForText2Image", "DiffusionPipeline", "StableDiffusionImg2ImgPipeline"
SERVERS: list[Connection] = []


def run_without_package(code: str, folder: Path) -> None:
    """Run `code` in `folder`, in a process of its own where stock diffusers is imported and diffusers_vae cannot be. It
    computes with one thread, as tests do, so that results are the same bit by bit.
    """
    if not SERVERS:
        program = f"import sys\nsys.modules['diffusers_vae'] = None\n{code}"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True)
        return
    SERVERS[0].send((code, folder))
    assert SERVERS[0].poll(300), "the program takes more than five minutes"
    error = SERVERS[0].recv()
    assert not error, error


def fork_the_server() -> None:
    """Fork a process that has imported diffusers and computed nothing: for as long as the tests run."""
    importlib.import_module("diffusers.models.autoencoders.vae")
    ours, theirs = multiprocessing.Pipe()
    fork(partial(_serve, theirs), [theirs.fileno()])
    theirs.close()
    SERVERS.append(ours)


def _serve(requests: Connection) -> None:
    assert not any(name.split(".")[0] == "diffusers_vae" for name in sys.modules)
    sys.modules["diffusers_vae"] = None
    request = requests.recv()  # nothing more is imported unless it is used
    import diffusers
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    for name in PRELOADED:
        getattr(diffusers, name)
    while True:
        requests.send(_run(*request))
        request = requests.recv()


def _run(code: str, folder: Path) -> str:
    """Fork, and run `code` in the child; its error, if there is one."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        error = ""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            import torch

            torch.set_num_threads(1)
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
