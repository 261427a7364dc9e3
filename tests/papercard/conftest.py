"""Tests that need torch's CUDA build on the paper card; `make papercard` runs them."""

from __future__ import annotations

import os

import pytest
import torch

ON_PAPER = "papercard" in os.environ.get("LD_PRELOAD", "") and torch.version.cuda is not None
ON_A_CARD = os.environ.get("LOWVRAM_CHAT_TEST_CARD") == "1" and torch.cuda.is_available()
"""Whether these tests run on the card of this machine: LOWVRAM_CHAT_TEST_CARD=1 pytest tests/papercard."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder elsewhere."""
    for item in items:
        if not (ON_PAPER or ON_A_CARD) and "papercard" in item.path.parts:
            item.add_marker(
                pytest.mark.skip(
                    reason="needs the paper card (make papercard) or a real one (LOWVRAM_CHAT_TEST_CARD=1)"
                )
            )


@pytest.fixture(scope="session", autouse=True)
def paper_values() -> None:
    """Let no check look at values."""
    if ON_PAPER:
        from tests.papercard.values import answer_for, ignore_values

        ignore_values()
        answer_for(packed=False)
