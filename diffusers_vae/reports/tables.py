"""Tables of figures for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..data import Look
from ..evaluation.figures import FIGURES, missed_target
from ..evaluation.float16 import LARGEST
from ..messages import showable
from .wording import changes_of, compatibility, figures_of, number, origin, precision_note, value_text, weight_text

LISTED = 10  # maximum number of names and kinds in a table of a set


def report_table(report: Mapping[str, Any]) -> str:
    """Return the figures of `report`, the content of evaluation.json, in lines of at most 100 columns for a
    terminal.
    """
    rows = [
        (label, number(value), f"[{number(low)}, {number(high)}]" if interval else "", unit)
        for label, value, interval, unit, _ in figures_of(report)
        for low, high in [interval or (0, 0)]
    ]
    lines = _aligned([("", "mean", "95 % interval", ""), *rows], "<><<")
    posterior = report.get("posterior", {})
    notes = [
        f"{report['images']:,} images; distortion, elbo and bits/dim refer to the "
        f"{report['density']}{weight_text(report)}."
    ]
    if missed := missed_target(report):
        notes.append(missed)
    if posterior:
        notes.append(
            f"Latents: {posterior['verdict']}; {posterior['active_units']:,} of {posterior['units']:,} units active."
            + (f" {posterior['advice']}" if posterior.get("advice") else "")
        )
    if report.get("fp16"):
        notes.append(precision_note(report["fp16"]))
    text = [*lines, "", *(line for note in notes for line in _wrapped(note))]
    if tuning := report.get("fine_tuning"):
        changes = [(label, change, f"[{low}, {high}]", unit) for label, change, low, high, unit in changes_of(report)]
        text += ["", *_wrapped(f"{origin(tuning)} After minus before, in pairs:")]
        text += _aligned([("", "difference", "95 % interval", ""), *changes], "<><<")
        text += ["", *_wrapped(" ".join(compatibility(report)))]
    return "\n".join(text) + "\n"


def look_table(found: Look) -> str:
    """Return a description of a set of images as text for a terminal."""

    def listed(counts: Mapping[str, int]) -> str:
        first = [f"{showable(name)} {count:,}" for name, count in list(counts.items())[:LISTED]]
        return ", ".join(first) + (f" and {len(counts) - LISTED} more" if len(counts) > LISTED else "")

    def named(names: Sequence[str]) -> str:
        more = [f"{'':14}and {len(names) - LISTED} more"] if len(names) > LISTED else []
        return "\n".join([f"{len(names):,}", *(f"{'':14}{showable(name)}" for name in names[:LISTED]), *more])

    source = "the set's own parts" if found.split else "split by data.heldout_fraction"
    rows = [("images", ", ".join(f"{count:,} {part}" for part, count in found.parts.items()) + f" ({source})")]
    rows += [("note", showable(note)) for note in found.notes]
    rows += [("classes", f"{len(found.classes)}: {listed(found.classes)}")] if found.classes else []
    rows += [("captions", showable(found.captions, lines=True))] if found.files else []
    if files := found.files:
        rows += [("formats", listed(files.formats)), ("modes", listed(files.modes))]
        if found.proposed:
            low, high = found.proposed
            note = f"{found.value_range}, proposed because 16-bit files hold only {low:,} to {high:,};"
            rows += [("value range", note), ("", "without data.value_range, they are divided by 257 and nearly black")]
        if not found.value_range and any(";16" in mode for mode in files.modes):
            rows += [("", "16-bit values are scaled to 8 bits, unless data.value_range states their range")]
        rows += [("sizes", f"{listed(files.sizes)} (height x width)")]
        rows += [("shorter side", f"{files.sides[0]:,} to {files.sides[2]:,} pixels, median {files.sides[1]:,}")]
        groups = [
            " = ".join(group[:3]) + f" = {len(group) - 3:,} more" * (len(group) > 3) for group in files.duplicates
        ]
        rows += [("duplicates", named(groups) if groups else "none")]
        if files.leaks:
            rows += [("", f"{files.leaks:,} held-out files are also training files: figures will be too good")]
    rows += [("unreadable", named(found.unreadable) if found.unreadable else "none")]
    if found.left_out:
        rows += [("left out", named(found.left_out))]
    if found.files and found.files.paged:
        count, *names = named(found.files.paged).split("\n")
        rows += [("pages", "\n".join([f"{count} files have several pages; only the first is read", *names]))]
    rows += [("decoded", f"{found.measured:,} of the training images")]
    rows += [(name, "  ".join(f"{value:.4f}" for value in getattr(found, name))) for name in ("mean", "std")]
    if stated := found.value_range:
        width = stated.high - stated.low
        rows += [("in files", f"{stated} is [0, 1] above")]
        rows += [("mean", "  ".join(number(stated.low + width * value) for value in found.mean))]
        rows += [("std", "  ".join(number(width * value) for value in found.std))]
    rows += [("constant", named(found.constant) if found.constant else "none")]
    return "\n".join(f"{label:<14}{text}" for label, text in rows)


def precision_table(precision: Mapping[str, Any]) -> str:
    """Return fp16 of evaluation.json as text for a terminal: blocks in execution order."""
    rows = [("", "largest", "of 65,504")]
    rows += [(name, number(value), f"{value / LARGEST:.3%}") for name, value in precision["blocks"].items()]
    note = f"{precision['images']:,} images. {precision_note(precision)}"
    return "\n".join([*_aligned(rows, "<>>"), "", *_wrapped(note)]) + "\n"


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Return the differences of `comparison`, the content of comparison.json, as text for a terminal."""
    first, second = comparison["first"], comparison["second"]
    rows: list[tuple[str, ...]] = [
        ("", "first", "second", "second - first", "95 % interval", "unit", "second is better")
    ]
    for name, difference in comparison["differences"].items():
        interval = f"[{', '.join(map(number, difference['interval']))}]" if difference["interval"] else ""
        share = difference["second_is_better"]
        better = "" if share is None else f"in {100 * share:.0f} % of images"
        values = [number(value) for value in (first[name], second[name], difference["mean"])]
        rows.append((FIGURES[name].label, *values, interval, FIGURES[name].unit, better))
    if first["rfid"] is not None and second["rfid"] is not None:
        values = first["rfid"], second["rfid"], second["rfid"] - first["rfid"]
        rows.append((FIGURES["rfid"].label, *map(number, values), "", "", ""))
    names = [
        f"{position}: {showable(report['model']['name'])}"
        for position, report in (("first", first), ("second", second))
    ]
    notes = [
        _protocol(first["protocol"]),
        "Differences are second minus first, image by image, with Student's t intervals of their mean. Distortion and "
        f"elbo refer to the {first['density']}{weight_text(first)}.",
    ]
    lines = [line for note in notes for line in _wrapped(note)]
    return "\n".join([*names, "", *lines, "", *_aligned(rows, "<>>><<<")]) + "\n"


def _protocol(protocol: Mapping[str, Any]) -> str:
    """Return sentences on the images and on how they were reconstructed."""
    rounding = "rounded to 8 bits" if protocol["round_to_8_bit"] else "not rounded to 8 bits"
    channels = f"{protocol['channels']} channel{'s' if protocol['channels'] > 1 else ''}"
    return (
        f"{protocol['images']:,} images of {protocol['data']}, split {protocol['split']}, at "
        f"{value_text(protocol['resolution'])}, {channels}. Reconstructions are decoded from the posterior's "
        f"{protocol['reconstruction']}, {rounding}; {protocol['dtype']} on {protocol['device']}."
    )


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Return lines with columns of equal width, each aligned to its entry in `sides`, < or >."""
    rows = [[showable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def _wrapped(text: str) -> list[str]:
    """Return lines of at most 100 columns."""
    return textwrap.wrap(showable(text), 100)
