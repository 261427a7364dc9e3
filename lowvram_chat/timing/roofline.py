"""How long a step takes on a card, from its operations alone: a roofline for the card and a queue for its launches.

An operation takes the card the longer of its products at a share of the peak rate and its bytes at a share of the
bandwidth, and a moment for each kernel to start and end. The host launches one operation after the other, some
microseconds each, and runs ahead of the card until it asks for a value; so a step is as long as the slower of the two
lets it be at each moment.

The constants hold for all cards and all runs. They were chosen with the published speeds of `published_speeds` in
sight, so the errors found there are those of a fit with that many free numbers, not of a blind prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

from lowvram_chat.tracing.operations import Operation, Work

SHARE_OF_PEAK = 0.75
"""What matrix products reach of a card's peak rate. From a first model by hand, as the next one."""
SHARE_OF_BANDWIDTH = 0.80
"""What other operations reach of the memory's bandwidth."""
SHARE_OF_PEAK_UNALIGNED = 0.30
"""What products on tensor cores reach of the peak rate where the rows of a matrix do not begin at multiples of 16 bytes,
as those of logits over 50,257 tokens do not. Padding the vocabulary to 50,304 made nanoGPT, compiled by the torch of the
day, about 25 % faster (Karpathy, 3 February 2023): this share makes that 18 % with plain and 26 % with fused attention."""
SECONDS_PER_KERNEL = 2e-6
"""From the end of one kernel's work to the start of the next one's; an estimate of ours."""
SECONDS_PER_LAUNCH = {"linux": 20e-6, "windows": 30e-6}
"""What Python, PyTorch and the driver take for an operation. Measured: 18 to 21 us an operation for forward and backward
of a GPT-2 of width 12 on a server's CPU, where the kernels themselves take next to nothing. Windows' extra is an estimate
of ours. No published speed is bound by launches, so neither is checked by them."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a card can do at most."""

    half_tflops: float
    """Products of fp16 or bf16 matrices."""
    single_tflops: float
    """Products of fp32 matrices (with TF32 allowed: of those)."""
    gb_per_second: float
    half_on_tensor_cores: bool = True
    single_on_tensor_cores: bool = False
    """Whether fp32 products run as TF32."""

    def peak(self, operation: Operation) -> float:
        """The card's rate for an operation's products, FLOPs a second."""
        return 1e12 * (self.half_tflops if operation.precision == "half" else self.single_tflops)

    def seconds_at_peak(self, operation: Operation) -> float:
        """How long an operation's products take at that rate: nothing is faster."""
        return operation.flops / self.peak(operation)

    def share(self, operation: Operation) -> float:
        """What an operation's products reach of it."""
        is_half = operation.precision == "half"
        on_tensor_cores = self.half_on_tensor_cores if is_half else self.single_on_tensor_cores
        return SHARE_OF_PEAK_UNALIGNED if on_tensor_cores and operation.unaligned else SHARE_OF_PEAK


def seconds_on_card(operation: Operation, rates: Rates) -> float:
    """How long an operation keeps the card busy."""
    products = operation.flops / (rates.peak(operation) * rates.share(operation))
    memory = operation.nbytes / (1e9 * rates.gb_per_second * SHARE_OF_BANDWIDTH)
    return max(products, memory) + operation.launches * SECONDS_PER_KERNEL


def seconds_per_step(work: Work, rates: Rates, micro_batches: int, system: str = "linux") -> float:
    """How long an optimizer step of so many micro-batches takes, once the run is under way."""
    *passes, update = ([(op.waits, seconds_on_card(op, rates)) for op in part] for part in work)
    parts = [passes[0], *repeat(passes[-1], micro_batches - 1), update]
    launch = SECONDS_PER_LAUNCH[system]
    first = _finish_times(parts, launch, (0.0, 0.0))
    return max(_finish_times(parts, launch, first)) - max(first)


def _finish_times(
    parts: Iterable[Iterable[tuple[bool, float]]], launch: float, now: tuple[float, float]
) -> tuple[float, float]:
    """The times at which host and card have finished these operations."""
    host, card = now
    for part in parts:
        for waits, seconds in part:
            host += launch
            card = max(card, host) + seconds
            if waits:
                host = card
    return host, card


def sum_over_step(work: Work, micro_batches: int, amount: Callable[[Operation], float]) -> float:
    """Returns the sum of an amount over the operations of an optimizer step of so many micro-batches."""
    *passes, update = (sum(map(amount, part)) for part in work)
    return passes[0] + passes[-1] * (micro_batches - 1) + update
