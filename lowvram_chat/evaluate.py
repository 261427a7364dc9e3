"""Held-out loss and perplexity of a run or model, on the assistant's tokens and on all tokens.

    python -m lowvram_chat.evaluate runs/quickstart
    python -m lowvram_chat.evaluate openai-community/gpt2 my_chats.jsonl

Without data, a run is scored on its own held-out conversations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lowvram_chat import api
from lowvram_chat.cli import add_device, guarded, parser, print_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser("evaluate", __doc__)
    arguments.add_argument("model", help="run folder, model folder, hub id or builtin:tiny-gpt2")
    arguments.add_argument("data", nargs="*", help="files, globs, builtin:chitchat-held-out or a hub dataset")
    arguments.add_argument("--split", default="train", help="split of a hub dataset (default: train)")
    arguments.add_argument("--format", help="row format (default: detected)")
    arguments.add_argument("--limit", type=int, help="use only the first N conversations", metavar="N")
    arguments.add_argument("--max-length", type=int, help="maximum tokens per row (default: the run's, else 1024)")
    arguments.add_argument(
        "--max-bad-rows",
        type=_count_or_share,
        default=0,
        help="unusable rows to skip at most, or their share (default: 0)",
    )
    arguments.add_argument("--batch-size", type=int, default=8, help="rows per batch (default: 8)")
    add_device(arguments, auto="the graphics card, if it has enough free memory")
    arguments.add_argument("--json", action="store_true", help="print the scores as JSON on the last line")
    args = arguments.parse_args(argv)
    return guarded(lambda: _evaluate(args))


def _count_or_share(text: str) -> int | float:
    """Return a whole number, or a share such as 0.01."""
    return float(text) if "." in text else int(text)


def _evaluate(args: argparse.Namespace) -> int:
    scores = api.evaluate(
        args.model,
        args.data,
        split=args.split,
        format=args.format,
        limit=args.limit,
        max_length=args.max_length,
        max_bad_rows=args.max_bad_rows,
        batch_size=args.batch_size,
        device=args.device,
    )
    print(f"{'loss on':<12}{'loss':>10}{'perplexity':>14}{'tokens':>12}")
    for kind, score in scores.items():
        print(f"{kind:<12}{score.loss:>10.4f}{score.perplexity:>14.2f}{score.tokens:>12,}")
    if args.json:
        print_json(
            {kind: {"loss": s.loss, "perplexity": s.perplexity, "tokens": s.tokens} for kind, s in scores.items()}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
