"""A step of GPT-2 small reaches most of the machine's matrix-product rate; see bench_step."""

from __future__ import annotations

import pytest

from benchmarks import bench_step
from benchmarks.suite import Keeper


@pytest.mark.full
def test_a_step_reaches_most_of_the_matrix_products_rate(keeper: Keeper) -> None:
    record = bench_step.share(keeper)
    assert record.status == "passed", record.reason
