"""Packed rows are never too long, lose nothing and keep documents apart; other ways to collate the same rows agree."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowvram_chat.data.packing import best_fit_decreasing, pack_rows
from lowvram_chat.data.rows import IGNORED_LABEL, Collator
from lowvram_chat.errors import ModelError
from lowvram_chat.model.document_attention import (
    DOCUMENT_ATTENTION,
    attention_implementation,
    document_attention,
)
from lowvram_chat.model.document_mask import use_attention_by_document
from lowvram_chat.model.isolation import check_causal, check_isolation, isolate_documents, isolates_documents
from lowvram_chat.model.loss import attach_loss

CAPACITY = 32
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120)


@given(LENGTHS)
def test_each_row_stands_in_one_bin_and_no_bin_is_too_full(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= CAPACITY for items in bins)


@given(LENGTHS)
def test_rows_are_packed_best_fit_decreasing(lengths: list[int]) -> None:
    # The simple quadratic algorithm: longest first, each into the fullest bin that still has room for it.
    spaces: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [number for number, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=spaces.__getitem__)] -= size
        else:
            spaces.append(CAPACITY - size)
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(CAPACITY - sum(lengths[item] for item in items) for items in bins) == sorted(spaces)


def rows(lengths: list[int]) -> datasets.Dataset:
    """Return rows whose tokens tell their row; the first label of each is ignored, as in `cut_to_length`."""
    ids = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    labels = [[IGNORED_LABEL, *tokens[1:]] for tokens in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": lengths})


def test_a_packed_row_is_its_documents_one_after_the_other() -> None:
    packed = pack_rows(rows([3, 7, 5, 2]), 10)
    assert [row["documents"] for row in packed] == [[7, 3], [5, 2]]
    assert list(packed["length"]) == [10, 7]
    assert packed[1]["input_ids"].tolist() == [200, 201, 202, 203, 204, 300, 301]
    batch = Collator(0, length=10)([packed[0], packed[1]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
    assert batch["real_tokens"] == 17
    # No token is predicted from another document's last one.
    flat = batch["input_ids"].flatten()
    assert all(flat[place + 1] == flat[place] + 1 for place in batch["loss_positions"].tolist())
    assert batch["loss_positions"].numel() == 17 - 4


def test_an_attention_mask_comes_only_where_asked_for() -> None:
    short = rows([3, 5])
    assert "attention_mask" not in Collator(0)(list(short))
    assert Collator(0, attention_mask=True)(list(short))["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_missing_rows_are_padding_that_carries_no_loss() -> None:
    few = list(pack_rows(rows([3, 7, 5]), 10))
    batch = Collator(9, length=10, rows=4)(few)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (4, 10)
    assert batch["input_ids"][2:].unique().tolist() == [9]
    assert batch["loss_positions"].tolist() == Collator(9, length=10)(few)["loss_positions"].tolist()
    assert batch["real_tokens"] == 15


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_give_the_same_batches(context: str) -> None:
    packed = pack_rows(rows([3, 7, 5, 2, 9, 4]), 10)
    collate = Collator(0, length=10)
    options: dict[str, Any] = {"batch_size": 2, "collate_fn": collate}
    here = list(DataLoader(packed, **options))
    there = list(DataLoader(packed, num_workers=1, multiprocessing_context=context, **options))
    assert [batch["input_ids"].tolist() for batch in here] == [batch["input_ids"].tolist() for batch in there]
    assert [batch["position_ids"].tolist() for batch in here] == [batch["position_ids"].tolist() for batch in there]


def test_packed_rows_and_their_collator_can_be_pickled() -> None:
    packed = pickle.loads(pickle.dumps(pack_rows(rows([3, 7]), 10)))
    assert pickle.loads(pickle.dumps(Collator(0)))([packed[0]])["input_ids"].shape == (1, 10)


def small(attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model: GPT2LMHeadModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager", DOCUMENT_ATTENTION])
def test_a_document_is_not_affected_by_its_neighbour(attention: str) -> None:
    model = small(attention).train()  # as in a training step; dropout is switched off below
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    attach_loss(model)
    positions = torch.cat([torch.arange(10), torch.arange(6)])[None]
    second_document = torch.arange(10, 15)  # positions that predict the second document's tokens

    def second_loss(neighbour: int) -> float:
        ids = torch.cat([torch.full((10,), neighbour), torch.arange(1, 7)])[None]
        output = model(input_ids=ids, labels=ids.clone(), loss_positions=second_document, position_ids=positions)
        return float(output["loss"])

    assert second_loss(3) == pytest.approx(second_loss(30), abs=1e-6)
    alone = torch.arange(1, 7)[None]
    assert second_loss(3) == pytest.approx(
        float(model(input_ids=alone, labels=alone.clone(), loss_positions=torch.arange(5))["loss"]), abs=1e-5
    )


def test_without_restarting_positions_its_neighbour_would_affect_it() -> None:
    model = small().eval()
    attach_loss(model)
    positions = torch.arange(10, 15)

    def loss(neighbour: int) -> float:
        ids = torch.cat([torch.full((10,), neighbour), torch.arange(1, 7)])[None]
        return float(model(input_ids=ids, labels=ids.clone(), loss_positions=positions)["loss"])

    assert abs(loss(3) - loss(30)) > 1e-3


def test_gpt2_isolates_documents_and_opt_is_refused() -> None:
    assert isolates_documents(small())
    opt = OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32
    )
    neo = GPTNeoConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    )
    verdicts = {
        config.model_type: isolates_documents(AutoModelForCausalLM.from_config(config)) for config in (opt, neo)
    }
    assert verdicts == {"opt": False, "gpt_neo": True}


def test_a_neighbour_with_a_tiny_effect_is_detected() -> None:
    # The states of an untrained model of width 32 differ by less than the rounding error of half precision.
    assert not isolates_documents(bert(decoder=True))


def llama() -> PreTrainedModel:
    """Return a Llama with two query heads per key head and rotary positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("make", [small, llama])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_by_document_is_attention_under_a_mask(
    make: Callable[[], PreTrainedModel], checkpointed: bool
) -> None:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([7, 1, 8], [16], [10, 6])])
    ids = torch.randint(1, 50, positions.shape, generator=torch.Generator().manual_seed(1))
    places = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
    losses, gradients = [], []
    for by_document in (False, True):
        model = make().eval()
        attach_loss(model)
        isolate_documents(model, torch.device("cpu"), "fp32", "cpu" if by_document else None)
        assert (attention_implementation(model.config) == DOCUMENT_ATTENTION) is by_document
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        loss = model(input_ids=ids, labels=ids, loss_positions=places, position_ids=positions)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_document_attention_uses_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[torch.Tensor | None] = []
    original: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    model = small()
    attach_loss(model)
    isolate_documents(model, torch.device("cpu"), "fp32", "cpu")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    ids = torch.arange(1, 17)[None]
    positions = torch.cat([torch.arange(10), torch.arange(6)])[None]
    model(input_ids=ids, labels=ids, loss_positions=torch.arange(5), position_ids=positions)
    assert masks == [None] * 4  # two documents in two layers


