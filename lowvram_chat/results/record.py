"""Records of benchmark cases, and the files that store them: RESULTS/<machine>/<benchmark>/<case>.json.

The `kind` of a metric says whether its value was measured, predicted or published by others. The kinds are never mixed.
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
"""Version of the file format. `Record.schema_version` accepts no other."""

MetricKind = Literal["measured", "predicted", "published"]
Improvement = Literal["lower", "higher", "same"]
Status = Literal["passed", "failed", "out_of_memory"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Metric(_Frozen):
    """One figure of a case."""

    value: float
    """The figure. If there are several samples, their median."""
    unit: str
    """MiB, s, ms, tokens/s, h, nats, %, or 1 for a share or a ratio."""
    kind: MetricKind
    better: Improvement = "same"
    """The direction of an improvement. `same` marks a figure that describes the case and is not compared."""
    tolerance: float = 0.0
    """Relative change that counts as noise."""
    p20: float | None = None
    p80: float | None = None
    samples: int = 1
    """Number of samples, without the warm-up."""


class Machine(_Frozen):
    """The machine that a case ran on. It holds no user name and no host name."""

    name: str
    """Identifies the machine when results are compared, and names the folder of its results."""
    platform: str
    processor: str
    """Architecture of the processor."""
    processor_model: str | None = None
    """Full name of the processor, if the system reports it."""
    threads: int
    card: str | None = None
    card_mib: int | None = None
    power_limit_watts: float | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    python: str = ""


class CheckResult(_Frozen):
    """One check of a self-test (`doctor --selftest`)."""

    name: str
    title: str
    status: Literal["ok", "failed", "skipped"]
    """skipped: this device cannot run the check."""
    meaning: str
    """What it means for a run, and what to do if it failed."""
    figures: dict[str, Metric] = Field(default_factory=dict)
    seconds: float


class Record(_Frozen):
    """The result of one case."""

    schema_version: Literal[1] = 1
    benchmark: str
    case: str
    case_version: int = 1
    """Raised when the meaning of the case changes. Results of different versions are not compared."""
    status: Status = "passed"
    reason: str | None = None
    """Why the case failed."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    checks: tuple[CheckResult, ...] = ()
    """The checks of a self-test."""
    series: dict[str, list[float]] = Field(default_factory=dict)
    """Curves to draw: name -> values. All curves of a record share their x positions."""
    recipe: dict[str, Any] | None = None
    machine: Machine
    commit: str | None = None
    package: str | None = None
    """Version of this package. The results of `bench run` have it instead of a commit."""
    date: str = ""
    """ISO 8601, UTC."""

    @property
    def key(self) -> tuple[str, str]:
        """The benchmark and the case, which together identify a result on one machine."""
        return self.benchmark, self.case

    def value(self, metric: str) -> float | None:
        """Return the value of a metric; None if the record does not have it."""
        return self.metrics[metric].value if metric in self.metrics else None


def slug(text: str) -> str:
    """Return a text as a file name: lower case, with hyphens between words."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def path_of(record: Record, root: Path) -> Path:
    """Return the path at which `store` writes a record."""
    return root / slug(record.machine.name) / slug(record.benchmark) / f"{slug(record.case)}.json"


def store(record: Record, root: Path) -> Path:
    """Write a record atomically and return its path. An earlier record of the case is replaced."""
    path = path_of(record, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, record.model_dump_json(indent=1, exclude_defaults=False) + "\n")
    return path


def load(path: Path) -> Record:
    """Return one stored record.

    Raises:
        UsageError: the file is not a record of this schema version.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{path}: not a benchmark result of schema version {SCHEMA_VERSION} ({field}: {first['msg']}). "
            "Give a file that pytest benchmarks/ --store or bench run wrote."
        ) from None


def load_all(paths: Iterable[Path]) -> list[Record]:
    """Return the records of the given files, and of all files below the given folders, sorted by path in each folder.

    Raises:
        NotFoundError: a file or folder does not exist, or a folder holds no results.
        UsageError: see `load`.
    """
    records = []
    for path in paths:
        if not path.exists():
            raise NotFoundError(
                f"{path}: there is no such file or folder. Give a path that pytest benchmarks/ --store wrote."
            )
        files = [path] if path.is_file() else sorted(path.rglob("*.json"))
        if not files:
            raise NotFoundError(
                f"{path}: this folder holds no results. Run pytest benchmarks/ --store --results {path} to fill it."
            )
        records += [load(file) for file in files]
    return records


def records_by_case(records: Sequence[Record], benchmark: str) -> Mapping[str, Record]:
    """Return case -> record for one benchmark.

    If several machines ran a case, the key is "<case>, <machine>".
    """
    selected = [record for record in records if record.benchmark == benchmark]
    machines_per_case = Counter(record.case for record in selected)
    return {
        record.case if machines_per_case[record.case] == 1 else f"{record.case}, {record.machine.name}": record
        for record in selected
    }


def spread(values: Sequence[float], unit: str, *, better: Improvement = "same", tolerance: float = 0.0) -> Metric:
    """Return measured samples as a metric: the median, with the 20th and 80th percentiles."""
    import numpy as np

    low, median, high = (float(value) for value in np.percentile(values, (20, 50, 80)))
    return Metric(
        value=median,
        unit=unit,
        kind="measured",
        better=better,
        tolerance=tolerance,
        p20=low,
        p80=high,
        samples=len(values),
    )
