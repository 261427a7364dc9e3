"""The time model on this machine's processor: predicted from measured rates, within 15 % of what is measured."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.suite import Keeper
from benchmarks.validation.own_runs import CASES
from lowvram_chat.results.processes import run_in_new_process
from lowvram_chat.results.record import Metric

MAX_ERROR = 0.15


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_as_long_as_predicted(case: str, keeper: Keeper) -> None:
    from benchmarks.validation.own_processor import predict_and_measure  # and with it libraries that use a card

    step = run_in_new_process(predict_and_measure, case)
    metrics = {
        "predicted": Metric(value=round(step.predicted, 4), unit="s", kind="predicted"),
        "measured": Metric(
            value=round(statistics.median(step.measured), 4), unit="s", kind="measured", samples=len(step.measured)
        ),
        "error": Metric(value=round(100 * step.error, 2), unit="%", kind="predicted"),
    }
    problem = None if abs(step.error) <= MAX_ERROR else f"predicted {step.error:+.1%}, at most {MAX_ERROR:.0%}"
    record = keeper.keep(
        "own-processor", case, metrics, problem=problem, recipe=step.recipe, series={"step": step.measured}
    )
    assert record.status == "passed", record.reason
