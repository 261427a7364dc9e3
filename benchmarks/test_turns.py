"""LoRA is faster than full fine-tuning, and packed rows are faster than padded ones, on this machine's CPU; see bench_turns."""

from __future__ import annotations

import pytest

from benchmarks import bench_turns
from benchmarks.suite import Keeper


@pytest.mark.full
@pytest.mark.parametrize("case", bench_turns.MATCHES)
def test_less_work_is_faster(case: str, keeper: Keeper) -> None:
    record = bench_turns.run_match(keeper, case)
    assert record.status == "passed", record.reason
