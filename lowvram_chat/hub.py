"""The way to the Hugging Face hub: found out once, quickly, and explained when it is closed."""

from __future__ import annotations

import logging
import os
import socket
import sys
from urllib.parse import urlparse

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3.0
_given_up = False
"""Whether it is we who closed the way to the hub, since it did not answer."""


def offline() -> bool:
    """Return whether the user (or `work_offline_if_unreachable`) has closed the way to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


def endpoint() -> str:
    """Return the hub's address: huggingface.co, or the mirror of `HF_ENDPOINT`."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def reachable() -> bool:
    """Return whether the hub answers a connection within three seconds (a proxy is taken to reach it)."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    address = urlparse(endpoint())
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def work_offline_if_unreachable() -> None:
    """Turn offline mode on where the hub cannot be reached: the cache serves at once, not after a minute of retries.

    The libraries read the variable when they are imported, so this comes first.
    """
    if offline() or "huggingface_hub" in sys.modules or reachable():
        return
    global _given_up
    _given_up = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    log.info("The hub cannot be reached from here: only what is local or in its cache can be used.")


def explain(kind: str, name: str, error: BaseException) -> str:
    """Return one sentence for a failed look-up of a model or dataset (`kind`) on the hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name}: this {kind} needs its owner's permission. Ask for it on the hub, then run `hf auth login`."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{name}: the hub has no such {kind} (or it is private). Check the name, or run `hf auth login`."
    return (
        f"{name}: no local {kind} of that name, none in the hub cache, and the hub "
        f"{'is switched off (HF_HUB_OFFLINE)' if offline() and not _given_up else 'could not be reached'}. "
        "Check the name and the network (python -m lowvram_chat.doctor), or give a local path."
    )


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain
