"""The self-test tries a machine, remembers what failed there, and its file goes among the results of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowvram_chat import bench, doctor, sft
from lowvram_chat.model import calibration
from lowvram_chat.model.calibration import Calibration
from lowvram_chat.model.present_card import for_this_machine
from lowvram_chat.recipe.card import card_of
from lowvram_chat.recipe.yaml_file import build_recipe, load_recipe
from lowvram_chat.results import record
from lowvram_chat.results.record import CheckResult, Record
from lowvram_chat.selftest import exactness, rates, runs, steps, suite
from lowvram_chat.selftest.check import Check, Outcome, figure, without_paths
from lowvram_chat.timing.constants import SHARE_OF_BANDWIDTH, SHARE_OF_TENSOR_CORES
from lowvram_chat.timing.speed import card_rates
from tests.runs import Bench, curve
from tests.samples import ROOT
from tests.unit.test_present_card import LAPTOP_3050, driver

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "check", [*suite.RATES, *suite.EXACTNESS, *(c for c in suite.STEPS if c.name != "compile")], ids=lambda c: c.name
)
def test_every_check_runs_on_a_cpu(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rates, "ELEMENTS", {"cpu": 1 << 20})
    monkeypatch.setattr(rates, "DISK_BYTES", 4 << 20)
    result = check.run(CPU)
    assert result.status == ("skipped" if check.name in ("paged_adamw_8bit", "cap") else "ok"), result.meaning
    assert result.meaning
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fused_loss", "fused_gelu", "fused_lora", "isolation"])
def test_a_wrong_substitution_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_loss(model: torch.nn.Module) -> None:
        def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            loss = original(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
            return {"loss": loss * inputs["loss_positions"].numel() * 1.01}

        original = model.forward
        model.forward = forward

    def broken_gelu(model: torch.nn.Module) -> int:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.mlp.act = torch.nn.SiLU()
        return 1

    def broken_lora(model: torch.nn.Module) -> int:
        for parameter_name, parameter in model.named_parameters():
            if "lora_A" in parameter_name:
                parameter.data *= 1.05
        return 1

    broken = {
        "fused_loss": ("attach_loss", broken_loss),
        "fused_gelu": ("fuse_gelu", broken_gelu),
        "fused_lora": ("fuse_adapters", broken_lora),
        "isolation": ("isolates_documents", lambda model: False),
    }
    monkeypatch.setattr(exactness, *broken[name])
    [check] = [check for check in suite.EXACTNESS if check.name == name]
    result = check.run(CPU)
    assert result.status == "failed"
    assert check.if_it_fails in result.meaning


@pytest.mark.parametrize("place", [1, 2])
def test_a_difference_that_is_nan_is_a_failure(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def nan_at_a_place(*_: object) -> float:
        calls.append(1)
        return float("nan") if len(calls) == place else 1e-7

    monkeypatch.setattr(exactness, "_packed_difference", nan_at_a_place)
    monkeypatch.setattr(exactness, "gradient_difference", lambda *_: float("nan"))
    assert not exactness.document_attention(CPU).good
    assert not exactness.fused_loss(CPU).good


def test_what_failed_is_not_said_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "isolates_documents", lambda model: False)
    [check] = [check for check in suite.EXACTNESS if check.name == "isolation"]
    assert check.run(CPU).meaning.startswith("it is not so that packed conversations do not see each other. Use data")


def test_the_killed_run_says_what_happened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [check] = suite.KILLED
    monkeypatch.setattr(runs, "_largest_difference", lambda *_: float("nan"))
    monkeypatch.setattr(runs, "_exit_code", lambda process: process.kill() or 0)
    monkeypatch.setattr(runs, "_kill_after", lambda process, run: process.kill() or 12)
    result = check.run(CPU)
    assert result.status == "failed"
    assert result.meaning.startswith("the resumed run has other tensors, or NaN among them. ")
    monkeypatch.setattr(runs, "_exit_code", lambda process: process.kill() or 2)
    assert check.run(CPU).meaning.startswith("a short run ended with exit code 2. ")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (r"no file C:\Users\Ada Lovelace\AppData\x.json here", "no file .../x.json here"),
        ("/home/ada/venv/bin/python timed out", ".../python timed out"),
        ("12 / 4 tokens/s", "12 / 4 tokens/s"),
    ],
)
def test_a_file_that_is_sent_holds_no_path(text: str, kept: str) -> None:
    assert without_paths(text.replace("\\\\", "\\")) == kept


def test_an_8_bit_optimizer_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    assert not steps.eight_bit(CPU).good


def test_an_error_of_any_kind_is_a_failure_with_its_place() -> None:
    def work(device: torch.device) -> Outcome:
        raise RuntimeError("CUDA error: no kernel image is available")

    result = Check("x", "X", work, "Do this.").run(CPU)
    assert result.status == "failed"
    assert "no kernel image is available (test_selftest.py:" in result.meaning
    assert result.meaning.endswith("Do this.")


def kept(*failed: str, **figures: float) -> Calibration:
    """Keep figures for this machine's processor, and return them."""
    found = Calibration.model_validate(
        {"device": calibration.processor_name(), "torch": torch.__version__, "failed": failed, **figures}
    )
    calibration.save(found)
    return found


