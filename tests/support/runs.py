"""Runs of training: tiny settings, real launches, and what they leave behind."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchvision.models import squeezenet1_1

from diffusers_vae.data import ArrayImages, DataConfig, Records
from diffusers_vae.engine.config import RunConfig
from diffusers_vae.engine.folder import Log, opened
from diffusers_vae.engine.launch import launched
from diffusers_vae.engine.loop import fit as fit_steps
from diffusers_vae.engine.state import TrainState
from diffusers_vae.engine.step import RunResult
from diffusers_vae.losses.adversarial import AdversarialConfig
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.losses.perceptual import FILES
from diffusers_vae.models import ModelConfig
from diffusers_vae.silence import PATIENCE
from diffusers_vae.tasks.autoencoder import fast_in_bfloat16, finished, summary, train
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.autoencoder_data import load_run_data
from diffusers_vae.tasks.autoencoder_step import AutoencoderStep, blank_output, build_model

ROOT = Path(__file__).parents[2]


SCRIPT = ROOT / "training" / "train_vae.py"


DATA = DataConfig(resolution=8)


TINY_VAE = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False)


TINY_MLP = ModelConfig(architecture="mlp", hidden_dim=16, latent_dim=2)


DETERMINISTIC = torch.cuda.is_available()
"""run.deterministic of runs that are compared bit by bit: on a CPU all repeat, on a GPU none has to without it."""


def tiny(output_dir, model=TINY_MLP, **run):
    settings = {"max_images": 300, "batch_size": 30, "log_every": 90, "tracker": None, "deterministic": DETERMINISTIC}
    run = settings | {"mixed_precision": "no"} | run  # in bfloat16, sums in another order differ by more
    return TrainConfig(
        data=DATA,
        model=model,
        objective=ObjectiveConfig(scale=0.5),
        run=RunConfig(output_dir=str(output_dir), **run),
    )


def fit(config, memory_limit=None, patience=PATIENCE):
    """Train as `config` says, up to the last checkpoint: nothing is measured, drawn or saved after it."""
    train(config, memory_limit, finish=False, patience=patience)


def fit_with(
    config,
    memory_limit=None,
    step=AutoencoderStep,
    change=lambda data: data,
    build=build_model,
    measure=lambda model, progress: None,
    finish=None,
    patience=PATIENCE,
    planned=None,
):
    """Train as `tasks.autoencoder.train` does, with parts of it replaced: the step, the data by `change`, the model,
    what is done where a measurement is due, and, given the run, what `finish_run` is given, after the last checkpoint.
    """
    with (
        launched(config.run, partial(fast_in_bfloat16, config), patience) as launch,
        opened(config, launch, finished) as run,
    ):
        accelerator = launch.accelerator
        data = change(load_run_data(run.config, accelerator, memory_limit, run.checkpoint))
        config = data.config
        step = step(config, accelerator, data.verification)
        run.begin(config, data.fingerprints(), partial(build_model, config))
        blank = partial(blank_output, config=config, device=accelerator.device)
        state = TrainState(accelerator, partial(build, config), config, step.terms, blank, step.discriminator)
        if run.checkpoint:
            step.restore(state.load(run.checkpoint))
        log = Log(accelerator, run.output_dir, state.images_seen, run.checkpoint)
        length = (planned or config.run).total_images(data.images)
        run.announce(summary(state.plain_model, data), step.program, config.unreached(length), data.image_errors())
        every = config.evaluation.every
        with closing(fit_steps(state, step, data.train_set, run, log, data.workers, every)) as fitting:
            for progress in fitting:
                measure(state.averaged(), progress)
        if not finish:
            return None
        result = finish(run, state.averaged(), step, data, log, state.progress())
        return run.complete(result, state.skipped, data.images, data.image_errors())


def end(run, *_):
    """End a run without measuring, drawing or saving anything."""
    if run.main:
        (run.output_dir / "evaluation.json").write_text("{}")
    return RunResult(output_dir=run.output_dir, parameters=0, latent_shape=(), saved="", load_line="")


def not_a_number(data):
    """Data of float pixels; one pixel of image 17 is NaN."""
    pixels = data.train_set.pixels / 255
    pixels[17, 0, 3, 3] = torch.nan
    return dataclasses.replace(data, train_set=ArrayImages(pixels, Records(data.train_set.labels)))


def records(output_dir, kind):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(output_dir):
    return load_file(Path(output_dir) / "model" / "diffusion_pytorch_model.safetensors")


def left_behind(output_dir: str | Path) -> dict[str, str]:
    """Checksum of every file of a run that must not depend on interruptions."""
    output_dir = Path(output_dir)
    files = [path for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    found = {}
    for path in files:
        content = path.read_bytes()
        if path.name in ("config.yaml", "manifest.json"):  # name the output_dir
            continue
        if path.name == "README.md":
            content = content.replace(output_dir.as_posix().encode(), b"RUN")
        found[str(path.relative_to(output_dir))] = hashlib.sha256(content).hexdigest()
    return found


def interrupted_at(images_seen, run, to):
    """A copy of a run as it was just after the checkpoint at `images_seen`, or before the first for 0."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name.removeprefix("images-")) > images_seen:
            shutil.rmtree(path)
    (to / "evaluation.json").unlink(missing_ok=True)
    shutil.rmtree(to / "model", ignore_errors=True)
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # cut off, and after the checkpoint
    return to


