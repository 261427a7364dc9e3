"""Records which storages a training step allocates and when it frees them, by running the step on fake tensors.

A fake tensor has a shape, a type and a storage of known size, but no memory. The step's own Python, the model's code,
autograd and the optimizer all run as they would on a device, in seconds. `TraceRecorder` sees every operation after
autograd has decided what it saves. It records each new storage and holds a weak reference, which tells it when the storage
is freed. The device is always "cpu", because fake CUDA tensors need a driver. `cuda_rules` describes how CUDA differs.

    with TraceRecorder(CudaRules()) as recorder:
        materialise(model, recorder)
        with recorder.phase("forward"):
            ...
    events = recorder.events
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Arguments, Operator, tensor_at, tensors_in
from lowvram_chat.tracing.engine import accumulates_in_place, is_in_backward
from lowvram_chat.tracing.fake_mode import CachingFakeTensorMode
from lowvram_chat.tracing.kernels import ITEM_OPERATION
from lowvram_chat.tracing.module_names import ModuleNames
from lowvram_chat.tracing.operations import Operation, describe_operation
from lowvram_chat.tracing.rules import DeviceRules, Scalar

check_private_names(
    "torch.UntypedStorage._cdata",
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.FakeTensor.fake_device",
    "torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default",
    "torch.ops.aten._to_copy.default",
    "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo",
)

aten = torch.ops.aten

NO_ALLOCATION = frozenset({torch.ops.prim.device.default, aten.lift_fresh.default})
"""Operations that allocate nothing on the device: `torch.tensor(literal)`, an optimizer's step count, stays on the host."""

CACHE_RELEASE = "cache release"
"""Category of a storage of 0 bytes, at whose allocation the allocator returns the segments that it does not use."""


@dataclass(slots=True, eq=False)
class Storage:
    """One storage of the traced step: its size in bytes, its purpose and its origin."""

    nbytes: int
    category: str
    """weights, weight copies, buffers, gradients, optimizer state, batch, workspace, temporaries; or the phase in which it
    was allocated."""
    operation: str
    """The operation that allocated it, or the label it was given first."""
    module: str
    """The module whose forward was running."""
    phase: str
    """The phase in which it was allocated."""


class Event(NamedTuple):
    """The allocation or the free of a storage. A trace is a list of events, in order."""

    storage: Storage
    is_allocation: bool


Span = tuple[int, int]
"""Start and end of a part of a trace, as indices of its events."""


