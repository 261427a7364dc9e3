"""Silences the warnings and progress bars of libraries that say nothing to a user, and shows the messages of this package."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from lowvram_chat.terminal import PrintableFormatter


@dataclass(frozen=True, kw_only=True)
class SilencedWarning:
    """A warning that a library gives in ordinary runs and that a user can do nothing about."""

    category: type[Warning]
    module: str
    """Regular expression of the module that warns."""
    message: str
    """Regular expression of the beginning of the message."""
    reason: str
    """Why the warning does not concern the user."""


SILENCED_WARNINGS = (
    SilencedWarning(
        category=FutureWarning,
        module=r"transformers\.",
        message=r"`(is_)?gradient_checkpointing",
        reason="transformers renamed its own arguments and attributes; transformers, TRL and PEFT still use the old names",
    ),
    SilencedWarning(
        category=UserWarning,
        module=r"peft\.tuners\.lora\.",
        message=r"fan_in_fan_out is set to False but the target module is `Conv1D`",
        reason="PEFT corrects its setting for GPT-2's transposed layers when it loads an adapter",
    ),
    SilencedWarning(
        category=UserWarning,
        module=r"bitsandbytes\.optim\.",
        message="Paged optimizers are not supported on CPU",
        reason="the planner traces them without a GPU; on a CPU the states are in main memory, where paging would move them",
    ),
)
"""All other warnings reach the user."""


@dataclass(frozen=True, kw_only=True)
class SilencedMessage:
    """A message that transformers logs in ordinary runs and that does not concern the user."""

    beginning: str
    reason: str
    """Why the message does not concern the user."""


SILENCED_MESSAGES = (
    SilencedMessage(
        beginning="We strongly recommend passing in an `attention_mask`",
        reason="rows are padded on the right and the model is causal, so no token attends to the padding",
    ),
    SilencedMessage(
        beginning="mtime may not be reliable on this filesystem",
        reason="checkpoints are numbered, and their numbers are then used instead of their times",
    ),
    SilencedMessage(
        beginning="`loss_type=None` was set in the config but it is unrecognized",
        reason="GPT-2's config names no loss, and what transformers then uses is the loss of causal language models",
    ),
)
"""All other messages of transformers, from warnings on, reach the user."""


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(tuple(message.beginning for message in SILENCED_MESSAGES))


def silence_libraries() -> None:
    """Silence `SILENCED_WARNINGS`, and the messages of libraries that say nothing to a user.

    Call this before the libraries are imported: they read their variables at import.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "warning",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1" if not sys.stderr.isatty() else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)
    for silenced in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", category=silenced.category, module=silenced.module, message=silenced.message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing CPU kernels that are optional


def quiet_libraries() -> None:
    """Silence the libraries, and print this package's log to stderr as plain lines: what every command does."""
    silence_libraries()
    package = logging.getLogger("lowvram_chat")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        package.propagate = False


def quiet_transformers() -> None:
    """Turn off the progress bars and `SILENCED_MESSAGES` of transformers. This imports transformers, and so torch."""
    import transformers

    for handler in logging.getLogger("transformers").handlers:
        if _is_shown not in handler.filters:
            handler.addFilter(_is_shown)
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def compilation_switched_off() -> Iterator[None]:
    """Switch torch.compile off while the context is open: bitsandbytes then takes half the time to import.

    torch reads the variable at each compilation, so a later run of this process would silently not be compiled if it stayed.
    """
    given = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = given or "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = given
