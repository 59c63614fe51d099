"""The torch engine: llama, falcon and GPT-J in uneven pipeline stages and tensor-parallel shards.

`engine` runs in the engine's own process and knows no torch. It starts a process (`rank`) per shard; everything
that computes is there: `worker` loads a part (`stage`, out of `parameters` from `sources`) and runs it (`decode`)
with `links` to the other ranks. `architecture` and `plan` know models and splits without torch.
"""

from maveriq.exec.engines.torch.engine import TorchEngine

__all__ = ["TorchEngine"]
