"""Show what a run would be trained on: rows with the tokens that carry loss marked, and what the source holds.

    python -m lowvram_chat.preview chats.jsonl
    python -m lowvram_chat.preview chats.jsonl recipes/lora_fp16.yaml data.max_length=512 --rows 10

The tokens that carry loss are green on a terminal, and stand in [[ ]] elsewhere. Without a recipe the tokens are those of
the built-in model. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lowvram_chat import api
from lowvram_chat.cli import guarded, parser, print_json
from lowvram_chat.errors import UsageError
from lowvram_chat.recipe.yaml_file import build_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser("preview", __doc__)
    arguments.add_argument("source", help="a file, a pattern in quotes, builtin:chitchat or a hub dataset")
    arguments.add_argument("recipe", nargs="?", help="path of a recipe (.yaml), for its model and data settings")
    arguments.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings in place of the recipe's"
    )
    arguments.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    arguments.add_argument("--json", action="store_true", help="print the preview as JSON on the last line")
    args = arguments.parse_intermixed_args(argv)
    return guarded(lambda: _preview(args))


def _preview(args: argparse.Namespace) -> int:
    words = [*([args.recipe] if args.recipe else []), *args.overrides]
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise UsageError(f"{recipes[1]}: is neither a setting (section.key=value) nor the recipe. Give one recipe.")
    overrides = [word for word in words if "=" in word]
    if recipes:
        recipe = api.load_recipe(recipes[0], *overrides)
    else:
        recipe = build_recipe({"model": {"name": "builtin:tiny-gpt2"}}, overrides, "preview")
    preview = api.preview(args.source, recipe, rows=args.rows)

    from lowvram_chat.reporting.preview_text import preview_document, preview_lines

    for line in preview_lines(preview, colour=sys.stdout.isatty()):
        print(line)
    if args.json:
        print_json(preview_document(preview))
    return 0


if __name__ == "__main__":
    sys.exit(main())
