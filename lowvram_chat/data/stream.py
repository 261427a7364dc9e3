"""A file of token rows that is written block by block, and gone on with where it was cut short.

An Arrow stream is a schema and record batches one after the other, each of which can be written by itself. Beside the file
stands what was written so far: its length, its checksum, and where the writer was.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_chat.files import write_text

if TYPE_CHECKING:
    import pyarrow

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Source: Apache Arrow's columnar format, "IPC Streaming Format"."""

STATE_SUFFIX = ".state"
"""Ending of what is known of an unfinished file; the finished one's facts have another."""


def crc32(path: Path, length: int | None = None) -> int:
    """Return the checksum of a file, or of its first `length` bytes."""
    value, left = 0, path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 22))):
            value = zlib.crc32(block, value)
            left -= len(block)
    return value if left == 0 else -1


@dataclass
class RowStream:
    """A stream that is being written."""

    path: Path
    """Of the unfinished file; what is known of it stands beside it, in .state."""
    length: int = 0
    checksum: int = 0
    state: dict[str, Any] | None = None
    """Where the writer was when the last block was written; None: at the beginning."""

    @classmethod
    def open(cls, path: Path, schema: pyarrow.Schema) -> RowStream:
        """Return the stream as it was left, or a new one where none was begun or it is damaged."""
        try:
            known = json.loads(path.with_suffix(STATE_SUFFIX).read_text(encoding="utf-8"))
            stream = cls(path, known["length"], known["checksum"], known["state"])
            if crc32(path, stream.length) == stream.checksum:
                with path.open("r+b") as file:
                    file.truncate(stream.length)
                return stream
        except (OSError, ValueError, KeyError):
            pass
        stream = cls(path)
        path.unlink(missing_ok=True)
        stream._append(schema.serialize().to_pybytes())
        return stream

    def write(self, batch: pyarrow.RecordBatch, state: dict[str, Any]) -> None:
        """Append a block, after which the writer is at `state`."""
        self._append(batch.serialize().to_pybytes())
        self.state = state
        beside = self.path.with_suffix(STATE_SUFFIX)
        write_text(beside, json.dumps({"length": self.length, "checksum": self.checksum, "state": state}))

    def finish(self, final: Path) -> int:
        """End the stream under its final name; returns its checksum."""
        self._append(END_OF_STREAM)
        self.path.replace(final)
        self.path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)
        return self.checksum

    def discard(self) -> None:
        """Forget the stream."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)

    def _append(self, block: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(block)
        self.length += len(block)
        self.checksum = zlib.crc32(block, self.checksum)
