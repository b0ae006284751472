"""All figures of a GPU by one command: training, inference and evaluation beside the plain loops, in parts.

Each part takes at most 8 minutes on an H100. Its figures are written to the file as soon as it is done, and a part that
the file holds is not run again, so the same command continues where it was interrupted. README.md beside this file
describes the parts. Nothing is downloaded.

    python benchmarks/gpu.py --out gpu.json --root data
    python benchmarks/gpu.py --out gpu.json --only f8 inference
    python benchmarks/gpu.py --out rehearsal.json --rehearse      # every part in seconds, on a CPU, with tiny models
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_parts import DEVICE, NEED_ROOT, PARTS, TINY, Sizes
from side_by_side import write


def machine(rehearsal: bool) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type
    return {"device": name, "torch": torch.__version__, "rehearsal": rehearsal}


def table(measured: dict[str, dict[str, Any]], others: dict[str, str]) -> str:
    """All figures as Markdown, with what they were measured on; `others` are parts without figures, each with why."""
    about = next(iter(measured.values()), {"device": "no device", "torch": torch.__version__, "rehearsal": False})
    dates = sorted(part["date"] for part in measured.values())
    when = " to ".join(sorted({*dates[:1], *dates[-1:]}))
    lines = [f"{about['device']}, torch {about['torch']}, {when}{', a rehearsal' * about['rehearsal']}", ""]
    lines += ["| part | what | measured | beside | ratio |", "| --- | --- | --- | --- | --- |"]
    for name in PARTS:
        for line in measured[name]["rows"] if name in measured else []:
            ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
            lines.append(f"| {name} | {line['what']} | {line['value']} | {line['beside']} | {ratio} |")
        if name in others:
            lines.append(f"| {name} | | {others[name]} | | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSON file of all figures; the parts it holds are not run."
    )
    parser.add_argument("--root", help="Folder with MNIST/raw and its four unpacked files, for article and mlps.")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"Parts to run: {', '.join(PARTS)}.")
    parser.add_argument("--rehearse", action="store_true", help="Run every part in seconds, with tiny models.")
    settings = parser.parse_args(arguments)
    if settings.root and not Path(settings.root, "MNIST", "raw", "train-images-idx3-ubyte").is_file():
        parser.error(f"--root must hold MNIST/raw/train-images-idx3-ubyte, unpacked, got {settings.root}")
    if DEVICE.type == "cpu" and not settings.rehearse:
        parser.error("torch finds no accelerator here; --rehearse runs every part on a CPU, with tiny models")
    if settings.rehearse:
        os.environ["TQDM_MININTERVAL"] = "0"  # bars of tiny models must show every step
    sizes, here, out = TINY if settings.rehearse else Sizes(), machine(settings.rehearse), Path(settings.out)
    measured = json.loads(out.read_text())["measured"] if out.exists() else {}
    for part in measured.values():
        if (before := {name: part[name] for name in here}) != here:
            parser.error(f"{out} holds figures of {before}, and this is {here}: choose another --out")
    others = {}
    for name in [name for name in PARTS if name not in measured]:
        if settings.only and name not in settings.only:
            others[name] = "not run yet"
        elif name in NEED_ROOT and not settings.root:
            others[name] = "left out: it needs --root FOLDER with MNIST/raw"
        else:
            print(f"part {name}", flush=True)
            began = time.perf_counter()
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    rows = PARTS[name](sizes, settings.root, folder)
            except (Exception, SystemExit) as error:  # the other parts are worth having
                print(f"error in {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                others[name] = f"failed: {type(error).__name__}"
                continue
            seconds, date = time.perf_counter() - began, datetime.date.today().isoformat()
            measured[name] = here | {"date": date, "seconds": round(seconds, 1), "rows": rows}
            write(settings.out, measured)
    print(table(measured, others))
    return int(any(text.startswith("failed") for text in others.values()))


if __name__ == "__main__":
    sys.exit(main())
