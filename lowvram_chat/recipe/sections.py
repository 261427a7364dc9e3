"""The sections of a recipe, and their settings.

The docstring under each field is its help and its description in the JSON schema.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lowvram_chat.recipe.adapters import REFUSED_TARGETS
from lowvram_chat.recipe.choices import (
    AdapterKind,
    AttentionName,
    FormatName,
    GpuName,
    OptimizerName,
    Positive,
    Rate,
    Share,
)
from lowvram_chat.terminal import UNPRINTABLE

POSITIONS_OF_GPT2 = 1024
BatchSize = Annotated[int, Field(gt=0, le=65_536)]
"""Rows or micro-batches. The bound is far beyond what is useful; its square still has few enough divisors to try all."""


def _types_of(annotation: object) -> set[object]:
    """Return the types that an annotation names, inside unions and `Annotated`."""
    parts = get_args(annotation)
    return {annotation}.union(*map(_types_of, parts)) if parts else {annotation}


def _has_long_name(text: str) -> bool:
    """Return whether no file system takes a text as a path."""
    sizes = [len(part.encode()) for part in re.split(r"[/\\]", text)]
    return max(sizes) > 255 or sum(sizes) > 4096


class Section(BaseModel):
    """One section of a recipe: it is frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_no_setting_can_be(cls, value: object, info: ValidationInfo) -> object:
        types = _types_of(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and types.isdisjoint({bool, *Section.__subclasses__()}):
            raise ValueError(f"expected another value than {str(value).lower()}")
        if isinstance(value, str) and types & {int, float} and not any(t is str or isinstance(t, str) for t in types):
            raise ValueError("expected a number, and this is text")
        if isinstance(value, set):
            raise ValueError("expected a list, such as [a, b]; a set has no order")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and info.field_name != "sample_prompts" and ("\n" in text or "\t" in text):
                raise ValueError("a name or path has no line feeds and no tabs")
            if isinstance(text, str) and (bad := UNPRINTABLE.search(text)):
                raise ValueError(f"{text!r} holds the character {bad[0]!r}, which names and paths cannot have")
            if isinstance(text, str) and info.field_name != "sample_prompts" and _has_long_name(text):
                raise ValueError("a file name has at most 255 bytes, and a path 4,096")
        return value


class Model(Section):
    """The base model."""

    name: str = "openai-community/gpt2"
    """The base model: a Hugging Face hub id, a local folder, or `builtin:tiny-gpt2`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null: the hub's default branch."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the base weights. Weights that are trained must be float32; a frozen base may use a 16-bit type."""
    load_in: Literal["4bit"] | None = None
    """`4bit`: quantise the frozen base weights to nf4 (QLoRA), which needs an adapter; null: keep them in `dtype`."""
    attention: AttentionName = "sdpa"
    """Attention implementation of transformers: `sdpa`, `eager`, `flash_attention_2` (needs the package flash-attn), or a kernel
    of the Hugging Face hub such as `kernels-community/flash-attn2` (needs the package kernels)."""
    dropout: Share | None = None
    """Probability of every dropout layer of the base model; null: the model's own values (GPT-2: 0.1)."""
    fused_gelu: bool = True
    """Run GPT-2's `gelu_new` as one kernel: the same function with half the activation memory."""
    fused_loss: bool = True
    """Use the fused linear cross-entropy: it scores only the labelled tokens, in tiles, and never holds all logits.
    false: the model's own loss, for comparison."""
    document_attention: bool = True
    """For packed rows without `compile`: compute attention within each document, without a mask. It applies on a CPU, and to
    graphics cards of compute capability 8.0 and more on Linux, in half precision without dropout. false: compute it over whole
    rows with a document mask."""
    pad_vocabulary: bool = True
    """Pad the vocabulary to a multiple of 64 in the half-precision matrix products of the loss, which makes them faster.
    The weights themselves are not padded."""


class Adapter(Section):
    """A low-rank adapter; `adapter: null` means full fine-tuning."""

    kind: AdapterKind = "lora"
    """Kind of adapter: `lora`, `rslora`, `dora` or `pissa`."""
    r: Annotated[int, Field(gt=0, le=4096)] = 16
    """Rank of the adapter matrices."""
    alpha: Positive = 32
    """Numerator of the scale: the adapter's output is multiplied by alpha / r (rslora: alpha / sqrt(r))."""
    dropout: Share = 0.0
    """Dropout probability of the adapter's input."""
    fused: bool = True
    """Use fused LoRA: add the adapter's product to the layer's output in one kernel (in fp32 on a CPU: add it to a copy of
    the weight). It applies to adapters without dropout and without DoRA. false: PEFT's own forward, for comparison."""
    target_modules: list[str] | None = None
    """Names of the layers that get an adapter, such as `c_attn`; null: every linear layer of the blocks."""

    @field_validator("target_modules")
    @classmethod
    def _refuse_tied_targets(cls, names: list[str] | None) -> list[str] | None:
        for name in names or []:
            if name in REFUSED_TARGETS:
                raise ValueError(f"'{name}' {REFUSED_TARGETS[name]}; leave it out")
        return names


class Data(Section):
    """The conversations to train on and to evaluate on."""

    source: str | list[str] = "HuggingFaceH4/ultrachat_200k"
    """Training conversations: a hub dataset id, `builtin:chitchat`, files or globs (.jsonl, .json, .csv, .parquet), or a
    list of these."""
    subset: str | None = None
    """Configuration of a hub dataset that has several; null: its default."""
    split: str = "train"
    """Split of the hub dataset to train on."""
    eval_source: str | list[str] | None = None
    """Held-out conversations, named as in `source`; null: none, or those of `eval_split` or `eval_fraction`."""
    eval_split: str | None = None
    """Split of the hub dataset to hold out; null: none, or see `eval_source` and `eval_fraction`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training conversations to hold out, chosen with `train.seed`; null: none, or see `eval_source` and
    `eval_split`."""
    format: FormatName | None = None
    """Format of the rows: `messages`, `sharegpt`, `alpaca`, `dolly`, `prompt_completion`, `oasst_tree`, `glaive`, `text` or
    `baseline`; null: detected for each file from the columns of its first row."""
    limit: Positive | None = None
    """Number of training conversations to use, from the first; null: all."""
    eval_limit: Positive | None = None
    """Number of held-out conversations to use, from the first; null: all."""
    max_bad_rows: Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0, lt=1, strict=True)] = 0
    """Number of unusable rows to skip, or their share of all rows (0.01); the run is refused when there are more."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss: those of the assistant's messages and the EOS token after each, or all tokens."""
    max_length: Annotated[int, Field(ge=8, le=POSITIONS_OF_GPT2)] = POSITIONS_OF_GPT2
    """Maximum length of a row, in tokens. GPT-2 has 1,024 positions."""
    overflow: Literal["truncate", "split"] = "truncate"
    """Treatment of conversations longer than `max_length`: `truncate` drops the rest; `split` cuts them into windows, so that
    no text is lost."""
    rows: Literal["padded", "grouped", "packed"] = "padded"
    """How rows form batches. `padded`: in random order; `grouped`: rows of similar length together, the longest first;
    `packed`: several conversations in each row of `max_length` tokens, with attention only within a conversation."""
    attention_mask: bool = False
    """Pass the attention mask of padded batches to the model. The loss is the same without it, because no real token attends
    to the padding, and attention can then use its fast kernel; for comparison."""
    chat_template: str = "plain"
    """Chat template: `plain` (`user: ...` and `assistant: ...` lines), `chatml`, `own` (the tokenizer's), or the path of a
    .jinja file."""


