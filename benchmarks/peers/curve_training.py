"""Train the models of all methods alike: the same text, order, loss, optimizer and learning rate.

The loss is the default of this project's recovery, KL(dense || model), and so are the optimizer (AdamW with a learning
rate relative to each tensor's root mean square, gradients clipped to a norm of 1) and the dtypes (float32 weights,
bfloat16 compute where the hardware is faster with it). The learning rate is constant after a short warm-up: a training
evaluated after 8,192 tokens equals one that stops there, so one run gives the whole curve.

It is faster than the Trainer for two reasons that do not change gradients: the dense model's last hidden states are
computed once for all methods and cached on disk, and logits are not computed again for the gradient.

Dimension letters: B blocks, T tokens of a block, N positions, D hidden size, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from darwinlm.models.heads import Head
from darwinlm.models.loading import DenseModel, fast_dtype
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.optim.learning_rate import LearningRate, parameter_groups
from darwinlm.recovery.training import RELATIVE_RATE
from darwinlm.runtime.files import find_fault, new_folder, write_checksums

_PIECE_BLOCKS = 32
_CHUNK = 512
_FASTEST = 4e-3
"""Maximum learning rate of the project's `auto`."""


@dataclass(frozen=True)
class Settings:
    """Training settings of all methods."""

    batch_size: int = 2
    """Blocks per optimizer step."""
    warm_up_steps: int = 8
    """Steps in which the learning rate rises."""
    rate_factor: float = 1.0
    """Factor of the project's `auto` learning rate."""
    checkpoint_steps: int = 64

    def rate(self, length: int) -> LearningRate:
        """Return the project's `auto` learning rate for blocks of `length` tokens."""
        tokens = self.batch_size * length
        return LearningRate(self.rate_factor * min(_FASTEST, RELATIVE_RATE * (tokens / 1024) ** 0.5), relative=True)

    def facts(self) -> dict[str, Any]:
        """Return the settings for the row."""
        numbers = {name: value for name, value in asdict(self).items() if name != "checkpoint_steps"}
        optimizer = "AdamW, relative rate auto, constant after the warm-up"
        return numbers | {"loss": "KL(dense || model)", "optimizer": optimizer}


class DenseStates:
    """Last hidden states of the dense model on a text, in the compute dtype; computed once, then read from disk."""

    def __init__(self, dense: DenseModel, blocks_BT: Tensor, folder: Path) -> None:
        """Use the text `blocks_BT`; files are written to `folder`, where existing ones of the same text are reused."""
        self.blocks_BT = blocks_BT
        self._dense, self._folder = dense, folder
        self._piece: tuple[int, Tensor] | None = None

    @cached_property
    def _model(self) -> PrunedModel:
        return self._dense.load(self._dense.device, fast_dtype(self._dense.device))

    @cached_property
    def head(self) -> Head:
        """Head of the dense model, in the compute dtype."""
        head = self._dense.head
        assert head.bias_V is None and head.scale == 1 and head.softcap is None, "a plain head is expected"
        return Head(head.weight_VD.to(fast_dtype(self._dense.device)), None, 1.0, None)

    def __getitem__(self, block: int) -> Tensor:
        """Return the states of one block (T * D)."""
        number, index = divmod(block, _PIECE_BLOCKS)
        if self._piece is None or self._piece[0] != number:
            self._piece = number, self._read(number)
        return self._piece[1][index]

    @torch.no_grad()
    def _read(self, number: int) -> Tensor:
        place = self._folder / f"{number:05d}"
        if not place.exists() or find_fault(place) is not None:
            ids_BT = self.blocks_BT[number * _PIECE_BLOCKS :][:_PIECE_BLOCKS].long().to(self._dense.device)
            states = [self._model.model(part, use_cache=False).last_hidden_state for part in ids_BT.split(2)]
            with new_folder(place) as draft:
                save_file({"hidden": torch.cat(states).contiguous()}, draft / "hidden.safetensors")
                write_checksums(draft)
        return load_file(place / "hidden.safetensors")["hidden"]


