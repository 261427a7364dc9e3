"""`benchmarks.validation memory`: what it reads, what it prints, and that its numbers do not come from the measurements."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from benchmarks.validation import measured_runs as measured
from benchmarks.validation import memory as validate
from benchmarks.validation.__main__ import main
from lowvram_chat.errors import NotFoundError, UsageError
from tests.samples import ROOT

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
HEADER = ",".join(measured.REQUIRED_COLUMNS).encode() + b"\n"


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
    assert main(["memory", str(_file(tmp_path, ROW)), "--json"]) == 0
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
        ("optimizer", "LBFGS", "cannot be traced"),
        ("model_type", "gpt22", "Did you mean 'gpt2'"),
        ("precision", "fp8", "fp32"),
        ("batch", "two", "not a number"),
        ("batch", "0", "above 0"),
        ("batch", "2.5", "whole number"),
        ("batch", "nan", "finite"),
        ("seq_len", "1e400", "finite"),
        ("seq_len", "65", "64 positions"),
        ("steps", "1000000000", "more than 100"),
        ("gpu", " ", "empty"),
        ("model_type", "clip", "not known"),
        ("optimizer", "ASGD", "cannot be traced"),
        ("out_of_memory", "maybe", "yes, no"),
        ("config", "{", "not JSON"),
        ("config", "[]", "not a JSON object"),
        ("config", '{"foo": 1}', "'foo' is not a setting of gpt2"),
        ("config", '{"n_layers": 1}', "Did you mean 'n_layer'"),
        ("config", '{"n_embd": 0}', "'n_embd' is not a whole number from 1"),
        ("config", '{"n_layer": 1000000}', "'n_layer' is not a whole number from 1 to 1,000"),
        ("config", '{"n_layer": "x"}', "'?n(um_hidden)?_layers?'?"),
        ("config", '{"n_embd": 1e400}', "'n_embd' is out of range"),
        ("config", '{"vocab_size": NaN}', "'vocab_size' is out of range"),
    ],
)
def test_a_wrong_value_names_the_row_and_the_column(column: str, value: str, says: str) -> None:
    with pytest.raises(UsageError, match=rf"row r1, column {column}: .*{says}"):
        measured.stock_run({**ROW, column: value})


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [("measured_mib", "0", "above 0"), ("measured_mib", "nan", "finite"), ("gpu_total_mib", "x", "")],
)
def test_a_wrong_row_is_found_before_the_first_one_is_traced(
    column: str, value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "trace_stock_run", lambda *_: pytest.fail("traced"))
    with pytest.raises(UsageError, match=rf"row r2, column {column}: .*{says}"):
        validate.run(_file(tmp_path, ROW, {**ROW, "id": "r2", column: value}))


def test_sizes_that_contradict_each_other_are_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.dumps({**CONFIG, "eos_token_id": 0, "n_head": 5})
    assert main(["memory", str(_file(tmp_path, {**ROW, "config": config}))]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("row r1, column config: transformers cannot build this gpt2")
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "columns missing: id"),
        (HEADER, "it has no rows"),
        (HEADER + b"r1,gpt2\n", "row r1, column config: the line ends before it"),
        (HEADER + b",".join([b"r1"] * 20) + b"\n", "more cells than there are columns"),
        (HEADER + b"," * 18 + b"\n", "column id: it is empty"),
        (HEADER + b"r\x001" + b"," * 18 + b"\n", "column id: it contains a control character"),
        (HEADER + b"r1,\x1b[31m" + b"," * 17 + b"\n", "row r1, column model_type: it contains a control character"),
        (HEADER + b"x" * 200_000 + b"," * 18 + b"\n", "line 2 is not CSV .field larger"),
        (HEADER + b'r1,"open', "line 2 is not CSV .unexpected end"),
        (HEADER + b"\xff" + b"," * 18 + b"\n", "not UTF-8"),
    ],
)
def test_a_file_that_is_not_such_a_csv_is_told_in_a_sentence(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    assert main(["memory", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith(str(path))
    assert re.search(says, line)


def test_it_runs_without_the_libraries_for_training(tmp_path: Path) -> None:
    # filelock is not hidden: transformers itself needs it.
    code = f"""
import importlib.machinery, sys
HIDDEN = {{"peft", "trl", "bitsandbytes", "datasets", "accelerate", "psutil", "pyarrow"}}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)
sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
from benchmarks.validation.__main__ import main
code = main(["memory", {str(_file(tmp_path, ROW))!r}, "--json"])
import benchmarks.validation.speed_file
sys.exit(code or bool(HIDDEN & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"][0]["id"] == "r1"


def test_the_command_asks_for_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["memory"], ["memry"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert "python -m benchmarks.validation" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["memory", "--help"])
    assert stopped.value.code == 0
    assert "FILE.csv" in capsys.readouterr().out
    assert main(["memory", "nothing.csv"]) == 2
    assert "nothing.csv: there is no such file" in capsys.readouterr().err
