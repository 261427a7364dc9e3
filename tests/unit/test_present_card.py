"""The card of this machine: what nvidia-smi says of it, what is free on it, and what a recipe is planned for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowvram_chat import nvidia_smi
from lowvram_chat import plan as plan_command
from lowvram_chat.errors import DeviceError, RecipeError
from lowvram_chat.gpus import GPUS
from lowvram_chat.model.present_card import for_this_machine, for_this_run
from lowvram_chat.planning import changes, prediction
from lowvram_chat.planning import plan as plan_module
from lowvram_chat.planning.prediction import make_plan
from lowvram_chat.recipe import card as card_module
from lowvram_chat.recipe.card import card_of, limits_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.recipe.yaml_file import build_recipe
from lowvram_chat.units import MIB
from tests.runs import Bench

GTX_1650 = "NVIDIA GeForce GTX 1650, 4096, 3412, 7.5, [N/A], 50.00, 581.15"
LAPTOP_3050 = "NVIDIA GeForce RTX 3050 Laptop GPU, 4096, 3950, 8.6, [N/A], 60.00, 581.15"
UNKNOWN = "NVIDIA RTX 9050, 8151, 7900, 15.2, 75.00, 90.00, 700.10"


@pytest.fixture(autouse=True)
def no_other_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def driver(monkeypatch: pytest.MonkeyPatch, *cards: str, programs: tuple[str, ...] = ()) -> None:
    """Let nvidia-smi answer with these cards and programs."""

    def query(what: str) -> list[str]:
        return list(cards) if what.startswith("--query-gpu") else list(programs)

    monkeypatch.setattr(nvidia_smi, "query", query)


def recipe(**memory: Any) -> Recipe:
    return build_recipe({"model": {"name": "builtin:tiny-gpt2"}, "memory": memory}, (), "test")


def test_a_line_of_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, GTX_1650)
    card = nvidia_smi.visible_card()
    assert card is not None
    assert (card.name, card.memory_mib, card.free_mib) == ("NVIDIA GeForce GTX 1650", 4096, 3412)
    assert (card.compute_capability, card.watts, card.driver) == (7.5, 50.0, "581.15")


@pytest.mark.parametrize(
    ("visible", "name"), [("1", "NVIDIA RTX 9050"), ("", None), ("-1", None), ("GPU-1b2c", "NVIDIA GeForce GTX 1650")]
)
def test_hidden_cards_are_not_planned_for(visible: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, GTX_1650, UNKNOWN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = nvidia_smi.visible_card()
    assert (card and card.name) == name


def test_a_machine_without_a_driver_plans_for_the_default_card(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch)
    assert for_this_machine(recipe()) == recipe()
    assert card_of(recipe().memory) is GPUS["rtx-3050-laptop-4gb"]
    assert set(limits_of(recipe().memory)) == {"linux", "windows"}


def test_auto_is_the_card_with_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, GTX_1650)
    found = for_this_machine(recipe())
    assert set(limits_of(found.memory).values()) == {3412 * MIB}
    card = card_of(found.memory)
    assert (card.compute_capability, card.tensor_cores) == ((7, 5), False)
    assert card.fp16_tflops  # from the row of the table


def test_a_card_that_drives_a_desktop_is_not_told_that_a_run_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    need = make_plan(recipe()).on_card_bytes // MIB
    driver(monkeypatch, GTX_1650.replace("3412", str(need * 3 // 4)))
    assert not make_plan(for_this_machine(recipe())).fits
    driver(monkeypatch, GTX_1650.replace("3412", str(need + 5)))
    assert make_plan(for_this_machine(recipe())).fits


def test_a_named_or_described_card_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, GTX_1650)
    for given in (recipe(gpu="t4-16gb"), recipe(card={"memory_mib": 8192, "compute_capability": 8.9})):
        assert for_this_machine(given) == given


def test_a_card_of_unknown_rates_is_planned_without_a_speed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(monkeypatch, UNKNOWN, programs=("C:\\Windows\\explorer.exe", "[Insufficient Permissions]"))
    assert plan_command.main([str(bench.file("r"))]) == 0
    printed = capsys.readouterr()
    assert (
        "planned for this machine's card: NVIDIA RTX 9050, 8,151 MiB, of which 7,900 MiB can be used now" in printed.err
    )
    assert "(explorer.exe)" in printed.err
    assert "fits on NVIDIA RTX 9050" in printed.out
    assert "no speed is predicted for NVIDIA RTX 9050" in printed.out


def test_a_described_card_has_the_rates_it_gives(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    card = {"name": "My card", "memory_mib": 2048, "compute_capability": 7.5, "watts": 30}
    rates = {"fp16_tflops": 4.0, "gb_per_second": 80.0, "tensor_cores": False}
    assert plan_command.main([str(bench.file("r", memory={"card": card | rates}))]) == 0
    printed = capsys.readouterr().out
    assert "fits on My card, Linux (1,986 MiB usable)" in printed
    assert "fits on My card, Windows (1,945 MiB usable)" in printed
    assert "  30 W: " in printed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"memory": {"gpu": "gtx-1060-3gb"}, "train": {"precision": "bf16"}}, "bf16 needs compute capability 8.0"),
        ({"memory": {"gpu": "t4-16gb"}, "model": {"attention": "flash_attention_2"}}, "needs compute capability 8.0"),
        (
            {"model": {"attention": "kernels-community/flash-attn2"}, "train": {"precision": "fp32"}},
            "half precision only",
        ),
        (
            {"memory": {"card": {"memory_mib": 100, "usable_mib": 999, "compute_capability": 8.6}}},
            "is more than memory_mib",
        ),
        ({"memory": {"card": {"memory_mib": 100, "name": "", "compute_capability": 8.6}}}, "at least 1 character"),
    ],
)
def test_a_card_that_cannot_do_it_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Recipe.model_validate({"train": {"precision": "fp16"}} | settings)


def test_the_card_of_this_machine_that_cannot_do_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, GTX_1650)
    with pytest.raises(DeviceError, match=r"bf16 needs compute capability 8\.0, and .*GTX 1650 has 7\.5"):
        for_this_machine(Recipe.model_validate({"train": {"precision": "bf16"}}))


def test_a_card_both_named_and_described_is_refused() -> None:
    with pytest.raises(RecipeError, match="memory: gpu and card exclude each other"):
        recipe(gpu="t4-16gb", card={"memory_mib": 8192, "compute_capability": 8.9})


def cuda(monkeypatch: pytest.MonkeyPatch, name: str, *, total: int, free: int, held: int = 0) -> torch.device:
    """Pretend a CUDA device with so many MiB, of which so many are free and this process's allocator holds so many."""
    properties = SimpleNamespace(name=name, major=8, minor=6, total_memory=total * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free * MIB, total * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: held * MIB)
    return torch.device("cuda", 0)


