"""What people are shown: names of unknown origin without control characters, addresses without passwords."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager


def showable(text: object, lines: bool = False) -> str:
    """`text` in one line of printable characters; others, which could command a terminal, are escaped as in Python.
    With `lines`, its lines are kept, and indented after the first, so that none can pass for another message.
    """
    if lines:
        return "\n  ".join(map(showable, str(text).split("\n")))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def problem_list(problems: Sequence[str], most: int = 20) -> str:
    """The first `most` problems, a line each, and the number of the others."""
    more = [f"and {len(problems) - most} more"] * (len(problems) > most)
    return "\n".join([*map(showable, problems[:most]), *more])


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean X?" with the most similar of `names`, or with all that have the last part of a dotted name
    that is like none of them; empty if nothing is similar.
    """
    names = [*names]
    same_end = [one for one in names if one.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches
    found = close(name, same_end, 1, 0.8) or same_end or close(name, names, 1, 0.7)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def quoted(text: object) -> str:
    """`text` as a string of Python in double quotes."""
    return showable(json.dumps(str(text), ensure_ascii=False))


def without_passwords(text: str) -> str:
    """`text` with USER:PASSWORD in its addresses, https://USER:PASSWORD@HOST, blotted out."""
    return re.sub(r"(?<=://)[^\s/]*@", "***@", text)


def in_a_line(error: Exception) -> str:
    """Return class and message of an error in one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


CLIENTS = ("huggingface_hub", "datasets", "diffusers")  # libraries that ask the Hub, and log by handlers of their own


@contextmanager
def changed_logs(change: Callable[[str], str]) -> Generator[None]:
    """Apply `change` to each message that is logged meanwhile, by the clients of the Hub too."""

    def apply(record: logging.LogRecord) -> bool:
        record.msg, record.args = change(record.getMessage()), ()
        return True

    handlers = [handler for name in (None, *CLIENTS) for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(apply)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(apply)


@contextmanager
def hiding_passwords() -> Generator[None]:
    """Remove passwords from OSErrors raised within and from what is logged, where clients of the Hub put them."""
    try:
        with changed_logs(message):
            yield
    except OSError as error:
        said = without_passwords(str(error))
        if said == str(error):
            raise
        raise OSError(said) from None


def message(text: object) -> str:
    """An error or a warning as the terminal gets it."""
    return showable(without_passwords(str(text)), lines=True)


def log_to_terminal(level: int) -> None:
    """Print what is logged from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))
