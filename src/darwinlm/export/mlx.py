"""Folders for mlx-lm: the same tensors, and a code file that mlx-lm runs instead of one of its own models."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import save_torch_state_dict

from darwinlm.errors import UserError
from darwinlm.export.engine import Engine, Export
from darwinlm.export.form import STATIC_ROPE, Rope, layer_tensors, read_form, read_rope
from darwinlm.export.hf import SHARD, copy_rest
from darwinlm.export.shapes import check_equal_groups
from darwinlm.models.families import LAYERS, causal_lm, window_of
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel, whole_settings
from darwinlm.runtime.files import write_json

PACKAGE = "mlx-lm"
_MODULE = "darwinlm_mlx.py"
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_LONGEST = 1e30
"""Period of pairs that are not rotated: in float32 any position divided by it is 0."""


def check_mlx(config: PrunedConfig) -> None:
    """Reject a model that the code file cannot run. Raises UserError."""
    form = read_form(config, "export to MLX")
    check_equal_groups(config, "MLX")
    for layer in range(config.num_hidden_layers):
        rope = read_rope(config, layer)
        kind = rope.settings["rope_type"] if rope else "default"
        if kind not in STATIC_ROPE:
            raise UserError(f"export to MLX supports the rope types {', '.join(STATIC_ROPE)}; the model uses {kind}")
        if rope and rope.scaling != 1 and 0 in rope.turns:
            raise UserError(
                "export to MLX does not support scaling of rope that rotates only a part of each head (rope type "
                f"{kind})"
            )
    if form.activation not in _ACTIVATIONS:
        raise UserError(f"export to MLX supports {' and '.join(_ACTIVATIONS)}; the model uses {form.activation}")


def write_mlx(model: PrunedModel, source: Path, folder: Path) -> None:
    """Write `model`, loaded from `source`, to `folder`, with all other files of `source` except code."""
    copy_rest(source, folder, ("config.json",))
    pruned, weights = cast(PrunedConfig, model.config), model.state_dict()
    if pruned.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(LAYERS)}
    for layer in range(pruned.num_hidden_layers):
        found = layer_tensors(pruned, weights, layer)
        # Cloned, because views would be written with the whole underlying tensor.
        state |= {f"{LAYERS}{layer}.{name}": tensor.clone() for name, tensor in found.items()}
    save_torch_state_dict(state, folder, max_shard_size=SHARD)
    shutil.copyfile(Path(__file__).with_name(_MODULE), folder / _MODULE)

    # A single code file reads all settings in one place.
    config = whole_settings(json.loads(pruned.to_json_string()))
    del config["layer_parts"]
    layers = range(pruned.num_hidden_layers)
    windows, ropes = [window_of(pruned, layer) for layer in layers], [read_rope(pruned, layer) for layer in layers]
    kinds = list(dict.fromkeys(rope for rope in map(_periods, ropes) if rope))
    config |= asdict(read_form(pruned, "export to MLX"))
    config |= {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}
    config |= {"model_file": _MODULE, "ropes": [{"periods": periods, "scaling": scaling} for periods, scaling in kinds]}
    config |= {"layer_ropes": [kinds.index(periods) if (periods := _periods(rope)) else None for rope in ropes]}
    config |= {"dtype": str(model.dtype).removeprefix("torch."), "architectures": [causal_lm(pruned).__name__]}
    write_json(folder / "config.json", config)


def _periods(rope: Rope | None) -> tuple[tuple[float, ...], float] | None:
    """Return the position period of each pair of rows, as MLX needs it, and the scaling: for every rope type the same
    numbers as in transformers."""
    if rope is None:
        return None
    return tuple(1 / turn if turn else _LONGEST for turn in rope.turns), rope.scaling


def mlx_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """Compute the logits of `folder` in mlx-lm, in float32 on the CPU, by position and vocabulary entry.

    The first half of the tokens is processed at once, and the rest one by one with the caches.
    """
    mx: Any = importlib.import_module("mlx.core")
    load: Any = importlib.import_module("mlx_lm.utils").load_model
    with mx.stream(mx.cpu):
        model, _ = load(folder, trust_remote_code=True)
        model.set_dtype(mx.float32)
        cache, half = model.make_cache(), max(1, len(tokens) // 2)
        parts = [list(tokens[:half]), *([token] for token in tokens[half:])]
        found = [np.array(model(mx.array([part]), cache=cache)[0]) for part in parts]
    return np.concatenate(found)


def _write(export: Export, draft: Path) -> dict[str, Any]:
    write_mlx(export.model, export.source, draft)
    return {}


ENGINE = Engine(
    name="mlx",
    suffix="-mlx",
    check=lambda model: check_mlx(model.config),
    write=_write,
    logits=lambda _, draft, tokens: mlx_logits(draft, tokens),
    packages=(PACKAGE, "'mlx[cpu]'"),
)
