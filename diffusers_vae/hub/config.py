"""Settings of publishing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


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
