"""Which storages a training step creates and when each dies, found by running the step on fake tensors.

A fake tensor has a shape, a type and a storage of known size, but no memory; the step's own Python, the model's code,
autograd and the optimizer all run as they would on a card, in seconds. `TraceRecorder` sees every operation after autograd
has decided what it saves, notes each new storage, and asks Python to be told when it dies. The device is always "cpu":
fake CUDA tensors need a driver. What CUDA does differently is in `cuda_rules`.

    with Recorder(CudaRules()) as recorder:
        materialise(model, recorder)
        with recorder.phase("forward"):
            ...
    events = recorder.events
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_chat.tracing.fake_mode import CachingFakeTensorMode
from lowvram_chat.tracing.kernels import ITEM_OPERATION
from lowvram_chat.tracing.operations import Operation, describe_operation
from lowvram_chat.tracing.rules import DeviceRules, Scalar

aten = torch.ops.aten

NO_ALLOCATION = frozenset({torch.ops.prim.device.default, aten.lift_fresh.default})
"""Operations that take no memory on the card: `torch.tensor(literal)`, an optimizer's step count, stays on the host."""

WRAPPER_FILES = (__file__, "_dynamo/eval_frame.py", "torch/_compile.py")
"""Files whose frames stand between an operation's caller and the recorder."""

ENGINE_TENSOR_COUNT = 4
"""References to a gradient that only autograd's engine holds, as a dispatch mode sees it (a test checks it)."""
ENGINE_STORAGE_COUNT = 2
"""References to that gradient's storage."""


@dataclass(slots=True, eq=False)
class Storage:
    """One storage of the traced step: its size in bytes, what it is for and where it came from."""

    nbytes: int
    category: str
    """weights, weight copies, buffers, gradients, optimizer state, batch, workspace; or the moment it was born in."""
    operation: str
    module: str
    phase: str


class Event(NamedTuple):
    """The birth (or the death) of a storage; a trace is a list of these, in order."""

    storage: Storage
    is_allocation: bool


Span = tuple[int, int]
"""Where a part of a trace begins and ends, as indices of its events."""


