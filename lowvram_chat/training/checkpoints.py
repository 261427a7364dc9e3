"""Checkpoints: written aside, synced, listed in a manifest with the digest of each file, and moved into their place whole.

checkpoints/checkpoint-200/   manifest.json, the trainer's files, token counts, fingerprint
checkpoints/.partial/         the checkpoint that is being written, or what a killed process left of one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from lowvram_chat.errors import ModelError
from lowvram_chat.files import discard, patiently, replace_folder, sync, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""File of a checkpoint that is written last: format, step, and the size and SHA-256 digest of every other file."""
PARTIAL = ".partial"
COUNTS_FILE = "token_counts.json"
"""File of a checkpoint with what the run had processed when it was written."""
TORCH_FILES = ("optimizer.pt", "scheduler.pt")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
MAX_HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file. Source: the format's description."""


class File(BaseModel):
    """A file as it was written."""

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint holds."""

    format: Literal[1]
    step: int
    files: dict[str, File]


def seal(checkpoint: Path, step: int) -> None:
    """Sync every file of a checkpoint to the disk, and write its manifest.

    Raises:
        OSError: the disk is full or fails.
    """
    files: dict[str, File] = {}
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(checkpoint).as_posix()] = File(size=path.stat().st_size, sha256=_digest(path))
    write_json(checkpoint / MANIFEST, Manifest(format=1, step=step, files=files).model_dump())
    sync(checkpoint / MANIFEST)
    sync(checkpoint)


@contextlib.contextmanager
def read_as_tensors(names: str) -> Iterator[None]:
    """Load files of a checkpoint with torch's `weights_only` while the context is open; `names` are named in the message.

    Raises:
        ModelError: a file holds something else, which would run code.
    """
    try:
        yield
    except pickle.UnpicklingError:
        raise ModelError(
            f"{names}: holds more than tensors and numbers, which could run code, so it is not loaded. Delete this checkpoint if "
            "you do not know where it comes from, and resume from an earlier one."
        ) from None


def put_in_place(partial: Path, target: Path, keep: int) -> None:
    """Move a sealed checkpoint to its place, and then delete all but the newest `keep` checkpoints, never this one.

    Checkpoints of later steps are of a run that was resumed before them, so they go first.

    Raises:
        UsageError: it cannot be moved. Earlier checkpoints are as they were.
    """
    replace_folder(partial, target)
    sync(target.parent)
    step = number_of(target)
    others = [folder for folder in numbered(target.parent) if folder != target]
    others.sort(key=lambda folder: (number_of(folder) < step, number_of(folder)))
    for folder in others[: max(0, len(others) + 1 - keep)]:
        _delete(folder)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint. It is moved away first: half of it, in its place, would look damaged."""
    leaving = checkpoint.parent / PARTIAL / checkpoint.name
    leaving.parent.mkdir(exist_ok=True)
    try:
        patiently(lambda: checkpoint.rename(leaving))
    except OSError:
        leaving = checkpoint
    discard(leaving)


def numbered(checkpoints: Path) -> list[Path]:
    """Return the folders `checkpoint-N`, whole or not, the lowest step first."""
    found = [folder for folder in checkpoints.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=number_of)


def number_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_whole(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint, and why each newer one is not whole."""
    damaged: dict[Path, str] = {}
    for folder in reversed(numbered(checkpoints)):
        reason = damage(folder)
        if reason is None:
            return folder, damaged
        damaged[folder] = reason
    return None, damaged


def damage(checkpoint: Path) -> str | None:
    """Return what is damaged in a checkpoint; None if it is whole.

    A checkpoint of an earlier version, which has no manifest, is whole if its files have their full length.
    """
    manifest = _read(checkpoint)
    if manifest is None:
        if (checkpoint / MANIFEST).exists():
            return f"{MANIFEST} is damaged"
        return _damage_without_manifest(checkpoint)
    for name, expected in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected.size:,}"
        if _digest_once(path, path.stat().st_mtime_ns) != expected.sha256:
            return f"{name} has other content than when it was written"
    return None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step that a whole checkpoint is of."""
    manifest = _read(checkpoint)
    if manifest is not None:
        return manifest.step
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _read(checkpoint: Path) -> Manifest | None:
    """Return a checkpoint's manifest; None where there is none, or it is damaged."""
    try:
        return Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1024)
def _digest_once(path: Path, modified: int) -> str:
    """Return a file's digest, computed once while the file stays as it is."""
    return _digest(path)


def _damage_without_manifest(checkpoint: Path) -> str | None:
    for name, field in ((COUNTS_FILE, None), ("trainer_state.json", "global_step")):
        try:
            content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
            int(content[field] if field else 0)
        except OSError:
            return f"{name} is missing"
        except (ValueError, KeyError, TypeError):
            return f"{name} is damaged"
    random_states = [*checkpoint.glob("rng_state*.pth")] or [checkpoint / "rng_state.pth"]
    for path in (*(checkpoint / name for name in TORCH_FILES), *random_states):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is missing or damaged"
    weights = [path for name in WEIGHT_FILES if (path := checkpoint / name).is_file()]
    if not weights:
        return "the weights are missing"
    return next((f"{path.name} is damaged" for path in weights if not _has_full_length(path)), None)


def _has_full_length(weights: Path) -> bool:
    """Return whether a safetensors file has the length that its header says."""
    if weights.suffix == ".json":
        return True
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < MAX_HEADER_BYTES else {}
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return weights.stat().st_size == 8 + length + int(end)
