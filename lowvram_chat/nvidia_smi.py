"""What nvidia-smi says of the graphics cards: names, memory, power and the programs that use them.

The driver brings nvidia-smi along, on Windows and in WSL too. Asking it needs no CUDA context, which would take some 300 MiB of
the card, and no torch with CUDA.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath

FIELDS = (
    *("name", "memory.total", "memory.free", "compute_cap"),
    *("enforced.power.limit", "power.max_limit", "driver_version"),
)
"""Properties that are asked for. Source: nvidia-smi --help-query-gpu."""
SECONDS = 20
"""Time after which an answer is given up: a sleeping laptop card takes seconds to wake."""


@dataclass(frozen=True, kw_only=True)
class SmiCard:
    """A graphics card as nvidia-smi describes it; None where the driver does not say."""

    name: str
    memory_mib: int
    free_mib: int | None
    compute_capability: float | None
    watts: float | None
    """Power limit in force, or the highest where the driver does not report the one in force, as on many laptops."""
    driver: str


def visible_card() -> SmiCard | None:
    """Return the card that CUDA programs of this environment use first; None without a driver or a card."""
    index = visible_index()
    cards = [] if index is None else all_cards()
    return cards[index] if index is not None and index < len(cards) else None


def visible_index() -> int | None:
    """Return the number of the first card that CUDA_VISIBLE_DEVICES leaves; None if it hides all.

    A card that is named by its UUID counts as the first one.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return 0
    first = visible.split(",")[0].strip()
    if first in ("", "-1", "NoDevFiles"):
        return None
    return int(first) if first.isdigit() else 0


def all_cards() -> list[SmiCard]:
    """Return all cards, in the order of their PCI buses; none without a driver."""
    rows = [line.split(", ") for line in query("--query-gpu=" + ",".join(FIELDS))]
    return [_card(row) for row in rows if len(row) == len(FIELDS) and _number(row[1]) is not None]


def programs() -> list[str]:
    """Return the names of the programs that use a card, each once; empty where the driver does not say."""
    names = [line.split(", ")[0].strip() for line in query("--query-compute-apps=process_name")]
    known = [PureWindowsPath(name).name for name in names if name and not name.startswith("[")]
    return sorted(set(known))


def query(what: str) -> list[str]:
    """Return the lines that nvidia-smi answers to a query; none if it is not there or fails."""
    command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _card(row: Sequence[str]) -> SmiCard:
    name, total, free, capability, enforced, highest, driver = row
    free_mib = _number(free)
    return SmiCard(
        name=name,
        memory_mib=int(float(total)),
        free_mib=None if free_mib is None else int(free_mib),
        compute_capability=_number(capability),
        watts=_number(enforced) or _number(highest),
        driver=driver,
    )


def _number(text: str) -> float | None:
    """Return a number; None for `[N/A]` and other words."""
    try:
        return float(text)
    except ValueError:
        return None
