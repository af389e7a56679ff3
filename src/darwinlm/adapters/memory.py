"""Memory: what is free, and what a pass through a model's layers leaves there for its gradients."""

import torch

from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig
from darwinlm.memory import available_memory


def free_memory(device: torch.device) -> int:
    """Bytes of `device` that this process can still take."""
    if device.type == "cuda":
        # What PyTorch keeps of freed tensors is free for new ones.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return available_memory()


def kept_bytes(config: DarwinLMConfig, tokens: int, dtype: torch.dtype) -> int:
    """What the layers of a model keep of `tokens` tokens until their gradients are computed, without recomputing.

    A norm keeps what it reads and its float32 results; a projection its input; gate, activation and up theirs.
    """
    kept = 0
    for index in range(config.num_hidden_layers):
        layer, skipped = config.per_layer_config[index], config.skipped(index)
        norm = 8 * config.hidden_size
        if "attention" not in skipped:
            heads = 2 * layer.num_attention_heads + 2 * layer.num_key_value_heads
            kept += norm + dtype.itemsize * (config.hidden_size + heads * config.head_dim)
        if "mlp" not in skipped:
            kept += norm + dtype.itemsize * (config.hidden_size + 4 * layer.intermediate_size)
    return tokens * kept
