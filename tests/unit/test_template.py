"""Chat templates give the text written by hand, and training text begins with the prompt that generation gets."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_chat.data.template import SHIPPED_TEMPLATES, read_template, set_template
from lowvram_chat.errors import DataError, NotFoundError
from lowvram_chat.model.pretrained import load_tokenizer
from tests.samples import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = "<|endoftext|>"
Messages = list[dict[str, str]]
CHAT: Messages = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How are you?"},
]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def test_the_plain_text_is_the_one_written_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    assert rendered(tokenizer, CHAT) == f"user: Hi\nassistant: Hello!{EOS}\nuser: How are you?"


def test_the_generation_prompt_ends_without_a_space(tokenizer: PreTrainedTokenizerBase) -> None:
    assert rendered(tokenizer, CHAT, prompt=True).endswith("\nuser: How are you?\nassistant:")


def test_a_system_message_is_a_line_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be kind."}
    assert rendered(tokenizer, [system, *CHAT]) == "system: Be kind.\n" + rendered(tokenizer, CHAT)


def test_blanks_around_a_message_are_no_part_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    blank = [message | {"content": f" \n{message['content']}\n "} for message in CHAT]
    assert rendered(tokenizer, blank) == rendered(tokenizer, CHAT)


@functools.cache
def builtin_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(BUILTIN))
    set_template(tokenizer, "plain", "assistant")
    return tokenizer


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(lambda t: bool(t.strip()) and EOS not in t)


@settings(max_examples=200, deadline=None)
@given(user=TEXT, answer=TEXT, more=TEXT)
def test_training_tokens_begin_with_the_prompt_that_generation_gets(user: str, answer: str, more: str) -> None:
    tokenizer = builtin_tokenizer()
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    for chat in (messages, [*messages, {"role": "user", "content": more}, messages[1]]):
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]  # type: ignore[index, call-overload]
        whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]  # type: ignore[index, call-overload]
        assert list(whole[: len(prompt)]) == list(prompt)
        assert whole[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_a_shipped_template_marks_the_assistants_words(name: str) -> None:
    assert "{%- generation -%}" in read_template(name)


def test_no_template_adds_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == len(load_tokenizer(str(BUILTIN)))


def test_a_missing_template_names_the_nearest(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(NotFoundError, match=r"data\.chat_template: 'plane'.*Did you mean 'plain'"):
        set_template(tokenizer, "plane", "assistant")


def test_chatml_is_refused_where_the_tokenizer_lacks_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template=plain"):
        set_template(tokenizer, "chatml", "assistant")


def test_own_is_refused_where_there_is_none(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        set_template(tokenizer, "own", "assistant")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{{ m.role }}: {{ m.content }}\n", "no special token"),
        (
            "{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n",
            "marks 2 answers, but the conversation has 1",
        ),
        (
            "{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% endif %}\n",
            "no special token ends an answer",
        ),
        ("{% generation %}{% endgeneration %}", "marks 0 answers, but the conversation has 1"),
        ("{% generation %}{{ m.role + m.content + eos_token }}{% endgeneration %}", "marks 2 answers"),
        (
            "{% if loop.last %}{{ m.role }}{% endif %}{% generation %}{{ eos_token }}{% endgeneration %}",
            "marks 0 answers",
        ),
        ("{{ 1/0 }}", "the chat template fails: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses it"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{% for x in m %}", "the chat template refuses it"),
    ],
)
def test_a_template_whose_answers_cannot_be_learned_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, body: str, words: str
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}" + body + "{% endfor %}", encoding="utf-8")
    with pytest.raises(DataError, match=words):
        set_template(tokenizer, str(path), "assistant")


def test_a_template_without_an_end_can_be_used_for_loss_on_all(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8")
    set_template(tokenizer, str(path), "all")


def test_a_template_that_is_not_text_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xff\x80")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        set_template(tokenizer, str(path), "assistant")


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        set_template(tokenizer, "plain", "assistant")


def test_a_missing_pad_token_becomes_the_eos_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = None
    set_template(tokenizer, "plain", "assistant")
    assert tokenizer.pad_token == tokenizer.eos_token
