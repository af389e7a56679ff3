"""Tests of the training loss and its gradients against plain formulas, and of its memory."""

import itertools

import pytest
import torch
from helpers import VOCABULARY, halved
from recoveries import BLOCKS, CPU, TEXT, packed
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from darwinlm.data.tokens import Tokens
from darwinlm.recovery import objective, samples, teacher
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.teacher import write_predictions


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (0.5, 2.5)])
def test_objective_and_gradient_match_whole_logits(pruned, share, temperature, monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK_TOKENS", 40)
    dense, database = pruned("qwen2", "kv_group")
    ids = BLOCKS.long()
    labels = ids.clone()
    labels[:, :5] = -100
    model, again = (halved(dense, database, trainable=True) for _ in range(2))
    Objective(model, dense.model, share, temperature)(ids, labels)["loss"].backward()
    logits = again(ids).logits
    log_q, warm_q = logits.log_softmax(-1), (logits / temperature).log_softmax(-1)
    warm_p = (dense.model(ids).logits / temperature).log_softmax(-1).detach()
    kl = temperature**2 * (warm_p.exp() * (warm_p - warm_q)).sum(-1)[:, 4:-1].mean()  # where the next token counts
    next_token = torch.nn.functional.cross_entropy(log_q[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    ((1 - share) * next_token + share * kl).backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (7, 2.5), (VOCABULARY - 1, 1.0)])
def test_objective_with_top_k_teacher(top_k, temperature, pruned, tmp_path, monkeypatch):
    for module in (objective, teacher):
        monkeypatch.setattr(module, "_CHUNK_TOKENS", 20)
    monkeypatch.setattr(teacher, "_PIECE_BLOCKS", 4)
    dense, database = pruned("qwen2", "kv_group")
    ids = BLOCKS.long()
    found = write_predictions(lambda: dense.model, TEXT, top_k, temperature, False, tmp_path, CPU)
    blocks = [found[number] for number in range(len(BLOCKS))]
    told = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    model, again = (halved(dense, database, trainable=True) for _ in range(2))
    got = Objective(model, None, 1.0, temperature)(ids, ids, **told)["loss"]
    got.backward()
    p, q = (torch.softmax(one(ids).logits.double() / temperature, -1)[:, :-1] for one in (dense.model, again))
    _, order = p.detach().sort(dim=-1, descending=True)
    p, q = (probabilities.gather(-1, order) for probabilities in (p.detach(), q))
    p, q = (torch.cat([each[..., :top_k], each[..., top_k:].sum(-1, keepdim=True)], -1) for each in (p, q))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "temperature", "at_most"), [(1.0, 1.0, 4), (0.5, 2.0, 5)])
def test_objective_peak_memory(share, temperature, at_most):
    """Includes gradients; `darwinlm plan` relies on it."""
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=2**16, **sizes)
    model, dense = LlamaForCausalLM(config), LlamaForCausalLM(config)
    ids = torch.randint(0, 2**16, (2, 256), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        Objective(model, dense, share, temperature)(ids, ids)["loss"].backward()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    assert at_most - 1 < max(live) / (4 * 2**16 * ids.numel()) < at_most + 0.1


def test_objective_of_cut_documents(pruned):
    dense, database = pruned("mistral", "kv_group")
    lengths = [[5, 12, 1, 6], [24], [20, 4]]
    blocks, documents = zip(*map(packed, lengths), strict=True)
    goal = Objective(halved(dense, database), dense.model, 0.5)
    with torch.no_grad():
        sums = goal(**samples.sample(Tokens.cat(blocks), cut=True))["sums"]
        each = [goal(document, document)["sums"] for some in documents for document in some]
    assert torch.allclose(sums, torch.stack(each).sum(0), rtol=1e-4)
    assert sums[2] == 3 * 24 - sum(map(len, lengths))
