"""Tests of the teacher: predictions cached on disk, and a dense model in 8 bits."""

import pytest
import torch
from helpers import VOCABULARY, flip_a_bit, halved
from recoveries import BLOCKS, CPU, TEXT, VALIDATION, packed

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.tokens import Tokens
from darwinlm.recovery import teacher, training
from darwinlm.recovery.teacher import load_teacher, write_predictions
from darwinlm.recovery.training import recover


@pytest.mark.parametrize("cut", [False, True])
def test_recovery_from_cached_predictions(cut, pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fast_dtype", lambda device: torch.float32)
    dense, database = pruned("llama", "kv_group")
    text = Tokens.cat([packed([5, 9, 10])[0], TEXT])
    recipe = RecoveryRecipe(tokens=24 * 10, learning_rate=5e-3, teacher_top_k=VOCABULARY, cut_documents=cut)

    def once(taught, folder):
        model = halved(dense, database, trainable=True)
        return recover(model, taught, text, VALIDATION, recipe, seed=0, folder=folder, device=CPU)[1]

    predictions = [
        write_predictions(lambda: dense.model, blocks, VOCABULARY, 1.0, cut, tmp_path / name, CPU)
        for name, blocks in (("text", text), ("validation", VALIDATION))
    ]
    one, other = once(dense.model, tmp_path / "one"), once(teacher.CachedTeacher(*predictions), tmp_path / "other")
    assert other.losses == pytest.approx(one.losses, abs=1e-5)
    for mine, theirs in zip(other.evaluations, one.evaluations, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_write_predictions_rewrites_damaged_piece(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_PIECE_BLOCKS", 2)
    dense, _ = pruned("qwen3", "kv_group")
    asked = []

    def load():
        asked.append(True)
        return dense.model

    def write():
        return write_predictions(load, TEXT, 5, 1.0, False, tmp_path, CPU)

    before = [write()[number]["top_log_p"].clone() for number in range(len(BLOCKS))]  # mapped from the file
    write()
    assert len(asked) == 1
    flip_a_bit(tmp_path / "00001" / "weights.safetensors")
    written = (tmp_path / "00000" / "weights.safetensors").stat().st_mtime_ns
    after = [write()[number]["top_log_p"] for number in range(len(BLOCKS))]
    assert len(asked) == 2
    assert (tmp_path / "00000" / "weights.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_teacher_in_8_bits(pruned):
    dense, _ = pruned("qwen2", "kv_group")
    rounded = load_teacher(dense, torch.float32, CPU, int8=True)
    for name, linear in dense.model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            held = rounded.model.layers.get_submodule(name)
            assert held.weight_OI.dtype == torch.int8
            off = (held.weight_OI * held.scale_O[:, None] - linear.weight).abs()
            assert (off <= linear.weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    wanted, found = dense.model(BLOCKS.long()).logits, rounded(BLOCKS.long()).logits
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
