"""Options and fixtures of the benchmark suite.

pytest benchmarks/                 under ten minutes on two CPU cores, nothing written
pytest benchmarks/ --full          every case (hours)
pytest benchmarks/ --store         writes each case to benchmarks/results/<machine>/<benchmark>/<case>.json
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.plans import Plans
from benchmarks.suite import RESULTS, Keeper
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_libraries

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models that are not in the cache get random weights
CACHE = tempfile.mkdtemp(prefix="lowvram-chat-benchmarks-")
os.environ["LOWVRAM_CHAT_CACHE"] = CACHE  # the suite leaves nothing behind except its results
KEEPER = pytest.StashKey[Keeper]()
NOT_STORED = "not stored; --store keeps them for python -m lowvram_chat.bench report"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("benchmarks")
    group.addoption("--full", action="store_true", help="all cases, more runs of each")
    group.addoption("--store", action="store_true", help="write each case's result as soon as it is finished")
    group.addoption("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where --store writes")


def pytest_configure(config: pytest.Config) -> None:
    """Make the keeper of results; refuse to store results of a dirty working tree."""
    quiet_libraries()
    try:
        keeper = Keeper.checked(config.rootpath, config.getoption("--results"), store=config.getoption("--store"))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[KEEPER] = keeper


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect long cases unless --full is given, and cases that need a GPU where there is none."""
    import torch

    def is_selected(item: pytest.Item) -> bool:
        is_long = item.get_closest_marker("full") is not None and not config.getoption("--full")
        return not is_long and (item.get_closest_marker("gpu") is None or torch.cuda.is_available())

    deselected = [item for item in items if not is_selected(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if is_selected(item)]


def pytest_unconfigure() -> None:
    """Remove the token cache of this session."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def keeper(request: pytest.FixtureRequest) -> Keeper:
    """Return the keeper, which makes records of cases."""
    return request.config.stash[KEEPER]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Return whether --full was given."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def plans(request: pytest.FixtureRequest) -> Iterator[Plans]:
    """Yield the plans; those of the recipes that the selected tests name are started at once, side by side."""
    plans = Plans()
    for item in request.session.items:
        if not isinstance(item, pytest.Function) or "plans" not in item.fixturenames or not hasattr(item, "callspec"):
            continue
        recipe = item.callspec.params.get("recipe")
        if isinstance(recipe, str):
            plans.request(recipe)
    yield plans
    plans.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures of each case; predicted and measured ones are never in the same line."""
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
    is_stored = config.getoption("--store")
    place = f"stored in {config.getoption('--results')}" if is_stored else NOT_STORED
    terminalreporter.write_line(f"{len(kept)} {'result' if len(kept) == 1 else 'results'}, {place}")
