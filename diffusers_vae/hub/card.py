"""Model card of a finished run."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, Template
from markupsafe import Markup

from ..data import DataConfig
from ..engine.config import RunConfig
from ..evaluation.figures import FIGURES, Figure, changed_figures, missed_target, source_name
from ..fields import with_traits
from ..images.ranges import ValueRange
from ..losses.adversarial import AdversarialConfig
from ..losses.objective import ObjectiveConfig
from ..messages import quoted, showable
from ..models import ModelConfig, compression_ratio
from ..reports.pictures import CAPTIONS
from ..storage import write_file
from .config import HubConfig
from .run import ADAPTER, HUB_DATA, RECIPE, FinishedRun, without_places

DATA_NAMES = {
    "digits": "scikit-learn's digits",
    "mnist": "MNIST",
    "qmnist": "QMNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "folder": "a folder of images",
    "array": "NumPy arrays of images",
    "datasets": "a data set of rows",
}
OPTIONS = {
    f"{section}.{option.name}": option.default
    for section, settings, always in (
        ("objective", ObjectiveConfig, {"likelihood", "scale", "kl_weight"}),
        ("model", ModelConfig, {"architecture"}),
        ("adversarial", AdversarialConfig, {"weight", "loss", "start_images", "adaptive", "norm", "width", "layers"}),
    )
    for option in fields(settings)
    if option.name not in always
}
"""Settings that the card mentions only if they are used, with their defaults."""
NOT_RECIPE = {name for kind in (DataConfig, ModelConfig, RunConfig) for name in with_traits(kind, "local")}


def render_card(run: Path, config: HubConfig | None = None) -> str:
    """Return the model card of a finished run: Markdown after YAML metadata, all from the run's files. Without a
    `repo_id`, it loads the model from the run's folder.

    Raises:
        ValueError: If the run is not finished.
    """
    return render(FinishedRun.read(run), config or HubConfig())


def write_card(run: Path, config: HubConfig, evaluation: dict[str, Any]) -> None:
    """Write the card as README.md of a run whose evaluation.json will be `evaluation`."""
    write_file(run / "README.md", render(FinishedRun.read(run, evaluation), config))


def render(run: FinishedRun, config: HubConfig) -> str:
    """Return the text of the model card."""
    evaluation, protocol = run.evaluation, without_places(run.evaluation["protocol"])
    stock = run.model["_class_name"] == "AutoencoderKL"
    data = run.config["data"]
    size = [data["resolution"]] * 2 if isinstance(data["resolution"], int) else data["resolution"]
    trained_on = DATA_NAMES.get(data["name"], data["name"])
    if data["name"] == "datasets" and run.trained_on:
        trained_on = run.trained_on
    measured_on = DATA_NAMES.get(protocol["data"], protocol["data"])
    measured = {key: figure for key, figure in FIGURES.items() if evaluation.get(key) is not None}
    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="Image reconstruction",
            dataset_type=str(HUB_DATA.get(protocol["data"], protocol["data"])),
            dataset_name=str(measured_on),
            dataset_split=protocol["split"],
            metric_type=key,
            metric_name=figure.label,
            metric_value=evaluation[key],
        )
        for key, figure in measured.items()
    ]
    name = config.repo_id.rpartition("/")[2] if config.repo_id else showable(run.name)
    base_model = config.base_model or run.base_model
    card_data = ModelCardData(
        license=config.license,
        library_name="diffusers" if stock else "diffusers_vae",
        tags=["autoencoder", "vae", "autoencoder-kl" if stock else "mlp-vae", "diffusers_vae"],
        base_model=base_model,
        datasets=[run.trained_on] if run.trained_on else None,
        model_name=name,
        eval_results=results,
    )
    return str(
        ModelCard(
            _template().render(
                card_data=Markup(card_data.to_yaml()),
                code=_code,
                string=lambda text: Markup(quoted(text)),
                url=lambda text: quote(text, safe=""),
                shell=shlex.quote,
                name=name,
                stock=stock,
                class_name="AutoencoderKL" if stock else "MLPVAE",
                source=config.repo_id or (run.path / "model").as_posix(),
                revision=config.revision if config.repo_id else None,
                repository=config.repo_id or run.path.as_posix(),
                license=config.license,
                base_model=base_model,
                fine_tuning=_fine_tuning(run),
                evaluation=evaluation,
                missed_target=missed_target(evaluation),
                protocol=protocol,
                model=evaluation["model"],
                scaled_std=_scaled_std(run.model, evaluation["latents"]["std"]),
                by_channel=_by_channel(run.model),
                posterior=evaluation["posterior"],
                trained_on=trained_on,
                value_range=ValueRange.load(run.path / "model"),
                size="x".join(map(str, size)),
                measured_on=measured_on,
                rows=[_row(key, figure, evaluation) for key, figure in measured.items()],
                recipe=_recipe(without_places(run.config)),
                pushes=run.config.get("hub", {}).get("push", False),
                pictures=[(name, *CAPTIONS[name]) for name in run.pictures],
                measured_latents=run.config["evaluation"].get("max_images"),
                ratio=compression_ratio(run.model["block_out_channels"]) if stock else None,
                perceptual=run.config["objective"].get("perceptual"),
                adversarial=run.config.get("adversarial", {}).get("weight"),
            )
        )
    )


def _by_channel(config: Mapping[str, Any]) -> bool:
    """Return whether the autoencoder's config has a mean and a std for each latent channel."""
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def _scaled_std(config: Mapping[str, Any], stds: list[float]) -> list[float] | None:
    """Return the std of the scaled latents per channel, given `stds` of the latents; None without a scaling_factor."""
    if config.get("scaling_factor") is None:
        return None
    divisors = config["latents_std"] if _by_channel(config) else [1.0] * len(stds)
    return [std * config["scaling_factor"] / divisor for std, divisor in zip(stds, divisors, strict=True)]


