"""Chat answers once or converses, the same with the same seed; the template goes with every result."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowvram_chat import api, chat
from lowvram_chat.model import chat_session


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a chat."""
    capsys.readouterr()
    code = chat.main([*words, "--max-new-tokens", "8"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("run", ["full_run", "lora_run"])
def test_a_prompt_is_answered_once(
    run: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer, _ = said(
        [str(request.getfixturevalue(run)), "--prompt", "the cat sat", "--temperature", "1.5", "--seed", "1"], capsys
    )
    assert code == 0
    assert answer.strip()
    assert "assistant:" not in answer
    assert "<|endoftext|>" not in answer


def test_the_same_seed_gives_the_same_answer(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(lora_run), "--prompt", "the dog ran", "--temperature", "1.5", "--top-p", "1"]
    answers = [said([*words, "--seed", seed], capsys)[1] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


def test_a_greedy_answer_is_the_most_likely_text(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    _, answer, _ = said([str(full_run), "--prompt", "the red house", "--temperature", "0"], capsys)
    tokenizer = AutoTokenizer.from_pretrained(full_run / "model")
    model = AutoModelForCausalLM.from_pretrained(full_run / "model").eval()
    tokens = tokenizer.encode("user: the red house\nassistant:", return_tensors="pt")
    wanted: list[int] = []
    with torch.no_grad():
        while len(wanted) < 8:
            token = int(model(tokens).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            wanted.append(token)
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    assert answer.strip() == str(tokenizer.decode(wanted)).strip()


def converse(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, run: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return said([str(run), "--temperature", "0"], capsys)


def test_a_conversation_goes_on_until_exit(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answers, told = converse(
        ["the cat sat", "", "/what", "and the dog", "/exit", "never read"], monkeypatch, full_run, capsys
    )
    assert code == 0
    assert len(answers.strip().splitlines()) == 2
    assert "there is no command /what" in told


def test_a_conversation_ends_with_its_input(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answers, _ = converse(["the cat sat"], monkeypatch, full_run, capsys)
    assert code == 0
    assert answers.strip()


def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the messages of each turn as `role: content`, and answer `yes` to all."""
    turns: list[list[str]] = []

    def generate(model: object, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, *_: object) -> str:
        turns.append(str(tokenizer.decode(prompt[0], skip_special_tokens=True)).strip().splitlines()[:-1])
        if turns[-1][-1] == "user: long":
            raise KeyboardInterrupt
        return "yes"

    monkeypatch.setattr(chat_session, "generate", generate)
    return turns


def test_what_was_said_is_remembered_until_reset(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = heard(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n"))
    assert said([str(full_run), "--system", "Be kind."], capsys)[0] == 0
    assert turns == [
        ["system: Be kind.", "user: one"],
        ["system: Be kind.", "user: one", "assistant: yes", "user: two"],
        ["system: Be kind.", "user: three"],
    ]


def test_ctrl_c_ends_an_answer_and_then_the_conversation(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = heard(monkeypatch)
    words = iter(["long", "short"])

    def read(prompt: str = "") -> str:
        try:
            return next(words)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", read)
    code, printed, told = said([str(full_run)], capsys)
    assert code == 0
    assert "(stopped)" in printed
    assert "Traceback" not in told
    assert turns[-1] == ["user: short"]  # the message whose answer was stopped is forgotten


def test_a_message_that_is_too_long_does_not_end_the_conversation(
    full_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answers, told = converse(["no " * 400, "the cat sat"], monkeypatch, full_run, capsys)
    assert code == 0
    assert "Send a shorter one" in told
    assert answers.strip()


def test_a_model_without_template_talks_in_the_plain_one_and_says_so(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, told = said([str(tiny), "--prompt", "Hi"], capsys)
    assert code == 0
    assert "no chat template" in told


def test_the_built_in_model_talks(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["builtin:tiny-gpt2", "--prompt", "Hello"], capsys)[0] == 0


@pytest.mark.parametrize("place", ["model", "adapter", "merged", "checkpoint"])
def test_the_template_is_saved_with_every_result(place: str, full_run: Path, lora_run: Path, tmp_path: Path) -> None:
    folder = {
        "model": full_run / "model",
        "adapter": lora_run / "adapter",
        "merged": tmp_path / "merged",
        "checkpoint": full_run / "checkpoints" / "checkpoint-10",
    }[place]
    if place == "merged":
        api.merge(lora_run, out=folder)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert text == "user: Hi\nassistant: Ho<|endoftext|>"


def test_an_adapter_folder_alone_can_be_talked_to(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "the cat", "--temperature", "0"]
    assert said([str(lora_run / "adapter"), *words], capsys)[1] == said([str(lora_run), *words], capsys)[1]
