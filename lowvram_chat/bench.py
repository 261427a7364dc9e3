"""Measure a recipe on your own machine, show benchmark results, and compare two sets of results.

    python -m lowvram_chat.bench run recipes/quickstart.yaml --steps 50
    python -m lowvram_chat.bench report --html report.html
    python -m lowvram_chat.bench compare OLD NEW

`run` writes a file that you can send to others and compare with theirs. `pytest benchmarks/ --store` fills
benchmarks/results, which `report` shows. `compare` exits with code 1 if anything got worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowvram_chat.cli import Parser, guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_transformers

RESULTS = Path("benchmarks/results")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser()
    args, rest = arguments.parse_known_args(argv)
    if rest:  # overrides may follow options
        if args.command != "run" or not all("=" in word and not word.startswith("-") for word in rest):
            arguments.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    return guarded(lambda: {"run": _run, "report": _report, "compare": _compare}[args.command](args))


def _parser() -> Parser:
    arguments = parser("bench", __doc__)
    commands = arguments.add_subparsers(dest="command", required=True, metavar="run | report | compare")
    run = commands.add_parser("run", help="measure the training steps of a recipe on this machine")
    run.add_argument("recipe", help="path of a recipe (.yaml)")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    run.add_argument("--steps", type=int, default=50, help="number of optimizer steps to time (default: 50)")
    run.add_argument("--out", type=Path, metavar="FILE.json", help="file for the result (default: bench-RECIPE.json)")
    run.add_argument("--json", action="store_true", help="print the result as one JSON document on the last line")
    report = commands.add_parser("report", help="show stored results as a table or as a page")
    report.add_argument("results", nargs="*", type=Path, help=f"files and folders of results (default: {RESULTS})")
    report.add_argument("--html", type=Path, metavar="FILE.html", help="write a self-contained HTML page instead")
    compare = commands.add_parser("compare", help="show what got better or worse; exit code 1 if anything got worse")
    compare.add_argument("old", type=Path, help="file or folder of results")
    compare.add_argument("new", type=Path, help="file or folder of results")
    compare.add_argument(
        "--json", action="store_true", help="print the differences as one JSON document on the last line"
    )
    return arguments


def _run(args: argparse.Namespace) -> int:
    from lowvram_chat.recipe.yaml_file import load_recipe
    from lowvram_chat.reporting.output_file import check_output_file

    if args.steps < 1:
        raise UsageError(f"--steps: {args.steps} is below 1. Give the number of optimizer steps to time.")
    recipe = load_recipe(args.recipe, args.overrides)
    name = Path(args.recipe).stem
    out = args.out or Path(f"bench-{name}.json")
    check_output_file("--out", out)
    quiet_transformers()
    from lowvram_chat.results.own_run import measure_recipe, summary_sentence

    steps = "1 step" if args.steps == 1 else f"{args.steps} steps"
    print(f"measuring {steps} twice, once for memory and once for speed ...", file=sys.stderr, flush=True)
    record = measure_recipe(recipe, " ".join([name, *args.overrides]), args.steps)
    out.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(summary_sentence(record))
    print(f"written: {out} (show it with: bench report {out})")
    if args.json:
        print_json(record.model_dump(mode="json"))
    return 0 if record.status == "passed" else 1


def _report(args: argparse.Namespace) -> int:
    from lowvram_chat.reporting.output_file import check_output_file
    from lowvram_chat.reporting.results_table import show_results
    from lowvram_chat.reporting.suite_page import suite_page
    from lowvram_chat.results.record import load_all

    records = load_all(args.results or [RESULTS])
    if args.html is None:
        show_results(records)
    else:
        check_output_file("--html", args.html)
        args.html.write_text(suite_page(records), encoding="utf-8")
        print(f"written: {args.html}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from lowvram_chat.reporting.compare_table import differences_document, show_differences
    from lowvram_chat.results.compare import compare, missing, regressed
    from lowvram_chat.results.record import load_all

    old, new = load_all([args.old]), load_all([args.new])
    differences = compare(old, new)
    for case in missing(old, new):
        print(f"only in {args.old}: {case}", file=sys.stderr)
    show_differences(differences)
    if args.json:
        print_json(differences_document(differences))
    return 1 if regressed(differences) else 0


if __name__ == "__main__":
    sys.exit(main())
