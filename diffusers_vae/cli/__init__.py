"""The command line `diffusers-vae`, which needs no torch until a command does."""

from __future__ import annotations

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
    "data": "look at a data set before a training: sizes, damage, duplicates, what to begin with",
    "presets": "list the settings that ship with the package, with purpose, hardware and figures",
    "evaluate": "measure an autoencoder: figures, posterior health, pictures, a report to send",
    "compare": "measure two autoencoders on the same images, in pairs",
    "fp16": "say whether an autoencoder can run in float16",
    "reconstruct": "encode and decode image files",
    "sample": "decode draws from the prior",
    "demo": "try autoencoders on your own images in the browser",
    "encode": "precompute the latents of a data set",
    "push": "publish a run on the Hugging Face Hub",
    "info": "say what a model or a run is",
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
"""Modules of this chapter that hold commands of another name."""
HELP = f"""usage: diffusers-vae COMMAND ... [--debug]

Train, measure and publish KL autoencoders that load in stock diffusers.

{chr(10).join(f"  {name:<20} {text}" for name, text in COMMANDS.items())}

  diffusers-vae COMMAND --help    says what it takes, with an example
  --debug                         shows where an error came from
  --version                       shows the version

example: diffusers-vae evaluate runs/digits

Exit codes: 0 done, 1 an error, 2 wrong arguments, 75 interrupted, and the same command continues (train).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments`, by default those of the process, name; the exit code."""
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
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end a command
            with suppress(OSError):  # a log that cannot be written ends no training
                stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug, training = "--debug" in arguments, any(argument.startswith("train") for argument in arguments[:1])
    arguments = [_at_home(argument) for argument in arguments if argument != "--debug"]
    try:
        try:
            code = _run(arguments, debug)
        except SystemExit:  # of `train --help`, say
            sys.stdout.flush()
            raise
        if training:  # which is done, whatever became of its log
            _drop_output()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        _drop_output()
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        return 128 + signal.SIGINT
    except Exception as error:
        expected = isinstance(error, (ArithmeticError, ImportError, OSError, ValueError))
        if not (expected or debug) and _out_of_memory(error):
            said = " ".join(str(error).split())
            print(f"error: there is not enough memory ({said[:300]}): {LESS_MEMORY}", file=sys.stderr)
            return 1
        if debug or (not expected and training):  # it may not come again for days
            raise
        kind = "" if expected else f"{type(error).__name__}: "
        text = str(error) if expected else " ".join(str(error).split())
        print(message(f"error: {kind}{text}{'' if expected else ' (--debug shows where)'}"), file=sys.stderr)
        return 1


def _explain_launcher() -> None:
    """Say whose traceback follows an error below `accelerate launch` of one process, which has no other way to end."""
    from ..processes import launched_alone

    if launched_alone():
        said = "(what follows is of `accelerate launch` and says no more; `diffusers-vae train` ends without it)"
        print(said, file=sys.stderr, flush=True)


def _at_home(argument: str) -> str:
    """The argument with the home directory in the place of a leading ~ that no shell has replaced: bash leaves that of
    --out=~/x as it is.
    """
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + os.path.expanduser(value)


def _drop_output() -> None:
    """Drop what was printed and cannot be written: Python would try again at its exit, and exit with 120."""
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
    """The module `name` of this chapter. Imports create a million objects that live as long as the process: a fifth of
    the time would go into looking for garbage among them, and more later.
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


def _run(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(version("diffusers-vae"))
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: {showable(arguments[0])} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
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
