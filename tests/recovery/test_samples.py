"""Tests of several documents in a block of training text."""

import pytest
import torch
from helpers import FAMILIES, halved
from recoveries import CPU, packed

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.tokens import Tokens
from darwinlm.recovery import samples
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.training import recover


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_match_single_documents(family, attention, pruned):
    dense, database = pruned(family, "kv_group")
    block, documents = packed([5, 12, 1, 6])
    for model in (dense.load(CPU, torch.float32), halved(dense, database)):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            ids, positions = block.input_ids_BT.long(), block.position_ids
            together = model(ids, position_ids=positions, use_cache=False).logits
            alone = torch.cat([model(document).logits for document in documents], dim=1)
        assert torch.allclose(together, alone, atol=1e-5)


def test_sample_labels_positions_and_attention(pruned):
    """Two blocks: the second document continues in the second block, and a token of each is excluded from the loss."""
    dense, _ = pruned("llama", "kv_group")
    text = Tokens(
        torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]], dtype=torch.int32),
        torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]], dtype=torch.bool),
        torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool),
    )
    ids = text.input_ids_BT.long()
    assert {name: tensor.tolist() for name, tensor in samples.sample(text, cut=False).items()} == {
        "input_ids": ids.tolist(),
        "labels": [[5, -100, 7, 8, 9, 10], [11, 12, 13, 14, -100, 16]],
    }
    cut = samples.sample(text, cut=True)
    assert {name: tensor.tolist() for name, tensor in cut.items()} == {
        "input_ids": ids.tolist(),
        "labels": [[-100, -100, 7, 8, -100, 10], [-100, 12, -100, -100, -100, 16]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 1, 2]],
    }
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 2, 2]])
    seen = (documents[:, :, None] == documents[:, None, :]) & torch.ones(6, 6).tril().bool()
    eager = dense.load(CPU, torch.float32)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        model = eager.model
        found = model(ids, position_ids=cut["position_ids"], use_cache=False, output_attentions=True).attentions
    for attention in found:
        assert torch.equal(attention.ne(0), seen[:, None].expand_as(attention))


def test_training_on_cut_documents_starts_at_their_loss(pruned, tmp_path):
    dense, database = pruned("qwen3", "kv_group")
    blocks, documents = zip(*(packed([length, 24 - length]) for length in (7, 11, 3)), strict=True)
    recipe = RecoveryRecipe(tokens=24 * 3, batch_size=3, micro_batch_size=1, distillation=0, cut_documents=True)
    with torch.no_grad():
        goal = Objective(halved(dense, database), None, 0)
        sums = sum(goal(document, document)["sums"] for some in documents for document in some)
    model, text = halved(dense, database, trainable=True), Tokens.cat(blocks)
    done = recover(model, None, text, text, recipe, seed=0, folder=tmp_path, device=CPU)[1]
    expected = (sums[0] / sums[2]).item()
    assert done.losses == pytest.approx([expected], rel=5e-3)
    assert done.evaluations[0]["next_token"] == pytest.approx(expected, rel=5e-3)
