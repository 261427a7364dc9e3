"""Predicted peak GPU memory of a run, by category and phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowvram_chat.gpus import this_system
from lowvram_chat.planning.plan_html import plan_html
from lowvram_chat.tracing.operations import Work
from lowvram_chat.units import format_mib

SYSTEM_TITLES = {"linux": "Linux", "windows": "Windows"}
LIMIT_SETTING = "memory.limit_mib"


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Storages with the same origin that are allocated at the peak."""

    nbytes: int
    """Their total size, bytes."""
    count: int
    category: str
    origin: str
    """The operation, and the module it ran in."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predicted peak GPU memory of a run. All sizes are in bytes."""

    budget: str
    """What limits the run: the card's name, or `LIMIT_SETTING` where the recipe sets a limit."""
    peak_allocated_bytes: int
    """As `torch.cuda.max_memory_allocated` would report it."""
    peak_reserved_bytes: int
    """As `torch.cuda.max_memory_reserved` would report it: the maximum over all orders of batches tried."""
    reserved_on: Mapping[str, int]
    """"linux", "windows" -> the same there, for each system of `limits`. Packed rows have a mask on Windows, where torch has no
    FlashAttention."""
    longest_reserved_bytes: int
    """As `peak_reserved_bytes`, for a run in which every row has the maximum length."""
    context_bytes: int
    """The CUDA context, which lies outside the allocator."""
    paged_bytes: int
    """Paged optimizer states, outside the allocator too. Linux moves them to the main memory; on Windows, where unified memory
    does not page, they stay on the card. Source: CUDA C++ Programming Guide, "Unified memory on Windows"."""
    categories: Mapping[str, int]
    """Category -> bytes at the peak; they add up to `on_card_bytes`."""
    phase: str
    """Phase of the peak: load, checks, evaluation, forward, loss, backward, clipping, optimizer or saving."""
    largest: tuple[TensorGroup, ...]
    """The largest groups of tensors at the peak, largest first."""
    parameters: int
    """Parameters of the whole model."""
    trained: int
    """Parameters that are trained."""
    limits: Mapping[str, int]
    """"linux", "windows" -> bytes of the card that this process may use, context included; this system alone, if the card is this
    machine's."""
    fits_on: Mapping[str, bool]
    """"linux", "windows" -> whether the run fits there."""
    work: Work = field(repr=False)
    """Operations of one optimizer step with rows of the maximum length: a list per micro-batch (at most two), then one for
    the update. `timing.speed.predict_speed` turns them into a speed."""

    @property
    def on_card_bytes(self) -> int:
        """Peak memory on the card on this operating system, context included."""
        return self.on_card_bytes_on(self.system)

    def on_card_bytes_on(self, system: str) -> int:
        """Return the peak memory on the card on "linux" or "windows", context included."""
        return self.reserved_on[system] + self.outside_allocator_bytes(system)

    def outside_allocator_bytes(self, system: str) -> int:
        """Return the memory on the card that torch's allocator does not hold."""
        return self.context_bytes + (self.paged_bytes if system == "windows" else 0)

    @property
    def system(self) -> str:
        """Operating system that `fits` refers to: the one this process runs on."""
        return this_system()

    @property
    def fits(self) -> bool:
        """Whether the run fits on this operating system."""
        return self.fits_on[self.system]

    @property
    def limit_bytes(self) -> int:
        """Memory that this process may use on this operating system, context included."""
        return self.limits[self.system]

    @property
    def spare_bytes(self) -> int:
        """Memory left on the card; negative where the run does not fit."""
        return self.limit_bytes - self.on_card_bytes

    @property
    def verdict(self) -> str:
        """Whether the run fits: a line for each operating system, or one line for a limit that the recipe sets."""
        if self.budget == LIMIT_SETTING:
            fits = self._fits_in_words(self.system)
            return (
                f"{fits} in {LIMIT_SETTING} = {format_mib(self.limit_bytes)} MiB: {self._spare_in_words(self.system)}"
            )
        return "\n".join(
            f"{self._fits_in_words(system)} on {self.budget}, {SYSTEM_TITLES[system]} ({format_mib(limit)} MiB usable): "
            f"{self._spare_in_words(system)}"
            for system, limit in self.limits.items()
        )

    def _fits_in_words(self, system: str) -> str:
        return "fits" if self.fits_on[system] else "DOES NOT FIT"

    def _spare_in_words(self, system: str) -> str:
        spare = self.limits[system] - self.on_card_bytes_on(system)
        if spare >= 0:
            return f"{format_mib(spare)} MiB to spare"
        if self.fits_on[system]:
            return f"barely: the allocator must release and reallocate {format_mib(-spare)} MiB, which takes time"
        return f"{format_mib(-spare)} MiB too much"

    def _repr_html_(self) -> str:
        """Return the plan for a notebook: verdict, stacked bar, table."""
        return plan_html(self.verdict, fits=self.fits, categories=self.categories, limit_bytes=self.limit_bytes)
