"""Memory: what is free, what a pass through layers leaves there for its gradients, and how many blocks fit."""

from collections.abc import Callable
from typing import TypeVar

import torch

from darwinlm.adapters.modeling_darwinlm import PrunedConfig
from darwinlm.memory import available_memory
from darwinlm.progress import log

_Result = TypeVar("_Result")


class Portion:
    """How many blocks pass through a model at a time: halved for good where a device's memory does not suffice."""

    def __init__(self, size: int, stage: str) -> None:
        """Begin with `size` blocks; `stage` is what a log line names."""
        self.size = size
        self._stage = stage

    def __call__(self, run: Callable[[int], _Result]) -> _Result:
        """`run(size)`, again with half the size for as long as it runs out of memory.

        Raises:
            torch.OutOfMemoryError: if one block is too much.
        """
        asked = self.size
        while True:
            try:
                result = run(self.size)
                break
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            # After the handler, which keeps the tensors of the failed attempt alive.
            torch.cuda.empty_cache()
            self.size //= 2
        if self.size < asked:
            log.warning(
                "%s: %d blocks in a pass do not fit the memory of the device; now %d", self._stage, asked, self.size
            )
        return result


TRIAL_BYTES = {"sign": 3, "adamw": 18}
"""By optimiser, for each parameter that a trial trains: its bfloat16 weight, and with AdamW a float32 one, a gradient
and two moments. With `sign` gradients exist for some tensors at a time."""
SPARE = 1.25
"""By how much more than what is counted must be free before something is put on a device that can be elsewhere."""


def free_memory(device: torch.device) -> int:
    """Bytes of `device` that this process can still take."""
    if device.type == "cuda":
        # What PyTorch keeps of freed tensors is free for new ones.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return available_memory()


_SQUARES = 10
"""Bytes that attention written out keeps for each pair of positions and head."""


def kept_bytes(config: PrunedConfig, tokens: int, length: int, dtype: torch.dtype) -> int:
    """What the layers of a model keep of `tokens` tokens, in blocks of `length`, until their gradients are computed.

    A norm keeps what it reads and its float32 results; a projection its input; gate, activation and up theirs;
    attention that is written out (`eager`, as softcaps want it) the weights of all pairs of positions.
    """
    squares = _SQUARES * length if config._attn_implementation == "eager" else 0
    kept = 0
    for index in range(config.num_hidden_layers):
        layer, skipped = config.layer(index), config.skipped(index)
        norm = 8 * config.hidden_size
        if "attention" not in skipped:
            heads = 2 * layer.num_attention_heads + 2 * layer.num_key_value_heads
            kept += norm + dtype.itemsize * (config.hidden_size + heads * config.head_dim)
            kept += squares * layer.num_attention_heads
        if "mlp" not in skipped:
            width = getattr(layer, "moe_intermediate_size", None) or layer.intermediate_size
            width *= getattr(layer, "num_experts_per_tok", None) or 1
            kept += norm + dtype.itemsize * (config.hidden_size + 4 * width)
    return tokens * kept
