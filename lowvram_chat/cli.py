"""`lowvram-chat <command>`, and what all commands share: parsing, exit codes, messages, quiet libraries.

Exit codes: 0 ok; 1 the answer is no (a merge that is not the same function, a recipe that does not fit); 2 the user's
mistake; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowvram_chat import __version__
from lowvram_chat.errors import DoesNotFit, LowVramError, ProofError, did_you_mean
from lowvram_chat.quiet import quiet_libraries

COMMANDS: Mapping[str, str] = {
    "plan": "will it fit? the memory of a recipe, without GPU, weights or data",
    "sft": "fine-tune a model by a recipe",
    "merge": "fold a run's adapter into its base model, with a proof",
    "chat": "talk to a run or model",
    "evaluate": "held-out loss and perplexity",
    "bench": "measure a recipe on this machine, report and compare results",
    "doctor": "what this machine has, and what to do about each lack",
}

INSTALL_ADVICE = "Run pip install -c constraints.txt -e . where lowvram_chat lies"


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, with exit code 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}. Add --help for the usage.\n")


def parser(command: str, doc: str | None) -> Parser:
    """Return the parser of one command; `doc` is its module's docstring."""
    return Parser(
        prog=f"python -m lowvram_chat.{command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def guarded(work: Callable[[], int]) -> int:
    """Run a command's work and return its exit code; the user's mistakes are told in a sentence, without a traceback."""
    quiet_libraries()
    try:
        return work()
    except (ProofError, DoesNotFit) as error:
        print(error, file=sys.stderr)
        return 1
    except LowVramError as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if str(error.name).startswith("lowvram_chat"):
            raise
        print(
            f"{error.name}: this Python has no such package. {INSTALL_ADVICE} "
            "(python -m lowvram_chat.doctor names every lack).",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document as the last line of stdout."""
    print(json.dumps(document, ensure_ascii=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lowvram-chat <command> ...`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: lowvram-chat <command> ...\n")
        print("Fine-tune GPT-2-class chat models on a 4 GB graphics card. Commands:\n")
        print("\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items()))
        print("\nlowvram-chat <command> --help tells more; python -m lowvram_chat.<command> is the same.")
        return 0
    if words[0] == "--version":
        print(f"lowvram_chat {__version__}")
        return 0
    if words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS)
        print(f"lowvram-chat: there is no command '{words[0]}'.{hint} Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"lowvram_chat.{words[0]}")
    return int(module.main(words[1:]))
