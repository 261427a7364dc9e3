"""Which build of torch fits a driver and a card, and the command that installs it.

Source: PyTorch's RELEASE.md, "PyTorch CUDA Support Matrix", the same for 2.12 to 2.14; CUDA Compatibility, "Minor Version
Compatibility", for the drivers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

TORCH = "2.13.0"
"""The version in constraints.txt."""


@dataclass(frozen=True)
class Wheel:
    """A CUDA build of torch."""

    index: str
    """Last part of the address of PyTorch's package index for it."""
    cuda: str
    driver: int
    """Major version of the oldest driver that runs it."""
    capability: float
    """Lowest compute capability that it has kernels for."""


WHEELS: Sequence[Wheel] = (Wheel("cu130", "13.0", 580, 7.5), Wheel("cu126", "12.6", 525, 5.0))
"""The builds to choose from, the newest first. CUDA 13 left out cards before Turing, such as the GTX 1060 and the P100."""


def wheel_for(driver: str, capability: float | None) -> Wheel | None:
    """Return the newest build that runs with a driver ("551.23") on a card; None if the driver is too old for all of them."""
    major = driver_major(driver)
    fitting = (wheel for wheel in WHEELS if capability is None or capability >= wheel.capability)
    return next((wheel for wheel in fitting if major is None or major >= wheel.driver), None)


def driver_major(driver: str) -> int | None:
    """Return the first number of a driver's version; None if there is none."""
    first = driver.partition(".")[0]
    return int(first) if first.isdigit() else None


def needed_driver(cuda: str) -> int | None:
    """Return the oldest driver for a CUDA version such as "13.0", by its major version; None if it is not known."""
    major = cuda.partition(".")[0]
    return next((wheel.driver for wheel in WHEELS if wheel.cuda.partition(".")[0] == major), None)


def install_command(wheel: Wheel) -> str:
    """Return the command that installs a build in this Python's environment, over another build of the same version."""
    python = ".venv\\Scripts\\python" if sys.platform == "win32" else "python"
    return f"{python} -m pip install --force-reinstall torch=={TORCH} --index-url https://download.pytorch.org/whl/{wheel.index}"
