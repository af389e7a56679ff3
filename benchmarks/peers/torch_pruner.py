"""Prune the transformers model with Torch-Pruning (DepGraph, arXiv 2301.12900; PyPI `torch-pruning`) in two ways.

*Taylor*: first-order importance on the calibration text. Query heads and MLP channels are removed, equally in all
layers; the hidden size is kept (models are far worse if it is pruned too). KV heads are kept: with grouped queries,
Torch-Pruning only removes query heads, equally many of each group. It is applied to all layers, and to those that its
authors' LLM-Pruner prunes (all but the first four and the last two).
*Example*: as in its LLM example (`examples/LLMs/prune_llm.py`): magnitudes, one ratio for hidden size, query heads and
MLP channels, sizes in multiples of four.

The result is converted to our modeling file and checked against the pruned model.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning
from calibrated import Calibrated
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from darwinlm.models.cutting import assemble, count_parameters
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel

WHOLE_LAYERS = (4, 2)
"""First and last layers, of 32, that LLM-Pruner's documented command does not prune."""
_MULTIPLE = 4


def native_model(dense: DenseModel) -> Any:
    """Load the transformers model. Its dependency graph can be traced through eager attention only."""
    return AutoModelForCausalLM.from_pretrained(dense.source, dtype=torch.float32, attn_implementation="eager").eval()


def prune(
    model: Any, importance: Any, *, channels: float, heads: float, ignored: Sequence[nn.Module], multiple: int | None
) -> None:
    """Prune `model` in place with Torch-Pruning.

    Args:
        model: transformers model.
        importance: criterion of torch_pruning.importance.
        channels: fraction of channels to remove; with 0, no heads would be removed either.
        heads: fraction of query heads to remove.
        ignored: modules whose output keeps its size.
        multiple: sizes are rounded down to multiples of it.
    """
    kv_heads, query_heads = model.config.num_key_value_heads, model.config.num_attention_heads
    num_heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        num_heads |= {attention.q_proj: query_heads, attention.k_proj: kv_heads, attention.v_proj: kv_heads}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one for every norm pruned along its last dimension
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            example_inputs=torch.zeros(1, 8, dtype=torch.long),
            importance=importance,
            pruning_ratio=channels,
            ignored_layers=[model.lm_head, *ignored],
            num_heads=num_heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=heads,
            round_to=multiple,
            forward_fn=lambda model, ids: model(ids, use_cache=False).logits,
        )
        pruner.step()
    model.zero_grad()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


@torch.no_grad()
def express(model: Any, dense: DenseModel) -> PrunedModel:
    """Convert the pruned `model` to our modeling file, and compare the logits on 16 tokens."""
    config, head_dim = copy.deepcopy(dense.config), dense.config.head_dim
    config.hidden_size = model.model.embed_tokens.weight.shape[1]
    config.per_layer_config = {
        number: {
            "num_attention_heads": layer.self_attn.q_proj.out_features // head_dim,
            "num_key_value_heads": layer.self_attn.k_proj.out_features // head_dim,
            "intermediate_size": layer.mlp.gate_proj.out_features,
        }
        for number, layer in enumerate(model.model.layers)
    }
    tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        # Torch-Pruning prunes both by the same columns, but they are no longer the same tensor.
        assert torch.equal(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"])
    ours = assemble(config, tensors, trainable=False)
    ids = torch.randint(0, config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    expected, found = model(ids, use_cache=False).logits, ours(ids).logits
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max(), "not the model that Torch-Pruning made"
    return ours


def by_taylor(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Yield the widest MLPs within `parameters` for each number of query heads: in all layers, and in most."""
    dense, config = calibrated.dense, calibrated.dense.config
    group = config.num_attention_heads // config.num_key_value_heads
    first, last = (max(1, round(count * config.num_hidden_layers / 32)) for count in WHOLE_LAYERS)
    native = native_model(dense)
    for whole in (0, first + last):
        layers = config.num_hidden_layers - whole
        # Version 1.6.1 silently prunes no heads if each KV head would keep a single query head.
        for left in range(group, 1, -1):
            channels = _channels(dense, parameters, layers, (group - left) * config.num_key_value_heads)
            if not 0 < channels < config.intermediate_size:
                continue
            model = copy.deepcopy(native)
            _set_gradients(model, calibrated.gradients)
            kept = (
                [*model.model.layers[:first], *model.model.layers[config.num_hidden_layers - last :]] if whole else []
            )
            outputs = [
                module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
            ]
            prune(
                model,
                torch_pruning.importance.GroupTaylorImportance(),
                # Add half a channel and a fraction of a head, because kept sizes are rounded down.
                channels=1 - (channels + 0.5) / config.intermediate_size,
                heads=max(0.0, 1 - left / group - 1e-6),
                ignored=[model.model.embed_tokens, *outputs, *kept],
                multiple=None,
            )
            name = f"{left} of {group} query heads a KV head, {channels} of {config.intermediate_size} channels"
            yield name + (f" in {layers} layers" if whole else ""), express(model, dense)


def as_in_the_example(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Prune with the smallest ratio, in thousandths, that keeps at most `parameters`."""
    dense = calibrated.dense
    ratio = next(number / 1000 for number in range(1, 1000) if _example_size(dense, number / 1000) <= parameters)
    model = native_model(dense)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    prune(model, importance, channels=ratio, heads=ratio, ignored=[], multiple=_MULTIPLE)
    yield f"ratio {ratio}, hidden size {model.lm_head.in_features}", express(model, dense)


def _set_gradients(model: Any, gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()


def _channels(dense: DenseModel, parameters: int, layers: int, heads_gone: int) -> int:
    """Return the MLP width of `layers` layers if `heads_gone` query heads are removed from each."""
    config, mlp = dense.config, dense.sites[1]
    channel = count_parameters(mlp, dense.shapes, [0, 1]) - count_parameters(mlp, dense.shapes, [0])
    head = config.head_dim * (2 * config.hidden_size + ("model.layers.0.self_attn.q_proj.bias" in dense.shapes))
    channels_gone = ((dense.parameters - parameters) / layers - heads_gone * head) / channel
    return int(config.intermediate_size - channels_gone)


def _example_size(dense: DenseModel, ratio: float) -> int:
    """Return the remaining parameters of a model without biases, with the rounding of Torch-Pruning 1.6."""
    config = dense.config
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    hidden, channels = (int(size * (1 - ratio)) for size in (config.hidden_size, config.intermediate_size))
    hidden, channels = hidden - hidden % _MULTIPLE, channels - channels % _MULTIPLE
    gone = math.ceil(math.ceil(ratio * config.num_attention_heads) / kv_heads)
    queries = (group - gone) * kv_heads * config.head_dim
    layer = 2 * hidden * (queries + kv_heads * config.head_dim) + 3 * hidden * channels + 2 * hidden
    ends = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden + hidden
    return config.num_hidden_layers * layer + ends
