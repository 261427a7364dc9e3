"""The second witness: what a real step on the CPU allocates, as torch's own profiler counts it.

A trace by the CPU's rules must find the same peak. That proves the recorder (what autograd saves, when it lets go, what
optimizers hold) on every kind of recipe, on any machine; `cuda_rules` then adds only what a card does differently.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from torch.profiler import ProfilerActivity, profile

from lowvram_chat.tracing.recorder import Event


def profiled_peak_bytes(step: Callable[[], object]) -> int:
    """Runs `step` for real and returns the most bytes that were allocated at a time, above what was there before."""
    gc.collect()  # what is left over from before must not die inside, for a death counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # "[memory]" is kineto's name for an allocation (positive) or a free (negative).
    results = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    return _peak(nbytes for _, nbytes in changes)


def traced_peak_bytes(events: Iterable[Event]) -> int:
    """The most bytes alive at a time in a (part of a) trace, above what was there before; no allocator, no rounding."""
    return _peak(storage.nbytes if is_allocation else -storage.nbytes for storage, is_allocation in events)


def _peak(changes: Iterable[int]) -> int:
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak
