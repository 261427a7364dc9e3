"""Files and folders replaced whole: a crash or an error leaves the old one or the new one, never half of one."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lowvram_chat.errors import UsageError
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
    earlier = target.with_name(f"{target.name}.replaced-{os.getpid()}")
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
