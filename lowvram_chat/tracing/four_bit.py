"""4-bit (nf4) layers for the trace: bitsandbytes' own modules, whose packed weights hold no values.

bitsandbytes quantises a weight when it reaches its device, which is impossible with fake tensors. Instead, `quantise`
builds the modules on the meta device, `shrink_weights` gives their weights the packed shape, and `load_onto_device` moves them,
with their scales, which are not parameters.
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
from lowvram_chat.tracing.materialise import Materialised, fake_like
from lowvram_chat.tracing.patching import patched
from lowvram_chat.tracing.recorder import TraceRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTISATION_BLOCK = 64
"""Values that share one fp32 scale."""
WAS_TRANSPOSED = "was_transposed"
"""Attribute of a layer whose weight is transposed, and so copied, before it is packed: that of a `Conv1D`."""


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
    """Record the block of the base's size that transformers allocates and frees before it loads onto a GPU.

    It leaves one cached segment, from which the weights are then allocated.
    Source: transformers/modeling_utils.py, `caching_allocator_warmup` (only with a device map, as for 4-bit models).
    """
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    recorder.record_temporaries([sum(parameter.nbytes for parameter in frozen)], "caching_allocator_warmup")


def load_onto_device(model: torch.nn.Module, shapes: dict[Linear4bit, torch.Size]) -> Materialised:
    """Move a 4-bit base and its adapter to the traced device in the order of loading, with the scales of its weights.

    Each weight comes whole, in its compute type, and is packed on the device. The adapter comes in that type and is cast. Return
    the moved parameters for `materialise`.
    Source: transformers/core_model_loading.py, `dot_natural_key`; bitsandbytes/nn/modules.py, `Params4bit._quantize`;
    peft/tuners/tuners_utils.py, `_move_adapter_to_device_of_base_layer`, `cast_adapter_dtype`.
    """
    moved: Materialised = {}
    layers = {layer.weight: layer for layer in shapes}
    for _, parameter in sorted(model.named_parameters(), key=lambda pair: _natural_key(pair[0])):
        if parameter in layers:
            layer = layers[parameter]
            moved[parameter] = _load_packed(layer, shapes[layer])
        elif not parameter.requires_grad:
            moved[parameter] = fake_like(parameter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = next((layer.compute_dtype for layer in shapes), torch.float32)
    uncast = [torch.empty(parameter.shape, dtype=dtype) for parameter in trained]
    for parameter in trained:
        moved[parameter] = fake_like(parameter)
        del uncast[0]
    return moved


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return what sorts the names of weights by their numbers."""
    parts = name.split(".")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _load_packed(layer: Linear4bit, shape: torch.Size) -> torch.Tensor:
    """Return the packed weight of a layer, which is given its scales: one fp32 value for each block, and the 16 nf4 values."""
    whole = torch.empty(shape, dtype=layer.compute_dtype)
    contiguous = torch.empty_like(whole) if vars(layer).get(WAS_TRANSPOSED) else whole
    scales = torch.empty(-(-shape.numel() // QUANTISATION_BLOCK))
    weight = fake_like(layer.weight)
    layer.quant_state = QuantState(
        absmax=scales,
        shape=shape,
        code=torch.empty(16),
        blocksize=QUANTISATION_BLOCK,
        quant_type="nf4",
        dtype=layer.compute_dtype,
    )
    vars(weight)["quant_state"] = layer.quant_state
    del whole, contiguous
    return weight


def label_scales(shapes: dict[Linear4bit, torch.Size], recorder: TraceRecorder) -> None:
    """Tell the recorder that the scales belong to the weights."""
    states = [layer.quant_state for layer in shapes if layer.quant_state is not None]
    recorder.label([tensor for state in states for tensor in (state.absmax, state.code)], "weights")


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
    vars(new)[WAS_TRANSPOSED] = isinstance(layer, Conv1D)
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
