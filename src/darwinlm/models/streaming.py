"""Layer streaming for models larger than a device: layers stay in CPU memory and are copied to the device one at a
time.

In the forward pass, a layer's weights are copied to the device, used, and dropped. In the backward pass they are copied
again, the layer is recomputed from its input, and its gradients only exist for that time: as with activation
checkpointing, only the input of each layer is kept.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from darwinlm.models.modeling_darwinlm import PrunedModel

Learn = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""Callback for the parameters of a layer and their copies on the device, which have the gradients."""


def stream_layers(model: PrunedModel, device: torch.device, dtype: torch.dtype | None = None) -> PrunedModel:
    """Make the layers of `model`, which are in CPU memory, compute on `device`; move everything else there.

    Args:
        model: its layers may be memory-mapped, and are not written to.
        device: device to compute on.
        dtype: compute dtype of the layers; by default their stored dtype.

    Returns:
        The same model.
    """
    move_ends(model, device)
    for layer in model.model.layers:
        stream(layer, device, dtype)
    return model


def move_ends(model: PrunedModel, device: torch.device) -> None:
    """Move everything except the layers of `model` to `device`: embeddings, rotary frequencies, last norm and head."""
    for module in (*model.model.children(), model.lm_head):
        if module is not model.model.layers:
            module.to(device)


def stream(layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Make a layer in CPU memory compute on `device`, in `dtype` or its stored dtype."""
    layer.forward = _Streamed(layer, device, dtype)


def is_streamed(model: PrunedModel) -> bool:
    """Whether the layers of `model` are streamed."""
    return any(isinstance(layer.forward, _Streamed) for layer in model.model.layers)


def learn_with(model: PrunedModel, learn: Learn | None) -> None:
    """Call `learn`, or nothing if None, after the backward pass of each layer of a streamed `model`."""
    for layer in model.model.layers:
        layer.forward.learn = learn


class _Streamed:
    """The `forward` function of a streamed layer."""

    def __init__(self, layer: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        # A reference cycle would keep the weights of a candidate until garbage collection.
        self._layer, self.device, self.dtype = weakref.ref(layer), device, dtype
        self.learn: Learn | None = None
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        """Scalar that requires gradients, for layers whose input does not, such as the first."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Streamed":
        return _Streamed(memo[id(self.layer)], self.device, None)  # A copy may get another dtype.

    @property
    def layer(self) -> nn.Module:
        """The streamed layer."""
        layer = self._layer()
        assert layer is not None
        return layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer like its own `forward`."""
        if torch.is_grad_enabled():
            found: Tensor = _Pass.apply(hidden_states, self._anchor, self, args, kwargs)  # type: ignore[no-untyped-call]
            return found
        return self.run(self.copies(), hidden_states, *args, **kwargs)

    def copies(self) -> dict[str, Tensor]:
        """Copy parameters and buffers to the device, trainable parameters as leaves."""
        copies = {
            name: one.detach()
            .to(self.device, self.dtype or one.dtype, copy=True, non_blocking=True)
            .requires_grad_(one.requires_grad)
            for name, one in self.layer.named_parameters()
        }
        return copies | {name: one.to(self.device, non_blocking=True) for name, one in self.layer.named_buffers()}

    def run(self, copies: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer's own `forward` with other parameters."""
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
