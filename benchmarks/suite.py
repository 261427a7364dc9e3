"""What all benchmarks share: the folder of the results, the recipes, and how a case becomes a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results import machine, record
from lowvram_chat.results.record import Metric, Record

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").rglob("*.yaml"))}


@dataclass
class Keeper:
    """Makes records of cases, and stores each as soon as it is finished, so that an interrupted run keeps it."""

    root: Path
    """The checkout whose commit the records name."""
    results: Path
    store: bool
    """Whether records are written to `results`."""
    kept: list[Record] = field(default_factory=list)

    @classmethod
    def of_this_checkout(cls, *, store: bool) -> Keeper:
        """Return a keeper for the suite's own results.

        Raises:
            UsageError: results are to be stored, but the working tree is dirty.
        """
        return cls.checked(ROOT, RESULTS, store=store)

    @classmethod
    def checked(cls, root: Path, results: Path, *, store: bool) -> Keeper:
        """Return a keeper for a checkout; raises as `of_this_checkout`."""
        if store:
            machine.check_clean(root, results)
        return cls(root, results, store)

    def keep(
        self,
        benchmark: str,
        case: str,
        metrics: Mapping[str, Metric],
        *,
        version: int = 1,
        problem: str | None = None,
        out_of_memory: bool = False,
        recipe: Recipe | None = None,
        series: Mapping[str, list[float]] | None = None,
    ) -> Record:
        """Return the record of a case, and store it if `store` is set; `problem` says why the case failed, if it did."""
        new = Record(
            benchmark=benchmark,
            case=case,
            case_version=version,
            status="out_of_memory" if out_of_memory else "failed" if problem else "passed",
            reason=problem,
            metrics=dict(metrics),
            series=dict(series or {}),
            recipe=_changed_settings(recipe),
            machine=machine.this_machine(),
            commit=machine.commit(self.root),
            date=machine.now(),
        )
        self.kept.append(new)
        if self.store:
            record.store(new, self.results)
        return new


def _changed_settings(recipe: Recipe | None) -> dict[str, object] | None:
    """Return the settings of a recipe that differ from the defaults."""
    return None if recipe is None else recipe.model_dump(mode="json", exclude_defaults=True)