class TraceRecorder(TorchDispatchMode):
    """Runs the code in its `with` block on fake tensors, and records allocations and frees in `events`.

    `rules` describe how the traced device differs from the CPU. The default is the CPU itself.
    """

    def __init__(self, rules: DeviceRules | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.rules = rules or DeviceRules()
        self.operations: list[Operation] | None = None
        """Receives every operation that launches a kernel. None: operations are not listed."""
        self._live: dict[int, tuple[Storage, weakref.ref[torch.UntypedStorage]]] = {}
        self._overflow_flags: set[int] = set()
        self._threads_with_workspace: set[bool] = set()
        self._phase = "load"
        self._modules = ModuleNames()
        self._contexts = contextlib.ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing is compiled here, and PyTorch's guard against it would run on every operation."""
        return False

    def __enter__(self) -> TraceRecorder:
        """Enter the fake mode, then the rules, then this recorder, which sees each operation first."""
        self._contexts.enter_context(CachingFakeTensorMode(allow_non_fake_inputs=True))
        self._contexts.enter_context(self.rules.active())
        self._contexts.enter_context(self._modules.active())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        """End the recording. Storages that are still live have no free in the trace."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._contexts.close()
        self._live.clear()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Assign allocations inside the block to a phase of the step ("forward", "backward", ...)."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def label(self, tensors: Iterable[object], category: str) -> None:
        """Set the category of these tensors' storages; objects that are no tensors are skipped.

        A storage that was not seen before is recorded as allocated now.
        """
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._record_allocation(tensor, category)
                self._live[tensor.untyped_storage()._cdata][0].category = category

    def name_modules(self, model: torch.nn.Module) -> None:
        """Use the names of this model's modules for storages that are allocated inside them."""
        self._modules.add(model)

    def record_temporaries(self, sizes: Iterable[int], operation: object) -> None:
        """Record storages, of these sizes in bytes, that exist together inside one operation and nowhere else."""
        records = [Storage(nbytes, "temporaries", str(operation), "", self._phase) for nbytes in sizes]
        self.events += [Event(record, is_allocation) for is_allocation in (True, False) for record in records]

    def record_cache_release(self) -> None:
        """Record that the allocator returns the segments that it does not use (`torch.cuda.empty_cache`)."""
        release = Storage(0, CACHE_RELEASE, "empty_cache", "", self._phase)
        self.events += [Event(release, True), Event(release, False)]

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operation and record the storages that it allocates."""
        if func is torch.ops.prim.device.default:  # two calls in three; this shortcut saves a third of a trace's time
            tensor = args[0]
            return tensor.fake_device if isinstance(tensor, FakeTensor) else func(*args)
        result = self._run(func, args, kwargs or {})
        if func not in NO_ALLOCATION:
            self._record_results(func, args, result)
            if func is aten._to_copy.default:
                self._mark_weight_copy(tensor_at(args, 0), result)
            self._record_workspace(self.rules.workspace(func), func)
            if self.operations is not None:
                self._list_operation(self.operations, func, args, result)
        return result

    def _record_results(self, func: Operator, args: Arguments, result: object) -> None:
        """Record the storages of an operation's results, and the buffers of its kernel."""
        start = len(self.events)
        self.record_temporaries(self.rules.temporaries(func, args, result), func)
        buffers, self.events[start:] = self.events[start:], []
        first = len(buffers) // 2 if self.rules.has_buffers_first(func) else 0
        self.events += buffers[:first]
        for tensor in self.rules.allocation_order(func, list(tensors_in(result))):
            self._record_allocation(tensor, func)
        self.events += buffers[first:]

    def _list_operation(self, operations: list[Operation], func: Operator, args: Arguments, result: object) -> None:
        """Append a description of an operation that launches a kernel."""
        if func is ITEM_OPERATION:
            source = self._storage_of(tensor_at(args, 0))
            if source is None or source.category == "optimizer state":
                return  # a number that stays on the host: a literal, or the step count of an unfused optimizer
        operation = describe_operation(func, args, result, self._phase, self._storage_of)
        if operation is not None:
            operations.append(operation)

    def _storage_of(self, tensor: torch.Tensor) -> Storage | None:
        """Return the record of a tensor's storage, or None for scalars of the host."""
        live = self._live.get(tensor.untyped_storage()._cdata)
        return live and live[0]

    def _run(self, func: Operator, args: Arguments, kwargs: Mapping[str, object]) -> object:
        """Run one operation on fake tensors, in place where autograd's engine would do so."""
        if func is aten.add.Tensor and accumulates_in_place(tensor_at(args, 0)):
            return aten.add_.Tensor(*args, **kwargs)
        if func is aten.index_add.default and is_in_backward():
            # It is out of place only for subclasses, such as fake tensors.
            return aten.index_add_.default(*args, **kwargs)
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._overflow_flags.add(tensor_at(args, 1).untyped_storage()._cdata)
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            return self._scalar(tensor_at(args, 0))

    def _scalar(self, tensor: torch.Tensor) -> Scalar:
        """Return the value of `.item()`. A gradient scaler never finds an overflow."""
        is_overflow_flag = tensor.untyped_storage()._cdata in self._overflow_flags
        return 0.0 if is_overflow_flag else self.rules.scalar(tensor)

    def _record_allocation(self, tensor: torch.Tensor, operation: object) -> None:
        """Record a tensor's storage, unless it is live already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.device.type == "meta":
            return
        record = Storage(storage.nbytes(), self._phase, str(operation), self._modules.innermost, self._phase)
        self._live[key] = (record, weakref.ref(storage, lambda _: self._record_free(key)))
        self.events.append(Event(record, True))

    def _mark_weight_copy(self, source: torch.Tensor, copy: object) -> None:
        """Set the category of a copy that autocast makes of a weight."""
        of_source = self._storage_of(source)
        of_copy = self._storage_of(copy) if isinstance(copy, torch.Tensor) else None
        if of_source and of_copy and of_source.category == "weights" and of_copy is not of_source:
            of_copy.category = "weight copies"

    def _record_free(self, key: int) -> None:
        """Record that a storage was freed."""
        self._overflow_flags.discard(key)
        self.events.append(Event(self._live.pop(key)[0], False))

    def _record_workspace(self, nbytes: int, operation: object) -> None:
        """Record what a thread's first operation of a kind allocates for good; the backward pass has its own thread."""
        is_backward = is_in_backward()
        if nbytes and is_backward not in self._threads_with_workspace:
            self._threads_with_workspace.add(is_backward)
            self.events.append(Event(Storage(nbytes, "workspace", str(operation), "", self._phase), True))
