"""Text that the dense model generates."""

import pytest
import torch

from darwinlm.config.recipe import DataRecipe
from darwinlm.data import self_text
from darwinlm.data.corpus import SPLITS, needed_blocks, pack
from darwinlm.data.self_text import write_documents
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.models.loading import load_dense


def recipe(source, tokens=64, **changes):
    counts = {f"{split}_tokens": tokens for split in SPLITS}
    return DataRecipe(source=source, sequence_length=16, **{**counts, **changes})


@pytest.fixture(scope="module")
def dense(checkpoint):
    return load_dense(str(checkpoint("llama")), "kv_group", torch.device("cpu"))


def ends_of(dense):
    return {257, dense.tokenizer.eos_token_id}


def test_write_documents_seed_and_token_count(dense):
    texts = [list(write_documents(dense, tokens=2_000, longest=64, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    for documents in texts:
        assert sum(len(document) for document in documents) >= 2_000
        assert len(set(map(tuple, documents))) > 0.9 * len(documents)


def test_write_documents_first_and_end_token(dense):
    documents = list(write_documents(dense, tokens=6_000, longest=96, seed=0))
    assert {document[0] for document in documents} == {dense.tokenizer.bos_token_id}
    for document in documents:
        assert 2 <= len(document) <= 96
        assert not ends_of(dense) & set(document[:-1])
        assert len(document) == 96 or document[-1] in ends_of(dense)
    assert any(len(document) < 96 for document in documents)


def test_write_documents_batch_shrinks(dense):
    sizes = []
    hook = dense.model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    documents = list(write_documents(dense, tokens=64 * 32, longest=32, seed=0))
    hook.remove()
    assert sizes[0] == (64, 1)
    assert len(sizes) < 200
    assert {length for _, length in sizes} == {1}
    assert sum(rows for rows, _ in sizes) == sum(len(document) - 1 for document in documents)


def test_write_documents_matches_uncached_generation(dense, monkeypatch):
    expected = list(write_documents(dense, tokens=200, longest=20, seed=3))

    def write_batch(dense, first, ends, longest, count, generator):
        documents = [[first] for _ in range(count)]
        for _ in range(longest - 1):
            alive = [document for document in documents if len(document) == 1 or document[-1] not in ends.tolist()]
            if not alive:
                break
            logits = dense.model(torch.tensor(alive)).logits[:, -1]
            for document, token in zip(alive, self_text._sample(logits, generator)[:, 0].tolist(), strict=True):
                document.append(token)
        return documents

    monkeypatch.setattr(self_text, "_write_batch", write_batch)
    assert list(write_documents(dense, tokens=200, longest=20, seed=3)) == expected


def test_sample_frequencies():
    likely = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = self_text._sample(likely.log().expand(20_000, 4), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    assert share[1] == 0
    assert (share - likely).abs().max() < 0.015


def test_self_text_fills_splits(dense):
    asked = recipe("self", tokens=100)
    needed = (sum(needed_blocks(asked).values()) + len(SPLITS)) * 16
    corpus = pack(map(Tokens.document, write_documents(dense, tokens=needed, longest=16, seed=0)), asked)
    assert {split: len(text) for split, text in corpus.splits.items()} == needed_blocks(asked)


def with_ends(dense, monkeypatch, *, tokenizer=(256, 257), configured=257):
    monkeypatch.setattr(dense.generation_config, "eos_token_id", configured)
    for name, token in zip(("bos_token_id", "eos_token_id"), tokenizer, strict=True):
        monkeypatch.setattr(type(dense.tokenizer), name, token, raising=False)
    return dense


def test_write_documents_empty_documents_error(dense, monkeypatch):
    with pytest.raises(UserError, match="'self': the model generates only empty documents; set --data to a text"):
        list(
            write_documents(with_ends(dense, monkeypatch, configured=list(range(259))), tokens=5_000, longest=8, seed=0)
        )


def test_write_documents_without_first_token(dense, monkeypatch):
    documents = list(
        write_documents(with_ends(dense, monkeypatch, tokenizer=(None, 257)), tokens=90, longest=9, seed=0)
    )
    assert {document[0] for document in documents} == {257}
    with pytest.raises(UserError, match="the tokenizer has no beginning- or end-of-text token; set --data to a text"):
        list(write_documents(with_ends(dense, monkeypatch, tokenizer=(None, None)), tokens=9, longest=9, seed=0))


def test_write_documents_without_end_token(dense, monkeypatch):
    endless = with_ends(dense, monkeypatch, tokenizer=(256, None), configured=None)
    assert {len(document) for document in write_documents(endless, tokens=90, longest=9, seed=0)} == {9}
