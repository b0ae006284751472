"""Work of libraries that tests would have done again and again without looking at it."""

import functools
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

import sklearn.datasets
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from PIL import Image

DRAW, SAVE = FigureCanvasAgg.draw, Image.Image.save


def take_shortcuts() -> None:
    """Read scikit-learn's digits and the entry points of installed packages once per process, make figures small and
    blank outside `drawn_figures`, and compress PNG files little. torch searches the entry points twice in each process
    of a distributed launch; drawing and compressing take most of the time at the end of a small run.
    """
    for module, name in ((sklearn.datasets, "load_digits"), (importlib.metadata, "entry_points")):
        if not hasattr(getattr(module, name), "cache_info"):
            setattr(module, name, functools.cache(getattr(module, name)))
    FigureCanvasAgg.draw = _leave_blank
    Image.Image.save = functools.partialmethod(SAVE, compress_level=1)


@contextmanager
def drawn_figures() -> Iterator[None]:
    """Figures as users see them."""
    before, FigureCanvasAgg.draw = FigureCanvasAgg.draw, DRAW
    try:
        yield
    finally:
        FigureCanvasAgg.draw = before


def _leave_blank(canvas: FigureCanvasAgg) -> None:
    canvas.get_renderer()  # which is of the figure's size, and kept
    canvas.renderer = RendererAgg(256, 256, canvas.figure.dpi)
