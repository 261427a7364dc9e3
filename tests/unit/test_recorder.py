"""The recorder sees the same allocations as a real step, and the CUDA rules change exactly what they name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.validation.witness import profiled_peak_bytes, traced_peak_bytes
from lowvram_chat.planning.replay import replay
from lowvram_chat.tracing.cuda_rules import CudaRules
from lowvram_chat.tracing.materialise import materialise, repoint
from lowvram_chat.tracing.recorder import Event, Storage, TraceRecorder
from lowvram_chat.tracing.rules import DeviceRules

VOCABULARY, WIDTH, LAYERS = 1003, 64, 2
Model = TypeVar("Model", bound=torch.nn.Module)


def _model(attention: str = "sdpa", dropout: float = 0.0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: GPT2LMHeadModel = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    model.train()
    return model


def _meta(build: Callable[[], Model]) -> Model:
    with torch.device("meta"):
        return build()


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, micro_batches: int = 1) -> None:
    for _ in range(micro_batches):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def _real_and_traced_peaks(build: Callable[[], torch.nn.Module], rows: int, micro_batches: int) -> tuple[int, int]:
    """Return the peaks of two steps, weights included: profiled on the CPU, and traced by the CPU's rules."""
    model = build()
    optimizer, ids = _adamw(model), torch.zeros(rows, 32, dtype=torch.int64)
    model_bytes = _bytes(model)

    def two_steps() -> None:
        _step(model, optimizer, ids, micro_batches)
        _step(model, optimizer, ids, micro_batches)

    real = profiled_peak_bytes(two_steps)
    traced = _meta(build)
    with TraceRecorder(DeviceRules(plain_rows=True)) as recorder:
        materialise(traced, recorder)
        optimizer, ids = _adamw(traced), torch.empty(rows, 32, dtype=torch.int64)
        start = len(recorder.events)
        for _ in range(2):
            _step(traced, optimizer, ids, micro_batches)
    return model_bytes + real, model_bytes + traced_peak_bytes(recorder.events[start:])


def _checkpointed() -> GPT2LMHeadModel:
    model = _model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _lora() -> torch.nn.Module:
    import peft  # a broken installation must fail here, not skip

    targets = ["c_attn", "c_proj", "c_fc"]
    return peft.get_peft_model(_model(), peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True))


