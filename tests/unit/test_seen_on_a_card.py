"""Faults that the first run on a real card (an NVIDIA H200) found, and what a second reading found beside them."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

from lowvram_chat.errors import DoesNotFit, OutOfMemory
from lowvram_chat.model.device import choose_device
from lowvram_chat.model.out_of_memory import is_out_of_memory
from lowvram_chat.planning.prediction import card_rules, longest_rows_run
from lowvram_chat.planning.replay import replay
from lowvram_chat.recipe.schema import Card, Memory
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.reporting.charts import curves
from lowvram_chat.reporting.plan_tables import PEAK_PHASES
from lowvram_chat.selftest import runs, suite
from lowvram_chat.units import MIB
from tests.papercard.cases import all_cases
from tests.papercard.measure import recipe_of
from tests.samples import ROOT

H200 = json.loads((ROOT / "benchmarks" / "data" / "card_h200.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize(("capability", "nbytes"), [(7.5, 8519680), (8.6, 8519680), (9.0, 32 * MIB), (12.0, 32 * MIB)])
def test_the_workspace_of_cublas_is_that_of_the_compute_capability(capability: float, nbytes: int) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    card = Card(name="A card", memory_mib=4096, compute_capability=capability)
    assert card_rules(recipe.model_copy(update={"memory": Memory(card=card)})).cublas_workspace_bytes == nbytes


@pytest.mark.parametrize(("kind", "limit"), [(0, 2.1), (1, 5.1)], ids=["allocated", "reserved"])
def test_the_stored_plans_are_what_a_real_card_took(kind: int, limit: float) -> None:
    errors = [
        100 * (case["planned"][kind] / case["allocator"][kind] - 1)
        for case in H200.values()
        if case["allocator"][kind] > 500  # MiB: a few kernels' buffers are 2 MiB of a tiny run's 150
    ]
    assert len(errors) >= 49
    assert statistics.median(map(abs, errors)) < 0.2
    assert min(errors) > -3.1  # torch.optim.AdamW: 102 MiB more are reserved than planned
    assert max(errors) < limit  # the plan is for rows with an attention mask, or with dropout


def test_the_planner_gives_a_stored_plan(tmp_path: Path) -> None:
    [case] = [case for case in all_cases() if case.name == "quickstart"]
    card = Card(name="NVIDIA H200", memory_mib=143156, compute_capability=9.0)
    planned = replay(longest_rows_run(recipe_of(case, tmp_path).model_copy(update={"memory": Memory(card=card)})))
    peaks = [planned.peak_allocated_bytes / MIB, planned.peak_reserved_bytes / MIB]
    assert peaks == pytest.approx(H200["quickstart"]["planned"], rel=1e-4)


def test_a_device_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.cuda.set_per_process_memory_fraction refuses torch.device("cuda").
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cuda", lambda: 0) == torch.device("cuda", 0)


def test_every_traced_phase_has_words() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lowvram_chat" / "tracing").glob("*.py")]
    phases = {name for source in sources for name in re.findall(r'recorder\.phase\("(\w+)"\)', source)}
    assert "checks" in phases
    assert phases <= PEAK_PHASES.keys()


@pytest.mark.parametrize("kind", [DoesNotFit, OutOfMemory])
def test_advice_is_not_taken_for_a_device_that_is_full(kind: type[Exception]) -> None:
    assert not is_out_of_memory(kind("advice"))
    assert is_out_of_memory(MemoryError())


def test_a_chart_of_zeros_is_drawn() -> None:
    assert "<svg" in curves("Loss", {"training": [(1.0, 0.0), (2.0, 0.0)]}, unit="nats per token", x="step")


def test_a_recipe_that_does_not_load_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ON_A_CPU", ("train.precision=fp99",))
    check = next(iter(suite._recipe_checks()))
    result = check.run(torch.device("cpu"))
    assert result.status == "failed"
    assert "train.precision" in result.meaning
