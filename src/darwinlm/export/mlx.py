"""A folder for mlx-lm: the same tensors, and the one file of code that mlx-lm runs in place of a model of its own."""

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from darwinlm.adapters.families import rotary_embedding, window_of
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel, whole_settings
from darwinlm.errors import UserError
from darwinlm.export.hf import copy_rest, save_model
from darwinlm.export.shapes import check_equal_groups, read_biases
from darwinlm.files import write_json

PACKAGE = "mlx-lm"
_MODULE = "darwinlm_mlx.py"
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_mlx(config: PrunedConfig) -> None:
    """Refuse a model that the file of code cannot run. Raises UserError."""
    read_biases(config, "the export to MLX")
    check_equal_groups(config, "MLX")
    kind = config.rope_parameters["rope_type"]
    if kind not in _STATIC_ROPE:
        raise UserError(f"the export to MLX knows rope of kind {', '.join(_STATIC_ROPE)}; the model's is {kind}")
    if config.hidden_act != "silu":
        raise UserError(f"the export to MLX computes silu, the model {config.hidden_act}")


def write_mlx(model: PrunedModel, source: Path, folder: Path) -> None:
    """Write `model`, loaded from `source`, to `folder`, with everything else that is in `source`."""
    copy_rest(source, folder, ("config.json",))
    save_model(model, model.dtype, folder)
    for file in folder.glob("*.py"):
        file.unlink()
    shutil.copyfile(Path(__file__).with_name(_MODULE), folder / _MODULE)
    # There is one code for it, which reads all settings in one place.
    config = whole_settings(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    del config["auto_map"], config["layer_parts"]
    windows = [window_of(model.config, layer) for layer in range(model.config.num_hidden_layers)]
    config |= {"layer_types": ["sliding_attention" if window else "full_attention" for window in windows]}
    config |= asdict(read_biases(model.config, "the export to MLX"))
    rope = rotary_embedding(model.config)
    # Periods of the turns, which MLX asks for: of every kind of rope the same numbers that transformers computes with.
    config |= {"model_file": _MODULE, "rope_periods": (1 / rope.inv_freq.double()).tolist()}
    config |= {"rope_attention_scaling": float(rope.attention_scaling)}
    write_json(folder / "config.json", config)


def engine_version() -> str | None:
    """The name and version of mlx-lm, or None where it is not installed."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def mlx_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """What mlx-lm makes of `folder` in float32 on the CPU: logits by position and vocabulary entry.

    The first half of the tokens is read at once, and the rest one by one out of the caches.
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
