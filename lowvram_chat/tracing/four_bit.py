"""4-bit (nf4) layers for the trace: bitsandbytes' own modules, with packed weights that hold no values.

bitsandbytes quantises when a weight reaches its device, which fake tensors cannot do. So the modules are built on the
meta device (`quantise`), their weights get the packed shape before they are moved (`shrink_weights`), and the scales, which are
no parameters, are added after (`add_scales`).
Source: bitsandbytes/nn/modules.py, `Linear4bit`; functional.py, `quantize_4bit` (blocks of 64, no double quantisation).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers.pytorch_utils import Conv1D

from lowvram_chat.tracing.recorder import TraceRecorder

QUANTISATION_BLOCK = 64
"""Values that share one fp32 scale."""


def quantise(model: Any, compute_dtype: torch.dtype) -> None:
    """Puts 4-bit layers in place of the blocks' linear ones, as transformers does; the output head stays.

    Source: transformers/integrations/bitsandbytes.py, `replace_with_bnb_linear`.
    """
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if layer is not head and isinstance(layer, Conv1D | torch.nn.Linear):
            model.set_submodule(name, _linear(layer, compute_dtype))
    model.is_loaded_in_4bit = True  # what PEFT asks


def shrink_weights(model: torch.nn.Module) -> dict[Linear4bit, torch.Size]:
    """Gives 4-bit weights, still on the meta device, the shape they have on a card; returns the (out, in) shapes."""
    shapes = {}
    for layer in _layers(model):
        shapes[layer] = layer.weight.shape
        packed = torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return shapes


def record_loading_warmup(model: torch.nn.Module, recorder: TraceRecorder) -> None:
    """Notes the block of the model's size that transformers takes and lets go before it loads onto a card.

    What it leaves is one cached segment, which the weights are then cut from.
    Source: transformers/modeling_utils.py, `caching_allocator_warmup` (only with a device map, as for 4-bit models).
    """
    recorder.record_temporaries(
        [sum(parameter.nbytes for parameter in {*model.parameters()})], "caching_allocator_warmup"
    )


def add_scales(shapes: dict[Linear4bit, torch.Size], recorder: TraceRecorder) -> None:
    """Gives the moved 4-bit weights their scales: one fp32 value a block. The 16 nf4 values are shared."""
    code = torch.empty(16)
    recorder.label([code], "weights")
    for layer, shape in shapes.items():
        scales = torch.empty(-(-shape.numel() // QUANTISATION_BLOCK))
        recorder.label([scales], "weights")
        layer.weight.quant_state = layer.quant_state = QuantState(
            absmax=scales,
            shape=shape,
            code=code,
            blocksize=QUANTISATION_BLOCK,
            quant_type="nf4",
            dtype=layer.compute_dtype,
        )


@contextlib.contextmanager
def dora_reads_fake_weights() -> Iterator[None]:
    """Lets DoRA, which takes the norm of the whole weight in each forward pass, dequantise these weights.

    PEFT looks at a weight's class, which does not survive the move onto the traced card.
    Source: peft/utils/integrations.py, `dequantize_module_weight`.
    """
    from peft.tuners.lora import dora

    module: Any = dora
    plain = module.dequantize_module_weight
    module.dequantize_module_weight = lambda layer: (
        _dequantised(layer) if isinstance(layer, Linear4bit) else plain(layer)
    )
    try:
        yield
    finally:
        module.dequantize_module_weight = plain


def _dequantised(layer: Linear4bit) -> torch.Tensor:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:  # still being built
        return torch.empty(layer.out_features, layer.in_features, dtype=layer.compute_dtype, device="meta")
    weight: torch.Tensor = dequantize_4bit(layer.weight, state)
    return weight


def _layers(model: torch.nn.Module) -> Iterator[Linear4bit]:
    return (layer for layer in model.modules() if isinstance(layer, Linear4bit))


def _linear(layer: Any, compute_dtype: torch.dtype) -> Linear4bit:
    inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    new = Linear4bit(
        inputs, outputs, layer.bias is not None, compute_dtype, compress_statistics=False, quant_type="nf4"
    )
    if new.bias is not None:
        new.bias = torch.nn.Parameter(new.bias.to(layer.bias.dtype), requires_grad=False)
    new.support_avx512bf16_for_cpu = False  # as `model.load` has it
    return new.requires_grad_(False)
