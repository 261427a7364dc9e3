"""The pages: valid HTML, a table for every chart, predicted and measured kept apart, nothing loaded from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowvram_chat import bench
from lowvram_chat.reporting.charts import Bar, areas, bars, curves
from lowvram_chat.reporting.html import CONTENT_SECURITY_POLICY, table
from lowvram_chat.reporting.results_table import text_table
from lowvram_chat.reporting.suite_page import suite_page
from lowvram_chat.results.record import Machine, Metric, MetricKind, Record, store
from tests.samples import ROOT

VOID = {"meta", "link"}
CARD = Machine(name="card", platform="Linux", processor="x86_64", threads=8, card="Some <Card> & more")


class Tree(HTMLParser):
    """Checks that every opened tag is closed, and collects ids and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ignore tags that close themselves."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def predicted(value: float, unit: str = "MiB") -> Metric:
    return Metric(value=value, unit=unit, kind="predicted")


def measured(value: float, unit: str = "MiB") -> Metric:
    return Metric(value=value, unit=unit, kind="measured")


def records() -> list[Record]:
    plan = {"on_card": predicted(3072), "reserved": predicted(2772), "limit_linux": predicted(3591)}
    plan |= {
        "spare_linux": predicted(819),
        "fits_linux": predicted(1),
        "spare_windows": predicted(-9),
        "fits_windows": predicted(0),
    }
    speed = {"tokens_per_second_80w": predicted(7736, "tokens/s"), "three_baseline_epochs_80w": predicted(3.5, "h")}
    speed |= {"limit_three_baseline_epochs_80w": predicted(1.45, "h")}
    run = {
        "reserved": measured(2790),
        "tokens_per_second": measured(7400, "tokens/s"),
        "predicted_reserved": predicted(2772),
    }
    series = {"weights": [475.0, 475.0, 475.0], "activations": [0.0, 900.0, 100.0]}
    return [
        Record(benchmark="vram", case="full_fp16", metrics=plan, series=series, machine=CARD),
        Record(benchmark="baseline", case="full_fp16", metrics=speed, machine=CARD),
        Record(benchmark="run", case="full_fp16", metrics=run, machine=CARD),
        Record(benchmark="throughput", case="tiny: ours", metrics={"tokens_per_second": measured(3000)}, machine=CARD),
        Record(
            benchmark="ablation", case="tiny: 0 as stock", metrics={"tokens_per_second": measured(900)}, machine=CARD
        ),
        Record(benchmark="planner", case="memory", metrics={"row error": predicted(-0.4, "%")}, machine=CARD),
        Record(benchmark="vram", case="large", status="failed", reason="too <large>", machine=CARD),
    ]


def test_the_page_is_valid_and_loads_nothing_from_outside() -> None:
    page = suite_page(records())
    tree = Tree(page)
    assert len(tree.ids) == len(set(tree.ids))
    assert {link[1:] for link in tree.links if link.startswith("#")} <= set(tree.ids)
    assert all(link.startswith(("#", "data:")) for link in tree.links)
    assert CONTENT_SECURITY_POLICY in page
    assert "<script" not in page
    assert "url(http" not in page
    assert "Some &lt;Card&gt; &amp; more" in page
    assert "too &lt;large&gt;" in page


def test_every_chart_has_its_table() -> None:
    page = suite_page(records())
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) >= 6
    assert all("<table>" in figure for figure in figures)


def test_predicted_and_measured_are_never_in_one_column() -> None:
    page = suite_page(records())
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert any("2,772" in text and "2,790" in text and "reserved, predicted" in text for text in tables)  # side by side
    plans = next(text for text in tables if "does each recipe fit" in text)
    assert "2,790" not in plans
    assert "DOES NOT FIT" in plans
    assert 'class="predicted"' in page
    assert 'class="measured"' in page


def test_a_record_without_metrics_gives_a_page_too() -> None:
    Tree(suite_page([Record(benchmark="merge", case="lora", machine=CARD)]))


def test_bars_are_as_long_as_their_values_and_predicted_areas_are_hatched() -> None:
    chart = bars(
        "b",
        [Bar(label="a", value=1, kind="measured", text="1"), Bar(label="b", value=4, kind="predicted", text="4")],
        unit="s",
    )
    assert re.findall(r'class="(\w+)" style="width:([\d.]+)%"', chart) == [
        ("measured", "25.00"),
        ("predicted", "100.00"),
    ]
    assert "url(#hatch)" in areas("m", {"x": [1.0, 2.0]}, unit="MiB", limits={}, kind="predicted")
    assert "url(#hatch)" not in areas("m", {"x": [1.0, 2.0]}, unit="MiB", limits={}, kind="measured")
    assert areas("m", {}, unit="MiB", limits={}, kind="measured") == ""


def test_a_curve_of_one_point_or_equal_values_is_drawn() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]):
        Tree(curves("c", {"a": points}, unit="nats", x="step"))
    assert curves("c", {"a": []}, unit="nats", x="step") == ""


def test_a_table_aligns_numbers_to_the_right_and_colours_verdicts() -> None:
    text = table("t", ["name", "MiB"], [["a", "1,024"], ["fits", "-"]])
    assert '<td class="n">1,024</td>' in text
    assert '<td class="yes">fits</td>' in text


def test_the_command_writes_the_page_of_the_stored_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert bench.main(["report", str(ROOT / "benchmarks" / "results"), "--html", str(out)]) == 0
    Tree(out.read_text(encoding="utf-8"))
    store(records()[0], tmp_path / "results")
    assert bench.main(["report", str(tmp_path / "results")]) == 0
    assert "predicted" in capsys.readouterr().out
    assert bench.main(["report", str(tmp_path / "results"), "--html", str(tmp_path / "no" / "r.html")]) == 2
    assert bench.main(["report", str(tmp_path / "nothing")]) == 2


def test_predicted_and_measured_each_have_a_column() -> None:
    published = Metric(value=3666, unit="tokens/s", kind="published")
    metrics = {"reserved": measured(2790), "predicted_reserved": predicted(2772), "theirs": published}
    head, [row] = text_table([Record(benchmark="run", case="r", metrics=metrics, machine=CARD)])
    assert dict(zip(head, row, strict=True)) == {
        "benchmark": "run",
        "case": "r",
        "result": "passed",
        "predicted": "predicted reserved 2,772 MiB",
        "measured": "reserved 2,790 MiB",
    }
    kinds: tuple[MetricKind, ...] = ("predicted", "measured")
    chart = bars("t", [Bar(label=kind, value=1, kind=kind, text=f"1 {kind}") for kind in kinds], unit="h")
    assert re.findall(r"<th scope[^>]*>(.*?)</th>", chart) == ["name", "predicted", "measured"]
    assert re.findall(r"<td\b[^>]*>(.*?)</td>", chart) == ["predicted", "1 predicted", "", "measured", "", "1 measured"]
