"""Pretrain `builtin:tiny-gpt2`, the model of the package, from plain-text files.

    python tools/make_tiny_gpt2.py --corpus FOLDER_OF_TXT --out lowvram_chat/assets/tiny-gpt2

Architecture: GPT-2, 4 layers x 256, 4 heads, 1,024 positions, byte-level BPE of 8,192 tokens (5.5 M parameters, tied head).

The shipped model was made with the default arguments from 49 English novels of 1839-1930 from the public collection
computationalstylistics/100_english_novels (public domain; 9,540,682 training tokens). Its 1,000 steps of
8,192 tokens with seed 0 took 59 minutes on one busy CPU core; the final held-out loss is 4.4764 nats per token.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase

END = "<|endoftext|>"
VOCABULARY = 8192
POSITIONS = 1024
HELD_OUT_CHARACTERS = 20_000


def read_book(path: Path) -> str:
    """Return the text of a novel with one line per paragraph, as in chat text, and without hard line breaks."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in paragraphs if part)


def train_tokenizer(books: list[str], folder: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the books and return it as GPT-2's tokenizer class."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(books, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = GPT2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
    )
    for name in ("vocab.json", "merges.txt"):  # tokenizer.json contains both
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_model() -> GPT2LMHeadModel:
    """Return an untrained model; it has no dropout, because training passes over the corpus less than once."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_ctx=POSITIONS,  # read by the converter of llama.cpp
            n_embd=256,
            n_layer=4,
            n_head=4,
            activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up over 2 % of the steps, then cosine decay to a twentieth of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def batch(tokens: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return (rows, length) windows of the token stream, at random positions."""
    starts = torch.randint(0, len(tokens) - length, (rows,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts])


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokens: torch.Tensor, length: int = 512) -> float:
    """Return the mean next-token loss over consecutive windows of the held-out stream, in nats per token."""
    model.eval()
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    losses = [model(input_ids=part, labels=part).loss.item() for part in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def make_optimizers(model: GPT2LMHeadModel, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest, which reach the same loss with fewer tokens."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or ".h." not in name]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=2048, help="tokens whose activations fit the processor's cache"
    )
    parser.add_argument(
        "--long-share",
        type=float,
        default=0.2,
        help="final share of the steps, which use rows of 1,024 tokens instead of 256",
    )
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, and write both with a record of how they were made."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    books = [read_book(path) for path in sorted(args.corpus.glob("*.txt"))]
    random.Random(args.seed).shuffle(books)
    tokenizer = train_tokenizer(books, args.out)
    # The end of every book is held out, so that the held-out loss covers all authors.
    streams = [[*tokenizer.encode(book[:-HELD_OUT_CHARACTERS]), 0] for book in books]
    held_out = [[*tokenizer.encode(book[-HELD_OUT_CHARACTERS:]), 0] for book in books]
    tokens = torch.from_numpy(np.concatenate([np.array(s, dtype=np.int64) for s in streams]))
    held = torch.from_numpy(np.concatenate([np.array(s, dtype=np.int64) for s in held_out]))
    print(f"{len(books)} books, {len(tokens):,} training tokens, {len(held):,} held out", flush=True)

    model = new_model()
    optimizers = make_optimizers(model, args.lr)

    def micro_batch_loss(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=rows, labels=rows).loss

    compiled = torch.compile(micro_batch_loss, dynamic=False)
    accumulated = args.tokens_per_step // args.micro_batch_tokens
    started = time.monotonic()
    for step in range(args.steps):
        length = POSITIONS if step >= args.steps * (1 - args.long_share) else 256
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        step_loss = 0.0
        for _ in range(accumulated):
            loss = compiled(batch(tokens, args.micro_batch_tokens // length, length, generator)) / accumulated
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 20 == 0:
            seconds = time.monotonic() - started
            rate = (step + 1) * args.tokens_per_step / seconds
            print(f"step {step} loss {step_loss:.4f} {rate:.0f} tokens/s {seconds:.0f} s", flush=True)
        if step % 200 == 199:
            copy.deepcopy(model).half().save_pretrained(args.out)
    final = held_out_loss(model, held)
    minutes = (time.monotonic() - started) / 60
    print(f"held-out loss {final:.4f} after {minutes:.0f} minutes", flush=True)
    model.half().save_pretrained(args.out)
    facts = {
        "corpus": "49 English novels, 1839-1930, from computationalstylistics/100_english_novels (public domain)",
        "training_tokens": len(tokens),
        "steps": args.steps,
        "tokens_per_step": args.tokens_per_step,
        "seed": args.seed,
        "held_out_loss": round(final, 4),
        "minutes": round(minutes),
    }
    (args.out / "made_from.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
