"""Opens sources of conversations: files, globs, hub datasets and the built-in sample, read as (place, raw row) pairs."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_chat.data.parsers import FILE_PARSERS, check_suffix, parse_file
from lowvram_chat.data.raw_rows import BadRow, PlacedRows, RawRow
from lowvram_chat.data.text_files import text_suffix
from lowvram_chat.errors import DataError, NotFoundError, did_you_mean
from lowvram_chat.hub import explain

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

__all__ = ["BadRow", "Part", "RawRow", "Source", "check_splits", "is_remote", "open_source"]

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN_DATASETS = {
    "builtin:chitchat": ASSETS / "chitchat" / "train.jsonl",
    "builtin:chitchat-held-out": ASSETS / "chitchat" / "held_out.jsonl",
}


@dataclass(frozen=True)
class Part:
    """One file or hub dataset of a source. Its rows have one format."""

    name: str
    rows: Callable[[], PlacedRows]
    """Starts a new reading from the first row."""
    is_builtin: bool = False
    """Whether it comes with the package."""


@dataclass(frozen=True)
class Source:
    """A source of rows that can be read more than once."""

    name: str
    parts: tuple[Part, ...]
    """Files and datasets, which are read one after the other."""
    fingerprint: str
    """Digest of the content: it changes when the content changes."""
    is_sample: bool = False
    """Whether it holds only the first rows of a hub dataset."""

    def rows(self) -> PlacedRows:
        """Start a new reading of all parts from the first row."""
        return ((where, row) for _, where, row in self.numbered_rows())

    def numbered_rows(self) -> Iterator[tuple[int, str, RawRow]]:
        """Start a new reading; yield the number of each row's part, its place and the row."""
        for number, part in enumerate(self.parts):
            is_empty = True
            for where, row in part.rows():
                is_empty = False
                yield number, where, row
            if is_empty and len(self.parts) > 1:
                log.warning("%s: has no rows", part.name)


def open_source(source: str | list[str], *, split: str, subset: str | None, sample: int | None = None) -> Source:
    """Return the source that a recipe's `data.source` names; several names are read one after the other.

    `sample`: stream only this many rows of each hub dataset, instead of downloading all of it.

    Raises:
        NotFoundError: there is no such file or dataset, or the hub cannot be reached.
        DataError: the list is empty, a name is that of a folder, or a file has an unknown suffix.
    """
    names = [source] if isinstance(source, str) else source
    sources = [_open_name(name, split, subset, sample) for name in names]
    if (split != "train" or subset) and not any(map(is_remote, names)):
        log.info("%s: files have no splits and subsets, so all of it is read", ", ".join(names))
    if not sources:
        raise DataError("data.source or data.eval_source: the list is empty. Name at least one file or dataset.")
    if len(sources) == 1:
        return sources[0]
    digest = hashlib.sha256("".join(source.fingerprint for source in sources).encode()).hexdigest()
    parts = tuple(part for source in sources for part in source.parts)
    return Source(", ".join(names), parts, digest, is_sample=any(source.is_sample for source in sources))


def _open_name(name: str, split: str, subset: str | None, sample: int | None) -> Source:
    if name.startswith("~"):
        with contextlib.suppress(RuntimeError):  # there is no such user, and so no such file
            name = str(Path(name).expanduser())
    if name.startswith("builtin:"):
        if name not in BUILTIN_DATASETS:
            raise NotFoundError(
                f"{name}: there is no such built-in dataset.{did_you_mean(name, BUILTIN_DATASETS)} "
                f"Known: {', '.join(BUILTIN_DATASETS)}."
            )
        return _files(name, [BUILTIN_DATASETS[name]], is_builtin=True)
    if name and Path(name).is_dir():
        raise _folder_error(Path(name))
    matches = [name] if Path(name).is_file() else sorted(glob.glob(name, recursive=True))
    paths = [Path(path) for path in matches if Path(path).is_file()]
    if paths:
        return _files(name, paths)
    if _looks_like_a_path(name):
        raise NotFoundError(
            f"{name}: no file of that name or pattern. Give a file, a glob in quotes, or a hub id (owner/name)."
        )
    return _hub(name, split, subset, sample)


def is_remote(name: str) -> bool:
    """Return whether the name of a model or dataset can only be that of one on the hub or in its cache."""
    local = name.startswith("builtin:") or _is_path(name)
    return not (local or Path(name).exists() or glob.glob(name, recursive=True))


