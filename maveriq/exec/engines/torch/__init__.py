"""The torch engine: decoders in uneven pipeline stages and tensor-parallel shards.

`engine` runs in the engine's own process, does not import torch, and starts one process (`rank`) per shard. A rank
loads its stage, runs the decoding loop over it (`decoding`), and exchanges tensors with the others (`collectives`).
`config` reads model configurations and checks parallel configurations without torch.

Llama, falcon and GPT-J run on maveriq's own decoder (`model`, `weights`), other families (`families`) on transformers'
modules (`transformers_stage`). Both quantise with `linear` and keep keys and values in `kv_cache`.
"""

from maveriq.exec.engines.torch.engine import TorchEngine

__all__ = ["TorchEngine"]
