"""What every benchmark shares: where results go, and how a case becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """The checkout whose commit is named."""
    results: Path
    store: bool
    kept: list[Record] = field(default_factory=list)

    @classmethod
    def of_this_checkout(cls, *, store: bool) -> Keeper:
        """Return one for the suite's own results.

        Raises:
            UsageError: results are to be stored, and the tree is dirty.
        """
        return cls.checked(ROOT, RESULTS, store=store)

    @classmethod
    def checked(cls, root: Path, results: Path, *, store: bool) -> Keeper:
        """Return one for a checkout; raises as `of_this_checkout`."""
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
        """Return a case's record, stored where that is asked for; `problem` says why it failed."""
        made = Record(
            benchmark=benchmark,
            case=case,
            case_version=version,
            status="out_of_memory" if out_of_memory else "failed" if problem else "passed",
            reason=problem,
            metrics=dict(metrics),
            series=dict(series or {}),
            recipe=_words(recipe),
            machine=machine.this_machine(),
            commit=machine.commit(self.root),
            date=machine.now(),
        )
        self.kept.append(made)
        if self.store:
            record.store(made, self.results)
        return made


def _words(recipe: Recipe | None) -> dict[str, Any] | None:
    return None if recipe is None else recipe.model_dump(mode="json", exclude_defaults=True)
