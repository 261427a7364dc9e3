"""A compiled run has the losses of an eager one, and where compiling fails, `if_possible` runs eagerly."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from transformers import GPT2Config, GPT2LMHeadModel

from lowvram_chat import sft
from lowvram_chat.model.compilation import compile_blocks, missing_compiler
from tests.runs import Bench, curve, result


def broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compiling fail at the first call, as without cl.exe, in a folder with a long name, or with an old Triton."""
    from lowvram_chat.training import model_setup
    from lowvram_chat.training import session as session_module

    def failing(*_: object) -> None:
        raise RuntimeError("Compiler: cl is not found.")

    torch.compiler.reset()  # earlier tests may have reached the limit of recompilations, past which torch runs eagerly
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


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler and Python.h")
def test_a_later_model_in_the_same_process_is_compiled_too() -> None:
    config = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with config, torch.no_grad():
        for width in (32, 64):
            model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=width, vocab_size=64, n_positions=16))
            compile_blocks(model)
            model(torch.zeros(1, 8, dtype=torch.int64))  # raises where the second model is not compiled
