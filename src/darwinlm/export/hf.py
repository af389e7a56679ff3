"""Hugging Face folder: safetensors, config, tokenizer, plan, model card and the modelling file."""

import json
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from darwinlm.errors import UserError
from darwinlm.export.proof import LATIN, TEXT
from darwinlm.models.families import auto_map
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.pruned import load
from darwinlm.models.streaming import is_streamed, stream_layers
from darwinlm.runtime.files import new_folder, write_json
from darwinlm.runtime.progress import log

MODULE = "modeling_darwinlm"
SHARD = "5GB"
"""Maximum size of a weights file."""
_PROOF_TOKENS = 16


def export_hf(model: PrunedModel, dense: DenseModel, plan: Mapping[str, Any], card: str, folder: Path) -> None:
    """Write `model` to `folder` in the checkpoint's dtype, verified before it replaces an existing folder.

    Args:
        model: the pruned model; not changed.
        dense: source of tokenizer and generation settings.
        plan: content of `plan.json`.
        card: content of `README.md`.
        folder: output folder, only replaced by a complete one.

    Raises:
        UserError: if the folder cannot be written, or the logits of the written model differ from those of `model`.
    """
    with new_folder(folder) as draft:
        save_model(model, dense.dtype, draft)
        dense.generation_config.to_json_file(draft / "generation_config.json", use_diff=True)
        dense.tokenizer.save_pretrained(draft)
        name_tokenizer(draft / "tokenizer_config.json")
        write_json(draft / "plan.json", plan)
        (draft / "README.md").write_text(card, encoding="utf-8")
        _check_tokenizer(dense.tokenizer, draft)
        difference = _largest_difference(model, draft)
        if not difference < (1e-4 if dense.dtype == torch.float32 else 0.1):
            raise UserError(
                f"{folder}: logits of the written model differ (relative difference {difference:.1e}); export discarded"
            )


def save_model(model: PrunedModel, dtype: torch.dtype, folder: Path) -> None:
    """Write weights (in `dtype`), config and modelling file to `folder`."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": auto_map(model.config, MODULE), "dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)


def name_tokenizer(file: Path) -> None:
    """Use a tokenizer class name that transformers 4 and 5 both support for generic tokenizers, and set
    `model_input_names`, whose defaults differ: version 4 adds token types, which no model here uses."""
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            names = settings.get("model_input_names") or ["input_ids", "attention_mask"]
            write_json(file, settings | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names})


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Warn if AutoTokenizer, which relies on names in `folder`, tokenizes differently from `tokenizer`."""
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        alike = all(found(text).input_ids == tokenizer(text).input_ids for text in (LATIN, TEXT))
        reason = f"its {type(found).__name__} gives other tokens" if not alike else ""
    except Exception as error:  # Transformers raises many kinds of errors.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    if reason:
        log.warning(
            "AutoTokenizer cannot load the pruned model's tokenizer correctly (%s): use the dense model's tokenizer",
            reason,
        )


def copy_rest(source: Path, folder: Path, without: Container[str]) -> None:
    """Copy everything except weights, code and the files named in `without` from `source` to `folder`."""
    for file in source.iterdir():
        weights_or_code = file.name.endswith((".safetensors", ".index.json", ".py"))
        if file.is_file() and not weights_or_code and file.name not in without:
            shutil.copyfile(file, folder / file.name)


@torch.no_grad()
def _largest_difference(model: PrunedModel, folder: Path) -> float:
    streamed = is_streamed(model)
    written = load(folder, dtype=model.dtype, device="cpu" if streamed else str(model.device))
    if streamed:
        stream_layers(written, model.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, _PROOF_TOKENS), generator=generator).to(model.device)
    training = model.training
    expected, found = model.eval()(tokens).logits, written(tokens).logits
    model.train(training)
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-6))
