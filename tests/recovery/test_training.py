"""Tests of training a pruned model: losses, resuming, learning rates, memory, LoRA and streamed text."""

import importlib.util
import itertools
import json
import sys

import pytest
import torch
from helpers import FAMILIES, apart, halved, make_tokenizer, rescaled
from recoveries import BLOCKS, CPU, TEXT, VALIDATION, killed_at, train

from darwinlm.config.recipe import DataRecipe, RecoveryRecipe
from darwinlm.data.corpus import TextStream
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.recovery import training
from darwinlm.recovery.checkpoints import remove_checkpoints
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.training import recover, steps_for


def test_recovery_lowers_loss_and_is_reproducible(pruned, tmp_path):
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


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_killed_recovery_resumes(pruned, tmp_path, monkeypatch, stop_at):
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
    # Killed after the last step: the result is only read.
    again = halved(dense, database, trainable=True)
    assert train(again, dense, recipe, tmp_path / "broken") == losses
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


def test_recovery_diverged_error(pruned, tmp_path):
    dense, database = pruned("mistral", "kv_group")
    model = halved(dense, database, trainable=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(
        UserError, match=r"recovery diverged at learning rate 0\.001, step 1; lower recovery\.learning_rate"
    ):
        train(model, dense, RecoveryRecipe(tokens=48, learning_rate=1e-3), tmp_path)


def test_recovery_takes_best_validation_weights(pruned, tmp_path):
    dense, database = pruned("qwen2", "kv_group")
    # The learning rate is far too high, so that the model soon overfits the few blocks.
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


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_rate_independent_of_weight_scale(family, settings, pruned, tmp_path, monkeypatch):
    dense, database = pruned(family, "kv_group")
    # The rate is scaled down for small batches.
    monkeypatch.setattr(training, "RELATIVE_RATE", 0.003 if settings else 0.05)
    monkeypatch.setattr(training, "_FASTEST", 1.0)
    recipe = RecoveryRecipe(tokens=24 * 24, batch_size=2, evaluations=1, weight_decay=0.1, **settings)
    found = []
    for name, change in (("own", dict), ("other", rescaled)):
        model = halved(dense, database, trainable=True)
        model.load_state_dict(change(model.state_dict()))
        with torch.random.fork_rng():
            torch.manual_seed(0)  # seed of the initial LoRA weights
            done = train(model, dense, recipe, tmp_path / name)
        found.append([entry[part] for entry in done.evaluations for part in ("kl", "next_token")])
    own, other = found
    assert abs(own[2] - own[0]) > 1e-3
    # The gradient norm for clipping depends on the scale, and Adam's first steps amplify rounding.
    assert [one - other[0] for one in other] == pytest.approx([one - own[0] for one in own], rel=0.25, abs=1e-4)


def test_lora_step_relative_to_weight():
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


def test_harmful_training_leaves_weights(pruned, tmp_path, caplog):
    dense, database = pruned("qwen2", "kv_group")
    before, model = halved(dense, database), halved(dense, database, trainable=True)
    done = train(model, dense, RecoveryRecipe(tokens=24 * 8, learning_rate=1.0, batch_size=2), tmp_path)
    assert done.taken == 0 and len(done.losses) == 4
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))
    said = "recovery: 192 training tokens did not improve the model on the validation text"
    assert any(message.startswith(said) for message in caplog.messages)


def test_micro_batches_match_whole_batch(pruned, tmp_path):
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
def test_recovery_out_of_memory_splits_batches(settings, pruned, little_memory, tmp_path, caplog):
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
def test_recovery_missing_package_error(settings, missing, message, pruned, tmp_path, monkeypatch):
    dense, database = pruned("qwen3", "kv_group")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.setitem(sys.modules, missing, None)
    model = halved(dense, database, trainable=True)
    with pytest.raises(UserError, match=message):
        train(model, dense, RecoveryRecipe(tokens=48, **settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_changes_have_its_rank(pruned, tmp_path):
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


def test_lora_keeps_frozen_weights_in_checkpoint_dtype(pruned, tmp_path, monkeypatch):
    """The updates are float32, and the result is that of float32 weights but for rounding."""
    dense, database = pruned("llama", "kv_group")
    recipe = RecoveryRecipe(tokens=24 * 24, learning_rate=1e-2, batch_size=2, lora_rank=2, evaluations=0)
    monkeypatch.setattr(training, "fast_dtype", lambda device: torch.bfloat16)
    exact, model = halved(dense, database, trainable=True), halved(dense, database, trainable=True)
    dtypes, add = [], training._with_lora

    def adding(model, rank):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted = add(model, rank)
        dtypes.extend((parameter.dtype, parameter.requires_grad) for parameter in adapted.parameters())
        return adapted

    monkeypatch.setattr(training, "_with_lora", adding)
    losses = train(exact, dense, recipe, tmp_path / "float32").losses
    assert set(dtypes) == {(torch.float32, False), (torch.float32, True)}
    dtypes.clear()
    model.config.dtype = torch.bfloat16
    done = train(model, dense, recipe, tmp_path / "bfloat16")
    assert set(dtypes) == {(torch.bfloat16, False), (torch.float32, True)}
    assert done.losses == pytest.approx(losses, rel=0.05)
    before = halved(dense, database).state_dict()
    for name, tensor in exact.state_dict().items():
        if "proj.weight" in name:
            change, rounded = tensor - before[name], model.state_dict()[name].float() - before[name]
            assert torch.cosine_similarity(change.flatten(), rounded.flatten(), dim=0) > 0.95, name


def test_masked_labels_do_not_train(pruned, tmp_path):
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
    # Causal attention: tokens after the last one with loss change nothing.
    assert all(torch.allclose(one[name], changed[name], atol=1e-6) for name in one)
    assert not all(torch.allclose(one[name], whole[name], atol=1e-3) for name in one)


@pytest.mark.slow
def test_killed_recovery_on_stream_resumes(pruned, tmp_path, monkeypatch):
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
