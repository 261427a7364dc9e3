"""One benchmark case's result as a file: RESULTS/<machine>/<benchmark>/<case>.json.

Measured, predicted and published figures are told apart by every metric's `kind`; nothing mixes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.files import write_text

SCHEMA_VERSION = 1
"""Of the files; `Record.schema_version` takes no other."""

MetricKind = Literal["measured", "predicted", "published"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Metric(_Frozen):
    """A figure of a case."""

    value: float
    """The figure; the median where it was taken several times."""
    unit: str
    """MiB, s, ms, tokens/s, h, nats, %, 1 (a share or ratio) ..."""
    kind: MetricKind
    better: Literal["lower", "higher", "same"] = "same"
    """Which way is an improvement; `same`: a figure that says what was run, compared for nothing."""
    tolerance: float = 0.0
    """Relative change that counts as noise."""
    p20: float | None = None
    p80: float | None = None
    samples: int = 1
    """How many were taken, warm-up left out."""


class Machine(_Frozen):
    """What a case ran on; no user or host name."""

    name: str
    """The folder's name, by which results are compared."""
    platform: str
    processor: str
    """Its kind."""
    processor_model: str | None = None
    """Its maker's name, where the system tells it."""
    threads: int
    card: str | None = None
    card_mib: int | None = None
    power_limit_watts: float | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    python: str = ""


class Record(_Frozen):
    """The result of one case."""

    schema_version: Literal[1] = 1
    benchmark: str
    case: str
    case_version: int = 1
    """Raised when a case comes to mean something else: results across versions are not compared."""
    status: Literal["passed", "failed", "out_of_memory"] = "passed"
    reason: str | None = None
    """Why it failed."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    series: dict[str, list[float]] = Field(default_factory=dict)
    """Curves to draw: name -> values over the same places."""
    recipe: dict[str, Any] | None = None
    machine: Machine
    commit: str | None = None
    package: str | None = None
    """The version of this package, which a result that was sent says instead of a commit."""
    date: str = ""
    """ISO 8601, UTC."""

    @property
    def key(self) -> tuple[str, str]:
        """What names the case: benchmark and case."""
        return self.benchmark, self.case

    def value(self, metric: str) -> float | None:
        """Return a metric's figure, None where there is none."""
        return self.metrics[metric].value if metric in self.metrics else None


def slug(text: str) -> str:
    """Return a text as a file name: lower case, hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def path_of(record: Record, root: Path) -> Path:
    """Return where a record is kept."""
    return root / slug(record.machine.name) / slug(record.benchmark) / f"{slug(record.case)}.json"


def store(record: Record, root: Path) -> Path:
    """Write a record whole and return its path; an earlier one of the case is replaced."""
    path = path_of(record, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, record.model_dump_json(indent=1, exclude_defaults=False) + "\n")
    return path


def load(path: Path) -> Record:
    """Return one stored record.

    Raises:
        UsageError: the file is no record of this schema version.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{path}: not a benchmark result of schema version {SCHEMA_VERSION} ({place}: {first['msg']}). "
            "Give a file that pytest benchmarks/ --store or bench run wrote."
        ) from None


def load_all(paths: Iterable[Path]) -> list[Record]:
    """Return the records of files, and of folders with all that lies below, in the order of their names.

    Raises:
        NotFoundError: no such file or folder, or a folder without results.
        UsageError: see `load`.
    """
    records = []
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"{path}: there is no such file or folder. Give what pytest benchmarks/ --store wrote.")
        files = [path] if path.is_file() else sorted(path.rglob("*.json"))
        if not files:
            raise NotFoundError(f"{path}: no results in it. pytest benchmarks/ --store --results {path} writes them.")
        records += [load(file) for file in files]
    return records


def records_by_case(records: Sequence[Record], benchmark: str) -> Mapping[str, Record]:
    """Return case -> record of one benchmark; of a case that several machines ran, the machine stands in the name too."""
    found = [record for record in records if record.benchmark == benchmark]
    times = Counter(record.case for record in found)
    return {r.case if times[r.case] == 1 else f"{r.case}, {r.machine.name}": r for r in found}


def spread(values: Sequence[float], unit: str, **more: Any) -> Metric:
    """Return measured samples as a metric: their median, with the 20th and 80th percentile."""
    import numpy as np

    low, middle, high = (float(value) for value in np.percentile(values, (20, 50, 80)))
    return Metric(value=middle, unit=unit, kind="measured", p20=low, p80=high, samples=len(values), **more)
