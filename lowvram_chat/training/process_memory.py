"""Peak resident memory of a process."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def high_water_bytes(process: int | str = "self") -> int | None:
    """Return the peak resident set of a process, where Linux reports it.

    The usual `ru_maxrss` starts at what the parent process held. Source: proc_pid_status(5), `VmHWM`.
    """
    try:
        text = Path("/proc", str(process), "status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def peak_resident_bytes() -> int:
    """Return the peak resident set of this process."""
    own = high_water_bytes()
    if own is not None:
        return own
    try:
        import resource
    except ImportError:  # Windows, where psutil reports the peak
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined, unused-ignore]
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
