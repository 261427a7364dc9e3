"""What a result was taken on, and from which code: machine, versions, commit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from lowvram_chat.errors import UsageError
from lowvram_chat.results.record import Machine, slug
from lowvram_chat.training.run_dir import environment

T = TypeVar("T")


@functools.cache
def this_machine() -> Machine:
    """Return the machine this process runs on.

    It is named after its card, power limit and system; without a card after its processor's kind and threads.
    """
    import torch

    # Asking for the card's name makes a CUDA context, which would stay on the card beside what is measured.
    found = in_a_process(environment) if torch.cuda.is_available() else environment()
    card = None if found["device"] == "cpu" else str(found["device"])
    system = found["platform"].split("-")[0].lower()
    total = found["device_total_bytes"]
    watts = _power_limit() if card else None
    limited = f"{card} {watts:.0f}w" if watts else card
    return Machine(
        name=slug(f"{limited} {system}" if card else f"{found['processor']} {system} {os.cpu_count()} threads"),
        platform=found["platform"].split("-with-")[0],
        processor=found["processor"],
        processor_model=_processor_model(),
        threads=found["threads"],
        card=card,
        card_mib=total // 2**20 if total else None,
        power_limit_watts=watts,
        libraries=found["libraries"],
        python=found["python"],
    )


def in_a_process(work: Callable[..., T], *words: Any) -> T:
    """Return what a function gives in a new process of its own.

    Raises:
        BrokenProcessPool: the process was ended from outside.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *words).result()


def _power_limit() -> float | None:
    """Return the card's power limit in watts, where the driver tells it (laptops often do not)."""
    words = ["nvidia-smi", "--query-gpu=enforced.power.limit", "--format=csv,noheader,nounits"]
    if shutil.which(words[0]) is None:
        return None
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
        return float(said.stdout.split()[0])
    except (IndexError, ValueError, OSError, subprocess.TimeoutExpired):
        return None


def _processor_model() -> str | None:
    """Return the processor's name, where Linux or Windows tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER")
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def commit(root: Path) -> str | None:
    """Return the commit of the code at `root`; None where it is no git checkout."""
    said = _git(root, "rev-parse", "--short=12", "HEAD")
    return said.strip() if said else None


def check_clean(root: Path, results: Path) -> None:
    """Refuse to store results of code that no commit holds; stored results themselves may be new.

    Raises:
        UsageError: the tree is dirty, with the first files.
    """
    said = _git(root, "status", "--porcelain", "--untracked-files=all")
    if said is None:
        raise UsageError(f"--store: {root} is no git checkout, so no result could name its commit. Leave --store out.")
    kept = results.resolve()
    changed = [line[3:].strip('"') for line in said.splitlines()]
    changed = [name for name in changed if not (root / name).resolve().is_relative_to(kept)]
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise UsageError(
            f"--store: the tree is dirty ({shown}), so no commit holds what would be measured. Commit first."
        )


def now() -> str:
    """Return the date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(root: Path, *words: str) -> str | None:
    if shutil.which("git") is None:
        return None
    said = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607
    return said.stdout if said.returncode == 0 else None