def test_a_run_may_use_what_is_free_and_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver(monkeypatch, LAPTOP_3050, programs=("chrome.exe", "Code.exe", "chrome.exe"))
    device = cuda(monkeypatch, "NVIDIA GeForce RTX 3050 Laptop GPU", total=4096, free=2500, held=200)
    caplog.set_level("INFO")
    planned = for_this_run(recipe(), device)
    assert limits_of(planned.memory) == {"linux": (2500 + 200 + 300) * MIB}
    assert "other programs use 973 of 4,096 MiB (Code.exe, chrome.exe), which leaves 3,000 MiB" in caplog.text
    assert "Close them to have more." in caplog.text


def test_a_named_card_and_a_limit_bound_a_run_on_a_larger_card(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch)
    device = cuda(monkeypatch, "NVIDIA GeForce RTX 3090", total=24576, free=24000)
    assert limits_of(for_this_run(recipe(gpu="rtx-3050-laptop-4gb"), device).memory)["linux"] == 3891 * MIB
    assert limits_of(for_this_run(recipe(limit_mib=2000), device).memory)["linux"] == 2000 * MIB
    assert limits_of(for_this_run(recipe(), device).memory)["linux"] == int(0.97 * 24576) * MIB


def test_on_windows_paged_states_stay_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = build_recipe({"model": {"name": "gpt2"}, "optimizer": {"name": "paged_adamw_8bit"}}, (), "test")
    plan = make_plan(paged)
    on_linux = plan.on_card_bytes
    assert plan.paged_bytes > 100 * MIB
    assert plan.on_card_bytes_on("windows") - on_linux == plan.paged_bytes
    given = paged.model_copy(update={"optimizer": paged.optimizer.model_copy(update={"name": "adamw_8bit"})})
    assert changes.lighter_optimizers(given)
    for module in (changes, plan_module, prediction, card_module):
        monkeypatch.setattr(module, "this_system", lambda: "windows")
    prediction._cached_plan.cache_clear()
    on_windows = make_plan(paged)
    prediction._cached_plan.cache_clear()
    assert on_windows.on_card_bytes == on_linux + plan.paged_bytes
    assert sum(on_windows.categories.values()) == on_windows.on_card_bytes
    assert not changes.lighter_optimizers(given)
