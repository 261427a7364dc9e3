"""Checks the path of an output file before the work that fills it begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lowvram_chat.errors import UsageError


def check_output_file(option: str, path: Path) -> None:
    """Check that a file can be created at `path`, which the command-line option `option` gave.

    Raises:
        UsageError: the path is a folder, or its parent folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{option}: {path} is a folder. Give the path of a file.")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: the folder {path.parent} does not exist. Create it, or give another path.")
    try:
        tempfile.TemporaryFile(
            dir=path.parent
        ).close()  # what the permissions say is not all: the file system may be read-only
    except OSError as error:
        raise UsageError(
            f"{option}: nothing can be written into {path.parent} ({error.strerror}). Give another path."
        ) from None
