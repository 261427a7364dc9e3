"""A conversation stays within the model's positions: the oldest turns go, the system message stays, and it is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lowvram_chat import chat
from lowvram_chat.errors import UsageError
from lowvram_chat.model.chat_session import ChatSession, fit_to_positions
from lowvram_chat.model.generation import Messages, encode_messages
from lowvram_chat.model.sampling import Sampling
from lowvram_chat.model.saved import OpenedModel, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture(scope="module")
def model(tiny: Path) -> OpenedModel:
    return open_model(str(tiny))


@pytest.fixture
def opened(model: OpenedModel, tokenizer: PreTrainedTokenizerBase) -> OpenedModel:
    return OpenedModel(model.model, tokenizer, None)


def turns(number: int, words: int = 12) -> Messages:
    """Return a conversation whose last message is the user's."""
    said: Messages = []
    for turn in range(number):
        said.append({"role": "user", "content": f"question {turn} " + "why " * words})
        said.append({"role": "assistant", "content": f"answer {turn} " + "so " * words})
    return [*said, {"role": "user", "content": "and now?"}]


def test_positions_are_the_models(opened: OpenedModel) -> None:
    assert opened.positions == 256


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the package logs."""
    monkeypatch.setattr(logging.getLogger("lowvram_chat"), "propagate", True)
    caplog.set_level(logging.INFO, "lowvram_chat")
    return caplog


def test_a_short_conversation_is_kept_whole(opened: OpenedModel, logged: pytest.LogCaptureFixture) -> None:
    kept, tokens = fit_to_positions(opened, turns(2), 20)
    assert kept == turns(2)
    text = opened.tokenizer.decode(tokens)
    assert isinstance(text, str)
    assert text.endswith("user: and now?\nassistant:")
    assert not logged.messages


@pytest.mark.parametrize("start", [[], [SYSTEM]], ids=["bare", "system"])
@pytest.mark.parametrize("new_tokens", [20, 100])
def test_the_oldest_turns_are_dropped_and_it_is_said(
    opened: OpenedModel, start: Messages, new_tokens: int, logged: pytest.LogCaptureFixture
) -> None:
    said = [*start, *turns(12)]
    kept, tokens = fit_to_positions(opened, said, new_tokens)
    assert len(tokens) + new_tokens <= opened.positions
    assert kept[: len(start)] == start
    rest = kept[len(start) :]
    assert rest == said[-len(rest) :]
    assert rest[0]["role"] == "user"
    assert f"the {len(said) - len(kept)} oldest messages" in logged.text


def test_no_more_is_dropped_than_needed(opened: OpenedModel) -> None:
    kept, _ = fit_to_positions(opened, turns(12), 20)
    one_more = [*turns(12)[-len(kept) - 2 :]]
    assert len(encode_messages(opened.tokenizer, one_more)) + 20 > opened.positions


@pytest.mark.parametrize("start", [[], [SYSTEM]], ids=["bare", "system"])
def test_a_message_that_does_not_fit_by_itself_is_refused(opened: OpenedModel, start: Messages) -> None:
    with pytest.raises(UsageError, match="Send a shorter one"):
        fit_to_positions(opened, [*start, *turns(2), {"role": "user", "content": "no " * 400}], 20)


def test_an_answer_longer_than_the_positions_leaves_half_for_the_question(opened: OpenedModel) -> None:
    _, tokens = fit_to_positions(opened, turns(12), 5000)
    assert len(tokens) <= opened.positions // 2


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0)]
)
def test_sampling_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=setting):
        Sampling(**{setting: value})  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["no-such-model", "--prompt", "  "]) == 2
    assert "--prompt: the text is empty" in capsys.readouterr().err


def test_an_empty_message_is_refused_and_the_conversation_is_kept(opened: OpenedModel) -> None:
    session = ChatSession(opened, system="Be kind.")
    with pytest.raises(UsageError, match="empty"):
        session.ask("  ")
    assert session.messages == [SYSTEM]


def test_a_seed_makes_each_conversation_repeatable_and_leaves_the_random_state_alone(opened: OpenedModel) -> None:
    one, other = (
        ChatSession(opened, sampling=Sampling(temperature=1.5, top_p=1.0, max_new_tokens=8), seed=1) for _ in "ab"
    )
    before = torch.get_rng_state()
    answers = [one.ask("the cat"), one.ask("the dog")]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert [other.ask("the cat"), other.ask("the dog")] == answers
    one.reset()
    assert one.ask("the cat") == answers[0]
