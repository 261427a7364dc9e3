"""The graphics cards a recipe can name.

Source: the project's collected facts (compute capability, memory, FP16 tensor rate with fp32 accumulation by power
limit, FP32 rate, bandwidth; usable memory of 4 GB cards). Estimates of ours, measured by nobody: what is usable of cards
other than 4 GB ones, the power limits of the cards that have a single one (but 45 W), and the T600's FP16 rate (twice its
FP32 rate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONTEXT_MIB = 300
"""What a CUDA context takes outside the allocator, MiB: 300 MB on current stacks, 150 to 350 seen; not published for
the RTX 3050."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card: what the planner and the time model need to know of it."""

    title: str
    compute_capability: tuple[int, int]
    total_mib: int
    """Memory on the board, MiB."""
    usable_linux_mib: int
    """What a process can take on Linux, CUDA context included, MiB."""
    usable_windows_mib: int
    """The same on Windows, where the desktop and WDDM keep a share, MiB."""
    fp16_tflops: Mapping[int, float]
    """Power limit (W) -> tensor-core FP16 rate with fp32 accumulation (TFLOPS); shaders where there are no tensor cores."""
    fp32_tflops: Mapping[int, float]
    """Power limit (W) -> FP32 rate (TFLOPS)."""
    gb_per_second: float
    """Memory bandwidth, 10^9 bytes a second."""
    tensor_cores: bool = True
    """Whether it has tensor cores; else `fp16_tflops` is what its shaders do."""
    fp16_accumulation_gain: float = 1.0
    """How many times faster fp16 products are that accumulate in fp16: 2 on GeForce RTX, which halves fp32 accumulation."""


def _four_gb(
    title: str, capability: tuple[int, int], fp16: Mapping[int, float], fp32: Mapping[int, float], bandwidth: float
) -> Gpu:
    """Return a 4 GB card: 3.8 GiB usable on Linux, 3.5 GiB on Windows (the middle of 3.3 to 3.75 seen).

    The small Turing chips (TU117) lack the tensor cores of their generation.
    """
    return Gpu(
        title=title,
        compute_capability=capability,
        total_mib=4096,
        usable_linux_mib=3891,
        usable_windows_mib=3584,
        fp16_tflops=fp16,
        fp32_tflops=fp32,
        gb_per_second=bandwidth,
        tensor_cores=capability >= (8, 0),
        fp16_accumulation_gain=2.0 if capability >= (8, 0) else 1.0,
    )


GPUS: Mapping[str, Gpu] = {
    "rtx-3050-laptop-4gb": _four_gb(
        "RTX 3050 Laptop 4 GB",
        (8, 6),
        {80: 14.25, 55: 12.2, 50: 11.6, 40: 10.0},
        {80: 7.13, 55: 6.08, 50: 5.80, 40: 5.01},
        192,
    ),
    "rtx-2050-laptop-4gb": _four_gb("RTX 2050 Laptop 4 GB", (8, 6), {45: 12.1}, {45: 6.05}, 112),
    "gtx-1650-laptop-4gb": _four_gb("GTX 1650 Laptop 4 GB", (7, 5), {50: 6.4}, {50: 3.2}, 128),
    "t600-laptop-4gb": _four_gb("T600 Laptop 4 GB", (7, 5), {40: 5.0}, {40: 2.5}, 192),
    "rtx-3050-laptop-6gb": Gpu(
        title="RTX 3050 6 GB Laptop",
        compute_capability=(8, 6),
        total_mib=6144,
        usable_linux_mib=5837,
        usable_windows_mib=5376,
        fp16_tflops={45: 12.4},
        fp32_tflops={45: 6.2},
        gb_per_second=144,
        fp16_accumulation_gain=2.0,
    ),
    "t4-16gb": Gpu(
        title="Tesla T4 16 GB",
        compute_capability=(7, 5),
        total_mib=15360,
        usable_linux_mib=14900,
        usable_windows_mib=14900,
        fp16_tflops={70: 65.0},
        fp32_tflops={70: 8.1},
        gb_per_second=320,
    ),
    "rtx-3090-24gb": Gpu(
        title="RTX 3090 24 GB",
        compute_capability=(8, 6),
        total_mib=24576,
        usable_linux_mib=24100,
        usable_windows_mib=23000,
        fp16_tflops={350: 71.0},
        fp32_tflops={350: 35.6},
        gb_per_second=936,
        fp16_accumulation_gain=2.0,
    ),
    "a100-40gb": Gpu(
        title="A100 SXM 40 GB",
        compute_capability=(8, 0),
        total_mib=40960,
        usable_linux_mib=40300,
        usable_windows_mib=40300,
        fp16_tflops={400: 312.0},
        fp32_tflops={400: 19.5},
        gb_per_second=1555,
    ),
}
