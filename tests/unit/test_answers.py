"""The assistant's words are found in the chat templates that models come with, each answer with the token that ends it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trl
from transformers import AutoTokenizer

from lowvram_chat.data.answers import AnswerFinder, end_tokens_of
from lowvram_chat.data.template import set_template
from lowvram_chat.errors import DataError, UsageError
from lowvram_chat.model.generation import encode_messages
from lowvram_chat.model.generation_settings import stop_tokens
from tests.marked import marked_rows, problem_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOKENS: dict[str, tuple[str, ...]] = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "gemma3": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "zephyr": (),
    "mistral": ("<s>",),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
}
"""Template -> its special tokens; the last one ends an answer."""
WRITTEN = {
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "smollm2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
"""Templates that TRL does not ship."""
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "Very.\n  Well."},
]


def tokenizer_with(name: str, tiny: Path) -> PreTrainedTokenizerBase:
    """Return the built-in tokenizer with the template and the special tokens of another model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(list(TOKENS[name]), special_tokens=True)
    if TOKENS[name] and TOKENS[name][0] in ("<s>", "<bos>", "<|begin_of_text|>"):
        tokenizer.bos_token = TOKENS[name][0]
    tokenizer.chat_template = WRITTEN.get(name) or (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize("name", TOKENS)
def test_the_answers_of_a_common_template_are_found(name: str, tiny: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(name, tiny)
    set_template(tokenizer, "own", "assistant")
    end = TOKENS[name][-1] if TOKENS[name] and name != "mistral" else tokenizer.eos_token
    assert end_tokens_of(tokenizer) == [end]
    [text] = marked_rows(tmp_path, [{"messages": CHAT}], tokenizer)
    trained = [piece.split("]]")[0] for piece in text.split("[[")[1:]]
    assert len(trained) == 2
    assert all(piece.endswith(end) for piece in trained)
    assert [
        trained[0].removesuffix(str(end)).strip(),
        trained[1].removesuffix(str(end)).strip().removeprefix("<think>\n\n</think>\n\n"),
    ] == [
        CHAT[1]["content"],
        CHAT[3]["content"],
    ]


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_turns_are_found_where_the_marks_are(name: str, tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    set_template(tokenizer, name, "assistant")
    marked = AnswerFinder(tokenizer)(CHAT)
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace("{%- generation -%}", "{#- -#}").replace(
        "{%- endgeneration -%}", "{#- -#}"
    )
    assert AnswerFinder(tokenizer)(CHAT) == marked


def test_an_answer_that_a_template_changes_is_a_bad_row(tiny: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_with("qwen3", tiny)
    set_template(tokenizer, "own", "assistant")
    answer = {"role": "assistant", "content": "<think>\nhidden\n</think>\n\nShown."}
    row = {"messages": [CHAT[0], answer, CHAT[2], CHAT[3]]}
    assert "message 2 is not in the text of the whole conversation" in problem_of(tmp_path, row, tokenizer)


def test_a_template_that_hides_what_it_asks_for_is_refused(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<\uff5cAssistant\uff5c>", "<\uff5cUser\uff5c>"], special_tokens=True)
    tokenizer.chat_template = (TEMPLATES / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="own cannot be used: the chat template renders an answer differently"):
        set_template(tokenizer, "own", "assistant")


PLAIN_MARKED = (
    "{%- for m in messages -%}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}BODY{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{%- endfor -%}"
)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (PLAIN_MARKED.replace("BODY", "{{ m.content[:20] }}"), "the chat template leaves out a part of message 2"),
        (
            PLAIN_MARKED.replace("BODY", "{{ m.content }}").replace("== 'assistant'", "== 'assistant' and loop.last"),
            "the chat template marks 1 answers, but the conversation has 2",
        ),
        (
            PLAIN_MARKED.replace("BODY", "{{ m.content }}").replace(
                "{{ m.content }}{% endif", "{{ m.content[:4] }}{% endif"
            ),
            "the chat template leaves out a part of message 1 (user)",
        ),
    ],
    ids=["cut answers", "only the last answer", "cut questions"],
)
def test_a_marked_template_that_does_not_train_what_the_row_says_makes_bad_rows(
    template: str, problem: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    long = [
        {"role": role, "content": f"A {role}'s rather long message, number {number}."}
        for number, role in enumerate(("user", "assistant", "user", "assistant"))
    ]
    assert problem in problem_of(tmp_path, {"messages": long}, tokenizer)


def test_a_dropped_system_message_is_a_bad_row_and_refused_in_chat(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN_MARKED.replace("BODY", "{{ m.content }}").replace(
        "{%- for m in messages -%}", "{%- for m in messages if m.role != 'system' -%}"
    )
    system = {"role": "system", "content": "Be brief."}
    for loss_on in ("assistant", "all"):
        problem = problem_of(tmp_path, {"messages": [system, *CHAT]}, tokenizer, loss_on=loss_on)
        assert "the chat template leaves out a part of message 1 (system)" in problem
    with pytest.raises(UsageError, match="leaves out a part of message 1"):
        encode_messages(tokenizer, [system, CHAT[0]])


@pytest.mark.parametrize(
    "name", ["qwen2_5_training", "qwen3_training", "gemma_training", "phi3_training", "llama3_training"]
)
def test_a_training_template_of_trl_ends_answers_where_its_model_stops(name: str, tiny: Path, tmp_path: Path) -> None:
    family = name.removesuffix("_training")
    tokenizer = tokenizer_with(family, tiny)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    set_template(tokenizer, "own", "assistant")
    [text] = marked_rows(tmp_path, [{"messages": CHAT}], tokenizer)
    trained = [piece.split("]]")[0] for piece in text.split("[[")[1:]]
    assert [piece.endswith(TOKENS[family][-1]) for piece in trained] == [True, True]
    assert end_tokens_of(tokenizer) == [TOKENS[family][-1]]


def test_what_begins_the_next_turn_ends_no_answer(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    with pytest.raises(DataError, match="no special token ends"):
        set_template(tokenizer, "own", "assistant")


def test_a_model_stops_at_each_token_that_ends_answers(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    set_template(tokenizer, "own", "assistant")
    assert set(end_tokens_of(tokenizer)) == {"<|im_end|>"}
    assert stop_tokens(tokenizer, [7]) == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id, 7]


def test_a_marker_that_begins_with_a_blank_can_be_typed(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    tokens = encode_messages(tokenizer, [{"role": "user", "content": "What does ASSISTANT: mean?"}])
    assert str(tokenizer.decode(tokens)).count("ASSISTANT:") == 1
