"""Merge a run's adapter into its base model and check that the result gives the same logits.

    python -m lowvram_chat.merge runs/quickstart

The merged model is an ordinary Hugging Face model folder in RUN/merged. It is written only if its fp32 logits equal
those of base and adapter. The adapter of a 4-bit run is merged into the full-precision base.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lowvram_chat import api
from lowvram_chat.cli import add_device, guarded, parser, print_json
from lowvram_chat.terminal import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser("merge", __doc__)
    arguments.add_argument("run", help="run folder with an adapter")
    arguments.add_argument("--out", type=Path, metavar="FOLDER", help="output folder (default: RUN/merged)")
    arguments.add_argument("--base", metavar="MODEL", help="where the base model is now, if it moved")
    arguments.add_argument("--dtype", choices=api.SAVED_DTYPES, default="float32", help="type to save in")
    add_device(arguments, auto="the CPU, unless only the graphics card has room for the model")
    arguments.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    arguments.add_argument("--json", action="store_true", help="print the proof as JSON on the last line")
    args = arguments.parse_args(argv)
    return guarded(lambda: _merge(args))


def _merge(args: argparse.Namespace) -> int:
    merged = api.merge(
        args.run, out=args.out, base=args.base, dtype=args.dtype, overwrite=args.overwrite, device=args.device
    )
    proof = merged.proof
    print(f"largest difference in logits, base + adapter to merged:             {proof.adapter_to_merged:.2e}")
    print(f"largest difference in logits, base + adapter to saved and reloaded: {proof.adapter_to_reloaded:.2e}")
    print(f"(the adapter itself moves the base's logits by up to                {proof.adapter_to_base:.2e})")
    print(printable(f"merged model: {merged.path}"))
    if args.json:
        print_json({**asdict(proof), "out": str(merged.path)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