def test_what_failed_is_switched_off_in_later_runs_which_say_so(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = curve(bench.run("own", model__fused_loss=False, train__max_steps=2))
    kept("fused_loss", "fused_lora")
    assert sft.main([str(bench.file("r", train__max_steps=2))]) == 0
    told = capsys.readouterr().err
    assert "model.fused_loss=false: the self-test of this machine failed with it on" in told
    assert "adapter.fused" not in told  # this run has no adapter
    assert curve(bench.folder / "r") == expected


def test_figures_of_another_torch_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kept("fused_loss")
    assert calibration.load(calibration.processor_name()) is not None
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert calibration.load(calibration.processor_name()) is None


@pytest.mark.parametrize(
    "figures",
    ["", '"launch_microseconds": -10', '"context_mib": -2500', '"half_tflops": NaN', '"single_tflops": Infinity', "["],
)
def test_a_damaged_file_is_not_used(figures: str, caplog: pytest.LogCaptureFixture) -> None:
    kept()
    file = calibration.path_of(calibration.processor_name())
    text = file.read_text(encoding="utf-8").rstrip().removesuffix("}")
    file.write_text(f"{text}, {figures}}}" if figures else "{", encoding="utf-8")
    assert calibration.load(calibration.processor_name()) is None
    assert "is damaged" in caplog.text


def test_the_file_of_another_version_of_this_package_is_read(bench: Bench) -> None:
    found = kept("frobnicate")
    file = calibration.path_of(found.device)
    file.write_text(file.read_text(encoding="utf-8").replace("{", '{"later_figure": 1,', 1), encoding="utf-8")
    assert calibration.load(found.device) is not None
    bench.run("r", train__max_steps=1)


def test_a_plan_for_the_card_uses_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, LAPTOP_3050)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    name = "NVIDIA GeForce RTX 3050 Laptop GPU"
    rates_found = {"half_tflops": 7.5, "single_tflops": 3.0, "gb_per_second": 120.0, "launch_microseconds": 42.0}
    calibration.save(
        Calibration(device=name, torch=torch.__version__, driver="581.15", context_mib=222, **rates_found)  # type: ignore[arg-type]
    )
    card = card_of(for_this_machine(build_recipe({}, (), "test")).memory)
    assert card.is_calibrated
    assert card.context_mib == 222
    assert card.launch_seconds == pytest.approx(42e-6)
    assert (next(iter(card.fp16_tflops.values())), card.gb_per_second) == (7.5, 120.0)
    rates = card_rates(card, next(iter(card.fp16_tflops)))  # peaks of which the model reaches what was measured
    assert rates.half_tflops * SHARE_OF_TENSOR_CORES == pytest.approx(7.5, rel=0.02)
    assert rates.gb_per_second * SHARE_OF_BANDWIDTH == pytest.approx(120.0)


