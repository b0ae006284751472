"""What runs and tests import, some of it late: the server that launches are forked from imports it once for all."""

# ruff: noqa: E402, F401
import gc

gc.disable()  # imports create a million objects that stay alive

import datasets
import matplotlib.backends.backend_agg
import matplotlib.figure
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

from .shortcuts import take_shortcuts

figure = matplotlib.figure.Figure()
figure.subplots().plot([1, 2], label="1")
matplotlib.backends.backend_agg.FigureCanvasAgg(figure).draw()  # which loads fonts

take_shortcuts()
sklearn.datasets.load_digits()

gc.collect()
gc.freeze()  # otherwise each fork would copy the pages of all objects as soon as it collects
gc.enable()
