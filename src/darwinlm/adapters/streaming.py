"""Models larger than a device: their layers stay in the CPU's memory and pass through the device one at a time.

Forwards, a layer's weights are copied to the device, used, and dropped. Backwards, they are copied again, the layer is
computed once more from what it read, and its gradients are there for as long as it is: as with activation
checkpointing, only what each layer reads is kept.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from darwinlm.adapters.modeling_darwinlm import PrunedModel

Learn = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""What is done with the parameters of a layer and their copies on the device, which have their gradients."""


def stream_layers(model: PrunedModel, device: torch.device, dtype: torch.dtype | None = None) -> PrunedModel:
    """Have the layers of `model`, which are in the CPU's memory, compute on `device`; move all else there.

    Args:
        model: its layers may be mapped from files, and are not written to.
        device: where layers compute.
        dtype: that they compute in; the one they are stored in by default.

    Returns:
        The same model.
    """
    layers = model.model.layers
    for module in model.model.children():
        if module is not layers:
            module.to(device)
    model.lm_head.to(device)
    for layer in layers:
        stream(layer, device, dtype)
    return model


def stream(layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Have a layer in the CPU's memory compute on `device`, in `dtype` or the one it is stored in."""
    layer.forward = _Streamed(layer, device, dtype)


def is_streamed(model: PrunedModel) -> bool:
    """Whether the layers of `model` pass through its device."""
    return any(isinstance(layer.forward, _Streamed) for layer in model.model.layers)


def learn_with(model: PrunedModel, learn: Learn | None) -> None:
    """Have every backward pass through a layer of a streamed `model` end with `learn`, or with nothing."""
    for layer in model.model.layers:
        layer.forward.learn = learn


class _Streamed:
    """The `forward` of a streamed layer."""

    def __init__(self, layer: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        # A cycle would keep the weights of a candidate until Python looks for such.
        self._layer, self.device, self.dtype = weakref.ref(layer), device, dtype
        self.learn: Learn | None = None
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        """Has a gradient where what the layer reads has none, as in the first layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Streamed":
        return _Streamed(memo[id(self.layer)], self.device, None)  # a copy may be given another dtype

    @property
    def layer(self) -> nn.Module:
        """The layer."""
        layer = self._layer()
        assert layer is not None
        return layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer's own."""
        if torch.is_grad_enabled():
            found: Tensor = _Pass.apply(hidden_states, self._anchor, self, args, kwargs)  # type: ignore[no-untyped-call]
            return found
        return self.run(self.copies(), hidden_states, *args, **kwargs)

    def copies(self) -> dict[str, Tensor]:
        """Parameters and buffers on the device, those with gradients as leaves."""
        copies = {
            name: one.detach()
            .to(self.device, self.dtype or one.dtype, copy=True, non_blocking=True)
            .requires_grad_(one.requires_grad)
            for name, one in self.layer.named_parameters()
        }
        return copies | {name: one.to(self.device, non_blocking=True) for name, one in self.layer.named_buffers()}

    def run(self, copies: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own `forward`, with other parameters."""
        layer = self.layer
        del layer.forward
        try:
            found: Tensor = torch.func.functional_call(layer, dict(copies), args, kwargs)
        finally:
            layer.forward = self
        return found


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, anchor: Tensor, streamed: _Streamed, args: Any, kwargs: Any) -> Tensor:
        ctx.streamed, ctx.args, ctx.kwargs = streamed, args, kwargs
        ctx.save_for_backward(hidden_states)
        with torch.no_grad():
            return streamed.run(streamed.copies(), hidden_states, *args, **kwargs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        streamed = ctx.streamed
        (hidden_states,) = ctx.saved_tensors
        read, copies = hidden_states.detach().requires_grad_(), streamed.copies()
        with torch.enable_grad():
            found = streamed.run(copies, read, *ctx.args, **ctx.kwargs)
        torch.autograd.backward(found, gradient)
        if streamed.learn is not None:
            trained = {name: one for name, one in streamed.layer.named_parameters() if one.requires_grad}
            streamed.learn(list(trained.values()), [copies[name] for name in trained])
        return read.grad, None, None, None, None
