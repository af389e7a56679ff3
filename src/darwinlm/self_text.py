"""Calibration text that the dense model writes itself: seeded sampling in batches."""

from collections.abc import Iterator

import torch
from transformers.cache_utils import DynamicCache

from darwinlm.adapters.loading import DenseModel
from darwinlm.adapters.walking import CACHE
from darwinlm.errors import UserError
from darwinlm.progress import task

BATCH = 64


@torch.no_grad()
def write_documents(dense: DenseModel, *, tokens: int, longest: int, seed: int) -> Iterator[list[int]]:
    """Sample documents from `dense` at temperature 1 until they hold `tokens` tokens together.

    Each begins with the tokenizer's first token (beginning or, for want of one, end of text) and ends at the model's
    end-of-text token, which it keeps: what a model says after that is not text. One that reaches `longest` tokens
    stops there.

    Raises:
        UserError: if the tokenizer names neither a beginning nor an end of text.
    """
    tokenizer = dense.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError("data 'self': the tokenizer has no beginning- or end-of-text token; give --data a text instead")
    ends = _end_tokens(dense)
    generator = torch.Generator(device=dense.device).manual_seed(seed)
    written = count = idle = 0
    with task("writing text", tokens) as progress:
        while written < tokens:
            # As many at once as are still needed if they turn out as long as those before them.
            mean = written / count if count else longest
            rows = min(BATCH, max(1, round((tokens - written) / mean)))
            documents = _write_batch(dense, first, ends, longest, rows, generator)
            fresh = sum(len(document) for document in documents)
            progress.advance(min(fresh, tokens - written))
            written, count = written + fresh, count + rows
            idle = 0 if any(len(document) > 2 for document in documents) else idle + 1
            if idle == 8:
                raise UserError("data 'self': the model writes only empty documents; give --data a text instead")
            yield from documents


def _write_batch(
    dense: DenseModel, first: int, ends: torch.Tensor, longest: int, count: int, generator: torch.Generator
) -> list[list[int]]:
    documents = [[first] for _ in range(count)]
    rows = list(range(count))
    ids_B1 = torch.full((count, 1), first, device=dense.device)
    cache = DynamicCache(config=dense.config)
    for _ in range(longest - 1):
        logits_BV = dense.model(ids_B1, use_cache=True, **{CACHE: cache}).logits[:, -1]
        ids_B1 = _sample(logits_BV, generator)
        for row, token in zip(rows, ids_B1[:, 0].tolist(), strict=True):
            documents[row].append(token)
        alive_B = ~torch.isin(ids_B1[:, 0], ends)
        if not bool(alive_B.all()):
            rows = [row for row, alive in zip(rows, alive_B.tolist(), strict=True) if alive]
            if not rows:
                break
            indices = alive_B.nonzero()[:, 0]
            cache.batch_select_indices(indices)
            ids_B1 = ids_B1[indices]
    return documents


def _sample(logits_BV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token a row at temperature 1, by inversion: one uniform number a row instead of one for each token."""
    probabilities_BV = logits_BV.float().softmax(-1)
    if torch.are_deterministic_algorithms_enabled():
        probabilities_BV = probabilities_BV.cpu()  # on CUDA sums along a row have no fixed order
    cumulative_BV = probabilities_BV.cumsum(-1).to(logits_BV.device)
    uniform_B1 = torch.rand(len(logits_BV), 1, generator=generator, device=logits_BV.device)
    return torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:]).clamp_max(logits_BV.shape[1] - 1)


def _end_tokens(dense: DenseModel) -> torch.Tensor:
    configured = dense.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured])
    ends |= {dense.tokenizer.eos_token_id}
    return torch.tensor(sorted(end for end in ends if end is not None), device=dense.device)
