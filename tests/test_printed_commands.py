"""What the program prints to be pasted runs from any folder, with an installed wheel and no checkout."""

import json
import os
import shlex
import subprocess
import sys

import pytest

WORK = """
import io, json, sys
from contextlib import redirect_stdout
import torch
from diffusers_vae import VAE, cli
from diffusers_vae.models.single_file import __file__ as source
assert source.startswith({installed!r}), source
model = ["--model.block_out_channels=[8,8]", "--model.norm_num_groups=4", "--model.mid_block_add_attention=false"]
run = ["--data.resolution=8", "--run.max_images=60", "--run.batch_size=30", "--run.tracker=null"]
text = ["--model.block_out_channels=[16]", "--model.norm_num_groups=8", "--model.text_width=16",
        "--model.text_layers=1", "--sampling.steps=2", "--sampling.seeds=1",
        "--sampling.heldout_images=8"]
commands = [
    ["train", *model, *run, "--evaluation.max_images=20", "--run.output_dir=runs/a b"],
    ["train", "--model.architecture=mlp", *run, "--evaluation.max_images=20", "--run.output_dir=runs/mlp"],
    ["train-text-to-image", *text, *run, "--vae=runs/a b", "--run.output_dir=runs/text"],
    ["info", "runs/a b"], ["info", "runs/mlp"], ["info", "runs/text/pipeline"], ["info", "runs/text/pipeline/vae"],
    ["encode", "digits", "--vae=runs/a b", "--out=latents"],
    ["evaluate", "runs/mlp", "--evaluation.max_images=20"],
    ["push", "runs/a b", "me/a"], ["push", "runs/text", "me/a"],
    ["train", "--help"], ["train-text-to-image", "--help"], ["presets"], ["data", "digits"],
    ["train", "digits", "--preset", "mnist-vae", "--data.fit=crop", *run, "--run.output_dir=runs/preset"],
]
printed = []
for arguments in commands:
    with redirect_stdout(io.StringIO()) as out:
        sys.stderr = error = io.StringIO()
        try:
            code = cli.main(arguments)
        except SystemExit as ended:
            code = ended.code
        sys.stderr = sys.__stderr__
    assert code == (arguments[0] == "push"), (arguments, error.getvalue())
    printed.append(out.getvalue() + error.getvalue())
json.dump(printed, open({out!r}, "w"))
"""
PASTE = """
import json, shlex, sys
from diffusers_vae import cli
for line in json.load(open({lines!r})):
    names = {{}}
    if not line.startswith("diffusers-vae "):
        exec(line, names)
        continue
    if line.startswith("diffusers-vae train "):
        small = ["--data.resolution=8", "--run.max_images=32", "--run.tracker=null", "--evaluation.max_images=8"]
        assert cli.main([*shlex.split(line)[1:], *small]) == 0
        continue
    sys.stderr = open("error.txt", "w+")
    cli.main(shlex.split(line)[1:])
    sys.stderr.seek(0)
    said, sys.stderr = sys.stderr.read(), sys.__stderr__
    assert "offline" in said.lower() or "token" in said, said
"""


def start(code, folder, installed):
    """Run a program in a new folder; no checkout is on its path, and no network can be reached."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_runs_from_an_empty_folder(installed, tmp_path):
    start(WORK.format(installed=str(installed), out=str(tmp_path / "printed.json")), tmp_path / "work", installed)
    printed = json.loads((tmp_path / "printed.json").read_text())
    lines = []
    for text in printed:
        lines += [line.split("it ", 1)[1].strip() for line in text.splitlines() if line[:8] in ("load it ", "open it ")]
        lines += [text.partition("Repeat: ")[2].strip()] if "Repeat: " in text else []
        assert "training/" not in text
        lines += [line for line in text.splitlines() if line.startswith("diffusers-vae train --preset digits")]
    assert len(lines) == 4 + 4 + 1 + 1 + 1 and sum(line.startswith("diffusers-vae ") for line in lines) == 2
    (uploaded,) = [text for text in printed if "hf upload" in text]
    assert os.path.isdir(shlex.split(uploaded.split("`")[1])[3])
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    start(PASTE.format(lines=str(tmp_path / "lines.json")), tmp_path / "empty", installed)
