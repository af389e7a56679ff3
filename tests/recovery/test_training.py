"""Recovery: the objective and the refit against plain formulas, resuming, ranks, sharding and LoRA."""

import errno
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import DAMAGES, FAMILIES, VOCABULARY, apart, flip_a_bit, halved, make_tokenizer, rescaled
from recoveries import (
    BLOCKS,
    CPU,
    RANKS_JOBS,
    RANKS_RECIPE,
    STOP,
    TEXT,
    VALIDATION,
    killed_at,
    packed,
    train,
    train_in_float32,
)
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import DataRecipe, RecoveryRecipe
from darwinlm.data.corpus import TextStream
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.recovery import objective, samples, stage, teacher, training
from darwinlm.recovery.checkpoints import load_best, newest_intact, remove_checkpoints, save_best
from darwinlm.recovery.forecast import forecast
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.refit import refit, refit_if_it_helps
from darwinlm.recovery.sharding import is_sharded, shard
from darwinlm.recovery.teacher import load_teacher, write_predictions
from darwinlm.recovery.trainer import best_of
from darwinlm.recovery.training import recover, steps_for
from darwinlm.runtime import dist, files


def test_one_process_has_nobody_to_share_with(monkeypatch):
    """Whatever the setting says: model and teacher are then on the device."""
    recipe = load_recipe("quick", {"model": "m", "target": 0.5, "recovery.sharding": "fsdp", "recovery.tokens": 64})
    places = []

    def start(here, corpus, plan, refit_tokens, place, folder):
        places.append(place)
        raise UserError("placed")

    monkeypatch.setattr(stage, "_starting_model", start)
    job = SimpleNamespace(
        recipe=recipe, corpus=None, source=SimpleNamespace(dense=SimpleNamespace(device=torch.device("meta"))),
        run=SimpleNamespace(path=Path("run")), step=SimpleNamespace(number=1, last=True),
    )  # fmt: skip
    for processes in (1, 2):
        monkeypatch.setattr(dist, "world_size", lambda processes=processes: processes)
        assert is_sharded(recipe.recovery) == (processes > 1)
        with pytest.raises(UserError, match="placed"):
            stage._recover(job, None, Path("recovery"))
    assert [place.type for place in places] == ["meta", "cpu"]


def test_recovery_lowers_the_loss_and_is_the_same_for_the_same_seed(pruned, tmp_path):
    dense, database = pruned("mistral", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2)

    def once(seed):
        model = halved(dense, database, trainable=True)
        losses = train(model, dense, recipe, tmp_path, seed).losses
        remove_checkpoints(tmp_path)
        return losses, model

    (losses, model), (again, _), (other, _) = once(0), once(0), once(1)
    assert len(losses) == steps_for(recipe.tokens, recipe, 24) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert losses == again != other
    assert not model.training


def test_a_refit_is_ridge_regression_from_what_the_model_computes_to_what_the_stream_lacks(pruned):
    dense, database = pruned("llama", "kv_group")
    weights = {name: tensor.clone() for name, tensor in dense.weights.items()}
    before, model = halved(dense, database), halved(dense, database)
    refit(model, dense.model, BLOCKS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in dense.weights.items())

    def streams(one):
        """Inputs of the first layer's output projections, and the stream after attention and after the layer."""
        seen, layer = {}, one.model.layers[0]
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(attention=inputs[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.update(mlp=inputs[0])),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: seen.update(middle=inputs[0])),
            layer.register_forward_hook(lambda _, __, output: seen.update(end=output)),
        ]
        one(BLOCKS.long())
        for hook in hooks:
            hook.remove()
        return {name: tensor.detach().flatten(0, 1).double() for name, tensor in seen.items()}

    wanted, old, new = streams(dense.model), streams(before), streams(model)
    middle = wanted["middle"] - old["middle"]
    for kind, module, lacking in [
        ("attention", "self_attn.o_proj", middle),
        ("mlp", "mlp.down_proj", wanted["end"] - (new["end"] - new_output(model, before, new["mlp"]))),
    ]:
        x = old[kind] if kind == "attention" else new[kind]
        gram = x.T @ x
        ridge = 0.3 * gram.diagonal().mean()
        stacked = torch.cat([x, ridge.sqrt() * torch.eye(len(gram), dtype=torch.double)])
        target = torch.cat([lacking, torch.zeros(len(gram), lacking.shape[1], dtype=torch.double)])
        change = torch.linalg.lstsq(stacked, target).solution.T
        layers = [one.model.layers[0].get_submodule(module).weight.double() for one in (model, before)]
        assert torch.allclose(layers[0] - layers[1], change, atol=1e-4 * layers[1].abs().max().item())


