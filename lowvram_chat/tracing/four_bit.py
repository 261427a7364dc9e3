"""4-bit (nf4) layers for the trace: bitsandbytes' own modules, whose packed weights hold no values.

bitsandbytes quantises a weight when it reaches its device, which is impossible with fake tensors. Instead, `quantise`
builds the modules on the meta device, `shrink_weights` gives their weights the packed shape before they are moved, and
`add_scales` adds the scales, which are not parameters, afterwards.
Source: bitsandbytes/nn/modules.py, `Linear4bit`; functional.py, `quantize_4bit` (blocks of 64, no double quantisation).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from transformers.pytorch_utils import Conv1D

from lowvram_chat.errors import DeviceError
from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.patching import patched
from lowvram_chat.tracing.recorder import TraceRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTISATION_BLOCK = 64
"""Values that share one fp32 scale."""


def quantise(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of the blocks by 4-bit layers, as transformers does. The output head stays.

    Source: transformers/integrations/bitsandbytes.py, `replace_with_bnb_linear`.
    """
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if layer is not head and isinstance(layer, Conv1D | torch.nn.Linear):
            model.set_submodule(name, _linear(layer, compute_dtype))
    vars(model)["is_loaded_in_4bit"] = True  # PEFT reads this attribute


def shrink_weights(model: torch.nn.Module) -> dict[Linear4bit, torch.Size]:
    """Give 4-bit weights on the meta device the shape that they have on a GPU. Return their (out, in) shapes."""
    shapes = {}
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            shapes[layer] = layer.weight.shape
            packed = torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return shapes


def record_loading_warmup(model: torch.nn.Module, recorder: TraceRecorder) -> None:
    """Record the block of the model's size that transformers allocates and frees before it loads onto a GPU.

    It leaves one cached segment, from which the weights are then allocated.
    Source: transformers/modeling_utils.py, `caching_allocator_warmup` (only with a device map, as for 4-bit models).
    """
    recorder.record_temporaries(
        [sum(parameter.nbytes for parameter in {*model.parameters()})], "caching_allocator_warmup"
    )


def add_scales(shapes: dict[Linear4bit, torch.Size], recorder: TraceRecorder) -> None:
    """Give the moved 4-bit weights their scales: one fp32 value for each block. All share the 16 nf4 values."""
    code = torch.empty(16)
    recorder.label([code], "weights")
    for layer, shape in shapes.items():
        scales = torch.empty(-(-shape.numel() // QUANTISATION_BLOCK))
        recorder.label([scales], "weights")
        layer.quant_state = QuantState(
            absmax=scales,
            shape=shape,
            code=code,
            blocksize=QUANTISATION_BLOCK,
            quant_type="nf4",
            dtype=layer.compute_dtype,
        )
        vars(layer.weight)["quant_state"] = layer.quant_state


@contextlib.contextmanager
def dora_reads_fake_weights() -> Iterator[None]:
    """Let DoRA dequantise fake 4-bit weights; it takes the norm of the whole weight in each forward pass.

    PEFT recognises a 4-bit weight by its class, which is lost when the weight moves to the traced device.
    Source: peft/utils/integrations.py, `dequantize_module_weight`.
    """
    from peft.tuners.lora import dora

    check_private_names("peft.tuners.lora.dora.dequantize_module_weight")
    original = dora.dequantize_module_weight

    def dequantize(layer: torch.nn.Module) -> torch.Tensor:
        return _dequantised(layer) if isinstance(layer, Linear4bit) else original(layer)

    with patched(dora, dequantize_module_weight=dequantize):
        yield


def _dequantised(layer: Linear4bit) -> torch.Tensor:
    """Return the (out, in) weight of a layer in its compute type."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:  # PEFT is still building its layers, on the meta device
        return torch.empty(layer.out_features, layer.in_features, dtype=layer.compute_dtype, device="meta")
    weight: torch.Tensor = dequantize_4bit(layer.weight, state)
    return weight


def _linear(layer: Conv1D | torch.nn.Linear, compute_dtype: torch.dtype) -> Linear4bit:
    """Return a 4-bit layer in place of a linear one."""
    inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    new = Linear4bit(
        inputs, outputs, layer.bias is not None, compute_dtype, compress_statistics=False, quant_type="nf4"
    )
    if new.bias is not None:
        new.bias = torch.nn.Parameter(new.bias.to(layer.bias.dtype), requires_grad=False)
    _keep_layout(new)
    return new.requires_grad_(False)


def _keep_layout(layer: Linear4bit) -> None:
    """Keep a layer from repacking its weight at the first evaluation, as `model.pretrained` does.

    The traced device is the CPU, where bitsandbytes repacks if the processor has AVX512-BF16.

    Raises:
        DeviceError: bitsandbytes no longer has this switch.
    """
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        raise DeviceError(
            f"bitsandbytes {bitsandbytes.__version__}: Linear4bit.support_avx512bf16_for_cpu, which lowvram_chat relies on, "
            f"is gone. Install the version of bitsandbytes in constraints.txt."
        )
    layer.support_avx512bf16_for_cpu = False
