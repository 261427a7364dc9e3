"""Text generation by sampling, shared by chat and by the samples of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import BatchEncoding, GenerationConfig

from lowvram_chat.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase, TextStreamer

Messages = list[dict[str, str]]
"""Messages as chat templates take them: `role` and `content`."""


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Return the tokens of messages, up to where the assistant's answer begins."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert isinstance(encoded, BatchEncoding)
    return list(encoded["input_ids"])


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> str:
    """Return the text that follows a (1, T) prompt; generation stops at the EOS token.

    At least one token is generated, because an empty answer helps nobody.
    """
    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    run = cast("Callable[..., object]", model.generate)
    output = run(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=streamer,
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **(sampled if sampling.temperature > 0 else {"do_sample": False}),
        ),
    )
    assert isinstance(output, torch.Tensor)  # a plain (1, T') tensor unless a dictionary is asked for
    return str(tokenizer.decode(output[0, prompt.size(1) :], skip_special_tokens=True)).strip()
