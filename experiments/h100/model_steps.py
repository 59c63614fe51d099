"""Measure prefill and decode steps of one model with one, two and all of its layers.

The models are those of `transformers` with random weights, and scaled-dot-product attention of torch without a mask:
all sequences of a batch have equal length, so causal prefill and one-token decode need none. The KV cache is static; a
decode step writes its token at a fixed position and attends to all tokens up to it, as every step of an engine does.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from int8_linear import KERNEL_NAME, Int8Linear, quantise_linears
from timing import Timing, append_row, capture, one_line, sm_clock_mhz, synchronize, time_eager, time_graph
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

EAGER_DECODE_CONTEXT = 1024
MAX_PREFILL_TOKENS = 16384
MAX_GRAPH_PREFILL_TOKENS = 4096
_RESERVED_BYTES = 3 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The prompt lengths (also the contexts of decode steps) and batch sizes to measure."""

    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step: `batch` prompts of `length` tokens, or one token each of `batch` sequences that then hold `length`."""

    kind: str
    batch: int
    length: int


@dataclass(slots=True, kw_only=True)
class Record:
    """One row of records.csv; README.md explains the columns."""

    model: str
    layers: int
    full_layers: int
    weights: str
    weight_kernel: str
    kind: str
    mode: str
    batch: int
    tokens_each: int
    step_tokens: int
    status: str = "measured"
    seconds: float | None = None
    mad_seconds: float | None = None
    synced_seconds: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    read_bytes: float | None = None
    experts_hit: float | None = None
    sm_clock_mhz: int | None = None
    elapsed_s: float | None = None
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Check:
    """One row of checks.csv: a comparison of two computations of the same logits or product."""

    model: str
    layers: int
    weights: str
    check: str
    relative_error: float | None = None
    equal_tokens: str = ""
    note: str = ""


class FixedPositionLayer(CacheLayerMixin):  # type: ignore[misc] # mypy does not read transformers
    """The keys and values of one layer: every update writes behind `past` tokens and returns all up to there."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, past: int) -> None:
        super().__init__()
        self.keys, self.values, self._past = keys, values, past
        self.is_initialized = True

    def lazy_initialization(self, *tensors: torch.Tensor) -> None:
        """Do nothing: the memory exists."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write keys and values behind the past and return all."""
        end = self._past + key_states.shape[2]
        self.keys[:, :, self._past : end].copy_(key_states)
        self.values[:, :, self._past : end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens attended to, and the offset of the first."""
        return self._past + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of past tokens."""
        return self._past

    def get_max_length(self) -> int:
        """Return the number of tokens that the memory holds."""
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length


def use_maskless_attention() -> None:
    """Let transformers build no masks, and torch's attention accept fewer KV heads than heads (Falcon passes one)."""
    AttentionMaskInterface.register("sdpa", lambda *_, **__: None)
    attention = torch.nn.functional.scaled_dot_product_attention

    def grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        if query.shape[1] != key.shape[1]:
            options["enable_gqa"] = True
        return attention(query, key, value, **options)

    torch.nn.functional.scaled_dot_product_attention = grouped
    torch.backends.cuda.enable_cudnn_sdp(False)  # noqa: FBT003 (it plans each new shape for a second or so)


class ModelUnderTest:
    """A model of random weights on a device, and the steps to time on it."""

    def __init__(self, config: Any, *, weights: str, device: torch.device) -> None:
        self.config, self.weights, self.device = config, weights, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device(device):
            options = {"dtype": dtype, "attn_implementation": "sdpa"}
            if hasattr(config, "num_local_experts"):
                options["experts_implementation"] = "grouped_mm"
            self.model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
        self.kernel = "cuBLAS through torch"
        if weights == "int8":
            quantise_linears(self.model)
            self.kernel = KERNEL_NAME
        self.model.requires_grad_(requires_grad=False)
        _skip_mask(self.model)
        _slice_shared_heads(self.model)
        release(device)
        self.dtype = dtype
        heads: int = config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        if hasattr(config, "num_local_experts"):
            self._choose_experts_kernel()
        is_multi_query = getattr(config, "multi_query", False)
        self.kv_heads: int = 1 if is_multi_query else getattr(config, "num_key_value_heads", None) or heads

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, shared ones once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache for one token of one sequence."""
        layers, element_bytes = int(self.config.num_hidden_layers), int(self.dtype.itemsize)
        return 2 * layers * self.kv_heads * self.head_size * element_bytes

    def read_bytes(self, experts_hit: float | None) -> float:
        """Weight bytes that a decode step has to read: all but untied input embeddings and experts without a token."""
        total = float(self.weight_bytes)
        if not getattr(self.config, "tie_word_embeddings", False):
            embeddings = self.model.get_input_embeddings().weight
            total -= embeddings.numel() * embeddings.element_size()
        if experts_hit is not None:
            idle_share = 1 - experts_hit / self.config.num_local_experts
            experts = [weight for name, weight in self.model.named_parameters() if ".experts." in name]
            total -= idle_share * sum(weight.numel() * weight.element_size() for weight in experts)
        return total

    def new_cache(self, batch: int, capacity: int, past: int) -> Cache:
        """Return a KV cache of random keys and values."""
        shape = (batch, self.kv_heads, capacity, self.head_size)
        layers = [
            FixedPositionLayer(self._random(shape), self._random(shape), past)
            for _ in range(self.config.num_hidden_layers)
        ]
        return Cache(layers=layers)

    def step(self, cache: Cache | None, token_ids: torch.Tensor, past: int) -> Callable[[], torch.Tensor]:
        """Return a call that computes the logits of each sequence's next token, and chooses the token."""
        positions = torch.arange(past, past + token_ids.shape[1], device=self.device).unsqueeze(0)

        def run() -> torch.Tensor:
            output = self.model(
                input_ids=token_ids,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
            )
            logits: torch.Tensor = output.logits[:, -1]
            logits.argmax(dim=-1)
            return logits

        return run

    def token_ids(self, batch: int, length: int) -> torch.Tensor:
        """Return random tokens."""
        return torch.randint(0, self.config.vocab_size, (batch, length), device=self.device)

    def mean_experts_hit(self, run: Callable[[], object]) -> float | None:
        """Run once and return how many experts get a token, on the average of layers; None for a dense model."""
        routers = [module for module in self.model.modules() if type(module).__name__.endswith("TopKRouter")]
        if not routers:
            return None
        counts: list[int] = []
        hooks = [
            router.register_forward_hook(lambda _module, _inputs, outputs: counts.append(outputs[-1].unique().numel()))
            for router in routers
        ]
        run()
        for hook in hooks:
            hook.remove()
        return sum(counts) / len(counts)

    def _choose_experts_kernel(self) -> None:
        """Use transformers' loop over experts, which no CUDA graph can hold, where the grouped product does not run."""
        kernel = "grouped_mm"
        try:
            with torch.inference_mode():
                self.step(None, self.token_ids(1, 2), 0)()
        except Exception as error:  # torch names no type for a product that the GPU lacks
            kernel = f"a loop, since grouped_mm fails ({one_line(error)})"
            self.model.set_experts_implementation("eager")
        self.kernel += f", experts by {kernel}"

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_()

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.model.parameters()
        for module in self.model.modules():
            if isinstance(module, Int8Linear):
                yield from module.buffers(recurse=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStage:
    """The measurements of one model in one weight format."""

    name: str
    settings: dict[str, Any]
    weights: str
    grid: Grid
    device: torch.device
    out: Path
    started: float
    layers: tuple[int, ...]
    smoke: bool = False

    def run(self, deadline: float) -> None:
        """Measure models of each number of layers. A failed one is recorded and the next is measured.

        Args:
            deadline: when to start no more points, as `time.time()` counts.
        """
        use_maskless_attention()
        torch.manual_seed(0)
        start = time.time()
        for index, layers in enumerate(self.layers):
            is_full = index == len(self.layers) - 1
            # fingerprints may take at most half the time: without the full model they show nothing
            share = 1.0 if is_full else 0.25 * (index + 1)
            try:
                self._measure_model(layers, start + share * (deadline - start))
            except Exception as error:  # recorded; the next number of layers may work
                self._check_row(layers, "build and run", note=one_line(error))
            release(self.device)

    def _measure_model(self, layers: int, deadline: float) -> None:
        with torch.inference_mode():
            model = ModelUnderTest(self._config(layers), weights=self.weights, device=self.device)
            self._check_steps(model)
            for point in self._points():
                if time.time() > deadline:
                    self._append(self._record(model, point, "any"), status="skipped", reason="no time left")
                else:
                    self._measure_point(model, point)
                release(self.device)

    def _config(self, layers: int) -> Any:
        settings = {**self.settings, "num_hidden_layers": layers}
        return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)

    def _points(self) -> list[Point]:
        if self.smoke:
            middle = self.grid.lengths[len(self.grid.lengths) // 2]
            return [Point(kind=kind, batch=4, length=middle) for kind in ("decode", "prefill")]
        sizes = self.grid.batch_sizes
        decode_order = (sizes[0], *reversed(sizes[1:]))
        rounds = [("decode", decode_order[0]), ("prefill", sizes[0])]
        for decode_batch, prefill_batch in zip(decode_order[1:], sizes[1:], strict=True):
            rounds += [("decode", decode_batch), ("prefill", prefill_batch)]
        return [Point(kind=kind, batch=batch, length=length) for kind, batch in rounds for length in self.grid.lengths]

    def _measure_point(self, model: ModelUnderTest, point: Point) -> None:
        record = self._record(model, point, "any")
        reason = self._reason_to_skip(model, point)
        if reason:
            self._append(record, status="skipped", reason=reason)
            return
        try:
            self._measure_step(model, point)
        except torch.OutOfMemoryError:
            self._append(record, status="skipped", reason="out of memory")
        except Exception as error:  # recorded; the next point may work
            self._append(record, status="failed", reason=one_line(error))

    def _reason_to_skip(self, model: ModelUnderTest, point: Point) -> str:
        if point.kind == "prefill" and point.batch * point.length > MAX_PREFILL_TOKENS:
            return f"more than {MAX_PREFILL_TOKENS} tokens in a step"
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            needed = model.kv_bytes_per_token * point.batch * point.length + _RESERVED_BYTES
            if needed > free:
                return f"needs {needed / 2**30:.1f} GiB for the KV cache and reserve, {free / 2**30:.1f} are free"
        return ""

    def _measure_step(self, model: ModelUnderTest, point: Point) -> None:
        is_decode = point.kind == "decode"
        new_tokens = 1 if is_decode else point.length
        past = point.length - new_tokens
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cache = model.new_cache(point.batch, point.length, past)
        run = model.step(cache, model.token_ids(point.batch, new_tokens), past)
        run()  # the first call loads kernels
        synchronize(self.device)
        facts: dict[str, Any] = {
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            "kv_bytes": model.kv_bytes_per_token * point.batch * point.length,
        }
        if is_decode:
            facts["experts_hit"] = model.mean_experts_hit(run)
            facts["read_bytes"] = model.read_bytes(facts["experts_hit"])
        has_graph = False
        if self.device.type == "cuda" and (is_decode or point.batch * point.length <= MAX_GRAPH_PREFILL_TOKENS):
            has_graph = self._measure_graph(model, point, run, facts)
        if not is_decode or point.length == EAGER_DECODE_CONTEXT or not has_graph:
            timing = time_eager(run, self.device, target_s=0.1 if is_decode else 0.25)
            self._append_timing(self._record(model, point, "eager"), timing, facts)

    def _measure_graph(
        self, model: ModelUnderTest, point: Point, run: Callable[[], object], facts: dict[str, Any]
    ) -> bool:
        """Measure a step as a CUDA graph, or record why that fails; eager work is measured then."""
        record = self._record(model, point, "graph")
        try:
            timing = time_graph(capture(run), self.device, target_s=0.15)
        except torch.OutOfMemoryError:
            self._append(record, status="skipped", reason="out of memory")
            return False
        except Exception as error:  # recorded; the step runs without a graph
            self._append(record, status="failed", reason=one_line(error))
            return False
        self._append_timing(record, timing, facts)
        return True

    def _check_steps(self, model: ModelUnderTest) -> None:
        """Compare decode behind a filled cache with a forward pass without one, and a graph with eager work."""
        layers = model.config.num_hidden_layers
        past, batch = self.grid.lengths[0], 2
        try:
            token_ids = model.token_ids(batch, past + 1)
            whole = model.step(None, token_ids, 0)().float()
            cache = model.new_cache(batch, past + 1, 0)
            model.step(cache, token_ids[:, :past].contiguous(), 0)()
            decode_cache = Cache(layers=[FixedPositionLayer(layer.keys, layer.values, past) for layer in cache.layers])
            run = model.step(decode_cache, token_ids[:, past:].contiguous(), past)
            eager = run().float()
            self._compare(layers, "cached decode against a pass without cache", eager, whole)
            if self.device.type == "cuda":
                self._check_graph(layers, run, eager)
            for module in model.model.modules():
                if isinstance(module, Int8Linear):
                    x = torch.randn(batch, module.weight.shape[1], device=self.device, dtype=model.dtype)
                    exact = x.double() @ (module.weight.double() * module.scale.double()[:, None]).T
                    self._compare(layers, "int8 product against 64-bit floats", module(x), exact)
                    break
        except Exception as error:  # recorded; the timings are still of use
            self._check_row(layers, "steps", note=one_line(error))

    def _check_graph(self, layers: int, run: Callable[[], torch.Tensor], eager: torch.Tensor) -> None:
        kept: list[torch.Tensor] = []
        graph = capture(lambda: kept.append(run()))
        kept[-1].zero_()
        graph.replay()
        torch.cuda.synchronize()
        self._compare(layers, "graph decode against eager", kept[-1], eager)

    def _compare(self, layers: int, check: str, tensor: torch.Tensor, reference: torch.Tensor) -> None:
        tensor, reference = tensor.double(), reference.double()
        self._check_row(
            layers,
            check,
            relative_error=float((tensor - reference).norm() / reference.norm()),
            equal_tokens=f"{int((tensor.argmax(-1) == reference.argmax(-1)).sum())} of {tensor.shape[0]}",
        )

    def _check_row(self, layers: int, check: str, **values: Any) -> None:
        append_row(
            self.out / "checks.csv",
            Check(model=self.name, layers=layers, weights=self.weights, check=check, **values),
        )

    def _record(self, model: ModelUnderTest, point: Point, mode: str) -> Record:
        return Record(
            model=self.name,
            layers=model.config.num_hidden_layers,
            full_layers=self.layers[-1],
            weights=self.weights,
            weight_kernel=model.kernel,
            kind=point.kind,
            mode=mode,
            batch=point.batch,
            tokens_each=point.length,
            step_tokens=point.batch * (1 if point.kind == "decode" else point.length),
            weight_bytes=model.weight_bytes,
        )

    def _append_timing(self, record: Record, timing: Timing, facts: dict[str, Any]) -> None:
        record.seconds, record.mad_seconds = timing.seconds, timing.mad_seconds
        record.synced_seconds, record.repeats = timing.synced_seconds, timing.repeats
        self._append(record, sm_clock_mhz=sm_clock_mhz(), **facts)

    def _append(self, record: Record, **values: Any) -> None:
        for name, value in values.items():
            setattr(record, name, value)
        record.elapsed_s = round(time.time() - self.started, 2)
        append_row(self.out / "records.csv", record)


def release(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _skip_mask(model: torch.nn.Module) -> None:
    """Keep a model from making a causal mask: falcon always makes one, with a copy from the CPU that no graph captures.

    Attention here is causal without it.
    """
    module = sys.modules[type(model).__module__]
    if hasattr(module, "create_causal_mask"):
        module.create_causal_mask = lambda **_: None  # type: ignore[attr-defined]


def _slice_shared_heads(model: torch.nn.Module) -> None:
    """Let falcon take its one KV head by slices: it indexes with lists, whose copy from the CPU no graph captures."""
    if not getattr(model.config, "multi_query", False) or getattr(model.config, "new_decoder_architecture", False):
        return

    def split(fused: torch.Tensor, *, heads: int, head_size: int) -> tuple[torch.Tensor, ...]:
        batch, length, _ = fused.shape
        fused = fused.view(batch, length, heads + 2, head_size)
        return fused[..., :-2, :], fused[..., -2:-1, :], fused[..., -1:, :]

    for module in model.modules():
        if hasattr(module, "_split_heads"):
            module._split_heads = functools.partial(split, heads=module.num_heads, head_size=module.head_dim)  # noqa: SLF001
