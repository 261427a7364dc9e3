"""The constants of the time model, which hold for all cards and all runs, and what each is taken from.

They were fitted to the 13 published speeds of `benchmarks.validation.published_runs` and the 36 of `speeds_measured.csv` that can
be traced, and rounded. The errors on those rows are therefore those of a fit. With the rows of one card left out of the fit at a
time, the rows left out had a median error of 7 %, and 45 of the 49 were within 20 %.
"""

from __future__ import annotations

from collections.abc import Mapping

SHARE_OF_TENSOR_CORES, SHARE_OF_SHADERS = 0.68, 0.78
"""Share of the peak rate that matrix products reach on tensor cores, and on the other units."""
SHARE_OF_TENSOR_CORES_UNALIGNED = 0.29
"""The same where a matrix's rows do not begin at multiples of 16 bytes, such as logits over 50,257 tokens. Padding the vocabulary
to 50,304 made nanoGPT, compiled by the PyTorch of the day, about 25 % faster (Karpathy, 3 February 2023)."""
GAIN_OF_ATTENTION: Mapping[str, float] = {"efficient_attention": 0.5, "flash_attention": 1.3, "varlen_attn": 1.3}
"""Part of an attention operation's name -> its share relative to that of other products. FLOPs are counted without regard to the
causal mask, so a kernel that skips the masked half can exceed 1. That of the memory-efficient kernel is our estimate."""
SHARE_OF_BANDWIDTH = 0.80
"""Share of the memory bandwidth that other operations reach."""
SECONDS_PER_KERNEL, SECONDS_PER_PRODUCT = 3e-6, 6e-6
"""Time from the end of one kernel's work to the start of the next kernel's, and the further time in which a product's kernel
fills and drains the card. The second makes large cards reach a smaller share of their peak than small ones."""

SUSTAINED_WATTS = 0.7
"""Share of a card's power limit that its matrix products can take. Memory, leakage and fans take the rest."""
WATTS_PER_TFLOPS = (((8, 9), 1.0), ((8, 6), 1.6), ((8, 0), 1.1), ((0, 0), 1.8))
"""First compute capability -> watts for 10^12 half-precision FLOPs per second, by the process of manufacture: 4 nm (Ada, Hopper
and later), 8 nm (GA10x), 7 nm (A100), 12 nm and older. They limit cards whose peak is high for their power: an L4 to 50 of its
121 TFLOPS, an H100 to 490 of 989. That of 12 nm is our estimate, and no published speed is limited by that of 8 nm."""

SECONDS_PER_LAUNCH: Mapping[str, float] = {"linux": 12e-6, "windows": 18e-6}
SERVER_SECONDS_PER_LAUNCH: Mapping[str, float] = {"linux": 30e-6, "windows": 45e-6}
"""Time that Python, PyTorch and the driver need for an operation, on a laptop or desktop and on a server. Published runs that
are limited by it took 12 us (a laptop with an RTX 3080 Ti) and 28 to 31 us (an L40S); the self-test measured 29 us beside an
H200. The surcharge for Windows is our estimate."""
TRAINER_LAUNCHES = (135, 275)
"""What the Trainer, accelerate and the collator do on the host, in launches: for each micro-batch, and for each step. Two
measured runs beside an H200 needed 590 and 497 in steps of two micro-batches; the division is that of a run on a CPU."""

RATE_FACTOR = 1.25
"""How far a card's rates may be from the predicted ones, either way, in the range that is printed with a speed."""
MIN_LAUNCH_FACTOR, MAX_LAUNCH_FACTOR = 0.7, 1.6
"""The same for the time of a launch, which depends on the host's processor."""

FLOPS_PER_TESTED_PRODUCT = 2 * 2048 * 768 * 768 * (3 + 1 + 4 + 4) / 4
"""FLOPs of a matrix product whose rate the self-test measures: the mean of the four of a GPT-2 block, for 2,048 tokens."""
