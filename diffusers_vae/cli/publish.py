"""`push`: a run to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..hub.config import HubConfig
from ..hub.push import push
from ..messages import message, showable
from ..settings import read_settings
from .arguments import command_parser, parse


def run_push(arguments: Sequence[str]) -> int:
    """Publish a run."""
    parser = command_parser(
        "push",
        "RUN REPO_ID [--private true] [--license ID] ...",
        "Publish a finished run as a model repository on the Hugging Face Hub, in one commit: the model, its card, "
        "pictures/, evaluation.json and config.yaml. Log in first, with `hf auth login` or HF_TOKEN. After an error, "
        "the same command goes on. Settings that are not given are those of the run's hub section.",
        "diffusers-vae push runs/mnist-vae me/mnist-vae --license apache-2.0",
    )
    parser.add_argument("run", type=str, help="Folder of a finished run.")
    parser.add_argument("target", metavar="REPO_ID", type=str, help="NAMESPACE/NAME of the repository.")
    parser.add_class_arguments(HubConfig, skip={"push", "repo_id"}, as_group=False)
    parsed = parse(parser, arguments)
    if (file := Path(parsed.run) / "config.yaml").is_file():  # licence and the rest, as the run was told
        known = [
            f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in read_settings(file).get("hub", {}).items()
            if name not in ("push", "repo_id") and value is not None
        ]
        parsed = parse(parser, [*known, *arguments])
    settings = parsed.as_dict()
    run, repo_id = Path(settings.pop("run")), settings.pop("target")
    try:
        config = HubConfig(push=True, repo_id=repo_id, **settings)
    except ValueError as error:
        parser.exit(2, message(f"error: {error}") + "\n")
    print(showable(f"published   {push(run, config)}"))
    return 0
