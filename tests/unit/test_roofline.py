"""The parts of the time model, on operations made by hand: the roofline, the queue of launches, and fusion."""

from __future__ import annotations

from typing import Any

import pytest

from lowvram_chat.timing.constants import (
    FLOPS_PER_TESTED_PRODUCT,
    SECONDS_PER_KERNEL,
    SECONDS_PER_LAUNCH,
    SECONDS_PER_PRODUCT,
    SERVER_SECONDS_PER_LAUNCH,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_SHADERS,
    SHARE_OF_TENSOR_CORES,
    SHARE_OF_TENSOR_CORES_UNALIGNED,
)
from lowvram_chat.timing.fusion import fuse
from lowvram_chat.timing.roofline import (
    Rates,
    peak_of,
    range_of_seconds,
    seconds_on_card,
    seconds_per_step,
    sum_over_step,
    sustained_tflops,
)
from lowvram_chat.tracing.operations import Access, Operation

RATES = Rates(half_tflops=10.0, single_tflops=5.0, gb_per_second=100.0)
LAUNCH = SECONDS_PER_LAUNCH["linux"]
PRODUCT = SECONDS_PER_KERNEL + SECONDS_PER_PRODUCT
"""Overhead of the kernel of a matrix product."""
MB = 10**6


def operation(
    reads: dict[str, int] | None = None, writes: dict[str, int] | None = None, flops: int = 0, **fields: Any
) -> Operation:
    """Return an operation in the forward phase; `fields` replaces other fields."""
    values: dict[str, Any] = {
        "name": "by hand",
        "phase": "forward",
        "flops": flops,
        "precision": "half" if flops else "none",
        "unaligned": (),
        "reads": tuple(Access(*item) for item in (reads or {}).items()),
        "writes": tuple(Access(*item) for item in (writes or {}).items()),
        "launches": 1,
        "synchronizes": False,
    }
    return Operation(**{**values, **fields})


def moved(operations: list[Operation]) -> int:
    """Return the bytes that the operations read and write."""
    return sum(operation.nbytes for operation in operations)


def test_an_operation_takes_the_longer_of_its_products_and_its_bytes() -> None:
    few_bytes = operation({"a": MB}, flops=10**10)
    assert seconds_on_card(few_bytes, RATES) == pytest.approx(1e-3 / SHARE_OF_TENSOR_CORES + PRODUCT)
    many_bytes = operation({"a": 1000 * MB}, flops=10**10)
    assert seconds_on_card(many_bytes, RATES) == pytest.approx(1e-2 / SHARE_OF_BANDWIDTH + SECONDS_PER_KERNEL)


def test_unaligned_rows_slow_products_on_tensor_cores_only() -> None:
    half = operation(flops=10**10, unaligned=(Access("a", 1),))
    single = half._replace(precision="single")
    on_shaders = Rates(half_tflops=10.0, single_tflops=5.0, gb_per_second=100.0, half_on_tensor_cores=False)
    assert seconds_on_card(half, RATES) == pytest.approx(1e-3 / SHARE_OF_TENSOR_CORES_UNALIGNED + PRODUCT)
    assert seconds_on_card(half, on_shaders) == pytest.approx(1e-3 / SHARE_OF_SHADERS + PRODUCT)
    assert seconds_on_card(single, RATES) == pytest.approx(2e-3 / SHARE_OF_SHADERS + PRODUCT)


def test_a_power_limit_bounds_the_products_in_half_precision() -> None:
    assert sustained_tflops(72, (8, 9)) == pytest.approx(50.4)  # an L4, of 121 TFLOPS
    assert sustained_tflops(80, (8, 6)) > 14.25  # an RTX 3050 Laptop is not bound
    bound = Rates(half_tflops=100.0, single_tflops=50.0, gb_per_second=1000.0, sustained_tflops=20.0)
    half = operation(flops=10**12)
    assert seconds_on_card(half, bound) == pytest.approx(1 / 20 + PRODUCT)
    assert seconds_on_card(half._replace(precision="single"), bound) < 1 / 20


def test_attention_that_skips_the_masked_half_reaches_more_than_that_which_does_not() -> None:
    flash, masked = (
        seconds_on_card(operation(flops=10**12, name=f"aten._scaled_dot_product_{kind}_attention.default"), RATES)
        for kind in ("flash", "efficient")
    )
    assert masked > 2 * flash


@pytest.mark.parametrize("measured", [3.0, 14.0, 400.0])
def test_a_measured_rate_is_predicted_again(measured: float) -> None:
    rates = Rates(half_tflops=peak_of(measured, on_tensor_cores=True), single_tflops=1.0, gb_per_second=10.0**6)
    product = operation(flops=int(FLOPS_PER_TESTED_PRODUCT))
    predicted = FLOPS_PER_TESTED_PRODUCT / seconds_on_card(product, rates) / 1e12
    assert predicted == pytest.approx(measured, rel=0.01 if measured < 100 else 0.1)


