"""Work of libraries that tests would have done again and again without looking at it."""

import functools

import matplotlib.layout_engine
import sklearn.datasets

ARRANGE = matplotlib.layout_engine.ConstrainedLayoutEngine.execute


def take_shortcuts() -> None:
    """Read scikit-learn's digits once a process, and leave the parts of figures where matplotlib puts them at first:
    to arrange them is half the work of drawing. The fixture `arranged_figures` is for tests that look at figures.
    """
    if not hasattr(sklearn.datasets.load_digits, "cache_info"):
        sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
    matplotlib.layout_engine.ConstrainedLayoutEngine.execute = lambda engine, figure: None
