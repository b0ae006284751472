"""Objective in training: schedules, and its state between steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .objective import START_SCALE, ObjectiveConfig, ObjectiveTerms, VAEObjective, rate_per_channel

SMALLEST_SCALE = 2 / 65535 / math.sqrt(12)
"""Smallest optimal scale: the std of rounding to 16 bits. No file is more exact, and without it the loss is
unbounded."""
DEVIATION_HALF_LIFE = 1_000  # half-life, in images, of a step's weight in an optimal scale's mean


class RateController:
    """PI controller that changes the weight of the rate until the mean rate is `target`, in nats per image.

    It follows ControlVAE (Shao 2020, section 3), where beta = Kp / (1 + exp(target - rate)) + Ki * sum(rate - target) +
    beta_min with the sign of the error reversed. For rates of hundreds of nats, that exponential is 0 or infinite, and
    the sum is proportional to the rate: every target would need different gains, and a beta between 1e-6 and 1 steps of
    1e-7. Both sides are therefore logarithms: log(rate / target) changes the logarithm of the weight. The gains count
    in steps, not images, because Adam moves parameters by about the learning rate per step for any batch size.
    """

    GAIN = 1.0
    """Change of log(weight) per log(rate / target). Adam's momentum delays the rate by about ten steps: the rate of an
    MLP on MNIST swings by 4 % within 16 steps; with 2 by 7 %, with 4 by 13 %."""
    INTEGRAL_STEPS = 5
    """Number of steps in which the integral of a constant error changes log(weight) by as much as `GAIN` does. The
    weight rises while the model learns, by a factor of 500 within 750 steps of a small network on the digits: with
    `GAIN` / 8, a run with a target of 60 nats and equivariance ended 5 % too high."""
    LARGEST_ERROR = 0.25
    """Limit of |log(rate / target)|: a larger error, as at the start of a run, changes the weight by a factor of at
    most 1.05 per step through the integral. With 1 and a `GAIN` of 6, the weight of an MLP on MNIST fell to 1e-8 before
    its units became active, and its ELBO ended 8 nats lower."""
    BOUND = math.log(1e8)
    """Largest change of log(weight) from its start."""

    def __init__(self, target: float, start: float):
        self.target, self.start = target, start
        self.error = self.integral = 0.0

    @property
    def kl_weight(self) -> float:
        """Return the weight of the rate in the next step."""
        return self.start * math.exp(_clip(self.GAIN * self.error + self.integral, self.BOUND))

    def update(self, rate: float) -> None:
        """Adjust the weight after a step with this mean rate, in nats per image."""
        error = math.log(rate / self.target) if rate > 0 else -math.inf
        self.error = _clip(error, self.LARGEST_ERROR)
        # bound the integral itself, so that it leaves the bound as soon as the error changes sign
        self.integral = _clip(self.integral + self.GAIN / self.INTEGRAL_STEPS * self.error, self.BOUND)


def _clip(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


class TrainingObjective:
    """Objective in training, with everything that depends on the progress of the run and on earlier steps.

    A step is `begin_step`, one call per micro-batch, and `end_step` with the statistics of its whole batch: the sum of
    share * statistics over its parts. Terms that are not linear in the images depend on earlier steps only, so that a
    step does not depend on how its batch is split:

    - free bits charge the channels whose mean rate in the step before exceeded them; in the first step, all channels.
    - an optimal scale comes from earlier steps, half of it from the last 1,000 images. It is a constant of the step,
    because at the optimum the loss has no gradient with respect to it: Rybkin 2021, optimal sigma-VAE.
    - the controller of a target rate uses whole steps.

    Equivariance makes some images smaller, which lowers their rates: free bits and the controller use only images that
    were encoded at full size. In an optimal scale, images count in proportion to their number of values.
    """

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        start = START_SCALE if isinstance(config.scale, str) else None
        self._objective = replace(config.build(start), free_bits=config.free_bits)
        self._controller = RateController(config.target_rate, config.kl_weight) if config.target_rate else None
        self._kl_weight: float | None = None  # of the current step
        self._channel_rates: list[float] | None = None
        self._deviation = self._deviation_weight = 0.0

    def begin_step(self, images_seen: int, total_images: int) -> dict[str, float]:
        """Start the step after `images_seen` of `total_images` images; return the values that vary, to log."""
        readings: dict[str, float] = {}
        scheduled = self.config.kl_weight_at(images_seen, total_images)
        self._kl_weight = self._controller.kl_weight if self._controller else scheduled
        if self._controller or self.config.kl_schedule != "constant":
            readings["kl_weight"] = self._kl_weight
        if self.config.scale == "optimal":
            readings["scale"] = self._optimal_scale()
        return readings

    def __call__(
        self,
        images: torch.Tensor,
        reconstructions: torch.Tensor,
        posterior: DiagonalGaussianDistribution,
        log_scale: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        *,
        encoded_whole: bool = True,
        size: float = 1.0,
    ) -> ObjectiveTerms:
        """Return the terms of a micro-batch, with the results and errors of `VAEObjective` and the statistics for
        `end_step`.

        Args:
            log_scale: Natural logarithm of a learned scale, a scalar tensor; ValueError if the scale is not learned.
            encoded_whole: Whether the posterior is of images at full size.
            size: Number of values of one of these images, divided by the number at full size.
        """
        assert self._kl_weight is not None, "call begin_step first"
        scale = self._scale(log_scale)
        channel_rates = None
        if self.config.free_bits:
            channel_means = self._channel_rates or [math.inf] * posterior.mean.shape[1]
            channel_rates = torch.tensor(channel_means, dtype=torch.float32, device=posterior.mean.device)
        terms = self._objective(
            images,
            reconstructions,
            posterior,
            logits=logits,
            kl_weight=self._kl_weight,
            scale=scale,
            channel_rates=channel_rates,
        )
        statistics: dict[str, torch.Tensor] = {}
        if self._controller or self.config.free_bits:
            statistics["encoded_whole"] = torch.full_like(terms.loss.detach(), float(encoded_whole))
        if self._controller:
            statistics["rate"] = encoded_whole * terms.rate.detach().mean()
        if self.config.free_bits:
            statistics["channel_rates"] = encoded_whole * rate_per_channel(posterior).detach().mean(0)
        if self.config.scale == "optimal":
            exact = terms.distortion.dtype
            likelihood: Any = self._objective.likelihood
            deviation = likelihood.deviation(images.to(exact), reconstructions.detach().to(exact))
            statistics["size"] = torch.full_like(terms.loss.detach(), size)
            statistics["deviation"] = size * deviation.mean()
        return replace(terms, statistics=statistics)

    def end_step(self, statistics: dict[str, torch.Tensor], images: int) -> None:
        """Store the means over the `images` images of an applied step; ValueError if one is not finite."""
        for name, value in statistics.items():
            if not value.isfinite().all():
                raise ValueError(f"the statistics of an applied step must be finite, got {name} {value}")
        encoded_whole = statistics["encoded_whole"].item() if "encoded_whole" in statistics else 0.0
        if self._controller and encoded_whole:
            self._controller.update(statistics["rate"].item() / encoded_whole)
        if self.config.free_bits and encoded_whole:
            self._channel_rates = (statistics["channel_rates"] / encoded_whole).tolist()
        if self.config.scale == "optimal":
            size = statistics["size"].item()
            decay = 0.5 ** (images * size / DEVIATION_HALF_LIFE)
            self._deviation = decay * self._deviation + (1 - decay) * statistics["deviation"].item() / size
            self._deviation_weight = decay * self._deviation_weight + (1 - decay)

    def state(self) -> dict[str, Any]:
        """Return the state that the next step depends on, as JSON values."""
        state = {}
        if self._controller:
            state |= {"rate_error": self._controller.error, "rate_integral": self._controller.integral}
        if self.config.free_bits:
            state["channel_rates"] = self._channel_rates
        if self.config.scale == "optimal":
            state |= {"deviation": self._deviation, "deviation_weight": self._deviation_weight}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`. Parts that were not in use then start over."""
        if self._controller and "rate_error" in state:
            self._controller.error, self._controller.integral = state["rate_error"], state["rate_integral"]
        if self.config.free_bits and "channel_rates" in state:
            self._channel_rates = state["channel_rates"]
        if self.config.scale == "optimal" and "deviation" in state:
            self._deviation, self._deviation_weight = state["deviation"], state["deviation_weight"]

    def measured(self, log_scale: float | None = None) -> VAEObjective:
        """Return the objective for measurements: full or controlled kl_weight, current scale, no free bits."""
        objective = self.config.build(self._scale(log_scale))
        return replace(objective, kl_weight=self._controller.kl_weight) if self._controller else objective

    def _optimal_scale(self) -> float:
        if not self._deviation_weight:
            return START_SCALE
        likelihood: Any = self._objective.likelihood
        return max(likelihood.optimal_scale(self._deviation / self._deviation_weight), SMALLEST_SCALE)

    def _scale(self, log_scale: Any) -> Any:
        """Return the value of a learned scale, a tensor if its logarithm is one, or of an optimal scale; otherwise
        None.
        """
        if (log_scale is not None) != (self.config.scale == "learned"):
            raise ValueError(
                f"log_scale belongs to objective.scale learned, got {log_scale} with objective.scale "
                f"{self.config.scale}"
            )
        if log_scale is not None:
            return log_scale.exp() if isinstance(log_scale, torch.Tensor) else math.exp(log_scale)
        return self._optimal_scale() if self.config.scale == "optimal" else None
