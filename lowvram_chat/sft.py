"""Fine-tune a model by a recipe.

    python -m lowvram_chat.sft recipes/quickstart.yaml
    python -m lowvram_chat.sft recipes/full_fp16.yaml train.learning_rate=3e-5

Any setting can follow the recipe as section.key=value; --print-recipe shows them all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_transformers
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import dump_recipe, load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and run."""
    arguments = parser("sft", __doc__)
    arguments.add_argument("recipe", help="path of a recipe (.yaml)")
    arguments.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings in place of the recipe's"
    )
    arguments.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint of output.dir")
    arguments.add_argument("--overwrite", action="store_true", help="replace an earlier run in output.dir")
    arguments.add_argument("--force", action="store_true", help="start even what is planned not to fit")
    arguments.add_argument("--print-recipe", action="store_true", help="show the resolved recipe and stop")
    arguments.add_argument("--max-steps", type=int, metavar="N", help="cut the run short: stop after N optimizer steps")
    arguments.add_argument("--json", action="store_true", help="print result.json as the last line")
    args = arguments.parse_intermixed_args(argv)

    def work() -> int:
        steps = [] if args.max_steps is None else [f"train.max_steps={args.max_steps}"]
        if args.resume and args.overwrite:
            raise UsageError("--resume and --overwrite exclude each other. Give one.")
        recipe = load_recipe(args.recipe, [*args.overrides, *steps])
        if args.print_recipe:
            print(dump_recipe(recipe), end="")
            return 0
        result = run(recipe, resume=args.resume, overwrite=args.overwrite, force=args.force)
        if args.json:
            print_json(result)
        return 0

    return guarded(work)


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, force: bool = False) -> dict[str, Any]:
    """Train by a recipe and return what `result.json` holds.

    Raises:
        LowVramError: one of its kinds, with nothing written, for everything that can be known before the first step.
    """
    from lowvram_chat.training.resume import check_resumed, is_same
    from lowvram_chat.training.run_dir import RunDir, check_new, is_main_process, read_result

    run = RunDir(Path(recipe.output.dir))
    if is_main_process():
        check_new(run.path, overwrite=overwrite, resume=resume)
        if resume:
            check_resumed(run, recipe)
    finished = read_result(run) if resume else {}
    if finished and is_same(run.recipe(), recipe):
        if is_main_process():
            print(f"{recipe.output.dir}: this run has ended after {finished['steps']:,} steps; nothing to resume")
        return finished

    from lowvram_chat.data.sources import is_remote
    from lowvram_chat.hub import work_offline_if_unreachable

    if any(is_remote(name) for name in _names(recipe)):
        work_offline_if_unreachable()

    from lowvram_chat.model.device import check_device

    device = check_device(recipe)
    quiet_transformers()

    from lowvram_chat.reporting.run_page import write_run_page
    from lowvram_chat.training.session import train

    try:
        result = train(recipe, device=device, resume=resume, force=force)
    except KeyboardInterrupt:
        if run.metrics_file.is_file() and is_main_process():
            write_run_page(run)
        raise
    if is_main_process():
        print(f"report: {write_run_page(run)}")
    return result


def _names(recipe: Recipe) -> list[str]:
    """Return every model and dataset name of a recipe."""
    names: list[str] = [recipe.model.name]
    for source in (recipe.data.source, recipe.data.eval_source or []):
        names += [source] if isinstance(source, str) else source
    return names


if __name__ == "__main__":
    sys.exit(main())
