"""Benchmarks: measure a recipe on your own machine, look at results, compare two sets of them.

    python -m lowvram_chat.bench run recipes/quickstart.yaml --steps 50
    python -m lowvram_chat.bench report --html report.html
    python -m lowvram_chat.bench compare OLD NEW

`pytest benchmarks/ --store` fills benchmarks/results; `run` writes a file that can be sent to others and put beside them.
compare exits with 1 where anything got worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_transformers

RESULTS = Path("benchmarks/results")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and do what they say."""
    arguments = parser("bench", __doc__)
    commands = arguments.add_subparsers(dest="command", required=True, metavar="run | report | compare")
    run = commands.add_parser("run", help="measure a recipe's real steps on this machine")
    run.add_argument("recipe", help="path of a recipe (.yaml)")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings in place of the recipe's")
    run.add_argument("--steps", type=int, default=50, help="optimizer steps to time (default: 50)")
    run.add_argument("--out", type=Path, metavar="FILE.json", help="where the result goes (default: bench-RECIPE.json)")
    run.add_argument("--json", action="store_true", help="print the result as the last line")
    report = commands.add_parser("report", help="what stored results say, as a table or a page")
    report.add_argument("results", nargs="*", type=Path, help=f"files and folders of results (default: {RESULTS})")
    report.add_argument("--html", type=Path, metavar="FILE.html", help="write a page that needs no network")
    compare = commands.add_parser("compare", help="what got better or worse; exit code 1 where anything got worse")
    compare.add_argument("old", type=Path, help="file or folder of results")
    compare.add_argument("new", type=Path, help="file or folder of results")
    compare.add_argument("--json", action="store_true", help="print the differences as the last line")
    args, rest = arguments.parse_known_args(argv)
    if rest and not (args.command == "run" and all("=" in word and not word.startswith("-") for word in rest)):
        arguments.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings may stand behind options too
        args.overrides += rest
    return guarded(lambda: {"run": _run, "report": _report, "compare": _compare}[args.command](args))


def _run(args: argparse.Namespace) -> int:
    from lowvram_chat.recipe.yaml_file import load_recipe

    if args.steps < 1:
        raise UsageError(f"--steps: {args.steps} is below 1. Give the optimizer steps to time.")
    recipe = load_recipe(args.recipe, args.overrides)
    name = Path(args.recipe).stem
    out = args.out or Path(f"bench-{name}.json")
    _check_file("--out", out)
    quiet_transformers()
    from lowvram_chat.results.own_run import measure_recipe, summary_sentence

    print(f"measuring {args.steps} steps twice, for memory and for speed ...", file=sys.stderr, flush=True)
    record = measure_recipe(recipe, " ".join([name, *args.overrides]), args.steps)
    out.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(summary_sentence(record))
    print(f"written: {out} (bench report {out} shows it; send it to put it beside others)")
    if args.json:
        print_json(record.model_dump(mode="json"))
    return 0 if record.status == "passed" else 1


def _check_file(option: str, path: Path) -> None:
    """Refuse a place where no file can be written, before anything is measured."""
    if path.is_dir():
        raise UsageError(f"{option}: {path} is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: {path.parent} is no folder. Make it first, or give another.")


def _report(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from lowvram_chat.reporting.suite_page import suite_page, text_table
    from lowvram_chat.results.record import load_all

    records = load_all(args.results or [RESULTS])
    if args.html is not None:
        _check_file("--html", args.html)
        args.html.write_text(suite_page(records), encoding="utf-8")
        print(f"written: {args.html}")
        return 0
    head, rows = text_table(records)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from lowvram_chat.results.compare import compare, missing, regressed
    from lowvram_chat.results.record import load_all

    old, new = load_all([args.old]), load_all([args.new])
    differences = compare(old, new)
    moved = [difference for difference in differences if difference.verdict != "equal"]
    if moved:
        table = Table("case", "what", "old", "new", "change", "")
        for one in moved:
            change = "" if one.change is None else f"{one.change:+.1%}"
            table.add_row(one.case, one.metric.replace("_", " "), one.old, one.new, change, one.verdict)
        Console(highlight=False).print(table)
    for case in missing(old, new):
        print(f"only in {args.old}: {case}", file=sys.stderr)
    worse = sum(difference.verdict == "worse" for difference in moved)
    print(
        f"{len(differences)} figures compared: {worse} worse, {len(moved) - worse} better, the rest within their tolerance"
    )
    if args.json:
        print_json({"differences": [asdict(difference) for difference in differences]})
    return 1 if regressed(differences) else 0


if __name__ == "__main__":
    sys.exit(main())
