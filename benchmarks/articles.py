"""The presets of the articles against the articles' own loops (article_loops.py), in turn: images/s of training through
`accelerate launch`, and the training loss of the same epoch. README.md beside this file says what is compared.

    python benchmarks/articles.py mlp-z2 mlp-z20 conv --root data --out articles.json
    python benchmarks/articles.py mlp-z2 mlp-z20 --root data --reach     # time to the loop's final held-out loss
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from side_by_side import LAUNCH, follow, speed, summary_of, write

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "training" / "configs"
RUNS = {  # preset, recommended recipe, epochs of the article
    "mlp-z2": ("mnist-mlp-z2", "mnist-mlp-z2-fast", 20),
    "mlp-z20": ("mnist-mlp-z20", "mnist-mlp-z20-fast", 10),
    "conv": ("qmnist-vae", None, 30),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", choices=RUNS)
    parser.add_argument("--root", required=True, help="Folder with MNIST/raw and its four unpacked files.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1280, help="Trained on in a round of conv.")
    parser.add_argument("--reach", action="store_true", help="Train to the end, ours by the recommended recipe.")
    parser.add_argument("--settings", default="", help="Flags for our run, in one string: '--run.mixed_precision no'.")
    parser.add_argument("--out", help="JSON file for all figures.")
    arguments = parser.parse_args()
    if arguments.reach and not all(RUNS[name][1] for name in arguments.runs):
        parser.error(f"--reach needs runs with a recommended recipe: {', '.join(n for n in RUNS if RUNS[n][1])}")
    measured = {}
    for name in arguments.runs:
        measured[name] = reach(name, arguments) if arguments.reach else compare(name, arguments)
    if arguments.out:
        write(arguments.out, measured)


def compare(name: str, arguments: argparse.Namespace) -> dict:
    """Rounds of both, in turn."""
    length = ["--steps", str(arguments.images // 32)] if name == "conv" else ["--epochs", "1"]
    images = arguments.images if name == "conv" else 60_000
    rounds = []
    for number in range(arguments.rounds):
        loop = article(name, arguments.root, *length)[-1]
        run = train(RUNS[name][0], images, arguments, "--run.max_images", str(images))
        rounds.append({"loop": loop, "ours": run})
        ratio = run["images_per_second"] / loop["images_per_second"]
        print(
            f"{name} round {number + 1}: loop {loop['images_per_second']:,.0f} img/s, training loss "
            f"{loop['train_loss']:.2f}; ours {run['images_per_second']:,.0f} img/s, {run['train_loss']:.2f}; "
            f"{ratio:.2f} times",
            flush=True,
        )
    ratios = [part["ours"]["images_per_second"] / part["loop"]["images_per_second"] for part in rounds]
    speeds = [statistics.median(part[which]["images_per_second"] for part in rounds) for which in ("loop", "ours")]
    print(f"{name}: median {speeds[0]:,.0f} and {speeds[1]:,.0f} img/s, {statistics.median(ratios):.2f} times\n")
    return {"rounds": rounds, "ratio": statistics.median(ratios)}


def reach(name: str, arguments: argparse.Namespace) -> dict:
    """Both to their end: the seconds of training alone, and the held-out loss, of one draw of each posterior."""
    _, recipe, epochs = RUNS[name]
    images = 60_000 * yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())["run"]["epochs"]
    loop = article(name, arguments.root, "--epochs", str(epochs))
    seconds, loss = sum(epoch["seconds"] for epoch in loop), loop[-1]["test_loss"]
    run = train(recipe, images, arguments, "--evaluation.max_images", "null")
    outcome = f"{seconds / run['seconds']:.1f} times shorter" if run["heldout_loss"] <= loss else "not reached"
    print(
        f"{name}: the loop's {epochs} epochs take {seconds:.1f} s to a held-out loss of {loss:.2f}; ours "
        f"{run['seconds']:.1f} s to {run['heldout_loss']:.2f}: {outcome}\n",
        flush=True,
    )
    return {"loop": loop, "loop_seconds": seconds, "ours": run, "ratio": seconds / run["seconds"]}


def article(name: str, root: str, *settings: str) -> list[dict]:
    """The records of the article's loop."""
    command = [sys.executable, str(HERE / "article_loops.py"), name, "--root", root, *settings]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def train(config: str, images: int, arguments: argparse.Namespace, *settings: str) -> dict:
    """Our run by `accelerate launch`: images/s from the first step's end, seconds from before it, and losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*LAUNCH, str(HERE.parent / "training" / "train_vae.py")]
        command += ["--config", str(CONFIGS / f"{config}.yaml"), "--data.name", "mnist", "--data.root", arguments.root]
        command += ["--run.output_dir", f"{folder}/run", "--run.tracker", "null", "--evaluation.draws", "1"]
        command += ["--evaluation.max_images", "500", *settings, *arguments.settings.split()]
        marks, printed = follow(command, images)
        records = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        heldout = json.loads(Path(folder, "run", "evaluation.json").read_text())["loss"]
    losses = [record["loss"] for record in records if record["kind"] == "epoch"]
    return {
        "images_per_second": speed(marks),
        "seconds": marks[-1][0] - marks[0][0],
        "images": marks[-1][1],
        "train_loss": losses[0],
        "heldout_loss": heldout,
        "summary": summary_of(printed),
    }


if __name__ == "__main__":
    main()
