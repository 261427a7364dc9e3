"""Conversations become token rows nearly as fast as the tokenizer alone works; see bench_tokenize."""

from __future__ import annotations

import pytest

from benchmarks import bench_tokenize
from benchmarks.suite import Keeper


@pytest.mark.parametrize("conversations", [4_000, pytest.param(200_000, marks=pytest.mark.full)])
def test_token_rows_come_nearly_as_fast_as_tokens(conversations: int, keeper: Keeper) -> None:
    record = bench_tokenize.measure(keeper, conversations)
    assert record.status == "passed", record.reason
