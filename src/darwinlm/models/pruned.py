"""Loading pruned models from their folders."""

import json
from pathlib import Path
from typing import Any, cast

import torch

from darwinlm.errors import UserError
from darwinlm.models.config import OLD_TYPE, load_config
from darwinlm.models.families import causal_lm
from darwinlm.models.loading import choose_device
from darwinlm.models.modeling_darwinlm import PRUNED, PrunedModel


def find_model(source: str | Path) -> Path:
    """Return the folder of the pruned model, `source/model` or `source`. Raises UserError if there is none."""
    path = Path(source)
    path = path / "model" if (path / "model" / "config.json").exists() else path
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} contains no model (config.json is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict) or (PRUNED not in config and config.get("model_type") != OLD_TYPE):
        raise UserError(f"{path} contains no pruned model; load it with transformers")
    return path


def load(folder: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PrunedModel:
    """Load a pruned model written by this package. No code from the folder is run.

    Args:
        folder: `RUN/model`, or `RUN`.
        dtype: dtype of the weights; by default their stored dtype.
        device: device of the model.

    Returns:
        The model, a transformers model in evaluation mode.

    Raises:
        UserError: if the folder contains no pruned model, or an incomplete one.
    """
    path = find_model(folder)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"dtype {dtype!r} is not supported; use float32, bfloat16 or float16")
    try:
        config = load_config(str(path))
        read: Any = causal_lm(config).from_pretrained
        model, facts = read(path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # Transformers raises many kinds of errors.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{path}: the model cannot be loaded: {reason}; run the command of its run again to recreate it"
        ) from None
    if facts["missing_keys"]:
        raise UserError(f"{path}: its files are missing {sorted(facts['missing_keys'])[0]}; download the whole model")
    model.to(choose_device(device))
    model.eval()
    return cast(PrunedModel, model)
