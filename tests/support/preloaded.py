"""What runs and tests import, some of it late: the server that launches are forked from imports it once for all."""

# ruff: noqa: E402, F401
import gc
import importlib.metadata

gc.disable()  # imports create a million objects that stay alive

import datasets
import matplotlib.backends.backend_agg
import matplotlib.figure
import pyarrow.parquet
import pytest
import sklearn.datasets
import sklearn.decomposition
import torchmetrics.functional.image
import torchmetrics.image.fid
import torchmetrics.image.lpip

import diffusers_vae.cli.data
import diffusers_vae.cli.encode
import diffusers_vae.cli.evaluate
import diffusers_vae.cli.images
import diffusers_vae.cli.info
import diffusers_vae.cli.publish
import diffusers_vae.cli.training

from .shortcuts import take_shortcuts

take_shortcuts()
sklearn.datasets.load_digits()
importlib.metadata.entry_points(group="torch.distributed.backends")

gc.collect()
gc.freeze()  # otherwise each fork would copy the pages of all objects as soon as it collects
gc.enable()
