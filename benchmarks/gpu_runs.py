"""What gpu.py starts by `accelerate launch`: a training run that says how much memory it took, also when it is stopped,
or the bare steps of such a run.

    accelerate launch benchmarks/gpu_runs.py train --run.output_dir runs/digits
    accelerate launch benchmarks/gpu_runs.py bare 3200 --run.output_dir runs/digits
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from tqdm import tqdm

from diffusers_vae.cli import main as command_line
from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.data import step_generator
from diffusers_vae.engine import program
from diffusers_vae.engine.launch import launched, peak_memory
from diffusers_vae.engine.state import TrainState
from diffusers_vae.tasks import autoencoder_step as task
from diffusers_vae.tasks.autoencoder import fast_in_bfloat16
from diffusers_vae.tasks.autoencoder_data import load_run_data

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def train(arguments: Sequence[str]) -> int:
    """Train as training/train_vae.py does; print its memory and return its exit code."""
    code = command_line(["train", *arguments])
    print(f"at most {peak_memory(DEVICE) / 2**20:,.0f} MiB of memory")
    return code


def bare(arguments: Sequence[str]) -> int:
    """Take the steps of a run on a batch that stays on the device, by the package's classes and without its loop."""
    images, config = int(arguments[0]), parse_settings(TRAININGS["train"], arguments[1:])[0]
    with launched(config.run, partial(fast_in_bfloat16, config)) as launch:
        accelerator, device = launch.accelerator, launch.accelerator.device
        config = load_run_data(config, accelerator).config
        step, count, limit = task.AutoencoderStep(config, accelerator), config.run.batch_size, config.optimizer
        blank = partial(task.blank_output, config=config, device=device)
        state = TrainState(accelerator, partial(task.build_model, config, device), config, step.terms, blank)
        captured = None
        if program.captures(config.run, step.program, accelerator):
            captured = program.CapturedStep(state, step, limit.max_grad_norm, count)
        batch = step.random_inputs(count, step_generator(0, 0, 0, device))
        pixels = torch.randint(0, 256, (count, config.data.channels, *config.data.size), dtype=torch.uint8)
        batch["pixels"] = pixels.to(device)
        with tqdm(total=images, unit="img") as bar:
            while bar.n < images:
                state.begin_step(limit.learning_rate)
                step.begin(bar.n, config.run.max_images, limit.learning_rate)
                if not (captured and captured.takes(count) and captured(batch)):
                    state.backward(step(state.model, batch), 1.0)
                    state.clip(limit.max_grad_norm, False)
                    state.take_step(False)
                    state.zero_grad()
                if device.type != "cpu" and (not bar.n or bar.n + count >= images):
                    torch.accelerator.synchronize()
                bar.update(min(count, images - bar.n))
    print(f"at most {peak_memory(device) / 2**20:,.0f} MiB of memory")
    return 0


if __name__ == "__main__":
    sys.exit({"train": train, "bare": bare}[sys.argv[1]](sys.argv[2:]))