def _plain(value: object) -> Markup:
    """Return `value` as literal text in Markdown."""
    if isinstance(value, Markup):
        return value
    text = html.escape(showable(value), quote=False)
    return Markup(re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text))  # a_b is not emphasis


def _code(value: object) -> Markup:
    """Return `value` as a code span in Markdown."""
    text = showable(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


@cache
def _template() -> Template:
    """Return model_cards/template.md: in the package if installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside, beside = (folder / "model_cards" / "template.md" for folder in (package, package.parent))
    text = (inside if inside.exists() else beside).read_text(encoding="utf-8")
    return Environment(finalize=_plain).from_string(text)


def _row(key: str, figure: Figure, evaluation: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return name, value, interval and meaning, as the card shows them."""
    interval = evaluation["intervals"].get(key)
    shown = f"{interval[0]:,.{figure.digits}f} to {interval[1]:,.{figure.digits}f}" if interval else ""
    meaning = f"{figure.unit}; {figure.meaning}".removeprefix("; ")
    return figure.label, f"{evaluation[key]:,.{figure.digits}f}", shown, meaning


def _fine_tuning(run: FinishedRun) -> dict[str, Any] | None:
    """Return the card's description of a run that began with a trained autoencoder, or None."""
    found, settings = run.evaluation.get("fine_tuning"), run.config["model"]
    if found is None:
        return None
    train = settings["train"]
    trained = {"decoder": "its decoder was trained", "all": "all of it was trained"}.get(str(train))
    if run.lora_rank:
        trained = f"adapters of rank {run.lora_rank} on its decoder (LoRA) were trained, and merged into its weights"
    elif trained is None:
        trained = Markup(f"what {', '.join(map(_code, train))} matches of it was trained")
    changes = [
        (figure.label, f"{mean} {figure.unit}".strip(), f"{low} to {high}")
        for figure, mean, low, high in changed_figures(found["differences"])
    ]
    return found | {
        "name": run.base_model or source_name(found),
        "link": run.base_model,
        "subfolder": settings.get("subfolder"),
        "trained": trained,
        "changes": changes,
        "adapter": ADAPTER if run.lora_rank else None,
    }


def _recipe(config: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the settings that determine the result, section by section."""
    rows = []
    for section in RECIPE + (("adversarial",) if config.get("adversarial", {}).get("weight") else ()):
        values = {
            key: value
            for key, value in config[section].items()
            if key not in NOT_RECIPE and value not in (None, OPTIONS.get(f"{section}.{key}"))
        }
        rows.append((section, ", ".join(f"{key} {json.dumps(value).strip(chr(34))}" for key, value in values.items())))
    return rows
