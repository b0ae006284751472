"""Work of libraries that tests would have done again and again without looking at it."""

import functools
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

import sklearn.datasets
from matplotlib.backends.backend_agg import FigureCanvasAgg

DRAW = FigureCanvasAgg.draw


def take_shortcuts() -> None:
    """Read scikit-learn's digits and the entry points of installed packages once per process, and leave figures blank
    outside `drawn_figures`. torch searches the entry points twice in each process of a distributed launch, and drawing
    takes most of the time at the end of a small run.
    """
    for module, name in ((sklearn.datasets, "load_digits"), (importlib.metadata, "entry_points")):
        if not hasattr(getattr(module, name), "cache_info"):
            setattr(module, name, functools.cache(getattr(module, name)))
    FigureCanvasAgg.draw = _leave_blank


@contextmanager
def drawn_figures() -> Iterator[None]:
    """Figures as users see them."""
    before, FigureCanvasAgg.draw = FigureCanvasAgg.draw, DRAW
    try:
        yield
    finally:
        FigureCanvasAgg.draw = before


def _leave_blank(canvas: FigureCanvasAgg) -> None:
    canvas.renderer = canvas.get_renderer()
