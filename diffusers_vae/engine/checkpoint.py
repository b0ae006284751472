"""Checkpoints: written whole or not at all, verified before they are read, restored exactly.

A checkpoint is a folder `images-NNN` of plain files: weights, EMA weights and optimiser state as safetensors; JSON for
the rest; copies of config.yaml and metrics.jsonl; and a manifest with the size and SHA-256 of each.
"""

from __future__ import annotations

import json
import logging
import platform
import random
import shutil
from pathlib import Path
from typing import Any, cast

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..messages import showable
from ..processes import gather, on_main
from ..storage import (
    begin_folder,
    copy_file,
    delete_leftovers,
    described,
    digest_of,
    discard_folder,
    finish_folder,
    naming,
    partial_of,
    save_tensors,
    sync,
    write_text,
)
from ..untrusted import read_json

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
NAMES = f"images-{12 * '[0-9]'}"
"""Pattern of a checkpoint's name. Files with other names belong to the user."""


def write_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    tensors: dict[str, list[tuple[str, torch.Tensor]]],
    progress: dict[str, Any],
    extra: dict[str, Any],
    copies: list[Path],
    keep: int,
) -> Path:
    """Write the state of the run as `folder/images-NNN`, delete all but the newest `keep`, and return its path.

    All processes call it: each writes its own part, and the main process writes the rest.

    Args:
        folder: folder of all checkpoints of the run, on storage that every process sees.
        accelerator: accelerator of the run.
        tensors: named tensors of each file; those of model.safetensors and discriminator.safetensors must be finite.
        progress: JSON, the same on all processes; with `images_seen` and `step`.
        extra: JSON of this process; its random states are added.
        copies: files to copy into the checkpoint.
        keep: number of checkpoints to keep.

    Raises:
        FloatingPointError: if the weights are not finite, since they would replace a good checkpoint.
        OSError: on all processes, naming the checkpoint, if it cannot be written; earlier ones stay untouched.
    """
    target = folder / f"images-{progress['images_seen']:012d}"
    partial = partial_of(target)
    gathered: dict[str, dict[str, torch.Tensor]] = {}
    # together, so nothing here may fail on one process
    for name, named in tensors.items():
        gathered[name] = {}
        for key, tensor in named:
            found = whole(tensor)
            if accelerator.is_main_process:
                gathered[name][key] = found.cpu().contiguous()

    def begin() -> None:
        for what in ("model", "discriminator"):
            named = gathered.get(f"{what}.safetensors", {})
            if bad := [name for name, tensor in named.items() if not tensor.isfinite().all()]:
                raise FloatingPointError(
                    f"training diverged after step {progress['step']}: {len(bad)} tensors of the {what} are not "
                    f"finite, {bad[0]} among them. The checkpoints in {folder} are from before"
                )
        with naming(target):
            begin_folder(partial)

    def write() -> dict[str, dict[str, Any]]:
        """Write the part of this process to disk."""
        if not partial.exists():
            raise OSError("it does not exist for all processes; run.output_dir must be on storage that they share")
        files: dict[str, Any] = {
            f"process-{accelerator.process_index:05d}.json": extra | {"rng": _rng_state(accelerator.device)}
        }
        if accelerator.is_main_process:
            files["progress.json"] = progress
        for name, content in files.items():
            write_text(partial / name, json.dumps(content, allow_nan=False))
        if accelerator.is_main_process:
            for name, content in gathered.items():
                save_tensors(partial / name, content)
            for path in copies:
                copy_file(path, partial / path.name)
            files |= gathered | {path.name: path for path in copies}
        for name in files:
            sync(partial / name)
        return {name: described(partial / name) for name in files}

    def finish(parts: list[dict[str, dict[str, Any]]]) -> None:
        files = {name: description for part in parts for name, description in part.items()}
        with naming(target):
            manifest = {"format": FORMAT, "files": files, "sha256": digest_of([FORMAT, files])}
            write_text(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            sync(partial / MANIFEST)
            finish_folder(partial, target)  # also replaces a damaged checkpoint that was skipped
        tidy(folder, target, keep)

    try:
        on_main(begin)
        try:
            with naming(target):
                outcome: Any = write()
        except OSError as error:
            outcome = error
        outcomes = gather(outcome)
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
        on_main(lambda: finish(outcomes))
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint in `folder`, and what is wrong with each newer one, including interrupted
    saves.

    Raises:
        ValueError: if there are checkpoints but none is whole.
    """
    damaged = [f"{partial} is half-written" for partial in sorted(folder.glob(f".{NAMES}.partial"))]
    found = sorted(folder.glob(NAMES), reverse=True)
    for path in found:
        problem = _problem(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path} is damaged: {problem}")
    if found:
        raise ValueError(
            f"no checkpoint is whole in {folder}; put one back, or delete that folder to start from the beginning:\n"
            + "\n".join(damaged)
        )
    return None, damaged


def tidy(folder: Path, newest: Path | None, keep: int) -> None:
    """Delete what killed processes left behind, and all but the last `keep` of the checkpoints up to `newest`."""
    delete_leftovers(folder, NAMES)
    found = sorted(path for path in folder.glob(NAMES) if newest and path.name <= newest.name)
    for path in found[:-keep]:
        try:
            discard_folder(path)
        except OSError as error:
            logger.warning("%s is no longer needed and cannot be deleted: %s", showable(path), showable(error))


def _problem(path: Path) -> str | None:
    try:
        manifest = read_json(path / MANIFEST)
        files = manifest["files"]
        if manifest["sha256"] != digest_of([manifest["format"], files]):
            raise KeyError("sha256")
    except (OSError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{path} is of format {manifest['format']}, this version of diffusers_vae reads up to {FORMAT}; install a "
            "newer one"
        )
    for name, expected in files.items():
        if (path / name).exists() and not (path / name).is_file():
            return f"{name} is no regular file"  # a pipe would be waited for
        try:
            if described(path / name) != expected:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def read_progress(path: Path, process: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the progress in the checkpoint `path` and what `process` wrote; {} if that process did not exist then."""
    part = path / f"process-{process:05d}.json"
    return read_json(path / "progress.json"), read_json(part) if part.exists() else {}


def check_fits(path: Path, model: nn.Module, what: str = "model") -> None:
    """Raise ValueError, naming a tensor, if the checkpoint `path` holds a different model (or another `what`)."""
    with safe_open(path / f"{what}.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} is of another {what}, with which this one cannot continue: {name} has the shape "
                f"{saved.get(name)} there and {wanted.get(name)} here. Choose another run.output_dir"
            )


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Restore the result of `optimizer_tensors` for the parameters that are still trained."""
    parameters = dict(model.named_parameters())
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    saved = {key: tensor for key, tensor in saved.items() if id(parameters[key.partition(".")[2]]) in index}
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in saved.items():
        kind, _, name = key.partition(".")
        # load_state_dict keeps what it is given: a view of the mapped file, which may be deleted or replaced
        tensor = tensor.clone()
        if tensor.shape == parameters[name].shape:
            tensor = torch.empty_like(parameters[name], dtype=tensor.dtype).copy_(like(tensor, parameters[name]))
        states.setdefault(index[id(parameters[name])], {})[kind] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """Return what decides, besides the config, in which order numbers are summed. Runs with the same surroundings are
    bit-identical.
    """
    cuda = accelerator.device.type == "cuda"
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else str(accelerator.device.type),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the optimizer's state by its kind and the name of its parameter."""
    return [
        (f"{kind}.{key}", value)
        for key, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, gathered on every process if it is sharded; in that case, all processes must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the device of `reference`, sharded over the processes like it."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def _rng_state(device: torch.device) -> dict[str, Any]:
    _, key, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "python": random.getstate(),
        "numpy": ["MT19937", key.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state().cpu().numpy().tobytes().hex()
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Restore the random states of this process."""
    version, key, gauss = state["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(_bytes(state["device"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
