"""Reading of a checkpoint's `config.json`: upgraded if an earlier version wrote it, rejected if not supported."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, PreTrainedConfig

from darwinlm.errors import UserError
from darwinlm.models.families import FAMILIES, config_class, dense_config, set_attention
from darwinlm.models.modeling_darwinlm import PRUNED, PrunedConfig, whole_settings

_MOST_LAYERS = 10_000
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OLD_TYPE = "darwinlm"
"""`model_type` of models pruned by an earlier version, which had a modelling file for four families."""
_OLD_SETTINGS = (
    "base_model_type",
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
    "model_type",
    "auto_map",
)
_BIASES: Mapping[str, Mapping[str, str]] = {
    "llama": {"attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": "qkv_bias"},
}
"""Settings of transformers and their former names, by family of such a model."""
_GGUF, _ADAPTER = b"GGUF", "adapter_config.json"
_UNQUANTIZED = "use the original unquantized checkpoint"


def load_settings(source: str) -> dict[str, Any]:
    """Read the config.json of a folder or a Hub model and check its model_type. Raises UserError."""
    if os.path.exists(source):  # A Path raises if no file can have such a name.
        _check_kind(Path(source))
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except Exception as error:  # Here and below: transformers and the Hub client raise many kinds of errors.
        if not os.path.exists(source) and not isinstance(error.__cause__, GatedRepoError):
            raise UserError(
                f"model {source!r}: not a local folder, and not found on the Hub (or the Hub cannot be reached)"
            ) from None
        raise UserError(f"model {source!r}: its config.json cannot be read: {reason_of(error, source)}") from None
    own = settings.get(PRUNED) if isinstance(settings, dict) else None
    settings = whole_settings(settings) if isinstance(own, dict) else settings
    if isinstance(settings, dict) and settings.get("model_type") == OLD_TYPE:
        settings = renewed_settings(settings)
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f"model {source!r} has no config.json with a model_type; give a folder in Hugging Face format")
    layers = settings.get("num_hidden_layers")
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:  # Lists of this length would be allocated next.
        raise UserError(
            f"model {source!r}: num_hidden_layers={layers} in its config.json must be 1 to {_MOST_LAYERS:,}"
        )
    return settings


def text_type(settings: Mapping[str, Any]) -> str:
    """Return the `model_type` of the text model; for a multimodal checkpoint, that of its `text_config`."""
    text = settings.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    outer = str(settings["model_type"])
    if outer in FAMILIES or not isinstance(text, dict):
        return outer
    return inner if isinstance(inner, str) else f"{outer}_text"


def _text_config(whole: Any) -> Any:
    """Return the text config of a multimodal config, with the settings shared by the whole model."""
    text = copy.deepcopy(whole.text_config)
    given = whole.to_dict()
    for name in ("tie_word_embeddings", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if given.get(name) is not None:
            setattr(text, name, getattr(whole, name))
    return text


def is_pruned(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json, as returned by `load_settings`, belongs to a pruned model."""
    return "layer_parts" in settings


def renewed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the `config.json` of a model pruned by an earlier version to the current format."""
    kept = {name: value for name, value in settings.items() if name not in _OLD_SETTINGS}
    family = str(settings.get("base_model_type"))
    if family not in _BIASES:
        raise UserError(f"a pruned model of an old format has base_model_type {family!r}; prune it again")
    kept |= {"model_type": family, "layer_parts": FAMILIES[family].parts}
    kept |= {name: settings[own] for name, own in _BIASES[family].items()}
    if family.startswith("qwen"):
        kept |= {"use_sliding_window": settings.get("sliding_window") is not None}
    else:
        kept.pop("layer_types", None)
    return kept


def _check_kind(path: Path) -> None:
    """Reject formats other than Hugging Face folders, with a hint how to convert them. Raises UserError."""
    original = "give the folder or Hub id of the original Hugging Face checkpoint"
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(len(_GGUF)) == _GGUF
        if is_gguf:
            raise UserError(
                f"model {str(path)!r} is a GGUF file (llama.cpp's format), which is not supported; {original}"
            )
        raise UserError(f"model {str(path)!r} is a file; give a folder in Hugging Face format, or a Hub model id")
    if not path.is_dir() or (path / "config.json").exists():
        return
    if (path / _ADAPTER).exists():
        try:
            base = json.loads((path / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = None
        of = f" of {base!r}" if isinstance(base, str) and base else ""
        raise UserError(
            f"model {str(path)!r} is a LoRA adapter{of}, not a whole model; merge it into its base model (PEFT: "
            "merge_and_unload, then save_pretrained) and give that folder"
        )
    if any(path.glob("*.gguf")):
        raise UserError(
            f"model {str(path)!r} contains GGUF files (llama.cpp's format), which are not supported; {original}"
        )


def load_sizes(source: str) -> PrunedConfig:
    """Return the config of a dense or pruned model, without reading weights. Raises UserError."""
    config = load_config(source)
    try:
        return dense_config(config)
    except Exception as error:
        raise UserError(f"model {source!r}: its config.json cannot be used: {reason_of(error, source)}") from None


def load_config(source: str) -> Any:
    """Read a checkpoint's config and reject unsupported models, before any weight is read. Raises UserError.

    For an already pruned model the config is a `PrunedConfig`, whatever code its folder refers to; for any other model
    it is transformers' own.
    """
    settings = load_settings(source)
    model_type = text_type(settings)
    if model_type not in FAMILIES:
        raise UserError(
            f"model {source!r}: model type {model_type!r} is not supported; supported families: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    try:
        if is_pruned(settings):
            settings.pop("auto_map", None)
            config = config_class(model_type).from_dict(settings)
            set_attention(config)
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if model_type != settings["model_type"]:
                config = _text_config(config)
    except Exception as error:
        raise UserError(f"model {source!r}: its config.json cannot be used: {reason_of(error, source)}") from None
    architectures = config.architectures or []
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UserError(f"model {source!r} is a {architectures[0]}, not a causal language model (…ForCausalLM)")
    if isinstance(config.dtype, torch.dtype) and config.dtype not in _DTYPES:
        raise UserError(f"model {source!r}: dtype {config.dtype} in its config.json is not supported; {_UNQUANTIZED}")
    mlx = settings.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise UserError(f"model {source!r} is quantized to {mlx['bits']} bits for MLX; {_UNQUANTIZED}")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        how = quantized if isinstance(quantized, dict) else quantized.to_dict()
        if how.get("quant_method") == "mxfp4":
            raise UserError(
                f"model {source!r} is quantized (MXFP4); convert it to bfloat16 with transformers and give that "
                f"folder: AutoModelForCausalLM.from_pretrained({source!r}, "
                "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(FOLDER)"
            )
        raise UserError(f"model {source!r} is quantized; {_UNQUANTIZED}")
    return config


def reason_of(error: BaseException, source: str) -> str:
    """Return why `source` could not be read, in one line."""
    if isinstance(error.__cause__, GatedRepoError):
        return f"access is gated; request it at https://huggingface.co/{source}, then log in with `hf auth login`"
    text = " ".join(str(error).split())
    named = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    return text if named else f"{type(error).__name__}: {text}"
