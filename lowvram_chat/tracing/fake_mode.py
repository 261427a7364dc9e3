"""torch's fake tensors, with a short way to what an operation returned before.

FakeTensorMode remembers the shape that an operation returns for given arguments, but asks seventeen things of each tensor
first, makes each result by way of checks that pass in every trace, and takes neither unsafe views nor another library's
operations. Here the key says what can differ between dense tensors, and the result is made at once.
Source: torch/_subclasses/fake_tensor.py, `FakeTensorMode._cached_dispatch_impl`, `FakeTensor.__new__` (2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

HASHABLE_TYPES = frozenset(
    {int, float, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, str}
)
"""Types of arguments that stand for themselves."""

aten = torch.ops.aten

EQUIVALENT_OPERATIONS = {aten._unsafe_view.default: aten.view.default}
"""Operations that do to memory what another one does, which can be remembered."""
DIRECT_KERNEL_OPERATIONS = frozenset(
    {
        aten.view.default,
        aten.slice.Tensor,
        aten.addmm.default,
        aten.mm.default,
        aten._to_copy.default,
        aten.gelu_backward.default,
    }
)
"""Operations that are asked of their kernel for tensors without memory at once; torch tries other ways first, a millisecond
each."""
FUNCTIONAL_NAMESPACE = "bitsandbytes"
"""A library whose operations return new tensors, or nothing and then do nothing to shapes; torch remembers none but its own."""

Maker = Callable[[tuple[Any, ...]], Any]
"""Makes an operation's result anew, from its arguments."""


class UncacheableArgumentError(Exception):
    """An argument that a key cannot say."""


class CachingFakeTensorMode(FakeTensorMode):
    """A FakeTensorMode with a short way for what it has seen before; everything else goes torch's own way."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._known: dict[tuple[Any, ...], Maker] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and torch's wrapper against it would be called with every operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs one operation on fake tensors, uncounted."""
        return self.dispatch(func, types, args, kwargs)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs one operation on fake tensors."""
        func, kwargs = EQUIVALENT_OPERATIONS.get(func, func), kwargs or {}
        words: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            _describe(args, words)
            words += kwargs
            _describe(kwargs.values(), words)
        except UncacheableArgumentError:
            if func.namespace == FUNCTIONAL_NAMESPACE and not func._schema.returns:
                return None
            return super().dispatch(func, types, args, kwargs)
        key = tuple(words)
        if key in self._known:
            return self._known[key](args)
        if func in DIRECT_KERNEL_OPERATIONS and "device" not in kwargs:
            with in_kernel_invocation_manager(self):
                like = func(*args, **kwargs)
            viewed = 0 if func.is_view else None
            self._known[key] = self._tensor_maker(like, args[0].fake_device, viewed)
            return self._known[key](args)
        taken, bypassed = _cache_counts()
        result = super().dispatch(func, types, args, kwargs)
        taken_now, bypassed_now = _cache_counts()
        if (taken_now > taken and bypassed_now == bypassed) or func.namespace == FUNCTIONAL_NAMESPACE:
            maker = None if _holds_tensor(kwargs) else self._maker(func, args, result)
            if maker is not None:
                self._known[key] = maker
        return result

    def _maker(self, func: Any, args: tuple[Any, ...], result: Any) -> Maker | None:
        """What makes this result from such arguments; None where only torch should."""
        if isinstance(result, tuple):
            makers = [self._maker(func, args, one) for one in result]
            known = [maker for maker in makers if maker is not None]
            return (lambda args: tuple(maker(args) for maker in known)) if len(known) == len(makers) else None
        if result is None or type(result) is int:
            return lambda _: result
        if type(result) is not FakeTensor or result.constant is not None or result.layout is not torch.strided:
            return None
        same = [place for place, argument in enumerate(args) if argument is result]
        if same:
            return itemgetter(same[0])
        viewed = None
        if getattr(func, "is_view", False):
            (viewed,) = (place for place, argument in enumerate(args) if isinstance(argument, torch.Tensor))
        return self._tensor_maker(result, result.fake_device, viewed)

    def _tensor_maker(self, like: torch.Tensor, device: torch.device, viewed: int | None) -> Maker:
        """Makes fake tensors like this one: with a storage of their own, or that of an argument."""
        shape, stride, offset, kind = tuple(like.shape), like.stride(), like.storage_offset(), like.dtype
        attributes = vars(FakeTensor(self, torch.empty((), device="meta"), device))  # type: ignore[no-untyped-call]

        def make(args: tuple[Any, ...]) -> FakeTensor:
            storage = None if viewed is None else args[viewed].untyped_storage()
            with in_kernel_invocation_manager(self):
                inner = torch.empty_strided(shape, stride, dtype=kind, device="meta")
                if storage is not None:
                    inner.set_(storage, offset, shape, stride)
            made: FakeTensor = torch.Tensor._make_subclass(
                FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=device
            )
            torch._C._set_throw_on_mutable_data_ptr(made)
            vars(made).update(attributes)
            return made

        return make


def _holds_tensor(kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(one, torch.Tensor) for one in kwargs.values())


def _cache_counts() -> tuple[int, int]:
    """How many results torch's own cache has taken or given, and how many it would not take."""
    return FakeTensorMode.cache_hits + FakeTensorMode.cache_misses, sum(FakeTensorMode.cache_bypasses.values())


def _describe(arguments: Iterable[Any], key: list[Any]) -> None:
    """Appends to `key` what tells these arguments from others."""
    for argument in arguments:
        kind = type(argument)
        if kind is FakeTensor and argument.constant is None and argument.layout is torch.strided:
            # `fake_device`, since asking for `device` is a dispatched operation of its own.
            key += (
                argument.fake_device,
                argument.dtype,
                argument.shape,
                argument.stride(),
                argument.storage_offset(),
                argument.requires_grad,
            )
        elif kind in HASHABLE_TYPES:
            key += (kind, argument)  # the type too: 1 and 1.0 are equal, and make different results
        elif kind is list or kind is tuple:
            key.append(len(argument))
            _describe(argument, key)
        else:
            raise UncacheableArgumentError
