"""Files written whole: a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file under another name first, then move it into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write an indented JSON file as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