def _is_path(name: str) -> bool:
    """Return whether a name is that of a path: no model or dataset on the hub can have it."""
    return text_suffix(Path(name)) in FILE_PARSERS or "\\" in name or name.startswith((".", "/", "~"))


def _looks_like_a_path(name: str) -> bool:
    """Return whether a name is not of the form owner/name of hub datasets."""
    return _is_path(name) or "*" in name or "?" in name or name.count("/") != 1


def _folder_error(folder: Path) -> DataError:
    """Return the refusal of a folder: it may hold a training and a held-out part, so only the user knows which files."""
    files = sorted(path for path in folder.iterdir() if text_suffix(path) in FILE_PARSERS)
    example = files[0].suffix if files else ".jsonl"
    found = (
        f" It holds {', '.join(path.name for path in files[:5])}{', ...' if len(files) > 5 else ''}." if files else ""
    )
    return DataError(
        f"{folder}: is a folder.{found} Name its files, or a pattern in quotes such as '{folder}/*{example}'."
    )


def check_splits(source: str | list[str], split: str | None) -> None:
    """Refuse `data.eval_split` for sources without splits: the held-out loss would be measured on the training rows.

    Raises:
        DataError: a source is a file or comes with the package.
    """
    local = [name for name in ([source] if isinstance(source, str) else source) if not is_remote(name)]
    if split is not None and local:
        raise DataError(
            f"data.eval_split: {split}, but {local[0]} is a file, and files have no splits. Set data.eval_split=null, and "
            "data.eval_fraction=0.05 to hold out a share of it, or data.eval_source to name held-out conversations."
        )


def _files(name: str, paths: list[Path], *, is_builtin: bool = False) -> Source:
    """Return local files as one source.

    Raises:
        DataError: a file has an unknown suffix.
    """
    for path in paths:
        check_suffix(path)
    digest = hashlib.sha256("".join(f"{text_suffix(path)}{_digest(path)}" for path in paths).encode()).hexdigest()
    parts = (Part(str(path), functools.partial(parse_file, path), is_builtin) for path in paths)
    return Source(name, tuple(parts), digest)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hub(name: str, split: str, subset: str | None, sample: int | None) -> Source:
    """Return one split of a hub dataset, from the network or from the hub cache; `sample`: at most its first rows.

    Raises:
        NotFoundError: the dataset is neither reachable nor cached, or has no such split or subset.
    """
    if sample is not None and (streamed := _streamed(name, split, subset, sample)) is not None:
        return streamed
    data = _load_dataset(name, split, subset)
    files = "".join(Path(part["filename"]).as_posix() for part in data.cache_files)
    digest = hashlib.sha256(f"{files}{data.num_rows}".encode()).hexdigest()
    part = _hub_part(name, split, lambda: itertools.islice(data, sample))
    return Source(f"{name} ({split})", (part,), digest, is_sample=sample is not None and sample < data.num_rows)


def _streamed(name: str, split: str, subset: str | None, sample: int) -> Source | None:
    """Return the first rows of a hub dataset, streamed from the network; None where it cannot be reached."""
    import datasets

    try:
        rows = list(datasets.load_dataset(name, subset, split=split, streaming=True).take(sample + 1))
    except (OSError, ValueError):  # offline, or an unknown split: reading from the cache finds out which
        return None
    part = _hub_part(name, split, lambda: iter(rows[:sample]))
    return Source(f"{name} ({split})", (part,), "", is_sample=len(rows) > sample)


def _hub_part(name: str, split: str, rows: Callable[[], Iterator[RawRow]]) -> Part:
    return Part(name, lambda: ((f"{name} {split}: row {number}", row) for number, row in enumerate(rows(), start=1)))


def _load_dataset(name: str, split: str, subset: str | None) -> datasets.Dataset:
    """Return one split of a hub dataset.

    Raises:
        NotFoundError: as `_hub`.
    """
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except OSError as error:
        raise NotFoundError(explain("dataset", name, error)) from None
    except ValueError as error:  # an unknown split or subset; the message of datasets lists the known ones
        raise NotFoundError(
            f"{name}: {str(error).splitlines()[0]} Set data.split or data.subset to a known one."
        ) from None
