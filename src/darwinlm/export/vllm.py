"""Folders for vLLM's Transformers backend, in which every layer has attention.

The backend runs our modelling file and reads the sizes of each layer from `per_layer_config`, but gives every layer a
KV cache and expects attention that uses it. A layer without attention gets a head of zeros (with tensor parallelism one
per device), which adds exactly nothing; a layer without any part is omitted.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from darwinlm.errors import UserError
from darwinlm.export.engine import Engine, Export
from darwinlm.export.hf import copy_rest, save_model
from darwinlm.export.proof import logits_of
from darwinlm.export.shapes import check_equal_groups, check_no_experts, kept_layers, layer_shapes
from darwinlm.models.cutting import assemble
from darwinlm.models.families import LAYERS, dense_again
from darwinlm.models.loading import DenseModel, expected_shapes, some_layers
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.pruned import load


def check_tensor_parallel(config: PrunedConfig, devices: int) -> None:
    """Reject a tensor-parallel size that does not divide the sizes of every layer. Raises UserError."""
    for index, shape in enumerate(layer_shapes(config)):
        for size, units in ((shape.kv_heads, "KV heads"), (shape.width, "MLP channels")):
            if size % devices:
                raise UserError(
                    f"layer {index} has {size} {units}, which are not divisible by {devices} devices; prune "
                    f"with --set export.tensor_parallel={devices}"
                )


def with_attention_everywhere(model: PrunedModel, stub_heads: int = 1) -> PrunedModel:
    """Return an equivalent of `model` with heads of zeros in layers without attention, and without empty layers."""
    config, kept = cast(PrunedConfig, model.config), kept_layers(cast(PrunedConfig, model.config))
    whole = some_layers(dense_again(config), kept)
    shapes = [layer_shapes(config)[index] for index in kept]
    whole.per_layer_config = {
        number: {
            "num_attention_heads": shape.heads or stub_heads,
            "num_key_value_heads": shape.kv_heads or stub_heads,
            **({"intermediate_size": shape.width} if shape.width else {"skip": ["mlp"]}),
        }
        for number, shape in enumerate(shapes)
    }
    weights = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, shape in expected_shapes(whole).items():
        layer = name.split(".")[2] if name.startswith(LAYERS) else None
        source = name if layer is None else name.replace(f".{layer}.", f".{kept[int(layer)]}.", 1)
        tensors[name] = (
            weights[source] if source in weights else torch.full(shape, float("norm" in name), dtype=model.dtype)
        )
    return assemble(whole, tensors, trainable=False)


def write_vllm(model: PrunedModel, source: Path, folder: Path, devices: int) -> None:
    """Write `model`, loaded from `source`, to `folder` for `devices` devices, with all other files of `source`."""
    copy_rest(source, folder, ("config.json",))
    save_model(with_attention_everywhere(model, devices), model.dtype, folder)


def _check(model: Export | DenseModel) -> None:
    check_no_experts(model.config, "vLLM")
    check_equal_groups(model.config, "vLLM")


def _write(export: Export, draft: Path) -> dict[str, Any]:
    write_vllm(export.model, export.source, draft, export.devices)
    export.notes.append("not run in vLLM itself: the folder was compared in transformers")
    return {"tensor_parallel": export.devices}


ENGINE = Engine(
    name="vllm",
    suffix="-vllm",
    tensor_parallel=True,
    check=_check,
    check_export=lambda export: check_tensor_parallel(export.config, export.devices),
    write=_write,
    logits=lambda _, draft, tokens: logits_of(load(draft, dtype=torch.float32), tokens),
)
