"""The graphics cards that a recipe can name.

Source: the project's collected facts, for the compute capability, the memory, the FP16 tensor rate with fp32 accumulation by
power limit, the FP32 rate, the bandwidth, and the usable memory of 4 GB cards.

The rows made by `_card` are computed from cores and boost clocks, and the bandwidths are those of data sheets. The rates of the
A10 and of the RTX 4060, and the lower power limits of the RTX 2060 and 3060 Laptop, were written down from memory and agree
with cores x 2 x boost clock; nobody has compared them with the published pages. Our own estimates, which nobody has measured,
are the usable memory of the other cards, the power limits of cards with a single one (except 45 W), and the FP16 rate of the
T600 (twice its FP32 rate).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

CONTEXT_MIB = 300
"""Memory of a CUDA context, outside the allocator, in MiB: 300 MB with current drivers and libraries, 150 to 350 observed. No
figure is published for the RTX 3050."""

USABLE_SHARES = {"linux": 0.97, "windows": 0.95}
"""Share of a card that a process may use, where it was not measured. Our estimate."""
SERVER_CARDS = frozenset(
    {
        *("p100", "v100", "t4", "a2", "a10", "a16", "a30", "a40", "a100", "a800"),
        *("l4", "l40", "l40s", "h100", "h200", "h800", "b100", "b200", "gh200"),
    }
)
"""Cards whose hosts are servers, whose processors launch kernels more slowly than those of desktops and laptops."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The properties of one graphics card that the planner and the time model use."""

    title: str
    """Name as it is printed."""
    compute_capability: tuple[int, int]
    """(major, minor)."""
    total_mib: int
    """Memory of the card, MiB."""
    usable_linux_mib: int
    """Memory that a process can use on Linux, including its CUDA context, MiB."""
    usable_windows_mib: int
    """The same on Windows, where the desktop and WDDM use a part, MiB."""
    fp16_tflops: Mapping[int, float]
    """Power limit (W) -> FP16 rate with fp32 accumulation (TFLOPS), of the tensor cores or, without them, of the shaders. Empty
    for a card whose rates are not known, of which no speed is predicted."""
    fp32_tflops: Mapping[int, float]
    """Power limit (W) -> FP32 rate (TFLOPS)."""
    gb_per_second: float
    """Memory bandwidth, 10^9 bytes per second."""
    tensor_cores: bool = True
    """Whether the card has tensor cores; otherwise `fp16_tflops` is the rate of its shaders."""
    fp16_accumulation_gain: float = 1.0
    """Speed of fp16 products with fp16 accumulation relative to fp32 accumulation: 2 on GeForce RTX, which halves the latter."""

    launch_seconds: float | None = None
    """Time that the host needs for an operation, where the self-test measured it."""
    context_mib: int = CONTEXT_MIB
    """Memory of a CUDA context: the estimate, or what the self-test measured."""
    is_calibrated: bool = False
    """Whether the rates were measured by the self-test of this machine."""

    @property
    def in_server(self) -> bool:
        """Whether its host is taken to be a server, by the card's name."""
        return not SERVER_CARDS.isdisjoint(self.title.lower().replace("-", " ").split())

    def usable_mib(self, system: str) -> int:
        """Return the memory that a process can use on "linux" or "windows", MiB."""
        return self.usable_windows_mib if system == "windows" else self.usable_linux_mib

    def nearest_limit(self, watts: float | None) -> int:
        """Return the power limit of the table that is closest to `watts`; the highest if it is not known."""
        limits = self.fp16_tflops
        return max(limits) if watts is None else min(limits, key=lambda limit: abs(limit - watts))