def new_output(model, before, x):
    """What the correction of the first MLP adds to the stream."""
    weights = [one.model.layers[0].mlp.down_proj.weight.double() for one in (model, before)]
    return x @ (weights[0] - weights[1]).T


def test_a_refit_of_the_dense_model_changes_nothing(pruned):
    dense, _ = pruned("qwen3", "query_head")
    model = build_model(dense.config, dense.sites, dense.weights, {})
    refit(model, dense.model, BLOCKS)
    for one, other in zip(model.parameters(), dense.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (0.5, 2.5)])
def test_the_objective_is_that_of_whole_logits_and_so_is_its_gradient(pruned, share, temperature, monkeypatch):
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
def test_from_the_likeliest_tokens_kl_is_that_of_these_and_another_one_and_so_is_its_gradient(
    top_k, temperature, pruned, tmp_path, monkeypatch
):
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


@pytest.mark.parametrize("cut", [False, True])
def test_a_recovery_from_all_predictions_is_that_from_the_dense_model(cut, pruned, tmp_path, monkeypatch):
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


def test_predictions_are_written_once_and_a_damaged_piece_again(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_PIECE_BLOCKS", 2)
    dense, _ = pruned("qwen3", "kv_group")
    asked = []

    def load():
        asked.append(True)
        return dense.model

    def write():
        return write_predictions(load, TEXT, 5, 1.0, False, tmp_path, CPU)

    before = [write()[number]["top_log_p"].clone() for number in range(len(BLOCKS))]  # they lie in the file itself
    write()
    assert len(asked) == 1
    flip_a_bit(tmp_path / "00001" / "weights.safetensors")
    written = (tmp_path / "00000" / "weights.safetensors").stat().st_mtime_ns
    after = [write()[number]["top_log_p"] for number in range(len(BLOCKS))]
    assert len(asked) == 2
    assert (tmp_path / "00000" / "weights.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_teacher_in_8_bits_is_the_dense_model_but_for_rounding(pruned):
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


@pytest.mark.parametrize("harm", [False, True])
def test_a_refit_that_leads_away_on_other_text_is_taken_back(harm, pruned, monkeypatch):
    dense, database = pruned("llama", "kv_group")
    model, judge = halved(dense, database), DenseReference(dense.model, BLOCKS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kl = judge.compare(model).kl
    # To a text of one word there is always a fit, and it serves no other.
    text = torch.zeros_like(BLOCKS[:1]) if harm else BLOCKS
    monkeypatch.setattr("darwinlm.recovery.refit._RIDGE", 1e-4 if harm else 0.3)
    assert refit_if_it_helps(model, dense.model, text, BLOCKS) is not harm
    kept = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert kept is harm
    assert (judge.compare(model).kl < kl) is not harm


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_in_a_block_of_several_is_read_as_if_it_were_alone(family, attention, pruned):
    dense, database = pruned(family, "kv_group")
    block, documents = packed([5, 12, 1, 6])
    for model in (dense.load(CPU, torch.float32), halved(dense, database)):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            ids, positions = block.input_ids_BT.long(), block.position_ids
            together = model(ids, position_ids=positions, use_cache=False).logits
            alone = torch.cat([model(document).logits for document in documents], dim=1)
        assert torch.allclose(together, alone, atol=1e-5)


def test_labels_positions_and_attention_are_those_written_by_hand(pruned):
    """Two blocks: the second document reaches into the second block, and a token of each is left out of the loss."""
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


@pytest.mark.parametrize(("share", "temperature", "at_most"), [(1.0, 1.0, 4), (0.5, 2.0, 5)])
def test_the_objective_never_holds_more_than_so_many_tensors_of_the_size_of_its_logits(share, temperature, at_most):
    """Gradients included: `darwinlm plan` counts on it."""
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=2**16, **sizes)
    model, dense = LlamaForCausalLM(config), LlamaForCausalLM(config)
    ids = torch.randint(0, 2**16, (2, 256), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        Objective(model, dense, share, temperature)(ids, ids)["loss"].backward()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    assert at_most - 1 < max(live) / (4 * 2**16 * ids.numel()) < at_most + 0.1


def test_the_objective_of_cut_documents_is_that_of_each_alone(pruned):
    dense, database = pruned("mistral", "kv_group")
    lengths = [[5, 12, 1, 6], [24], [20, 4]]
    blocks, documents = zip(*map(packed, lengths), strict=True)
    goal = Objective(halved(dense, database), dense.model, 0.5)
    with torch.no_grad():
        sums = goal(**samples.sample(Tokens.cat(blocks), cut=True))["sums"]
        each = [goal(document, document)["sums"] for some in documents for document in some]
    assert torch.allclose(sums, torch.stack(each).sum(0), rtol=1e-4)
    assert sums[2] == 3 * 24 - sum(map(len, lengths))


def test_training_on_cut_documents_begins_with_their_loss(pruned, tmp_path):
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


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_killed_recovery_goes_on_to_the_same_losses_and_weights(pruned, tmp_path, monkeypatch, stop_at):
    dense, database = pruned("llama", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2, checkpoint_steps=2)
    whole = halved(dense, database, trainable=True)
    losses = train(whole, dense, recipe, tmp_path / "whole")

    broken = halved(dense, database, trainable=True)
    with killed_at(stop_at, monkeypatch):
        train(broken, dense, recipe, tmp_path / "broken")
    kept = sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*"))
    last = (stop_at - 1) // 2 * 2
    assert kept == sorted(f"checkpoint-{step}" for step in (last - 2, last) if step > 0)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    resumed = halved(dense, database, trainable=True)
    assert train(resumed, dense, recipe, tmp_path / "broken") == losses
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    # Killed after the last step: nothing is left to do but to read it.
    again = halved(dense, database, trainable=True)
    assert train(again, dense, recipe, tmp_path / "broken") == losses
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


FILES = ("weights.safetensors", "optimizer.safetensors", "optimizer.json", "trainer_state.json", "checksums.json")
RESUMED = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2, checkpoint_steps=3, evaluations=3)


@pytest.fixture(scope="module")
def interrupted(pruned, tmp_path_factory):
    """What came of a recovery, its model, and a folder in which the same one was killed with two checkpoints there."""
    dense, database = pruned("llama", "kv_group")
    whole, folder = halved(dense, database, trainable=True), tmp_path_factory.mktemp("interrupted")
    done = train(whole, dense, RESUMED, folder / "whole")
    with killed_at(8, pytest.MonkeyPatch()):
        train(halved(dense, database, trainable=True), dense, RESUMED, folder / "broken")
    assert {path.name for path in (folder / "broken").iterdir()} == {"best", "checkpoint-3", "checkpoint-6"}
    assert {file.name for file in (folder / "broken" / "checkpoint-6").iterdir()} == set(FILES)
    return done, whole, folder / "broken"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(name, damage, interrupted, tmp_path, caplog):
    run = shutil.copytree(interrupted[2], tmp_path / "run")
    damage(run / "checkpoint-6" / name)
    assert newest_intact(run) == run / "checkpoint-3"
    assert not (run / "checkpoint-6").exists()
    (said,) = caplog.messages
    assert re.fullmatch(rf"{run}/checkpoint-6/{name} is (damaged.*|missing): resuming from checkpoint-3", said)


@pytest.mark.parametrize(
    ("damaged", "says"),
    [((6,), ["resuming from checkpoint-3"]), ((3, 6), ["resuming from .+", "restarting the training"])],
)
def test_past_damage_a_recovery_comes_to_the_same(damaged, says, interrupted, pruned, tmp_path, caplog):
    dense, database = pruned("llama", "kv_group")
    done, whole, broken = interrupted
    run = shutil.copytree(broken, tmp_path / "run")
    for step in damaged:
        flip_a_bit(run / f"checkpoint-{step}" / "weights.safetensors")
    resumed = halved(dense, database, trainable=True)
    assert train(resumed, dense, RESUMED, run) == done
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all(re.search(f"weights.safetensors is damaged: {end}", line) for line, end in zip(said, says, strict=True))
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["weights.safetensors", "checksums.json"])
def test_damaged_best_weights_are_named_before_they_are_used(name, damage, pruned, tmp_path):
    dense, database = pruned("llama", "kv_group")
    model = halved(dense, database, trainable=True)
    save_best(tmp_path, model)
    load_best(tmp_path, model)
    damage(tmp_path / "best" / name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    message = rf"^{tmp_path}/best/{name} is (damaged.*|missing); delete {tmp_path} and run the same command again to"
    with pytest.raises(UserError, match=message):
        load_best(tmp_path, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_checkpoint_that_cannot_be_read_is_kept(interrupted, tmp_path, monkeypatch):
    shutil.copytree(interrupted[2], tmp_path / "run")

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "file_checksum", fail)
    message = r"optimizer\.json cannot be read \(Input/output error\); make it readable, or delete .+/checkpoint-6$"
    with pytest.raises(UserError, match=message):
        newest_intact(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-6").exists()


def test_a_recovery_that_diverges_is_one_clear_line(pruned, tmp_path):
    dense, database = pruned("mistral", "kv_group")
    model = halved(dense, database, trainable=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(
        UserError, match=r"recovery diverged at learning rate 0\.001, step 1; lower recovery\.learning_rate"
    ):
        train(model, dense, RecoveryRecipe(tokens=48, learning_rate=1e-3), tmp_path)


def test_the_weights_that_did_best_on_the_validation_text_are_taken(pruned, tmp_path):
    dense, database = pruned("qwen2", "kv_group")
    # Far too fast, so that what is learnt from the few blocks is soon wrong for others.
    recipe = RecoveryRecipe(tokens=24 * 48, learning_rate=3e-2, batch_size=2, evaluations=24, checkpoint_steps=5)
    model = halved(dense, database, trainable=True)
    done = train(model, dense, recipe, tmp_path)
    assert [entry["step"] for entry in done.evaluations] == list(range(25))
    assert 0 < done.taken < 24
    with torch.no_grad():
        ids = VALIDATION.input_ids_BT.long()
        found = Objective(model, dense.model, recipe.distillation)(ids, ids)["loss"]
    losses = {entry["step"]: entry["loss"] for entry in done.evaluations}
    assert losses[done.taken] == min(losses.values()) == pytest.approx(found.item(), rel=5e-3)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_at_the_rate_auto_does_not_depend_on_how_weights_are_scaled(
    family, settings, pruned, tmp_path, monkeypatch
):
    dense, database = pruned(family, "kv_group")
    # Of small batches a small part is taken.
    monkeypatch.setattr(training, "RELATIVE_RATE", 0.003 if settings else 0.05)
    monkeypatch.setattr(training, "_FASTEST", 1.0)
    recipe = RecoveryRecipe(tokens=24 * 24, batch_size=2, evaluations=1, weight_decay=0.1, **settings)
    found = []
    for name, change in (("own", dict), ("other", rescaled)):
        model = halved(dense, database, trainable=True)
        model.load_state_dict(change(model.state_dict()))
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of what low-rank updates begin with
            done = train(model, dense, recipe, tmp_path / name)
        found.append([entry[part] for entry in done.evaluations for part in ("kl", "next_token")])
    own, other = found
    assert abs(own[2] - own[0]) > 1e-3
    # Gradients are clipped by a norm that the scale is a part of, and Adam's first steps amplify rounding.
    assert [one - other[0] for one in other] == pytest.approx([one - own[0] for one in own], rel=0.25, abs=1e-4)


def test_a_step_of_low_rank_updates_is_a_share_of_the_weight():
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))
        (layer,) = [module for module in adapted.modules() if hasattr(module, "lora_B")]
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sizes = training._sizes(adapted)
        assert set(sizes) == {first, second}
        with torch.no_grad():
            second.copy_(1e-3 * sizes[second] * torch.randn_like(second).sign())
    moved = layer.get_delta_weight("default").square().mean().sqrt() / layer.base_layer.weight.square().mean().sqrt()
    assert moved.item() == pytest.approx(1e-3 * training._LORA_RATE, rel=0.05)


@pytest.mark.parametrize(
    ("kls", "next_tokens", "taken"),
    [
        ([1.0, 0.9, 0.8], [3.0, 2.9, 2.8], 2),
        ([1.0, 0.5, 1.1], [3.0, 2.9, 1.0], 1),  # further from the dense model, if better at the next token
        ([1.0, 0.9, 0.8], [3.0, 2.9, 3.1], 1),
        ([1.0, 1.1, 1.2], [3.0, 2.0, 1.0], 0),
        ([1.0, 1.0, 1.0], [3.0, 3.0, 3.0], 0),
        ([math.nan, 1.0], [math.nan, 3.0], 0),
    ],
)
def test_weights_are_taken_that_are_no_worse_in_any_part_of_the_loss(kls, next_tokens, taken):
    evaluations = [
        {"step": step, "loss": kl + next_token, "kl": kl, "next_token": next_token}
        for step, (kl, next_token) in enumerate(zip(kls, next_tokens, strict=True))
    ]
    assert best_of(evaluations)["step"] == taken
    alone = [{name: one[name] for name in ("step", "next_token")} | {"loss": one["next_token"]} for one in evaluations]
    assert best_of(alone)["step"] == (0 if math.isnan(kls[0]) else next_tokens.index(min(next_tokens)))


def test_a_training_that_does_harm_leaves_the_weights_as_they_were(pruned, tmp_path, caplog):
    dense, database = pruned("qwen2", "kv_group")
    before, model = halved(dense, database), halved(dense, database, trainable=True)
    done = train(model, dense, RecoveryRecipe(tokens=24 * 8, learning_rate=1.0, batch_size=2), tmp_path)
    assert done.taken == 0 and len(done.losses) == 4
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))
    said = "recovery: 192 training tokens did not improve the model on the validation text"
    assert any(message.startswith(said) for message in caplog.messages)


