"""Tokens and labels are those of the tokenizer's own chat template, whether or not the text was cut first."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from lowvram_chat.data import encode as encode_module
from lowvram_chat.data.conversation import Conversation
from lowvram_chat.data.encode import Encoder
from lowvram_chat.data.render import Rendered, Renderer
from lowvram_chat.data.rows import IGNORED_LABEL
from lowvram_chat.data.template import set_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = [
    "hello",
    "world,",
    "don't",
    "42",
    "  two spaces",
    "\nline",
    "naïve",
    "emoji 🙂",
    "A.B.C.",
    "x" * 30,
    "\t",
    "?!",
]


def conversation(seed: int, words: int) -> Conversation:
    """Return a conversation of difficult text; every fifth message is long."""
    choose = random.Random(seed)
    messages = []
    for number in range(2 * choose.randint(1, 4)):
        text = " ".join(choose.choice(WORDS) for _ in range(choose.randint(1, words * (1 + 4 * (number % 5 == 0)))))
        messages.append({"role": ("user", "assistant")[number % 2], "content": text.strip() or "-"})
    return Conversation(messages=tuple(messages))


def rendered(
    talks: list[Conversation], tokenizer: PreTrainedTokenizerBase, loss_on: str = "assistant"
) -> list[Rendered]:
    return [*map(Renderer(tokenizer, loss_on), talks)]


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_tokens_and_labels_are_those_of_the_template(loss_on: str, tokenizer: PreTrainedTokenizerBase) -> None:
    set_template(tokenizer, "plain", loss_on)
    talks = [conversation(seed, 20) for seed in range(40)]
    encoded = Encoder(tokenizer, None)(rendered(talks, tokenizer, loss_on))
    for talk, (ids, labels, _) in zip(talks, encoded, strict=True):
        expected = tokenizer.apply_chat_template(
            list(talk.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=loss_on == "assistant"
        )
        assert isinstance(expected, BatchEncoding)
        assert ids == expected["input_ids"]
        marks = expected["assistant_masks"] if loss_on == "assistant" else [1] * len(ids)
        assert labels == [token if mark else IGNORED_LABEL for token, mark in zip(ids, marks, strict=True)]


@pytest.mark.parametrize("keep", [8, 33, 100])
def test_a_text_that_is_cut_first_gives_the_same_head(
    keep: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "CONVERSATIONS_PER_BATCH", 16)
    set_template(tokenizer, "plain", "assistant")
    talks = rendered([conversation(seed, 60) for seed in range(100)], tokenizer)
    whole = list(Encoder(tokenizer, None)(talks))
    heads = list(Encoder(tokenizer, keep)(talks))
    assert any(len(cut[0]) < len(full[0]) for cut, full in zip(heads, whole, strict=True))
    for (ids, labels, cut), (all_ids, all_labels, _) in zip(heads, whole, strict=True):
        assert ids[:keep] == all_ids[:keep]
        assert labels[:keep] == all_labels[:keep]
        assert (cut > 0) == (len(all_ids) > keep)
        assert len(ids) >= min(len(all_ids), keep + 1)  # so that a conversation over the length is counted as one


@pytest.mark.parametrize(
    ("words", "is_cut"),
    [
        (pre_tokenizers.ByteLevel(), True),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)]), True),
        (pre_tokenizers.Metaspace(), False),
        (None, False),
    ],
)
def test_a_text_is_cut_only_for_a_tokenizer_that_splits_it_into_words(
    words: pre_tokenizers.PreTokenizer | None, is_cut: bool
) -> None:
    backend = Tokenizer(models.BPE())
    if words is not None:
        backend.pre_tokenizer = words
    assert Encoder(PreTrainedTokenizerFast(tokenizer_object=backend), 8).keep == (8 if is_cut else None)


def test_a_text_of_long_words_that_proves_too_short_is_encoded_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    set_template(tokenizer, "plain", "assistant")
    wide = Conversation(
        messages=({"role": "user", "content": " " * 5000 + "end"}, {"role": "assistant", "content": "ok"})
    )
    [(ids, _, _)] = Encoder(tokenizer, 64)(rendered([wide], tokenizer))
    [(expected, _, _)] = Encoder(tokenizer, None)(rendered([wide], tokenizer))
    assert ids[:64] == expected[:64]
