"""Files and folders replaced whole: a crash or an error leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lowvram_chat.errors import LowVramError, StorageError, UsageError
from lowvram_chat.units import format_mib
from lowvram_chat.wording import shorten

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of token rows, locks and self-tests: `LOWVRAM_CHAT_CACHE`, or else one beside the Hugging Face caches.

    Raises:
        UsageError: a file is in its place.
    """
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    folder = Path(os.environ.get("LOWVRAM_CHAT_CACHE") or Path(home, "lowvram_chat")).expanduser()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(
            f"{folder}: cannot be created, because {nearest} is a file. Set LOWVRAM_CHAT_CACHE to a folder."
        )
    return folder


def usable_path(name: str, path: str | Path) -> Path:
    """Return a path with the home folder in place of `~`; `name` is the argument or setting that it was given as.

    Raises:
        UsageError: no file can have this path: it has a null character, an unknown user, or a loop of links.
    """
    try:
        expanded = Path(path).expanduser()
        expanded.exists()
        expanded.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name}: {shorten(str(path))} is no usable path ({reason}). Give another path.") from None
    return expanded


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file under another name first, then move it into place.

    Raises:
        OSError: it cannot be written or moved. An earlier file is still in its place.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    patiently(lambda: partial.replace(path))


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: otherwise a power failure may leave its name without its content.

    Windows has no such call for folders.

    Raises:
        OSError: the disk is full or fails.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Wait until a folder is on the disk with all files in it.

    Raises:
        OSError: as `sync`.
    """
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


HELD_BY_ANOTHER = (5, 32, 33)
"""Windows errors of a file or folder that another program has open. Source: winerror.h, ERROR_ACCESS_DENIED,
ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION."""
WAITING_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
"""Waits between the tries of a move: virus scanners and indexers hold new files for moments."""


def patiently(move: Callable[[], object]) -> None:
    """Move a file or folder; on Windows, try again for some seconds while another program has it open.

    Raises:
        OSError: it cannot be moved, and is where it was.
    """
    for seconds in WAITING_SECONDS:
        try:
            move()
        except PermissionError as error:
            if getattr(error, "winerror", None) not in HELD_BY_ANOTHER:
                raise
            time.sleep(seconds)
        else:
            return
    move()


def write_json(path: Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write an indented JSON file as `write_text` does."""
    write_text(path, json_text(content, indent=2) + "\n")


def json_text(content: Mapping[str, object] | Sequence[object], *, indent: int | None = None) -> str:
    """Return a JSON document. A number that is not finite is `null`, since JSON has none: `NaN` is Python's own extension."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    """Return a value with None in place of every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


STORAGE_ADVICE: Mapping[int, str] = {
    errno.ENOSPC: "Free space on this disk, and try again",
    errno.EDQUOT: "Free space of your quota on this disk, and try again",
    errno.EACCES: "Choose a folder that you may write, or change its permissions",
    errno.EPERM: "Choose a folder that you may write, or change its permissions",
    errno.EROFS: "This disk is read-only. Choose a folder on another one",
    errno.EIO: "The disk may be failing. Copy your files to another one",
}
"""Error number of the system -> what to do."""
LIBRARY_FULL = re.compile(
    r"No space left|os error 28|iostream error|inline_container|PytorchStreamWriter|file write failed|fwrite"
)
"""What safetensors and torch.save say where they cannot write: they hide the system's error."""


def storage_error(error: OSError, where: Path | None = None) -> StorageError:
    """Return an error of the system as ours; `where` is named if the error names no file."""
    place = error.filename or where or "a file"
    advice = STORAGE_ADVICE.get(error.errno or 0, "Check the path and the disk, and try again")
    return StorageError(f"{place}: {error.strerror or error}. {advice}.")


@contextlib.contextmanager
def written(folder: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Write into a folder while the context is open; `needed_bytes` must be free first.

    Raises:
        StorageError: the disk is full, with how much is missing, or it fails.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise StorageError(
            f"{folder}: about {format_mib(needed_bytes)} MiB are to be written, and {format_mib(free)} MiB are free. Free at "
            f"least {format_mib(needed_bytes - free)} MiB on this disk, and try again."
        )
    try:
        yield
    except LowVramError:
        raise
    except OSError as error:
        raise storage_error(error, folder) from None
    except Exception as error:
        if not LIBRARY_FULL.search(str(error)):
            raise
        raise storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder) from None


def beside(target: Path, what: Literal["new", "earlier"]) -> Path:
    """Return the name beside a folder under which its next content is written, or its last content waits to be deleted.

    Only the process that owns the target (`locks.owned`) uses it.
    """
    return target.with_name(f".{target.name}.lowvram-chat-{what}")


def recover(target: Path) -> None:
    """Put an earlier folder back that a killed process had moved aside, and delete what it left unfinished.

    Raises:
        UsageError: a folder cannot be moved or deleted.
    """
    earlier = beside(target, "earlier")
    if earlier.exists() and not target.exists():
        try:
            patiently(lambda: earlier.rename(target))
        except OSError as error:
            raise UsageError(
                f"{earlier}: was set aside by a command that was interrupted, and cannot be moved back ({error.strerror}). Close "
                "the programs that use it, and try again."
            ) from error
    delete_unfinished(earlier)
    delete_unfinished(beside(target, "new"))


def delete_unfinished(folder: Path) -> None:
    """Delete what an interrupted command left, if it left anything.

    Raises:
        UsageError: the folder cannot be deleted.
    """
    if folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise UsageError(
                f"{folder}: left by an interrupted command, and cannot be deleted ({error.strerror}). Close the programs that "
                f"use it, delete it, and try again."
            ) from error


def discard(folder: Path) -> None:
    """Delete a folder that is not needed any more, or log that it is still there."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("%s: is not needed any more, but could not be deleted. Please delete it.", folder)


def replace_folder(new: Path, target: Path) -> None:
    """Move a folder to `target`. An earlier folder there is deleted only when the new one is in its place.

    Raises:
        UsageError: a folder cannot be moved; the earlier one is still in its place.
    """
    earlier = beside(target, "earlier")
    try:
        if target.exists():
            patiently(lambda: target.rename(earlier))
        try:
            patiently(lambda: new.rename(target))
        except OSError:
            if earlier.exists():
                patiently(lambda: earlier.rename(target))
            raise
    except OSError as error:
        raise UsageError(
            f"{target}: cannot be written ({error.strerror}). Close the programs that use it. An earlier folder of this name was "
            f"kept, and the new one is {new}."
        ) from error
    if earlier.exists():
        discard(earlier)
