"""Do optimizers, the gradient scaler and torch.compile work on this device?"""

from __future__ import annotations

import time
from typing import Any

import torch

from lowvram_chat.errors import CompilationError
from lowvram_chat.model.compilation import compilation_explained, missing_compiler, switched_off_by
from lowvram_chat.selftest.check import Outcome, figure, skipped
from lowvram_chat.selftest.exactness import batch, small_model

STEP_TOLERANCE = 0.1
"""Largest accepted difference of an 8-bit step from a 32-bit one, relative to the 32-bit step."""
OVERFLOWING_SCALE = 2.0**24
SCALED_STEPS = 12
"""Steps under the gradient scaler: on a CPU, the first seven overflow."""


def eight_bit(device: torch.device) -> Outcome:
    """Compare some steps of 8-bit AdamW with those of AdamW."""
    return _compared_with_adamw(device, paged=False)


def paged(device: torch.device) -> Outcome:
    """Compare some steps of paged 8-bit AdamW with those of AdamW, and look whether its states are paged."""
    if device.type == "cpu":
        return skipped("there is nothing to page on a CPU")
    return _compared_with_adamw(device, paged=True)


def _compared_with_adamw(device: torch.device, *, paged: bool) -> Outcome:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(512, 512, generator=generator)
    gradients = [torch.randn(512, 512, generator=generator) for _ in range(4)]
    moved, is_paged = {}, False
    for kind in (PagedAdamW8bit if paged else AdamW8bit, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone().to(device))
        optimizer: Any = kind([weight], lr=1e-2, weight_decay=0.0)
        for gradient in gradients:
            weight.grad = gradient.to(device)
            optimizer.step()
        moved[kind.__name__] = weight.detach().cpu() - start
        is_paged = is_paged or getattr(optimizer.state[weight].get("state1"), "is_paged", False)
    ours, theirs = moved.values()
    difference = float((ours - theirs).norm() / theirs.norm())
    return Outcome(
        good=difference <= STEP_TOLERANCE and is_paged == paged,
        meaning="8-bit AdamW takes AdamW's steps" + (", with paged states" if paged else ""),
        figures={"difference": figure(difference, "1")},
    )


def gradient_scaler(device: torch.device) -> Outcome:
    """Let fp16 gradients overflow, and look whether the step is skipped, the scale falls, and later steps are taken."""
    model, inputs = small_model(device), batch(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, init_scale=OVERFLOWING_SCALE)
    skipped_steps, taken = 0, 0
    for _ in range(SCALED_STEPS):
        before = model.transformer.wte.weight.detach().clone()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if torch.equal(before, model.transformer.wte.weight):
            skipped_steps += 1
        else:
            taken += 1
    finite = bool(torch.isfinite(model.transformer.wte.weight).all())
    return Outcome(
        good=finite and skipped_steps > 0 and taken > 0 and scaler.get_scale() < OVERFLOWING_SCALE,
        meaning="fp16 steps that overflow are skipped, and the run goes on with a smaller scale",
        figures={"skipped": figure(skipped_steps, "steps"), "taken": figure(taken, "steps")},
    )


def compiled(device: torch.device) -> Outcome:
    """Compile a small model and compare its loss with the uncompiled one."""
    missing = missing_compiler(device)
    if missing is not None:
        return skipped(f"torch.compile lacks {missing}; train.compile=if_possible runs without it")
    if variable := switched_off_by():
        return skipped(f"{variable} switches torch.compile off")
    model, inputs = small_model(device), batch(device)
    expected = model(input_ids=inputs["input_ids"]).logits.sum()
    started = time.perf_counter()
    try:
        with compilation_explained():
            model.compile(dynamic=False)
            found = model(input_ids=inputs["input_ids"]).logits.sum()
            found.backward()
    except CompilationError as error:
        return Outcome(good=False, meaning=str(error))
    difference = abs(float(found.detach() - expected.detach())) / max(abs(float(expected.detach())), 1.0)
    return Outcome(
        good=difference < 1e-2,
        meaning="torch.compile works",
        figures={"difference": figure(difference, "1"), "time to compile": figure(time.perf_counter() - started, "s")},
    )
