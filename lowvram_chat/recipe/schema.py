"""What a recipe may say: seven frozen sections, a docstring under each field (its help and its JSON-schema text)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from lowvram_chat.errors import did_you_mean
from lowvram_chat.gpus import GPUS
from lowvram_chat.recipe.adapters import ADAPTERS, REFUSED_ADAPTERS, REFUSED_TARGETS
from lowvram_chat.recipe.optimizers import OPTIMIZERS

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text", "baseline")
POSITIONS_OF_GPT2 = 1024


def _one_of(known: Iterable[str]) -> tuple[AfterValidator, Any]:
    """Return what makes a `str` field a choice out of a table: the check and its JSON-schema `enum`."""
    names = list(known)

    def check(value: str) -> str:
        if value in REFUSED_ADAPTERS and value not in names:
            raise ValueError(f"'{value}' {REFUSED_ADAPTERS[value]}; known: {', '.join(names)}")
        if value not in names:
            raise ValueError(f"unknown choice; known: {', '.join(names)}.{did_you_mean(value, names)}".rstrip("."))
        return value

    return AfterValidator(check), Field(json_schema_extra={"enum": [*names]})


OptimizerName = Annotated[str, *_one_of(OPTIMIZERS)]
AdapterKind = Annotated[str, *_one_of(ADAPTERS)]
GpuName = Annotated[str, *_one_of(GPUS)]
FormatName = Annotated[str, *_one_of(FORMATS)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, and a key that is not a field is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class Model(Section):
    """The base model."""

    name: str = "openai-community/gpt2"
    """Hub id, local folder, or `builtin:tiny-gpt2`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type the base weights are held in. Trained weights must be float32 under fp16; a frozen base may be smaller."""
    load_in: Literal["4bit"] | None = None
    """`4bit`: hold the frozen base as nf4 (QLoRA); needs an adapter."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    dropout: Share | None = None
    """Every dropout probability of the base model; null keeps the model's own (GPT-2: 0.1)."""
    fused_gelu: bool = True
    """Run GPT-2's `gelu_new` as one kernel (the same function in half the activation memory)."""
    fused_loss: bool = True
    """Score labelled tokens only, in tiles that never hold all logits; false: the model's own loss, for comparison."""
    document_attention: bool = True
    """Packed rows on a CPU, not compiled: attend within each document, without a mask; false: under a mask over whole rows."""
    pad_vocabulary: bool = True
    """Round the vocabulary up to a multiple of 64 in the loss's half-precision matrix products, which run faster so;
    the weights stay as they are."""


class Adapter(Section):
    """A low-rank adapter; `adapter: null` is full fine-tuning."""

    kind: AdapterKind = "lora"
    """lora, rslora, dora or pissa."""
    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """Scaling numerator: the update is multiplied by alpha / r (rslora: alpha / sqrt(r))."""
    dropout: Share = 0.0
    """Dropout in front of the adapter."""
    fused: bool = True
    """Add a plain adapter's product to its layer's output in one kernel (on a CPU in fp32: fold it into a copy of the
    weight); false: PEFT's own forward, for comparison."""
    target_modules: list[str] | None = None
    """Names of the layers that get an adapter; null: every linear layer of the blocks."""

    @field_validator("target_modules")
    @classmethod
    def _no_tied_target(cls, names: list[str] | None) -> list[str] | None:
        for name in names or []:
            if name in REFUSED_TARGETS:
                raise ValueError(f"'{name}' {REFUSED_TARGETS[name]}; leave it out")
        return names


class Data(Section):
    """The conversations."""

    source: str | list[str] = "HuggingFaceH4/ultrachat_200k"
    """Hub dataset id, local files or globs (.jsonl .json .csv .parquet), or `builtin:chitchat`."""
    subset: str | None = None
    """Configuration name of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    eval_source: str | list[str] | None = None
    """Held-out conversations of their own: hub id, files or globs."""
    eval_split: str | None = None
    """Held-out split of the hub dataset."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training conversations to hold out (seeded by train.seed), where there is no eval source or split."""
    format: FormatName | None = None
    """Row format; null: detected from the first row."""
    limit: Positive | None = None
    """Use only the first so many training conversations."""
    eval_limit: Positive | None = None
    """Use only the first so many held-out conversations."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Rows that cannot be used to skip before the run is refused."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: the assistant's words and the EOS after them, or all."""
    max_length: Annotated[int, Field(ge=8, le=POSITIONS_OF_GPT2)] = POSITIONS_OF_GPT2
    """Tokens of a row at most; GPT-2 has 1,024 positions."""
    overflow: Literal["truncate", "split"] = "truncate"
    """What becomes of a longer conversation: cut off, or split into windows so that no text is lost."""
    rows: Literal["padded", "grouped", "packed"] = "padded"
    """How rows become batches: `padded` in random order; `grouped` with others of like length, the longest first;
    `packed`: several conversations in a row of max_length, none of which sees another."""
    attention_mask: bool = False
    """Hand the model the mask of padded batches. It changes no loss, since padding stands where no token looks, and costs
    attention its fast kernel; for comparison."""
    chat_template: str = "plain"
    """`plain` (user: ... / assistant: ... lines), `chatml`, `own` (the tokenizer's), or a .jinja file."""


