"""Keeps the libraries' noise from the user, and lets our own words through."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Send our own words to stderr as plain lines, and keep the libraries' warnings and bars of sub-steps from the user."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1" if not sys.stderr.isatty() else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names optional CPU kernels that it does without
    package = logging.getLogger("lowvram_chat")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        package.propagate = False


def quiet_transformers() -> None:
    """Switch off transformers' bars and warnings (call it once transformers is wanted: it imports torch)."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