def at(config, output_dir, **run):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(output_dir), **run))


@contextmanager
def begun(output_dir, *arguments, launcher):
    """A long run as users start it, as a process that has saved for the first time, in a group of its own, which ends
    with the context.
    """
    flags = ["--run.output_dir", output_dir, "--run.tracker", "null", "--run.checkpoint_every", 32, *arguments]
    process = subprocess.Popen(
        [*launcher, str(SCRIPT), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not any((output_dir / "checkpoints").glob("images-*")):
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def group_is_gone(group, seconds):
    """Whether every process of a process group ended within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


CONFIGS = ROOT / "training" / "configs" / "accelerate"


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def tensors(output_dir, images_seen, name):
    return load_file(Path(output_dir) / "checkpoints" / f"images-{images_seen:012d}" / f"{name}.safetensors")


def assert_same_gradient(reference, output_dir, images_seen, name="optimizer"):
    """Adam's first average after its first step is a tenth of the gradient: within 1e-5 of its norm, by tensor."""
    expected, found = (tensors(path, images_seen, name) for path in (reference, output_dir))
    gradients = [name for name in expected if name.startswith("exp_avg.")]
    for name in gradients:
        difference, norm = (found[name] - expected[name]).norm(), expected[name].norm()
        if name.endswith("to_k.bias"):
            # no gradient: what is added to all keys alike, a softmax does not see. What there is of it is rounding
            assert norm < 1e-6 * expected[name.replace("to_k.bias", "to_q.bias")].norm()
        else:
            assert difference <= 1e-5 * norm, (name, difference / norm)
    return len(gradients)


def use_random_networks(home: Path) -> None:
    """Make `home` torch's cache, with a network for LPIPS whose weights are random: there is no other without a
    download.
    """
    os.environ["TORCH_HOME"] = str(home)
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_1().state_dict(), folder / FILES["squeeze"])


def whole(config):
    """`config` with a discriminator that joins after a while, LPIPS and a learned scale, on images large enough."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, resolution=24),
        objective=ObjectiveConfig(
            scale="learned",
            kl_schedule="cosine",
            kl_warmup_images=400,
            free_bits=3.0,
            perceptual="squeeze",
            perceptual_weight=0.1,
        ),
        adversarial=AdversarialConfig(
            weight=0.1, start_images=40, warmup_images=300, width=8, layers=2, lecam_weight=0.1, r1_weight=0.01
        ),
    )