class KlToDense(torch.autograd.Function):
    """Mean KL(dense || model) over positions, from last hidden states and the head's weight.

    Logits are computed one chunk at a time, together with the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, taught_ND: Tensor, head: Head, counted_N: Tensor
    ) -> Any:
        """Compute loss and gradients; `head` is the dense model's, `counted_N` is 1 for positions that count, else
        0."""
        dtype = head.weight_VD.dtype
        own_VD = weight_VD.detach().to(dtype)
        by_hidden_ND = torch.empty(hidden_ND.shape, device=hidden_ND.device)
        by_weight_VD = torch.zeros(weight_VD.shape, device=hidden_ND.device)
        total, share_N = torch.zeros((), device=hidden_ND.device), counted_N / counted_N.sum()
        for start in range(0, len(hidden_ND), _CHUNK):
            rows = slice(start, start + _CHUNK)
            here_ND = hidden_ND[rows].detach().to(dtype)
            log_q_NV = (here_ND @ own_VD.T).float().log_softmax(-1)
            log_p_NV = (taught_ND[rows].to(dtype) @ head.weight_VD.T).float().log_softmax(-1)
            p_NV = log_p_NV.exp()
            total += (log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1) * share_N[rows]).sum()
            by_logits_NV = log_q_NV.exp_().sub_(p_NV).mul_(share_N[rows, None]).to(dtype)
            by_hidden_ND[rows] = (by_logits_NV @ own_VD).float()
            by_weight_VD += by_logits_NV.T @ here_ND
        ctx.save_for_backward(by_hidden_ND, by_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Scale the gradients computed by `forward`."""
        by_hidden_ND, by_weight_VD = ctx.saved_tensors
        return by_hidden_ND * gradients[0], by_weight_VD * gradients[0], None, None, None


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that computes in bfloat16 where that is faster."""
    dtype = fast_dtype(device)
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def kl_loss(model: PrunedModel, states: DenseStates, numbers: list[int]) -> Tensor:
    """Return the mean KL(dense || model) over the predictions in these blocks of the text."""
    ids_BT = states.blocks_BT[numbers].long().to(model.device)
    with autocast(model.device):
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    taught_BTD = torch.stack([states[number] for number in numbers]).to(model.device)
    # A block's last position has no next token: recovery excludes it.
    counted_BT = torch.ones(ids_BT.shape, device=model.device)
    counted_BT[:, -1] = 0
    loss: Tensor = KlToDense.apply(
        hidden_BTD.float().flatten(0, 1),
        model.lm_head.weight,
        taught_BTD.flatten(0, 1),
        states.head,
        counted_BT.flatten(),
    )
    return loss


class Trainee:
    """Training of a model that can be interrupted and resumed to the same numbers."""

    def __init__(self, model: PrunedModel, states: DenseStates, settings: Settings, folder: Path, passed: int) -> None:
        """Start from `model`, or resume from the checkpoint in `folder`.

        Args:
            model: trainable model in float32.
            states: states of the text, whose blocks are read in order, and again when they run out.
            settings: settings of all methods.
            folder: folder of the checkpoint.
            passed: blocks that the method has already trained on; training starts after them.
        """
        self.model, self._states, self._settings, self._folder = model, states, settings, folder
        self._passed, self.steps = passed, 0
        self._named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        groups = parameter_groups(self._named.values(), settings.rate(states.blocks_BT.shape[1]))
        self._rates = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        place = folder / "checkpoint"
        if place.exists() and find_fault(place) is None:
            self._load(place)

    @property
    def blocks_read(self) -> int:
        """Blocks read by this training."""
        return self.steps * self._settings.batch_size

    def train(self, blocks: int, after_step: Callable[[float], None] = lambda loss: None) -> None:
        """Train until `blocks` blocks are read in total, with regular checkpoints and one at the end."""
        self.model.train()
        begun = self.steps
        while self.blocks_read < blocks:
            after_step(self._step())
            if self.steps % self._settings.checkpoint_steps == 0:
                self._save()
        if self.steps > begun and self.steps % self._settings.checkpoint_steps > 0:
            self._save()
        self.model.eval()

    def _step(self) -> float:
        size, count = self._settings.batch_size, len(self._states.blocks_BT)
        first = self._passed + self.steps * size
        loss = kl_loss(self.model, self._states, [number % count for number in range(first, first + size)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._named.values(), 1.0)
        self.steps += 1
        part = min(1.0, self.steps / self._settings.warm_up_steps) if self._settings.warm_up_steps else 1.0
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = part * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _moments(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield name, parameter and optimizer state of all parameters that have one."""
        for name, parameter in self._named.items():
            if parameter in self._optimizer.state:
                yield name, parameter, self._optimizer.state[parameter]

    def _save(self) -> None:
        tensors = {f"weight.{name}": one.detach() for name, one in self._named.items()}
        for name, _, state in self._moments():
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        with new_folder(self._folder / "checkpoint") as draft:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft / "state.safetensors")
            (draft / "state.json").write_text(json.dumps({"steps": self.steps}))
            write_checksums(draft)

    @torch.no_grad()
    def _load(self, place: Path) -> None:
        tensors = load_file(place / "state.safetensors")
        self.steps = json.loads((place / "state.json").read_text())["steps"]
        for name, parameter in self._named.items():
            parameter.copy_(tensors[f"weight.{name}"])
            if f"exp_avg.{name}" in tensors:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.steps)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }
