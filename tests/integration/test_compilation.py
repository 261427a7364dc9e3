"""A compiled run has the losses of an eager one, and where compiling fails, `if_possible` runs eagerly."""

from __future__ import annotations

import pytest
import torch

from lowvram_chat import sft
from lowvram_chat.model.compilation import missing_compiler
from tests.runs import Bench, curve, result


def broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compiling fail at the first call, as without cl.exe, in a folder with a long name, or with an old Triton."""
    from lowvram_chat.training import model_setup
    from lowvram_chat.training import session as session_module

    def failing(*_: object) -> None:
        raise RuntimeError("Compiler: cl is not found.")

    monkeypatch.setattr(session_module, "should_compile", lambda train, device: bool(train.compile))
    monkeypatch.setattr(
        model_setup, "compile_blocks", lambda model: model.base_model.compile(backend=failing, dynamic=False)
    )


def test_where_compiling_fails_the_run_goes_on_uncompiled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = curve(bench.run("eager", train__max_steps=3))
    broken_backend(monkeypatch)
    assert sft.main([str(bench.file("r", train__compile="if_possible", train__max_steps=3))]) == 0
    told = capsys.readouterr().err
    assert "torch.compile fails on this machine" in told
    assert "Compiler: cl is not found" in told
    assert "continuing uncompiled, which is slower" in told
    assert "Traceback" not in told
    assert curve(bench.folder / "r") == pytest.approx(expected, rel=1e-5)


def test_a_run_that_must_be_compiled_is_refused_before_its_first_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_backend(monkeypatch)
    assert sft.main([str(bench.file("r", train__compile=True, train__max_steps=3))]) == 2
    told = capsys.readouterr().err
    assert "Add train.compile=false, or if_possible" in told
    assert "Traceback" not in told
    assert not (bench.folder / "r" / "metrics.jsonl").exists()


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler and Python.h")
def test_a_compiled_run_has_the_losses_of_an_eager_one(bench: Bench) -> None:
    eager = curve(bench.run("eager", train__max_steps=4))
    compiled = bench.run("compiled", train__compile=True, train__max_steps=4)
    assert curve(compiled) == pytest.approx(eager, rel=1e-4)
    assert result(compiled)["held_out_loss_after"] == pytest.approx(
        result(bench.folder / "eager")["held_out_loss_after"], rel=1e-4
    )
