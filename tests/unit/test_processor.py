"""The time model of a processor, on operations made by hand."""

from __future__ import annotations

import pytest

from lowvram_chat.timing.processor import (
    OTHER_SHARES,
    SHARE_OF_ATTENTION,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_PRODUCTS,
    ProcessorRates,
    predicted_seconds,
    seconds_of,
    seconds_per_step,
)
from tests.unit.test_roofline import MB, operation
from tests.unit.test_speed import recipe

RATES = ProcessorRates(single_tflops=0.2, gb_per_second=50.0, launch_seconds=1e-5)


def test_an_operation_takes_the_longer_of_its_products_and_its_bytes() -> None:
    product = operation({"a": MB}, flops=10**10)
    assert seconds_of(product, RATES) == pytest.approx(0.05 / SHARE_OF_PRODUCTS + 1e-5)
    attention = product._replace(name="aten._scaled_dot_product_flash_attention_for_cpu.default")
    assert seconds_of(attention, RATES) == pytest.approx(0.05 / SHARE_OF_ATTENTION + 1e-5)
    added = operation({"a": 100 * MB})
    assert seconds_of(added, RATES) == pytest.approx(2e-3 / SHARE_OF_BANDWIDTH + 1e-5)
    activation = added._replace(name="aten.gelu_backward.default")
    assert seconds_of(activation, RATES) == pytest.approx(2e-3 / OTHER_SHARES["gelu"] + 1e-5)


def test_a_processor_runs_one_operation_after_the_other() -> None:
    work = [[operation({"a": MB})] * 3, [operation({"a": MB})] * 2, [operation({"a": MB})]]
    assert seconds_per_step(work, RATES, 4) == pytest.approx((3 + 3 * 2 + 1) * seconds_of(work[2][0], RATES))


def test_twice_the_rows_take_nearly_twice_the_time() -> None:
    one, two = (
        recipe("builtin:tiny-gpt2", train={"precision": "fp32", "per_device_train_batch_size": rows})
        for rows in (8, 16)
    )
    ratio = predicted_seconds(two, RATES) / predicted_seconds(one, RATES)
    assert 1.7 < ratio < 2.0
