"""The dense model in distillation: in its own dtype, or as predictions cached on disk.

Dimension letters: B blocks, T tokens, N tokens of a chunk, K likeliest tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from darwinlm.data.tokens import Tokens
from darwinlm.models.heads import shape_logits
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.recovery.checkpoints import WEIGHTS, save_weights
from darwinlm.recovery.objective import log_mass_of_others
from darwinlm.runtime import dist
from darwinlm.runtime.files import find_fault
from darwinlm.runtime.progress import task

_PIECE_BLOCKS = 32
_CHUNK_TOKENS = 1024


def load_teacher(
    dense: DenseModel, dtype: torch.dtype, place: torch.device, *, int8: bool, mapped: bool = False
) -> PrunedModel:
    """Load the dense model on `place`, for inference only.

    Args:
        dense: model to read again from its checkpoint.
        dtype: compute dtype.
        place: device of the model.
        int8: hold the layers' projections in 8 bits with a scale for each row; the rest stays in `dtype`.
        mapped: memory-map tensors that the checkpoint stores in `dtype`; `place` must be the CPU then.
    """
    if mapped:
        return dense.mapped(dtype)
    if not int8:
        return dense.load(place, dtype)
    # Layer by layer, so that the device never holds all of them in `dtype`.
    model = dense.load(torch.device("cpu"), dtype)
    for layer in model.model.layers:
        layer.to(place)
        for parent in list(layer.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    model.to(place)
    return model


class Int8Linear(nn.Module):
    """Linear layer with integer weights from -127 to 127 and a scale for each row; not trainable."""

    weight_OI: Tensor
    scale_O: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize `linear` by rounding to nearest: the error is at most 1/254 of the largest weight in each row."""
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight_OI", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `x`."""
        y = (nn.functional.linear(x, self.weight_OI.to(x.dtype)) * self.scale_O).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Predictions:
    """Cached predictions of the dense model at every position of some blocks: its K likeliest next tokens, and all
    others as one outcome."""

    def __init__(self, folder: Path) -> None:
        """Open the predictions written by `write_predictions` into `folder`."""
        self._folder = folder

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        """Return `top_ids`, (T, K), and `top_log_p`, (T, K + 1), in nats; the last entry is for all other tokens
        together."""
        with safe_open(_piece(self._folder, block // _PIECE_BLOCKS) / WEIGHTS, "pt") as file:
            return {name: file.get_slice(name)[block % _PIECE_BLOCKS] for name in ("top_ids", "top_log_p")}


@dataclass(frozen=True)
class CachedTeacher:
    """Cached predictions of the dense model, which replace it as the teacher."""

    text: Predictions
    validation: Predictions


def write_predictions(
    load: Callable[[], PrunedModel],
    text: Tokens,
    top_k: int,
    temperature: float,
    cut: bool,
    folder: Path,
    device: torch.device,
) -> Predictions:
    """Cache the predictions of a model for some text; pieces are distributed over ranks, and existing ones are kept.

    Args:
        load: returns the model, on `device`; not called if all pieces exist.
        text: blocks of text.
        top_k: number of tokens to keep at each position, at most all but one.
        temperature: divides the logits.
        cut: whether to mask attention across documents.
        folder: output folder.
        device: device of this rank.
    """
    pieces = list(text.split(_PIECE_BLOCKS))
    numbers = range(dist.rank(), len(pieces), dist.world_size())
    left = [number for number in numbers if find_fault(_piece(folder, number)) is not None]
    if left:
        model = load()
        with task("predictions of the dense model (blocks)", sum(len(pieces[number]) for number in left)) as progress:
            for number in left:
                blocks = []
                for block in pieces[number].split(1):
                    blocks.append(_predict(model, block.to(device), top_k, temperature, cut))
                    progress.advance()
                together = {name: torch.stack([one[name] for one in blocks]) for name in blocks[0]}
                save_weights(_piece(folder, number), together)
    dist.barrier()
    return Predictions(folder)


@torch.no_grad()
def _predict(model: PrunedModel, block: Tokens, top_k: int, temperature: float, cut: bool) -> dict[str, Tensor]:
    ids_1T, positions_1T = block.input_ids_BT.long(), block.position_ids if cut else None
    hidden_TD = model.model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).last_hidden_state[0]
    found: dict[str, list[Tensor]] = {"top_ids": [], "top_log_p": []}
    for chunk_ND in hidden_TD.split(_CHUNK_TOKENS):
        logits_NV = shape_logits(model.config, model.lm_head(chunk_ND)).float()
        log_p_NV = (logits_NV / temperature).log_softmax(-1)
        top_NK, ids_NK = log_p_NV.topk(min(top_k, log_p_NV.shape[-1] - 1))
        found["top_ids"].append(ids_NK.int().cpu())
        found["top_log_p"].append(torch.cat([top_NK, log_mass_of_others(log_p_NV, ids_NK)], -1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _piece(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"
