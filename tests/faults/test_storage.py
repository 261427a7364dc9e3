"""Full and read-only disks (real small file systems), damaged records, and processes that die while they make a run folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowvram_chat import api, files, merge, sft
from lowvram_chat.errors import UsageError
from lowvram_chat.training import new_run
from lowvram_chat.training.run_dir import RunDir
from tests.faults.processes import refused
from tests.integration.test_resume import weights
from tests.runs import Bench, curve
from tests.samples import ROOT

MIB = 1 << 20
SETTINGS = {"train__save_steps": 4, "train__max_steps": 12, "train__save_total_limit": 1}


def mounted(folder: Path, options: str) -> bool:
    """Mount a file system in memory; return whether that is possible here."""
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    return (
        bool(mount)
        and not subprocess.run(
            [str(mount), "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 200 MiB."""
    folder = tmp_path / "small"
    if not mounted(folder, "size=200m"):
        pytest.skip("needs the right to mount a file system (root on Linux)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for some bytes and return the file that does it."""
    file = disk / "filler"
    with file.open("wb") as out:
        for _ in range(shutil.disk_usage(disk).free - left >> 16):
            out.write(bytes(1 << 16))
    return file


def test_a_run_does_not_start_on_a_disk_that_is_too_small_for_it(
    small: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = fill(small, 4 * MIB)
    told = refused([str(bench.file("r", output__dir=str(small / "r")))], capsys, sft.main)
    assert "MiB are free. Free space" in told
    assert [*small.iterdir()] == [filler]


@pytest.mark.parametrize("when", ["before it is written", "while it is written"])
def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_last_one(
    when: str, small: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bench.run("whole", **SETTINGS)
    monkeypatch.setattr("lowvram_chat.training.save_check._check_space", lambda *_: None)
    recipe = bench.file("r", output__dir=str(small / "r"), **SETTINGS)
    one = sum(path.stat().st_size for path in next((whole / "checkpoints").iterdir()).rglob("*"))
    filler = fill(small, int(1.6 * one))
    with monkeypatch.context() as patch:
        if when == "while it is written":
            real = shutil.disk_usage
            patch.setattr(
                files.shutil,  # type: ignore[attr-defined]
                "disk_usage",
                lambda path: type(real(path))(1 << 40, 0, 1 << 40),
            )
        told = refused([str(recipe)], capsys, sft.main)
    assert "No space left on device. Free space" in told if when.startswith("while") else "Free at least" in told
    assert f"--resume continues from {small / 'r' / 'checkpoints' / 'checkpoint-4'}" in told
    assert [path.name for path in (small / "r" / "checkpoints").iterdir()] == ["checkpoint-4"]

    filler.unlink()
    assert sft.main([str(recipe), "--resume"]) == 0
    assert curve(small / "r") == curve(whole)
    assert all(torch.equal(weights(small / "r")[key], value) for key, value in weights(whole).items())


def test_a_disk_that_is_full_at_the_final_model_leaves_the_earlier_one(
    small: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = bench.file("r", output__dir=str(small / "r"), **SETTINGS)
    assert sft.main([str(recipe)]) == 0
    before = weights(small / "r")
    (small / "r" / "result.json").unlink()
    filler = fill(small, MIB)
    monkeypatch.setattr("lowvram_chat.training.save_check._check_space", lambda *_: None)
    told = refused([str(recipe), "--resume"], capsys, sft.main)
    assert "No space left on device" in told
    assert all(torch.equal(weights(small / "r")[key], value) for key, value in before.items())
    filler.unlink()
    assert sft.main([str(recipe), "--resume"]) == 0
    assert not [path for path in (small / "r").iterdir() if path.name.startswith(".")]


def test_a_merge_on_a_full_disk_leaves_nothing(small: Path, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    run = bench.run("r", adapter={})
    filler = fill(small, MIB)
    assert "No space left on device" in refused([str(run), "--out", str(small / "m")], capsys, merge.main)
    assert [*small.iterdir()] == [filler]


def test_a_read_only_disk_is_one_message(tmp_path: Path, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    if not mounted(tmp_path / "fixed", "size=1m,ro"):
        pytest.skip("needs the right to mount a file system (root on Linux)")
    try:
        told = refused([str(bench.file("r", output__dir=str(tmp_path / "fixed" / "r")))], capsys, sft.main)
        assert "Read-only file system" in told
        run = bench.run("a", adapter={})
        assert "read-only" in refused([str(run), "--out", str(tmp_path / "fixed" / "m")], capsys, merge.main).lower()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "fixed")], check=True)


RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "metrics.jsonl": lambda data: data + b'{"step": 5, "lo',
    "samples.json": lambda data: data[: len(data) // 2],
    "result.json": lambda data: b"",
    "report.html": lambda data: b"",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_does_not_stop_a_resume(name: str, bench: Bench) -> None:
    settings = {**SETTINGS, "train__save_total_limit": 9, "output__sample_prompts": ["hello"]}
    whole = bench.run("whole", **settings)
    run = bench.run("r", **settings)
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    file = run / name
    file.write_bytes(RECORDS[name](file.read_bytes()))
    if name != "result.json":
        (run / "result.json").unlink()
    api.train(bench.recipe("r", **settings), resume=True)
    assert curve(run) == curve(whole)
    assert json.loads((run / "result.json").read_text())["steps"] == 12


DEATHS = {
    "before its folder is made": ("Path.mkdir", None),
    "before its mark is written": ("Path.touch", None),
    "while it is checked": (None, "checkpoints"),
    "while it is described": ("new_run.write_json", "checkpoints"),
    "before its mark is removed": ("Path.unlink", "checkpoints"),
    "while the earlier run is deleted": ("new_run.discard", "checkpoints"),
}
DIE = """
import os, sys
from pathlib import Path
from lowvram_chat.recipe.yaml_file import load_recipe
from lowvram_chat.errors import UsageError
from lowvram_chat.training import new_run
recipe, where, content = load_recipe(sys.argv[1]), sys.argv[2], sys.argv[3]
def die(*_, **__):
    os._exit(9)
if where:
    owner, name = where.split(".")
    setattr({"Path": Path, "new_run": new_run}[owner], name, die)
with new_run.created(recipe, resume=False) as run:
    if content:
        os.mkdir(run.path / content)
    if not where:
        die()
os._exit(0)
"""


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize("moment", DEATHS)
def test_a_start_that_dies_leaves_a_folder_that_can_be_used(moment: str, earlier: bool, bench: Bench) -> None:
    if moment.endswith("deleted") and not earlier:
        pytest.skip("there is no earlier run to delete")
    recipe, run = bench.file("r"), bench.folder / "r"
    if earlier:
        run.mkdir()
        for name in ("recipe.yaml", "environment.json", "mine.txt"):
            (run / name).write_text("earlier")
    where, content = DEATHS[moment]
    died = subprocess.run(
        [sys.executable, "-c", DIE, str(recipe), where or "", content or ""],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert died.returncode == 9, died.stderr

    new_run.check_new(run, overwrite=True, resume=False)
    if earlier and not moment.endswith("deleted"):
        assert (run / "mine.txt").read_text() == "earlier"
    assert not [path.name for path in bench.folder.iterdir() if path.name.startswith(".")]
    api.train(bench.recipe("r"), overwrite=True)
    assert RunDir(run).result_file.is_file()


def test_a_file_that_appears_while_a_run_prepares_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench.folder / "r"

    def appear(*_: object) -> None:
        run.mkdir()
        (run / "thesis.txt").write_text("mine")

    monkeypatch.setattr("lowvram_chat.training.session.check_trackers", appear)
    with pytest.raises(UsageError, match="left alone"):
        api.train(bench.recipe("r"))
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]
