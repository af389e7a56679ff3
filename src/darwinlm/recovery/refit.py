"""Output projections solved once more, on what the pruned model itself computes: errors do not add up layer by layer.

The database refits every site to the dense model's activations, as if the rest of the model were dense. In the pruned
model all of a site's inputs have changed, and the residual stream has drifted. So from the first layer to the last each
output projection is corrected, by ridge regression, so that the stream after the site comes closest to the dense
model's: `dW = E^T X (X^T X + r I)^-1` with X the inputs that the projection really gets and E what the stream lacks.

Dimension letters: B blocks, T tokens, N tokens of a batch, D hidden size, K columns of an output projection.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from darwinlm.adapters.families import Family, family_of
from darwinlm.adapters.modeling_darwinlm import PrunedModel
from darwinlm.adapters.walking import Given, enter
from darwinlm.calibration.grams import root_mean_square
from darwinlm.plan import SiteKind
from darwinlm.progress import log, task
from darwinlm.scoring import DenseReference

_BATCH_TOKENS = 4096
_KINDS: tuple[SiteKind, ...] = ("attention", "mlp")
_LEAST_GAIN = 1e-3
"""Of the largest in a norm: rows that it all but removes are left as they are."""
_RIDGE = 0.3
"""Of the mean of the diagonal of X^T X: the correction is small where the text says little."""


def refit_if_it_helps(model: PrunedModel, dense: PrunedModel, blocks_BT: Tensor, judged_BT: Tensor) -> bool:
    """`refit`, taken back if KL(dense || model) on other text is not lower after it: on little text it can overfit.

    Args:
        model: the pruned model, float32.
        dense: the model that it is to follow, on the same device, in any dtype.
        blocks_BT: token ids to fit, blocks * tokens.
        judged_BT: token ids to judge by, blocks * tokens.

    Returns:
        Whether it helped.
    """
    reference = DenseReference(dense, judged_BT)
    before = reference.compare(model).kl
    weights = {module: module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    refit(model, dense, blocks_BT)
    after = reference.compare(model).kl
    helped = after < before
    log.info("refit: KL %.4f before, %.4f after%s", before, after, "" if helped else "; it is left out")
    if not helped:
        for module, weight in weights.items():
            module.weight = weight
    return helped


@torch.no_grad()
def refit(model: PrunedModel, dense: PrunedModel, blocks_BT: Tensor) -> None:
    """Correct the output projections of `model`, in place, so that it follows `dense` on `blocks_BT`.

    Args:
        model: the pruned model, float32.
        dense: the model it was cut from, perhaps in several steps, on the same device, in any dtype.
        blocks_BT: token ids, blocks * tokens.
    """
    family, ids_BT = family_of(dense.config), blocks_BT.to(dense.device, torch.long)
    batches = ids_BT.split(max(1, _BATCH_TOKENS // blocks_BT.shape[1]))
    # Both streams are float32, whatever the dense layers compute in.
    wanted = [enter(dense, batch_BT, torch.float32)[0] for batch_BT in batches]
    states = [enter(model, batch_BT)[0] for batch_BT in batches]
    _, given = enter(model, ids_BT[:1])
    scale = getattr(model.config, "residual_multiplier", None) or 1.0
    with task("refit (layers)", len(model.model.layers)) as progress:
        for index, (whole, cut) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
            exact = whole if dense.dtype == torch.float32 else copy.deepcopy(whole).float()
            aims = [_streams(exact, given[index], stream_BTD, family) for stream_BTD in wanted]
            for place, kind in enumerate(_KINDS):
                if family.output(kind) in dict(cut.named_modules()):
                    _correct(cut, kind, given[index], family, scale, states, [aim[place] for aim in aims])
            states = [_streams(cut, given[index], stream_BTD, family)[1] for stream_BTD in states]
            wanted = [aim[1] for aim in aims]
            progress.advance()


def _streams(layer: nn.Module, given: Given, stream_BTD: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """The stream between attention and MLP (behind both, where they read the same), and behind the layer."""
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
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> None:
    """Correct the output projection of one part, so that from `states` the stream behind it comes closest to `wanted`.

    `scale` is what the part's output is multiplied by before it is added to the stream. A norm in between is held at
    the scale that it has for each token: what it makes of a change is then linear.
    """
    projection = layer.get_submodule(family.output(kind))
    assert isinstance(projection, nn.Linear)
    # Of layers that are streamed, weights are elsewhere.
    columns, rows, device = projection.in_features, projection.out_features, states[0].device
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
        for stream_BTD, aim_BTD in zip(states, wanted, strict=True):
            found_BTD = _streams(layer, given, stream_BTD, family)[0 if kind == "attention" else 1]
            x_NK, output_ND = (tensor.flatten(0, 1) for tensor in seen.pop())
            if family.norm_after(kind):
                x_NK = x_NK / root_mean_square(output_ND, layer.get_submodule(family.norm_after(kind)))
            gram_KK.addmm_(x_NK.T, x_NK)
            lacking_DK.addmm_(((aim_BTD - found_BTD).flatten(0, 1) / (scale * gain_D)).T, x_NK)
    finally:
        hook.remove()
    gram_KK.diagonal().add_(max(_RIDGE * gram_KK.diagonal().mean().item(), 1e-6))
    factor_KK = torch.linalg.cholesky(gram_KK.double())
    change_DK = torch.cholesky_solve(lacking_DK.double().T, factor_KK).T.float()
    # Not in place: an uncut site shares its tensors with the dense model.
    projection.weight = nn.Parameter(
        projection.weight + change_DK.to(projection.weight.device), requires_grad=projection.weight.requires_grad
    )
