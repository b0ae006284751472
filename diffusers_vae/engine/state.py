"""The state of a run between two steps, which is what a checkpoint holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from .checkpoint import (
    check_fits,
    like,
    optimizer_tensors,
    read_progress,
    restore_optimizer,
    restore_rng,
    surroundings,
    whole,
    write_checkpoint,
)
from .config import RunSettings
from .step import Discriminator, StepTerms
from .terms import RunningTerms, sum_gradients

logger = logging.getLogger(__name__)


class TrainState:
    """Model, optimizer, moving average, discriminator, gradient scaler, random states and progress of a run.

    Args:
        accelerator: accelerator of the launch.
        build: returns a new model; called once after seeding, and on the meta device for copies.
        config: settings with the sections `run` and `optimizer`.
        terms: names of the logged terms, `Step.terms`.
        blank: returns a scalar that depends on every parameter by one call of the model's `forward`.
        discriminator: second module that is trained with the model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        build: Callable[[], nn.Module],
        config: RunSettings,
        terms: tuple[str, ...],
        blank: Callable[[nn.Module], torch.Tensor],
        discriminator: Discriminator | None = None,
    ):
        run = config.run
        self.accelerator, self.build, self.discriminator = accelerator, build, discriminator
        set_seed(run.seed)
        model = build()
        capturable = accelerator.device.type == "cuda" and not accelerator.scaler
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            # a tensor, since a captured step reads it at each replay
            lr=torch.zeros((), device=accelerator.device) if capturable else 1e-3,
            capturable=capturable,
            betas=config.optimizer.betas,
            weight_decay=0.0,
            # with a scaler, a fused one hides from Accelerate which steps were skipped
            fused=(accelerator.device.type in ("cpu", "cuda") and not accelerator.scaler) or None,
        )
        self.model, self.optimizer = cast(tuple[nn.Module, AcceleratedOptimizer], accelerator.prepare(model, optimizer))
        self.plain_model: nn.Module = accelerator.unwrap_model(self.model)
        self.parameters = list(self.plain_model.parameters())  # listing them takes as long as a small model's step
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.ema: EMAModel | None = None
        self.ema_share = torch.zeros((), device=accelerator.device)
        """1 - decay of the moving average in the next step."""
        if run.ema_decay:
            # The decay rises as step / (step + 20): the average reaches back over a twentieth of the steps so far, as
            # with the power functions of Karras et al. 2024. A longer one holds weights from a phase of higher
            # learning rates.
            self.ema = EMAModel(
                self.parameters,
                run.ema_decay,
                use_ema_warmup=True,
                inv_gamma=20,
                power=1,
                foreach=not accelerator.is_fsdp2,
            )
        if accelerator.num_processes > 1:
            # DistributedDataParallel orders its buckets by its first backward. Without this one, which leaves no trace,
            # the first step of a resumed run would sum the gradients of three or more processes in another order.
            accelerator.backward(blank(self.model))
            self.optimizer.zero_grad()
        set_seed(run.seed, device_specific=True)  # for whatever samples without a generator of its own
        self.epoch = self.step = self.images_seen = self.skipped = self.skipped_in_a_row = 0
        self.changes: list[str] = []
        """Descriptions of changed surroundings, such as the number of threads."""
        self.interval, self.epoch_terms = (RunningTerms(accelerator, terms) for _ in range(2))

    def progress(self) -> dict[str, int]:
        """Return the numbers of epochs begun, steps taken and images seen."""
        return {"epoch": self.epoch, "step": self.step, "images_seen": self.images_seen}

    def begin_step(self, learning_rate: float) -> None:
        """Set the learning rate of the model and the decay of the moving average. `Step.begin` sets the learning rate
        of the discriminator.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if self.ema and self.ema_share.is_cuda:
            self.ema_share.fill_(1 - self.ema.get_decay(self.ema.optimization_step + 1))

    def synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are averaged over processes only for the `last` micro-batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, terms: StepTerms, share: float) -> StepTerms:
        """Add the gradients of a micro-batch with this `share` of the step's images; return its complete terms."""
        # Gradients are averaged over processes, so that this sums to the mean over the step's images.
        loss = terms.total_loss * share * self.accelerator.num_processes
        (self.accelerator.scaler.scale(loss) if self.accelerator.scaler else loss).backward()
        if terms.judge:
            terms = terms.judge()
            assert terms.discriminator_loss is not None
            (terms.discriminator_loss * share).backward()
        return terms

    def clip(self, max_norm: float | None, judged: bool) -> dict[str, torch.Tensor]:
        """Clip the norm of the gradients to `max_norm`, also for the discriminator if it was trained (`judged`).
        Return the norms before clipping.
        """
        accelerator, limit = self.accelerator, max_norm or float("inf")
        if accelerator.is_fsdp2:
            norm = accelerator.clip_grad_norm_(self.plain_model.parameters(), limit)
        else:
            accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
            if max_norm:
                nn.utils.clip_grads_with_norm_(self.trained, max_norm, norm)
        norms = {"gradient": cast(torch.Tensor, norm)}
        if judged and self.discriminator:
            module = self.discriminator.module
            sum_gradients(accelerator, module)
            norms["discriminator's gradient"] = nn.utils.clip_grad_norm_(module.parameters(), limit)
        return norms

    def is_float16_overflow(self, bad: list[str]) -> bool:
        """Return whether only the gradient is not finite and the float16 scaler can still lower its scale."""
        scaler = self.accelerator.scaler
        return bad == ["gradient"] and scaler is not None and scaler.get_scale() >= 1

    def take_step(self, judged: bool) -> bool:
        """Update weights and moving average; return False if the float16 scaler skipped the step."""
        if self.accelerator.scaler:
            self.optimizer.step()
            if self.optimizer.step_was_skipped:
                return False
            self._average()
        else:
            self.update()
        self.count_average()
        if judged and self.discriminator:
            self.discriminator.optimizer.step()
        return True

    def update(self) -> None:
        """Update weights and moving average on the device, without the counters on the CPU."""
        self.optimizer.optimizer.step()  # Accelerate's own looks for installed packages at every step
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        if not self.ema:
            return
        if not self.ema_share.is_cuda or self.accelerator.is_fsdp2:
            self.ema.step(self.parameters)
            self.ema.optimization_step -= 1  # which `count_average` counts
            return
        trained = [p for p in zip(self.ema.shadow_params, self.parameters, strict=True) if p[1].requires_grad]
        averages, parameters = (list(column) for column in zip(*trained, strict=True))
        lists: Any = torch  # whose operations on lists are named like private ones in torch 2.7 to 2.14
        apart = lists._foreach_sub(averages, parameters)
        lists._foreach_mul_(apart, self.ema_share)
        lists._foreach_sub_(averages, apart)

    def count_average(self) -> None:
        """Count a step of the moving average."""
        if self.ema:
            self.ema.optimization_step += 1

    def skip_step(self) -> None:
        """Count a non-finite step that was dropped."""
        if self.accelerator.scaler:
            self.accelerator.scaler.update()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    def zero_grad(self) -> None:
        """Discard the gradients."""
        for parameter in self.trained:
            parameter.grad = None
        if self.discriminator:
            self.discriminator.optimizer.zero_grad()

    @torch.no_grad()
    def averaged(self) -> nn.Module:
        """Return a complete copy of the model on every process, in eval mode, with the averaged weights if there are
        any.
        """
        with torch.device("meta"):
            kept = self.build()
        state = self.plain_model.state_dict()
        if self.ema:
            names = (name for name, _ in self.plain_model.named_parameters())
            state |= dict(zip(names, self.ema.shadow_params, strict=True))
        kept.to_empty(device=self.accelerator.device)
        kept.load_state_dict({name: whole(tensor) for name, tensor in state.items()})
        for name, buffer in self.plain_model.named_buffers():  # those that are not saved, too
            kept.get_buffer(name).copy_(buffer)
        return kept.eval().requires_grad_(False)

    def save(self, folder: Path, step_state: dict[str, Any], copies: list[Path], keep: int) -> Path:
        """Write the checkpoint `folder/images-NNN` with the state of the `Step` and `copies` of files, delete all but
        the newest `keep`, and return its path. All processes call it. Raises the errors of `write_checkpoint`.
        """
        accelerator = self.accelerator
        progress = self.progress() | {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "changes": self.changes,
            "task": step_state,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "ema_steps": self.ema.optimization_step if self.ema else None,
            "surroundings": surroundings(accelerator),
        }
        sums = {"interval": self.interval.sums.tolist(), "epoch": self.epoch_terms.sums.tolist()}
        return write_checkpoint(folder, accelerator, self._tensors(), progress, sums, copies, keep)

    @torch.no_grad()
    def load(self, path: Path) -> dict[str, Any]:
        """Restore the checkpoint at `path`, and return the state of the `Step`. A discriminator that the checkpoint
        does not hold keeps its weights.

        Raises:
            ValueError: if it holds another model or discriminator.
        """
        accelerator, model = self.accelerator, self.plain_model
        check_fits(path, model)
        progress, part = read_progress(path, accelerator.process_index)
        saved = load_file(path / "model.safetensors")
        for key, tensor in model.state_dict().items():
            tensor.copy_(like(saved[key], tensor))
        if self.ema:
            self.ema.optimization_step = progress["ema_steps"] or 0
            averages = load_file(path / "ema.safetensors") if (path / "ema.safetensors").exists() else saved
            for (key, _), tensor in zip(model.named_parameters(), self.ema.shadow_params, strict=True):
                tensor.copy_(like(averages[key], tensor))
        restore_optimizer(self.optimizer.optimizer, model, load_file(path / "optimizer.safetensors"))
        if self.discriminator and (path / "discriminator.safetensors").exists():
            module, optimizer = self.discriminator
            check_fits(path, module, "discriminator")
            module.load_state_dict(load_file(path / "discriminator.safetensors"))
            restore_optimizer(optimizer, module, load_file(path / "discriminator_optimizer.safetensors"))
        if accelerator.scaler and progress["scaler"]:
            accelerator.scaler.load_state_dict(progress["scaler"])
        if part:
            restore_rng(part["rng"], accelerator.device)
        for name in ("epoch", "step", "images_seen", "skipped", "skipped_in_a_row"):
            setattr(self, name, progress[name])
        self._note_changes(progress)
        self._restore_sums(path, part, progress["surroundings"]["processes"])
        return progress.get("task", {})

    def _note_changes(self, progress: dict[str, Any]) -> None:
        before, now = progress["surroundings"], surroundings(self.accelerator)
        differing = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        self.changes = progress["changes"] + differing
        if self.changes and self.accelerator.is_main_process:
            logger.warning(
                "the order of images is the same, and their noise on the same kind of device, but sums are rounded "
                "differently, so that this run is no longer bit-identical to one without interruption: %s",
                ", ".join(self.changes),
            )

    def _restore_sums(self, path: Path, part: dict[str, Any], processes: int) -> None:
        """Restore this process's sums of terms; the main process adds those of processes that no longer exist."""
        parts = [part]
        if self.accelerator.is_main_process:
            gone = range(self.accelerator.num_processes, processes)
            parts += [read_progress(path, process)[1] for process in gone]
        for name, running in (("interval", self.interval), ("epoch", self.epoch_terms)):
            # sums of other terms, after a change of settings, are dropped: the mean starts over
            kept = [part[name] for part in parts if len(part.get(name, ())) == len(running.sums)]
            if kept:
                running.put(np.sum(kept, axis=0).tolist())

    def _tensors(self) -> dict[str, list[tuple[str, torch.Tensor]]]:
        """Return the tensors of each file by name."""
        files = {
            "model.safetensors": list(self.plain_model.state_dict().items()),
            "optimizer.safetensors": optimizer_tensors(self.optimizer.optimizer, self.plain_model),
        }
        if self.ema:
            names = (key for key, _ in self.plain_model.named_parameters())
            files["ema.safetensors"] = list(zip(names, self.ema.shadow_params, strict=True))
        if self.discriminator:
            module, optimizer = self.discriminator
            files["discriminator.safetensors"] = list(module.state_dict().items())
            files["discriminator_optimizer.safetensors"] = optimizer_tensors(optimizer, module)
        return files