class TraceRecorder(TorchDispatchMode):
    """Runs what stands in its `with` block on fake tensors, and notes births and deaths in `events`.

    `rules` say how the traced machine differs from the CPU; the default differs in nothing.
    """

    def __init__(self, rules: DeviceRules | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.rules = rules or DeviceRules()
        self.operations: list[Operation] | None = None
        """A list given here takes every operation that launches a kernel, until the next one (or None) is given."""
        self._alive: dict[int, tuple[Storage, weakref.ref[torch.UntypedStorage]]] = {}
        self._overflow_flags: set[int] = set()
        self._threads_with_workspace: set[bool] = set()
        self._phase = "load"
        self._modules: list[str] = []
        self._names: dict[int, str] = {}
        self._exits = contextlib.ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and torch's wrapper against it would be called with every operation."""
        return False

    def __enter__(self) -> TraceRecorder:
        """Puts fake tensors below, the rules around them and this recorder above both."""
        self._exits.enter_context(CachingFakeTensorMode(allow_non_fake_inputs=True))
        self._exits.enter_context(self.rules.active())
        self._exits.enter_context(_module_names(self._modules, self._names))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """Ends the recording; what is still alive never dies in the trace."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._exits.close()
        self._alive.clear()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Marks what is born inside as born in this moment of the step ("forward", "backward", ...)."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def label(self, tensors: Iterable[object], category: str) -> None:
        """Says what these tensors' storages are for; one not seen before is born now. Other objects are passed over."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._record_allocation(tensor, category)
                self._alive[tensor.untyped_storage()._cdata][0].category = category

    def name_modules(self, model: torch.nn.Module) -> None:
        """Lets storages born inside this model's modules carry the modules' names."""
        self._names.update((id(module), name) for name, module in model.named_modules())

    def record_temporaries(self, sizes: Iterable[int], operation: str) -> None:
        """Notes storages that come and go at once where no operation shows them, as a library's own buffers do."""
        self._pass(sizes, operation)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation and notes the storages that it made."""
        if func is torch.ops.prim.device.default:  # two calls in three; the short way saves a third of a trace's time
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        result = self._run(func, args, kwargs or {})
        if func not in NO_ALLOCATION:
            for tensor in self.rules.allocation_order(func, list(_tensors(result))):
                self._record_allocation(tensor, func)
            if func is aten._to_copy.default:
                self._mark_weight_copy(args[0], result)
            self._pass(self.rules.temporaries(func, args, result), func)
            self._record_workspace(self.rules.workspace(func), func)
            if self.operations is not None:
                self._list(self.operations, func, args, result)
        return result

    def _list(self, operations: list[Operation], func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func is ITEM_OPERATION:
            asked = self._storage_of(args[0])
            if asked is None or asked.category == "optimizer state":
                return  # a number that stays on the host: a literal, or the step count of an unfused optimizer
        operation = describe_operation(func, args, result, self._phase, self._storage_of)
        if operation is not None:
            operations.append(operation)

    def _storage_of(self, tensor: torch.Tensor) -> Storage | None:
        """The record of a tensor's storage; None for the host's own scalars."""
        alive = self._alive.get(tensor.untyped_storage()._cdata)
        return alive and alive[0]

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.add.Tensor and _engine_accumulates_in_place(args[0]):
            return aten.add_.Tensor(*args, **kwargs)
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._overflow_flags.add(args[1].untyped_storage()._cdata)
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            return self._scalar(args[0])

    def _scalar(self, tensor: torch.Tensor) -> Scalar:
        """The value of `.item()`; a gradient scaler never finds an overflow."""
        is_overflow_flag = tensor.untyped_storage()._cdata in self._overflow_flags
        return 0.0 if is_overflow_flag else self.rules.scalar(tensor)

    def _record_allocation(self, tensor: torch.Tensor, operation: object) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or tensor.device.type == "meta":
            return
        module = self._modules[-1] if self._modules else ""
        record = Storage(storage.nbytes(), self._phase, str(operation), module, self._phase)
        self._alive[key] = (record, weakref.ref(storage, lambda _: self._record_free(key)))
        self.events.append(Event(record, True))

    def _mark_weight_copy(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        """Marks what autocast makes of a weight."""
        of_source = self._alive.get(source.untyped_storage()._cdata)
        of_copy = self._alive.get(copy.untyped_storage()._cdata)
        if of_source and of_copy and of_source[0].category == "weights" and of_copy[0] is not of_source[0]:
            of_copy[0].category = "weight copies"

    def _record_free(self, key: int) -> None:
        self._overflow_flags.discard(key)
        self.events.append(Event(self._alive.pop(key)[0], False))

    def _record_workspace(self, nbytes: int, operation: object) -> None:
        """Notes what a thread's first operation of a kind takes for good; the backward pass is a thread of its own."""
        is_backward = torch._C._current_graph_task_id() != -1
        if nbytes and is_backward not in self._threads_with_workspace:
            self._threads_with_workspace.add(is_backward)
            self.events.append(Event(Storage(nbytes, "workspace", str(operation), "", self._phase), True))

    def _pass(self, sizes: Iterable[int], operation: object) -> None:
        """Notes temporaries that live inside one operation's kernel, all at once."""
        records = [Storage(nbytes, "temporaries", str(operation), "", self._phase) for nbytes in sizes]
        self.events += [Event(record, is_allocation) for is_allocation in (True, False) for record in records]


def _tensors(result: object) -> Iterator[torch.Tensor]:
    """The tensors in what an operation returned: a tensor, or a (nested) tuple or list."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


def _engine_accumulates_in_place(gradient: Any) -> bool:
    """True where autograd's engine, joining two gradients, would have written into the first one.

    It does so when nobody else holds the tensor or its storage (a view's base counts); under a dispatch mode it never
    does. The counts are what stands on a gradient that only the engine holds, in addition to this function's own.
    Source: torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not _called_by_engine():
        return False
    storage_count = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    return gradient._use_count() <= ENGINE_TENSOR_COUNT and storage_count <= ENGINE_STORAGE_COUNT


def _called_by_engine() -> bool:
    """True when autograd's engine itself called the operation, not the Python code of a custom backward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.endswith(WRAPPER_FILES):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


@contextlib.contextmanager
def _module_names(stack: list[str], names: dict[int, str]) -> Iterator[None]:
    """Keeps the names of the modules whose forward is running, the innermost last."""

    def push(module: torch.nn.Module, _: object) -> None:
        stack.append(names.get(id(module), type(module).__name__))

    def pop(*_: object) -> None:
        stack.pop()

    hooks = torch.nn.modules.module
    handles = hooks.register_module_forward_pre_hook(push), hooks.register_module_forward_hook(pop, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
