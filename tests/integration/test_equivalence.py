"""Settings that must not change the function give the same curve, by the largest and by the mean difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import Bench, curve, differences, result
from tests.samples import save_tiny_gpt2

LARGEST, MEAN = 2e-5, 6e-6
"""Ten times what was measured over these 12 fp32 steps on 1 and 2 threads: at most 1.9e-6 and 6.4e-7 in any pair."""

ADAPTERS: dict[str, Any] = {"full": None, "lora": {"kind": "lora", "r": 8}}


def shape(batch: int, accumulated: int, **more: Any) -> dict[str, Any]:
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    return {f"train__{name}": value for name, value in (sizes | more).items()}


SHAPES = {
    "1x4": shape(1, 4),
    "2x2": shape(2, 2),
    "checkpointed": shape(4, 1, gradient_checkpointing=True),
    "1x4 checkpointed": shape(1, 4, gradient_checkpointing=True),
    "python gelu": {"model__fused_gelu": False},
    "eager": {"model__attention": "eager"},
}


@pytest.fixture(scope="module")
def references(session_bench: Bench) -> dict[str, Path]:
    """The runs of four rows at once that the others must equal."""
    return {name: session_bench.run(f"4x1-{name}", adapter=adapter) for name, adapter in ADAPTERS.items()}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", SHAPES)
def test_an_equal_step_gives_an_equal_curve(name: str, kind: str, bench: Bench, references: dict[str, Path]) -> None:
    run = bench.run("r", adapter=ADAPTERS[kind], **SHAPES[name])
    largest, mean = differences(curve(run), curve(references[kind]))
    assert (largest < LARGEST, mean < MEAN) == (True, True), f"largest {largest:.1e}, mean {mean:.1e}"
    ours, theirs = result(run), result(references[kind])
    assert ours["held_out_loss_after"] == pytest.approx(theirs["held_out_loss_after"], abs=LARGEST)
    assert ours["real_tokens"] == theirs["real_tokens"]


def test_rows_of_unequal_length_would_betray_a_mean_of_means(references: dict[str, Path], train_file: Path) -> None:
    # The comparison above has teeth only where rows differ in labelled tokens and batches are padded.
    said = result(references["full"])
    assert said["padded_tokens"] > 1.2 * said["real_tokens"]


SUBSTITUTIONS: dict[str, dict[str, Any]] = {
    "python gelu": {"model__fused_gelu": False},
    "loss from all logits": {"model__fused_loss": False},
    "attention mask": {"data__attention_mask": True},
    "AdamW in many kernels": {"optimizer": {"name": "adamw_unfused"}},
    "four micro-batches": shape(1, 4),
    "compiled": {"train__compile": True},
}
RELATIVE = 1e-5
"""Of the loss, over 50 fp32 steps; measured: at most 3.2e-7 in any of them."""


@pytest.fixture(scope="module")
def fifty(session_bench: Bench) -> list[float]:
    return curve(session_bench.run("fifty", train__max_steps=50, train__learning_rate=1e-3))


@pytest.mark.parametrize("name", SUBSTITUTIONS)
def test_a_substitution_gives_the_same_fifty_steps(name: str, bench: Bench, fifty: list[float]) -> None:
    run = bench.run("r", train__max_steps=50, train__learning_rate=1e-3, **SUBSTITUTIONS[name])
    ratios = [abs(one / other - 1) for one, other in zip(curve(run), fifty, strict=True)]
    assert max(ratios) < RELATIVE, f"{max(ratios):.1e}"


def test_a_padded_vocabulary_gives_the_same_fifty_steps(bench: Bench, tmp_path: Path) -> None:
    name = str(save_tiny_gpt2(tmp_path / "odd", unused=9))  # as GPT-2's 50,257 is no multiple of 64
    settings = {"train__max_steps": 50, "train__learning_rate": 1e-3}
    padded, own = (
        bench.run(f"padded-{pad}", model={"name": name, "pad_vocabulary": pad}, **settings) for pad in (True, False)
    )
    ratios = [abs(one / other - 1) for one, other in zip(curve(padded), curve(own), strict=True)]
    assert max(ratios) < RELATIVE, f"{max(ratios):.1e}"


@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa"])
def test_an_adapter_s_sum_in_one_kernel_gives_the_same_fifty_steps(kind: str, bench: Bench) -> None:
    settings: dict[str, Any] = {"train__max_steps": 50, "train__learning_rate": 1e-3}
    fused, own = (
        bench.run(f"fused-{fused}", adapter={"kind": kind, "r": 8, "fused": fused}, **settings)
        for fused in (True, False)
    )
    ratios = [abs(one / other - 1) for one, other in zip(curve(fused), curve(own), strict=True)]
    assert max(ratios) < RELATIVE, f"{max(ratios):.1e}"


@pytest.mark.parametrize("more", [{}, {"adapter": {"kind": "lora", "r": 8}}, {"train__gradient_checkpointing": True}])
def test_attention_by_document_gives_the_same_fifty_steps(more: dict[str, Any], bench: Bench) -> None:
    settings: dict[str, Any] = {"data__rows": "packed", "train__max_steps": 50, "train__learning_rate": 1e-3, **more}
    by_document, masked = (
        bench.run(f"fused-{fused}", model={"name": str(bench.model), "document_attention": fused}, **settings)
        for fused in (True, False)
    )
    ratios = [abs(one / other - 1) for one, other in zip(curve(by_document), curve(masked), strict=True)]
    assert max(ratios) < RELATIVE, f"{max(ratios):.1e}"


def test_packed_rows_learn_what_padded_rows_learn(bench: Bench) -> None:
    # All rows in one batch, so that both kinds take the same step; the rows are packed in another order.
    sizes = {"data__limit": 24, **shape(24, 1, max_steps=50, learning_rate=1e-3)}
    padded, packed = bench.run("padded", **sizes), bench.run("packed", data__rows="packed", **sizes)
    ratios = [abs(one / other - 1) for one, other in zip(curve(packed), curve(padded), strict=True)]
    assert max(ratios) < RELATIVE, f"{max(ratios):.1e}"
    assert result(packed)["real_tokens"] == result(padded)["real_tokens"]
    assert result(packed)["padded_tokens"] < result(padded)["padded_tokens"]


def test_grouped_rows_are_the_same_rows_with_less_padding(bench: Bench) -> None:
    runs = [bench.run(rows, data__rows=rows, train__max_steps=None) for rows in ("padded", "grouped")]
    padded, grouped = map(result, runs)
    assert grouped["real_tokens"] == padded["real_tokens"]
    assert grouped["padded_tokens"] < padded["padded_tokens"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_comparison_fails_where_the_step_is_another(
    optimizer: str, bench: Bench, references: dict[str, Path]
) -> None:
    run = bench.run("r", optimizer={"name": optimizer}, train__learning_rate=4.5e-3)
    assert differences(curve(run), curve(references["full"]))[0] > 10 * LARGEST


def test_logging_less_often_gives_the_means_of_the_same_curve(bench: Bench, references: dict[str, Path]) -> None:
    run = bench.run("r", train__logging_steps=4)
    steps = curve(references["full"])
    logged = curve(run)  # the first step, then every fourth
    assert logged[0] == pytest.approx(steps[0], abs=1e-5)
    assert logged[-1] == pytest.approx(sum(steps[8:12]) / 4, abs=1e-4)


def test_checkpointing_really_recomputes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    calls = 0
    original = GPT2MLP.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GPT2MLP, "forward", forward)
    counted = []
    for checkpointing in (False, True):
        calls = 0
        bench.run(str(checkpointing), train__max_steps=3, train__gradient_checkpointing=checkpointing)
        counted.append(calls)
    assert counted[1] - counted[0] == 2 * 3  # two layers, once more in each of three steps
