"""The state of a run on disk: written whole or not at all, checked before it is read, restored exactly.

A checkpoint is a folder `images-NNN` of plain files: weights, EMA weights and optimiser state as safetensors; JSON for
the rest; copies of config.yaml and metrics.jsonl; and a manifest with the size and SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import accelerate
import diffusers
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on all of them; what goes wrong there is raised on all."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except (FloatingPointError, OSError, ValueError) as error:
            outcome = [None, error]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, whatever the file system refuses is an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot write {path}: {reason}") from error


def acquire(lock: FileLock, doing: str, setting: str) -> None:
    """Take the lock of the folder that it lies in, which is made if it is not there. It is waited for, some seconds, in
    case that what is left of a killed process has it.

    Raises:
        OSError: when another process is `doing` something there, or `setting`, which names the folder, is no folder.
    """
    folder = Path(lock.lock_file).parent
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{setting} must be a folder, got the file {folder.resolve()}")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s is in use: waiting, in case it is by what is left of a killed process", folder)
            lock.acquire(timeout=15)
    except Timeout as error:
        raise OSError(
            f"another process is {doing} {folder.resolve()}: wait for its end or choose another {setting}"
        ) from error
    except NotImplementedError:
        logger.warning("%s cannot be locked: take care that no two processes use it", folder)


def config_of_run(source: str) -> Path | None:
    """The config.yaml of the run that the folder `source`, or its model/, is of; None if it is of none. A run that was
    published has it beside the model.
    """
    for folder in (Path(source), Path(source).resolve().parent):
        file = folder / "config.yaml"
        if file.is_file() and ((folder / "model").is_dir() or (folder / "config.json").is_file()):
            return file
    return None


def read_settings(path: Path, *needed: str) -> dict[str, dict[str, Any]]:
    """The sections of a config.yaml; ValueError naming it when it is none, or lacks one that is `needed`."""
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged, no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise ValueError(f"{path} is damaged: it must hold sections of settings, got {str(settings)[:60]!r}")
    if missing := sorted(set(needed) - settings.keys()):
        raise ValueError(f"{path} is damaged: it has no section {', '.join(missing)}")
    return settings


def write_file(path: Path, text: str) -> None:
    """Put `text` in the place of whatever `path` holds, at once and on the disk."""
    with whole_file(path) as partial:
        partial.write_text(text)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end, on the disk. After an error there is no trace of it;
    OSErrors name `path`.
    """
    partial = _partial(path)
    with naming(path):
        try:
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `path` at the end, its files on the disk. After an error
    there is no trace of it; OSErrors name `path`.
    """
    partial, old = _partial(path), _old(path)
    with naming(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                _sync(file)
            _sync(partial)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


UMASK = os.umask(0o077)  # which can be asked for by being set alone
os.umask(UMASK)


def _sync(path: Path) -> None:
    """Have it on the disk, one of safetensors, which are made for their owner alone, as readable as others."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such thing for folders
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.partial"):
        with suppress(OSError):  # not every file system has such a thing
            path.chmod(0o666 & ~UMASK)
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Discriminator(NamedTuple):
    """A second module, which learns to tell images from reconstructions: small, and whole on every process."""

    module: nn.Module
    optimizer: torch.optim.Optimizer


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    discriminator: Discriminator | None,
    progress: dict[str, Any],
    own: dict[str, Any],
    copies: list[Path],
    keep: int,
) -> Path:
    """Write the state of the run as `folder/images-NNN`, delete all but the newest `keep`, and return its path.

    All processes call it: each writes its own part, and the main process the rest.

    Args:
        folder: of all checkpoints of the run, on storage that every process sees.
        accelerator: of the run.
        model: unwrapped, in training state.
        optimizer: of its parameters.
        ema: its moving average.
        discriminator: which is trained against it.
        progress: JSON, the same on all processes; with `images_seen`.
        own: JSON of this process.
        copies: files to be kept beside it, as they are now.
        keep: how many checkpoints are kept.

    Raises:
        FloatingPointError: when the weights are not finite, which would take the place of a good checkpoint.
        OSError: on all processes, naming the checkpoint, when it cannot be written; those before are untouched.
    """
    target = folder / f"images-{progress['images_seen']:012d}"
    partial = _partial(target)

    def begin() -> None:
        for what in ("model", "discriminator") if discriminator else ("model",):
            named = tensors[f"{what}.safetensors"]
            if bad := [name for name, tensor in named.items() if not tensor.isfinite().all()]:
                raise FloatingPointError(
                    f"training diverged after step {progress['step']}: {len(bad)} tensors of the {what} are not "
                    f"finite, {bad[0]} among them. The checkpoints in {folder} are from before"
                )
        with naming(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    tensors: dict[str, dict[str, torch.Tensor]] = {}
    # together, so nothing here may fail on one process
    for name, named in _tensors(model, optimizer, ema, discriminator).items():
        tensors[name] = {}
        for key, tensor in named:
            gathered = whole(tensor)
            if accelerator.is_main_process:
                tensors[name][key] = gathered.cpu().contiguous()

    def write() -> dict[str, dict[str, Any]]:
        """The part of this process, on the disk."""
        if not partial.exists():
            raise OSError("it is not there for all processes; run.output_dir must be on storage that they share")
        files = {f"process-{accelerator.process_index:05d}.json": own | {"rng": _rng_state(accelerator.device)}}
        if accelerator.is_main_process:
            files["progress.json"] = progress | {
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                "ema_steps": ema.optimization_step if ema else None,
                "surroundings": surroundings(accelerator),
            }
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, allow_nan=False))
        if accelerator.is_main_process:
            for name, content in tensors.items():
                save_file(content, partial / name)
            for path in copies:
                shutil.copyfile(path, partial / path.name)
            files |= tensors | {path.name: path for path in copies}
        for name in files:
            _sync(partial / name)
        return {name: described(partial / name) for name in files}

    def finish(parts: list[dict[str, dict[str, Any]]]) -> None:
        files = {name: description for part in parts for name, description in part.items()}
        with naming(target):
            manifest = {"format": FORMAT, "files": files, "sha256": _digest(FORMAT, files)}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            _sync(partial / MANIFEST)
            _sync(partial)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one that was passed over
            partial.rename(target)
            _sync(folder)
        tidy(folder, target, keep)

    try:
        on_main(accelerator, begin)
        try:
            with naming(target):
                outcome: Any = write()
        except OSError as error:
            outcome = error
        outcomes = gather_object([outcome])
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
        on_main(accelerator, lambda: finish(outcomes))
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with each newer one, a save cut short among them.

    Raises:
        ValueError: when there are checkpoints but none is whole.
    """
    damaged = [f"{partial} is half-written" for partial in sorted(folder.glob(".images-*.partial"))]
    found = sorted(folder.glob("images-*"), reverse=True)
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
    """Delete what was left behind by processes that were killed as they saved or deleted, and of the checkpoints up to
    `newest` all but the last `keep`.
    """
    for pattern in (".images-*.partial", ".images-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    found = sorted(path for path in folder.glob("images-*") if newest and path.name <= newest.name)
    for path in found[:-keep]:
        old = _old(path)  # so that half of one never looks like a damaged one
        try:
            path.rename(old)
            shutil.rmtree(old)
        except OSError as error:
            logger.warning("%s is no longer needed and cannot be deleted: %s", path, error)


def _problem(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["sha256"] != _digest(manifest["format"], files):
            raise KeyError("sha256")
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        return f"{MANIFEST} is missing or unreadable"
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{path} is of format {manifest['format']}, this version of diffusers_vae reads up to {FORMAT}; install a "
            "newer one"
        )
    for name, expected in files.items():
        try:
            if described(path / name) != expected:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _digest(version: int, files: dict[str, dict[str, Any]]) -> str:
    """Of the manifest itself."""
    return hashlib.sha256(json.dumps([version, files], sort_keys=True).encode()).hexdigest()


def read_progress(path: Path, process: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The progress in the checkpoint `path`, and what process `process` wrote, or {} if it was not there then."""
    own = path / f"process-{process:05d}.json"
    return json.loads((path / "progress.json").read_text()), json.loads(own.read_text()) if own.exists() else {}


