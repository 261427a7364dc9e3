"""Text generation by sampling, shared by chat and by the samples of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lowvram_chat.data.markup import markup_of
from lowvram_chat.data.template_text import check_encodable, check_whole, render_text
from lowvram_chat.errors import ModelError, UsageError
from lowvram_chat.model.generation_settings import stop_tokens
from lowvram_chat.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase, TextStreamer

Messages = list[dict[str, str]]
"""Messages as chat templates take them: `role` and `content`."""


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the tokens of messages, up to where the assistant's answer begins.

    What a message says stays text: a special token or the beginning of a turn in it gets a space inside.

    Raises:
        UsageError: the chat template refuses the messages.
    """
    markup = markup_of(tokenizer)
    try:
        for message in messages:
            check_encodable(message["content"])
        as_text = [{**message, "content": markup.as_plain_text(message["content"])} for message in messages]
        text = render_text(tokenizer, as_text, add_generation_prompt=True)
        check_whole(text, [message for message in as_text if message["role"] != "assistant"])
    except ValueError as error:
        raise UsageError(f"{error}. Change the message, or leave the system message out.") from None
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer of this model."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = stop_tokens(tokenizer, own)
    return [found] if isinstance(found, int) else found


class _RefuseNotFinite(LogitsProcessor):
    """Ends a generation whose logits are NaN or infinite.

    Sampling from them on CUDA is a device assert, which ends the process; greedy decoding would answer with anything.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the (B, V) logits as they are.

        Raises:
            ModelError: no best token exists in a row.
        """
        if not bool(scores.amax(-1).isfinite().all()):
            raise ModelError(
                "the model's logits are NaN or infinite, so it has no answer. If its weights are finite, open it in another "
                "precision (--device cpu uses float32)."
            )
        return scores


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> str:
    """Return the text that follows a (1, T) prompt; generation stops at one of the `stop_token_ids`.

    At least one token is generated, because an empty answer helps nobody.

    Raises:
        ModelError: the logits are NaN or infinite.
    """
    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    stops = stop_token_ids(model, tokenizer)
    run = cast("Callable[..., object]", model.generate)
    output = run(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=streamer,
        logits_processor=LogitsProcessorList([_RefuseNotFinite()]),
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=1,
            eos_token_id=stops,
            pad_token_id=tokenizer.eos_token_id,
            **(sampled if sampling.temperature > 0 else {"do_sample": False}),
        ),
    )
    assert isinstance(output, torch.Tensor)  # a plain (1, T') tensor unless a dictionary is asked for
    answer = [token for token in output[0, prompt.size(1) :].tolist() if token not in stops]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
