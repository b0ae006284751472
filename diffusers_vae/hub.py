"""A finished run on the Hugging Face Hub: its model card, and the upload of what others need."""

from __future__ import annotations

import html
import io
import json
import logging
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    hf_hub_download,
)
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, LocalTokenNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, Template
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from .evaluation.figures import FIGURES, Figure, changed_figures, missed_target, source_name
from .evaluation.report import read_report, report_digest
from .losses.adversarial import AdversarialConfig
from .losses.objective import ObjectiveConfig
from .messages import changed_logs, hiding_passwords, quoted, showable, without_passwords
from .models import ModelConfig, cached_repository, find_subfolder, load_autoencoder, weights_hash
from .reports.pictures import CAPTIONS
from .settings import read_settings, to_yaml
from .storage import write_file
from .untrusted import open_regular, read_json, read_text, refuse_odd_name
from .values import RANGE_FILE, ValueRange

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubConfig:
    """Publishing on the Hugging Face Hub. The token is never a setting: it comes from `hf auth login` or HF_TOKEN."""

    push: bool = False
    """Upload the finished run."""
    repo_id: str | None = None
    """NAMESPACE/NAME of the model repository, created if it is missing."""
    private: bool = False
    """Visible to its owners only; an error if the repository is there and public."""
    revision: str | None = None
    """Branch, created if it is missing; or refs/pr/N, a pull request that is open. By default main."""
    commit_message: str | None = None
    """By default, which figures the model has."""
    create_pr: bool = False
    """Open a pull request instead of changing the main branch."""
    license: str | None = None
    """Of the weights, as the Hub abbreviates it: apache-2.0, mit, cc-by-nc-4.0, ... By default the card names none,
    and nobody else may use them."""
    base_model: str | None = None
    """NAMESPACE/NAME of the model that this one was made from, for the card; by default the repository on the Hub that
    the run loaded model.pretrained from, if any."""

    def __post_init__(self):
        if self.push and self.repo_id is None:
            raise ValueError("hub.push needs hub.repo_id, NAMESPACE/NAME of the repository, got null")
        for name in ("repo_id", "base_model"):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(f"hub.{name} must be NAMESPACE/NAME, got {value!r}: {error}") from error
            if "/" not in value and name == "repo_id":
                raise ValueError(f"hub.repo_id must be NAMESPACE/NAME, got {value!r}")
        for name in ("revision", "commit_message", "license"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"hub.{name} must not be empty; leave it out instead")
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError(
                "hub.create_pr opens a pull request against main, so hub.revision must be left out, got "
                f"{self.revision!r}"
            )

    def command(self, run: Path) -> str:
        """The command that uploads `run` with these settings."""
        words = ["diffusers-vae", "push", str(run.absolute()), self.repo_id or "NAMESPACE/NAME"]
        for name in ("private", "revision", "commit_message", "create_pr", "license", "base_model"):
            value = getattr(self, name)
            if value not in (None, False):
                words += [f"--{name}", "true" if value is True else value]
        return shlex.join(words)


