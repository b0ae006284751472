"""Published content of a finished run: only files and values listed explicitly, and nothing of this machine."""

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
    """Content of the files of a finished run."""

    path: Path
    evaluation: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    weights: list[str]
    """Names of the files in model/."""
    pictures: list[str]
    """Names of the pictures from `draw_all`, in its order."""

    @classmethod
    def read(cls, path: Path, evaluation: dict[str, Any] | None = None) -> FinishedRun:
        """Return the run at `path`, with `evaluation` instead of its evaluation.json if given. ValueError if the run is
        not finished or holds what must not be published.
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
        """Return what is uploaded besides the card, by path in the repository: nothing that is not listed explicitly,
        nothing through a link, no token, and no path on this machine.

        Raises:
            ValueError: Naming a file with invalid content.
        """
        report = read_json(self._own("evaluation.json"))
        config = read_json(self._own("model/config.json"))
        config.pop("_name_or_path", None)
        settings = read_settings(self._own("config.yaml"))
        tuning = report.get("fine_tuning") or {}
        if "repository" in tuning:  # otherwise the source is unknown
            settings["model"]["pretrained"] = tuning["source"] = source_name(tuning)
            settings["model"]["revision"] = tuning["revision"]
        for section, name in (("data", "root"), ("model", "latents")):
            if source := settings[section].get(name):  # a relative path would look like a repository
                settings[section][name] = PureWindowsPath(str(source)).name or source
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
            | {name: _tensors(self._own(file)) for name, file in tensors.items()}
            | {name: _picture(self._own(name)) for name in pictures}
        )

    def _own(self, name: str) -> Path:
        """Return the file `name` of the run; ValueError if it is a link or behind one, which could lead anywhere."""
        file = self.path / name
        if file.resolve() != self.path.resolve() / name:
            raise ValueError(
                f"{file} must be a file of the run itself to be published, got a link to {file.resolve()}; put a copy "
                "in its place"
            )
        return file

    @property
    def lora_rank(self) -> int | None:
        """Return the rank of the adapters that were trained instead of the decoder's weights, or None."""
        return self.config["model"].get("lora_rank")

    @property
    def base_model(self) -> str | None:
        """Return the Hub repository that the run began with, if it was recorded or in the Hub's cache."""
        tuning = self.evaluation.get("fine_tuning")
        if not tuning:
            return None
        return tuning.get("repository") or (cached_repository(tuning["source"]) or [None])[0]

    @property
    def trained_on(self) -> str | None:
        """Return the Hub data set that the run was trained on, or None."""
        name = self.config["data"]["name"]
        if name != "datasets":
            return HUB_DATA.get(name)
        measured = self.evaluation["protocol"]["data"]  # names a folder or file without a path
        return measured if REPOSITORY.fullmatch(measured or "") else None


def _weights(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that hold the model's weights: one, or an index and its shards."""
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
    """Return `file` after checking that it is a complete safetensors file."""
    open_regular(file).close()  # reading anything else might never end
    try:
        with safe_open(file, "pt") as tensors:
            refuse_secrets(str(file), str(tensors.metadata()))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Delete evaluation.json and continue the run") from error
    return file


def _picture(file: Path) -> bytes:
    """Return the content of `file`, which must be a PNG and nothing else."""
    with open_regular(file) as opened:
        content = opened.read()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
        if content.find(PNG_END) != len(content) - len(PNG_END):
            raise ValueError("something follows its end")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} must be the PNG that the run wrote, to be published: {error}. Delete it, or delete "
            "evaluation.json and continue the run, which writes it again"
        ) from error
    refuse_secrets(str(file), str(picture.info))
    return content


def without_places(value: Any) -> Any:
    """Return `value` of a JSON or YAML file, with paths that lead out of the repository reduced to their last name."""
    if isinstance(value, dict):
        return {name: without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    path = PureWindowsPath(re.sub("^file:(//)?", "", value))  # handles both kinds of slashes
    if path.root or ".." in path.parts or value.startswith("~"):
        return path.name
    return PLACE.sub(lambda found: PureWindowsPath(found[0]).name, value)


PLACE = re.compile(r"(?<![\w.:/\\~])(file:(//)?)?(~?/|[A-Za-z]:[/\\]|~?\\\\)\w[^\s'\"<>|]*")
"""Pattern of a path in text that leads out of the repository: absolute, or in a home directory."""
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
ADAPTER = "pytorch_lora_weights.safetensors"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
HUB_DATA = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}
RECIPE = ("data", "model", "objective", "optimizer", "run")
