"""LoRA beside full fine-tuning and packed beside padded rows, step against step on this machine's CPU; see bench_turns."""

from __future__ import annotations

import pytest

from benchmarks import bench_turns
from benchmarks.suite import Keeper


@pytest.mark.full
@pytest.mark.parametrize("case", bench_turns.MATCHES)
def test_less_work_is_faster(case: str, keeper: Keeper) -> None:
    record = bench_turns.play(keeper, case)
    assert record.status == "passed", record.reason
