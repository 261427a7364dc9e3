"""The caching fake mode returns the same results as PyTorch's own, whether cached or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowvram_chat.tracing.dispatch import Operator
from lowvram_chat.tracing.fake_mode import CachingFakeTensorMode

aten = torch.ops.aten


Operation = Callable[[Tensor, Tensor], object]


def run_operation(mode: FakeTensorMode, operation: Operation) -> tuple[object, list[Tensor]]:
    """Return the result of an operation, and its inputs."""
    with mode:
        inputs = [torch.empty(4, 6), torch.empty(6, 8)]
        return operation(*inputs), inputs


def describe(result: object, inputs: list[Tensor]) -> object:
    """Return everything about a result that a trace uses."""
    if isinstance(result, (tuple, list)):
        return [describe(item, inputs) for item in result]
    if not isinstance(result, Tensor):
        return result
    assert isinstance(result, FakeTensor)
    storage = result.untyped_storage()
    return (
        result.shape,
        result.stride(),
        result.storage_offset(),
        result.dtype,
        result.device,
        storage.nbytes(),
        [result is tensor for tensor in inputs],
        [storage._cdata == tensor.untyped_storage()._cdata for tensor in inputs],
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: aten.mm(a, b),
        lambda a, b: aten.addmm(b[0], a, b),
        lambda a, b: aten._unsafe_view(a, [2, -1]),
        lambda a, b: aten.view(a, [24]),
        lambda a, b: aten.slice(b, 1, 2, 7),
        lambda a, b: aten.t(aten.slice(b, 0, 1, 3)),
        lambda a, b: aten.add_(a, 1),
        lambda a, b: aten.split(b, 2, 1),
        lambda a, b: aten.native_layer_norm(a, [6], None, None, 1e-5),
        lambda a, b: aten.mul(a, 2),
        lambda a, b: aten.to(a, torch.float16),
        lambda a, b: aten._to_copy(b.t(), dtype=torch.float16),
        lambda a, b: aten._to_copy(b.t(), dtype=torch.float16, memory_format=torch.contiguous_format),
        lambda a, b: aten.gelu_backward(a, a.clone(), approximate="tanh"),
        lambda a, b: aten.gelu_backward(a, b[:, :4].t()),
        lambda a, b: aten._scaled_dot_product_flash_attention(*[a.half().view(1, 2, 3, 4)] * 3),
        lambda a, b: aten.mm.out(a, b, out=torch.empty(4, 8)),
        lambda a, b: a.shape,
    ],
)
def test_a_cached_result_equals_pytorch_s_own(operation: Operation) -> None:
    expected = describe(*run_operation(FakeTensorMode(), operation))
    caching = CachingFakeTensorMode()
    assert [describe(*run_operation(caching, operation)) for _ in range(3)] == [expected] * 3


def test_a_result_written_into_out_is_no_new_tensor() -> None:
    caching = CachingFakeTensorMode()
    for _ in range(3):
        with caching:
            out = torch.empty(4, 8)
            assert torch.mm(torch.empty(4, 6), torch.empty(6, 8), out=out) is out


def test_the_types_of_numbers_and_the_default_type_are_part_of_the_key() -> None:
    caching = CachingFakeTensorMode()
    with caching:
        whole = torch.empty(3, dtype=torch.int64)
        assert [torch.mul(whole, by).dtype for by in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.mul(whole, 1.0).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_inference_tensors_are_cached_separately() -> None:
    caching = CachingFakeTensorMode()
    for _ in range(2):
        with caching:
            with torch.inference_mode():
                assert (torch.empty(2) + 1).is_inference()
            assert not (torch.empty(2) + 1).is_inference()


def test_a_repeated_operation_is_not_dispatched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatched: list[Operator] = []
    original = FakeTensorMode.dispatch

    def counted(
        self: FakeTensorMode,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is not torch.ops.prim.device.default:  # the recorder answers this one itself
            dispatched.append(func)
        return original(self, func, types, args, kwargs or {})

    with CachingFakeTensorMode():
        inputs = torch.empty(4, 6), torch.empty(6, 8)
        torch.relu(inputs[0] @ inputs[1]).t()
        monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
        torch.relu(inputs[0] @ inputs[1]).t()
        assert dispatched == []
        torch.relu(inputs[1])  # another shape
        assert dispatched == [aten.relu.default]
