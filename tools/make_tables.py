"""Write the generated tables of the documentation from the stored results of the benchmarks.

    python tools/make_tables.py            writes the tables from benchmarks/results
    python tools/make_tables.py --check    only reports whether the tables agree with the results

`pytest benchmarks/ --full --store` makes the results again. `make validate STORE=--store` does so for the planner's error, in a
separate environment with transformers 4.51.3, whose model code the measured runs used.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from lowvram_chat.errors import LowVramError
from lowvram_chat.results.record import Metric, Record, load_all, slug
from lowvram_chat.units import format_hours

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ROOT / "benchmarks" / "data" / "vram_measured.csv"
PREDICTORS = {"xMem": "xmem_mib", "DNNMem": "dnnmem_mib", "SchedTune": "schedtune_mib", "LLMem": "llmem_mib"}
WATTS = (80, 55, 40)

Cases = Mapping[str, Record]


def plan_table(cases: Cases) -> str:
    """Return the predicted memory of each recipe and the largest micro-batch that fits."""
    head = ["recipe", "micro-batch", "predicted on the card, MiB", "to spare, Linux", "to spare, Windows"]
    head += ["largest micro-batch, Linux", "largest micro-batch, Windows"]
    rows, largest = [], cases_of("micro_batch", "")
    for name, case in cases.items():
        if " on " in name:  # predicted for a card other than the recipe's own
            continue
        spare = [_spare(case.metrics[f"spare_{system}"].value) for system in ("linux", "windows")]
        most = [_figure(largest[name], f"largest_micro_batch_{system}") for system in ("linux", "windows")]
        rows.append([f"`{name}`", _figure(case, "micro_batch"), _figure(case, "on_card"), *spare, *most])
    return _table(head, rows)


def _spare(mib: float) -> str:
    return f"{mib:,.0f}" if mib >= 0 else f"does not fit ({-mib:,.0f} too much)"


def speed_table(cases: Cases) -> str:
    """Return the predicted speeds of the recipes for the RTX 3050 Laptop."""
    head = ["recipe", *(f"tokens/s at {watts} W" for watts in WATTS), "three baseline epochs at 80, 55, 40 W"]
    rows = []
    for name, case in cases.items():
        rates = [_figure(case, f"tokens_per_second_{watts}w") for watts in WATTS]
        hours = ", ".join(format_hours(case.metrics[f"three_baseline_epochs_{watts}w"].value) for watts in WATTS)
        rows.append([f"`{name}`", *rates, hours])
    return _table(head, rows)


def throughput_table(cases: Cases) -> str:
    """Return the measured speed, memory and held-out loss on a CPU, compared with stock TRL."""
    head = [
        "case",
        "real tokens/s",
        "x `trl sft` defaults",
        "x `trl sft` tuned",
        "share of the matrix peak",
        "held-out loss",
    ]
    stock, tuned = (cases[name].metrics["tokens_per_second"].value for name in ("trl defaults", "trl tuned"))
    rows = []
    for name, case in cases.items():
        rate = case.metrics["tokens_per_second"].value
        share, loss = case.metrics["share_of_matrix_peak"].value, case.metrics["held_out_loss"].value
        rows.append([name, f"{rate:,.0f}", f"{rate / stock:.2f}", f"{rate / tuned:.2f}", f"{share:.0%}", f"{loss:.4f}"])
        rows[-1].append(_figure(case, "peak_resident"))
    return _table([*head, "peak memory, MiB"], rows)


def ablation_table(cases: Cases) -> str:
    """Return the gain in speed of each substitution, added to those before it."""
    first = next(iter(cases.values())).metrics["tokens_per_second"].value
    rows, before = [], first
    for name, case in cases.items():
        rate = case.metrics["tokens_per_second"].value
        memory, loss = _figure(case, "peak_resident"), case.metrics["held_out_loss"].value
        rows.append(
            [
                name.split(" ", 1)[1],
                f"{rate:,.0f}",
                f"{rate / before - 1:+.0%}",
                f"{rate / first:.2f}",
                memory,
                f"{loss:.4f}",
            ]
        )
        before = rate
    rows[0][2] = ""
    return _table(
        ["substitution", "real tokens/s", "by itself", "x the first", "peak memory, MiB", "held-out loss"], rows
    )


def turns_table(cases: Cases) -> str:
    """Return the speed ratios of pairs of runs whose steps alternated."""
    rows = []
    for name, case in cases.items():
        first, second = (_figure(case, metric) for metric in case.metrics if metric != "ratio")
        rows.append([name, first, second, f"{case.metrics['ratio'].value:.2f}"])
    return _table(["step against step", "the first, real tokens/s", "the second", "ratio"], rows)


def validation_table(cases: Cases) -> str:
    """Return the errors of the planner and of four published predictors, each on the runs that it predicts."""
    with MEASURED.open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    errors = {
        name.removesuffix(" error"): abs(metric.value)
        for name, metric in cases["memory"].metrics.items()
        if name.endswith(" error")
    }
    lines = [
        _errors("this planner, all measured rows", list(errors.values())),
        _errors("this planner, without rows marked hard", [e for name, e in errors.items() if not rows[name]["hard"]]),
    ]
    for title, column in PREDICTORS.items():
        predictor_errors = [
            abs(float(row[column]) / float(row["measured_mib"]) - 1) * 100
            for row in rows.values()
            if row.get(column) and row["measured_mib"]
        ]
        lines.append(_errors(title, predictor_errors))
    return _table(["predictor", "rows", "median error", "within 1 %", "largest error"], lines)


def _errors(title: str, errors: list[float]) -> list[str]:
    """Return a row of the validation table; the errors are in per cent."""
    within = sum(error <= 1 for error in errors) / len(errors)
    return [title, str(len(errors)), f"{statistics.median(errors):.2f} %", f"{within:.0%}", f"{max(errors):.1f} %"]


def figures_table(cases: Cases) -> str:
    """Return all metrics of a benchmark's cases."""
    names = list(next(iter(cases.values())).metrics)
    rows = [[case, *(_with_unit(record.metrics[name]) for name in names)] for case, record in cases.items()]
    return _table(["case", *(name.replace("_", " ") for name in names)], rows)


