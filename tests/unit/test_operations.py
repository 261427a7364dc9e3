"""The bytes, FLOPs, launches and alignment of a traced operation equal counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from benchmarks.validation.plain_gpt import PlainGpt, PlainGptConfig
from benchmarks.validation.plain_step import PlainStep, trace_plain_step
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.tracing.operations import Operation
from lowvram_chat.tracing.recorder import TraceRecorder

TINY = PlainGptConfig(vocabulary=96, positions=32, width=64, heads=4, layers=2)
pytestmark = pytest.mark.filterwarnings("ignore")


def listed(
    step: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Operation]:
    """Return the operations of a step on tensors of these shapes, which are allocated before."""
    with TraceRecorder(CudaRules()) as recorder:
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        recorder.operations = []
        step(*tensors)
        return recorder.operations


def only(operations: list[Operation]) -> Operation:
    assert len(operations) == 1, [operation.name for operation in operations]
    return operations[0]


def test_a_matrix_product_counts_two_flops_per_multiply_add_and_moves_each_of_its_three_matrices_once() -> None:
    product = only(listed(torch.mm, (32, 64), (64, 128), dtype=torch.float16))
    assert product.flops == 2 * 32 * 64 * 128
    assert product.nbytes == 2 * (32 * 64 + 64 * 128 + 32 * 128)
    assert (product.precision, product.unaligned, product.launches) == ("half", (), 1)


@pytest.mark.parametrize(
    ("dtype", "columns", "is_aligned"),
    [(torch.float16, 50257, False), (torch.float16, 50264, True), (torch.float32, 50257, False)],
)
def test_a_vocabulary_of_an_odd_size_leaves_the_rows_of_logits_unaligned(
    dtype: torch.dtype, columns: int, is_aligned: bool
) -> None:
    head = only(listed(lambda states, weight: states @ weight.t(), (8, 64), (columns, 64), dtype=dtype))
    assert (not head.unaligned) == is_aligned
    assert [piece.nbytes for piece in head.unaligned] == ([] if is_aligned else [8 * columns * dtype.itemsize])


def test_views_allocations_and_metadata_queries_launch_nothing() -> None:
    def launch_nothing(tensor: torch.Tensor) -> None:
        tensor.view(-1).t().detach()
        tensor.expand(3, 4, 8)
        torch.empty_like(tensor)
        assert tensor.device.type == "cpu"

    assert listed(launch_nothing, (4, 8)) == []


def test_in_place_operations_read_and_write_and_a_fill_only_writes() -> None:
    assert only(listed(lambda a, b: a.add_(b), (256,), (256,))).nbytes == 4 * 256 * 3
    assert only(listed(lambda a, b: a.copy_(b), (256,), (256,))).nbytes == 4 * 256 * 2
    assert only(listed(lambda a: a.zero_(), (256,))).nbytes == 4 * 256
    assert only(listed(torch.zeros_like, (256,))).nbytes == 4 * 256


def test_an_expanded_tensor_is_read_once() -> None:
    assert only(listed(lambda a, b: a + b.expand_as(a), (64, 16), (1, 16))).nbytes == 4 * (64 * 16 + 16 + 64 * 16)


def test_a_lookup_reads_the_rows_that_it_returns_and_not_the_table() -> None:
    lookup = listed(lambda table: F.embedding(torch.zeros(5, dtype=torch.int64), table), (1000, 16))[-1]
    assert lookup.nbytes == 5 * 8 + 2 * 4 * 5 * 16
    chosen = listed(lambda table: table.index_select(0, torch.zeros(5, dtype=torch.int64)), (1000, 16))[-1]
    assert chosen.nbytes == 5 * 8 + 2 * 4 * 5 * 16


def test_a_product_with_itself_reads_its_matrix_once() -> None:
    assert only(listed(lambda matrix: matrix @ matrix, (64, 64))).nbytes == 2 * 4 * 64 * 64


def test_an_operation_over_lists_launches_for_chunks_and_for_tensors() -> None:
    def scale(*tensors: torch.Tensor) -> None:
        torch._foreach_mul_(tensors, 2.0)

    assert only(listed(scale, *[(10,)] * 111)).launches == 2  # 110 tensors of one list fit a launch
    assert only(listed(scale, (321 * 65536,))).launches == 2  # 320 chunks fit a launch
    assert only(listed(scale, *[(10,)] * 4)).nbytes == 4 * 10 * 4 * 2


def test_a_fused_optimizer_moves_seven_values_for_each_parameter() -> None:
    work = trace_plain_step(PlainStep(build=lambda: PlainGpt(TINY), rows=2, length=32, fused=True))
    parameters = sum(parameter.numel() for parameter in PlainGpt(TINY).parameters())
    step = next(operation for operation in work[-1] if operation.name == "aten._fused_adamw_.default")
    # It reads weight, gradient and two moments, and writes all of them but the gradient.
    assert step.nbytes == pytest.approx(4 * 7 * parameters, rel=0.01)


@pytest.mark.parametrize("fused", [True, False], ids=["flash", "eager attention"])
def test_a_step_has_the_flops_of_the_textbook_formula(fused: bool) -> None:
    shape = PlainGptConfig(vocabulary=96, positions=32, width=64, heads=4, layers=2, fused_attention=fused)
    step = PlainStep(build=lambda: PlainGpt(shape), rows=3, length=32, precision="bf16", micro_batches=2)
    first, second, update = trace_plain_step(step)
    weights = 12 * shape.layers * shape.width**2 + shape.vocabulary * shape.width
    attention = 12 * shape.layers * shape.width * 32
    expected = 3 * 32 * (6 * weights + attention)
    if fused:  # the backward pass of the flash kernel computes the scores again
        expected += 3 * 32 * 2 * shape.layers * shape.width * 32
    assert sum(operation.flops for operation in first) == expected
    assert sum(operation.flops for operation in second) == expected
    assert sum(operation.flops for operation in update) == 0
    # The second micro-batch adds to existing gradients.
    assert len(second) > len(first)


def test_reading_a_step_count_does_not_synchronize_but_reading_an_overflow_flag_does() -> None:
    plain = trace_plain_step(PlainStep(build=lambda: PlainGpt(TINY), rows=2, length=32))
    scaled = trace_plain_step(PlainStep(build=lambda: PlainGpt(TINY), rows=2, length=32, precision="fp16"))
    assert sum(operation.synchronizes for part in plain for operation in part) == 0
    assert sum(operation.synchronizes for part in scaled for operation in part) == 1
