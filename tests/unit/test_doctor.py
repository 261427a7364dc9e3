"""doctor names both versions where a driver is too old, and the exact command for the right build of torch."""

from __future__ import annotations

import re
import sys
from importlib import metadata

import pytest
import torch

from lowvram_chat import doctor, nvidia_smi
from lowvram_chat.cuda_wheels import TORCH, wheel_for
from tests.samples import ROOT


def machine(
    monkeypatch: pytest.MonkeyPatch,
    card: str,
    *,
    capability: str = "8.6",
    driver: str = "581.15",
    cuda: str | None = "13.0",
) -> None:
    """Pretend a driver that nvidia-smi describes, and a build of torch that cannot use it."""
    line = f"{card}, 4096, 3900, {capability}, [N/A], 60.00, {driver}"
    monkeypatch.setattr(nvidia_smi, "query", lambda what: [line] if what.startswith("--query-gpu") else [])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_named_torch_is_the_pinned_one() -> None:
    assert f"torch=={TORCH}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("driver", "capability", "index"),
    [
        ("581.15", 8.6, "cu130"),
        ("551.23", 8.6, "cu126"),
        ("581.15", 6.1, "cu126"),  # a GTX 1060: CUDA 13 has no kernels for it
        ("528.33", None, "cu126"),
        ("472.12", 7.5, None),
        ("unknown", 7.5, "cu130"),
    ],
)
def test_the_build_fits_driver_and_card(driver: str, capability: float | None, index: str | None) -> None:
    wheel = wheel_for(driver, capability)
    assert (wheel and wheel.index) == index


def test_a_driver_that_is_too_old_is_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA GeForce RTX 3050 Laptop GPU", driver="551.23")
    finding = doctor.gpu()
    assert not finding.good
    assert "driver 551.23" in finding.found
    assert "torch is built for CUDA 13.0, which needs driver 580 or newer" in finding.found
    assert f"torch=={TORCH} --index-url https://download.pytorch.org/whl/cu126" in finding.advice
    assert "Update the driver to 580" in finding.advice


def test_a_cpu_build_beside_a_card_gets_the_command_for_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA GeForce RTX 3050 Laptop GPU", cuda=None)
    monkeypatch.setattr("sys.platform", "win32")
    for finding in (doctor.torch_build(), doctor.gpu()):
        assert not finding.good
        assert finding.advice.startswith("Run .venv\\Scripts\\python -m pip install --force-reinstall torch==")
        assert finding.advice.endswith("/cu130")


def test_a_driver_that_no_build_runs_with_must_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA GeForce GTX 1650", capability="7.5", driver="472.12", cuda=None)
    assert "too old for every build" in doctor.torch_build().advice


def test_the_readme_installs_cuda_on_windows_first() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"pip install .*", readme[readme.index("## Install") :])
    assert commands[0] == f"pip install torch=={TORCH} --index-url https://download.pytorch.org/whl/cu130"
    assert commands[1].startswith("pip install -c constraints.txt -e .")


def test_a_library_outside_the_tested_versions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.libraries().good
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.11.0+cu130" if name == "torch" else version(name))
    finding = doctor.libraries()
    assert not finding.good
    assert "Untested: torch 2.11.0+cu130 (needs " in finding.advice
    assert ">=2.13" in finding.advice
    assert "transformers" not in finding.advice
    assert "pip install -c constraints.txt" in finding.advice


def test_doctor_runs_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "packaging"]:
        monkeypatch.setitem(sys.modules, name, None)
    finding = doctor._run_check(doctor.libraries)
    assert not finding.good
    assert "packaging" in finding.found
