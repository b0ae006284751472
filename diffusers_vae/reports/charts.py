"""Charts of metrics.jsonl, of rates per channel, and of several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .pages import new_figure, render

VERDICT_COLOURS = {
    "healthy": "tab:green",
    "partly collapsed": "tab:orange",
    "collapsed": "tab:red",
    "poor reconstruction": "tab:brown",
    "exploding": "tab:purple",
}


def nats(value: float) -> str:
    """Return a formatted rate: three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def rate_picture(
    rate_per_channel: Sequence[float], rate_per_position: Sequence[Sequence[float]], unused: Collection[int] = ()
) -> Image.Image:
    """Return a chart of the rate per latent channel, sorted if there are many, beside the rate per position, if there
    are several; nats per image.
    """
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    rates, positions = np.asarray(rate_per_channel, dtype=float), np.asarray(rate_per_position, dtype=float)
    many, several_positions = len(rates) > 10, positions.size > 1
    order = np.argsort(-rates, kind="stable") if many else np.arange(len(rates))
    figure = new_figure(10 if several_positions else 7, 4)
    left, *right = figure.subplots(1, 2 if several_positions else 1, squeeze=False)[0]
    kind = "channel" if several_positions else "unit"
    red = [channel in unused for channel in order.tolist()]
    bars = left.bar(range(len(rates)), rates[order], color=["tab:red" if marked else "tab:blue" for marked in red])
    if not many:
        left.bar_label(bars, [nats(rate) for rate in rates.tolist()], fontsize=8, padding=2)
        left.margins(y=0.1)
    left.set_ylim(bottom=min(0, rates.min()))
    if len(rates) <= 32:
        left.set_xticks(range(len(rates)), [str(channel) for channel in order.tolist()], fontsize=8)
        for tick, marked in zip(left.get_xticklabels(), red, strict=True):  # their bars may be too low to be visible
            tick.set_color("tab:red" if marked else "black")
    left.set_xlabel(f"latent {kind}" + (", the largest rate first" if many else ""), fontsize=9)
    left.set_title(
        f"rate per {kind}, nats per image\n{nats(rates.sum())} in all; unused (red): {sum(red)} of {len(rates)}",
        fontsize=10,
        loc="left",
    )
    left.tick_params(axis="y", labelsize=8)
    left.yaxis.set_major_formatter(EngFormatter(sep="") if rates.max() >= 1e4 else ScalarFormatter())
    left.grid(axis="y", alpha=0.25)
    left.set_axisbelow(True)
    for axes in right:
        shown = axes.imshow(positions, cmap="viridis", interpolation="nearest")
        figure.colorbar(shown, ax=axes, shrink=0.85).ax.tick_params(labelsize=8)
        height, width = positions.shape
        axes.set_title(f"rate per position ({height}x{width}), nats per image", fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
    return render(figure)


def _records(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


PANELS = {
    "loss": "loss, nats per image",
    "distortion": "distortion, nats per image",
    "rate": "rate, nats per image",
    "perceptual": "LPIPS",
    "generator": "generator's loss",
    "discriminator": "discriminator's loss",
    "adversarial_weight": "weight of the generator's loss",
    "kl_weight": "kl_weight",
    "scale": "scale of the likelihood",
    "learning_rate": "learning rate",
}


def loss_picture(metrics: Path, panels: dict[str, str] = PANELS) -> Image.Image:
    """Return a chart of a run's metrics.jsonl over images seen: those of the titled `panels` that were logged."""
    training = [record for record in _records(metrics) if record["kind"] == "train"]
    logged = {name for record in training for name, value in record.items() if value is not None}
    return runs_picture({"training": metrics}, {name: title for name, title in panels.items() if name in logged})


def runs_picture(metrics: dict[str, Path], panels: dict[str, str]) -> Image.Image:
    """Return a chart of the metrics.jsonl of runs, by name, over images seen, with a titled panel for each value: lines
    for training, dots for held-out images.
    """
    from matplotlib.ticker import EngFormatter

    runs = {name: _records(path) for name, path in metrics.items()}
    rows = max(1, math.ceil(len(panels) / 2))
    figure = new_figure(10, 3 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (key, title) in zip(grid, panels.items(), strict=False):
        shown = []
        for number, (name, records) in enumerate(runs.items()):
            for kind in ("train", "evaluation"):
                chosen = [record for record in records if record["kind"] == kind and record.get(key) is not None]
                seen, values = ([record[which] for record in chosen] for which in ("images_seen", key))
                alone = len(runs) == 1 and kind == "evaluation"
                axes.plot(
                    seen,
                    values,
                    color=f"C{number + alone}",
                    linewidth=1.2,
                    linestyle="-" if kind == "train" or alone else "",
                    marker="o" if values and (kind == "evaluation" or len(values) == 1) else None,
                    label="held-out" if alone and values else name if kind == "train" else None,
                )
                shown += values[len(values) // 10 :] if kind == "train" else values
        if key != "learning_rate" and shown and max(shown) > min(shown):
            if key == "adversarial_weight" and max(shown) > 0:  # changes by factors
                axes.set_yscale("log")
            else:
                # the first steps of training are far off and would flatten the rest
                margin = 0.1 * (max(shown) - min(shown))
                axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set_xlabel("images seen", fontsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_title(title, fontsize=10, loc="left")
        if key == "learning_rate":
            axes.set_ylim(bottom=0)
        elif len(runs) == 1:
            axes.legend(fontsize=8)
    if len(runs) > 1:  # above the panels, where it hides nothing
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=8)
    return render(figure)


def rate_distortion_picture(metrics: Path) -> Image.Image:
    """Return a chart of a run's path in the plane of rate and distortion, coloured by images seen, from its
    metrics.jsonl. All points on a dashed line have the same elbo.
    """
    from matplotlib.ticker import EngFormatter

    figure = new_figure(7.5, 5)
    axes = figure.add_subplot()
    records = [record for record in _records(metrics) if record.get("rate") is not None]
    train, heldout = ([r for r in records if r["kind"] == kind] for kind in ("train", "evaluation"))
    scale: dict[str, Any] = {"vmin": 0, "vmax": max((record["images_seen"] for record in train + heldout), default=1)}
    left_out = len(train) // 10
    points = None
    for chosen, label in ((train, "training"), (heldout, "held-out")):
        if not chosen:
            continue
        seen, rates, distortions = ([record[key] for record in chosen] for key in ("images_seen", "rate", "distortion"))
        if label == "training":
            axes.plot(rates, distortions, color="0.75", linewidth=1, zorder=1)
            style: dict[str, Any] = {"s": 22, "linewidths": 0, "zorder": 2}
        else:
            style = {"s": 90, "marker": "D", "edgecolors": "black", "linewidths": 1.2, "zorder": 3}
        points = axes.scatter(rates, distortions, c=seen, cmap="viridis", label=label, **style, **scale)
    shown = train[left_out:] + heldout
    if shown:
        for name, set_limits in (("rate", axes.set_xlim), ("distortion", axes.set_ylim)):
            # as in the loss curves, the first steps would flatten the rest
            values = [record[name] for record in shown]
            margin = 0.08 * (max(values) - min(values)) or 0.05 * max(abs(values[0]), 1)
            set_limits(min(values) - margin, max(values) + margin)
        _elbo_lines(axes)
        bar = figure.colorbar(points, ax=axes, format=EngFormatter(sep=""))
        bar.set_label("images seen", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        axes.legend(fontsize=8)
    axes.set_xlabel("rate, nats per image", fontsize=9)
    axes.set_ylabel("distortion, nats per image", fontsize=9)
    axes.set_title("Rate and distortion during training; dashed: the same elbo", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    return render(figure)


def _elbo_lines(axes: Any) -> None:
    """Plot dashed lines of equal rate + distortion through the visible part of the plane."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for total in MaxNLocator(9).tick_values(left + bottom, right + top):
        axes.plot([left, right], [total - left, total - right], "--", color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def rate_distortion_curve(points: Sequence[tuple[str, float, float, str]]) -> Image.Image:
    """Return a chart of several models in the plane of rate and distortion, nats per image, joined in order of rate.
    Each has label, rate, distortion and verdict.
    """
    from matplotlib.ticker import EngFormatter

    points = sorted(points, key=lambda point: point[1])
    figure = new_figure(7.5, 5)
    axes = figure.add_subplot()
    rates, distortions = [point[1] for point in points], [point[2] for point in points]
    axes.plot(rates, distortions, color="0.75", linewidth=1.2, zorder=1)
    for verdict in dict.fromkeys(point[3] for point in points):
        chosen = [point for point in points if point[3] == verdict]
        colour = VERDICT_COLOURS.get(verdict, "tab:blue")
        axes.scatter(*zip(*(point[1:3] for point in chosen), strict=True), s=55, color=colour, label=verdict, zorder=2)
    if max(rates) > 30 * max(min(rates), 1):
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(0.18, 0.12)
    axes.set_title("Rate and distortion of each model", fontsize=10, loc="left")
    axes.set_xlabel("rate, nats per image", fontsize=9)
    axes.set_ylabel("distortion, nats per image", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.draw_without_rendering()  # sets the scales that position the labels
    _label_points(axes, [(point[0], *point[1:3]) for point in points])
    return render(figure)


def _label_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Add a label beside each point, at the first candidate position where it covers no point and no text."""
    from matplotlib.transforms import Bbox

    positions = axes.transData.transform([point[1:] for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in positions]
    for (label, *point), marker in zip(points, list(taken), strict=True):
        for shift in [(9, 6, "left"), (-9, 6, "right"), (9, -14, "left"), (-9, -14, "right"), (9, 22, "left"),
                      (-9, -28, "right"), (9, 38, "left"), (-9, -44, "right")]:  # fmt: skip
            text = axes.annotate(
                label, point, shift[:2], textcoords="offset points", ha=shift[2], fontsize=8.5, annotation_clip=False
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken if other is not marker):
                break
            text.remove()
        else:
            axes.add_artist(text)
        taken.append(box)
