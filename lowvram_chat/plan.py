"""Will it fit? The memory that a recipe will take of its card, found without GPU, weights or data.

    python -m lowvram_chat.plan recipes/full_fp16.yaml
    python -m lowvram_chat.plan recipes/full_fp16.yaml train.per_device_train_batch_size=8
    python -m lowvram_chat.plan recipes/full_fp16.yaml --search
    python -m lowvram_chat.plan --compare recipes/full_fp16.yaml recipes/lora_fp16.yaml
    python -m lowvram_chat.plan --validate measured.csv
    python -m lowvram_chat.plan --speeds

Exit code 0: it fits. 1: it does not, and what would is printed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import ModelError, UsageError
from lowvram_chat.quiet import quiet_transformers


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and plan."""
    arguments = parser("plan", __doc__)
    arguments.add_argument("recipe", nargs="?", help="path of a recipe (.yaml)")
    arguments.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings in place of the recipe's"
    )
    arguments.add_argument("--search", action="store_true", help="the fastest settings that fit, as a table")
    arguments.add_argument("--compare", nargs=2, metavar="RECIPE", help="two recipes side by side")
    arguments.add_argument("--plot", metavar="FILE.png", help="draw memory over the step (needs matplotlib)")
    arguments.add_argument("--validate", metavar="FILE.csv", help="predict measured runs, and show the error")
    arguments.add_argument("--speeds", action="store_true", help="hold the time model against published speeds")
    arguments.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    args = arguments.parse_intermixed_args(argv)
    return guarded(lambda: _work(args))


def _work(args: argparse.Namespace) -> int:
    wanted = [args.recipe, args.compare, args.validate, args.speeds or None]
    if sum(word is not None for word in wanted) != 1:
        raise UsageError("plan: give one recipe, --compare with two, --validate with a file, or --speeds. Add --help.")
    # Planning compiles nothing, and bitsandbytes imports half as long when told so.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if args.validate is not None:
        return _validate(Path(args.validate), as_json=args.json)
    if args.speeds:
        return _speeds(as_json=args.json)
    if args.compare is not None:
        return _compare(args.compare, as_json=args.json)
    return _plan(args)


def _plan(args: argparse.Namespace) -> int:
    from lowvram_chat.recipe.yaml_file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    _import_planner()
    from lowvram_chat.planning import report
    from lowvram_chat.planning.changes import apply_change, as_overrides
    from lowvram_chat.planning.plan import make_plan
    from lowvram_chat.planning.search import advise, fastest, planned_micro_batch

    if args.plot is not None:
        from lowvram_chat.reporting.memory_plot import check_plot_file, draw_memory

        check_plot_file(Path(args.plot))
    change = planned_micro_batch(recipe)
    if change:
        print(f"planned: {as_overrides(change)}", file=sys.stderr)
        recipe = apply_change(recipe, change)
    planned = make_plan(recipe)
    report.show(recipe, planned)
    if args.plot is not None:
        draw_memory(recipe, Path(args.plot))
        print(f"drawn: {args.plot}", file=sys.stderr)
    if args.search or not planned.fits:
        print("looking for settings that fit, some 3 seconds for each that is tried ...", file=sys.stderr, flush=True)
    options = fastest(recipe) if args.search else [] if planned.fits else advise(recipe)
    if not (options or planned.fits):
        raise ModelError(report.too_large(recipe, planned))
    if args.search:
        report.show_fastest(recipe, options)
    elif not planned.fits:
        report.show_advice(options)
    if args.json:
        print_json(
            {**report.document(recipe, planned), "options": [report.option_document(option) for option in options]}
        )
    return 0 if planned.fits else 1


def _import_planner() -> None:
    """Import the planner, which takes longer than the plan, with garbage collection off.

    Imports make much that stays and little garbage, and each collection would walk all of it; later ones need not.
    """
    gc.disable()
    quiet_transformers()
    import lowvram_chat.planning.search  # noqa: F401

    gc.freeze()
    gc.enable()


def _compare(paths: Sequence[str], *, as_json: bool) -> int:
    from lowvram_chat.recipe.yaml_file import load_recipe

    recipes = [load_recipe(path) for path in paths]
    _import_planner()
    from lowvram_chat.planning.changes import apply_change
    from lowvram_chat.planning.search import planned_micro_batch

    recipes = [apply_change(recipe, planned_micro_batch(recipe)) for recipe in recipes]
    from lowvram_chat.planning import report
    from lowvram_chat.planning.plan import make_plan

    plans = [make_plan(recipe) for recipe in recipes]
    report.show_side_by_side(paths, recipes, plans)
    if as_json:
        print_json(
            {
                "plans": [
                    {"recipe": path, **report.document(recipe, one)}
                    for path, recipe, one in zip(paths, recipes, plans, strict=True)
                ]
            }
        )
    return 0 if all(one.fits for one in plans) else 1


def _speeds(*, as_json: bool) -> int:
    """Predict speeds that others have published."""
    _import_planner()
    from benchmarks.validation import speed as published_speeds

    published_speeds.run(as_json=as_json)
    return 0


def _validate(path: Path, *, as_json: bool) -> int:
    """Predict every row of a file of measured runs."""
    from benchmarks.validation import memory as validate

    validate.run(path, as_json=as_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
