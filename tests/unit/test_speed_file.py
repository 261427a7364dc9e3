"""`benchmarks.validation speed FILE.csv`: which rows it predicts, which it lists with a reason, and which it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks.validation import speed_file
from benchmarks.validation.__main__ import main
from benchmarks.validation.card_rates import CARDS, find_card
from benchmarks.validation.csv_rows import read_rows
from benchmarks.validation.speed_file import predict_speed
from benchmarks.validation.speed_rows import REQUIRED_COLUMNS, CannotTrace, published_run
from lowvram_chat.errors import UsageError
from tests.samples import ROOT

FILE = Path(ROOT) / "benchmarks" / "data" / "speeds_measured.csv"
CONFIG = {
    "vocab_size": 512,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 1,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROW = {
    "id": "r1",
    "gpu": "RTX A4000",
    "model_type": "gpt2",
    "config": json.dumps(CONFIG),
    "batch": "2",
    "seq_len": "32",
    "precision": "fp16 weights",
    "optimizer": "none",
    "attention": "sdpa",
    "loss": "logits.sum()",
    "mask": "ones",
    "adapter": "",
    "compiled": "",
    "checkpointing": "",
    "measured_tokens_per_second": "1000",
    "note": "",
}
OWN_CODE = {
    **ROW,
    "model_type": "own code (GPT-2 124 M, V=50304)",
    "config": "",
    "precision": "bf16 autocast, TF32",
    "optimizer": "AdamW fused, clip 1.0",
    "loss": "logits",
    "mask": "none",
    "compiled": "yes",
    "note": "torch 2.8, accumulation 32",
}


def _file(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "speeds.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_predicted_and_unpredicted_rows_are_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, ROW, {**ROW, "id": "r2", "gpu": "Abacus 9"}, {**ROW, "id": "r3", "optimizer": "AdamW"})
    assert main(["speed", str(path), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert list(document) == [
        *("rows", "predicted_rows", "rows_in_range", "rows_within_20_percent"),
        *("median_error_percent", "max_error_percent"),
    ]
    assert [row["id"] for row in document["rows"]] == ["r1", "r2", "r3"]
    assert document["predicted_rows"] == 2
    first, unknown, last = document["rows"]
    assert first["predicted_tokens_per_second"] > last["predicted_tokens_per_second"] > 0
    assert first["error_percent"] == pytest.approx(100 * (first["predicted_tokens_per_second"] / 1000 - 1), abs=0.02)
    lowest, highest = first["predicted_range"]
    assert lowest < first["predicted_tokens_per_second"] < highest
    assert unknown["predicted_tokens_per_second"] is None
    assert unknown["predicted_range"] is None
    assert "Abacus 9" in unknown["reason"]
    assert any(line.startswith("not predicted: r2: ") for line in lines)
    assert lines[-2].startswith("2 of 3 rows predicted")


def test_a_prediction_does_not_look_at_the_published_speed() -> None:
    near, far = predict_speed(ROW), predict_speed({**ROW, "measured_tokens_per_second": "9"})
    assert near.predicted_tokens_per_second == far.predicted_tokens_per_second


def test_a_stock_row_is_read_as_it_says() -> None:
    step, rates, compiled = published_run(ROW)
    assert (step.rows, step.length, step.micro_batches, step.tokens) == (2, 32, 1, 64)
    assert (step.precision, step.weights, step.optimizer, step.sums_logits) == ("fp32", torch.float16, False, True)
    assert step.extra == ("attention_mask",)
    assert (rates.half_tflops, rates.single_tflops, compiled) == (76.7, 19.2, False)


def test_a_hand_written_row_is_read_as_it_says() -> None:
    step, rates, compiled = published_run(OWN_CODE)
    assert (step.precision, step.fused, step.clip, step.micro_batches) == ("bf16", True, True, 32)
    assert (rates.single_tflops, rates.single_on_tensor_cores, compiled) == (38.3, True, True)
    (shape,) = step.build.args  # type: ignore[attr-defined]
    assert (shape.vocabulary, shape.tied, shape.fused_attention, shape.dropout) == (50304, True, True, 0.0)
    untied = published_run({**OWN_CODE, "model_type": "own code (GPT-2 163 M untied)", "attention": "own"}).step
    (shape,) = untied.build.args  # type: ignore[attr-defined]
    assert (shape.vocabulary, shape.tied, shape.fused_attention, shape.dropout) == (50257, False, False, 0.1)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("gpu", "Abacus 9", "Abacus 9"),
        ("adapter", "lora r32 q,v", "adapters"),
        ("checkpointing", "yes", "checkpointing"),
        ("seq_len", "<=768", "vary in length"),
        ("precision", "fp8", "precision 'fp8'"),
        ("precision", "fp32, guessed", "precision"),
        ("optimizer", "Lion", "optimizer 'Lion'"),
        ("optimizer", "AdamW, clip 0.5", "optimizer"),
        ("loss", "other", "loss 'other'"),
        ("model_type", "own code (a mixture)", "not described"),
    ],
)
def test_what_cannot_be_traced_has_a_reason(column: str, value: str, says: str) -> None:
    with pytest.raises(CannotTrace, match=says):
        published_run({**ROW, column: value})
    assert predict_speed({**ROW, column: value}).reason is not None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("batch", "nan"),
        ("seq_len", "65"),
        ("seq_len", "x"),
        ("config", "{"),
        ("model_type", "gpt22"),
        ("attention", "fast"),
        ("mask", "some"),
        ("compiled", "maybe"),
        ("measured_tokens_per_second", "0"),
    ],
)
def test_a_wrong_cell_is_told_before_anything_is_traced(
    column: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_file, "predicted_seconds", lambda *_, **__: pytest.fail("traced"))
    with pytest.raises(UsageError, match=f"row r2, column {column}: "):
        speed_file.run(_file(tmp_path, ROW, {**ROW, "id": "r2", column: value}), as_json=False)


def test_every_row_of_the_shipped_file_is_read_or_has_a_reason() -> None:
    unread = []
    for row in read_rows(FILE, REQUIRED_COLUMNS):
        try:
            published_run(row)
        except CannotTrace:
            unread.append(row["id"])
    assert unread == ["peft-lora32"]


def test_a_step_whose_model_code_fails_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> float:
        raise AttributeError("to_legacy_cache")

    monkeypatch.setattr(speed_file, "predicted_seconds", fail)
    reason = predict_speed(ROW).reason
    assert reason is not None
    assert "AttributeError: to_legacy_cache" in reason


def test_a_card_is_found_whatever_its_case_and_spaces() -> None:
    assert find_card("rtx a4000") == find_card("RTX A4000") == CARDS["RTX A4000"]
    assert find_card("RTX 3090 24 GB") == find_card("rtx-3090-24gb")
    turing = find_card("Tesla T4 16GB")
    assert turing is not None
    assert turing.rates(tf32=True).single_tflops == turing.fp32_tflops


@pytest.mark.parametrize("name", CARDS)
def test_a_card_does_fp16_products_twice_as_fast_as_tf32_ones(name: str) -> None:
    assert CARDS[name].fp16_tflops == pytest.approx(2 * CARDS[name].tf32_tflops, rel=0.02)
