"""Free memory, memory of activations kept for gradients, and automatic batch sizes."""

from collections.abc import Callable
from typing import TypeVar

import torch

from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.runtime.memory import available_memory
from darwinlm.runtime.progress import log

_Result = TypeVar("_Result")


class Portion:
    """Number of blocks per forward pass, halved permanently when a device runs out of memory."""

    def __init__(self, size: int, stage: str) -> None:
        """Start with `size` blocks; `stage` is named in log lines."""
        self.size = size
        self._stage = stage

    def __call__(self, run: Callable[[int], _Result]) -> _Result:
        """Call `run(size)`, with half the size as long as it runs out of memory.

        Raises:
            torch.OutOfMemoryError: if a single block does not fit.
        """
        asked = self.size
        while True:
            try:
                result = run(self.size)
                break
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            # Outside the handler, which keeps the tensors of the failed attempt alive.
            torch.cuda.empty_cache()
            self.size //= 2
        if self.size < asked:
            log.warning("%s: %d blocks per pass do not fit in device memory; using %d", self._stage, asked, self.size)
        return result


TRIAL_BYTES = {"sign": 3, "adamw": 18}
"""Bytes per trained parameter of a trial, by optimizer: its bfloat16 weight, and for AdamW a float32 weight, a gradient
and two moments. With `sign`, gradients exist for only some tensors at a time."""
SPARE = 1.25
"""Factor of free memory required before optional tensors are placed on a device."""


def free_memory(device: torch.device) -> int:
    """Return the bytes of `device` that this process can still allocate."""
    if device.type == "cuda":
        # Memory that PyTorch keeps of freed tensors can be reused.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return available_memory()


_SQUARES = 10
"""Bytes that eager attention keeps for each pair of positions and head."""


def kept_bytes(config: PrunedConfig, tokens: int, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of activations kept for gradients, for `tokens` tokens in blocks of `length`.

    A norm keeps its input and its float32 results; a projection its input; gate, activation and up their outputs; eager
    attention (needed for softcaps) the weights of all pairs of positions.
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
