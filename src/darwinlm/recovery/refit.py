"""Output projections solved once more, on what the pruned model itself computes: errors do not add up layer by layer.

The database refits every site to the dense model's activations, as if the rest of the model were dense. In the pruned
model all of a site's inputs have changed, and the residual stream has drifted. So from the first layer to the last each
output projection is corrected, by ridge regression, so that the stream after the site comes closest to the dense
model's: `dW = E^T X (X^T X + r I)^-1` with X the inputs that the projection really gets and E what the stream lacks.

Dimension letters: B blocks, T tokens, N tokens of a batch, D hidden size, K columns of an output projection.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from darwinlm.adapters.modeling_darwinlm import DarwinLMDecoderLayer, DarwinLMForCausalLM, attention_masks
from darwinlm.progress import log, task
from darwinlm.scoring import DenseReference

_BATCH_TOKENS = 4096
_RIDGE = 0.3
"""Of the mean of the diagonal of X^T X: the correction is small where the text says little."""


def refit_if_it_helps(
    model: DarwinLMForCausalLM, dense: DarwinLMForCausalLM, blocks_BT: Tensor, judged_BT: Tensor
) -> bool:
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
def refit(model: DarwinLMForCausalLM, dense: DarwinLMForCausalLM, blocks_BT: Tensor) -> None:
    """Correct the output projections of `model`, in place, so that it follows `dense` on `blocks_BT`.

    Args:
        model: the pruned model, float32.
        dense: the model it was cut from, perhaps in several steps, on the same device, in any dtype.
        blocks_BT: token ids, blocks * tokens.
    """
    batches = blocks_BT.to(dense.device, torch.long).split(max(1, _BATCH_TOKENS // blocks_BT.shape[1]))
    # Both streams are float32, whatever the dense layers compute in.
    wanted = [dense.model.embed_tokens(ids_BT).float() for ids_BT in batches]
    states = [model.model.embed_tokens(ids_BT) for ids_BT in batches]
    positions = torch.arange(blocks_BT.shape[1], device=dense.device).unsqueeze(0)
    rotary = {dtype: dense.model.rotary_emb(wanted[0].to(dtype), positions) for dtype in {dense.dtype, torch.float32}}

    def attention(layer: DarwinLMDecoderLayer, index: int) -> Callable[[Tensor], Tensor]:
        dtype = layer.self_attn.o_proj.weight.dtype
        kind = dense.config.layer_types[index]

        def run(states_BTD: Tensor) -> Tensor:
            states_BTD = states_BTD.to(dtype)
            mask = attention_masks(dense.config, states_BTD, position_ids=positions)
            output: Tensor = layer.self_attn(
                layer.input_layernorm(states_BTD), position_embeddings=rotary[dtype], attention_mask=mask.get(kind)
            )[0]
            return output.float()

        return run

    def mlp(layer: DarwinLMDecoderLayer) -> Callable[[Tensor], Tensor]:
        dtype = layer.mlp.down_proj.weight.dtype
        return lambda states_BTD: layer.mlp(layer.post_attention_layernorm(states_BTD.to(dtype))).float()

    with task("refit (layers)", len(model.model.layers)) as progress:
        for index, (whole, cut) in enumerate(zip(dense.model.layers, model.model.layers, strict=True)):
            if whole.has_attention:
                run = attention(whole, index)
                wanted = [states_BTD + run(states_BTD) for states_BTD in wanted]
            if cut.has_attention:
                _correct(cut.self_attn.o_proj, attention(cut, index), states, wanted)
            if whole.has_mlp:
                run = mlp(whole)
                wanted = [states_BTD + run(states_BTD) for states_BTD in wanted]
            if cut.has_mlp:
                _correct(cut.mlp.down_proj, mlp(cut), states, wanted)
            progress.advance()


def _correct(
    projection: nn.Linear, run: Callable[[Tensor], Tensor], states: list[Tensor], wanted: list[Tensor]
) -> None:
    """Correct one projection, and move `states` past its site; `run` is the site, from the stream to its output."""
    inputs: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    columns, rows = projection.in_features, projection.out_features
    gram_KK = torch.zeros(columns, columns, device=projection.weight.device)
    lacking_DK = torch.zeros(rows, columns, device=projection.weight.device)
    try:
        for number, states_BTD in enumerate(states):
            states[number] = states_BTD + run(states_BTD)
            x_NK = inputs[number].flatten(0, 1)
            gram_KK.addmm_(x_NK.T, x_NK)
            lacking_DK.addmm_((wanted[number] - states[number]).flatten(0, 1).T, x_NK)
    finally:
        hook.remove()
    gram_KK.diagonal().add_(max(_RIDGE * gram_KK.diagonal().mean().item(), 1e-6))
    factor_KK = torch.linalg.cholesky(gram_KK.double())
    change_DK = torch.cholesky_solve(lacking_DK.double().T, factor_KK).T.float()
    # Not in place: an uncut site shares its tensors with the dense model.
    projection.weight = nn.Parameter(projection.weight + change_DK, requires_grad=projection.weight.requires_grad)
    for number, x_BTK in enumerate(inputs):
        states[number] = states[number] + nn.functional.linear(x_BTK, change_DK)
