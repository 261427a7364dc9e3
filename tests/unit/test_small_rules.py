"""Small rules that larger tests did not notice when they were broken, each with the value that a mutant gets wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from lowvram_chat import api
from lowvram_chat.data.encode import CHARACTERS_PER_TOKEN, Encoder
from lowvram_chat.data.render import Rendered
from lowvram_chat.data.rows import Collator
from lowvram_chat.exporting.proof import Proof
from lowvram_chat.gpus import CONTEXT_MIB
from lowvram_chat.model.loss import attach_loss
from lowvram_chat.model.pretrained import load_model, load_tokenizer
from lowvram_chat.planning import prediction, search
from lowvram_chat.planning.allocator import CachingAllocator
from lowvram_chat.planning.changes import apply_change, lighter_optimizers
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.replay import Replay, live_storages_at, replay
from lowvram_chat.planning.runs import SHUFFLED_RUNS, composed_runs, traced_steps
from lowvram_chat.planning.schedule import Lifetimes, Segment, compose_run
from lowvram_chat.planning.search import Planner, fastest, planned_micro_batch
from lowvram_chat.recipe.schema import Model, Recipe
from lowvram_chat.results.compare import compare
from lowvram_chat.results.record import Machine, Metric, Record
from lowvram_chat.tracing.cuda_buffers import temporary_buffers
from lowvram_chat.tracing.recorder import Event, Storage
from lowvram_chat.tracing.run import trace_run
from lowvram_chat.training import budget
from lowvram_chat.training.callbacks import MetricsCallback, TokenCounts
from lowvram_chat.training.checkpoint_fingerprint import CheckpointFingerprint
from lowvram_chat.training.finite import FiniteGuard
from lowvram_chat.training.preflight import run_longest_batch
from lowvram_chat.training.run_dir import RunDir
from lowvram_chat.training.trainer import ChatTrainer, GroupedSampler
from lowvram_chat.units import MIB

if TYPE_CHECKING:
    import datasets

aten = torch.ops.aten
TINY = Recipe.model_validate(
    {
        "model": {"name": "builtin:tiny-gpt2", "dropout": 0.0},
        "data": {"max_length": 64, "eval_fraction": 0.1},
        "train": {"per_device_train_batch_size": 2},
        "optimizer": {"name": "adamw"},
    }
)


def storages(*sizes: int) -> list[Storage]:
    return [Storage(nbytes, "forward", "by hand", "", "forward") for nbytes in sizes]


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
    card = SimpleNamespace(name="RTX 3050 Laptop", major=8, minor=6, total_memory=4096 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3800 * MIB, 4096 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
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
    ((tokens, *_),) = Encoder(tokenizer, keep)([Rendered(text)])
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


def test_what_is_live_at_a_peak_includes_the_storage_that_makes_it() -> None:
    first, second = storages(1024, 2048)
    events = [Event(first, True), Event(second, True), Event(first, False)]
    assert live_storages_at(events, replay(events).peak_at) == [first, second]


def test_the_reserved_peak_stays_after_the_cache_is_released() -> None:
    two, three, large = storages(30 * MIB, 30 * MIB, 40 * MIB)
    events = [Event(two, True), Event(three, True), Event(two, False), Event(three, False), Event(large, True)]
    assert replay(events, limit_bytes=64 * MIB).peak_reserved_bytes == 60 * MIB


def test_a_step_frees_what_the_step_before_handed_on_and_not_another_storage() -> None:
    batch, loss, next_batch, next_loss = storages(1024, 4, 1024, 4)
    start = [Event(batch, True), Event(loss, True)]
    step = [Event(next_batch, True), Event(loss, False), Event(batch, False), Event(next_loss, True)]
    segment = Segment([*start, *step], (2, 6), Lifetimes([*start, *step]), steady=True)
    run = compose_run(start, [batch, loss], [segment, segment])
    sizes = [(event.storage.nbytes, event.is_allocation) for event in run]
    assert sizes[2:6] == sizes[6:] == [(event.storage.nbytes, event.is_allocation) for event in step]


@pytest.mark.parametrize(("spare_mib", "rows"), [(50, 2), (49, 1)])
def test_a_planned_micro_batch_leaves_fifty_mib_free(spare_mib: int, rows: int) -> None:
    train = {"per_device_train_batch_size": 4, "micro_batch": "planned"}

    def plan(recipe: Recipe) -> Plan:
        spare = {4: -100, 2: spare_mib, 1: 200}[recipe.train.per_device_train_batch_size]
        return cast("Plan", SimpleNamespace(fits=spare >= 0, spare_bytes=spare * MIB))

    change = planned_micro_batch(Recipe.model_validate({"train": train}), plan)
    assert change["train.per_device_train_batch_size"] == rows


def test_a_suggestion_costs_the_extra_time_of_the_same_tokens() -> None:
    planned = cast("Plan", SimpleNamespace(fits=True, spare_bytes=100 * MIB, on_card_bytes=0))
    planner = Planner(
        plan=lambda _: planned, tokens_per_second=lambda recipe, _: 75 if recipe.train.gradient_checkpointing else 100
    )
    kept, *_, checkpointed = fastest(TINY, planner)
    assert [kept.cost, checkpointed.cost] == pytest.approx([0, 1 / 3])


def test_a_resumed_run_continues_to_count_its_seconds(tmp_path: Path) -> None:
    counts, state = TokenCounts(seconds=100.0), TrainerState(max_steps=2)
    metrics = MetricsCallback(RunDir(tmp_path), counts, CheckpointFingerprint("", "", "", "", ""), FiniteGuard(TINY))
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    metrics.on_train_begin(arguments, state, control)
    metrics.on_step_end(arguments, state, control)
    metrics.on_train_end(arguments, state, control)
    assert 100 < counts.seconds < 110


def test_each_epoch_has_an_order_of_its_own_that_a_resumed_run_finds_again() -> None:
    arguments = SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=1, data_seed=3, use_cpu=True)
    sampler = GroupedSampler(arguments, [*range(1, 41)])
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    resumed = GroupedSampler(arguments, [*range(1, 41)])
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_running_the_longest_batch_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = load_model(Model(name="builtin:tiny-gpt2", dropout=0.5)).eval()
    attach_loss(model)
    rows = [{"input_ids": [1, 2, 3, 4, 5][:length], "labels": [-100, 2, 3, 4, 5][:length]} for length in (3, 5, 4)]
    state = torch.get_rng_state()
    assert run_longest_batch(model, cast("datasets.Dataset", rows), Collator(0), 2, "fp32") == 5
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_plan_and_a_search_from_python_are_of_the_micro_batch_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "planned_micro_batch", lambda *_: {"train.per_device_train_batch_size": 7})
    monkeypatch.setattr(prediction, "make_plan", lambda recipe: recipe)
    for name in ("advise", "fastest"):
        monkeypatch.setattr(search, name, lambda recipe, _: recipe)
    for planned in (api.plan(TINY), api.search(TINY), api.search(TINY, goal="speed")):
        assert cast("Recipe", planned).train.per_device_train_batch_size == 7


def test_a_run_fits_only_if_it_does_in_every_order_of_its_batches() -> None:
    runs = [[Event(storage, True)] for storage in storages(30 * MIB, 90 * MIB)]
    assert prediction._Runs(runs).fit(90 * MIB)
    assert not prediction._Runs(runs).fit(64 * MIB)


def test_a_limit_holds_the_context_too() -> None:
    on_card = prediction.make_plan(TINY).on_card_bytes

    def fits(limit_mib: int) -> bool:
        return prediction.make_plan(apply_change(TINY, {"memory.limit_mib": limit_mib})).fits

    assert fits(-(-on_card // MIB))
    assert not fits(on_card // MIB - CONTEXT_MIB // 2)


def test_an_attention_mask_is_planned_for() -> None:
    masked = apply_change(TINY, {"data.attention_mask": True})
    assert prediction.make_plan(masked).peak_allocated_bytes > prediction.make_plan(TINY).peak_allocated_bytes


def test_the_loss_of_one_process_makes_up_for_the_average_over_two() -> None:
    trainer = SimpleNamespace(
        counts=TokenCounts(), guard=FiniteGuard(TINY), accelerator=SimpleNamespace(num_processes=2)
    )
    inputs = {"real_tokens": torch.tensor(3), "input_ids": torch.tensor([[1, 2, 3, 0]])}
    loss = ChatTrainer.compute_loss(
        cast("ChatTrainer", trainer),
        cast("torch.nn.Module", lambda **_: {"loss": torch.tensor(6.0)}),
        inputs,
        num_items_in_batch=4,
    )
    assert loss.item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "lighter"),
    [
        ("adamw_unfused", ["adamw", "adamw_8bit", "paged_adamw_8bit"]),
        ("adamw", ["adamw_8bit", "paged_adamw_8bit"]),
        ("adamw_8bit", ["paged_adamw_8bit"]),
        ("sgd", []),
    ],
)
def test_the_optimizers_advised_have_smaller_states(name: str, lighter: list[str]) -> None:
    recipe = apply_change(TINY, {"optimizer.name": name})
    assert lighter_optimizers(recipe) == [{"optimizer.name": other} for other in lighter]