def test_a_model_with_a_sliding_window_keeps_its_mask() -> None:
    model = AutoModelForCausalLM.from_config(
        MistralConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=12,
        )
    )  # fmt: skip
    isolate_documents(model, torch.device("cpu"), "fp32", "cpu")
    assert attention_implementation(model.config) == "sdpa"


@pytest.mark.parametrize(
    "setting",
    [{"sliding_window": 12}, {"attention_chunk_size": 12}, {"layer_types": ["full_attention", "sliding_attention"]}],
)
def test_a_config_with_a_special_mask_is_not_switched_to_document_attention(setting: dict[str, Any]) -> None:
    model = small()
    vars(model.config).update(setting)
    assert not use_attention_by_document(model, DOCUMENT_ATTENTION)
    assert use_attention_by_document(small(), DOCUMENT_ATTENTION)


def test_a_model_whose_layers_are_not_given_the_documents_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_documents(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return document_attention(*args, **(kwargs | {"documents": None}))

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, DOCUMENT_ATTENTION, without_documents)
    model = small()
    isolate_documents(model, torch.device("cpu"), "fp32", "cpu")
    assert attention_implementation(model.config) == "sdpa"


def test_the_refusal_says_why_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram_chat.model.isolation.isolates_documents", lambda _: False)
    with pytest.raises(ModelError, match=r"gpt2 with sdpa attention lets packed conversations see each other.*grouped"):
        check_isolation(small(), torch.device("cpu"), "fp32")


@pytest.mark.parametrize(
    ("function", "check"), [("isolates_documents", check_isolation), ("sees_later_tokens", check_causal)]
)
def test_attention_that_does_not_run_is_refused(
    function: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> bool:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    monkeypatch.setattr(f"lowvram_chat.model.isolation.{function}", fails)
    with pytest.raises(
        ModelError, match=r"sdpa does not run on this machine \(FlashAttention only .* newer\)\. Set model.att.*=eager"
    ):
        check(small(), torch.device("cpu"), "fp32")


def bert(*, decoder: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        is_decoder=decoder,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("make", [small, llama, lambda: bert(decoder=True)])
def test_a_causal_model_sees_no_later_tokens(make: Callable[[], PreTrainedModel]) -> None:
    check_causal(make(), torch.device("cpu"), "fp32")


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tokens of this bert see later tokens .* not a causal language model"):
        check_causal(bert(decoder=False), torch.device("cpu"), "fp32")
