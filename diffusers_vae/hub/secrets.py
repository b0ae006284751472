"""Tokens and passwords, which are never published, shown or logged."""

from __future__ import annotations

import re

from huggingface_hub import get_token

from ..messages import showable, without_passwords

TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api)_(org_)?[A-Za-z0-9]{16,}|://[^\s/:@]*:[^\s/@]+@")
"""Pattern of a Hub token, or of a password in an address."""


def refuse_secrets(where: str, text: str) -> None:
    """Raise ValueError if content to publish holds a token or a password."""
    token = own_token()
    if TOKEN.search(text) or (token and token in text):
        raise ValueError(
            f"{where} must hold no token and no password, because it is published, got one. Remove it, and replace it "
            "if others may have seen it"
        )


def own_token() -> str | None:
    """Return the user's Hub token, or None."""
    try:
        return get_token()
    except Exception:  # it may come from a server
        return None


def without_token(text: str) -> str:
    """Return one line of text without passwords, and with every token masked: ours, and what looks like one."""
    text = without_passwords(text)
    if token := own_token():
        text = text.replace(token, "***")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?***", text)  # storage addresses are signed
    text = re.sub(r"\b(hf_|api_|Bearer\s+)[\w.-]{8,}", r"\1***", text)
    return showable(" ".join(text.split()))
