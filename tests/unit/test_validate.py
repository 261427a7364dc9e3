"""`plan --validate`: what it reads, what it says, and that its numbers do not come from the measurements."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import transformers

from benchmarks.validation import measured_runs as measured
from benchmarks.validation import memory as validate
from lowvram_chat.errors import NotFoundError, UsageError

CONFIG = {"vocab_size": 503, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 0}
ROW = {
    "id": "r1",
    "model_type": "gpt2",
    "config": json.dumps({**CONFIG, "eos_token_id": 0}),
    "batch": "2",
    "seq_len": "32",
    "precision": "fp32",
    "optimizer": "AdamW",
    "attention": "sdpa",
    "loss": "logits",
    "mask": "ones",
    "zero_grad": "after_step",
    "steps": "2",
    "transformers": "4.0.0",
    "gpu": "RTX 3060",
    "gpu_total_mib": "12037",
    "metric": "reserved",
    "measured_mib": "22",
    "out_of_memory": "no",
    "note": "",
}


def _file(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "measured.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _prediction(error: float | None) -> validate.Prediction:
    return validate.Prediction(
        id="r", predicted_mib=1.0, measured_mib=1.0, error_percent=error, out_of_memory=error is None
    )


def test_the_json_has_the_documented_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate.run(_file(tmp_path, ROW), as_json=True)
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert list(document) == ["rows", "median_error_percent", "within_1_percent", "max_error_percent"]
    assert list(document["rows"][0]) == ["id", "predicted_mib", "measured_mib", "error_percent", "out_of_memory"]
    assert "4.0.0" in err
    assert transformers.__version__ in err


def test_the_table_shows_both_numbers_and_the_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate.run(_file(tmp_path, {**ROW, "transformers": transformers.__version__}))
    out, err = capsys.readouterr()
    assert "r1" in out
    assert "median" in out
    assert not err


def test_a_prediction_does_not_look_at_the_measurement() -> None:
    near, far = validate.predict_peak(ROW), validate.predict_peak({**ROW, "measured_mib": "9999"})
    assert near.predicted_mib == far.predicted_mib
    assert near.error_percent == pytest.approx(100 * (near.predicted_mib / 22 - 1), abs=0.01)


def test_a_run_that_cannot_fit_is_predicted_not_to() -> None:
    row = {**ROW, "gpu_total_mib": "310", "measured_mib": "", "out_of_memory": "yes"}
    prediction = validate.predict_peak(row)
    assert prediction.out_of_memory
    assert prediction.error_percent is None
    assert not validate.predict_peak(ROW).out_of_memory


def test_device_memory_adds_the_kernels_that_the_row_s_note_states_for_its_card() -> None:
    row = {**ROW, "metric": "device_delta", "note": "late kernels: about +50 MiB on the 4060, +54 on the 3060"}
    assert validate.predict_peak(row).predicted_mib == validate.predict_peak(ROW).predicted_mib + 54
    assert measured.late_kernels_mib({**row, "gpu": "RTX 4060"}) == 50
    assert measured.late_kernels_mib({**row, "note": ""}) == measured.LATE_KERNELS_MIB


def test_the_sums_are_of_absolute_errors_over_the_measured_rows() -> None:
    report = validate.summarise(tuple(map(_prediction, (-4.0, 0.5, 1.0, None))))
    assert report.median_error_percent == 1.0
    assert report.max_error_percent == 4.0
    assert report.within_1_percent == pytest.approx(2 / 3)
    assert "no row" in validate.summary(validate.summarise((_prediction(None),)))


@pytest.mark.parametrize("column", ["config", "measured_mib", "zero_grad"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    row = {name: value for name, value in ROW.items() if name != column}
    with pytest.raises(UsageError, match=f"columns missing: {column}"):
        validate.run(_file(tmp_path, row))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.csv"):
        validate.run(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("optimizer", "AdamWx", "Did you mean 'AdamW'"),
        ("optimizer", "LBFGS", "is not known"),
        ("model_type", "gpt22", "Did you mean 'gpt2'"),
        ("precision", "fp8", "fp32"),
        ("batch", "two", "not a number"),
        ("batch", "0", "above 0"),
        ("config", "{", "not JSON"),
        ("config", "[]", "not a JSON object"),
    ],
)
def test_a_wrong_value_names_the_row_and_the_column(column: str, value: str, says: str) -> None:
    with pytest.raises(UsageError, match=rf"row r1, column {column}: .*{says}"):
        measured.stock_run({**ROW, column: value})
