"""Identifies the machine, the library versions and the commit that a result was measured with."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from lowvram_chat import nvidia_smi
from lowvram_chat.errors import UsageError
from lowvram_chat.results.processes import run_in_new_process
from lowvram_chat.results.record import Machine, slug
from lowvram_chat.training.run_dir import environment

MAX_LISTED_FILES = 3
"""Changed files that an error message lists."""


@functools.cache
def this_machine() -> Machine:
    """Return the machine that this process runs on.

    The name consists of the card, its power limit and the system; without a card, of the processor, the system and the
    number of threads.
    """
    import torch

    # Reading the card's name creates a CUDA context, which would stay on the card during a measurement.
    found = run_in_new_process(environment) if torch.cuda.is_available() else environment()
    card = None if found["device"] == "cpu" else str(found["device"])
    watts = _power_limit() if card else None
    total_bytes = found["device_total_bytes"]
    return Machine(
        name=_machine_name(card, watts, found["processor"], found["platform"].split("-")[0].lower()),
        platform=found["platform"].split("-with-")[0],
        processor=found["processor"],
        processor_model=_processor_model(),
        threads=found["threads"],
        card=card,
        card_mib=total_bytes // 2**20 if total_bytes else None,
        power_limit_watts=watts,
        libraries=found["libraries"],
        python=found["python"],
    )


def commit(root: Path) -> str | None:
    """Return the commit of the checkout at `root`; None if it is not a git checkout."""
    output = _git(root, "rev-parse", "--short=12", "HEAD")
    return output.strip() if output else None


def check_clean(root: Path, results: Path) -> None:
    """Refuse to store results of code that is not committed. Changes below `results` are allowed.

    Raises:
        UsageError: the working tree has uncommitted changes, or `root` is not a git checkout.
    """
    status = _git(root, "status", "--porcelain", "--untracked-files=all")
    if status is None:
        raise UsageError(f"--store: {root} is not a git checkout, so results could not name a commit. Omit --store.")
    results = results.resolve()
    changed = [line[3:].strip('"') for line in status.splitlines()]
    changed = [name for name in changed if not (root / name).resolve().is_relative_to(results)]
    if changed:
        listed = ", ".join(changed[:MAX_LISTED_FILES]) + (", ..." if len(changed) > MAX_LISTED_FILES else "")
        raise UsageError(
            f"--store: the tree is dirty ({listed}), so no commit holds the code to be measured. Commit it first."
        )


def now() -> str:
    """Return the date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _machine_name(card: str | None, watts: float | None, processor: str, system: str) -> str:
    if card is None:
        return slug(f"{processor} {system} {os.cpu_count()} threads")
    return slug(f"{card} {watts:.0f}w {system}" if watts else f"{card} {system}")


def _power_limit() -> float | None:
    """Return the card's power limit in watts; None if the driver does not report it, as on many laptops."""
    card = nvidia_smi.visible_card()
    return None if card is None else card.watts


def _processor_model() -> str | None:
    """Return the full name of the processor; None if the system does not report it. Works on Linux and Windows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER")
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _git(root: Path, *arguments: str) -> str | None:
    """Return what a git command prints; None if git is missing or the command fails."""
    if shutil.which("git") is None:
        return None
    process = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607
    return process.stdout if process.returncode == 0 else None
