"""Writes the table of model families in docs/models.md from tests/architectures.py, which the tests hold against every family.

python tools/make_architectures.py           write the table
python tools/make_architectures.py --check   fail if it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.architectures import NO_ADAPTER, NO_PLAN, REFUSED  # noqa: E402
from tests.families import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
REASONS = {NO_PLAN: "no: not traceable", NO_ADAPTER: "no: PEFT cannot adapt it"}


def table() -> Iterator[str]:
    """Yield the lines of the table: a row for each group of families with the same outcome."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in FAMILIES:
        refused = REFUSED.get(name, {})
        outcome = tuple(REASONS[refused[command]] if command in refused else "yes" for command in ("plan", "lora"))
        groups.setdefault((outcome[0], outcome[1]), []).append(name)
    yield "| model types (variants) | full fine-tuning, resume, chat, evaluate | LoRA, merge | plan |"
    yield "|---|---|---|---|"
    for (plan, lora), names in groups.items():
        yield f"| {', '.join(sorted(names))} | yes | {lora} | {plan} |"


def main() -> int:
    """Write or check the table, and return the exit code."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = "\n".join([before + BEGIN, *table(), END + after])
    if "--check" in sys.argv:
        if text != PAGE.read_text(encoding="utf-8"):
            print("docs/models.md: the table of architectures is not current. Run make architectures.", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
