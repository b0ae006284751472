"""Upload of a finished run to the Hugging Face Hub, in one commit, and of a Space that shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import LocalTokenNotFoundError

from ..images.ranges import RANGE_FILE
from ..messages import changed_logs, showable, without_passwords
from ..models import load_autoencoder, weights_hash
from ..untrusted import refuse_odd_name
from .card import render
from .config import HubConfig
from .run import WEIGHTS, FinishedRun
from .secrets import refuse_secrets, without_token
from .space import space_files

T = TypeVar("T")
logger = logging.getLogger(__name__)


def check_can_push(config: HubConfig) -> None:
    """Check with the Hub that the token may write to `config.repo_id`, so that the upload does not fail after the run.

    Raises:
        ValueError: If there is no repo_id.
        OSError: If there is no token, the Hub does not accept it, or it may not write there.
    """
    api, namespace = HfApi(), _repo_id(config).partition("/")[0]
    user = _ask(lambda: api.whoami(), f"cannot push to {config.repo_id}")
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise OSError(
            f"a token that pushes to {config.repo_id} must have write permission, got one of {user['name']} with the "
            f"role read. {NEW_TOKEN}"
        )
    namespaces = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if namespace not in namespaces and not config.create_pr:
        raise OSError(
            f"hub.repo_id must be in a namespace of the token, {' or '.join(namespaces)}, got {config.repo_id}. "
            "Choose another, use another token, or open a pull request there with hub.create_pr"
        )


def push(run: Path, config: HubConfig) -> str:
    """Upload a finished run to `config.repo_id` in one commit, and return the URL of the repository, branch or pull
    request. Repeating it after an error resumes the upload: what has arrived is not sent again. `run` does not change.

    Raises:
        ValueError: If the run is not finished, holds pickles, links, tokens, changed figures or unmeasured weights, or
            there is no repo_id.
        OSError: If the Hub refuses, or the connection breaks, with the command that repeats the upload.
    """
    repo_id, revision = _repo_id(config), config.revision or "main"
    refuse_odd_name(run, "a run that is published")
    found = FinishedRun.read(run)
    contents = found.contents()
    if weights_hash(load_autoencoder(str(run / "model"))) != found.evaluation["model"]["weights_sha256"]:
        raise ValueError(
            f"{run / 'evaluation.json'} must be of the weights in {run / 'model'}, got one of others; delete it and "
            "continue the run, which measures the model again"
        )
    try:
        card = render(found, config)
    except (KeyError, TypeError) as error:  # evaluation.json and config.json were checked
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{run / 'config.yaml'} is damaged: no model card can be made of it ({said})") from error
    psnr, name = found.evaluation["psnr"], showable(found.name)
    message = config.commit_message or f"Upload {name}: PSNR {psnr:.2f} dB on {found.evaluation['images']} images"
    refuse_secrets("the model card", card)
    refuse_secrets("hub.commit_message", message)
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
                f"{repo_id} must be private, as hub.private requires, but exists and is public: make it private on "
                f"{url}/settings, or leave hub.private out"
            )
        if revision != "main" and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        uploaded = {operation.path_in_repo for operation in additions}
        stale = [  # diffusers would prefer an index of old shards to new weights in one file
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if (WEIGHTS.fullmatch(name) or name == RANGE_FILE or name.startswith("lora/")) and name not in uploaded
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
        f" The run is complete, and what has arrived is not sent again. Repeat: {config.command(run)}",
    )
    return without_passwords(url)


def push_space(run: Path, config: HubConfig) -> str:
    """Upload a Space that shows the model of `run`, which `push` has uploaded to `config.repo_id`, under the same name,
    and return its URL. Files of an existing Space are replaced.

    Raises:
        OSError: If the Hub refuses, or the connection breaks, with the command that repeats the upload.
    """
    repo_id, api = _repo_id(config), HfApi()
    additions = [CommitOperationAdd(name, content) for name, content in space_files(config).items()]

    def upload() -> str:
        private = config.private or None
        url = str(api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True))
        message = f"Show {repo_id}"
        api.create_commit(repo_id, additions, commit_message=message, repo_type="space")
        return url

    advice = f" The model was uploaded. Repeat: {config.command(run)} --space"
    return without_passwords(_ask(upload, f"the Space {repo_id} was not uploaded", advice))


class _Refused(Exception):
    """Error whose text is ours."""


NEW_TOKEN = (
    "Make one with write permission on https://huggingface.co/settings/tokens, and log in with `hf auth login` or set "
    "HF_TOKEN"
)


def _repo_id(config: HubConfig) -> str:
    if config.repo_id is None:
        raise ValueError("hub.repo_id must be NAMESPACE/NAME of a repository, got null")
    return config.repo_id


def _ask(work: Callable[[], T], failed: str, advice: str = "") -> T:
    """Return the result of `work`. Any error in it becomes an OSError of one line, without token and without its
    causes, because any of them may hold what was sent. No token or signed address is logged in the meantime.
    """
    try:
        with changed_logs(without_token):
            return work()
    except Exception as error:  # the client's errors have no common base and differ between versions
        message = without_token(f"{failed}: {_reason(error)}.{advice}")
    raise OSError(message)


def _reason(error: BaseException) -> str:
    """Return the reason and the remedy as text."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if isinstance(error, _Refused):
        return str(error)
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in chain):
        return f"there must be a token, got none. {NEW_TOKEN}"
    response = next((r for cause in chain if (r := getattr(cause, "response", None)) is not None), None)
    if response is None:
        first = chain[-1] if isinstance(error, RuntimeError) else error  # for an LFS upload it names only the file
        said = f"{type(first).__name__}: {first}"
        network = isinstance(first, OSError) or type(first).__module__.startswith(("httpx", "httpcore"))
        return f"the connection to {hub_constants.ENDPOINT} failed: {said}" if network else said
    status = response.status_code
    said = next((s for cause in chain if (s := getattr(cause, "server_message", None))), None) or str(error)
    wait = response.headers.get("Retry-After")
    remedies = {
        400: "change what the message names",
        401: f"the token is not valid. {NEW_TOKEN}",
        403: f"the token may not write there. {NEW_TOKEN}",
        404: "the repository or revision does not exist, or the token cannot read it",
        409: "somebody else is changing the same repository: try again later",
        412: "the branch changed in the meantime: try again",
        429: f"too many requests: wait{f' {wait} s' if wait else ' a few minutes'}",
    }
    remedy = remedies.get(status, "server error: try again later" if status >= 500 else "the request was rejected")
    return f"the Hub returned {status} ({said}): {remedy}"
