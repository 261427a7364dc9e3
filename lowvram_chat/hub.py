"""Checks once whether the Hugging Face hub can be reached, and explains failed look-ups."""

from __future__ import annotations

import logging
import os
import socket
import sys
from urllib.parse import urlparse

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3.0
"""How long the hub may take to accept a connection."""

_found_unreachable = False
"""Whether `work_offline_if_unreachable` turned offline mode on, and not the user."""


def offline() -> bool:
    """Return whether the user or `work_offline_if_unreachable` has turned offline mode on."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


def endpoint() -> str:
    """Return the hub's address: huggingface.co, or the mirror of `HF_ENDPOINT`."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def reachable() -> bool:
    """Return whether the hub accepts a connection within three seconds; with a proxy, assume that it does."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    address = urlparse(endpoint())
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def work_offline_if_unreachable() -> None:
    """Turn offline mode on if the hub cannot be reached, so that the cache is used without a minute of retries.

    Call this before huggingface_hub is imported: the libraries read `HF_HUB_OFFLINE` at import.
    """
    if offline() or "huggingface_hub" in sys.modules or reachable():
        return
    global _found_unreachable
    _found_unreachable = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    log.info("The hub cannot be reached: only local files and its cache can be used.")


def explain(kind: str, name: str, error: BaseException) -> str:
    """Return the error message for a look-up that failed; `kind` is "model" or "dataset"."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name}: this {kind} needs its owner's permission. Ask for it on the hub, then run `hf auth login`."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{name}: the hub has no such {kind} (or it is private). Check the name, or run `hf auth login`."
    return (
        f"{name}: no local {kind} of that name, none in the hub cache, and the hub "
        f"{'is switched off (HF_HUB_OFFLINE)' if offline() and not _found_unreachable else 'could not be reached'}. "
        "Check the name and the network (python -m lowvram_chat.doctor), or give a local path."
    )


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and the errors that led to it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain
