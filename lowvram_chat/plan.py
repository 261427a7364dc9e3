"""Predict the GPU memory of a recipe, without GPU, weights or data, and whether it fits its card.

    python -m lowvram_chat.plan recipes/full_fp16.yaml
    python -m lowvram_chat.plan recipes/full_fp16.yaml train.per_device_train_batch_size=8
    python -m lowvram_chat.plan recipes/full_fp16.yaml --search
    python -m lowvram_chat.plan --compare recipes/full_fp16.yaml recipes/lora_fp16.yaml

Exit code 0: it fits. 1: it does not fit; changes that make it fit are printed, if there are any.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_chat import api
from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import compilation_switched_off, quiet_transformers

if TYPE_CHECKING:
    from lowvram_chat.recipe.schema import Recipe

MOVED_OPTIONS = {
    "--validate": "python -m benchmarks.validation memory FILE.csv",
    "--speeds": "python -m benchmarks.validation speed",
}
"""Options of version 0.1.0 and where they went."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser("plan", __doc__)
    arguments.add_argument("recipe", nargs="?", help="path of a recipe (.yaml)")
    arguments.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings in place of the recipe's"
    )
    arguments.add_argument("--search", action="store_true", help="list the fastest settings that fit")
    arguments.add_argument("--compare", nargs=2, metavar="RECIPE", help="show two recipes side by side")
    arguments.add_argument("--plot", metavar="FILE.png", help="draw memory over the steps (needs matplotlib)")
    arguments.add_argument("--json", action="store_true", help="print one JSON document on the last line")
    words = list(sys.argv[1:] if argv is None else argv)
    for option, command in MOVED_OPTIONS.items():
        if option in words:
            arguments.error(f"{option} is now a command of the repository: {command}")
    args = arguments.parse_intermixed_args(words)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if (args.recipe is None) == (args.compare is None):
        raise UsageError("plan: give one recipe, or --compare with two. Add --help for the usage.")
    if args.compare is not None and (args.search or args.plot is not None):
        raise UsageError("plan: --search and --plot take one recipe. Leave them out, or leave --compare out.")
    with compilation_switched_off():
        return _plan(args) if args.compare is None else _compare(args.compare, as_json=args.json)


def _plan(args: argparse.Namespace) -> int:
    recipe = api.load_recipe(args.recipe, *args.overrides)
    _import_planner()
    recipe = _for_this_machine(recipe)
    from lowvram_chat.reporting.memory_plot import check_plot_file, draw_memory
    from lowvram_chat.reporting.plan_json import plan_document, suggestion_document
    from lowvram_chat.reporting.plan_tables import show_advice, show_fastest, show_plan

    if args.plot is not None:
        check_plot_file(Path(args.plot))
    recipe = _with_micro_batch(recipe)
    plan = api.plan(recipe)
    show_plan(recipe, plan)
    if args.plot is not None:
        draw_memory(recipe, Path(args.plot))
        print(f"drawn: {args.plot}", file=sys.stderr)
    suggestions = []
    if args.search or not plan.fits:
        print("looking for settings that fit, about 3 s per candidate ...", file=sys.stderr, flush=True)
        suggestions = api.search(recipe, goal="speed" if args.search else "fit")
        if args.search:
            show_fastest(recipe, suggestions)
        elif suggestions:
            show_advice(suggestions)
        if not (suggestions or plan.fits):
            from lowvram_chat.planning.search import too_large

            print(too_large(recipe, plan), file=sys.stderr)
    if args.json:
        print_json({**plan_document(recipe, plan), "options": [suggestion_document(one) for one in suggestions]})
    return 0 if plan.fits else 1


def _compare(paths: Sequence[str], *, as_json: bool) -> int:
    recipes = [api.load_recipe(path) for path in paths]
    _import_planner()
    from lowvram_chat.reporting.plan_json import plan_document
    from lowvram_chat.reporting.plan_tables import show_side_by_side

    # The card of this machine is described once: for the first recipe that is planned for it.
    automatic = [recipe.memory.gpu == "auto" and recipe.memory.card is None for recipe in recipes]
    recipes = [
        _with_micro_batch(_for_this_machine(recipe, describing=not any(automatic[:place])))
        for place, recipe in enumerate(recipes)
    ]
    plans = [api.plan(recipe) for recipe in recipes]
    show_side_by_side(paths, recipes, plans)
    if as_json:
        rows = zip(paths, recipes, plans, strict=True)
        print_json({"plans": [{"recipe": path, **plan_document(recipe, plan)} for path, recipe, plan in rows]})
    return 0 if all(plan.fits for plan in plans) else 1


def _for_this_machine(recipe: Recipe, *, describing: bool = True) -> Recipe:
    """Return the recipe with `memory.gpu: auto` resolved, and print which card it is planned for."""
    from lowvram_chat.model.present_card import describe, for_this_machine

    resolved = for_this_machine(recipe)
    if describing and recipe.memory.gpu == "auto" and recipe.memory.card is None:
        print(describe(resolved), file=sys.stderr)
    return resolved


def _with_micro_batch(recipe: Recipe) -> Recipe:
    """Return the recipe with `train.micro_batch: planned` decided, and print the decision."""
    from lowvram_chat.planning.changes import apply_change, as_overrides
    from lowvram_chat.planning.prediction import make_plan
    from lowvram_chat.planning.search import planned_micro_batch

    change = planned_micro_batch(recipe, make_plan)
    if change:
        print(f"planned: {as_overrides(change)}", file=sys.stderr)
    return apply_change(recipe, change)


def _import_planner() -> None:
    """Import the planner, which takes longer than a plan, with garbage collection off.

    Imports create many objects that stay and little garbage, and each collection would walk all of them.
    """
    gc.disable()
    quiet_transformers()
    import lowvram_chat.timing.planner  # noqa: F401

    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    sys.exit(main())
