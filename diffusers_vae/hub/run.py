"""What of a finished run is published: nothing that is not named here, and nothing of this machine."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from PIL import Image
from safetensors import SafetensorError, safe_open

from ..evaluation.figures import source_name
from ..evaluation.report import read_report, report_digest
from ..images.ranges import RANGE_FILE
from ..models import cached_repository
from ..reports.pictures import CAPTIONS
from ..settings import read_settings, to_yaml
from ..untrusted import open_regular, read_json, read_text
from .secrets import refuse_secrets


@dataclass(frozen=True)
class FinishedRun:
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
    def read(cls, path: Path, evaluation: dict[str, Any] | None = None) -> FinishedRun:
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
            cast(dict[str, Any], evaluation),
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
        shown = without_places(report)
        shown["sha256"] = report_digest(shown)
        model = json.dumps(without_places(config), indent=2, sort_keys=True)
        texts = {
            "config.json": model + "\n",
            "evaluation.json": json.dumps(shown, indent=2) + "\n",
            "config.yaml": to_yaml(without_places(settings)),
        }
        others = [name for name in (*self.weights, RANGE_FILE) if name.endswith(".json")]
        texts |= {
            name: read_text(self._own(f"model/{name}")) for name in others if (self.path / "model" / name).exists()
        }
        for name, text in texts.items():
            refuse_secrets(f"{name} of {self.path}", text)
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
            refuse_secrets(str(file), str(tensors.metadata()))
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
    refuse_secrets(str(file), str(picture.info))
    return content


def without_places(value: Any) -> Any:
    """`value` of a JSON or YAML file, with no more than the last name of each path that leads out of the repository."""
    if isinstance(value, dict):
        return {name: without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
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
HUB_DATA = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}
RECIPE = ("data", "model", "objective", "optimizer", "run")
