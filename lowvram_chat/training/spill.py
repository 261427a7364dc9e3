"""Notices when the driver of Windows moves a run's memory from the card into the main memory, which it does in silence."""

from __future__ import annotations

import logging
import platform
import statistics
import sys

import torch

from lowvram_chat.units import MIB, format_mib

log = logging.getLogger(__name__)

FIRST_RATES = 3
"""Logged speeds that the later ones are compared with; the first of a run, which includes its start, is left out."""
SLOW_SHARE = 0.4
"""Share of the first speeds below which a run counts as slow. Spilled runs are five to thirty times slower."""
LITTLE_FREE_BYTES = 192 * MIB
"""Free memory of the card below which it counts as full."""

ADVICE = (
    "Close other programs that use the card. In the NVIDIA Control Panel, set Manage 3D settings > CUDA - Sysmem Fallback Policy "
    "to Prefer No Sysmem Fallback. If that does not help, stop with Ctrl-C and continue with --resume and a lower "
    "memory.limit_mib."
)


def can_spill() -> bool:
    """Return whether this system's driver moves CUDA memory into the main memory: Windows, and Linux inside it (WSL)."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


class SpillWatch:
    """Compares the speed of a run with that of its first steps, and warns once."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.warned = False

    def look(self, tokens_per_second: float, free_bytes: int) -> None:
        """Take the speed since the last logged step and the card's free memory, and warn if both say that the run spilled."""
        self.rates.append(tokens_per_second)
        first = self.rates[1 : FIRST_RATES + 1]
        if self.warned or len(self.rates) <= FIRST_RATES + 1:
            return
        usual = statistics.median(first)
        if tokens_per_second < SLOW_SHARE * usual and free_bytes < LITTLE_FREE_BYTES:
            self.warned = True
            log.warning(
                "training is %.0f times slower than at its start, and %s MiB of the card are free: the driver has probably moved "
                "memory of this run into the main memory. %s",
                usual / max(tokens_per_second, 1e-9),
                format_mib(free_bytes),
                ADVICE,
            )


def look_for_spill(watch: SpillWatch, tokens_per_second: float) -> None:
    """Let the watch look, where memory can spill at all."""
    if torch.cuda.is_available() and can_spill():
        watch.look(tokens_per_second, torch.cuda.mem_get_info()[0])
