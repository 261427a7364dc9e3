"""Compares two sets of results: which metrics changed by more than their tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from lowvram_chat.errors import UsageError
from lowvram_chat.results.record import Metric, Record

Verdict = Literal["better", "worse", "equal"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The old and the new value of a case's metric, or of its status."""

    case: str
    metric: str
    verdict: Verdict
    old: str
    new: str
    change: float | None = None
    """(new - old) / |old|; None for a status."""


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Difference]:
    """Return the differences of the cases that both sets hold, including equal values.

    Raises:
        UsageError: the sets come from different machines or from different versions of a case, or have no case in common.
    """
    old_records, new_records = (
        {(record.machine.name, *record.key): record for record in records} for records in (old, new)
    )
    common = [key for key in old_records if key in new_records]
    if not common:
        _refuse_disjoint(old, new)
    for key in common:
        _check_version(old_records[key], new_records[key])
        _check_processor(old_records[key], new_records[key])
    return [difference for key in common for difference in _differences(old_records[key], new_records[key])]


def missing(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """Return the cases that only the old results hold, as "benchmark/case"."""
    new_keys = {record.key for record in new}
    return [_case_name(record) for record in old if record.key not in new_keys]


def regressed(differences: Sequence[Difference]) -> bool:
    """Return whether any difference is for the worse."""
    return any(difference.verdict == "worse" for difference in differences)


def _refuse_disjoint(old: Sequence[Record], new: Sequence[Record]) -> NoReturn:
    if {record.key for record in old} & {record.key for record in new}:
        machines = (", ".join(sorted({record.machine.name for record in records})) for records in (old, new))
        raise UsageError(
            f"compare: the results were measured on {' and on '.join(machines)}. Compare results of one machine."
        )
    raise UsageError("compare: the two sets have no case in common. Give two sets of results of the same benchmarks.")


def _check_version(old: Record, new: Record) -> None:
    if old.case_version != new.case_version:
        raise UsageError(
            f"{_case_name(old)}: version {old.case_version} and version {new.case_version} of the case measure different "
            "things. Measure the old code again with the current benchmarks."
        )


def _check_processor(old: Record, new: Record) -> None:
    """Refuse measurements on two processors. With a card the processor hardly matters, and old records do not name it."""
    old_model, new_model = old.machine.processor_model, new.machine.processor_model
    is_measured = any(metric.kind == "measured" for metric in old.metrics.values())
    if old.machine.card is None and is_measured and old_model and new_model and old_model != new_model:
        raise UsageError(
            f"{_case_name(old)}: measured on {old_model} and on {new_model}. Compare results of one machine."
        )


def _differences(old: Record, new: Record) -> Iterator[Difference]:
    case = _case_name(old)
    if old.status != new.status:
        yield Difference(case=case, metric="status", verdict=_status_verdict(old, new), old=old.status, new=new.status)
    for name, old_metric in old.metrics.items():
        if old_metric.better == "same":
            continue
        new_metric = new.metrics.get(name)
        if new_metric is None:
            yield Difference(case=case, metric=name, verdict="worse", old=_with_unit(old_metric), new="missing")
        elif new_metric.kind == old_metric.kind:
            yield _metric_difference(case, name, old_metric, new_metric)


def _status_verdict(old: Record, new: Record) -> Verdict:
    if old.status == "passed":
        return "worse"
    return "better" if new.status == "passed" else "equal"


def _metric_difference(case: str, name: str, old: Metric, new: Metric) -> Difference:
    change = (new.value - old.value) / abs(old.value) if old.value else float(new.value != old.value)
    gain = change if old.better == "higher" else -change
    is_noise = abs(change) <= max(old.tolerance, new.tolerance)
    verdict: Verdict = "equal" if is_noise else "better" if gain > 0 else "worse"
    return Difference(case=case, metric=name, verdict=verdict, old=_with_unit(old), new=_with_unit(new), change=change)


def _case_name(record: Record) -> str:
    return "/".join(record.key)


def _with_unit(metric: Metric) -> str:
    return f"{metric.value:,.4g} {metric.unit}"
