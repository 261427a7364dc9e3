"""Opens text files as they come: UTF-8 or UTF-16 with a byte-order mark, plain or compressed, within bounds of size."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from lowvram_chat.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

COMPRESSIONS = (".gz", ".zst")
"""Suffixes of compressed files, after the suffix of the text: `chats.jsonl.gz`."""
MAX_ROW_CHARACTERS = 1 << 26
"""Longest line of a JSON Lines file: 64 Mi characters. A longer one is not read into memory."""
MAX_WHOLE_CHARACTERS = 1 << 30
"""Longest file that is read at once: 1 Gi characters, which take 1 to 4 GiB."""
MAX_EXPANSION = 200
"""Largest accepted ratio of unpacked to packed bytes. JSON Lines of chats shrink to a third to a tenth."""
ALWAYS_UNPACKED = 1 << 28
"""Bytes that are unpacked whatever the ratio is (256 MiB)."""

NOT_UTF8 = re.compile(r"[\udc80-\udcff]")
"""A byte that is not UTF-8, in the form that Python's surrogateescape handler gives it."""

MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
"""First bytes of compressed files -> their suffix."""
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def text_suffix(path: Path) -> str:
    """Return the suffix that tells how a file is parsed, in lower case: `.jsonl` for `chats.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def open_text(path: Path) -> IO[str]:
    """Return an open text file. Line ends are kept as they are; bytes that are not UTF-8 become `NOT_UTF8` characters.

    Raises:
        DataError: the file is compressed without a suffix that says so, or is in another encoding.
    """
    data = _open_bytes(path)
    start = data.read(4)
    data.seek(0)
    _check_start(path, start)
    encoding = "utf-16" if start.startswith(UTF16_MARKS) else "utf-8-sig"
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    return io.TextIOWrapper(cast("IO[bytes]", data), encoding=encoding, errors=errors, newline="")


def _check_start(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes say that it is no UTF-8 or UTF-16 text.

    Raises:
        DataError: with how to name or save the file.
    """
    suffix = next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), None)
    if suffix is not None:
        raise DataError(f"{path}: is a compressed file. Rename it to end in {suffix}.")
    if start.startswith(UTF32_MARKS) or (b"\0" in start and not start.startswith(UTF16_MARKS)):
        raise DataError(f"{path}: is neither UTF-8 text, nor UTF-16 with a byte-order mark. Save it as UTF-8.")


def read_text(path: Path) -> str:
    """Return the whole text of a file.

    Raises:
        DataError: the file is damaged, is or unpacks to too much to be held in memory, or is not text.
    """
    try:
        with open_text(path) as file:
            text = file.read(MAX_WHOLE_CHARACTERS + 1)
            if len(text) > MAX_WHOLE_CHARACTERS:
                raise DataError(
                    f"{path}: has more than {MAX_WHOLE_CHARACTERS:,} characters, too many to read at once. Write one "
                    "row on each line (.jsonl)."
                )
            return text
    except READ_ERRORS as error:
        raise damaged(path, "in the middle", error) from None


def lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield the number and the text of each line; None in place of a line longer than `MAX_ROW_CHARACTERS`.

    Raises:
        DataError: the file is damaged, unpacks to too much, or is not text; with the line where it stops.
    """
    number = 0
    try:
        with open_text(path) as file:
            while line := file.readline(MAX_ROW_CHARACTERS):
                number += 1
                is_whole = len(line) < MAX_ROW_CHARACTERS or line.endswith("\n")
                yield number, line if is_whole else None
                while not is_whole:
                    rest = file.readline(MAX_ROW_CHARACTERS)
                    is_whole = not rest or rest.endswith("\n")
    except READ_ERRORS as error:
        raise damaged(path, f"after line {number}", error) from None


def damaged(path: Path, place: str, error: Exception) -> DataError:
    """Return our error for a file that cannot be read to its end."""
    if isinstance(error, _TooLarge):
        return DataError(
            f"{path}: unpacks to more than {MAX_EXPANSION} times its size, so reading stopped {place}. Unpack it yourself if it "
            "is what you expect, and name the unpacked file."
        )
    if isinstance(error, EOFError):
        return DataError(f"{path}: the file is cut off; it stops {place}. Copy or download it again.")
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{path}: not valid {error.encoding.upper()} text {place}. Save it as UTF-8.")
    return DataError(f"{path}: the file is damaged {place} ({error}). Copy or download it again.")


class _TooLarge(Exception):
    """A compressed file unpacks to more than is accepted."""


READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, zlib.error, _TooLarge)
"""What reading a damaged file raises."""


def _open_bytes(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        return path.open("rb")
    limit = max(ALWAYS_UNPACKED, MAX_EXPANSION * path.stat().st_size)
    unpack: Callable[[Path], IO[bytes]] = _zstandard if suffix == ".zst" else _gzip
    return io.BufferedReader(_Bounded(unpack, path, limit), 1 << 20)


def _gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _zstandard(path: Path) -> IO[bytes]:
    import pyarrow

    return cast("IO[bytes]", pyarrow.input_stream(str(path), compression="zstd"))


class _Bounded(io.RawIOBase):
    """The unpacked bytes of a file, which end with an error where they exceed a limit. It can be rewound to the start."""

    def __init__(self, unpack: Callable[[Path], IO[bytes]], path: Path, limit: int) -> None:
        self.unpack, self.path, self.limit = unpack, path, limit
        self.file, self.position = unpack(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go back to the start; no other place is asked for."""
        if whence == io.SEEK_CUR and offset == 0:
            return self.position
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("a compressed file is only rewound")
        self.file.close()
        self.file, self.position = self.unpack(self.path), 0
        return 0

    def readinto(self, buffer: object) -> int:
        """Fill the buffer and return the number of bytes."""
        view = memoryview(cast("bytearray", buffer))
        data = self.file.read(min(len(view), 1 << 20))
        view[: len(data)] = data
        self.position += len(data)
        if self.position > self.limit:
            raise _TooLarge
        return len(data)

    def close(self) -> None:
        """Close the packed file."""
        if not self.closed:
            self.file.close()
        super().close()
