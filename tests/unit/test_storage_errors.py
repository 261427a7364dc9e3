"""What fails while something is written becomes one message, without a real disk (tests/faults/test_storage.py has real ones)."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lowvram_chat.cli import guarded
from lowvram_chat.errors import StorageError
from lowvram_chat.files import written

FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6784 vs 6676"),
    ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),  # as safetensors says it
)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_message(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"No space left on device. Free space on this disk"), written(tmp_path):
        raise error


def test_what_is_missing_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Free at least [\d,]+ MiB"), written(tmp_path, needed_bytes=1 << 60):
        (tmp_path / "x").touch()
    assert not (tmp_path / "x").exists()


def test_an_error_that_has_nothing_to_do_with_the_disk_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), written(tmp_path):
        raise RuntimeError("shapes differ")


def test_every_error_of_the_system_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x/metrics.jsonl")

    assert guarded(fail) == 2
    assert capsys.readouterr().err.startswith(
        "runs/x/metrics.jsonl: Permission denied. Choose a folder that you may write"
    )
