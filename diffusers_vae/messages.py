"""Text for people: names of unknown origin without control characters, addresses without passwords."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager


def showable(text: object, lines: bool = False) -> str:
    """Return `text` as one line of printable characters. Other characters, which could control a terminal, are escaped
    as in Python. With `lines`, line breaks are kept, and lines after the first are indented so that none can pass for
    another message.
    """
    if lines:
        return "\n  ".join(map(showable, str(text).split("\n")))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def problem_list(problems: Sequence[str], most: int = 20) -> str:
    """Return the first `most` problems, one per line, and the number of the others."""
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
    """Return `text` as a Python string in double quotes."""
    return showable(json.dumps(str(text), ensure_ascii=False))


def without_passwords(text: str) -> str:
    """Return `text` with USER:PASSWORD in addresses such as https://USER:PASSWORD@HOST masked."""
    return re.sub(r"(?<=://)[^\s/]*@", "***@", text)


def in_a_line(error: Exception) -> str:
    """Return the class and message of an error as one line of at most 500 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


CLIENTS = ("huggingface_hub", "datasets", "diffusers")  # libraries that query the Hub and have their own log handlers


@contextmanager
def changed_logs(change: Callable[[str], str]) -> Generator[None]:
    """Apply `change` to every message logged in this context, including those of Hub clients."""

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
    """Remove passwords, which Hub clients include, from OSErrors and log messages in this context."""
    try:
        with changed_logs(message):
            yield
    except OSError as error:
        said = without_passwords(str(error))
        if said == str(error):
            raise
        raise OSError(said) from None


def message(text: object) -> str:
    """Return an error or a warning as text for the terminal."""
    return showable(without_passwords(str(text)), lines=True)


def log_to_terminal(level: int) -> None:
    """Print log messages of `level` and above."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))
