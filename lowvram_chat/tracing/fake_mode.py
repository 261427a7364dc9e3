"""PyTorch's FakeTensorMode with a faster cache of operations that it has already run.

FakeTensorMode caches the shape that an operation returns for given arguments. But it looks at seventeen properties of
each tensor first, creates each result through checks that pass in every trace, and caches neither unsafe views nor the
operations of other libraries. Here the cache key holds only what can differ between dense tensors, and the result is
created directly.
Source: torch/_subclasses/fake_tensor.py, `FakeTensorMode._cached_dispatch_impl`, `FakeTensor.__new__` (2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from lowvram_chat.private_names import check_private_names
from lowvram_chat.tracing.dispatch import Operator

check_private_names(
    "torch.Tensor._make_subclass",
    "torch._C._set_throw_on_mutable_data_ptr",
    "torch._subclasses.fake_tensor.FakeTensor.fake_device",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache_bypasses",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache_hits",
    "torch._subclasses.fake_tensor.FakeTensorMode.cache_misses",
    "torch._subclasses.fake_tensor.FakeTensorMode.dispatch",
    "torch._subclasses.fake_tensor.in_kernel_invocation_manager",
    "torch.ops.aten._to_copy.default",
    "torch.ops.aten._unsafe_view.default",
    "torch.ops.aten._unsafe_view.default._schema",
    "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo",
)

HASHABLE_TYPES = frozenset(
    {int, float, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, str}
)
"""Types of arguments that enter a cache key as they are."""

aten = torch.ops.aten

EQUIVALENT_OPERATIONS = {aten._unsafe_view.default: aten.view.default}
"""Operation -> a cacheable operation with the same effect on memory."""
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
"""Operations whose meta kernel is called directly. PyTorch tries other ways first, which take a millisecond each."""
FUNCTIONAL_NAMESPACE = "bitsandbytes"
"""A library whose operations return new tensors, or return nothing and change no shapes. PyTorch caches only its own."""

Maker = Callable[[Sequence[object]], object]
"""Creates the result of an operation from its arguments."""
CacheKey = tuple[object, ...]
"""An operation and everything in its arguments that affects the result."""


class UncacheableArgumentError(Exception):
    """An argument that cannot be part of a cache key."""


class CachingFakeTensorMode(FakeTensorMode):
    """A FakeTensorMode that answers repeated operations from its own cache, and leaves all others to PyTorch."""

    def __init__(self, *, allow_non_fake_inputs: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=allow_non_fake_inputs)
        self._makers: dict[CacheKey, Maker] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing is compiled here, and PyTorch's guard against it would run on every operation."""
        return False

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operation on fake tensors, without FakeTensorMode's counters."""
        return self.dispatch(func, types, args, kwargs)

    def dispatch(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operation on fake tensors."""
        func, kwargs = EQUIVALENT_OPERATIONS.get(func, func), kwargs or {}
        description: list[object] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            _describe(args, description)
            description += kwargs
            _describe(kwargs.values(), description)
        except UncacheableArgumentError:
            if func.namespace == FUNCTIONAL_NAMESPACE and not func._schema.returns:
                return None
            return super().dispatch(func, types, args, kwargs)
        key = tuple(description)
        if key in self._makers:
            return self._makers[key](args)
        if func in DIRECT_KERNEL_OPERATIONS and "device" not in kwargs:
            self._makers[key] = self._direct_maker(func, args, kwargs)
            return self._makers[key](args)
        return self._dispatch_and_cache(key, func, types, args, kwargs)

    def _dispatch_and_cache(
        self,
        key: CacheKey,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        """Run an operation PyTorch's way, and cache its result if PyTorch did so too."""
        used, bypassed = _cache_counts()
        result = super().dispatch(func, types, args, kwargs)
        used_after, bypassed_after = _cache_counts()
        is_cached_by_torch = used_after > used and bypassed_after == bypassed
        if is_cached_by_torch or func.namespace == FUNCTIONAL_NAMESPACE:
            maker = None if _has_tensor(kwargs) else self._maker(func, args, result)
            if maker is not None:
                self._makers[key] = maker
        return result

    def _direct_maker(self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> Maker:
        """Return the maker of an operation's result, found by calling its meta kernel."""
        first = args[0]
        assert isinstance(first, FakeTensor)
        with in_kernel_invocation_manager(self):
            result = func(*args, **kwargs)
        assert isinstance(result, torch.Tensor)
        return self._tensor_maker(result, first.fake_device, base=0 if func.is_view else None)

    def _maker(self, func: Operator, args: Sequence[object], result: object) -> Maker | None:
        """Return what creates such a result from such arguments, or None if only PyTorch can."""
        if isinstance(result, tuple):
            return self._tuple_maker(func, args, result)
        if result is None or type(result) is int:
            return lambda _: result
        if type(result) is not FakeTensor or result.constant is not None or result.layout is not torch.strided:
            return None
        for position, argument in enumerate(args):
            if argument is result:
                return itemgetter(position)
        base = None
        if getattr(func, "is_view", False):
            (base,) = (position for position, argument in enumerate(args) if isinstance(argument, torch.Tensor))
        return self._tensor_maker(result, result.fake_device, base)

    def _tuple_maker(self, func: Operator, args: Sequence[object], results: tuple[object, ...]) -> Maker | None:
        """Return what creates a tuple of results, or None if one of them cannot be created."""
        makers: list[Maker] = []
        for result in results:
            maker = self._maker(func, args, result)
            if maker is None:
                return None
            makers.append(maker)
        return lambda args: tuple(maker(args) for maker in makers)

    def _tensor_maker(self, like: torch.Tensor, device: torch.device, base: int | None) -> Maker:
        """Return what creates fake tensors like this one.

        `base` is the position of the argument whose storage they share; None: they get a storage of their own.
        """
        shape, stride, offset, dtype = tuple(like.shape), like.stride(), like.storage_offset(), like.dtype
        attributes = vars(FakeTensor(self, torch.empty((), device="meta"), device))

        def make(args: Sequence[object]) -> FakeTensor:
            storage = None if base is None else _storage(args[base])
            with in_kernel_invocation_manager(self):
                meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                if storage is not None:
                    meta.set_(storage, offset, shape, stride)
            fake: FakeTensor = torch.Tensor._make_subclass(
                FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
            )
            torch._C._set_throw_on_mutable_data_ptr(fake)
            vars(fake).update(attributes)
            return fake

        return make


def _storage(tensor: object) -> torch.UntypedStorage:
    """Return the storage of an argument that is a tensor."""
    assert isinstance(tensor, torch.Tensor)
    return tensor.untyped_storage()


def _has_tensor(kwargs: Mapping[str, object]) -> bool:
    """Return whether a keyword argument is a tensor."""
    return any(isinstance(value, torch.Tensor) for value in kwargs.values())


def _cache_counts() -> tuple[int, int]:
    """Return how many results PyTorch's own cache stored or reused, and how many it refused."""
    return FakeTensorMode.cache_hits + FakeTensorMode.cache_misses, sum(FakeTensorMode.cache_bypasses.values())


def _describe(arguments: Iterable[object], key: list[object]) -> None:
    """Append to `key` everything in these arguments that affects a result.

    Raises:
        UncacheableArgumentError: an argument of another type.
    """
    for argument in arguments:
        if type(argument) is FakeTensor and argument.constant is None and argument.layout is torch.strided:
            # `fake_device`, because reading `device` dispatches an operation of its own.
            key += (
                argument.fake_device,
                argument.dtype,
                argument.shape,
                argument.stride(),
                argument.storage_offset(),
                argument.requires_grad,
            )
        elif (kind := type(argument)) in HASHABLE_TYPES:
            key += (kind, argument)  # with the type: 1 and 1.0 are equal but give different results
        elif type(argument) is list or type(argument) is tuple:
            key.append(len(argument))
            _describe(argument, key)
        else:
            raise UncacheableArgumentError
