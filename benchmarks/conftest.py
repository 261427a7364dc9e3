"""The suite's options and what its cases share.

pytest benchmarks/                 under ten minutes on two CPU cores, nothing written
pytest benchmarks/ --full          every case (hours)
pytest benchmarks/ --store         each case into benchmarks/results/<machine>/<benchmark>/<case>.json
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plans import Plans
from benchmarks.suite import RESULTS, Keeper
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_libraries

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is in the cache is used, and random weights for the rest
CACHE = tempfile.mkdtemp(prefix="lowvram-chat-benchmarks-")
os.environ["LOWVRAM_CHAT_CACHE"] = CACHE  # the suite leaves nothing behind but its results
KEEPER = pytest.StashKey[Keeper]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--full", action="store_true", help="all cases, more runs of each")
    group.addoption("--store", action="store_true", help="write each case's result as soon as it is finished")
    group.addoption("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where --store writes")


def pytest_configure(config: pytest.Config) -> None:
    quiet_libraries()
    try:
        keeper = Keeper.checked(config.rootpath, config.getoption("--results"), store=config.getoption("--store"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[KEEPER] = keeper


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long unless --full, and what needs a card where there is none."""
    import torch

    def is_wanted(item: pytest.Item) -> bool:
        is_long = item.get_closest_marker("full") is not None and not config.getoption("--full")
        return not is_long and (item.get_closest_marker("gpu") is None or torch.cuda.is_available())

    left_out = [item for item in items if not is_wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_wanted(item)]


def pytest_unconfigure() -> None:
    """Remove the token cache of this session."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def keeper(request: pytest.FixtureRequest) -> Keeper:
    """What makes records of cases."""
    return request.config.stash[KEEPER]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether all cases are asked for."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def plans(request: pytest.FixtureRequest) -> Iterator[Plans]:
    """Plans of the recipes that the selected tests will ask for, begun side by side."""
    made = Plans()
    for item in request.session.items:
        recipe = getattr(item, "callspec", None) and item.callspec.params.get("recipe")  # type: ignore[attr-defined]
        if recipe is not None and "plans" in getattr(item, "fixturenames", ()):
            made.ask(recipe)
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what each case came to: predicted and measured are never in one line."""
    kept = config.stash[KEEPER].kept
    if not kept:
        return
    terminalreporter.section("benchmarks")
    for record in kept:
        for kind in ("predicted", "measured"):
            figures = [
                f"{name.replace('_', ' ')} {metric.value:,.4g} {metric.unit}".removesuffix(" 1")
                for name, metric in record.metrics.items()
                if metric.kind == kind
            ]
            if figures:
                more = f", and {len(figures) - 4} more" if len(figures) > 4 else ""
                line = f"{record.benchmark}/{record.case} [{record.status}] {kind}: {', '.join(figures[:4])}{more}"
                terminalreporter.write_line(line)
    where = config.getoption("--results")
    stored = config.getoption("--store")
    told = f"stored in {where}" if stored else "not stored; --store keeps them for python -m lowvram_chat.bench report"
    terminalreporter.write_line(f"{len(kept)} results, {told}")
