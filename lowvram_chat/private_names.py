"""Private names of libraries that this package relies on, each checked when the file that uses it is imported.

A library may drop or rename a private name in any release. A file that uses one declares it:

    check_private_names("torch._C._current_graph_task_id", "torch.UntypedStorage._cdata")

`tools/list_private_names.py` writes the table in docs/developing.md from these calls, and fails where a private name is
used without one.
"""

from __future__ import annotations

import importlib
from importlib import metadata

from lowvram_chat.errors import DeviceError


def check_private_names(*paths: str) -> None:
    """Check that each dotted name exists; a name is a module's, or a class's attribute or method.

    Raises:
        DeviceError: a name is gone, with the library and its installed version.
    """
    for path in paths:
        if not has_private_name(path):
            library = path.partition(".")[0]
            raise DeviceError(
                f"{library} {metadata.version(library)}: the private name {path}, which lowvram_chat relies on, is gone. "
                f"Install the version of {library} in constraints.txt."
            )


def has_private_name(path: str) -> bool:
    """Return whether a dotted name exists in the installed version of its library."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False
