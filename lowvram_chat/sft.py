"""Fine-tune a model by a recipe.

    python -m lowvram_chat.sft recipes/quickstart.yaml
    python -m lowvram_chat.sft recipes/full_fp16.yaml train.learning_rate=3e-5

Any setting can follow the recipe as section.key=value; --print-recipe shows them all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowvram_chat import api
from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.terminal import printable
from lowvram_chat.units import count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser("sft", __doc__)
    arguments.add_argument("recipe", help="path of a recipe (.yaml)")
    arguments.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings in place of the recipe's"
    )
    arguments.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output.dir")
    arguments.add_argument("--overwrite", action="store_true", help="replace an earlier run in output.dir")
    arguments.add_argument("--force", action="store_true", help="start even if the run is predicted not to fit")
    arguments.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and exit")
    arguments.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps")
    arguments.add_argument("--json", action="store_true", help="print result.json on the last line")
    args = arguments.parse_intermixed_args(argv)
    return guarded(lambda: _sft(args))


def _sft(args: argparse.Namespace) -> int:
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other. Give one of them.")
    steps = [] if args.max_steps is None else [f"train.max_steps={args.max_steps}"]
    recipe = api.load_recipe(args.recipe, *args.overrides, *steps)
    if args.print_recipe:
        from lowvram_chat.recipe.yaml_file import dump_recipe

        print(dump_recipe(recipe), end="")
        return 0
    result = api.train(recipe, resume=args.resume, overwrite=args.overwrite, force=args.force)
    if _is_main_process():
        _print_outcome(Path(recipe.output.dir).expanduser(), result)
        if args.json:
            print_json(result)
    return 0


def _is_main_process() -> bool:
    from lowvram_chat.training.run_dir import is_main_process

    return is_main_process()


def _print_outcome(run: Path, result: Mapping[str, Any]) -> None:
    """Print the result of a run and what to do next."""
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    if before is not None and after is not None:
        print(f"held-out loss: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    steps, tokens, seconds = result["steps"], result["real_tokens"], result["seconds"]
    print(
        f"{count(steps, 'step')}, {count(tokens, 'token')} in {seconds:.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )
    print(printable(f"run folder: {run}"))
    commands = [
        *(["merge"] if "adapter" in result else []),
        "chat",
        *(["evaluate"] if after is not None else []),  # otherwise the run has no held-out conversations
    ]
    for command in commands:
        print(printable(f"next: python -m lowvram_chat.{command} {run}"))
    print(printable(f"report: {run / 'report.html'}"))


if __name__ == "__main__":
    sys.exit(main())
