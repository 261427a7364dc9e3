"""Write README's generated tables: what each recipe is predicted to take of its card, and how wrong the planner is.

    python tools/make_tables.py            plans every recipe (minutes) and rewrites README's tables
    python tools/make_tables.py --stored   rewrites them from what is stored
    python tools/make_tables.py --check    only says whether README holds what benchmarks/results/*.json say

The planner's error comes from `make validate`, which writes benchmarks/results/validation.json in an environment of its
own (transformers 4.51.3, the model code that the measured runs ran).
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ROOT / "benchmarks" / "data" / "vram_measured.csv"
PREDICTORS = {"xMem": "xmem_mib", "DNNMem": "dnnmem_mib", "SchedTune": "schedtune_mib", "LLMem": "llmem_mib"}
MIB = 1 << 20


def planned() -> dict[str, Any]:
    """Return recipe -> predicted peak, verdicts and largest micro-batches on its card."""
    from lowvram_chat.cli import quiet_libraries
    from lowvram_chat.memory.plan import plan
    from lowvram_chat.memory.search import largest_micro_batch
    from lowvram_chat.memory.speed import speeds
    from lowvram_chat.recipe.load import load_recipe

    quiet_libraries()
    rows: dict[str, Any] = {}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        recipe = load_recipe(path)
        if recipe.model.name.startswith("models/"):  # made by `make smollm2`: planned by its hub name
            model = recipe.model.model_copy(update={"name": "HuggingFaceTB/SmolLM2-135M-Instruct"})
            recipe = recipe.model_copy(update={"model": model})
        result = plan(recipe)
        rows[path.stem] = {
            "micro_batch": recipe.train.per_device_train_batch_size,
            "on_card_mib": round(result.on_card_bytes / MIB),
            "spare_mib": {name: round((limit - result.on_card_bytes) / MIB) for name, limit in result.limits.items()},
            "tokens_per_second": {str(s.watts): round(s.tokens_per_second) for s in speeds(recipe, result.work)},
            "three_baseline_epochs_hours": {
                str(s.watts): round(s.seconds_per_three_baseline_epochs / 3600, 2) for s in speeds(recipe, result.work)
            },
            "largest_micro_batch": {name: largest_micro_batch(recipe, name) for name in result.limits},
        }
        print(path.stem, rows[path.stem], file=sys.stderr)
    return rows


def plan_table(rows: Mapping[str, Any]) -> str:
    """Return the table of recipes."""
    head = (
        "| recipe | micro-batch | predicted on the card, MiB | to spare, Linux | to spare, Windows | largest micro-batch, Linux "
        "| largest micro-batch, Windows |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(f"| `{name}` | {' | '.join(_cells(row))} |" for name, row in rows.items())


def _cells(row: Mapping[str, Any]) -> list[str]:
    spare, largest = row["spare_mib"], row["largest_micro_batch"]
    sizes = [_spare(spare[system]) for system in ("linux", "windows")]
    return [str(row["micro_batch"]), f"{row['on_card_mib']:,}", *sizes, str(largest["linux"]), str(largest["windows"])]


def _spare(mib: int) -> str:
    return f"{mib:,}" if mib >= 0 else f"does not fit ({-mib:,} too much)"


WATTS = ("80", "55", "40")


def speed_table(rows: Mapping[str, Any]) -> str:
    """Return the predicted speeds of the recipes for the RTX 3050 Laptop."""
    head = "| recipe | " + " | ".join(f"tokens/s at {watts} W" for watts in WATTS)
    head += " | three baseline epochs at " + ", ".join(WATTS) + " W |\n|---|---|---|---|---|\n"
    lines = []
    for name, row in rows.items():
        if name in ("quickstart", "smollm2_lora"):  # models of another size
            continue
        rates = " | ".join(f"{row['tokens_per_second'][watts]:,}" for watts in WATTS)
        hours = ", ".join(_hours(row["three_baseline_epochs_hours"][watts]) for watts in WATTS)
        lines.append(f"| `{name}` | {rates} | {hours} |")
    return head + "\n".join(lines)


def _hours(hours: float) -> str:
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60:02d} m"


def throughput_table(report: Mapping[str, Any]) -> str:
    """Return what was measured beside stock TRL on a CPU."""
    cases = report["cases"]
    stock, tuned = (cases[name]["tokens_per_second"] for name in ("trl defaults", "trl tuned"))
    lines = [
        "| case | real tokens/s | x `trl sft` defaults | x `trl sft` tuned | share of the matrix peak | held-out loss "
        "| peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['tokens_per_second']:,.0f} | {row['tokens_per_second'] / stock:.2f} | "
        f"{row['tokens_per_second'] / tuned:.2f} | {row['share_of_matrix_peak']:.0%} | {row['held_out_loss']:.4f} | "
        f"{row['peak_resident_mib']:,.0f} |"
        for name, row in cases.items()
    ]
    return "\n".join(lines)


MEASURED_TABLES = {"throughput-tiny": throughput_table, "throughput-gpt2": throughput_table}
"""Tables of what benchmarks measured: name of the stored result and of the place in README -> what makes the table."""


def validation_table(report: Mapping[str, Any]) -> str:
    """Return the planner's error beside that of four published predictors, on the rows that each predicts."""
    with MEASURED.open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    lines = ["| predictor | rows | median error | within 1 % | largest error |", "|---|---|---|---|---|"]
    ours = {row["id"]: abs(row["error_percent"]) for row in report["rows"] if row["error_percent"] is not None}
    lines.append(_line("this planner, all measured rows", list(ours.values())))
    plain = [error for name, error in ours.items() if not rows[name]["hard"]]
    lines.append(_line("this planner, without rows marked hard", plain))
    for title, column in PREDICTORS.items():
        errors = [
            abs(float(row[column]) / float(row["measured_mib"]) - 1) * 100
            for row in rows.values()
            if row.get(column) and row["measured_mib"]
        ]
        lines.append(_line(title, errors))
    return "\n".join(lines)


def _line(title: str, errors: list[float]) -> str:
    within = sum(error <= 1 for error in errors) / len(errors)
    return f"| {title} | {len(errors)} | {statistics.median(errors):.2f} % | {within:.0%} | {max(errors):.1f} % |"


def write(text: str, name: str, table: str) -> str:
    """Return the text with what stands between the markers of a table replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"README.md: the markers {begin} and {end} are missing. Put them where the table goes.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Plan, write or check."""
    check = "--check" in sys.argv
    if not (check or "--stored" in sys.argv):
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "plans.json").write_text(json.dumps(planned(), indent=2) + "\n", encoding="utf-8")
    plans = json.loads((RESULTS / "plans.json").read_text(encoding="utf-8"))
    validation = json.loads((RESULTS / "validation.json").read_text(encoding="utf-8"))
    old = README.read_text(encoding="utf-8")
    new = write(write(old, "plans", plan_table(plans)), "validation", validation_table(validation))
    new = write(new, "speeds", speed_table(plans))
    for name, table in MEASURED_TABLES.items():
        new = write(new, name, table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))))
    if check and new != old:
        sys.exit("README.md: its tables are not current. Run python tools/make_tables.py.")
    README.write_text(new, encoding="utf-8") if not check else None


if __name__ == "__main__":
    main()
