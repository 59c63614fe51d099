"""A rank's stage of a model that runs on transformers' modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from maveriq.domain.models import WeightType
from maveriq.exec.engines.torch.collectives import Collectives
from maveriq.exec.engines.torch.config import Shard, TransformersConfig
from maveriq.exec.engines.torch.transformers_cache import StageCache
from maveriq.exec.engines.torch.transformers_model import (
    build_model,
    cache_argument,
    cut_stage,
    decoder_layers,
    materialise_buffers,
)
from maveriq.exec.engines.torch.transformers_sharding import LayerLoader, load_whole, plan_of
from maveriq.exec.engines.torch.transformers_weights import source_for
from maveriq.exec.engines.torch.weights import WeightSource
from maveriq.exec.messages import EngineSpec
from maveriq.exec.messages import PromptSequence as Prompt


class TransformersStage:
    """A rank's shard of a model of transformers, loaded (`decoding.Stage`).

    Every stage runs the model's own `forward`, so masks and positions are transformers'. Hidden states of the stage
    before go into its first layer, and those of its last layer come out of it, by hooks.

    Args:
        like: gives device and dtype of hidden states.

    Raises:
        EngineError: transformers cannot build the model, or its weights cannot be read or split.
    """

    def __init__(
        self,
        config: TransformersConfig,
        shard: Shard,
        spec: EngineSpec,
        source: WeightSource,
        collectives: Collectives,
        *,
        like: torch.Tensor,
    ) -> None:
        self.shard = shard
        self.vocabulary = config.vocabulary
        self.hidden = config.hidden
        self._like = like
        self._model = build_model(config, like.dtype, eager_experts=spec.weights != WeightType.FLOAT16)
        layers = decoder_layers(self._model, config.layers)
        self._cache = StageCache(self._model.config, spec.kv)
        source = source_for(self._model, source)
        materialise_buffers(self._model, like.device)
        cut_stage(self._model, layers, shard)
        self.weights_bytes = self._load_layers(config, spec, layers, source, collectives)
        self.weights_bytes += self._load_others(layers, source)
        self._forward = self._model if shard.is_last_stage else self._model.base_model
        self._cache_argument = cache_argument(self._model)
        self._padding: torch.Tensor | None = None
        self._received: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None
        self._after: list[Any] = list(layers[shard.layers.stop :])
        if not shard.is_first_stage:
            layers[shard.layers.start].register_forward_pre_hook(self._replace_input, with_kwargs=True)
        if not shard.is_last_stage:
            layers[shard.layers.stop - 1].register_forward_hook(self._keep_output)

    def _load_layers(
        self,
        config: TransformersConfig,
        spec: EngineSpec,
        layers: nn.ModuleList,
        source: WeightSource,
        collectives: Collectives,
    ) -> int:
        (name,) = (name for name, module in self._model.named_modules() if module is layers)
        loader = LayerLoader(
            config=config,
            shard=self.shard,
            kind=spec.weights,
            plan=plan_of(self._model, self.shard.tp),
            prefix=self._model.base_model_prefix,
            source=source,
            collectives=collectives,
        )
        return sum(loader.load(layers[number], f"{name}.{number}") for number in self.shard.layers)

    def _load_others(self, layers: nn.ModuleList, source: WeightSource) -> int:
        """Load the embedding, the output matrix and what else is outside of layers."""
        model, inside = self._model, set(layers.modules())
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {module: name for name, module in model.named_modules()}
        size_bytes = sum(
            load_whole(module, name, source)
            for module, name in names.items()
            if module is not head and module not in inside
        )
        if self.shard.is_last_stage:
            tied = bool(model.config.get_text_config().tie_word_embeddings)
            size_bytes += self._load_head(
                head, names[embedding if tied else head], names[head], embedding if tied else None, source
            )
        return size_bytes

    def _load_head(self, head: Any, weight_name: str, name: str, embedding: Any | None, source: WeightSource) -> int:
        """Load this rank's tokens of the output matrix; a view of a tied embedding that this stage has, too."""
        mine = self.shard.partition(self.vocabulary)
        rows = slice(mine.start, mine.stop)
        size_bytes = 0
        if embedding is not None and embedding.weight is not None:
            weight = embedding.weight[rows]
        else:
            whole = source.read(f"{weight_name}.weight", tuple(head.weight.shape))
            weight = whole if self.shard.tp == 1 else whole[rows].clone()
            size_bytes += weight.nbytes
        if head.bias is not None:
            bias = source.read(f"{name}.bias", tuple(head.bias.shape))[rows].clone()
            head.bias = nn.Parameter(bias, requires_grad=False)
            size_bytes += bias.nbytes
        head.weight = nn.Parameter(weight, requires_grad=False)
        return size_bytes

    def prefill(self, prompts: Sequence[Sequence[int]], received: torch.Tensor | None) -> torch.Tensor:
        """See `decoding.Stage`. Prompts are padded on the left, as transformers expects."""
        longest = max(map(len, prompts))
        padded = [[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts]
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._like.device)
        self._cache.begin()
        self._padding = pads[:, None] if bool(pads.any()) else None
        positions = (torch.arange(longest, device=pads.device) - pads[:, None]).clamp_min(0)
        return self._run(torch.tensor(padded, device=pads.device), positions, received)

    def decode(self, tokens: torch.Tensor, lengths: Sequence[int], received: torch.Tensor | None) -> torch.Tensor:
        """See `decoding.Stage`."""
        return self._run(tokens[:, None], torch.tensor(lengths, device=tokens.device)[:, None], received)

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor, received: torch.Tensor | None) -> torch.Tensor:
        """Run tokens [batch, tokens] at these positions, after those that the cache holds."""
        stored = self._cache.stored + tokens.shape[1]
        mask = None if self._padding is None else torch.arange(stored, device=tokens.device) >= self._padding
        self._received = received
        output = self._forward(
            **({"input_ids": tokens} if received is None else {"inputs_embeds": received}),
            **({"logits_to_keep": 1} if self.shard.is_last_stage else {}),
            **{self._cache_argument: self._cache},
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
        )
        self._cache.advance(tokens.shape[1])
        self._received = None
        if self.shard.is_last_stage:
            logits: torch.Tensor = output.logits[:, -1]
            return logits
        if self._sent is None:
            raise RuntimeError("the last layer of the stage has not run")
        sent, self._sent = self._sent, None
        return sent

    def _replace_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the first layer what the stage before sent, whatever the model did to it on the way."""
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _keep_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._sent = output[0] if isinstance(output, tuple) else output
        for layer in self._after:
            layer.returns_tuple = isinstance(output, tuple)

    def reserve(self, prompts: Sequence[Prompt]) -> None:
        """Reserve KV cache for an execution of these prompts, padded to the longest."""
        longest = max(len(prompt.prompt) for prompt in prompts)
        self._cache.reserve_for(len(prompts), longest + max(prompt.output_tokens for prompt in prompts))

    def release(self) -> None:
        """Free the KV cache."""
        self._cache.release()

    @property
    def layers(self) -> int:
        """How many transformer layers it holds."""
        return len(self.shard.layers)

    @property
    def kv_cache_bytes(self) -> int:
        """Memory that the KV cache has reserved now."""
        return self._cache.size_bytes
