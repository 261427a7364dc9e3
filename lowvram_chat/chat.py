"""Talk to a run or model in the terminal.

    python -m lowvram_chat.chat runs/quickstart
    python -m lowvram_chat.chat runs/quickstart --prompt "Hello, how are you?"

In a conversation, /reset forgets everything said, and /exit (or Ctrl-C, Ctrl-D) ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowvram_chat import api
from lowvram_chat.cli import add_device, guarded, parser
from lowvram_chat.errors import OutOfMemory, UsageError
from lowvram_chat.stopping import raise_other_signals
from lowvram_chat.terminal import printable, read_utf8

if TYPE_CHECKING:
    from lowvram_chat.model.chat_session import ChatSession


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser("chat", __doc__)
    arguments.add_argument("model", help="run folder, model folder, hub id or builtin:tiny-gpt2")
    arguments.add_argument("--prompt", metavar="TEXT", help="answer once and exit")
    arguments.add_argument("--system", metavar="TEXT", help="system message before the first turn")
    arguments.add_argument("--temperature", type=float, default=0.7, help="0 is greedy decoding (default: 0.7)")
    arguments.add_argument("--top-p", type=float, default=0.9, help="nucleus sampling (default: 0.9)")
    arguments.add_argument("--max-new-tokens", type=int, default=200, help="maximum length of an answer (default: 200)")
    add_device(arguments, auto="the graphics card, if it has enough free memory")
    arguments.add_argument("--seed", type=int, help="make the answers repeatable")
    args = arguments.parse_args(argv)
    return guarded(lambda: _chat(args))


def _chat(args: argparse.Namespace) -> int:
    """Open the model, then answer once or hold a conversation."""
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt: the text is empty. Give a question.")
    session = api.open_chat(
        args.model,
        system=args.system,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        device=args.device,
    )
    if args.prompt is None:
        return converse(session)
    session.ask(args.prompt, _print_piece)
    print()
    return 0


def converse(session: ChatSession) -> int:
    """Read turns from stdin until /exit, Ctrl-D or Ctrl-C.

    Raises:
        UsageError: stdin is a pipe or a file that is not UTF-8.
    """
    read_utf8()
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a message; /reset to start again, /exit to end.", file=sys.stderr)
    while True:
        try:
            text = input("you> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt) as ended:
            raise_other_signals(ended)
            print(file=sys.stderr)
            return 0
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: is not UTF-8 ({error.reason}). Save the messages as UTF-8.") from None
        if text == "/exit":
            return 0
        if text == "/reset":
            session.reset()
            print("(forgotten)", file=sys.stderr)
        elif text.startswith("/"):
            print(printable(f"(there is no command {text}; known: /reset, /exit)"), file=sys.stderr)
        elif text:
            _answer(session, text)


def _answer(session: ChatSession, text: str) -> None:
    """Print one answer; Ctrl-C ends the answer, not the conversation."""
    try:
        session.ask(text, _print_piece)
        print()
    except KeyboardInterrupt as stopped:
        raise_other_signals(stopped)
        print(" (stopped)")
    except (UsageError, OutOfMemory) as error:
        print(printable(f"({error})"), file=sys.stderr)


def _print_piece(text: str) -> None:
    print(printable(text), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
