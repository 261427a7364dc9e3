"""An independent count of what a real step on the CPU allocates, by torch's own profiler.

A trace by the CPU's rules must find the same peak. That checks the recorder (what autograd saves, when it frees it, what
optimizers hold) on every kind of recipe, on any machine; `cuda_rules` then adds only what a CUDA device does differently.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

from torch.profiler import ProfilerActivity, profile

from lowvram_chat.tracing.recorder import Event


def profiled_peak_bytes(step: Callable[[], object]) -> int:
    """Run `step` for real and return the peak of the allocated bytes, above what was allocated before."""
    gc.collect()  # garbage from before must not be freed inside, where it would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # "[memory]" is kineto's name for an allocation (positive) or a free (negative).
    results = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in results if event.name() == "[memory]")
    return _peak(nbytes for _, nbytes in changes)


def traced_peak_bytes(events: Iterable[Event]) -> int:
    """Return the peak of the allocated bytes in a part of a trace, above what was allocated before it, without rounding."""
    return _peak(storage.nbytes if is_allocation else -storage.nbytes for storage, is_allocation in events)


def _peak(changes: Iterable[int]) -> int:
    allocated = peak = 0
    for change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak
