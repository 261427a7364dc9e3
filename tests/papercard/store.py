"""Writes what `measure` found into benchmarks/data/papercard.json: versions, and for each case two peaks by two sides.

python -m tests.papercard.store FOUND.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STORED = Path(__file__).parents[2] / "benchmarks" / "data" / "papercard.json"


def main(words: list[str]) -> int:
    """Store the figures of a file of results. Cases without figures are not stored, and lead to an exit code of 1."""
    found = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    failed = [f"{name}: {case['error']}" for name, case in found["cases"].items() if "error" in case]
    lines = [
        f"  {json.dumps(name)}: {json.dumps(compact(case))}"
        for name, case in found["cases"].items()
        if "error" not in case
    ]
    text = f'{{"versions": {json.dumps(found["versions"])},\n "cases": {{\n' + ",\n".join(lines) + "\n }}\n"
    STORED.write_text(text, encoding="utf-8")
    print("\n".join(failed))
    return 1 if failed else 0


def compact(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case's peaks in MiB, allocated and reserved: by torch's allocator on the paper card, and planned."""
    names = ("allocated", "reserved")
    return {"kind": case["kind"]} | {
        side: [round(case[side][name], 2) for name in names] for side in ("allocator", "planned")
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
