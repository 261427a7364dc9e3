"""What a trace's fake tensors remember: the same results as torch's own, the second time too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowvram_chat.tracing.fake_mode import CachingFakeTensorMode

aten = torch.ops.aten


def result_of(mode: FakeTensorMode, operation: Callable[[Tensor, Tensor], Any]) -> tuple[Any, list[Tensor]]:
    with mode:
        inputs = [torch.empty(4, 6), torch.empty(6, 8)]
        return operation(*inputs), inputs


def told(result: Any, inputs: list[Tensor]) -> Any:
    """Say of a result what a trace makes use of."""
    if isinstance(result, (tuple, list)):
        return [told(one, inputs) for one in result]
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
        [result is one for one in inputs],
        [storage._cdata == one.untyped_storage()._cdata for one in inputs],
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
def test_a_remembered_result_is_torch_s_own(operation: Callable[[Tensor, Tensor], Any]) -> None:
    wanted = told(*result_of(FakeTensorMode(), operation))
    brief = CachingFakeTensorMode()
    assert [told(*result_of(brief, operation)) for _ in range(3)] == [wanted] * 3


def test_what_goes_into_out_is_no_new_tensor() -> None:
    brief = CachingFakeTensorMode()
    for _ in range(3):
        with brief:
            out = torch.empty(4, 8)
            assert torch.mm(torch.empty(4, 6), torch.empty(6, 8), out=out) is out


def test_numbers_of_other_types_and_another_default_make_other_results() -> None:
    brief = CachingFakeTensorMode()
    with brief:
        whole = torch.empty(3, dtype=torch.int64)
        assert [torch.mul(whole, by).dtype for by in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.mul(whole, 1.0).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_inference_tensors_are_remembered_apart() -> None:
    brief = CachingFakeTensorMode()
    for _ in range(2):
        with brief:
            with torch.inference_mode():
                assert (torch.empty(2) + 1).is_inference()
            assert not (torch.empty(2) + 1).is_inference()


def test_torch_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = FakeTensorMode.dispatch

    def counted(self: FakeTensorMode, func: Any, *rest: Any) -> Any:
        if func is not torch.ops.prim.device.default:  # a question that the recorder answers itself
            asked.append(func)
        return plain(self, func, *rest)

    with CachingFakeTensorMode():
        inputs = torch.empty(4, 6), torch.empty(6, 8)
        torch.relu(inputs[0] @ inputs[1]).t()
        monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
        torch.relu(inputs[0] @ inputs[1]).t()
        assert asked == []
        torch.relu(inputs[1])  # another shape
        assert asked == [aten.relu.default]