def selftest_table() -> str:
    """Return what self-tests measured of the shipped recipes, and what was predicted: a row for each machine and recipe."""
    records = load_all(found) if (found := [*RESULTS.glob("*/selftest")]) else []
    if not records:
        return "No self-test has been stored yet."
    head = ["machine", "recipe", "measured MiB", "predicted MiB", "measured tokens/s", "predicted tokens/s"]
    rows = []
    for record in records:
        here = record.machine
        name = here.card or f"{here.processor_model or here.processor}, {here.threads} threads"
        for recipe in (figure.partition(":")[0] for figure in record.metrics if figure.endswith(": tokens/s")):
            figures = (f"{recipe}: {figure}" for figure in SELFTEST_FIGURES)
            rows.append([name, f"`{recipe}`", *(_figure(record, figure) for figure in figures)])
    return _table(head, rows)


SELFTEST_FIGURES = ("reserved", "predicted reserved", "tokens/s", "predicted tokens/s")
"""What a self-test records of a recipe: the memory on cards only."""


def _with_unit(metric: Metric) -> str:
    if metric.unit == "1":
        return f"{metric.value:.0%}"
    return f"{metric.value:,.0f} {metric.unit}" if metric.value >= 100 else f"{metric.value:.3g} {metric.unit}"


Table = tuple[str, str, Callable[[Cases], str]]

TABLES: Mapping[str, Mapping[str, Table]] = {
    "memory.md": {
        "plans": ("vram", "", plan_table),
        "validation": ("planner", "", validation_table),
    },
    "speed.md": {
        "speeds": ("baseline", "", speed_table),
        "throughput-tiny": ("throughput", "tiny: ", throughput_table),
        "throughput-gpt2": ("throughput", "gpt2: ", throughput_table),
        "step": ("step", "", figures_table),
        "turns": ("turns", "", turns_table),
        "ablation": ("ablation", "tiny: ", ablation_table),
    },
    "benchmarks.md": {},
    "data.md": {
        "tokenize": ("tokenize", "", figures_table),
    },
}
"""Page in docs/ -> marker -> benchmark, prefix of its cases' names, and the function that makes the table."""


def cases_of(benchmark: str, prefix: str) -> Cases:
    """Return case (without the prefix) -> record, from the machine that ran the most cases.

    Raises:
        LowVramError: there are no results, or one cannot be read.
    """
    folders = [path for path in RESULTS.glob(f"*/{slug(benchmark)}") if path.is_dir()]
    records = [record for record in load_all(folders or [RESULTS / benchmark]) if record.case.startswith(prefix)]
    machines = Counter(record.machine.name for record in records)
    fullest = max(records, key=lambda record: (machines[record.machine.name], record.date)).machine.name
    return {record.case.removeprefix(prefix): record for record in records if record.machine.name == fullest}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _figure(case: Record, metric: str) -> str:
    value = case.value(metric)
    return "-" if value is None else f"{value:,.0f}"


def insert_table(text: str, name: str, table: str, page: str) -> str:
    """Return the text of a page with a new table between the markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"docs/{page}: the markers {begin} and {end} are missing. Insert them where the table belongs.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def updated_page(page: str) -> str:
    """Return the text of a page with all of its tables made from the stored results."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, (benchmark, prefix, make) in TABLES[page].items():
        text = insert_table(text, name, make(cases_of(benchmark, prefix)), page)
    return insert_table(text, "selftests", selftest_table(), page) if page == "benchmarks.md" else text


def main() -> None:
    """Write the tables, or check them with `--check`."""
    try:
        pages = {page: updated_page(page) for page in TABLES}
    except LowVramError as error:
        sys.exit(str(error))
    except (KeyError, ValueError) as error:
        sys.exit(f"benchmarks/results: cases are missing ({error}). Run pytest benchmarks/ --full --store.")
    for page, text in pages.items():
        if "--check" not in sys.argv:
            (DOCS / page).write_text(text, encoding="utf-8")
        elif text != (DOCS / page).read_text(encoding="utf-8"):
            sys.exit(f"docs/{page}: the tables differ from benchmarks/results. Run python tools/make_tables.py.")


if __name__ == "__main__":
    main()
