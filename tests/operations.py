"""Counter of operations as an accelerator would run them."""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from darwinlm.models import norms


class Operations(TorchDispatchMode):
    """Counts the operations that an accelerator would launch, and those that would make it wait for a value."""

    VIEWS = frozenset(
        {"_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "permute"}
        | {"select", "slice"}
        | {"split", "squeeze", "t", "transpose", "unsqueeze", "view"}
    )
    WAITS = frozenset(["_linalg_check_errors", "_local_scalar_dense", "masked_select", "nonzero"])

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        result = function(*args, **(kwargs or {}))
        # Operations on the meta device do not run.
        if name not in self.VIEWS and not (isinstance(result, torch.Tensor) and result.is_meta):
            self.counts[name] += 1
        # Indexing with a mask calls `nonzero`.
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.counts["nonzero"] += 1
        return result

    @property
    def launches(self):
        return sum(count for name, count in self.counts.items() if name not in self.WAITS)

    @property
    def waits(self):
        return sum(count for name, count in self.counts.items() if name in self.WAITS)


@torch.library.custom_op("darwinlm_tests::rms_norm", mutates_args=())
def _rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return states * torch.rsqrt(states.float().square().mean(-1, keepdim=True) + epsilon).to(states.dtype) * weight


@torch.library.custom_op("darwinlm_tests::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    gradient: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(states.float().square().mean(-1, keepdim=True) + epsilon).to(states.dtype)
    normed, weighted = states * scale, gradient * weight
    by_states = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return by_states, (gradient * normed).flatten(0, -2).sum(0)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.epsilon = inputs[2]


_rms_norm.register_autograd(
    lambda ctx, gradient: (*_rms_norm_backward(gradient, *ctx.saved_tensors, ctx.epsilon), None), setup_context=_keep
)


def as_on_gpu(monkeypatch):
    """RMSNorm is one operation forward and one backward, as on a GPU; on a CPU PyTorch has only the single steps."""
    monkeypatch.setattr(norms, "_DEVICES", {"cpu"})
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda states, shape, weight, epsilon: _rms_norm(states, weight, epsilon)
    )
