"""Tokens and passwords: never published, shown or logged."""

from __future__ import annotations

import re

from huggingface_hub import get_token

from ..messages import showable, without_passwords

TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api)_(org_)?[A-Za-z0-9]{16,}|://[^\s/:@]*:[^\s/@]+@")
"""What looks like a token of the Hub, or a password in an address."""


def refuse_secrets(where: str, text: str) -> None:
    """Raise ValueError when what is to be published holds a token or a password."""
    token = own_token()
    if TOKEN.search(text) or (token and token in text):
        raise ValueError(
            f"{where} must hold no token and no password, since it is published, got one. Remove it, and if others may "
            "have seen it, replace it by another"
        )


def own_token() -> str | None:
    """The user's token of the Hub, or None."""
    try:
        return get_token()
    except Exception:  # it may come from a server
        return None


def without_token(text: str) -> str:
    """One line, without passwords, with every token blotted out that it might hold: ours, and what looks like one."""
    text = without_passwords(text)
    if token := own_token():
        text = text.replace(token, "***")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?***", text)  # addresses of the storage are signed
    text = re.sub(r"\b(hf_|api_|Bearer\s+)[\w.-]{8,}", r"\1***", text)
    return showable(" ".join(text.split()))