@pytest.mark.parametrize("rows", [1, 16], ids=["peak in the optimizer", "peak in the loss"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "build",
    [lambda: _model("eager"), _model, lambda: _model(dropout=0.1), _checkpointed, _lora],
    ids=["eager", "sdpa", "dropout", "checkpointed", "lora"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_trace_by_the_cpu_s_rules_has_the_peak_that_the_profiler_reports(
    build: Callable[[], torch.nn.Module], micro_batches: int, rows: int
) -> None:
    real, traced = _real_and_traced_peaks(build, rows, micro_batches)
    assert traced == pytest.approx(real, rel=0.01)


def _trace(step: Callable[[], object], rules: DeviceRules | None = None) -> list[Event]:
    with TraceRecorder(rules) as recorder:
        step()
    return recorder.events


def _allocated_sizes(events: list[Event], operation: str) -> list[int]:
    """Return the sizes in bytes of the storages that an operation allocated."""
    return [event.storage.nbytes for event in events if event.is_allocation and event.storage.operation == operation]


def test_gradients_that_only_the_engine_holds_are_added_in_place() -> None:
    def step() -> None:
        weight = torch.empty(256, 256, requires_grad=True)
        ((weight * 2) + (weight * 3).tanh()).sum().backward()

    assert not _allocated_sizes(_trace(step), "aten.add.Tensor")[1:]


def test_a_gradient_whose_storage_is_held_elsewhere_is_not_added_to_in_place() -> None:
    held = []

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            held.append(gradient * 2)
            return held[-1].view(-1)

    def step() -> None:
        weight = torch.empty(256, requires_grad=True)
        first = (weight * 3).tanh()  # the later operation's gradient arrives first
        result: torch.Tensor = Held.apply(weight)  # type: ignore[no-untyped-call]
        (first.sum() + result.sum()).backward()

    assert 1024 in _allocated_sizes(_trace(step), "aten.add.Tensor")


def test_a_sum_in_a_custom_backward_is_a_new_tensor() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient + gradient

    def step() -> None:
        weight = torch.empty(256, requires_grad=True)
        result: torch.Tensor = Doubled.apply(weight * 2)  # type: ignore[no-untyped-call]
        result.sum().backward()

    assert _allocated_sizes(_trace(step), "aten.add.Tensor") == [1024]


def test_every_storage_is_freed_once_and_after_its_allocation() -> None:
    with TraceRecorder() as recorder:
        model = _meta(_model)
        materialise(model, recorder)
        _step(model, _adamw(model), torch.empty(2, 32, dtype=torch.int64))
    live: set[Storage] = set()
    for storage, is_allocation in recorder.events:
        assert (storage in live) is not is_allocation
        (live.add if is_allocation else live.remove)(storage)


def test_a_tied_weight_is_moved_once_and_stays_tied() -> None:
    model = _meta(_model)
    with TraceRecorder() as recorder:
        materialise(model, recorder)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(event.storage.nbytes for event in recorder.events) == _bytes(model)
    assert recorder.events[0].storage.category == "weights"


def test_an_optimizer_built_on_the_meta_model_updates_the_traced_weights() -> None:
    model = _meta(lambda: torch.nn.Linear(8, 8))
    optimizer = _adamw(model)
    with TraceRecorder() as recorder:
        repoint(optimizer, materialise(model, recorder))
        model(torch.empty(2, 8)).sum().backward()
        optimizer.step()
        recorder.label(optimizer.state[model.weight].values(), "optimizer state")
    states = [event for event in recorder.events if event.storage.category == "optimizer state"]
    assert sum(event.storage.nbytes for event in states) >= 2 * 4 * 64


def test_cuda_s_dropout_allocates_a_mask_of_one_byte_per_element_first() -> None:
    events = _trace(lambda: functional.dropout(torch.empty(1024), 0.1), CudaRules())
    assert _allocated_sizes(events, "aten.native_dropout.default") == [1024, 4096]


@pytest.mark.parametrize(
    ("dtype", "masked", "capability", "width", "kernel"),
    [
        (torch.float16, False, (8, 6), 64, "flash"),
        (torch.float16, False, (7, 5), 64, "efficient"),
        (torch.float16, True, (8, 6), 64, "efficient"),
        (torch.float32, False, (8, 6), 64, "efficient"),
        (torch.float32, False, (8, 6), 6, ""),
    ],
)
def test_attention_uses_the_kernel_that_cuda_selects(
    dtype: torch.dtype, masked: bool, capability: tuple[int, int], width: int, kernel: str
) -> None:
    def step() -> None:
        query = torch.empty(2, 4, 32, width, dtype=dtype, requires_grad=True)
        mask = torch.ones(2, 1, 32, 32, dtype=torch.bool) if masked else None
        functional.scaled_dot_product_attention(query, query, query, mask, is_causal=not masked).sum().backward()

    events = _trace(step, CudaRules(capability))
    for name in ("flash", "efficient"):
        assert bool(_allocated_sizes(events, f"aten._scaled_dot_product_{name}_attention.default")) is (name == kernel)


def test_autocast_runs_layer_norm_and_softmax_in_fp32_as_on_cuda() -> None:
    def step() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            half = torch.empty(4, 8) @ torch.empty(8, 8)
            assert half.dtype == torch.float16
            assert functional.layer_norm(half, (8,)).dtype == torch.float32
            assert half.softmax(-1).dtype == torch.float32

    _trace(step, CudaRules())
    with torch.autocast("cpu", dtype=torch.float16):
        assert functional.layer_norm(torch.ones(4, 8).half(), (8,)).dtype == torch.float16, (
            "the rules must end with their block"
        )


def test_autocast_runs_what_could_overflow_in_fp32_as_on_cuda() -> None:
    def step() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            half = torch.empty(4, 8, dtype=torch.float16)
            for result in (
                half**3,
                half.exp(),
                half.log(),
                half.rsqrt(),
                half.reciprocal(),
                half.sum(),
                half.sum(-1),
                half.cumsum(-1),
                half.norm(),
                half.logsumexp(-1),
                functional.softplus(half),
                functional.rms_norm(half, (8,)),
            ):
                assert result.dtype == torch.float32
            assert (half * half).dtype == torch.float16

    _trace(step, CudaRules())


def test_the_buffers_inside_one_kernel_exist_together() -> None:
    recorder = TraceRecorder()
    recorder.record_temporaries([1024, 2048], "a kernel")
    assert replay(recorder.events).peak_allocated_bytes == 3072


def test_the_rows_of_an_attention_mask_are_padded_to_a_multiple_of_eight() -> None:
    def attend(length: int) -> None:
        query, mask = torch.empty(2, 4, length, 64), torch.empty(2, 1, length, length)
        functional.scaled_dot_product_attention(query, query, query, mask)

    padded = "aten.constant_pad_nd.default"
    assert _allocated_sizes(_trace(lambda: attend(30), CudaRules()), padded) == [4 * 2 * 30 * 32]
    assert _allocated_sizes(_trace(lambda: attend(32), CudaRules()), padded) == []


@pytest.mark.parametrize(("dtype", "copied"), [(torch.float16, False), (torch.bfloat16, True)])
def test_cuda_s_log_softmax_copies_bf16_but_not_fp16(dtype: torch.dtype, copied: bool) -> None:
    logits = torch.empty(4, 1024, dtype=dtype)
    events = _trace(lambda: functional.log_softmax(logits, 1, dtype=torch.float32), CudaRules())
    assert _allocated_sizes(events, "aten._log_softmax.default") == [4 * logits.numel()]
    assert _allocated_sizes(events, "aten._to_copy.default") == ([4 * logits.numel()] if copied else [])


def test_a_checkpoint_s_second_forward_follows_the_rules_too() -> None:
    def step() -> None:
        weight = torch.empty(64, 64, requires_grad=True)
        result: torch.Tensor = checkpoint(lambda x: functional.dropout(x.tanh(), 0.1), weight, use_reentrant=False)
        result.sum().backward()

    assert len(_allocated_sizes(_trace(step, CudaRules()), "aten.native_dropout.default")) == 4


def test_a_gradient_scaler_steps() -> None:
    def step() -> None:
        weight = torch.nn.Parameter(torch.empty(64, 64))
        optimizer, scaler = _adamw(torch.nn.ParameterList([weight])), torch.amp.GradScaler("cpu")
        scaler.scale((weight * 2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state[weight]

    _trace(step, CudaRules())


def test_each_thread_allocates_its_cublas_workspace_once() -> None:
    def step() -> None:
        weight = torch.empty(8, 8, requires_grad=True)
        (weight @ weight @ weight).sum().backward()

    events = _trace(step, CudaRules(cublas_workspace_bytes=1000))
    assert [event.storage.nbytes for event in events if event.storage.category == "workspace"] == [1000, 1000]


def test_a_limit_below_the_peak_names_the_storage_that_could_not_be_allocated() -> None:
    events = _trace(lambda: [torch.empty(1 << 22) for _ in range(4)])
    assert replay(events).peak_allocated_bytes == 4 << 24
    failed = replay(events, limit_bytes=3 << 24).out_of_memory_at
    assert failed is not None
    assert failed.nbytes == 1 << 24


def test_the_gradient_of_index_select_is_added_in_place_as_on_a_device() -> None:
    def step() -> None:
        states = torch.empty(64, 8, requires_grad=True)
        states.index_select(0, torch.arange(16)).sum().backward()

    events = _trace(step)
    zeros = _allocated_sizes(events, "aten.new_zeros.default")
    assert zeros == [64 * 8 * 4]
    assert not _allocated_sizes(events, "aten.index_add.default")


def test_cublaslt_has_a_workspace_of_its_own_only_in_old_versions_of_torch() -> None:
    def step() -> None:
        torch.addmm(torch.empty(8), torch.empty(4, 8), torch.empty(8, 8))

    for own, expected in ((0, []), (1 << 20, [1 << 20])):
        events = _trace(step, CudaRules(cublaslt_workspace_bytes=own))
        sizes = [e.storage.nbytes for e in events if e.is_allocation and e.storage.category == "temporaries"]
        assert sizes == expected
