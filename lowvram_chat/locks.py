"""One owner of a folder: a second process that would write to it is refused."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lowvram_chat.errors import UsageError
from lowvram_chat.files import cache_folder


@contextlib.contextmanager
def owned(folder: Path, what_to_do: str) -> Iterator[None]:
    """Own a folder, which need not exist, while the context is open. A process that dies does not own it any longer.

    The lock is a file in the cache folder, because the folder itself may be moved or replaced. It counts among the processes that
    share this cache folder. `what_to_do` ends the message to the second process.

    Raises:
        UsageError: another process owns the folder.
    """
    digest = hashlib.sha256(str(folder.expanduser().resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache_folder() / "locks" / f"{digest}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(f"{folder}: another process is writing to this folder. {what_to_do}") from None
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be locked ({error.strerror or error}). Set LOWVRAM_CHAT_CACHE to a folder that can be written."
        ) from None
    try:
        yield
    finally:
        lock.release()
