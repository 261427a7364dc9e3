"""Wrong inputs, kept as data in `corpus/*.yaml`: read, written into a folder, and turned into the words of a command."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "corpus"
GOOD_ROW = {
    "id": "r1",
    "source": "a test",
    "model_type": "gpt2",
    "config": '{"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 32}',
    "batch": "1",
    "seq_len": "8",
    "precision": "fp32",
    "optimizer": "Adam",
    "attention": "eager",
    "loss": "logits",
    "mask": "none",
    "zero_grad": "loop_top",
    "steps": "1",
    "transformers": "",
    "gpu": "A100 40GB",
    "gpu_total_mib": "40536",
    "metric": "reserved",
    "measured_mib": "5577",
    "out_of_memory": "no",
    "hard": "",
    "xmem_mib": "",
    "dnnmem_mib": "",
    "schedtune_mib": "",
    "llmem_mib": "",
    "note": "",
}
"""A row of measured runs that is right. Cases replace columns of it."""


@dataclass(frozen=True)
class Case:
    """A wrong input: a command, and the content of the file that it reads, if it is the file that is wrong."""

    kind: str
    name: str
    words: list[str]
    file: str | None = None
    content: bytes | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """Settings that replace those of a model's config.json."""

    def __str__(self) -> str:
        """Return the name for the test's report."""
        return f"{self.kind}: {self.name}"


def cases() -> Iterator[Case]:
    """Yield every wrong input."""
    for path in sorted(FOLDER.glob("*.yaml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, content in document["cases"].items():
            yield _case(path.stem, name, content, document)


def _case(kind: str, name: str, content: Any, document: dict[str, Any]) -> Case:
    if kind == "commands":
        return Case(kind, name, _words(content))
    if kind == "configs":
        words = ["sft", "{recipe}", "model.name={copy}"]
        whole = "text" in content
        return Case(
            kind, name, words, content=_bytes(content["text"]) if whole else None, config={} if whole else content
        )
    if kind == "csv":
        table = content["text"] if "text" in content else _table({**GOOD_ROW, **_texts(content)})
        return Case(kind, name, ["validation", "memory", "{file}"], "wrong.csv", _bytes(table))
    file: str = document["file"]
    text: Any = content
    if isinstance(content, dict) and "name" in content:
        file, text = content["name"], content["text"]
    return Case(kind, name, document["command"], file, _bytes(text))


def _words(content: Any) -> list[str]:
    """Return a command's words; `repeated` puts a text many times in the place of `*`."""
    if isinstance(content, list):
        return content
    words, part, times = content["repeated"]
    return [word.replace("*", part * times) for word in words]


def _bytes(content: Any) -> bytes:
    """Return the bytes of a file; `repeated` is [before, part, times, after]."""
    if isinstance(content, dict):
        before, part, times, after = content["repeated"]
        content = before + part * times + after
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


def _texts(content: dict[str, Any]) -> dict[str, str]:
    return {name: _bytes(text).decode() for name, text in content.items()}


def _table(row: dict[str, str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(row))
    writer.writeheader()
    writer.writerow(row)
    return out.getvalue()


def write(case: Case, folder: Path, model: Path) -> dict[str, str]:
    """Write a case's file or model, and return what the braces in its words stand for."""
    names = {}
    if case.file is not None:
        (folder / case.file).write_bytes(case.content or b"")
        names["file"] = case.file
    if case.kind == "configs":
        copy = folder / "copy"
        copy.mkdir()
        for path in model.iterdir():
            (copy / path.name).symlink_to(path)
        before = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").unlink()
        changed = json.dumps(before | case.config).encode() if case.content is None else case.content
        (copy / "config.json").write_bytes(changed)
        names["copy"] = str(copy)
    return names