class Train(Section):
    """The training loop, in the words of TRL and transformers."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows."""
    max_steps: Positive | None = None
    """Stop after so many optimizer steps (also sets the schedule's length); null: by epochs."""
    per_device_train_batch_size: Positive = 4
    """Rows of a micro-batch."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of an optimizer step."""
    micro_batch: Literal["given", "planned"] = "given"
    """`planned`: cut the optimizer step (per_device_train_batch_size x gradient_accumulation_steps rows, which stay) into
    the largest micro-batches that fit the card, and checkpoint only where not one row fits without."""
    per_device_eval_batch_size: Positive = 8
    """Rows of an evaluation batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup", "constant"] = "cosine"
    """Shape of the learning rate over the run."""
    warmup_ratio: Share = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm to clip to; 0: no clipping."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Type of the matrix products (autocast); weights that are trained stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool | Literal["if_possible"] = False
    """Compile the blocks (torch.compile, batches of one shape). true refuses where a compiler is missing; if_possible goes
    on without."""
    fp16_accumulation: bool = False
    """Sum fp16 matrix products in fp16: up to twice the rate on GeForce cards, and a risk: sums can overflow or round."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that prepare batches; null: 2 on CUDA, none on a CPU."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of shuffling, dropout, adapter weights and the held-out split."""
    logging_steps: Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_steps: Positive | None = None
    """Optimizer steps between two evaluations; null: before and after the run only."""
    save_steps: Positive | None = 500
    """Optimizer steps between two checkpoints; null: none."""
    save_total_limit: Positive = 2
    """Checkpoints to keep."""

    @property
    def effective_batch_size(self) -> int:
        """Rows that one process works through for an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class OptimizerSection(Section):
    """The optimizer."""

    name: OptimizerName = "adamw_8bit"
    """A row of the optimizer table."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (not on biases and layer norms)."""
    beta1: Share = 0.9
    """First-moment decay (Adam, Lion)."""
    beta2: Share = 0.999
    """Second-moment decay (Adam, Lion)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator term."""
    momentum: Share = 0.0
    """SGD's momentum."""


class Memory(Section):
    """The card that the run must fit."""

    gpu: GpuName = "rtx-3050-laptop-4gb"
    """A row of the card table."""
    limit_mib: Positive | None = None
    """Budget of this process on the device, MiB; on CUDA the process is capped to it. null: the whole card."""
    on_oom: Literal["stop", "halve"] = "stop"
    """What an out-of-memory error does: stop with advice, or halve the micro-batch, double the accumulation (the same
    effective batch, the same rows in the same order) and go on from the last checkpoint."""


class Output(Section):
    """Where the run goes and who is told."""

    dir: str = "runs/run"
    """Run folder."""
    report_to: list[str] = []
    """Trackers known to transformers: tensorboard, wandb, mlflow, trackio, ..."""
    sample_prompts: list[str] = [
        "Hello, how are you today?",
        "What do you like to do on the weekend?",
        "What is the capital of France?",
    ]
    """Questions that the model answers before the run and after it, for report.html; []: none."""


class Recipe(Section):
    """A whole recipe: what `python -m lowvram_chat.sft` runs."""

    model: Model = Model()
    adapter: Adapter | None = None
    data: Data = Data()
    train: Train = Train()
    optimizer: OptimizerSection = OptimizerSection()
    memory: Memory = Memory()
    output: Output = Output()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = [text for wrong, text in _disagreements(self) if wrong]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _disagreements(recipe: Recipe) -> list[tuple[bool, str]]:
    """Return (is it so, the problem and what to do) for settings that exclude each other."""
    model, data, optimizer = recipe.model, recipe.data, recipe.optimizer
    full = recipe.adapter is None
    held_out = [data.eval_source, data.eval_split, data.eval_fraction]
    read = OPTIMIZERS[optimizer.name].reads
    return [
        (
            model.load_in == "4bit" and full,
            "model.load_in: 4bit weights cannot be trained themselves. Add an adapter section, or set model.load_in=null.",
        ),
        (
            model.load_in == "4bit" and recipe.adapter is not None and recipe.adapter.kind == "pissa",
            "adapter.kind: pissa starts from the base's own weights, which 4-bit ones cannot give. Set adapter.kind=lora.",
        ),
        (
            full and model.dtype != "float32",
            f"model.dtype: {model.dtype} weights cannot be trained under autocast. Set model.dtype=float32, or add an adapter.",
        ),
        (
            sum(value is not None for value in held_out) > 1,
            "data: eval_source, eval_split and eval_fraction exclude each other. Keep one.",
        ),
        (
            data.rows == "packed" and data.attention_mask,
            "data.attention_mask: packed rows are told apart by their positions, which a mask would override. Leave it out.",
        ),
        (
            recipe.train.fp16_accumulation and recipe.train.precision != "fp16",
            f"train.fp16_accumulation: sums of {recipe.train.precision} products are not fp16. Leave it out, or set "
            "train.precision=fp16.",
        ),
        *[
            (
                name in optimizer.model_fields_set and name not in read,
                f"optimizer.{name}: {optimizer.name} does not read it. Leave it out.",
            )
            for name in ("beta1", "beta2", "eps", "momentum")
        ],
    ]
