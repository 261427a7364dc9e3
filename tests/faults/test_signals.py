"""Signals end a run with a checkpoint, a message and the exit code that a shell expects; a resumed run is as any other."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_chat import api, chat, stopping
from lowvram_chat.model.chat_session import ChatSession
from lowvram_chat.training.run_dir import RunDir
from tests.faults.processes import finished, start, steps_of, wait_until
from tests.integration.test_resume import weights
from tests.runs import Bench, curve

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that another process can send")
SETTINGS: dict[str, Any] = {"train__max_steps": 150, "train__save_steps": None}
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(scope="module")
def whole(session_bench: Bench) -> Path:
    """The folder of a run that no signal ended, in a process like theirs."""
    recipe = session_bench.file("not-signalled", **SETTINGS)
    assert finished(["sft", str(recipe)], session_bench.folder)[0] == 0
    return session_bench.folder / "not-signalled"


@pytest.mark.parametrize("name", CODES)
def test_a_signal_ends_a_run_after_a_checkpoint(name: str, whole: Path, bench: Bench) -> None:
    run = bench.folder / "r"
    process = start(["sft", str(bench.file("r", **SETTINGS))], bench.folder)
    wait_until(lambda: steps_of(run) > 5, process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == CODES[name], output
    assert "stopping after this step, with a checkpoint" in output
    assert "--resume continues from" in output
    assert "Traceback" not in output
    checkpoint = RunDir(run).last_checkpoint()
    assert checkpoint is not None
    assert (run / "report.html").is_file()
    step = int(checkpoint.name.rpartition("-")[2])
    assert steps_of(run) == step
    if name != "SIGTERM":
        return  # the checkpoint is the same
    assert finished(["sft", str(bench.folder / "r.yaml"), "--resume"], bench.folder)[0] == 0
    assert curve(run) == curve(whole)
    assert all(torch.equal(weights(run)[key], value) for key, value in weights(whole).items())


@pytest.fixture(autouse=True)
def signals_count() -> Iterator[None]:
    """Answer signals in this process too: where the tests run as a shell's background job, SIGINT is ignored."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_signal_ends_it_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []

    def twice(*_: object, **__: object) -> bool:
        answered.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return False

    monkeypatch.setattr(stopping, "requested", twice)
    with pytest.raises(stopping.Stopped) as stopped:
        api.train(bench.recipe("r"))
    assert stopped.value.exit_code == 130
    assert answered == [1]
    assert RunDir(bench.folder / "r").last_checkpoint() is None


@pytest.mark.parametrize("seconds", [0.5, 3.0])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_the_first_seconds_gives_no_traceback(name: str, seconds: float, bench: Bench) -> None:
    process = start(["sft", str(bench.file("r", train__max_steps=100_000))], bench.folder)
    time.sleep(seconds)
    process.send_signal(getattr(signal, name))
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in output
    assert process.returncode in (CODES[name], -getattr(signal, name))


def test_a_signal_whose_exception_was_swallowed_is_not_lost() -> None:
    with stopping.signals_answered():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(stopping.Stopped), stopping.deferred():
            pytest.fail("the work began")


class Finaliser:
    """An object during whose end a signal comes, where Python cannot raise."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # the handler runs here


def test_a_signal_in_a_finaliser_is_answered_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(stopping.Stopped), stopping.signals_answered():
        Finaliser()
        time.sleep(5)
    assert "Exception ignored" not in capsys.readouterr().err


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with pytest.raises(stopping.Stopped), stopping.signals_answered():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.signals_answered():
            os.kill(os.getpid(), signal.SIGHUP)  # as nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_ends_a_conversation_and_ctrl_c_an_answer(lora_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_to(number: int) -> int:
        def ask(*_: object) -> str:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            return ""

        texts = iter(["Hello", "/exit"])
        monkeypatch.setattr(ChatSession, "ask", ask)
        monkeypatch.setattr("builtins.input", lambda prompt: next(texts))
        return chat.main([str(lora_run)])

    assert answer_to(signal.SIGINT) == 0
    assert answer_to(signal.SIGTERM) == 143