def test_calibration_takes_the_figures_of_the_checks() -> None:
    results = [
        CheckResult(
            name="products", title="", status="ok", meaning="", seconds=0, figures={"fp32": figure(0.1, "TFLOP/s")}
        ),
        CheckResult(name="launch", title="", status="ok", meaning="", seconds=0, figures={"launch": figure(20, "us")}),
        CheckResult(name="fused_gelu", title="", status="failed", meaning="", seconds=0),
        CheckResult(name="adamw_8bit", title="", status="failed", meaning="", seconds=0),
    ]
    found = suite.calibrated(CPU, results)
    assert (found.half_tflops, found.single_tflops, found.launch_microseconds) == (0.1, 0.1, 20.0)
    assert found.failed == ("fused_gelu",)  # an optimizer is the recipe's choice, so it is not replaced in silence


def test_the_command_writes_a_record_and_a_page_that_hold_nothing_personal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"exactness": suite.EXACTNESS[-2:]}
    monkeypatch.setattr(suite, "GROUPS", quick)
    monkeypatch.setattr(suite, "_in_own_process", lambda group, checks, device: [c.run(CPU) for c in checks])
    monkeypatch.setattr(suite, "_recipe_checks", lambda: ())
    out = tmp_path / "selftest.json"
    assert doctor.main(["--selftest", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "everything that this machine can run works" in printed
    assert json.loads(printed.splitlines()[-1])["benchmark"] == "selftest"
    found: Record = record.load(out)
    assert [check.status for check in found.checks] == ["ok", "ok"]
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    for text in (out.read_text(encoding="utf-8"), page):
        assert len(text) < 200_000
        assert str(Path.home()) not in text
        assert str(tmp_path) not in text
    assert "Self-test of" in page
    assert bench.main(["report", str(out)]) == 0


def test_a_recipe_is_measured_against_its_prediction() -> None:
    kept(half_tflops=0.1, single_tflops=0.1, gb_per_second=10, launch_microseconds=20)
    words = (*runs.ON_A_CPU, "data.max_length=64", "model.name=builtin:tiny-gpt2")
    recipe = load_recipe(ROOT / "recipes" / "full_fp16_adamw.yaml", words)
    figures = runs.measured_and_predicted("r", recipe, "cpu")
    assert figures["r: tokens/s"].kind == "measured"
    assert figures["r: predicted tokens/s"].kind == "predicted"


def test_wrong_memory_is_a_failure_and_wrong_speed_is_reported() -> None:
    right = {
        f"r: {kind}": figure(100, "MiB")
        for kind in ("reserved", "predicted reserved", "tokens/s", "predicted tokens/s")
    }
    assert runs.compared("r", right).good
    assert "not reliable" not in runs.compared("r", right).meaning
    assert not runs.compared("r", right | {"r: predicted reserved": figure(90, "MiB")}).good
    slow = runs.compared("r", right | {"r: tokens/s": figure(50, "tokens/s")})
    assert slow.good
    assert "tokens/s predicted +100.0% (off by more than 25%: planned times are not reliable" in slow.meaning


def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("a folder that root cannot write to")
    assert doctor.main(["--selftest", "--out", "/proc/selftest.json"]) == 2
    assert "nothing can be written into /proc" in capsys.readouterr().err


def test_the_page_does_not_take_the_place_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--selftest", "--out", str(tmp_path / "report.html")]) == 2
    assert "is the name of a page" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(found: Calibration) -> Path:
        raise PermissionError(13, "Permission denied", "machine.json")

    monkeypatch.setattr(calibration, "save", refuse)
    suite._keep(kept_nowhere())
    assert "machine.json: cannot be written (Permission denied)" in caplog.text


def kept_nowhere() -> Calibration:
    return Calibration(device="x", torch=torch.__version__)