def test_the_range_is_wider_for_launches_that_nobody_measured() -> None:
    launches = [[operation()] * 1000, []]
    shortest, longest = range_of_seconds(launches, RATES, 1)
    assert shortest == pytest.approx(700 * LAUNCH, rel=0.01)
    assert longest == pytest.approx(1600 * LAUNCH, rel=0.01)
    measured = Rates(half_tflops=10.0, single_tflops=5.0, gb_per_second=100.0, launch_seconds=LAUNCH)
    shortest, longest = range_of_seconds(launches, measured, 1)
    assert shortest == pytest.approx(longest, rel=0.01)
    busy = [[operation({"a": 800 * MB})], []]
    middle = seconds_per_step(busy, RATES, 1)
    shortest, longest = range_of_seconds(busy, RATES, 1)
    assert (shortest / middle, middle / longest) == pytest.approx((0.8, 0.8), rel=0.01)


def test_servers_launch_more_slowly_and_the_trainer_takes_its_time() -> None:
    launches = [[operation()] * 1000, []]
    server = Rates(half_tflops=10.0, single_tflops=5.0, gb_per_second=100.0, in_server=True)
    assert seconds_per_step(launches, server, 1) == pytest.approx(1000 * SERVER_SECONDS_PER_LAUNCH["linux"], rel=0.01)
    trained = seconds_per_step([launches[0], launches[0], []], RATES, 3, host_launches=(10, 100))
    assert trained == pytest.approx((3 * 1010 + 100) * LAUNCH, rel=0.01)


def test_a_step_of_small_operations_takes_as_long_as_the_host_needs_to_launch_them() -> None:
    work = [[operation()] * 1000, [operation()] * 10]
    assert seconds_per_step(work, RATES, 1) == pytest.approx(1010 * LAUNCH, rel=0.01)
    assert seconds_per_step(work, RATES, 1, "windows") > seconds_per_step(work, RATES, 1)


def test_launches_overlap_with_a_busy_gpu_unless_the_host_synchronizes() -> None:
    large = operation({"a": 800 * MB})
    busy = [large, *[operation()] * 100]
    overlapping = seconds_per_step([busy, []], RATES, 1)
    assert overlapping == pytest.approx(0.01 + 101 * SECONDS_PER_KERNEL, rel=0.01)
    waiting = seconds_per_step([[large._replace(synchronizes=True), *[operation()] * 100], []], RATES, 1)
    assert waiting == pytest.approx(0.01 + 101 * LAUNCH, rel=0.01)


def test_an_accumulated_step_is_one_first_micro_batch_the_later_ones_and_an_update() -> None:
    first, later, update = ([operation({"a": size * MB})] for size in (100, 200, 400))
    unit = 1e-3 / SHARE_OF_BANDWIDTH
    taken = seconds_per_step([first, later, update], RATES, 5)
    assert taken == pytest.approx(unit * (1 + 4 * 2 + 4) + 6 * SECONDS_PER_KERNEL)
    assert sum_over_step([first, later, update], 5, lambda op: op.nbytes) == MB * (100 + 4 * 200 + 400)


def test_a_tensor_that_is_created_and_used_up_between_two_products_costs_a_compiled_step_nothing() -> None:
    chain = [
        operation({"x": 4 * MB}, {"a": MB}),
        operation({"a": MB, "x": 4 * MB}, {"b": MB}),
        operation({"b": MB}, {"y": MB}),
        operation({"y": MB}, {"z": MB}, flops=1),
    ]
    (fused, product), _ = fuse([chain, []])
    assert {piece.storage for piece in fused.reads} == {"x"}
    assert {piece.storage for piece in fused.writes} == {"y"}
    assert product == chain[-1]


def test_a_result_that_no_product_reads_is_recomputed_where_its_sources_are_no_larger() -> None:
    def moved_with_source_of(source: int) -> int:
        part = [
            operation({"x": source}, {"wide": 4 * MB, "narrow": 2 * MB}),
            operation({"narrow": 2 * MB}, {"z": MB}, flops=1),
            operation({"wide": 4 * MB}, {"g": MB}),
        ]
        return moved(fuse([part, []])[0])

    product = 2 * MB + MB
    small, large = 2 * MB, 6 * MB
    assert moved_with_source_of(small) == small + 2 * MB + product + small + MB
    assert moved_with_source_of(large) == large + 6 * MB + product + 4 * MB + MB


def test_the_compiler_copies_an_unaligned_matrix_once_and_then_multiplies_at_full_speed() -> None:
    product = operation({"logits": MB, "w": MB}, {"y": MB}, flops=10**9, unaligned=(Access("logits", MB),))
    padded = fuse([[product, product], []])[0]
    assert [op.name for op in padded] == ["pad", "by hand", "by hand"]
    assert not any(op.unaligned for op in padded)
    assert fuse([[product, product], []], pads=False)[0] == [product, product]


def test_the_optimizer_is_not_compiled() -> None:
    update = [operation({"p": MB}, {"p": MB}, phase="optimizer")] * 3
    assert fuse([[], update])[1] == update
