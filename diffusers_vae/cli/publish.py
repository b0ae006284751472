"""`push`: a run to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..hub.config import HubConfig
from ..hub.push import push, push_space
from ..messages import showable
from ..settings import read_settings
from .arguments import complete, read_flags, refusing
from .parser import command_parser

OF_COMMAND = ("push", "repo_id")
"""Settings of the hub that this command is."""


def run_push(arguments: Sequence[str]) -> int:
    """Publish a run."""
    parser = command_parser(
        "push",
        "RUN REPO_ID [--private true] [--license ID] [--space] ...",
        "Publish a finished run as a model repository on the Hugging Face Hub, in one commit: the model, its card, "
        "pictures/, evaluation.json and config.yaml. Log in first, with `hf auth login` or HF_TOKEN. After an error, "
        "the same command goes on. Settings that are not given are those of the run's hub section.",
        "diffusers-vae push runs/mnist-vae me/mnist-vae --license apache-2.0",
    )
    parser.add_argument("run", type=str, help="Folder of a finished run.")
    parser.add_argument("target", metavar="REPO_ID", type=str, help="NAMESPACE/NAME of the repository.")
    parser.add_argument(
        "--space",
        action="store_true",
        help="Also publish a Space of the same name, on which people try the model in the browser, as `demo` does.",
    )
    parser.add_class_arguments(HubConfig, skip={*OF_COMMAND}, as_group=False)
    given = read_flags(parser, arguments)
    file, known = Path(given.run) / "config.yaml", {}
    if file.is_file():  # licence and the rest, as the run was told
        stated = read_settings(file).get("hub", {})
        known = {name: value for name, value in stated.items() if name not in OF_COMMAND and value is not None}
    parsed = complete(parser, given, known)
    settings = parsed.as_dict()
    run, repo_id, space = Path(settings.pop("run")), settings.pop("target"), settings.pop("space")
    with refusing(parser):
        config = HubConfig(push=True, repo_id=repo_id, **settings)
        if space and (config.create_pr or (config.revision or "").startswith("refs/pr/")):
            raise ValueError("--space shows a model that is published, so it cannot go with a pull request")
    print(showable(f"published   {push(run, config)}"))
    if space:
        print(showable(f"space       {push_space(run, config)}"))
    return 0
