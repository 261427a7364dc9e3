"""Talk to a run or model in the terminal.

    python -m lowvram_chat.chat runs/quickstart
    python -m lowvram_chat.chat runs/quickstart --prompt "Hello, how are you?"

In a conversation: /reset forgets everything said, /exit (or Ctrl-C, Ctrl-D) ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_chat.cli import guarded, parser
from lowvram_chat.errors import UsageError
from lowvram_chat.quiet import quiet_transformers

if TYPE_CHECKING:
    from lowvram_chat.model.saved import OpenedModel

Messages = list[dict[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words of the command line and talk."""
    arguments = parser("chat", __doc__)
    arguments.add_argument("model", help="run folder, model folder, hub id or builtin:tiny-gpt2")
    arguments.add_argument("--prompt", metavar="TEXT", help="answer once and exit")
    arguments.add_argument("--system", metavar="TEXT", help="what the system says before the first turn")
    arguments.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    arguments.add_argument("--top-p", type=float, default=0.9, help="nucleus sampling (default: 0.9)")
    arguments.add_argument("--max-new-tokens", type=int, default=200, help="length of an answer at most (default: 200)")
    arguments.add_argument("--seed", type=int, help="the same answers every time")
    args = arguments.parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Open the model and answer once, or converse.

    Raises:
        UsageError: a sampling setting out of range.
        LowVramError: see `model.open`.
    """
    _check(args)
    opened = _open(args.model)
    if args.seed is not None:
        import torch

        torch.manual_seed(args.seed)
    start: Messages = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is not None:
        answer(opened, [*start, {"role": "user", "content": args.prompt}], args)
        return 0
    return converse(opened, start, args)


def _check(args: argparse.Namespace) -> None:
    if args.temperature < 0:
        raise UsageError(f"--temperature: {args.temperature} is below 0. Give 0 (greedy) or more.")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p: {args.top_p} is not in (0, 1]. Give 0.9, or 1 for all tokens.")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: {args.max_new_tokens} is below 1. Give the tokens of an answer at most.")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt: the text is empty. Give a question.")


def _open(name: str) -> OpenedModel:
    """Return the model, with the plain template where it has none of its own."""
    from lowvram_chat.hub import work_offline_if_unreachable

    if not Path(name).exists() and not name.startswith("builtin:"):
        work_offline_if_unreachable()
    from lowvram_chat.model.saved import open_model

    quiet_transformers()
    opened = open_model(name)
    if not opened.tokenizer.chat_template:
        from lowvram_chat.data.template import read_template

        print(f"{name} has no chat template: using the plain one (user: ... / assistant: ...)", file=sys.stderr)
        opened.tokenizer.chat_template = read_template("plain")
    return opened


def converse(opened: OpenedModel, start: Messages, args: argparse.Namespace) -> int:
    """Read turns from stdin until /exit, Ctrl-D or Ctrl-C."""
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a message; /reset to begin anew, /exit to end.", file=sys.stderr)
    while True:
        try:
            said = input("you> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return 0
        if said == "/exit":
            return 0
        if said == "/reset":
            messages = list(start)
            print("(forgotten)", file=sys.stderr)
        elif said.startswith("/"):
            print(f"(there is no command {said}; known: /reset, /exit)", file=sys.stderr)
        elif said:
            messages.append({"role": "user", "content": said})
            try:
                messages, reply = answer(opened, messages, args)
                messages.append({"role": "assistant", "content": reply})
            except KeyboardInterrupt:  # ends the answer, not the conversation
                print(" (stopped)")
                messages.pop()
            except UsageError as error:
                print(f"({error})", file=sys.stderr)
                messages.pop()


def answer(opened: OpenedModel, messages: Messages, args: argparse.Namespace) -> tuple[Messages, str]:
    """Stream one answer to stdout; return the messages it was given (the oldest may be dropped) and its text.

    Raises:
        UsageError: a single message that is longer than the model's positions.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer: Any = opened.tokenizer
    messages, prompt = fit(opened, messages, args.max_new_tokens)
    tokens = torch.tensor([prompt], device=opened.model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    output = opened.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        streamer=_streamer(tokenizer),
        generation_config=GenerationConfig(
            max_new_tokens=min(args.max_new_tokens, opened.positions - len(prompt)),
            min_new_tokens=1,  # an empty answer helps nobody
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **(sampling if args.temperature > 0 else {"do_sample": False}),
        ),
    )
    return messages, tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()


def _streamer(tokenizer: Any) -> Any:
    """Return a streamer to stdout that leaves out the space with which an answer begins."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        begun = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text if self.begun else text.lstrip()
            self.begun = self.begun or bool(text)
            super().on_finalized_text(text, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def fit(opened: OpenedModel, messages: Messages, new_tokens: int) -> tuple[Messages, list[int]]:
    """Return the messages that leave room for an answer, and their tokens; the oldest turns go first, and it is said.

    Raises:
        UsageError: what was said last does not fit by itself.
    """
    room = opened.positions - min(new_tokens, opened.positions // 2)
    kept, dropped = list(messages), 0
    while True:
        encoded = opened.tokenizer.apply_chat_template(
            kept, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        tokens: list[int] = list(encoded["input_ids"])  # type: ignore[index]
        if len(tokens) <= room:
            break
        oldest = 1 if kept[0]["role"] == "system" else 0
        if len(kept) - oldest <= 1:
            raise UsageError(
                f"That message has {len(tokens)} tokens; {room} fit into the model's positions. Say less at once."
            )
        turns = 2 if len(kept) - oldest > 2 else 1
        del kept[oldest : oldest + turns]
        dropped += turns
    if dropped:
        print(f"(the oldest {dropped} messages no longer fit and were dropped)", file=sys.stderr)
    return kept, tokens


if __name__ == "__main__":
    sys.exit(main())
