"""Small files with random damage, fed to readers in a process that may neither crash, hang nor fill the memory."""

import hashlib
import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

MEMORY = 2**31
"""Bytes of address space beyond those of the parent."""
SECONDS = 10


def mutated(content: bytes, seed: int) -> bytes:
    """The content after one to four changes at random: bytes set, zeroed, taken out, put in, or the end cut off."""
    rng, changed = np.random.default_rng(seed), bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(changed))), int(rng.integers(1, 9))
        kind = rng.choice(["set", "flip", "extreme", "out", "in", "cut"], p=[0.3, 0.3, 0.2, 0.08, 0.08, 0.04])
        if kind == "set":
            changed[at : at + length] = rng.bytes(len(changed[at : at + length]))
        elif kind == "flip":
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == "extreme":
            changed[at : at + length] = bytes([rng.choice([0, 0x7F, 0xFF])]) * len(changed[at : at + length])
        elif kind == "out" and len(changed) > 16:
            del changed[at : at + length]
        elif kind == "in":
            changed[at:at] = rng.bytes(length)
        elif len(changed) > 16:
            del changed[max(16, at) :]
    return bytes(changed)


def digest(value: object) -> str:
    """The same for the same arrays and plain values."""
    return hashlib.sha256(pickle.dumps(value)).hexdigest()[:16]


def outcomes(path: Path, seeds: range, read: Callable[[Path], object], source: Path) -> dict[int, str]:
    """What becomes of each mutant of the file at `path`, written in its place, when `read` gets `source`, the file or
    its folder: "read" with the digest of what it returned, "refused" by a ValueError or OSError that names the source,
    with its text, or else what went wrong.
    """
    content, found = path.read_bytes(), {}
    while len(found) < len(seeds):
        rest = seeds[len(found) :]
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            os.close(receive)
            try:
                _read_all(path, content, rest, read, source, send)
            finally:
                os._exit(0)
        os.close(send)
        with os.fdopen(receive) as lines:
            said = [line.rstrip("\n") for line in lines]
        _, status = os.waitpid(child, 0)
        found |= dict(zip(rest, said, strict=False))
        if len(said) < len(rest):
            found[rest[len(said)]] = f"the process ended: status {status}, signal {os.WTERMSIG(status)}"
    path.write_bytes(content)
    return found


def _read_all(
    path: Path, content: bytes, seeds: range, read: Callable[[Path], object], source: Path, send: int
) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of the decoders
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for seed in seeds:
        path.write_bytes(mutated(content, seed))
        signal.alarm(SECONDS)
        try:
            said = f"read {digest(read(source))}"
        except (OSError, ValueError) as error:
            named = source.name in str(error)
            said = f"refused: {error}" if named else f"the file is not named: {error!r}"
        except BaseException:
            said = " / ".join(traceback.format_exc().splitlines()[-5:])
        signal.alarm(0)
        os.write(send, f"{said}".replace("\n", " / ").encode(errors="replace") + b"\n")
