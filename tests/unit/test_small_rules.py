"""Small rules that larger tests did not notice when they were broken, each with the value that a mutant gets wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowvram_chat.data.encode import CHARACTERS_PER_TOKEN, Encoder
from lowvram_chat.data.formats import Conversation
from lowvram_chat.exporting.proof import Proof
from lowvram_chat.gpus import CONTEXT_MIB
from lowvram_chat.model.pretrained import load_tokenizer
from lowvram_chat.planning import prediction
from lowvram_chat.planning.allocator import CachingAllocator
from lowvram_chat.planning.replay import Replay, replay
from lowvram_chat.planning.runs import SHUFFLED_RUNS, composed_runs, traced_steps
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.results.compare import compare
from lowvram_chat.results.record import Machine, Metric, Record
from lowvram_chat.tracing.cuda_buffers import temporary_buffers
from lowvram_chat.tracing.recorder import Event
from lowvram_chat.tracing.run import trace_run
from lowvram_chat.training import budget
from lowvram_chat.units import MIB

aten = torch.ops.aten
TINY = Recipe.model_validate(
    {
        "model": {"name": "builtin:tiny-gpt2", "dropout": 0.0},
        "data": {"max_length": 64, "eval_fraction": 0.1},
        "train": {"per_device_train_batch_size": 2},
        "optimizer": {"name": "adamw"},
    }
)


def test_the_small_pool_cuts_off_remainders_of_half_a_kibibyte() -> None:
    card = CachingAllocator()
    for _ in range(4):
        card.malloc(MIB // 2)
    assert (card.reserved_bytes, card.allocated_bytes) == (2 * MIB, 2 * MIB)
    card = CachingAllocator()
    card.malloc(MIB)
    card.malloc(MIB - 512)
    assert card.allocated_bytes == 2 * MIB - 512
    card.malloc(512)
    assert card.reserved_bytes == 2 * MIB


@pytest.mark.parametrize(("old", "new"), [(0.10, 0.01), (0.01, 0.10)])
def test_a_change_is_noise_within_the_larger_of_two_tolerances(old: float, new: float) -> None:
    machine = Machine(name="m", platform="p", processor="x", threads=2)

    def record(value: float, tolerance: float) -> Record:
        rate = Metric(value=value, unit="tokens/s", kind="measured", better="higher", tolerance=tolerance)
        return Record(benchmark="b", case="c", machine=machine, metrics={"rate": rate})

    (difference,) = compare([record(100, old)], [record(95, new)])
    assert difference.verdict == "equal"


@pytest.mark.parametrize("limit_mib", [3000, 1000])
def test_the_process_cap_leaves_out_the_context(limit_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[float] = []
    card = SimpleNamespace(total_memory=4096 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share))
    recipe = Recipe.model_validate({"memory": {"limit_mib": limit_mib}})
    budget.cap_process_memory(recipe, torch.device("cuda"))
    assert caps == [pytest.approx((limit_mib - CONTEXT_MIB) / 4096)]


def test_a_text_that_is_cut_within_its_last_wanted_token_is_encoded_again() -> None:
    tokenizer = load_tokenizer("builtin:tiny-gpt2")
    keep = 20
    # One token of seven characters, then tokens of six: the cut after 6 x keep characters falls into token number `keep`.
    text = " little" + (CHARACTERS_PER_TOKEN * keep) * " there"
    expected = tokenizer(text, add_special_tokens=False)["input_ids"][:keep]
    assert tokenizer.convert_ids_to_tokens(expected) == ["Ġlittle"] + (keep - 1) * ["Ġthere"]
    ((tokens, _),) = Encoder(tokenizer, "all", keep)([Conversation(text=text)])
    assert tokens[:keep] == expected


@pytest.mark.parametrize(("length", "rows"), [(1, 128), (100, 128), (128, 128), (129, 256)])
def test_the_flash_backward_pass_pads_rows_to_128(length: int, rows: int) -> None:
    query = torch.empty(2, 3, length, 40, device="meta", dtype=torch.float16)
    backward = aten._scaled_dot_product_flash_attention_backward.default
    assert temporary_buffers(backward, (query, query, query, query)) == [4 * 2 * 3 * rows, 4 * 2 * 3 * rows * 64]


def test_a_plan_replays_a_resumed_run_whose_states_come_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace_run(TINY, prediction.card_rules(TINY), traced_steps(TINY))
    runs = list(composed_runs(traced))
    assert len(runs) == 2 + SHUFFLED_RUNS

    def first(events: list[Event], category: str) -> int:
        categories = [event.storage.category for event in events[traced.steps[0][0] :]]
        return categories.index(category)

    fresh, resumed = runs[0], runs[1]
    assert first(fresh, "optimizer state") > first(fresh, "batch")
    assert first(resumed, "optimizer state") < first(resumed, "batch")

    replayed: list[int] = []

    def counted(events: list[Event], limit_bytes: int | None = None) -> Replay:
        replayed.append(len(events))
        return replay(events, limit_bytes)

    monkeypatch.setattr(prediction, "replay", counted)
    prediction._cached_plan.cache_clear()
    prediction.make_plan(TINY)
    assert sorted(replayed) == sorted(map(len, runs))


@pytest.mark.parametrize(("difference", "holds"), [(9e-4, True), (1e-3, True), (2e-3, False), (5e-2, False)])
def test_a_merge_may_differ_by_a_thousandth_in_its_logits(difference: float, holds: bool) -> None:
    assert Proof(difference, 0.0, 1.0).holds(exact=True) is holds
    assert Proof(0.0, difference, 1.0).holds(exact=True) is holds
    assert Proof(0.0, difference, 1.0).holds(exact=False)