@dataclass(frozen=True)
class _Run:
    """What the files of a finished run say."""

    path: Path
    evaluation: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    weights: list[str]
    """Names of the files in model/."""
    pictures: list[str]
    """Names of those that `draw_all` makes, in its order."""

    @classmethod
    def read(cls, path: Path, evaluation: dict[str, Any] | None = None) -> _Run:
        """With `evaluation` instead of what is in evaluation.json. Raises ValueError when the run is not finished or
        holds what must not be published.
        """
        if (path / "pipeline" / "model_index.json").is_file():
            raise ValueError(
                f"{path} is the run of a text-to-image model, and this is for autoencoders; publish its pipeline by "
                f"`hf upload ME/NAME {shlex.quote(path.absolute().as_posix())}/pipeline`"
            )
        for name in ("config.yaml", "model/config.json", "evaluation.json"):
            if not (path / name).is_file() and (name != "evaluation.json" or evaluation is None):
                raise ValueError(
                    f"a run that is published must be finished: {path / name} is missing. Continue the run with the "
                    "command that began it"
                )
        folder = path / "model"
        if pickles := sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES):
            raise ValueError(
                f"{folder} must hold weights as safetensors, got {', '.join(pickles)}, which can run code when loaded; "
                "remove them, or save the model again"
            )
        weights = _weights(folder)
        if not (folder / weights[-1]).is_file():
            raise ValueError(f"{folder} holds no weights, {weights[-1]}; train the model first")
        if evaluation is None:
            evaluation = json.loads(read_report(path / "evaluation.json").to_json())
        return cls(
            path,
            evaluation,
            read_settings(path / "config.yaml", "evaluation", *RECIPE),
            read_json(folder / "config.json"),
            weights,
            [name for name in CAPTIONS if (path / "pictures" / f"{name}.png").is_file()],
        )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def contents(self) -> dict[str, bytes | Path]:
        """What is uploaded besides the card, by its path in the repository: nothing that is not named here, none of it
        through a link, no token, and no path on this machine.

        Raises:
            ValueError: naming a file that is not what it should be.
        """
        report = read_json(self._own("evaluation.json"))
        config = read_json(self._own("model/config.json"))
        config.pop("_name_or_path", None)
        settings = read_settings(self._own("config.yaml"))
        tuning = report.get("fine_tuning") or {}
        if "repository" in tuning:  # or it is not known what the source was
            settings["model"]["pretrained"] = tuning["source"] = source_name(tuning)
            settings["model"]["revision"] = tuning["revision"]
        for section, name in (("data", "root"), ("model", "latents")):
            if place := settings[section].get(name):  # a relative path would pass for a repository, too
                settings[section][name] = PureWindowsPath(str(place)).name or place
        if settings["data"].get("name") == "datasets" and self.trained_on:
            settings["data"]["root"] = self.trained_on
        shown = _without_places(report)
        shown["sha256"] = report_digest(shown)
        model = json.dumps(_without_places(config), indent=2, sort_keys=True)
        texts = {
            "config.json": model + "\n",
            "evaluation.json": json.dumps(shown, indent=2) + "\n",
            "config.yaml": to_yaml(_without_places(settings)),
        }
        others = [name for name in (*self.weights, RANGE_FILE) if name.endswith(".json")]
        texts |= {
            name: read_text(self._own(f"model/{name}")) for name in others if (self.path / "model" / name).exists()
        }
        for name, text in texts.items():
            _refuse_secrets(f"{name} of {self.path}", text)
        tensors = {name: f"model/{name}" for name in self.weights if name.endswith(".safetensors")}
        tensors |= {f"lora/{ADAPTER}": f"lora/{ADAPTER}"} if self.lora_rank else {}
        pictures = [f"pictures/{name}.png" for name in self.pictures]
        return (
            {name: text.encode() for name, text in texts.items()}
            | {name: _tensors(self._own(place)) for name, place in tensors.items()}
            | {name: _picture(self._own(name)) for name in pictures}
        )

    def _own(self, name: str) -> Path:
        """The file `name` of the run; ValueError when it is a link or lies behind one, which could lead anywhere."""
        file = self.path / name
        if file.resolve() != self.path.resolve() / name:
            raise ValueError(
                f"{file} must be a file of the run itself to be published, got a link to {file.resolve()}; put a copy "
                "in its place"
            )
        return file

    @property
    def lora_rank(self) -> int | None:
        """Of the adapters that were trained instead of the decoder's weights."""
        return self.config["model"].get("lora_rank")

    @property
    def base_model(self) -> str | None:
        """The repository on the Hub that the run began with, if the run recorded that, or began in the Hub's cache."""
        tuning = self.evaluation.get("fine_tuning")
        if not tuning:
            return None
        return tuning.get("repository") or (cached_repository(tuning["source"]) or [None])[0]

    @property
    def trained_on(self) -> str | None:
        """The data set on the Hub that the run was trained on."""
        name = self.config["data"]["name"]
        if name != "datasets":
            return HUB_DATA.get(name)
        measured = self.evaluation["protocol"]["data"]  # which names a folder or file without a path
        return measured if REPOSITORY.fullmatch(measured or "") else None