def check_fits(path: Path, model: nn.Module, what: str = "model") -> None:
    """Raise ValueError, naming a tensor, when the checkpoint `path` is of another model, or another of `what`."""
    with safe_open(path / f"{what}.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} is of another {what}, with which this one cannot continue: {name} has the shape "
                f"{saved.get(name)} there and {wanted.get(name)} here. Choose another run.output_dir"
            )


def restore(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    discriminator: Discriminator | None,
) -> None:
    """Bring model, optimiser, EMA, discriminator, gradient scaler and this process's random states to what the
    checkpoint holds. A discriminator that it does not hold stays as it is.

    Raises:
        ValueError: when it is of another model or discriminator.
    """
    check_fits(path, model)
    progress, own = read_progress(path, accelerator.process_index)
    saved = load_file(path / "model.safetensors")
    state = model.state_dict()
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(_like(saved[key], tensor))
        if ema:
            ema.optimization_step = progress["ema_steps"]
            averages = load_file(path / "ema.safetensors")
            for (key, _), tensor in zip(model.named_parameters(), ema.shadow_params, strict=True):
                tensor.copy_(_like(averages[key], tensor))
    _restore_optimizer(optimizer, model, load_file(path / "optimizer.safetensors"))
    if discriminator and (path / "discriminator.safetensors").exists():
        check_fits(path, discriminator.module, "discriminator")
        discriminator.module.load_state_dict(load_file(path / "discriminator.safetensors"))
        moments = load_file(path / "discriminator_optimizer.safetensors")
        _restore_optimizer(discriminator.optimizer, discriminator.module, moments)
    if accelerator.scaler and progress["scaler"]:
        accelerator.scaler.load_state_dict(progress["scaler"])
    if own:
        _restore_rng(own["rng"], accelerator.device)


def _restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in saved.items():
        kind, _, name = key.partition(".")
        # load_state_dict keeps what it is given: a view of the mapped file, which may be deleted or replaced
        tensor = tensor.clone()
        placed = _like(tensor, parameters[name]) if tensor.shape == parameters[name].shape else tensor
        states.setdefault(index[id(parameters[name])], {})[kind] = placed
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """What decides, besides the config, in which order numbers are summed: results are bit-identical where it is the
    same.
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


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None, discriminator: Discriminator | None
) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """The tensors of each file by name."""
    files = {
        "model.safetensors": list(model.state_dict().items()),
        "optimizer.safetensors": _optimizer_tensors(optimizer, model),
    }
    if ema:
        names = (key for key, _ in model.named_parameters())
        files["ema.safetensors"] = list(zip(names, ema.shadow_params, strict=True))
    if discriminator:
        files["discriminator.safetensors"] = list(discriminator.module.state_dict().items())
        files["discriminator_optimizer.safetensors"] = _optimizer_tensors(discriminator.optimizer, discriminator.module)
    return files


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{kind}.{key}", value)
        for key, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whole on every process if it is sharded over them; then all must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Sharded over the processes as `reference` is."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def described(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _rng_state(device: torch.device) -> dict[str, Any]:
    _, key, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": ["MT19937", key.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state().cpu().numpy().tobytes().hex()
    return state


def _restore_rng(state: dict[str, Any], device: torch.device) -> None:
    version, key, gauss = state["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(_bytes(state["device"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
