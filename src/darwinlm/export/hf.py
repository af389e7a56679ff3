"""The Hugging Face folder: safetensors, config, tokenizer, plan, model card and the one modelling file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from darwinlm.adapters.loading import DenseModel, choose_device
from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM
from darwinlm.errors import UserError
from darwinlm.files import new_folder, write_json

MODULE = "modeling_darwinlm"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.DarwinLMConfig",
    "AutoModel": f"{MODULE}.DarwinLMModel",
    "AutoModelForCausalLM": f"{MODULE}.DarwinLMForCausalLM",
}
_SHARD = "5GB"
_PROOF_TOKENS = 16


def export_hf(model: DarwinLMForCausalLM, dense: DenseModel, plan: Mapping[str, Any], card: str, folder: Path) -> None:
    """Write `model` to `folder` in the checkpoint's dtype, and prove it before it takes its place.

    Args:
        model: the pruned model, float32; it is not changed.
        dense: where tokenizer and generation settings come from.
        plan: the content of `plan.json`.
        card: the content of `README.md`.
        folder: replaced as a whole, only by a complete one.

    Raises:
        UserError: if the folder cannot be written, or the written model does not give the logits of `model`.
    """
    with new_folder(folder) as draft:
        state = {name: tensor.to(dense.dtype) for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        model.save_pretrained(draft, state_dict=state, max_shard_size=_SHARD)
        config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
        config |= {"auto_map": AUTO_MAP, "dtype": str(dense.dtype).removeprefix("torch.")}
        config |= {"architectures": ["DarwinLMForCausalLM"]}
        write_json(draft / "config.json", config)
        dense.generation_config.to_json_file(draft / "generation_config.json", use_diff=True)
        dense.tokenizer.save_pretrained(draft)
        write_json(draft / "plan.json", plan)
        (draft / "README.md").write_text(card, encoding="utf-8")
        difference = _largest_difference(model, draft)
        if not difference < (1e-4 if dense.dtype == torch.float32 else 0.1):
            raise UserError(f"{folder}: the written model gives other logits (relative difference {difference:.1e})")


def load(folder: str | Path, *, dtype: torch.dtype | str = "auto", device: str = "cpu") -> DarwinLMForCausalLM:
    """Load a pruned model that this package wrote. No code from the folder is run.

    Args:
        folder: `RUN/model`, or `RUN`.
        dtype: of the weights; by default the one they are stored in.
        device: where to put them.

    Raises:
        UserError: if the folder holds no model of ours, or a damaged one.
    """
    path = Path(folder)
    path = path / "model" if (path / "model" / "config.json").exists() else path
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no model (config.json is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "darwinlm":
        raise UserError(f"{path} holds no pruned model; load it with transformers")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"dtype {dtype!r} is no type of numbers; give float32, bfloat16 or float16")
    try:
        model: DarwinLMForCausalLM = DarwinLMForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: the model cannot be loaded: {reason}; the command of its run makes it again"
        ) from None
    model.to(choose_device(device))  # type: ignore[arg-type]
    model.eval()
    return model


@torch.no_grad()
def _largest_difference(model: DarwinLMForCausalLM, folder: Path) -> float:
    written = load(folder, dtype=torch.float32, device=str(model.device))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, _PROOF_TOKENS), generator=generator).to(model.device)
    training = model.training
    expected, found = model.eval()(tokens).logits, written(tokens).logits
    model.train(training)
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-6))
