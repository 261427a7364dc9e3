"""What got better or worse between two sets of results, beyond each metric's tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from lowvram_chat.errors import UsageError
from lowvram_chat.results.record import Metric, Record

Verdict = Literal["better", "worse", "equal"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric, or the status, of one case."""

    case: str
    metric: str
    verdict: Verdict
    old: str
    new: str
    change: float | None = None
    """(new - old) / |old|; None for a status."""


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Difference]:
    """Return the differences of the cases that both sets hold.

    Raises:
        UsageError: the machines or a case's versions differ, or the sets have no case in common.
    """
    before, after = ({(record.machine.name, *record.key): record for record in side} for side in (old, new))
    common = [key for key in before if key in after]
    if not common:
        _refuse(old, new)
    for key in common:
        _check_version(before[key], after[key])
        _check_processor(before[key], after[key])
    return [difference for key in common for difference in _differences(before[key], after[key])]


def missing(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """Return the cases that only the old results hold."""
    kept = {record.key for record in new}
    return ["/".join(record.key) for record in old if record.key not in kept]


def regressed(differences: Sequence[Difference]) -> bool:
    """Return whether anything got worse."""
    return any(difference.verdict == "worse" for difference in differences)


def _refuse(old: Sequence[Record], new: Sequence[Record]) -> NoReturn:
    if {record.key for record in old} & {record.key for record in new}:
        machines = (", ".join(sorted({record.machine.name for record in side})) for side in (old, new))
        raise UsageError(f"compare: taken on {' and on '.join(machines)}. Compare results of one machine.")
    raise UsageError("compare: the two have no case in common. Give two results of the same benchmarks.")


def _check_version(old: Record, new: Record) -> None:
    if old.case_version != new.case_version:
        raise UsageError(
            f"{'/'.join(old.key)}: version {old.case_version} and version {new.case_version} of the case measure different "
            "things. Measure the old code anew with this suite."
        )


def _check_processor(old: Record, new: Record) -> None:
    """Refuse figures of two processors; with a card it hardly matters, and older results do not say theirs."""
    one, other = (record.machine.processor_model for record in (old, new))
    measured = any(metric.kind == "measured" for metric in old.metrics.values())
    if old.machine.card is None and measured and one and other and one != other:
        raise UsageError(f"{'/'.join(old.key)}: taken on {one} and on {other}. Compare results of one machine.")


def _differences(old: Record, new: Record) -> Iterator[Difference]:
    case = "/".join(old.key)
    if old.status != new.status:
        verdicts: dict[str, Verdict] = {old.status: "worse", new.status: "better"}
        yield Difference(
            case=case, metric="status", verdict=verdicts.get("passed", "equal"), old=old.status, new=new.status
        )
    for name, metric in old.metrics.items():
        other = new.metrics.get(name)
        if other is not None and metric.better != "same" and metric.kind == other.kind:
            yield _of_metric(case, name, metric, other)
        elif other is None and metric.better != "same":
            yield Difference(case=case, metric=name, verdict="worse", old=_figure(metric), new="missing")


def _of_metric(case: str, name: str, old: Metric, new: Metric) -> Difference:
    change = (new.value - old.value) / abs(old.value) if old.value else float(new.value != old.value)
    gain = change if old.better == "higher" else -change
    beyond = abs(change) > max(old.tolerance, new.tolerance)
    verdict: Verdict = "equal" if not beyond else "better" if gain > 0 else "worse"
    return Difference(case=case, metric=name, verdict=verdict, old=_figure(old), new=_figure(new), change=change)


def _figure(metric: Metric) -> str:
    return f"{metric.value:,.4g} {metric.unit}"
