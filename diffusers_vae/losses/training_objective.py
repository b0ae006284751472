"""The objective while it trains: schedules, and what it remembers between steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .objective import START_SCALE, ObjectiveConfig, ObjectiveTerms, VAEObjective, rate_per_channel

SMALLEST_SCALE = 2 / 65535 / math.sqrt(12)
"""Of an optimal scale: the std of rounding to 16 bits. No file is more exact, and below it the loss has no bound."""
DEVIATION_HALF_LIFE = 1_000  # images after which a step counts half in the mean that an optimal scale is computed from


class RateController:
    """A PI controller that moves the weight of the rate until the mean rate is `target`, nats per image.

    It follows ControlVAE (Shao 2020, section 3), where beta = Kp / (1 + exp(target - rate)) + Ki * sum(rate - target)
    + beta_min with the error turned round. At rates of hundreds of nats that exponential is 0 or infinite, the sum is
    proportional to the rate, so that every target needs its own gains, and a beta between 1e-6 and 1 would need steps
    of 1e-7. Here both sides are logarithms: log(rate / target) moves the logarithm of the weight. The gains count in
    steps, not images, because Adam moves parameters by about the learning rate per step, whatever the batch size.
    """

    GAIN = 1.0
    """Change of log(weight) per log(rate / target). Adam's momentum delays the rate by about ten steps: that of an MLP
    on MNIST swings by 4 % within 16 steps, with 2 by 7 %, with 4 by 13 %."""
    INTEGRAL_STEPS = 5
    """Steps in which a constant error moves log(weight) through the integral by as much as through `GAIN`. The weight
    rises while the model learns, 500 times within 750 steps of a small network on the digits: with `GAIN` / 8, a target
    of 60 nats with equivariance ended 5 % too high."""
    LARGEST_ERROR = 0.25
    """Largest log(rate / target) that counts: one farther away, as at the start of a run, moves the weight by a factor
    of at most 1.05 per step by the integral. With 1 and a `GAIN` of 6, the weight of an MLP on MNIST fell to 1e-8
    before its units came into use, and its ELBO ended 8 nats lower."""
    BOUND = math.log(1e8)
    """Largest change of log(weight) from its start."""

    def __init__(self, target: float, start: float):
        self.target, self.start = target, start
        self.error = self.integral = 0.0

    @property
    def kl_weight(self) -> float:
        """Weight of the rate in the next step."""
        return self.start * math.exp(_clip(self.GAIN * self.error + self.integral, self.BOUND))

    def update(self, rate: float) -> None:
        """Adjust the weight after a step with this mean rate, nats per image."""
        error = math.log(rate / self.target) if rate > 0 else -math.inf
        self.error = _clip(error, self.LARGEST_ERROR)
        # the integral itself is bounded, so that it leaves the bound as soon as the error changes its sign
        self.integral = _clip(self.integral + self.GAIN / self.INTEGRAL_STEPS * self.error, self.BOUND)


def _clip(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


class TrainingObjective:
    """The objective as it is trained: what depends on how far the run is, and on the steps before.

    A step is `begin_step`, one call per micro-batch, and `end_step` with the statistics of its whole batch: the sum of
    share * statistics over its parts. What is not linear in the images depends on the steps before only, so that a step
    is the same however its batch is cut:

    - free bits press the channels whose mean rate in the step before was above; in the first step, all.
    - an optimal scale comes from the steps before, half of it from the last 1,000 images. It is a constant of the step,
      as at the optimum the loss has no gradient to it: Rybkin 2021, optimal sigma-VAE.
    - the controller of a target rate sees whole steps.

    Equivariance makes some images smaller, which lowers their rates: free bits and the controller use only images that
    were encoded at full size. In an optimal scale, images count in proportion to their number of values.
    """

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        start = START_SCALE if isinstance(config.scale, str) else None
        self._objective = replace(config.build(start), free_bits=config.free_bits)
        self._controller = RateController(config.target_rate, config.kl_weight) if config.target_rate else None
        self._kl_weight: float | None = None  # of the step that is under way
        self._channel_rates: list[float] | None = None
        self._deviation = self._deviation_weight = 0.0

    def begin_step(self, images_seen: int, total_images: int) -> dict[str, float]:
        """Set the step after `images_seen` of `total_images` images; return the values that vary, to log."""
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
        """The terms of a micro-batch, as `VAEObjective` returns and refuses them, with the statistics for `end_step`.

        Args:
            log_scale: natural logarithm of a learned scale, a scalar tensor; ValueError where it does not belong.
            encoded_whole: whether the posterior is of images at their full size.
            size: number of values of one of these images, divided by that of an image at its full size.
        """
        assert self._kl_weight is not None, "begin_step comes first"
        scale = self._scale(log_scale)
        channel_rates = None
        if self.config.free_bits:
            known = self._channel_rates or [math.inf] * posterior.mean.shape[1]
            channel_rates = torch.tensor(known, dtype=torch.float32, device=posterior.mean.device)
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
        """Remember the means over the `images` images of a step that was taken; ValueError when one is not finite."""
        for name, value in statistics.items():
            if not value.isfinite().all():
                raise ValueError(f"the statistics of a step that is taken must be finite, got {name} {value}")
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
        """What the next step depends on, for JSON."""
        state = {}
        if self._controller:
            state |= {"rate_error": self._controller.error, "rate_integral": self._controller.integral}
        if self.config.free_bits:
            state["channel_rates"] = self._channel_rates
        if self.config.scale == "optimal":
            state |= {"deviation": self._deviation, "deviation_weight": self._deviation_weight}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; parts that were not in use then begin anew."""
        if self._controller and "rate_error" in state:
            self._controller.error, self._controller.integral = state["rate_error"], state["rate_integral"]
        if self.config.free_bits and "channel_rates" in state:
            self._channel_rates = state["channel_rates"]
        if self.config.scale == "optimal" and "deviation" in state:
            self._deviation, self._deviation_weight = state["deviation"], state["deviation_weight"]

    def measured(self, log_scale: float | None = None) -> VAEObjective:
        """The objective to measure by: the full or controlled kl_weight, the present scale, no free bits."""
        objective = self.config.build(self._scale(log_scale))
        return replace(objective, kl_weight=self._controller.kl_weight) if self._controller else objective

    def _optimal_scale(self) -> float:
        if not self._deviation_weight:
            return START_SCALE
        likelihood: Any = self._objective.likelihood
        return max(likelihood.optimal_scale(self._deviation / self._deviation_weight), SMALLEST_SCALE)

    def _scale(self, log_scale: Any) -> Any:
        """Value of a learned scale, as a tensor if its logarithm is one, or of an optimal one; else None."""
        if (log_scale is not None) != (self.config.scale == "learned"):
            raise ValueError(
                f"log_scale is the parameter of objective.scale learned, got {log_scale} with objective.scale "
                f"{self.config.scale}"
            )
        if log_scale is not None:
            return log_scale.exp() if isinstance(log_scale, torch.Tensor) else math.exp(log_scale)
        return self._optimal_scale() if self.config.scale == "optimal" else None
