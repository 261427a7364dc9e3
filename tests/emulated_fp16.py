"""Runs fp16 on a CPU as on a card: autocast to float16, and a gradient scaler that skips steps whose gradients overflow.

accelerate builds a gradient scaler on accelerators only, and the package refuses fp16 without a card, since it would be fp32 in
silence. Here both are lifted, so that everything around the scaler runs for real: scaling, unscaling, skipped steps, and its
state in checkpoints. The numbers are fp16's own, though a CPU's kernels round in another order than a card's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lowvram_chat.model import device as device_module

INITIAL_SCALE = 2.0**12
"""Scale of the first step. A card's run begins with 2^16, which a gradient of this loss does not overflow either."""


def emulate_fp16(monkeypatch: pytest.MonkeyPatch, *, scale: float = INITIAL_SCALE) -> None:
    """Let recipes with `train.precision: fp16` run on this CPU, with a gradient scaler that starts at `scale`."""
    original = Accelerator.__init__

    def __init__(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    monkeypatch.setattr(Accelerator, "__init__", __init__)
    monkeypatch.setattr(device_module, "_check_precision", lambda precision, *, cuda: None)