def _weights(folder: Path) -> list[str]:
    """Names of the files in `folder` that hold the model's weights: one, or an index and the shards that it names."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.is_file():
        return [WEIGHTS_FILE]
    found = read_json(index)
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not (isinstance(shards, dict) and shards and all(WEIGHTS.fullmatch(str(name)) for name in shards.values())):
        raise ValueError(
            f"{index} is damaged: it must name files like {WEIGHTS_FILE} in weight_map; save the model again"
        )
    return [index.name, *sorted(set(shards.values()))]


def _tensors(file: Path) -> Path:
    """`file`, which is whole safetensors."""
    open_regular(file).close()  # of anything else, reading might never end
    try:
        with safe_open(file, "pt") as tensors:
            _refuse_secrets(str(file), str(tensors.metadata()))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Delete evaluation.json and continue the run") from error
    return file


def _picture(file: Path) -> bytes:
    """The content of `file`, which is a PNG and nothing else."""
    with open_regular(file) as opened:
        content = opened.read()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
        if content.find(PNG_END) != len(content) - len(PNG_END):
            raise ValueError("something follows its end")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} must be the PNG that the run drew, to be published: {error}. Delete it, or delete evaluation.json "
            "and continue the run, which draws it again"
        ) from error
    _refuse_secrets(str(file), str(picture.info))
    return content


def _without_places(value: Any) -> Any:
    """`value` of a JSON or YAML file, with no more than the last name of each path that leads out of the repository."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    path = PureWindowsPath(re.sub("^file:(//)?", "", value))  # which knows slashes of both kinds
    if path.root or ".." in path.parts or value.startswith("~"):
        return path.name
    return PLACE.sub(lambda found: PureWindowsPath(found[0]).name, value)


PLACE = re.compile(r"(?<![\w.:/\\~])(file:(//)?)?(~?/|[A-Za-z]:[/\\]|~?\\\\)\w[^\s'\"<>|]*")
"""A path in a text that leads out of the repository: absolute, or in a home directory."""
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
ADAPTER = "pytorch_lora_weights.safetensors"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


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
HUB_DATA = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
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
"""Settings of which the card tells only when they are used, with their defaults."""
RECIPE = ("data", "model", "objective", "optimizer", "run")
NOT_RECIPE = {
    "root", "num_workers", "on_bad_image",
    "pretrained", "subfolder", "revision", "latents",
    "output_dir", "checkpoint_every", "keep_checkpoints", "allow_config_change", "on_nonfinite", "log_every", "tracker",
}  # fmt: skip


def render_card(run: Path, config: HubConfig | None = None) -> str:
    """The model card of a finished run: Markdown after YAML metadata, all of it from the run's files. Without a
    `repo_id`, it loads the model from the run's folder.

    Raises:
        ValueError: when the run is not finished.
    """
    return _render(_Run.read(run), config or HubConfig())


def write_card(run: Path, config: HubConfig, evaluation: dict[str, Any]) -> None:
    """The card as README.md of a run whose evaluation.json will be `evaluation`."""
    write_file(run / "README.md", _render(_Run.read(run, evaluation), config))


def _render(run: _Run, config: HubConfig) -> str:
    evaluation, protocol = run.evaluation, _without_places(run.evaluation["protocol"])
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
            dataset_type=HUB_DATA.get(protocol["data"], protocol["data"]),
            dataset_name=measured_on,
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
                recipe=_recipe(_without_places(run.config)),
                pushes=run.config.get("hub", {}).get("push", False),
                pictures=[(name, *CAPTIONS[name]) for name in run.pictures],
                measured_latents=run.config["evaluation"].get("max_images"),
                ratio=2 ** (len(run.model["block_out_channels"]) - 1) if stock else None,
                perceptual=run.config["objective"].get("perceptual"),
                adversarial=run.config.get("adversarial", {}).get("weight"),
            )
        )
    )


def _by_channel(config: Mapping[str, Any]) -> bool:
    """Whether the autoencoder's config has a mean and a std for each channel of the latents."""
    return config.get("latents_mean") is not None and config.get("latents_std") is not None


def _scaled_std(config: Mapping[str, Any], stds: list[float]) -> list[float] | None:
    """Std of the scaled latents per channel, given `stds` of the latents; None if the config has no scaling_factor."""
    if config.get("scaling_factor") is None:
        return None
    own = config["latents_std"] if _by_channel(config) else [1.0] * len(stds)
    return [std * config["scaling_factor"] / divisor for std, divisor in zip(stds, own, strict=True)]


def _plain(value: object) -> Markup:
    """`value` as text of Markdown that means nothing but itself."""
    if isinstance(value, Markup):
        return value
    text = html.escape(showable(value), quote=False)
    return Markup(re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text))  # a_b is no emphasis


