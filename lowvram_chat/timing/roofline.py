"""Predicts how long a step takes on a GPU from its operations: a roofline for the GPU and a queue for kernel launches.

An operation keeps the GPU busy for the longer of two times: its matrix products at a share of the peak rate, as far as the power
limit sustains it, or its bytes at a share of the memory bandwidth. Each kernel adds a fixed overhead. The host launches one
operation after another, at some microseconds each, and runs ahead of the GPU until it synchronizes. At every moment, the slower
of the two sets the pace.

The constants of `timing.constants` are the same for all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import repeat

from lowvram_chat.timing.constants import (
    FLOPS_PER_TESTED_PRODUCT,
    GAIN_OF_ATTENTION,
    MAX_LAUNCH_FACTOR,
    MIN_LAUNCH_FACTOR,
    RATE_FACTOR,
    SECONDS_PER_KERNEL,
    SECONDS_PER_LAUNCH,
    SECONDS_PER_PRODUCT,
    SERVER_SECONDS_PER_LAUNCH,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_SHADERS,
    SHARE_OF_TENSOR_CORES,
    SHARE_OF_TENSOR_CORES_UNALIGNED,
    SUSTAINED_WATTS,
    WATTS_PER_TFLOPS,
)
from lowvram_chat.tracing.operations import Operation, Work


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
    sustained_tflops: float = float("inf")
    """Products of fp16 or bf16 matrices that the power limit sustains."""
    in_server: bool = False
    """Whether the host is a server."""
    launch_seconds: float | None = None
    """Time that the host needs for an operation, where it was measured; None: that of the host's kind."""

    def peak(self, operation: Operation) -> float:
        """Return the peak rate for an operation's products, in FLOPs per second."""
        return 1e12 * (self.half_tflops if operation.precision == "half" else self.single_tflops)

    def seconds_at_peak(self, operation: Operation) -> float:
        """Return how long an operation's products take at the peak rate: the physical limit."""
        return operation.flops / self.peak(operation)

    def reached(self, operation: Operation) -> float:
        """Return the rate that an operation's products reach, in FLOPs per second."""
        is_half = operation.precision == "half"
        share = share_of_peak(
            on_tensor_cores=self.half_on_tensor_cores if is_half else self.single_on_tensor_cores,
            aligned=not operation.unaligned,
        )
        gain = next((gain for name, gain in GAIN_OF_ATTENTION.items() if name in operation.name), 1.0)
        return min(share * gain * self.peak(operation), 1e12 * self.sustained_tflops if is_half else float("inf"))

    def launch(self, system: str) -> float:
        """Return the time that the host needs for an operation on "linux" or "windows", in seconds."""
        if self.launch_seconds is not None:
            return self.launch_seconds
        return (SERVER_SECONDS_PER_LAUNCH if self.in_server else SECONDS_PER_LAUNCH)[system]

    def varied(self, rate: float, launch: float, system: str) -> Rates:
        """Return the rates with those of the card and the time of a launch multiplied by a factor each."""
        return replace(
            self,
            half_tflops=self.half_tflops * rate,
            single_tflops=self.single_tflops * rate,
            gb_per_second=self.gb_per_second * rate,
            sustained_tflops=self.sustained_tflops * rate,
            launch_seconds=self.launch(system) * launch,
        )


def share_of_peak(*, on_tensor_cores: bool, aligned: bool = True) -> float:
    """Return the share of the peak rate that matrix products reach."""
    if not on_tensor_cores:
        return SHARE_OF_SHADERS
    return SHARE_OF_TENSOR_CORES if aligned else SHARE_OF_TENSOR_CORES_UNALIGNED


def sustained_tflops(watts: float, capability: tuple[int, int]) -> float:
    """Return the rate of half-precision products that a power limit sustains, in TFLOPS."""
    watts_per_tflops = next(energy for first, energy in WATTS_PER_TFLOPS if capability >= first)
    return SUSTAINED_WATTS * watts / watts_per_tflops


def peak_of(measured_tflops: float, *, on_tensor_cores: bool) -> float:
    """Return the peak rate with which the model predicts the rate that the self-test measured for its products."""
    seconds = FLOPS_PER_TESTED_PRODUCT / (1e12 * measured_tflops)
    busy = max(seconds - SECONDS_PER_PRODUCT - SECONDS_PER_KERNEL, seconds / 2)
    return FLOPS_PER_TESTED_PRODUCT / (1e12 * busy * share_of_peak(on_tensor_cores=on_tensor_cores))


def seconds_on_card(operation: Operation, rates: Rates) -> float:
    """Return how long an operation keeps the GPU busy."""
    memory = operation.nbytes / (1e9 * rates.gb_per_second * SHARE_OF_BANDWIDTH)
    overhead = operation.launches * SECONDS_PER_KERNEL
    if not operation.flops:
        return memory + overhead
    products = operation.flops / rates.reached(operation) + operation.launches * SECONDS_PER_PRODUCT
    return max(products, memory) + overhead


def seconds_per_step(
    work: Work,
    rates: Rates,
    micro_batches: int,
    system: str = "linux",
    *,
    host_launches: tuple[int, int] = (0, 0),
) -> float:
    """Return how long an optimizer step of `micro_batches` takes in the steady state of a run.

    `system` is "linux" or "windows". `host_launches` is what the host does besides launching operations, for each micro-batch and
    for the update, in launches.
    """
    launch_seconds = rates.launch(system)
    of_pass, of_update = (launch_seconds * launches for launches in host_launches)
    *passes, update = ([(op.synchronizes, seconds_on_card(op, rates)) for op in part] for part in work)
    parts = [(of_pass, passes[0]), *repeat((of_pass, passes[-1]), micro_batches - 1), (of_update, update)]
    first_step = _finish_times(parts, launch_seconds, (0.0, 0.0))
    return max(_finish_times(parts, launch_seconds, first_step)) - max(first_step)


def range_of_seconds(
    work: Work,
    rates: Rates,
    micro_batches: int,
    system: str = "linux",
    *,
    host_launches: tuple[int, int] = (0, 0),
) -> tuple[float, float]:
    """Return the shortest and the longest time of a step that are to be expected, with other rates and another host.

    A launch that was measured is taken as it is.
    """
    is_measured = rates.launch_seconds is not None
    shortest, longest = (
        seconds_per_step(
            work,
            rates.varied(rate, 1.0 if is_measured else launch, system),
            micro_batches,
            system,
            host_launches=host_launches,
        )
        for rate, launch in ((RATE_FACTOR, MIN_LAUNCH_FACTOR), (1 / RATE_FACTOR, MAX_LAUNCH_FACTOR))
    )
    return shortest, longest


def _finish_times(
    parts: Iterable[tuple[float, Iterable[tuple[bool, float]]]], launch_seconds: float, start: tuple[float, float]
) -> tuple[float, float]:
    """Return the times at which host and GPU finish these parts: seconds of the host, and operations after them.

    An operation is (synchronizes, seconds on the GPU).
    """
    host, gpu = start
    for host_seconds, operations in parts:
        host += host_seconds
        for synchronizes, seconds in operations:
            host += launch_seconds
            gpu = max(gpu, host) + seconds
            if synchronizes:
                host = gpu
    return host, gpu


def sum_over_step(work: Work, micro_batches: int, amount: Callable[[Operation], float]) -> float:
    """Return the sum of an amount over the operations of an optimizer step of `micro_batches`."""
    *passes, update = (sum(map(amount, part)) for part in work)
    return passes[0] + passes[-1] * (micro_batches - 1) + update
