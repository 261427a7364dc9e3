"""The `lowvram-chat <command>` entry point, and the parsing, exit codes and error messages that all commands share.

Exit codes: 0 success; 1 a negative result (a merged model that differs, a recipe that does not fit, a run whose weights became
NaN); 2 a mistake of the user; 130 stopped with Ctrl-C, 143 with SIGTERM, 129 with SIGHUP.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from lowvram_chat import __version__
from lowvram_chat.arguments import DEVICES
from lowvram_chat.errors import DivergedError, DoesNotFit, LowVramError, ProofError, did_you_mean
from lowvram_chat.files import json_text, storage_error
from lowvram_chat.quiet import quiet_libraries
from lowvram_chat.stopping import signals_answered
from lowvram_chat.terminal import UNPRINTABLE, printable, use_utf8

COMMANDS: Mapping[str, str] = {
    "preview": "show the rows that would be trained, and what a data source holds",
    "plan": "predict whether a recipe fits, without GPU, weights or data",
    "sft": "fine-tune a model as a recipe says",
    "merge": "merge a run's adapter into its base model and check the result",
    "chat": "chat with a run or a model",
    "evaluate": "measure held-out loss and perplexity",
    "bench": "measure a recipe on this machine; report and compare results",
    "doctor": "check this machine and advise on what is missing",
}

INSTALL_ADVICE = "Run pip install -c constraints.txt -e . in the folder of lowvram_chat"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with 2."""
        self.exit(2, printable(f"{self.prog}: {message}. Use --help to see the usage.\n"))


def parser(command: str, doc: str | None) -> Parser:
    """Return the argument parser of a command, which prepares the output; `doc` is the docstring of its module."""
    use_utf8()
    return Parser(
        prog=f"python -m lowvram_chat.{command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device(arguments: argparse.ArgumentParser, *, auto: str) -> None:
    """Add the option --device; `auto` says what the default chooses."""
    arguments.add_argument("--device", choices=DEVICES, default="auto", help=f"auto (the default): {auto}")


def guarded(work: Callable[[], int]) -> int:
    """Run a command's work and return its exit code; errors that a user can cause are printed without a traceback."""
    quiet_libraries()
    try:
        with signals_answered():
            return work()
    except (ProofError, DoesNotFit, DivergedError) as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LowVramError, OSError) as error:
        told = error if isinstance(error, LowVramError) else storage_error(error)
        print(printable(str(told)), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if str(error.name).startswith("lowvram_chat"):
            raise
        print(
            f"{error.name}: this Python has no such package. {INSTALL_ADVICE} "
            "(python -m lowvram_chat.doctor lists everything that is missing).",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stopped:
        print("\nStopped.", file=sys.stderr)
        return getattr(stopped, "exit_code", 130)


def print_json(document: Mapping[str, object]) -> None:
    """Print a JSON document as the last line of stdout."""
    print(UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json_text(document)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lowvram-chat <command> ...` and return its exit code."""
    use_utf8()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: lowvram-chat <command> ...\n")
        print("Fine-tune GPT-2-class chat models on a 4 GB graphics card. Commands:\n")
        print("\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items()))
        print("\nFor details: lowvram-chat <command> --help. python -m lowvram_chat.<command> is the same command.")
        return 0
    if words[0] == "--version":
        print(f"lowvram_chat {__version__}")
        return 0
    if words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS)
        text = f"lowvram-chat: there is no command '{words[0]}'.{hint} Known: {', '.join(COMMANDS)}."
        print(printable(text), file=sys.stderr)
        return 2
    module = importlib.import_module(f"lowvram_chat.{words[0]}")
    return int(module.main(words[1:]))
