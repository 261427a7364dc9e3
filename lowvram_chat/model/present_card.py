"""The graphics card of this machine, with the memory that is free on it now.

A plan is made without torch's CUDA, since a CUDA context takes some 300 MiB of a card that another run may be using. A run
itself asks torch, which knows what this process holds.
"""

from __future__ import annotations

import logging

import torch

from lowvram_chat import nvidia_smi
from lowvram_chat.errors import DeviceError
from lowvram_chat.gpus import CONTEXT_MIB, DEFAULT_GPU, GPUS, USABLE_SHARES, known_gpu, this_system
from lowvram_chat.model.calibration import Calibration, load, without_failed
from lowvram_chat.nvidia_smi import SmiCard
from lowvram_chat.recipe.card import card_of
from lowvram_chat.recipe.choices import AUTO
from lowvram_chat.recipe.conflicts import find_unsupported
from lowvram_chat.recipe.schema import Card, Memory, Recipe
from lowvram_chat.units import MIB, format_mib

log = logging.getLogger(__name__)


def for_this_machine(recipe: Recipe) -> Recipe:
    """Return the recipe with `memory.gpu: auto` resolved to the card of this machine, if there is one, without using it.

    What the self-test saw fail on that card is switched off, as a run does.

    Raises:
        DeviceError: the card cannot do what the recipe wants.
    """
    if recipe.memory.gpu != AUTO or recipe.memory.card is not None:
        return recipe
    found = nvidia_smi.visible_card()
    if found is None or found.compute_capability is None:
        return recipe
    available = found.memory_mib if found.free_mib is None else found.free_mib
    recipe = _with_card(without_failed(recipe, found.name), _card(found, found.compute_capability, available))
    for problem in find_unsupported(recipe.memory, recipe.train, recipe.model):
        raise DeviceError(problem)
    return recipe


def describe(recipe: Recipe) -> str:
    """Return the card that a recipe with `memory.gpu: auto` was resolved to, for the user."""
    card = recipe.memory.card
    if card is None:
        return f"no NVIDIA card was found here: planned for {GPUS[DEFAULT_GPU].title} (memory.gpu names another)"
    taken = card.memory_mib - (card.usable_mib or 0)
    rates = ", with the rates that its self-test measured" if card.calibrated else ""
    return (
        f"planned for this machine's card: {card.name}, {format_mib(card.memory_mib * MIB)} MiB, of which "
        f"{format_mib((card.usable_mib or 0) * MIB)} MiB can be used now and {format_mib(taken * MIB)} MiB are reserved or "
        f"used by other programs{_listed(nvidia_smi.programs())}{rates}"
    )


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def for_this_run(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with the card of the run's device: what it can use is what is free plus what this process holds.

    A card that the recipe names or describes, or its `memory.limit_mib`, bounds the run further. On a CPU the recipe is
    unchanged: it is planned for the card that it names.
    """
    if device.type != "cuda":
        return recipe
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    calibration = load(properties.name)
    context = (calibration and calibration.context_mib) or CONTEXT_MIB
    held = torch.cuda.memory_reserved(device) + context * MIB
    found = nvidia_smi.visible_card()
    found = SmiCard(
        name=properties.name,
        memory_mib=total // MIB,
        free_mib=free // MIB,
        compute_capability=None,
        watts=None if found is None else found.watts,
        driver="",
    )
    capability = properties.major + properties.minor / 10
    card = _card(found, capability, min(total, free + held) // MIB)
    _say_what_others_use(card)
    return _with_card(recipe, card)


def _card(found: SmiCard, capability: float, available_mib: int) -> Card:
    """Return a card of which so much memory is available, with measured rates or those of its row in the table."""
    usable = min(available_mib, int(USABLE_SHARES[this_system()] * found.memory_mib))
    card = _from_the_table(found, capability, usable)
    calibration = load(found.name)
    return card if calibration is None else _calibrated(card, calibration)


def _calibrated(card: Card, calibration: Calibration) -> Card:
    """Return the card with what the self-test of this machine measured: rates that were reached, in place of peaks."""
    rates = {
        "fp16_tflops": calibration.half_tflops,
        "fp32_tflops": calibration.single_tflops,
        "gb_per_second": calibration.gb_per_second,
    }
    measured = {"launch_microseconds": calibration.launch_microseconds, "context_mib": calibration.context_mib}
    if all(rates.values()):
        measured |= rates | {"calibrated": True}
    return card.model_copy(update={name: value for name, value in measured.items() if value})


def _from_the_table(found: SmiCard, capability: float, usable: int) -> Card:
    """Return a card with the rates of its row in the table, if it has one."""
    row = known_gpu(found.name, found.memory_mib)
    card = Card(
        name=found.name,
        memory_mib=found.memory_mib,
        usable_mib=max(1, usable),
        compute_capability=capability,
        watts=None if found.watts is None else round(found.watts),
    )
    if row is None:
        return card
    gpu = GPUS[row]
    watts = gpu.nearest_limit(found.watts)
    return card.model_copy(
        update={
            "fp16_tflops": gpu.fp16_tflops[watts],
            "fp32_tflops": gpu.fp32_tflops[watts],
            "gb_per_second": gpu.gb_per_second,
            "tensor_cores": gpu.tensor_cores,
            "fp16_accumulation_gain": gpu.fp16_accumulation_gain,
        }
    )


def _with_card(recipe: Recipe, card: Card) -> Recipe:
    """Return the recipe planned for this card, within the limits that the recipe sets."""
    memory, usable = recipe.memory, card.usable_mib or card.memory_mib
    wanted = memory.limit_mib
    if wanted is None and (memory.gpu != AUTO or memory.card is not None):
        wanted = card_of(memory).usable_mib(this_system())
    if wanted is not None and wanted > usable:
        log.info("planning for %d MiB instead of %d MiB: that is what this card has for the run", usable, wanted)
    limit = None if wanted is None else min(wanted, usable)
    return recipe.model_copy(update={"memory": Memory(card=card, limit_mib=limit, on_oom=memory.on_oom)})


def _say_what_others_use(card: Card) -> None:
    """Log how much of the card other programs use, and which, if this run could use it."""
    usable = card.usable_mib or 0
    taken = int(USABLE_SHARES[this_system()] * card.memory_mib) - usable
    if taken <= 0:
        return
    names = ", ".join(nvidia_smi.programs()) or "the desktop, browsers and other programs: nvidia-smi lists them"
    log.warning(
        "%s: other programs use %s of %s MiB (%s), which leaves %s MiB for this run. Close them to have more.",
        card.name,
        format_mib(taken * MIB),
        format_mib(card.memory_mib * MIB),
        names,
        format_mib(usable * MIB),
    )
