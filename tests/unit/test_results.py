"""Benchmark results: stored and loaded, refused if they are invalid, and compared within their tolerances."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import Keeper
from lowvram_chat import bench
from lowvram_chat.errors import NotFoundError, UsageError
from lowvram_chat.results import machine
from lowvram_chat.results.compare import compare, missing, regressed
from lowvram_chat.results.record import Machine, Metric, Record, load, load_all, spread, store
from tests.samples import ROOT

HERE = Machine(name="Some Card, Linux", platform="Linux", processor="x86_64", threads=2)


def metric(value: float, **more: Any) -> Metric:
    settings = {"unit": "tokens/s", "kind": "measured", "better": "higher", "tolerance": 0.1, **more}
    return Metric(value=value, **settings)


def record(value: float = 100.0, **more: Any) -> Record:
    settings: dict[str, Any] = {"benchmark": "throughput", "case": "tiny: ours", "machine": HERE, **more}
    return Record(**{"metrics": {"tokens_per_second": metric(value)}, **settings})


def test_a_record_is_kept_by_machine_benchmark_and_case_and_read_back(tmp_path: Path) -> None:
    path = store(record(), tmp_path)
    assert path.relative_to(tmp_path).as_posix() == "some-card-linux/throughput/tiny-ours.json"
    assert load(path) == record()
    store(record(7.0), tmp_path)
    assert [stored.value("tokens_per_second") for stored in load_all([tmp_path])] == [7.0]


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 2}, {"speed": 3}, {"metrics": {"a": {"value": "fast", "unit": "s", "kind": "measured"}}}],
)
def test_a_file_that_is_not_a_record_is_refused_with_its_path(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(record().model_dump(mode="json") | change))
    with pytest.raises(UsageError, match=r"one\.json.*schema version 1"):
        load(path)
    path.write_text("not json")
    with pytest.raises(UsageError, match=r"one\.json"):
        load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_a_number_is_no_result(value: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        metric(value)


def test_a_path_without_results_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError, match="pytest benchmarks/"):
            load_all([path])


def test_a_spread_is_the_median_between_the_percentiles() -> None:
    times = spread([5.0, 1.0, 2.0, 3.0, 4.0], "ms")
    assert (times.p20, times.value, times.p80, times.samples) == (1.8, 3.0, 4.2, 5)


@pytest.mark.parametrize(
    ("new", "better", "verdict"),
    [(95.0, "higher", "equal"), (85.0, "higher", "worse"), (120.0, "higher", "better"), (120.0, "lower", "worse")],
)
def test_a_change_counts_beyond_its_tolerance(new: float, better: str, verdict: str) -> None:
    before, after = (record(metrics={"rate": metric(value, better=better)}) for value in (100.0, new))
    (difference,) = compare([before], [after])
    assert difference.verdict == verdict
    assert regressed([difference]) is (verdict == "worse")


def test_a_case_that_fails_or_loses_a_metric_is_worse() -> None:
    assert regressed(compare([record()], [record(status="out_of_memory")]))
    assert regressed(compare([record()], [record(metrics={})]))
    assert not regressed(compare([record(status="failed")], [record()]))
    (status, _) = compare([record(status="failed")], [record(status="out_of_memory")])
    assert status.verdict == "equal"


def test_predicted_is_never_compared_with_measured() -> None:
    assert compare([record()], [record(metrics={"tokens_per_second": metric(1.0, kind="predicted")})]) == []


def test_a_changed_case_version_refuses_to_compare() -> None:
    with pytest.raises(UsageError, match="version 1 and version 2"):
        compare([record()], [record(case_version=2)])


def test_other_machines_and_other_cases_refuse_to_compare() -> None:
    with pytest.raises(UsageError, match="one machine"):
        compare([record()], [record(machine=HERE.model_copy(update={"name": "other"}))])
    with pytest.raises(UsageError, match="no case in common"):
        compare([record()], [record(case="another")])
    assert missing([record(), record(case="gone")], [record()]) == ["throughput/gone"]


def test_the_command_exits_with_1_on_a_regression_and_with_2_if_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, slow, other = tmp_path / "old", tmp_path / "slow", tmp_path / "other"
    store(record(), old)
    store(record(50.0), slow)
    store(record(case_version=2), other)
    assert bench.main(["compare", str(old), str(old)]) == 0
    assert bench.main(["compare", str(old), str(slow), "--json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "1 worse" in lines[-2]
    assert json.loads(lines[-1])["differences"][0]["change"] == -0.5
    assert bench.main(["compare", str(old), str(other)]) == 2
    assert "version" in capsys.readouterr().err
    assert bench.main(["compare", str(old), str(tmp_path / "none")]) == 2


def git(folder: Path, *arguments: str) -> None:
    """Run a git command with a made-up user."""
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True, capture_output=True
    )


def test_results_of_a_tree_with_uncommitted_changes_are_not_stored(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    with pytest.raises(UsageError, match="not a git checkout"):
        machine.check_clean(tmp_path, results)
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "code")
    store(record(), results)
    machine.check_clean(tmp_path, results)  # results may be uncommitted
    assert len(machine.commit(tmp_path) or "") == 12
    (tmp_path / "code.py").write_text("x = 2\n")
    with pytest.raises(UsageError, match=r"dirty \(code\.py\)"):
        machine.check_clean(tmp_path, results)
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "new.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match=r"dirty \(new\.py\)"):
        machine.check_clean(tmp_path, results)


def test_a_case_is_stored_as_soon_as_it_is_kept(tmp_path: Path) -> None:
    keeper = Keeper(ROOT, tmp_path, store=True)
    keeper.keep("some", "first", {"rate": metric(1.0)})
    keeper.keep("some", "second", {}, problem="too slow")
    assert [(stored.case, stored.status) for stored in load_all([tmp_path])] == [
        ("first", "passed"),
        ("second", "failed"),
    ]


def test_this_machine_is_described_without_a_path_or_a_user_name() -> None:
    here = machine.this_machine()
    assert here.name
    assert "/" not in here.model_dump_json()
    assert here.libraries["torch"]


def test_the_results_in_the_repository_can_be_loaded_and_name_their_kind() -> None:
    records = load_all([ROOT / "benchmarks" / "results"])
    assert {"vram", "baseline", "planner", "throughput", "ablation", "tokenize"} <= {r.benchmark for r in records}
    for stored in records:
        kinds = {figure.kind for figure in stored.metrics.values()}
        if stored.benchmark in ("run", "own-processor", "selftest"):  # these also have predictions
            assert kinds <= {"predicted", "measured"}
        else:
            is_predicted = stored.benchmark in ("vram", "baseline", "planner", "micro_batch")
            assert kinds == ({"predicted"} if is_predicted else {"measured"}), stored.case
        assert stored.commit or stored.package
        assert stored.date
