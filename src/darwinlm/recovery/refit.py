"""Refit of output projections on the pruned model's own activations, so that errors do not accumulate over layers.

The database refits every site to the dense model's activations, as if the rest of the model were dense. In the pruned
model the inputs of all sites have changed, and the residual stream has drifted. From the first layer to the last, each
output projection is therefore corrected by ridge regression, so that the stream after the site is as close as possible
to the dense model's: `dW = E^T X (X^T X + r I)^-1`, where X are the actual inputs of the projection and E is the error
of the stream.

Dimension letters: B blocks, T tokens, N tokens of a batch, D hidden size, K columns of an output projection.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from darwinlm.database.grams import root_mean_square
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.families import Family, family_of
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.streaming import is_streamed
from darwinlm.models.walking import Given, enter
from darwinlm.plan import SiteKind
from darwinlm.runtime.progress import log, task

_BATCH_TOKENS = 4096
_KINDS: tuple[SiteKind, ...] = ("attention", "mlp")
_LEAST_GAIN = 1e-3
"""Threshold relative to the largest gain of a norm: rows with a smaller gain are not changed."""
_RIDGE = 0.3
"""Ridge relative to the mean of the diagonal of X^T X: keeps the correction small where there is little data."""


def refit_if_it_helps(model: PrunedModel, dense: PrunedModel, blocks_BT: Tensor, evaluation_BT: Tensor) -> bool:
    """Run `refit`, and undo it if KL(dense || model) on other text does not decrease: it can overfit little text.

    Args:
        model: pruned model, float32.
        dense: model to follow, on the same device, in any dtype.
        blocks_BT: token ids to fit, (blocks, tokens).
        evaluation_BT: token ids to evaluate on, (blocks, tokens).

    Returns:
        Whether the refit helped.
    """
    reference = DenseReference(dense, evaluation_BT)
    before = reference.compare(model).kl
    weights = {module: module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    refit(model, dense, blocks_BT)
    after = reference.compare(model).kl
    helped = after < before
    log.info("refit: KL %.4f before, %.4f after%s", before, after, "" if helped else "; discarded")
    if not helped:
        for module, weight in weights.items():
            module.weight = weight
    return helped


@torch.no_grad()
def refit(model: PrunedModel, dense: PrunedModel, blocks_BT: Tensor) -> None:
    """Correct the output projections of `model`, in place, so that it follows `dense` on `blocks_BT`.

    Args:
        model: pruned model, float32.
        dense: model it was cut from, possibly in several steps, on the same device, in any dtype.
        blocks_BT: token ids, (blocks, tokens).
    """
    device, family, ids_BT = dense.device, family_of(dense.config), blocks_BT.to(dense.device, torch.long)
    batches = ids_BT.split(max(1, _BATCH_TOKENS // blocks_BT.shape[1]))
    # Where layers do not fit on the device, the streams of all tokens need not fit either.
    store = torch.device("cpu") if is_streamed(model) else device
    # Both streams are float32, whatever the dense layers compute in.
    wanted = [enter(dense, batch_BT, torch.float32)[0].to(store) for batch_BT in batches]
    states = [enter(model, batch_BT)[0].to(store) for batch_BT in batches]
    _, given = enter(model, ids_BT[:1])
    scale = getattr(model.config, "residual_multiplier", None) or 1.0
    with task("refit (layers)", len(model.model.layers)) as progress:
        for index, (whole, cut) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
            exact = whole if dense.dtype == torch.float32 else copy.deepcopy(whole).float()
            passed = (_streams(exact, given[index], stream_BTD.to(device), family) for stream_BTD in wanted)
            targets = [tuple(stream_BTD.to(store) for stream_BTD in streams) for streams in passed]
            for place, kind in enumerate(_KINDS):
                if family.output(kind) in dict(cut.named_modules()):
                    _correct(
                        cut, kind, given[index], family, scale, device, states, [target[place] for target in targets]
                    )
            states = [_streams(cut, given[index], stream_BTD.to(device), family)[1].to(store) for stream_BTD in states]
            wanted = [target[1] for target in targets]
            progress.advance()


def _streams(layer: nn.Module, given: Given, stream_BTD: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """Return the stream between attention and MLP (after both, if they read the same input), and after the layer."""
    between: list[Tensor] = []
    hooks = []
    if family.reads_after_attention:
        reader = layer.get_submodule(family.reads_after_attention)
        hooks = [reader.register_forward_pre_hook(lambda _, inputs: between.append(inputs[0]))]
    try:
        after_BTD: Tensor = layer(stream_BTD, **given)
    finally:
        for hook in hooks:
            hook.remove()
    return between[0] if between else after_BTD, after_BTD


def _correct(
    layer: nn.Module,
    kind: SiteKind,
    given: Given,
    family: Family,
    scale: float,
    device: torch.device,
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> None:
    """Correct the output projection of one part, so that from `states` the stream after it is closest to `wanted`.
    Computes on `device`, wherever these are.

    `scale` multiplies the part's output before it is added to the stream. A norm in between is fixed at its scale for
    each token, which makes it linear.
    """
    projection = layer.get_submodule(family.output(kind))
    assert isinstance(projection, nn.Linear)
    # Weights of streamed layers are elsewhere.
    columns, rows = projection.in_features, projection.out_features
    gain_D = torch.ones(rows, device=device)
    if family.norm_after(kind):
        norm = layer.get_submodule(family.norm_after(kind))
        gain_D = copy.deepcopy(norm).to(device)(gain_D)
        gain_D = torch.where(gain_D.abs() < _LEAST_GAIN * gain_D.abs().max(), torch.inf, gain_D)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = projection.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    gram_KK = torch.zeros(columns, columns, device=device)
    lacking_DK = torch.zeros(rows, columns, device=device)
    try:
        for stream_BTD, target_BTD in zip(states, wanted, strict=True):
            found_BTD = _streams(layer, given, stream_BTD.to(device), family)[0 if kind == "attention" else 1]
            x_NK, output_ND = (tensor.flatten(0, 1) for tensor in seen.pop())
            if family.norm_after(kind):
                x_NK = x_NK / root_mean_square(output_ND, layer.get_submodule(family.norm_after(kind)))
            gram_KK.addmm_(x_NK.T, x_NK)
            lacking_DK.addmm_(((target_BTD.to(device) - found_BTD).flatten(0, 1) / (scale * gain_D)).T, x_NK)
    finally:
        hook.remove()
    gram_KK.diagonal().add_(max(_RIDGE * gram_KK.diagonal().mean().item(), 1e-6))
    factor_KK = torch.linalg.cholesky(gram_KK.double())
    change_DK = torch.cholesky_solve(lacking_DK.double().T, factor_KK).T.float()
    # Not in place: an unpruned site shares its tensors with the dense model.
    projection.weight = nn.Parameter(
        projection.weight + change_DK.to(projection.weight.device), requires_grad=projection.weight.requires_grad
    )
