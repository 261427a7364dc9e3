"""Damaged checkpoints, and runs that are killed while they write one: the newest whole checkpoint is taken, and said."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram_chat import api, sft
from lowvram_chat.errors import NotFoundError
from lowvram_chat.training import checkpoints, trainer
from lowvram_chat.training.run_dir import RunDir
from tests.faults.processes import start, steps_of, wait_until
from tests.integration.test_resume import weights
from tests.runs import Bench, curve

SETTINGS: dict[str, Any] = {"train__save_steps": 3, "train__max_steps": 8, "train__save_total_limit": 9}
FILES = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "token_counts.json", "model.safetensors", "trainer_state.json"),
    *("manifest.json", "lowvram_chat_fingerprint.json"),
)


def flipped(data: bytes) -> bytes:
    """Return the data with one bit of its middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "missing": None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flipped,
    "zeros": lambda data: bytes(len(data)),
}


def damage(file: Path, how: str) -> None:
    """Damage a file."""
    change = DAMAGES[how]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


@pytest.fixture(scope="module")
def finished(session_bench: Bench) -> Path:
    """A finished run with checkpoints of the steps 3, 6 and 8."""
    return session_bench.run("checkpoints", **SETTINGS)


def unfinished(finished: Path, bench: Bench) -> Path:
    """Return a copy of the run that ended in step 7."""
    run = bench.folder / "r"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    (run / "result.json").unlink()
    return run


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES for how in DAMAGES if (name, how) != ("manifest.json", "missing")],
)
def test_the_newest_whole_checkpoint_is_taken_and_said(
    name: str, how: str, finished: Path, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    run = unfinished(finished, bench)
    damage(run / "checkpoints" / "checkpoint-6" / name, how)
    caplog.set_level(logging.INFO, "lowvram_chat")
    api.train(bench.recipe("r", **SETTINGS), resume=True)
    [said] = [line for line in caplog.messages if "so it is not used" in line]
    assert "checkpoint-6: " in said
    assert name in said or name == "manifest.json"  # its digests are of the other files
    assert f"resuming from {run / 'checkpoints' / 'checkpoint-3'}" in caplog.text
    assert curve(run) == curve(finished)
    assert all(torch.equal(weights(run)[key], value) for key, value in weights(finished).items())


def test_without_a_whole_checkpoint_nothing_is_changed(
    finished: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(finished, bench)
    damage(run / "checkpoints" / "checkpoint-3" / "optimizer.pt", "cut")
    damage(run / "checkpoints" / "checkpoint-6" / "model.safetensors", "flipped")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert sft.main([str(bench.file("r", **SETTINGS)), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-6: model.safetensors has other content than when it was written" in error
    assert "checkpoint-3: optimizer.pt has" in error
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_checkpoints_go_by_their_step_and_not_by_their_date(bench: Bench) -> None:
    settings = SETTINGS | {"train__save_total_limit": 2, "train__max_steps": 6}
    run = bench.run("r", **settings)
    os.utime(run / "checkpoints" / "checkpoint-3", (2**31, 2**31))
    api.train(bench.recipe("r", **settings | {"train__max_steps": 9}), resume=True)
    assert [folder.name for folder in checkpoints.numbered(run / "checkpoints")] == ["checkpoint-6", "checkpoint-9"]


def test_the_damaged_checkpoint_of_a_later_step_does_not_push_out_a_whole_one(bench: Bench) -> None:
    run = bench.run("r", **SETTINGS | {"train__max_steps": 9})
    for step in (6, 9):
        damage(run / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt", "cut")
    (run / "result.json").unlink()
    api.train(
        bench.recipe("r", **SETTINGS | {"train__max_steps": 6, "train__save_total_limit": 1}),
        resume=True,
    )
    assert [folder.name for folder in checkpoints.numbered(run / "checkpoints")] == ["checkpoint-6"]
    assert RunDir(run).last_checkpoint() is not None


MOMENTS = {
    "before it is sealed": (trainer, "seal"),
    "before it is moved": (trainer, "put_in_place"),
    "before the older one is deleted": (checkpoints, "_delete"),
    "while the older one is deleted": (checkpoints, "discard"),
    "while the manifest is written": (checkpoints, "write_json"),
    "while an older one is replaced": (checkpoints, "replace_folder"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_dies_while_it_writes_a_checkpoint_can_be_resumed(
    moment: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"train__save_total_limit": 1}
    whole = bench.run("whole", **settings)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    module, name = MOMENTS[moment]
    calls: list[int] = []
    original = getattr(module, name)

    def second(*arguments: Any) -> Any:
        calls.append(1)
        return die() if len(calls) == 2 or moment.endswith("deleted") else original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, second)
        with pytest.raises(KeyboardInterrupt):
            api.train(bench.recipe("r", **settings))
    run = bench.folder / "r"
    assert RunDir(run).last_checkpoint() is not None
    api.train(bench.recipe("r", **settings), resume=True)
    assert curve(run) == curve(whole)
    assert all(torch.equal(weights(run)[key], value) for key, value in weights(whole).items())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-8"]


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(bench: Bench) -> None:
    settings = {"train__save_steps": 2, "train__max_steps": 60, "train__save_total_limit": 1, "adapter": {}}
    whole = bench.run("whole", **settings)
    run, recipe = bench.folder / "r", bench.file("r", **settings)
    for step in (10, 30):
        process = start(["sft", str(recipe), *(["--resume"] if step > 10 else [])], bench.folder)
        wait_until(lambda step=step: bool(steps_of(run) >= step), process)  # type: ignore[misc]
        process.kill()
        process.communicate()
    api.train(bench.recipe("r", **settings), resume=True)
    assert curve(run) == curve(whole)
    assert all(torch.equal(weights(run)[key], value) for key, value in weights(whole).items())


def test_a_checkpoint_of_an_earlier_version_is_resumed(
    finished: Path, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    run = unfinished(finished, bench)
    for folder in checkpoints.numbered(run / "checkpoints"):
        (folder / "manifest.json").unlink()
    damage(run / "checkpoints" / "checkpoint-6" / "scheduler.pt", "cut")
    api.train(bench.recipe("r", **SETTINGS), resume=True)
    assert "has no manifest.json, so only the lengths of its files were checked" in caplog.text
    assert curve(run) == curve(finished)


def test_a_run_folder_without_checkpoints_says_so(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="no whole checkpoint"):
        api.train(bench.recipe("r"), resume=True)
