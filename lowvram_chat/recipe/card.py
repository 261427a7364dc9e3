"""The graphics card that a recipe is planned for."""

from __future__ import annotations

from lowvram_chat.gpus import CONTEXT_MIB, DEFAULT_GPU, GPUS, USABLE_SHARES, Gpu, this_system
from lowvram_chat.recipe.choices import AUTO
from lowvram_chat.recipe.sections import Card, Memory
from lowvram_chat.units import MIB

FIRST_TENSOR_CORES = 7.0
"""Compute capability of the first cards with tensor cores. The small Turing chips (7.5) lack them: their rows say so."""
UNNAMED_LIMIT = 0
"""Power limit (W) of a described card that does not say its own."""


def card_of(memory: Memory) -> Gpu:
    """Return the card of a memory section: the described one, the named one, or the default.

    `auto` is resolved before, by `model.present_card`; what is left of it is a machine without a card.
    """
    if memory.card is not None:
        return _described(memory.card)
    return GPUS[name_of(memory)]


def name_of(memory: Memory) -> str:
    """Return the name of a section's card: its row in the table, or what a described card is called."""
    if memory.card is not None:
        return memory.card.name
    return DEFAULT_GPU if memory.gpu == AUTO else memory.gpu


def limits_of(memory: Memory) -> dict[str, int]:
    """Return, for "linux" and "windows", the bytes of the card that a run may use, context included.

    A card whose free memory is known is this machine's, and has a limit for this system alone.
    """
    gpu = card_of(memory)
    is_present = memory.card is not None and memory.card.usable_mib is not None
    systems = [this_system()] if is_present else ["linux", "windows"]
    return {
        system: MIB * (gpu.usable_mib(system) if memory.limit_mib is None else memory.limit_mib) for system in systems
    }


def capability_of(number: float) -> tuple[int, int]:
    """Return a compute capability such as 7.5 as (7, 5)."""
    return int(number), round(10 * (number - int(number)))


def _described(card: Card) -> Gpu:
    """Return a described card as a row of the table."""
    watts = card.watts or UNNAMED_LIMIT
    is_known = card.fp16_tflops is not None and card.gb_per_second is not None
    fp16 = card.fp16_tflops or 0.0
    usable = {system: card.usable_mib or int(share * card.memory_mib) for system, share in USABLE_SHARES.items()}
    return Gpu(
        title=card.name,
        compute_capability=capability_of(card.compute_capability),
        total_mib=card.memory_mib,
        usable_linux_mib=usable["linux"],
        usable_windows_mib=usable["windows"],
        fp16_tflops={watts: fp16} if is_known else {},
        fp32_tflops={watts: card.fp32_tflops or fp16 / 2} if is_known else {},
        gb_per_second=card.gb_per_second or 0.0,
        tensor_cores=card.compute_capability >= FIRST_TENSOR_CORES if card.tensor_cores is None else card.tensor_cores,
        fp16_accumulation_gain=card.fp16_accumulation_gain,
        launch_seconds=None if card.launch_microseconds is None else card.launch_microseconds / 1e6,
        context_mib=card.context_mib or CONTEXT_MIB,
        is_calibrated=card.calibrated,
    )
