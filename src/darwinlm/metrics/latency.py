"""Time of a request: prefill of the prompt, then decoding token by token."""

import time

import torch

from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.walking import CACHE


@torch.no_grad()
def time_request(model: PrunedModel, *, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Return the seconds for the prompt, and the seconds for the new tokens (greedy, with KV cache)."""
    ids_BT = (torch.arange(batch_size * prompt_tokens, device=model.device) * 7919 % model.config.vocab_size).view(
        batch_size, prompt_tokens
    )
    _synchronise(model.device)
    start = time.perf_counter()
    output = model(ids_BT, use_cache=True, logits_to_keep=1)
    _synchronise(model.device)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token_B1 = output.logits[:, -1:].argmax(-1)
        output = model(token_B1, use_cache=True, **{CACHE: output[CACHE]})
    _synchronise(model.device)
    return prefilled - start, time.perf_counter() - prefilled


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
