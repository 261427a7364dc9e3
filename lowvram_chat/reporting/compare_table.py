"""Prints how benchmark results changed: `bench compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from lowvram_chat.results.compare import Difference


def show_differences(differences: Sequence[Difference]) -> None:
    """Print the values that got better or worse as a table on stdout, then a summary of all differences."""
    changed = [difference for difference in differences if difference.verdict != "equal"]
    if changed:
        Console(markup=False, emoji=False, highlight=False).print(_changes_table(changed))
    print(_summary(differences))


def differences_document(differences: Sequence[Difference]) -> dict[str, object]:
    """Return all differences as a JSON document."""
    return {"differences": [asdict(difference) for difference in differences]}


def _changes_table(changed: Sequence[Difference]) -> Table:
    table = Table("case", "metric", "old", "new", "change", "verdict")
    for difference in changed:
        change = "" if difference.change is None else f"{difference.change:+.1%}"
        metric = difference.metric.replace("_", " ")
        table.add_row(difference.case, metric, difference.old, difference.new, change, difference.verdict)
    return table


def _summary(differences: Sequence[Difference]) -> str:
    worse = sum(difference.verdict == "worse" for difference in differences)
    better = sum(difference.verdict == "better" for difference in differences)
    equal = len(differences) - worse - better
    values = "1 value" if len(differences) == 1 else f"{len(differences)} values"
    return f"{values} compared: {worse} worse, {better} better, {equal} within tolerance"
