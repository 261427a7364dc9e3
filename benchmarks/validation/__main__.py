"""Compare the planner's predictions with figures that other people published.

    python -m benchmarks.validation memory benchmarks/data/vram_measured.csv
    python -m benchmarks.validation speed
    python -m benchmarks.validation speed speeds.csv

Only torch, transformers, pydantic, PyYAML, rich and numpy need to be installed, so that the memory of old runs can be
predicted with the transformers version that they ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowvram_chat.cli import Parser, guarded
from lowvram_chat.quiet import compilation_switched_off, quiet_transformers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 where the file is wrong."""
    args = _parser().parse_args(argv)
    with compilation_switched_off():
        return guarded(lambda: _memory(args) if args.command == "memory" else _speed(args))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.validation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="memory | speed")
    memory = commands.add_parser("memory", help="predict measured memory peaks")
    memory.add_argument("file", type=Path, metavar="FILE.csv", help="measured runs, as in benchmarks/data")
    speed = commands.add_parser("speed", help="predict published training speeds")
    speed.add_argument(
        "file", type=Path, nargs="?", metavar="FILE.csv", help="published speeds (default: the built-in ones)"
    )
    for command in (memory, speed):
        command.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    return parser


def _memory(args: argparse.Namespace) -> int:
    quiet_transformers()
    from benchmarks.validation import memory

    memory.run(args.file, as_json=args.json)
    return 0


def _speed(args: argparse.Namespace) -> int:
    quiet_transformers()
    from benchmarks.validation import speed, speed_file

    if args.file is None:
        speed.run(as_json=args.json)
    else:
        speed_file.run(args.file, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
