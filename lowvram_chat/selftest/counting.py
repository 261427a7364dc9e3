"""Counts the operations that launch kernels, as the planner's trace does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Arguments, Operator
from lowvram_chat.tracing.kernels import kernel_info

check_private_names("torch.utils._python_dispatch.TorchDispatchMode")


class _Counter(TorchDispatchMode):
    """Counts the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self,
        func: Operator,
        types: tuple[type, ...],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Count an operation, and run it."""
        self.count += bool(kernel_info(func).launches)
        return func(*args, **(kwargs or {}))


def count_operations(work: Callable[[], object]) -> int:
    """Return how many operations some work launches."""
    counter = _Counter()
    with counter:
        work()
    return counter.count
