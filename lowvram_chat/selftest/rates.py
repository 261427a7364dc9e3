"""The rates of a device: launches, matrix products, memory, the bus, the disk, and the size of a CUDA context."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lowvram_chat.model.device import move_to_device
from lowvram_chat.selftest.check import Outcome, figure
from lowvram_chat.selftest.counting import count_operations

ROWS, WIDTH = 2048, 768
"""Tokens and width of GPT-2's products: a micro-batch of two rows of 1,024 tokens."""
PRODUCT_SHAPES = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
"""(inputs, outputs) of the four products of a block."""
REPEATS = 7
ELEMENTS = {"cuda": 64 << 20, "cpu": 16 << 20}
"""Elements of the vectors whose sum measures the bandwidth: far larger than any cache."""
DISK_BYTES = 128 << 20
MIB = 1 << 20


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median time of some work on a device, after one that is not measured."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def memory(device: torch.device) -> Outcome:
    """Return the memory of the card that is free, and what a CUDA context takes; on a CPU, the main memory."""
    if device.type == "cpu":
        import psutil

        found = psutil.virtual_memory()
        figures = {"free": figure(found.available / MIB, "MiB"), "total": figure(found.total / MIB, "MiB")}
        return Outcome(good=True, meaning="main memory; without a card there is no CUDA context", figures=figures)
    from lowvram_chat import nvidia_smi

    card = nvidia_smi.visible_card()
    before = None if card is None else card.free_mib
    torch.zeros(1, device=device)
    synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    figures = {"free": figure(free / MIB, "MiB"), "total": figure(total / MIB, "MiB")}
    if before is not None:
        context = before - free / MIB - torch.cuda.memory_reserved(device) / MIB
        if context > 0:
            figures["context"] = figure(context, "MiB")
    return Outcome(good=True, meaning="memory of the card that a run can use", figures=figures)


def launch_latency(device: torch.device) -> Outcome:
    """Return the time that the host needs for an operation: forward and backward of a GPT-2 whose kernels take almost none."""
    shape: dict[str, Any] = {"n_embd": 12, "n_layer": 6, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    move_to_device(model, device)
    tokens = torch.arange(8, device=device)[None]

    def work() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    operations, threads = count_operations(work), torch.get_num_threads()
    torch.set_num_threads(1)  # the host launches from one thread; on a CPU, others would wait for each other
    try:
        seconds = median_seconds(work, device) / operations
    finally:
        torch.set_num_threads(threads)
    return Outcome(
        good=True,
        meaning="time that the host needs for an operation, which small models and single rows are bound by",
        figures={"launch": figure(1e6 * seconds, "us")},
    )


def products(device: torch.device) -> Outcome:
    """Return the rates of GPT-2's matrix products in each type, in 10^12 FLOP per second."""
    figures = {}
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        if device.type == "cpu" and dtype != torch.float32:
            continue  # emulated on most processors: a run there is fp32
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        figures[name] = figure(product_rate(device, dtype), "TFLOP/s")
    return Outcome(good=True, meaning="rates of GPT-2's matrix products, forward and backward", figures=figures)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a block's products in 10^12 FLOP per second."""
    pairs = [
        (torch.randn(ROWS, rows, device=device, dtype=dtype), torch.randn(rows, columns, device=device, dtype=dtype))
        for rows, columns in PRODUCT_SHAPES
    ]

    def work() -> None:
        for states, weight in pairs:
            result = states @ weight
            result @ weight.t()  # the gradient of the states
            states.t() @ result  # the gradient of the weight

    flops = sum(3 * 2 * ROWS * rows * columns for rows, columns in PRODUCT_SHAPES)
    return flops / median_seconds(work, device) / 1e12


def bandwidth(device: torch.device) -> Outcome:
    """Return the rate of reads and writes of a large elementwise operation."""
    count = ELEMENTS[device.type]
    one, other = torch.ones(count, device=device), torch.ones(count, device=device)
    result = torch.empty_like(one)
    seconds = median_seconds(lambda: torch.add(one, other, out=result), device)
    return Outcome(
        good=True,
        meaning="bytes that an elementwise operation reads and writes in a second",
        figures={"bandwidth": figure(3 * 4 * count / seconds / 1e9, "GB/s")},
    )


def transfer(device: torch.device) -> Outcome:
    """Return the rate of copies from the main memory to the card; on a CPU, within the main memory."""
    host = torch.ones(32 << 20, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)
    seconds = median_seconds(lambda: target.copy_(host), device)
    return Outcome(
        good=True,
        meaning="rate at which checkpoints and paged states move",
        figures={"transfer": figure(host.numel() / seconds / 1e9, "GB/s")},
    )


def disk(device: torch.device) -> Outcome:
    """Return the rate at which a checkpoint is written to the disk of the present folder, and synced."""
    content = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="lowvram-chat-selftest-") as folder:
        started = time.perf_counter()
        with Path(folder, "file").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    return Outcome(
        good=True,
        meaning="rate at which a checkpoint is written",
        figures={"write": figure(DISK_BYTES / seconds / 1e6, "MB/s")},
    )
