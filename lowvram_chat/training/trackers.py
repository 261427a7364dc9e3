"""Checks the experiment trackers of `output.report_to` before a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from lowvram_chat.errors import DeviceError


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers does not know, or whose package is missing.

    Raises:
        DeviceError: with the library's own reason.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(list(names)):
            callback()
    except (ValueError, RuntimeError, ImportError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        unknown = isinstance(error, ValueError)
        advice = "Remove it from output.report_to" if unknown else "Install it, or remove it from output.report_to"
        raise DeviceError(f"output.report_to: {reason}. {advice}.") from None