def test_a_batch_in_parts_gives_the_same_training(pruned, tmp_path):
    dense, database = pruned("qwen3", "kv_group")
    trained = []
    for name, micro in (("whole", None), ("parts", 1)):
        recipe = RecoveryRecipe(tokens=24 * 16, batch_size=4, micro_batch_size=micro, activations="recompute")
        model = halved(dense, database, trainable=True)
        trained.append((train(model, dense, recipe, tmp_path / name).losses, model))
    (losses, whole), (again, parts) = trained
    assert again == pytest.approx(losses, rel=5e-3)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=3e-3)
    with pytest.raises(
        UserError, match=r"batch_size=4 is not a multiple of 1 processes \* .*micro_batch_size=3; set it to 6"
    ):
        train(whole, dense, RecoveryRecipe(tokens=96, batch_size=4, micro_batch_size=3), tmp_path / "odd")


@pytest.mark.parametrize("settings", [{"distillation": 0, "evaluations": 0}, {"distillation": 0.5, "evaluations": 1}])
def test_a_recovery_that_runs_out_of_memory_takes_the_same_steps_in_parts(
    settings, pruned, little_memory, tmp_path, caplog
):
    dense, database = pruned("qwen3", "kv_group")
    start, whole, parts = (halved(dense, database, trainable=True) for _ in range(3))
    recipe = RecoveryRecipe(tokens=24 * 12, batch_size=4, **settings)
    done = train(whole, dense, recipe, tmp_path / "whole")
    seen = little_memory()
    again = train(parts, dense, recipe, tmp_path / "parts")
    assert again.losses == pytest.approx(done.losses, rel=1e-4)
    assert [entry["loss"] for entry in again.evaluations] == pytest.approx(
        [entry["loss"] for entry in done.evaluations], rel=1e-4
    )
    assert apart((whole, parts), start) < 0.01
    assert set(seen[-12:]) == {1}
    (said,) = [line for line in caplog.messages if "do not fit" in line]
    assert said == "recovery: 4 blocks per pass do not fit in device memory; using 1"


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        ({"lora_rank": 2}, "peft", r"^recovery\.lora_rank needs PEFT; pip install 'darwinlm\[lora\]'$"),
        ({"loggers": ["wandb"]}, "wandb", r"^recovery\.loggers: wandb is not installed; pip install wandb$"),
    ],
)
def test_what_cannot_be_met_here_is_said_before_the_training(settings, missing, message, pruned, tmp_path, monkeypatch):
    dense, database = pruned("qwen3", "kv_group")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setitem(sys.modules, missing, None)
    model = halved(dense, database, trainable=True)
    with pytest.raises(UserError, match=message):
        train(model, dense, RecoveryRecipe(tokens=48, **settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_moves_no_more_than_its_rank_and_leaves_a_plain_model(pruned, tmp_path):
    dense, database = pruned("llama", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=1e-2, batch_size=2, lora_rank=2, evaluations=0)
    before, model = halved(dense, database), halved(dense, database, trainable=True)
    done = train(model, dense, recipe, tmp_path)
    assert sum(done.losses[-3:]) < sum(done.losses[:3])
    assert list(model.state_dict()) == list(before.state_dict())
    for (name, one), other in zip(model.named_parameters(), before.parameters(), strict=True):
        rank = int(torch.linalg.matrix_rank((one - other).double(), atol=1e-5)) if one.dim() == 2 else 0
        assert rank == (2 if "proj" in name and name.endswith("weight") else 0), name
    resumed = halved(dense, database, trainable=True)
    assert train(resumed, dense, recipe, tmp_path).losses == done.losses
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from darwinlm.runtime import dist
from darwinlm.models.loading import load_dense
from darwinlm.database.store import Database
sys.path.insert(0, sys.argv[1])
from recoveries import RANKS_JOBS, train_in_float32
checkpoint, database, folder = sys.argv[2:]
dist.start()
dense = load_dense(checkpoint, "kv_group", torch.device("cpu"))
done = {
    name: train_in_float32(dense, Database(Path(database)), recipe, Path(folder) / name, stop_at)
    for name, (recipe, stop_at) in RANKS_JOBS.items()
}
if dist.rank() == 0:
    print(json.dumps(done))
dist.stop()
"""


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.7])
def test_a_forecast_finds_where_a_power_law_leads(exponent):
    rng = random.Random(0)
    losses = [2.0 + 3.0 * step**-exponent + rng.gauss(0, 0.02) for step in range(1, 2001)]
    expected = 2.0 + 3.0 * 2000**-exponent
    assert forecast(losses[:200], 2000) == pytest.approx(expected, abs=0.15 * (losses[199] - 2))
    assert forecast(losses[:1000], 2000) == pytest.approx(expected, abs=0.03)
    rising = [1.0 + 0.001 * step for step in range(100)]
    assert forecast(rising, 1000) == pytest.approx(sum(rising[-16:]) / 16, abs=0.03)


def test_what_is_not_to_be_learnt_moves_no_weight(pruned, tmp_path):
    dense, database = pruned("qwen2", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 8, learning_rate=5e-3, batch_size=2, evaluations=0)
    loss_mask = torch.arange(24).expand_as(BLOCKS) < 12
    masked = Tokens(BLOCKS, loss_mask, TEXT.document_starts_BT)
    other = Tokens(torch.where(loss_mask, BLOCKS, BLOCKS.flip(1)), loss_mask, TEXT.document_starts_BT)
    models = []
    for name, blocks in (("one", masked), ("other", other), ("all", TEXT)):
        model = halved(dense, database, trainable=True)
        recover(model, dense.model, blocks, VALIDATION, recipe, seed=0, folder=tmp_path / name, device=CPU)
        models.append(model.state_dict())
    one, changed, whole = models
    # Causal attention: what comes after the last token that is learnt changes nothing.
    assert all(torch.allclose(one[name], changed[name], atol=1e-6) for name in one)
    assert not all(torch.allclose(one[name], whole[name], atol=1e-3) for name in one)


def test_a_killed_recovery_on_a_stream_goes_on_to_the_same_losses(pruned, tmp_path, monkeypatch):
    dense, database = pruned("qwen2", "kv_group")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(200)))
    data = DataRecipe(source=str(tmp_path / "text.jsonl"), sequence_length=24)
    stream = TextStream(data, make_tokenizer(), 0, frozenset())
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2, micro_batch_size=1, checkpoint_steps=3)

    class Breaks(TextStream):
        def blocks(self, state=None):
            yield from itertools.islice(super().blocks(state), 9)
            raise UserError("data: gone")

    def once(folder, stream=stream):
        model = halved(dense, database, trainable=True)
        return recover(model, dense.model, stream, VALIDATION, recipe, seed=0, folder=folder, device=CPU)[1]

    whole = once(tmp_path / "whole")
    with killed_at(8, monkeypatch):
        once(tmp_path / "broken")
    with pytest.raises(UserError, match="data: gone"):
        once(tmp_path / "broken", Breaks(data, make_tokenizer(), 0, frozenset()))
    assert {path.name for path in (tmp_path / "broken").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}
    assert once(tmp_path / "broken") == whole
    assert len(whole.losses) == 12


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # the second has a tied head
@pytest.mark.parametrize("offload", [False, True])
def test_all_of_a_sharded_model_and_its_teacher_is_on_the_device(family, offload, pruned, monkeypatch):
    """They begin in CPU memory, and FSDP only moves what it shards: of the teacher, the layers."""
    dense, database = pruned(family, "kv_group")
    device, taught = torch.device("meta"), dense.load(CPU, torch.float32)
    trained = Objective(halved(dense, database, trainable=True), taught, 0.5)
    monkeypatch.setattr("darwinlm.recovery.sharding.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("darwinlm.recovery.sharding.fully_shard", lambda module, **_: module.to(device))
    shard(trained, taught, device, torch.float32, offload=offload)
    for model in (trained, taught):
        assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {device}


def test_two_ranks_train_what_one_does_and_one_goes_on_where_two_stopped(checkpoint, pruned, tmp_path):
    dense, database = pruned("qwen3", "kv_group")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(Path(__file__).parents[1]), str(checkpoint("qwen3")), str(database.folder), str(tmp_path)]
    ended = subprocess.run([*command, str(tmp_path / "script.py"), *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    two = json.loads(ended.stdout.splitlines()[-1])
    one = train_in_float32(dense, database, RANKS_RECIPE, tmp_path / "one")
    assert len(one["losses"]) == 30
    same = [two["predictions"], two["fsdp_offload-whole"]]
    for sharding in ("none", "fsdp"):
        stopped = f"{sharding}-{STOP}"
        assert two[stopped]["share"] == pytest.approx(0.5 if sharding == "fsdp" else 1, abs=0.02)
        assert len(two[stopped]["losses"]) == STOP
        resumed = train_in_float32(dense, database, RANKS_JOBS[stopped][0], tmp_path / stopped)
        same += [resumed, two[f"{sharding}-whole"]]
    for other in same:
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert other["sum"] == pytest.approx(one["sum"], rel=1e-5)
    pieces = [path.name for path in (tmp_path / "predictions" / "text").iterdir()]
    assert sorted(pieces) == ["00000", "00001", "00002"]
