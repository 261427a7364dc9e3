"""Predicts how long a step takes on a GPU from its operations: a roofline for the GPU and a queue for kernel launches.

An operation keeps the GPU busy for the longer of two times: its matrix products at a share of the peak rate, or its bytes
at a share of the memory bandwidth. Each kernel adds a fixed overhead. The host launches one operation after another, at
some microseconds each, and runs ahead of the GPU until it synchronizes. At every moment, the slower of the two sets the
pace.

The constants are the same for all GPUs and all runs. They were chosen with knowledge of the published speeds in
`published_speeds`. The errors found there are therefore those of a fit with that many free numbers, and not those of a
blind prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

from lowvram_chat.gpus import SHARE_OF_BANDWIDTH, SHARE_OF_PEAK
from lowvram_chat.tracing.operations import Operation, Work

SHARE_OF_PEAK_UNALIGNED = 0.30
"""Share of the peak rate that products on tensor cores reach where a matrix's rows do not begin at multiples of 16 bytes,
such as logits over 50,257 tokens. Padding the vocabulary to 50,304 made nanoGPT, compiled by the PyTorch of the day, about
25 % faster (Karpathy, 3 February 2023). This share predicts 18 % with plain attention and 26 % with fused attention."""
SECONDS_PER_KERNEL = 2e-6
"""Time from the end of one kernel's work to the start of the next kernel's. Our estimate."""
SECONDS_PER_LAUNCH = {"linux": 20e-6, "windows": 30e-6}
"""Time that Python, PyTorch and the driver need for an operation. Measured: 18 to 21 us per operation, for forward and
backward of a GPT-2 of width 12 on a server's CPU, where the kernels themselves take almost no time. The surcharge for
Windows is our estimate. No published speed is limited by launches, so none checks these two numbers."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The highest rates of a GPU."""

    half_tflops: float
    """Products of fp16 or bf16 matrices."""
    single_tflops: float
    """Products of fp32 matrices; where TF32 is allowed, TF32 products."""
    gb_per_second: float
    """Memory bandwidth."""
    half_on_tensor_cores: bool = True
    single_on_tensor_cores: bool = False
    """Whether fp32 products run as TF32."""
    launch_seconds: float | None = None
    """Time that the host needs for an operation, where it was measured; None: `SECONDS_PER_LAUNCH`."""

    def peak(self, operation: Operation) -> float:
        """Return the peak rate for an operation's products, in FLOPs per second."""
        return 1e12 * (self.half_tflops if operation.precision == "half" else self.single_tflops)

    def seconds_at_peak(self, operation: Operation) -> float:
        """Return how long an operation's products take at the peak rate: the physical limit."""
        return operation.flops / self.peak(operation)

    def share(self, operation: Operation) -> float:
        """Return the share of the peak rate that an operation's products reach."""
        is_half = operation.precision == "half"
        on_tensor_cores = self.half_on_tensor_cores if is_half else self.single_on_tensor_cores
        return SHARE_OF_PEAK_UNALIGNED if on_tensor_cores and operation.unaligned else SHARE_OF_PEAK


def seconds_on_card(operation: Operation, rates: Rates) -> float:
    """Return how long an operation keeps the GPU busy."""
    products = operation.flops / (rates.peak(operation) * rates.share(operation))
    memory = operation.nbytes / (1e9 * rates.gb_per_second * SHARE_OF_BANDWIDTH)
    return max(products, memory) + operation.launches * SECONDS_PER_KERNEL


def seconds_per_step(work: Work, rates: Rates, micro_batches: int, system: str = "linux") -> float:
    """Return how long an optimizer step of `micro_batches` takes in the steady state of a run.

    `system` is "linux" or "windows".
    """
    *passes, update = ([(op.synchronizes, seconds_on_card(op, rates)) for op in part] for part in work)
    parts = [passes[0], *repeat(passes[-1], micro_batches - 1), update]
    launch_seconds = SECONDS_PER_LAUNCH[system] if rates.launch_seconds is None else rates.launch_seconds
    first_step = _finish_times(parts, launch_seconds, (0.0, 0.0))
    return max(_finish_times(parts, launch_seconds, first_step)) - max(first_step)


def _finish_times(
    parts: Iterable[Iterable[tuple[bool, float]]], launch_seconds: float, start: tuple[float, float]
) -> tuple[float, float]:
    """Return the times at which host and GPU finish these operations, each (synchronizes, seconds on the GPU)."""
    host, gpu = start
    for part in parts:
        for synchronizes, seconds in part:
            host += launch_seconds
            gpu = max(gpu, host) + seconds
            if synchronizes:
                host = gpu
    return host, gpu


def sum_over_step(work: Work, micro_batches: int, amount: Callable[[Operation], float]) -> float:
    """Return the sum of an amount over the operations of an optimizer step of `micro_batches`."""
    *passes, update = (sum(map(amount, part)) for part in work)
    return passes[0] + passes[-1] * (micro_batches - 1) + update
