"""Helpers for recoveries of small models: trained in place, killed at a step, and on two ranks."""

from contextlib import contextmanager

import pytest
import torch
from helpers import VOCABULARY, halved

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.tokens import Tokens
from darwinlm.recovery import teacher, training
from darwinlm.recovery.teacher import write_predictions
from darwinlm.recovery.training import recover

CPU = torch.device("cpu")
BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
TEXT = Tokens.unmasked(BLOCKS)
VALIDATION = Tokens.unmasked(
    torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
)


def train(model, dense, recipe, folder, seed=0):
    """Recover `model`; without sharding, it is trained in place."""
    return recover(model, dense.model, TEXT, VALIDATION, recipe, seed=seed, folder=folder, device=CPU)[1]


class Killed(BaseException):
    pass


@contextmanager
def killed_at(step, monkeypatch):
    """Kill the recovery in the block after the optimizer step `step`, before anything is written."""

    class Kill(training.Follow):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Killed
            super().on_step_end(args, state, control)

    with monkeypatch.context() as patch:
        patch.setattr(training, "Follow", Kill)
        with pytest.raises(Killed):
            yield


def packed(lengths):
    """Return a block of documents of these lengths, and the documents."""
    documents = BLOCKS.flatten()[: sum(lengths)].split(lengths)
    block = Tokens.cat(list(map(Tokens.unmasked, documents)))
    return block.view(1, -1), [document.long().unsqueeze(0) for document in documents]


RANKS_RECIPE, STOP = RecoveryRecipe(tokens=24 * 4 * 30, batch_size=4, learning_rate=1e-3, checkpoint_steps=10), 15
RANKS_JOBS = {
    f"{sharding}-{stop or 'whole'}": (RANKS_RECIPE.model_copy(update={"sharding": sharding}), stop)
    for sharding, stop in (("none", STOP), ("none", 0), ("fsdp", STOP), ("fsdp", 0), ("fsdp_offload", 0))
} | {"predictions": (RANKS_RECIPE.model_copy(update={"teacher_top_k": 1}), 0)}
"""Trainings on two ranks, all in one pair of processes, and the step that each stops at."""


def train_in_float32(dense, database, recipe, folder, stop_at=0):
    """Return losses, the sum of the magnitudes of all weights, and the share of the weights held by this rank."""
    model, share = halved(dense, database, trainable=True), []

    class Stop(training.Follow):
        def on_step_end(self, args, state, control, model, **kwargs):
            parameters = list(model.parameters())
            held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
            share.append(held / sum(p.numel() for p in parameters))
            super().on_step_end(args, state, control)
            control.should_training_stop |= state.global_step == stop_at

    taught = dense_model = dense.load(dense.device, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fast_dtype", lambda device: torch.float32)
        patch.setattr(training, "Follow", Stop)
        if recipe.teacher_top_k:
            patch.setattr(teacher, "_PIECE_BLOCKS", 2)
            taught = teacher.CachedTeacher(
                *(
                    write_predictions(lambda: dense_model, text, 10**6, 1.0, False, folder / name, CPU)
                    for name, text in (("text", TEXT), ("validation", VALIDATION))
                )
            )
        model, done = recover(model, taught, TEXT, VALIDATION, recipe, seed=0, folder=folder, device=CPU)
    total = sum(p.double().abs().sum().item() for p in model.parameters())
    return {"losses": done.losses, "sum": total, "share": max(share)}