def _four_gb(
    title: str, capability: tuple[int, int], fp16: Mapping[int, float], fp32: Mapping[int, float], bandwidth: float
) -> Gpu:
    """Return a 4 GB card, with 3.8 GiB usable on Linux and 3.5 GiB on Windows (the middle of the observed 3.3 to 3.75).

    The small Turing chips (TU117) have no tensor cores, unlike the rest of their generation.
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


def _card(
    title: str,
    capability: tuple[int, int],
    total_mib: int,
    fp32: Mapping[int, float],
    fp16_over_fp32: float,
    *,
    bandwidth: float,
) -> Gpu:
    """Return a card from its FP32 rate by power limit: cores x 2 x boost clock.

    `fp16_over_fp32` is 2 on GeForce cards of Ampere and Ada (with fp32 accumulation; twice as fast with fp16 accumulation) and
    4 on those of Turing that have tensor cores. Without tensor cores it is 2 on Turing and on the P100, and 1 on other Pascal
    cards, where cuBLAS computes fp16 products in fp32. Source: NVIDIA's white papers on Turing, Ampere GA102 and Ada, and its
    data sheets.
    """
    is_geforce_rtx = title.startswith("RTX")
    return Gpu(
        title=title,
        compute_capability=capability,
        total_mib=total_mib,
        usable_linux_mib=int(USABLE_SHARES["linux"] * total_mib),
        usable_windows_mib=int(USABLE_SHARES["windows"] * total_mib),
        fp16_tflops={watts: round(fp16_over_fp32 * rate, 1) for watts, rate in fp32.items()},
        fp32_tflops=fp32,
        gb_per_second=bandwidth,
        tensor_cores=fp16_over_fp32 > 2 or capability >= (8, 0),
        fp16_accumulation_gain=2.0 if is_geforce_rtx else 1.0,
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
    "rtx-3050-6gb": _card("RTX 3050 6 GB", (8, 6), 6144, {70: 6.8}, 2, bandwidth=168),
    "rtx-3050-8gb": _card("RTX 3050 8 GB", (8, 6), 8192, {130: 9.1}, 2, bandwidth=224),
    "rtx-3060-laptop-6gb": _card(
        "RTX 3060 Laptop 6 GB", (8, 6), 6144, {115: 13.1, 80: 10.9, 60: 9.9}, 2, bandwidth=336
    ),
    "rtx-3060-12gb": _card("RTX 3060 12 GB", (8, 6), 12288, {170: 12.7}, 2, bandwidth=360),
    "rtx-2060-6gb": _card("RTX 2060 6 GB", (7, 5), 6144, {160: 6.5}, 4, bandwidth=336),
    "rtx-2060-laptop-6gb": _card("RTX 2060 Laptop 6 GB", (7, 5), 6144, {115: 6.0, 80: 4.6}, 4, bandwidth=336),
    "rtx-4050-laptop-6gb": _card("RTX 4050 Laptop 6 GB", (8, 9), 6141, {115: 12.1, 35: 8.2}, 2, bandwidth=192),
    "rtx-4060-laptop-8gb": _card("RTX 4060 Laptop 8 GB", (8, 9), 8188, {115: 14.6, 35: 9.0}, 2, bandwidth=256),
    "rtx-4060-8gb": _card("RTX 4060 8 GB", (8, 9), 8188, {115: 15.1}, 2, bandwidth=272),
    "rtx-4090-24gb": _card("RTX 4090 24 GB", (8, 9), 24564, {450: 82.6}, 2, bandwidth=1008),
    "gtx-1650-4gb": _four_gb("GTX 1650 4 GB", (7, 5), {75: 6.0}, {75: 3.0}, 128),
    "gtx-1660-6gb": _card("GTX 1660 6 GB", (7, 5), 6144, {120: 5.0}, 2, bandwidth=192),
    "gtx-1060-6gb": _card("GTX 1060 6 GB", (6, 1), 6144, {120: 4.4}, 1, bandwidth=192),
    "gtx-1060-3gb": _card("GTX 1060 3 GB", (6, 1), 3072, {120: 3.9}, 1, bandwidth=192),
    "mx450-laptop-2gb": _card("MX450 Laptop 2 GB", (7, 5), 2048, {25: 2.8}, 2, bandwidth=80),
    "mx550-laptop-2gb": _card("MX550 Laptop 2 GB", (7, 5), 2048, {25: 2.7}, 2, bandwidth=96),
    "p100-16gb": _card("Tesla P100 16 GB", (6, 0), 16384, {250: 9.3}, 2, bandwidth=732),
    "l4-24gb": _card("L4 24 GB", (8, 9), 23034, {72: 30.3}, 4, bandwidth=300),
    "a10-24gb": _card("A10 24 GB", (8, 6), 23028, {150: 31.2}, 4, bandwidth=600),
    "h100-80gb": _card("H100 SXM 80 GB", (9, 0), 81559, {700: 67.0}, 14.76, bandwidth=3350),
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
"""Name in a recipe -> card."""


def this_system() -> str:
    """Return "windows" or "linux", which also stands for every other system."""
    return "windows" if sys.platform == "win32" else "linux"


DEFAULT_GPU = "rtx-3050-laptop-4gb"
"""The card that is planned for where none is named and none is present."""
NO_PART_OF_A_NAME = {
    *("nvidia", "geforce", "tesla", "quadro", "gpu", "with", "max", "q", "design"),
    *("sxm", "sxm2", "sxm4", "pcie", "hbm3"),
}
"""Words of a driver's name that our names leave out. A Max-Q card is the same chip with a lower power limit."""
MEMORY_TOLERANCE = 0.1
"""Largest relative difference between the memory that a driver reports and the table's."""


def known_gpu(card: str, mib: int) -> str | None:
    """Return the row of the table for the name and the memory that a driver reports; None if no row matches.

    "NVIDIA GeForce RTX 3050 Laptop GPU" with 4,096 MiB is rtx-3050-laptop-4gb. Drivers leave out "Laptop" for chips that only
    laptops have, and for some laptop cards of the GTX generation.
    """
    words = {word for word in card.lower().replace("-", " ").split() if not re.fullmatch(r"\d+gb", word)}
    words -= NO_PART_OF_A_NAME
    for wanted in (words, words | {"laptop"}):
        for name, gpu in GPUS.items():
            is_same_size = abs(mib - gpu.total_mib) < mib * MEMORY_TOLERANCE
            if {*name.split("-")[:-1]} == wanted and is_same_size:
                return name
    return None
