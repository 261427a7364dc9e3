"""Names that look like markup, and folders that are files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lowvram_chat import bench, files, plan
from lowvram_chat.errors import UsageError
from tests.samples import ROOT


@pytest.mark.parametrize("name", ["[bold]", "[-x]", ":smiley:"])
def test_a_name_like_markup_is_printed_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "recipes" / "quickstart.yaml", f"{name}.yaml")
    assert plan.main(["--compare", f"{name}.yaml", f"{name}.yaml"]) == 0
    assert name in capsys.readouterr().out


def test_a_result_with_markup_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = min((ROOT / "benchmarks" / "results").rglob("planner/*.json"))
    record = json.loads(stored.read_text(encoding="utf-8")) | {"case": "[/red] case"}
    file = tmp_path / "result.json"
    file.write_text(json.dumps(record), encoding="utf-8")
    assert bench.main(["report", str(file)]) == 0
    assert "[/red]" in capsys.readouterr().out


def test_the_cache_folder_may_be_empty_or_begin_with_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", "")
    assert files.cache_folder() == Path.home() / ".cache" / "huggingface" / "lowvram_chat"
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", "~/rows")
    assert files.cache_folder() == Path.home() / "rows"
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWVRAM_CHAT_CACHE", str(tmp_path / "file" / "rows"))
    with pytest.raises(UsageError, match=r"is a file\. Set LOWVRAM_CHAT_CACHE to a folder"):
        files.cache_folder()
