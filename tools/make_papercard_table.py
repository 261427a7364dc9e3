"""Write the table of the paper card in docs/memory.md from benchmarks/data/papercard.json.

    python tools/make_papercard_table.py            writes the table
    python tools/make_papercard_table.py --check    only reports whether it is current

`make papercard` makes the results: torch's real CUDA allocator without a card, beside the plan of the same steps.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "data" / "papercard.json"
KINDS = ("allocated", "reserved")
PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- papercard -->", "<!-- /papercard -->"


def table() -> str:
    """Return the table, with a summary and the versions."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    cases = found["cases"]
    lines = [
        "| run | allocated: allocator | planned | | reserved: allocator | planned | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {_cells(case, 0)} | {_cells(case, 1)} |" for name, case in cases.items()]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", _summary(cases), f"Found with {versions}."])


def _cells(case: dict[str, Any], kind: int) -> str:
    allocator, planned = case["allocator"][kind], case["planned"][kind]
    return f"{allocator:,.1f} | {planned:,.1f} | {100 * (planned / allocator - 1):+.2f} %"


def _summary(cases: dict[str, Any]) -> str:
    words = []
    for kind, name in enumerate(KINDS):
        errors = [abs(100 * (case["planned"][kind] / case["allocator"][kind] - 1)) for case in cases.values()]
        within = sum(error <= 0.5 for error in errors)
        words.append(
            f"{name}: median {statistics.median(errors):.2f} %, {within} of {len(errors)} within 0.5 %, "
            f"largest {max(errors):.1f} %"
        )
    return f"Absolute error, {'; '.join(words)}. MiB."


def main() -> int:
    """Write or check the table."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif new != text:
        print(f"{PAGE.name}: not current. Run python tools/make_papercard_table.py.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
