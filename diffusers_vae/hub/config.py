"""Settings for publishing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


@dataclass(frozen=True)
class HubConfig:
    """Upload to the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN, which is never a setting."""

    push: bool = False
    """Upload the finished run."""
    repo_id: str | None = None
    """NAMESPACE/NAME of the model repository, created if missing."""
    private: bool = False
    """Make the repository private; an error if it exists and is public."""
    revision: str | None = None
    """Branch, created if missing, or refs/pr/N of an open pull request; null: main."""
    commit_message: str | None = None
    """Message of the commit; null: the model's figures."""
    create_pr: bool = False
    """Open a pull request instead of changing the main branch."""
    license: str | None = None
    """License of the weights by the Hub's name, such as apache-2.0, mit or cc-by-nc-4.0; null: none, so nobody else may
    use them."""
    base_model: str | None = None
    """NAMESPACE/NAME of the base model, for the card; null: the Hub repository of model.pretrained, if it is one."""

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
        """Return the command that uploads `run` with these settings."""
        words = ["diffusers-vae", "push", str(run.absolute()), self.repo_id or "NAMESPACE/NAME"]
        for name, value in vars(self).items():
            if name not in ("push", "repo_id") and value not in (None, False):
                words += [f"--{name}", "true" if value is True else value]
        return shlex.join(words)
