"""signSGD: every weight moves by the sign of its gradient, during the backward pass, without optimizer states.

Trials are a few steps. The first step of AdamW is the learning rate times the sign of each gradient, since its moments
have nothing to average yet; and over the first few steps, moments did not help (docs/lab-log.md). Without them
(signSGD, Bernstein et al., 2018, arXiv 1802.04434) no step needs more than one gradient at a time: each is applied and
freed as soon as the backward pass has computed it. (With gradient accumulation, all gradients exist until the last
backward pass.)

Weights are kept in the compute dtype. In bfloat16 most steps are less than half of the distance to the next number, so
they are rounded stochastically (Gupta et al., 2015, arXiv 1502.02551): up or down at random, and unbiased.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from darwinlm.optim.learning_rate import LearningRate, parameter_groups

TOGETHER = 2**24
"""Number of gradient elements that are applied together, to limit temporary memory."""
_LOWER_HALF = 2**16
"""A bfloat16 is the upper half of a float32."""


class SignSGD:
    """Optimizer with steps of `rate * g / (|g| + eps)`, taken during the backward pass; gradients are freed by each
    step.

    At a relative rate each tensor has its own unit, and `eps` is that of `parameter_groups`: weights with almost no
    gradient hardly move.
    """

    def __init__(
        self, parameters: Sequence[Tensor], rate: LearningRate, device: torch.device, *, streamed: bool = False
    ) -> None:
        """Start training `parameters` (float32 or bfloat16) whose gradients are on `device`; gradients of `streamed`
        parameters are passed to `learn`."""
        groups = parameter_groups(parameters, rate)
        self._rates = {tensor: (-group["lr"], group.get("eps", 1e-8)) for group in groups for tensor in group["params"]}
        self._pending: list[tuple[Tensor, Tensor]] = []
        """Parameters, and the tensors with their gradients: the parameters themselves, or their copies on the device.
        """
        self._sum = torch.zeros((), device=device)
        self._generator = torch.Generator(device).manual_seed(0)
        self._last = True
        self._moved = False
        self._hooks = [
            tensor.register_post_accumulate_grad_hook(self._take) for tensor in ([] if streamed else parameters)
        ]

    def begin(self) -> None:
        """Begin a step, possibly again after an out-of-memory error.

        Raises:
            MemoryError: if the failed step had already moved weights, which cannot be undone.
        """
        if self._moved:
            raise MemoryError("out of memory in the middle of a step")
        self._pending = []

    def backward_is(self, *, last: bool) -> None:
        """Set whether the next backward pass is the last of its step; until then, gradients accumulate."""
        self._last = last

    def end(self) -> None:
        """End a step: apply the remaining gradients."""
        self._apply()
        self._moved = False

    def close(self) -> bool:
        """Remove the hooks. Returns whether all gradients were finite."""
        for hook in self._hooks:
            hook.remove()
        return bool(self._sum.isfinite())

    @torch.no_grad()
    def learn(self, parameters: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        """Move `parameters`, stored elsewhere, by the gradients of their `copies` on the device."""
        for parameter, copied in zip(parameters, copies, strict=True):
            if copied.grad is None:
                continue
            if parameter.grad is not None:
                copied.grad += parameter.grad.to(copied.device)
            parameter.grad = None if self._last else copied.grad.to(parameter.device)
            if self._last and parameter in self._rates:
                self._pending.append((parameter, copied))
        moved = self._pending
        self._apply()
        for parameter, copied in moved:
            parameter.copy_(copied)

    def _take(self, tensor: Tensor) -> None:
        if not self._last:
            return
        if tensor not in self._rates:  # A tensor of zeros at a relative rate is not trained.
            tensor.grad = None
            return
        self._pending.append((tensor, tensor))
        if sum(one.numel() for one, _ in self._pending) >= TOGETHER:
            self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        pieces = []
        for parameter, tensor in self._pending:
            rate, eps = self._rates[parameter]
            flat = cast(Tensor, tensor.grad).flatten()
            pairs = zip(tensor.data.view(-1).split(TOGETHER), flat.split(TOGETHER), strict=True)
            pieces += [(weight, gradient, rate, eps) for weight, gradient in pairs]
            tensor.grad = None
        self._pending = []
        while pieces:
            count, numbers = 1, pieces[0][0].numel()
            while count < len(pieces) and numbers + pieces[count][0].numel() <= TOGETHER:
                numbers += pieces[count][0].numel()
                count += 1
            self._move(pieces[:count])
            pieces = pieces[count:]

    def _move(self, pieces: Sequence[tuple[Tensor, Tensor, float, float]]) -> None:
        weights, gradients, rates, least = map(list, zip(*pieces, strict=True))
        lengths = [len(weight) for weight in weights]
        moves = torch.cat(gradients).float()
        self._sum += moves.sum()
        each = list(moves.split(lengths))
        sizes = torch._foreach_abs(each)
        torch._foreach_add_(sizes, least)
        torch._foreach_div_(each, sizes)
        torch._foreach_mul_(each, rates)
        if weights[0].dtype == torch.float32:
            self._moved = True
            torch._foreach_add_(weights, each)
            return
        del sizes
        moved = torch.cat(weights).float().add_(moves)
        chance = torch.randint(
            _LOWER_HALF, moved.shape, dtype=torch.int32, device=moved.device, generator=self._generator
        )
        moved.view(torch.int32).add_(chance).bitwise_and_(-_LOWER_HALF)
        self._moved = True
        torch._foreach_copy_(weights, list(moved.split(lengths)))