class Train(Section):
    """The training loop; the names are those of TRL and transformers."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Number of passes over the training rows."""
    max_steps: Positive | None = None
    """Number of optimizer steps, which is also the length of the learning-rate schedule; null: given by
    `num_train_epochs`."""
    per_device_train_batch_size: BatchSize = 4
    """Rows in a micro-batch."""
    gradient_accumulation_steps: BatchSize = 1
    """Micro-batches in an optimizer step."""
    micro_batch: Literal["given", "planned"] = "given"
    """`given`: use `per_device_train_batch_size` and `gradient_accumulation_steps` as they are. `planned`: keep their product,
    the effective batch size, but divide it into the largest micro-batches that fit the device, with gradient checkpointing
    only where not even one row fits without it."""
    per_device_eval_batch_size: BatchSize = 8
    """Rows in an evaluation batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup", "constant"] = "cosine"
    """Learning-rate schedule."""
    warmup_ratio: Share = 0.03
    """Share of the optimizer steps over which the learning rate rises from 0 to its peak."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm above which gradients are clipped; 0: no clipping."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Data type of the matrix products (autocast). Weights that are trained stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for about a third more time."""
    compile: bool | Literal["if_possible"] = False
    """Compile the blocks with torch.compile, on batches of one shape. true: refuse the run where no compiler is installed;
    `if_possible`: run without compilation there."""
    fp16_accumulation: bool = False
    """Accumulate fp16 matrix products in fp16: up to twice as fast on GeForce cards, but sums can overflow and are rounded more
    coarsely."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of processes that prepare batches; null: 2 on CUDA (on Windows 1, or 0 with less than 12 GiB of main memory), 0 on a
    CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of shuffling, dropout, the adapter's initial weights and the choice of held-out conversations."""
    logging_steps: Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_steps: Positive | None = None
    """Optimizer steps between two evaluations; null: evaluate only before and after the run."""
    save_steps: Positive | None = 500
    """Optimizer steps between two checkpoints; null: no checkpoints."""
    save_total_limit: Positive = 2
    """Number of checkpoints to keep."""

    @property
    def effective_batch_size(self) -> int:
        """Rows that one process uses for an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class OptimizerSection(Section):
    """The optimizer."""

    name: OptimizerName = "adamw_8bit"
    """Name of the optimizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; it is not applied to biases and layer norms."""
    beta1: Share = 0.9
    """Decay rate of the first moment (Adam, Lion)."""
    beta2: Share = 0.999
    """Decay rate of the second moment (Adam, Lion)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the denominator for numerical stability (Adam)."""
    momentum: Share = 0.0
    """Momentum (SGD)."""


class Card(Section):
    """A graphics card that the table does not have."""

    memory_mib: Positive
    """Memory of the card, in MiB, as nvidia-smi prints it."""
    compute_capability: Annotated[float, Field(ge=5, lt=20)]
    """CUDA compute capability, such as 7.5."""
    name: Annotated[str, Field(min_length=1)] = "the described card"
    """Name of the card, for messages."""
    usable_mib: Positive | None = None
    """Memory that a process can use, in MiB; null: 97 % of the card's on Linux, 95 % on Windows."""
    fp16_tflops: Rate | None = None
    """FP16 rate with fp32 accumulation, in TFLOPS; null: not known, so that no speed is predicted."""
    fp32_tflops: Rate | None = None
    """FP32 rate, in TFLOPS; null: half of `fp16_tflops`."""
    gb_per_second: Rate | None = None
    """Memory bandwidth, in 10^9 bytes per second; null: not known, so that no speed is predicted."""
    watts: Positive | None = None
    """Power limit at which the card has these rates."""
    tensor_cores: bool | None = None
    """Whether the card has tensor cores; null: from compute capability 7.0 on."""
    fp16_accumulation_gain: Rate = 1.0
    """Speed of fp16 products with fp16 accumulation relative to fp32 accumulation: 2 on GeForce RTX."""
    launch_microseconds: Rate | None = None
    """Time that Python, PyTorch and the driver need for an operation; null: 12 on Linux and 18 on Windows, and 30 and 45 beside a
    server's card."""
    context_mib: Positive | None = None
    """Memory of a CUDA context, in MiB; null: 300."""
    calibrated: bool = False
    """Whether the self-test of this machine measured these figures: rates that products reached, in place of peaks. `doctor
    --selftest` sets it."""


class Memory(Section):
    """The graphics card that the run must fit."""

    gpu: GpuName = "auto"
    """Graphics card to plan for. auto: this machine's, with the memory that is free on it now; without one, an RTX 3050 Laptop
    4 GB."""
    card: Card | None = None
    """A card that the table does not have, in place of `gpu`."""
    limit_mib: Positive | None = None
    """Memory that this process may use on the device, in MiB; CUDA enforces it. null: all of the card's usable memory."""
    on_oom: Literal["stop", "halve"] = "stop"
    """Reaction to an out-of-memory error. `stop`: end with advice. `halve`: halve the micro-batch, double the gradient
    accumulation and continue from the last checkpoint; the effective batch size and the order of the rows stay the same."""


class Output(Section):
    """Output directory, trackers and sample answers."""

    dir: Annotated[str, Field(min_length=1)] = "runs/run"
    """Run folder."""
    report_to: list[str] = []
    """Experiment trackers that transformers knows: tensorboard, wandb, mlflow, trackio, ..."""
    sample_prompts: list[str] = [
        "Hello, how are you today?",
        "What do you like to do on the weekend?",
        "What is the capital of France?",
    ]
    """Prompts that the model answers before and after training, for report.html; []: none."""
