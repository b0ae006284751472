"""The command line `diffusers-vae`. It imports torch only for commands that need it."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from ..messages import log_to_terminal, message, showable

COMMANDS = {
    "train": "train a KL autoencoder, or continue a run",
    "train-text-to-image": "train a text-to-image model on an autoencoder's latents",
    "data": "inspect a data set before training: sizes, damaged files, duplicates, a command to start with",
    "presets": "list the presets with purpose, hardware and expected figures, or print one",
    "evaluate": "measure an autoencoder: figures, health of the posterior, pictures and a report",
    "compare": "compare two autoencoders image by image",
    "fp16": "check whether an autoencoder can run in float16",
    "reconstruct": "encode and decode image files",
    "sample": "decode samples from the prior",
    "demo": "try autoencoders on your own images in the browser",
    "encode": "precompute the latents of a data set",
    "push": "publish a run on the Hugging Face Hub",
    "info": "describe a model or a run",
}
MODULES = {
    "train": "training",
    "train-text-to-image": "training",
    "compare": "evaluate",
    "fp16": "evaluate",
    "reconstruct": "images",
    "sample": "images",
    "push": "publish",
}
"""Modules of commands whose module is not named after them."""
HELP = f"""usage: diffusers-vae COMMAND ... [--debug]

Train, measure and publish KL autoencoders that load in stock diffusers.

{chr(10).join(f"  {name:<20} {text}" for name, text in COMMANDS.items())}

  diffusers-vae COMMAND --help    show the arguments of a command, with an example
  --debug                         show the traceback of an error
  --version                       show the version

example: diffusers-vae evaluate runs/digits

Exit codes: 0 success, 1 error, 2 wrong arguments, 75 training interrupted (repeat the command to continue).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, by default `sys.argv[1:]`, and return its exit code."""
    code = 0
    try:
        code = _main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        raise
    finally:
        if code in (1, 2) and "ACCELERATE_MIXED_PRECISION" in os.environ:
            _explain_launcher()
    return code


def _main(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show must not raise
            with suppress(OSError):  # an unwritable log must not end a training
                stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug, training = "--debug" in arguments, any(argument.startswith("train") for argument in arguments[:1])
    arguments = [_at_home(argument) for argument in arguments if argument != "--debug"]
    try:
        try:
            code = _run(arguments, debug)
        except SystemExit:  # raised by `train --help`, for example
            sys.stdout.flush()
            raise
        if training:  # it succeeded, even if its output cannot be written
            _drop_output()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _drop_output()
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        return 128 + signal.SIGINT
    except Exception as error:
        expected = isinstance(error, (ArithmeticError, ImportError, OSError, ValueError))
        if not (expected or debug) and _out_of_memory(error):
            text = " ".join(str(error).split())
            print(f"error: there is not enough memory ({text[:300]}): {LESS_MEMORY}", file=sys.stderr)
            return 1
        if debug or (not expected and training):  # the traceback matters, since the error may take days to recur
            raise
        kind = "" if expected else f"{type(error).__name__}: "
        text = str(error) if expected else " ".join(str(error).split())
        print(message(f"error: {kind}{text}{'' if expected else ' (--debug shows the traceback)'}"), file=sys.stderr)
        return 1


def _explain_launcher() -> None:
    """Explain the traceback that `accelerate launch` of a single process prints after any error."""
    from ..processes import launched_alone

    if launched_alone():
        text = "(`accelerate launch` adds the traceback below; `diffusers-vae train` ends without one)"
        print(text, file=sys.stderr, flush=True)


def _at_home(argument: str) -> str:
    """Return the argument with a leading ~ replaced by the home directory. Bash does not replace it in --out=~/x."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + os.path.expanduser(value)


def _drop_output() -> None:
    """Discard output that cannot be written. Otherwise Python retries at exit and returns code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


LESS_MEMORY = (
    "use a smaller batch, smaller images or a smaller model; in training, raise run.gradient_accumulation_steps"
)


def _out_of_memory(error: Exception) -> bool:
    try:
        from ..processes import out_of_memory
    except ImportError:
        return isinstance(error, MemoryError)
    return out_of_memory(error)


def _import(name: str) -> ModuleType:
    """Import the module `name` of this package without garbage collection. Imports create a million objects that are
    never freed, and searching them for garbage takes a fifth of the time.
    """
    first = gc.isenabled() and f"{__name__}.{name}" not in sys.modules
    if first:
        gc.disable()
    try:
        return import_module(f".{name}", __name__)
    finally:
        if first:
            gc.freeze()
            gc.enable()
            atexit.register(_unfreeze)


def _unfreeze() -> None:
    """Let Python free Triton at exit, where Triton 3.9 (nanobind) would otherwise print all its objects as leaked. With
    older versions, this would only take a second.
    """
    version: str = getattr(sys.modules.get("triton"), "__version__", "0")
    if tuple(map(int, version.split(".")[:2])) >= (3, 9):
        gc.unfreeze()


def _run(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(version("diffusers-vae"))
        return 0
    if arguments[0] not in COMMANDS:
        print(
            f"error: {showable(arguments[0])} is not a command; the commands are {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    log_to_terminal(logging.INFO if arguments[0].startswith("train") else logging.WARNING)
    try:
        commands = _import(MODULES.get(arguments[0], arguments[0]))
    except ModuleNotFoundError as error:
        if debug or str(error.name).startswith("diffusers_vae"):
            raise
        raise ImportError(
            f"diffusers-vae {arguments[0]} needs {error.name}, which is not installed: "
            f'pip install "diffusers-vae[{"demo" if arguments[0] == "demo" else "train"}]"'
        ) from error
    return getattr(commands, f"run_{arguments[0].replace('-', '_')}")(arguments[1:])
