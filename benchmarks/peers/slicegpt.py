"""SliceGPT (Ashkboos et al., 2024, arXiv 2401.15024), reimplemented from the paper for pre-norm layers.

The scales of the norms are merged into the projections after them; a norm without scale is invariant to rotation.
Before each norm, the residual stream is rotated to the principal axes of the norm's output, and only the first axes are
kept: the same number everywhere. Consecutive parts then read different axes, so the stream is multiplied by a small
matrix between them. These matrices are parameters, and so is the head, which is no longer tied to the embeddings: both
count towards the size. The axes are those of the dense model's activations.

Dimension letters: D hidden size, K axes kept.
"""

import math
from collections.abc import Iterator

import torch
from calibrated import Calibrated
from forms import SHORTCUTS, revive
from torch import Tensor

from darwinlm.models.families import EMBEDDINGS, HEAD, family_of
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel

_NORMS = ("input_layernorm", "post_attention_layernorm")
_LAST = "model.norm"


def norms_of(dense: DenseModel) -> list[str]:
    """Return the names of all norms of the residual stream, in order."""
    family = family_of(dense.config)
    assert (family.before_attention, family.before_mlp) == _NORMS and not family.after_mlp, "pre-norm layers only"
    assert family.mlp_inputs == ("gate_proj", "up_proj") and len(family.queries_keys_values) == 3
    layers = range(dense.config.num_hidden_layers)
    return [*(f"model.layers.{layer}.{norm}" for layer in layers for norm in _NORMS), _LAST]


@torch.no_grad()
def axes(calibrated: Calibrated) -> list[Tensor]:
    """Return, for each norm, the principal axes (columns) of its output before its scale, the largest first."""
    dense, squares = calibrated.dense, dict[str, Tensor]()

    def record(name: str):  # type: ignore[no-untyped-def]
        def hook(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_ND = inputs[0].flatten(0, -2)
            x_ND = x_ND / x_ND.square().mean(-1, keepdim=True).add(1e-12).sqrt()
            squares[name] = squares.get(name, 0) + (x_ND.T @ x_ND).double()

        return hook

    hooks = [dense.model.get_submodule(name).register_forward_hook(record(name)) for name in norms_of(dense)]
    calibrated._run()
    for hook in hooks:
        hook.remove()
    return [torch.linalg.eigh(squares[name]).eigenvectors.flip(1).float() for name in norms_of(dense)]


@torch.no_grad()
def sliced(dense: DenseModel, axes_DD: list[Tensor], size: int) -> PrunedModel:
    """Return the model reduced to the first `size` axes."""
    weights = dense.weights
    first = [one[:, :size] for one in axes_DD]
    scales = dict(zip(norms_of(dense), (weights[f"{name}.weight"] for name in norms_of(dense)), strict=True))
    tensors = {EMBEDDINGS: weights[EMBEDDINGS] @ first[0]}
    head_VD = weights[EMBEDDINGS] if dense.config.tie_word_embeddings else weights[HEAD]
    tensors[HEAD] = head_VD * scales[_LAST] @ first[-1]
    for layer in range(dense.config.num_hidden_layers):
        before, between, behind = first[2 * layer : 2 * layer + 3]
        prefix = f"model.layers.{layer}."
        for part, read, write, inputs, output in (
            ("self_attn", before, between, ("q_proj", "k_proj", "v_proj"), "o_proj"),
            ("mlp", between, behind, ("gate_proj", "up_proj"), "down_proj"),
        ):
            scale_D = scales[prefix + _NORMS[part == "mlp"]]
            for name in inputs:
                tensors[f"{prefix}{part}.{name}.weight"] = weights[f"{prefix}{part}.{name}.weight"] * scale_D @ read
                bias = f"{prefix}{part}.{name}.bias"
                if bias in weights:
                    tensors[bias] = weights[bias]
            for kind in ("weight", "bias"):
                name = f"{prefix}{part}.{output}.{kind}"
                if name in weights:
                    tensors[name] = write.T @ weights[name]
            tensors[prefix + SHORTCUTS[part == "mlp"]] = read.T @ write
    for name in norms_of(dense):
        # The mean square is over fewer axes, and so larger.
        tensors[f"{name}.weight"] = torch.full((size,), (dense.config.hidden_size / size) ** 0.5)
    inner = ("q_norm.weight", "k_norm.weight")
    tensors |= {name: tensor for name, tensor in weights.items() if name.endswith(inner)}
    facts = {"hidden_size": size, "tied": False, "layers": {}}
    return revive(dense, facts, {name: tensor.contiguous() for name, tensor in tensors.items()})


def sliced_parameters(dense: DenseModel, size: int) -> int:
    """Return the number of parameters of the model with `size` axes."""
    config = dense.config
    count: int = config.vocab_size * size if config.tie_word_embeddings else 0
    for name, shape in dense.shapes.items():
        numel = math.prod(shape)
        inner = name.endswith(("q_norm.weight", "k_norm.weight"))
        inner = inner or (name.endswith("bias") and not name.endswith(("o_proj.bias", "down_proj.bias")))
        count += numel if inner else numel // config.hidden_size * size
    count += 2 * config.num_hidden_layers * size * size
    return count


def by_rotation(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Slice to as many axes as fit into `parameters`."""
    dense = calibrated.dense
    fitting = [size for size in range(1, dense.config.hidden_size) if sliced_parameters(dense, size) <= parameters]
    size = max(fitting)
    yield f"{size} of {dense.config.hidden_size} axes", sliced(dense, axes(calibrated), size)
