"""What the torch engine cannot do is refused before anything starts. (None of it needs torch.)"""

import json

import pytest

from maveriq.domain.catalog import load_catalog
from maveriq.domain.models import ModelSpec, model_from_hf_config
from maveriq.exec.engines.base import EngineError, FailureKind
from maveriq.exec.engines.torch import TorchEngine, hf_config
from maveriq.exec.engines.torch.architecture import read_architecture
from maveriq.exec.messages import EngineSpec

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
