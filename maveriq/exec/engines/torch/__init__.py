"""The torch engine: llama, falcon and GPT-J in uneven pipeline stages and tensor-parallel shards.

`engine` runs in the engine's own process, does not import torch, and starts one process (`rank`) per shard. A rank
reads its weights (`weights`, `linear`), runs its part of the decoder (`model`), and exchanges tensors with the other
ranks (`collectives`). `config` reads model configurations and checks parallel configurations without torch.
"""

from maveriq.exec.engines.torch.engine import TorchEngine

__all__ = ["TorchEngine"]
