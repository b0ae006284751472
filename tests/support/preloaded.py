"""What runs and tests import, some of it late: the server that launches are forked from imports it once for all."""

# ruff: noqa: E402, F401
import functools
import gc

gc.disable()  # imports create a million objects that stay alive

import datasets
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.layout_engine
import pyarrow.parquet
import pytest
import sklearn.datasets
import sklearn.decomposition
import sklearn.manifold
import torchmetrics.functional.image
import torchmetrics.image.fid
import torchmetrics.image.lpip

import diffusers_vae.commands
import diffusers_vae.latent_cache

figure = matplotlib.figure.Figure()
figure.subplots().plot([1, 2], label="1")
matplotlib.backends.backend_agg.FigureCanvasAgg(figure).draw()  # which loads fonts

# what each launch would do again: read the digits, and arrange pictures, which no test of launches looks at
sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
sklearn.datasets.load_digits()
matplotlib.layout_engine.ConstrainedLayoutEngine.execute = lambda engine, figure: None

gc.collect()
gc.freeze()  # otherwise each fork would copy the pages of all objects as soon as it collects
gc.enable()
