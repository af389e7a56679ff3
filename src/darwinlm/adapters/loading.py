"""From a checkpoint to a dense model in our modelling file, proved equal to transformers' own before it is used."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from darwinlm.adapters.cutting import build_model
from darwinlm.adapters.families import Granularity, Site, dense_config, family_of, find_sites
from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig, DarwinLMForCausalLM
from darwinlm.errors import InvalidTensorError, UserError
from darwinlm.files import digest


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A dense checkpoint, ready to be pruned. Its weights are float32 whatever the checkpoint holds."""

    source: str
    model: DarwinLMForCausalLM
    config: DarwinLMConfig
    sites: tuple[Site, ...]
    tokenizer: Any
    generation_config: GenerationConfig
    dtype: torch.dtype
    """Of the checkpoint; the pruned model is saved in it."""
    fingerprint: str
    """Of config and weights: two checkpoints that differ have different ones."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict; a tied head is not in it."""
        state: dict[str, Tensor] = self.model.state_dict()
        if self.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        return state

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.model.norm.weight.device  # type: ignore[no-any-return]


def choose_device(name: str) -> torch.device:
    """The device that a recipe asks for; `auto` takes CUDA, then MPS, then the CPU. Raises UserError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def load_config(source: str) -> Any:
    """Read a checkpoint's config and refuse what cannot be pruned, before any weight is read. Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {source!r}: {_first_line(error, source)}") from None
    family_of(config)
    architectures = config.architectures or []
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UserError(f"model {source!r} is a {architectures[0]}, not a causal language model (…ForCausalLM)")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {source!r} is quantised; give the unquantised checkpoint it was made from")
    return config


@torch.no_grad()
def load_dense(source: str, granularity: Granularity, device: torch.device) -> DenseModel:
    """Load a checkpoint (safetensors only, no remote code) into our modelling file.

    Raises:
        UserError: if it cannot be loaded, lacks weights, or our modelling file does not reproduce its logits.
        InvalidTensorError: naming the first weight that holds NaN or Inf.
    """
    base_config = load_config(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {source!r}: its weights cannot be loaded: {_first_line(error, source)}") from None
    native, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"model {source!r}: {len(missing)} weights are missing from its files, first {missing[0]!r}")
    native = native.eval().to(device)
    weights = native.state_dict()
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidTensorError(f"model {source!r}: {name} holds NaN or Inf; repair the checkpoint")
    if base_config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)

    config = dense_config(base_config)
    config._attn_implementation = "sdpa"
    sites = find_sites(config, granularity)
    model = build_model(config, sites, weights, {})
    _check_equal(native, model, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {source!r}: its tokenizer cannot be loaded: {_first_line(error, source)}") from None
    dtype = base_config.dtype if isinstance(base_config.dtype, torch.dtype) else torch.float32
    return DenseModel(
        source=source,
        model=model,
        config=config,
        sites=sites,
        tokenizer=tokenizer,
        generation_config=native.generation_config,
        dtype=dtype,
        fingerprint=_fingerprint(base_config, weights),
    )


def _check_equal(native: Any, model: DarwinLMForCausalLM, source: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, 16), generator=generator).to(model.device)
    expected, found = native(tokens).logits, model(tokens).logits
    scale = expected.abs().max().clamp_min(1e-6)
    difference = ((expected - found).abs().max() / scale).item()
    if not difference < 1e-4:
        raise UserError(
            f"model {source!r}: our modelling file gives other logits than transformers (relative difference "
            f"{difference:.1e}); its config has a setting that is not supported yet"
        )


def _fingerprint(config: Any, weights: dict[str, Tensor]) -> str:
    """Of the config and, of every tensor, up to 64 values spread over it and the sum of all."""
    settings = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype")
    }
    parts: list[bytes | str] = [json.dumps(settings, sort_keys=True, default=str)]
    for name in sorted(weights):
        flat = weights[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].cpu().contiguous()
        parts += [name, str(tuple(weights[name].shape)), sample.numpy().tobytes()]
    return digest(*parts)


def _first_line(error: BaseException, source: str) -> str:
    if not Path(source).exists() and isinstance(error, OSError):
        return "there is no such local folder, and the Hub has no such model (or cannot be reached)"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
