"""What the self-test found out about this machine: its rates, and what is switched off here because it failed.

`doctor --selftest` writes one file for each card (or the processor) into the cache folder. It counts only for the versions of
torch and of the driver that it was found with.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lowvram_chat import nvidia_smi
from lowvram_chat.files import cache_folder, write_text
from lowvram_chat.recipe.choices import Positive, Rate
from lowvram_chat.recipe.schema import Recipe

log = logging.getLogger(__name__)

SWITCHES: Mapping[str, tuple[str, str, object]] = {
    "fused_loss": ("model", "fused_loss", False),
    "fused_gelu": ("model", "fused_gelu", False),
    "fused_lora": ("adapter", "fused", False),
    "compile": ("train", "compile", False),
    "document_attention": ("model", "document_attention", False),
}
"""Check of the self-test -> section, setting and value that a run gets where the check failed."""


class Calibration(BaseModel):
    """The figures of one card, or of the processor, of this machine."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    device: str
    """Name of the card, or of the processor's architecture."""
    torch: str
    driver: str | None = None
    date: str = ""
    half_tflops: Rate | None = None
    """Rate of GPT-2's fp16 products, 10^12 FLOP per second."""
    single_tflops: Rate | None = None
    """Rate of GPT-2's fp32 products."""
    gb_per_second: Rate | None = None
    """Rate of reads and writes of a large elementwise operation, 10^9 bytes per second."""
    launch_microseconds: Rate | None = None
    """Time that the host needs for an operation of forward and backward."""
    context_mib: Positive | None = None
    """Memory of a CUDA context."""
    failed: tuple[str, ...] = ()
    """Checks that failed: names in `SWITCHES`."""

    def is_current(self) -> bool:
        """Return whether torch and the driver are those that the figures were found with."""
        return self.torch == torch.__version__ and self.driver == present_driver()


def present_driver() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    card = nvidia_smi.visible_card()
    return None if card is None else card.driver


def processor_name() -> str:
    """Return the name under which figures of the processor are kept."""
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name under which figures of a device are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def path_of(device: str) -> Path:
    """Return the file with the figures of a device."""
    return cache_folder() / "machine" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def save(calibration: Calibration) -> Path:
    """Keep the figures of a device, and return the file."""
    path = path_of(calibration.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, calibration.model_dump_json(indent=1) + "\n")
    return path


def load(device: str) -> Calibration | None:
    """Return the figures of a device; None if it was not tested, or with another torch or driver."""
    path = path_of(device)
    try:
        found = Calibration.model_validate_json(path.read_bytes())
    except OSError:
        return None
    except ValidationError:
        log.warning("%s: is damaged, so it is not used. Run python -m lowvram_chat.doctor --selftest again.", path)
        return None
    return found if found.device == device and found.is_current() else None


def without_failed(recipe: Recipe, device: str) -> Recipe:
    """Return the recipe without what the self-test of this machine saw fail, and log each change."""
    found = load(device)
    for name in SWITCHES.keys() & (set() if found is None else {*found.failed}):
        section_name, setting, value = SWITCHES[name]
        section = getattr(recipe, section_name)
        if section is None or getattr(section, setting) in (value, None):
            continue
        recipe = recipe.model_copy(update={section_name: section.model_copy(update={setting: value})})
        log.warning(
            "%s.%s=%s: the self-test of this machine failed with it on (python -m lowvram_chat.doctor --selftest)",
            section_name,
            setting,
            str(value).lower(),
        )
    return recipe
