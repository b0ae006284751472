"""`push`: publishes a run on the Hugging Face Hub."""

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
"""Settings of the hub section that this command sets itself."""


def run_push(arguments: Sequence[str]) -> int:
    """Publish a run."""
    parser = command_parser(
        "push",
        "RUN REPO_ID [--private true] [--license ID] [--space] ...",
        "Publish a finished run as a model repository on the Hugging Face Hub, in one commit: the model, its card, "
        "pictures/, evaluation.json and config.yaml. Log in first, with `hf auth login` or HF_TOKEN. After an error, "
        "repeat the command to continue. Settings without a flag come from the run's hub section.",
        "diffusers-vae push runs/mnist-vae me/mnist-vae --license apache-2.0",
    )
    parser.add_argument("run", type=str, help="Folder of a finished run.")
    parser.add_argument("target", metavar="REPO_ID", type=str, help="NAMESPACE/NAME of the repository.")
    parser.add_argument(
        "--space",
        action="store_true",
        help="Also publish a Space of the same name, which runs the page of `diffusers-vae demo` with the model.",
    )
    parser.add_class_arguments(HubConfig, skip={*OF_COMMAND}, as_group=False)
    given = read_flags(parser, arguments)
    file, stored = Path(given.run) / "config.yaml", {}
    if file.is_file():  # such as the license
        stated = read_settings(file).get("hub", {})
        stored = {name: value for name, value in stated.items() if name not in OF_COMMAND and value is not None}
    parsed = complete(parser, given, stored)
    settings = parsed.as_dict()
    run, repo_id, space = Path(settings.pop("run")), settings.pop("target"), settings.pop("space")
    with refusing(parser):
        config = HubConfig(push=True, repo_id=repo_id, **settings)
        if space and (config.create_pr or (config.revision or "").startswith("refs/pr/")):
            raise ValueError("--space needs a published model, so it cannot be combined with a pull request")
    print(showable(f"published   {push(run, config)}"))
    if space:
        print(showable(f"space       {push_space(run, config)}"))
    return 0
