"""A file of token rows that is written in blocks and can be continued after an interruption.

An Arrow stream consists of a schema and record batches, each of which can be appended separately. A state file beside it
records the length and checksum of what was written so far, and the progress of the writer.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from lowvram_chat.files import write_text

if TYPE_CHECKING:
    import pyarrow

State = TypeVar("State", bound=Mapping[str, object])

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""End-of-stream marker. Source: Apache Arrow's columnar format, "IPC Streaming Format"."""

STATE_SUFFIX = ".state"
"""Suffix of the state file beside an unfinished stream."""


def crc32(path: Path, length: int | None = None) -> int:
    """Return the CRC-32 of a file or of its first `length` bytes; -1 where the file is shorter."""
    value, left = 0, path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 22))):
            value = zlib.crc32(block, value)
            left -= len(block)
    return value if left == 0 else -1


@dataclass
class RowStream(Generic[State]):
    """A stream that is being written; `State` is the progress of its writer, a mapping that JSON can hold."""

    path: Path
    """The unfinished file; the state file beside it has the suffix .state."""
    length: int = 0
    """Bytes written so far."""
    checksum: int = 0
    """CRC-32 of these bytes."""
    state: State | None = None
    """Progress of the writer after the last block; None: no block was written."""

    @classmethod
    def open(cls, path: Path, schema: pyarrow.Schema) -> RowStream[State]:
        """Return the unfinished stream at a path, or a new one where there is none or it is damaged."""
        try:
            stored = json.loads(path.with_suffix(STATE_SUFFIX).read_text(encoding="utf-8"))
            stream = cls(path, stored["length"], stored["checksum"], stored["state"])
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

    def write(self, batch: pyarrow.RecordBatch, state: State) -> None:
        """Append a block and record the writer's progress after it."""
        self._append(batch.serialize().to_pybytes())
        self.state = state
        state_file = self.path.with_suffix(STATE_SUFFIX)
        write_text(state_file, json.dumps({"length": self.length, "checksum": self.checksum, "state": state}))

    def finish(self, final: Path) -> int:
        """End the stream, move it to its final name and return its checksum."""
        self._append(END_OF_STREAM)
        self.path.replace(final)
        self.path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)
        return self.checksum

    def discard(self) -> None:
        """Delete the stream and its state file."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)

    def _append(self, block: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(block)
        self.length += len(block)
        self.checksum = zlib.crc32(block, self.checksum)