def _code(value: object) -> Markup:
    """`value` as a span of code in Markdown."""
    text = showable(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


@cache
def _template() -> Template:
    """model_cards/template.md: inside of the package when it was installed from a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    inside, beside = (folder / "model_cards" / "template.md" for folder in (here, here.parent))
    text = (inside if inside.exists() else beside).read_text(encoding="utf-8")
    return Environment(finalize=_plain).from_string(text)


def _row(key: str, figure: Figure, evaluation: dict[str, Any]) -> tuple[str, str, str, str]:
    """Name, value, interval and meaning, as the card shows them."""
    interval = evaluation["intervals"].get(key)
    shown = f"{interval[0]:,.{figure.digits}f} to {interval[1]:,.{figure.digits}f}" if interval else ""
    meaning = f"{figure.unit}; {figure.meaning}".removeprefix("; ")
    return figure.label, f"{evaluation[key]:,.{figure.digits}f}", shown, meaning


def _fine_tuning(run: _Run) -> dict[str, Any] | None:
    """What the card says of a run that began with a trained autoencoder."""
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
    """The settings that decide the result, section by section."""
    rows = []
    for section in RECIPE + (("adversarial",) if config.get("adversarial", {}).get("weight") else ()):
        values = {
            key: value
            for key, value in config[section].items()
            if key not in NOT_RECIPE and value not in (None, OPTIONS.get(f"{section}.{key}"))
        }
        rows.append((section, ", ".join(f"{key} {json.dumps(value).strip(chr(34))}" for key, value in values.items())))
    return rows


def find_value_range(source: str, subfolder: str | None = None, revision: str | None = None) -> ValueRange | None:
    """What the model that `load_autoencoder` finds says of the values in files; None for one of images of 8 bits.

    Raises:
        OSError: when the Hub does not answer as it should.
        ValueError: when what it says is no range.
    """
    if Path(source).exists():
        return ValueRange.load(Path(source, find_subfolder(source, subfolder) or ""))
    with hiding_passwords():
        try:
            file = hf_hub_download(source, RANGE_FILE, subfolder=subfolder, revision=revision)
        except LocalEntryNotFoundError:
            said = "%s is taken for a model of images of 8 bits: there is no network to ask for more"
            logger.warning(said, showable(source))
            return None
        except EntryNotFoundError:
            return None
    return ValueRange.load(Path(file).parent)


def check_value_range(
    stated: tuple[float, float] | None, source: str, subfolder: str | None = None, revision: str | None = None
) -> None:
    """Raise ValueError when data.value_range is `stated` otherwise than the model was trained to."""
    known = find_value_range(source, subfolder, revision)
    if known and known != (stated and ValueRange(*stated)):
        raise ValueError(
            f"data.value_range must be {known}, to which {source} was trained, got "
            f"{'null' if stated is None else ValueRange(*stated)}"
        )


def check_can_push(config: HubConfig) -> None:
    """Ask the Hub whether the token may write to `config.repo_id`, so that it need not refuse a run at its end.

    Raises:
        ValueError: when there is no repo_id.
        OSError: when there is no token, the Hub does not know it, or it may not write there.
    """
    api, namespace = HfApi(), _repo_id(config).partition("/")[0]
    user = _ask(lambda: api.whoami(), f"cannot push to {config.repo_id}")
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise OSError(
            f"a token that pushes to {config.repo_id} must have write permission, got one of {user['name']} with the "
            f"role read. {NEW_TOKEN}"
        )
    own = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if namespace not in own and not config.create_pr:
        raise OSError(
            f"hub.repo_id must lie in a namespace of the token, which are {', '.join(own)}, got {config.repo_id}. "
            "Choose another, use another token, or open a pull request there with hub.create_pr"
        )


def push(run: Path, config: HubConfig) -> str:
    """Upload a finished run to `config.repo_id` in one commit, and return the URL of the repository, branch or pull
    request. Repeated after an error, it goes on: what has arrived is not sent again. Nothing in `run` is changed.

    Raises:
        ValueError: when the run is not finished, holds pickles, links, tokens, figures that were changed or weights
            that were not measured, or there is no repo_id.
        OSError: when the Hub refuses, or the connection breaks, with the command that repeats the upload.
    """
    repo_id, revision = _repo_id(config), config.revision or "main"
    refuse_odd_name(run, "a run that is published")
    found = _Run.read(run)
    contents = found.contents()
    if weights_hash(load_autoencoder(str(run / "model"))) != found.evaluation["model"]["weights_sha256"]:
        raise ValueError(
            f"{run / 'evaluation.json'} must be of the weights in {run / 'model'}, got one of others; delete it and "
            "continue the run, which measures the model again"
        )
    try:
        card = _render(found, config)
    except (KeyError, TypeError) as error:  # evaluation.json and config.json were checked
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{run / 'config.yaml'} is damaged: no model card can be made of it ({said})") from error
    psnr, name = found.evaluation["psnr"], showable(found.name)
    message = config.commit_message or f"Upload {name}: PSNR {psnr:.2f} dB on {found.evaluation['images']} images"
    _refuse_secrets("the model card", card)
    _refuse_secrets("hub.commit_message", message)
    additions = [CommitOperationAdd("README.md", card.encode())]
    additions += [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    api = HfApi()

    def upload() -> str:
        url = str(api.create_repo(repo_id, private=config.private or None, exist_ok=True))
        if config.private and not api.model_info(repo_id).private:
            raise _Refused(
                f"{repo_id} must be private, as hub.private says, but is there and public: make it private on "
                f"{url}/settings, or leave hub.private out"
            )
        if revision != "main" and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        here = {operation.path_in_repo for operation in additions}
        stale = [  # diffusers would prefer the index of old shards to new weights in one file
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if (WEIGHTS.fullmatch(name) or name == RANGE_FILE or name.startswith("lora/")) and name not in here
        ]
        commit = api.create_commit(
            repo_id, [*additions, *stale], commit_message=message, revision=revision, create_pr=config.create_pr
        )
        if commit.pr_url:
            return str(commit.pr_url)
        return url if revision == "main" else f"{url}/tree/{quote(revision, safe='')}"

    url = _ask(
        upload,
        f"{run} was not uploaded to {repo_id}",
        f" The run is whole, and what has arrived is not sent again. Repeat: {config.command(run)}",
    )
    return without_passwords(url)


class _Refused(Exception):
    """Said in our own words."""


NEW_TOKEN = (
    "Make one with write permission on https://huggingface.co/settings/tokens, and log in with `hf auth login` or set "
    "HF_TOKEN"
)


def _repo_id(config: HubConfig) -> str:
    if config.repo_id is None:
        raise ValueError("hub.repo_id must be NAMESPACE/NAME of a repository, got null")
    return config.repo_id


def _ask(work: Callable[[], T], failed: str, advice: str = "") -> T:
    """What `work` returns; whatever goes wrong in it is an OSError of one line, without token and without the errors
    that caused it, since any of them may hold what was sent. Nor is a token, or a signed address, logged meanwhile.
    """
    try:
        with changed_logs(_without_token):
            return work()
    except Exception as error:  # the client has no common base of its errors, which differ from version to version
        message = _without_token(f"{failed}: {_reason(error)}.{advice}")
    raise OSError(message)


def _reason(error: BaseException) -> str:
    """Rule and remedy, in words."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if isinstance(error, _Refused):
        return str(error)
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in chain):
        return f"there must be a token, got none. {NEW_TOKEN}"
    response = next((r for cause in chain if (r := getattr(cause, "response", None)) is not None), None)
    if response is None:
        first = chain[-1] if isinstance(error, RuntimeError) else error  # of an LFS upload it says the file only
        said = f"{type(first).__name__}: {first}"
        network = isinstance(first, OSError) or type(first).__module__.startswith(("httpx", "httpcore"))
        return f"the connection to {hub_constants.ENDPOINT} must hold, got {said}" if network else said
    status = response.status_code
    said = next((s for cause in chain if (s := getattr(cause, "server_message", None))), None) or str(error)
    wait = response.headers.get("Retry-After")
    remedies = {
        400: "what it names must be changed",
        401: f"the token must be valid. {NEW_TOKEN}",
        403: f"the token must be allowed to write there. {NEW_TOKEN}",
        404: "repository and revision must exist, and be visible with this token",
        409: "nobody else may create or change the same thing at the same time",
        412: "the branch must not change meanwhile",
        429: f"no more requests are allowed at present; wait{f' {wait} s' if wait else ' a few minutes'}",
    }
    remedy = remedies.get(status, "it must be well; try later" if status >= 500 else "it must accept the request")
    return f"the Hub answered {status} ({said}): {remedy}"


TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api)_(org_)?[A-Za-z0-9]{16,}|://[^\s/:@]*:[^\s/@]+@")
"""What looks like a token of the Hub, or a password in an address."""


def _refuse_secrets(where: str, text: str) -> None:
    """Raise ValueError when what is to be published holds a token or a password."""
    token = _token()
    if TOKEN.search(text) or (token and token in text):
        raise ValueError(
            f"{where} must hold no token and no password, since it is published, got one. Remove it, and if others may "
            "have seen it, replace it by another"
        )


def _token() -> str | None:
    """The user's token of the Hub, or None."""
    try:
        return get_token()
    except Exception:  # it may come from a server
        return None


def _without_token(text: str) -> str:
    """One line, without passwords, with every token blotted out that it might hold: ours, and what looks like one."""
    text = without_passwords(text)
    if token := _token():
        text = text.replace(token, "***")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?***", text)  # addresses of the storage are signed
    text = re.sub(r"\b(hf_|api_|Bearer\s+)[\w.-]{8,}", r"\1***", text)
    return showable(" ".join(text.split()))
