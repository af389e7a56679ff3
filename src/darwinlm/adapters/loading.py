"""From a checkpoint to a dense model in our modelling file, proved equal to transformers' own before it is used."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from darwinlm.adapters.checkpoint import Checkpoint
from darwinlm.adapters.cutting import build_model
from darwinlm.adapters.families import FAMILIES, Granularity, Site, dense_again, dense_config, find_sites
from darwinlm.adapters.modeling_darwinlm import (
    PRUNED,
    DarwinLMConfig,
    DarwinLMDecoderLayer,
    DarwinLMForCausalLM,
    whole_settings,
)
from darwinlm.errors import UserError
from darwinlm.files import digest

_COMPARED_LAYERS = 2
_MOST_LAYERS = 10_000
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_GGUF, _ADAPTER = b"GGUF", "adapter_config.json"
_UNQUANTISED = "give the unquantised checkpoint it was made from"


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A checkpoint, ready to be pruned: whole (`model`, read when first asked for) or a block at a time.

    Dense, or pruned already: then what is left of it is the `dense` model of all that follows.
    """

    source: str
    checkpoint: Checkpoint
    config: DarwinLMConfig
    sites: tuple[Site, ...]
    tokenizer: Any
    generation_config: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    """Of the checkpoint; the pruned model is saved in it."""
    fingerprint: str
    """Of config and weights: two checkpoints that differ have different ones."""
    sites_before: tuple[Site, ...] = ()
    """Of a model that is pruned already, those of the dense model that it came from; none of a dense one."""
    cut_from: "DenseModel | None" = None
    """In the later steps of a gradual run, the model that it began with."""

    @property
    def reference(self) -> "DenseModel":
        """The model that candidates are compared with and learn from: this one, or the one it was cut from."""
        return self.cut_from or self

    @property
    def model(self) -> DarwinLMForCausalLM:
        """The whole model on the device, in `compute_dtype`; read when first asked for."""
        self.ends.to(self.device)  # type: ignore[arg-type]
        return self.ends

    @cached_property
    def ends(self) -> DarwinLMForCausalLM:
        """`model` for those that need its embeddings, last norm and head: its layers may be parked elsewhere."""
        return self.whole(self.device, self.compute_dtype)

    def park(self) -> None:
        """Leave the layers, the reference's too, in the CPU's memory until `model` is asked for again: the device's is
        for something else."""
        for dense in (self, self.reference):
            dense.ends.model.layers.to("cpu")

    def whole(self, device: torch.device, dtype: torch.dtype) -> DarwinLMForCausalLM:
        """The whole model, read anew."""
        return build_model(self.config, self.sites, self.checkpoint.read(self.shapes, device, dtype), {})

    def release(self) -> None:
        """Forget `model`, the reference's too, so that its memory is free; it is read again when next asked for."""
        for dense in (self, self.reference):
            for read in ("ends", "_embeddings"):
                dense.__dict__.pop(read, None)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of `model`, parked layers on the CPU; a tied head is not in it."""
        state: dict[str, Tensor] = self.ends.state_dict()
        if self.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        return state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight; a tied head is not in it."""
        return expected_shapes(self.config)

    @property
    def fixed_parameters(self) -> int:
        """Those outside every site: embeddings, head, last norm."""
        return sum(prod(shape) for name, shape in self.shapes.items() if not name.startswith("model.layers."))

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """That the dense model is held and run in: the checkpoint's on an accelerator, else float32."""
        return self.dtype if self.device.type == "cuda" else torch.float32

    def block(self, layer: int) -> nn.Module:
        """One decoder layer on the device, read from the checkpoint, in `compute_dtype`."""
        prefix = f"model.layers.{layer}."
        names = [name for name in self.shapes if name.startswith(prefix)]
        tensors = self.checkpoint.read(names, self.device, self.compute_dtype)
        with torch.device("meta"):
            block = DarwinLMDecoderLayer(self.config, layer)
        block.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items()}, assign=True)
        return block.eval().requires_grad_(False)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block reads for the token ids `ids`, on the CPU, in `compute_dtype`."""
        return nn.functional.embedding(ids.cpu(), self._embeddings).to(self.compute_dtype)

    @cached_property
    def _embeddings(self) -> Tensor:
        name = "model.embed_tokens.weight"
        return self.checkpoint.read([name], torch.device("cpu"))[name]


def expected_shapes(config: DarwinLMConfig) -> dict[str, tuple[int, ...]]:
    """Of every weight of a model, without making one; a tied head is not in it."""
    with torch.device("meta"):
        state = DarwinLMForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


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


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    return torch.bfloat16 if fast else torch.float32


def served_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a checkpoint of `dtype` is best run in on `device`: its own, but float32 where the hardware only
    emulates a half-precision one."""
    emulated = dtype == torch.bfloat16 and device.type in ("cpu", "cuda") and fast_dtype(device) != torch.bfloat16
    return torch.float32 if emulated or (dtype == torch.float16 and device.type == "cpu") else dtype


def load_settings(source: str) -> dict[str, Any]:
    """Read the config.json of a folder or a Hub model; it has a model_type. Raises UserError."""
    if os.path.exists(source):  # a Path of a name that no file can have raises
        _check_kind(Path(source))
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except Exception as error:  # here and below: transformers and the Hub's client raise many kinds
        if not os.path.exists(source) and not isinstance(error.__cause__, GatedRepoError):
            raise UserError(
                f"model {source!r}: there is no such local folder, and the Hub has no such model (or cannot be reached)"
            ) from None
        raise UserError(f"model {source!r}: its config.json cannot be read: {_reason(error, source)}") from None
    own = settings.get(PRUNED) if isinstance(settings, dict) else None
    settings = whole_settings(settings) if isinstance(own, dict) else settings
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f"model {source!r} has no config.json with a model_type; give a folder in Hugging Face format")
    layers = settings.get("num_hidden_layers")
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:  # lists of this length would be made next
        raise UserError(
            f"model {source!r}: num_hidden_layers={layers} in its config.json; 1 to {_MOST_LAYERS:,} can be"
        )
    return settings


def _check_kind(path: Path) -> None:
    """Refuse what people have beside folders in Hugging Face format, with the way to one. Raises UserError."""
    original = "give the folder or Hub id of the Hugging Face checkpoint it was made from"
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(len(_GGUF)) == _GGUF
        if is_gguf:
            raise UserError(f"model {str(path)!r} is a GGUF file (llama.cpp's format), which is not read; {original}")
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
            f"model {str(path)!r} is a LoRA adapter{of}, not a whole model; merge it into its base (PEFT: "
            "merge_and_unload, then save_pretrained) and give that folder"
        )
    if any(path.glob("*.gguf")):
        raise UserError(f"model {str(path)!r} holds GGUF files (llama.cpp's format), which are not read; {original}")


def load_sizes(source: str) -> DarwinLMConfig:
    """The config of a dense or a pruned model in the words of our modelling file, no weight read. Raises UserError."""
    config = load_config(source)
    try:
        return _in_our_words(config)
    except Exception as error:
        raise UserError(f"model {source!r}: its config.json cannot be used: {_reason(error, source)}") from None


def _in_our_words(config: Any) -> DarwinLMConfig:
    return config if isinstance(config, DarwinLMConfig) else dense_config(config)


def load_config(source: str) -> Any:
    """Read a checkpoint's config and refuse what cannot be pruned, before any weight is read. Raises UserError.

    That of a model which is pruned already is read as ours, whatever code its folder names.
    """
    settings = load_settings(source)
    model_type = settings["model_type"]
    if model_type not in FAMILIES and model_type != DarwinLMConfig.model_type:
        raise UserError(
            f"model {source!r}: model type {model_type!r} is not supported; supported families: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    try:
        if model_type == DarwinLMConfig.model_type:
            settings.pop("auto_map", None)
            config = DarwinLMConfig.from_dict(settings)
        else:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"model {source!r}: its config.json cannot be used: {_reason(error, source)}") from None
    architectures = config.architectures or []
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UserError(f"model {source!r} is a {architectures[0]}, not a causal language model (…ForCausalLM)")
    if isinstance(config.dtype, torch.dtype) and config.dtype not in _DTYPES:
        raise UserError(f"model {source!r}: its config.json says dtype {config.dtype}; {_UNQUANTISED}")
    mlx = settings.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise UserError(f"model {source!r} is quantised to {mlx['bits']} bits for MLX; {_UNQUANTISED}")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {source!r} is quantised; {_UNQUANTISED}")
    return config


@torch.no_grad()
def load_dense(
    source: str, granularity: Granularity, device: torch.device, cut_from: DenseModel | None = None
) -> DenseModel:
    """Load a checkpoint (safetensors only, no remote code) into our modelling file.

    Args:
        source: a folder or a Hub id; a model that this package has pruned can be pruned further.
        granularity: what an attention unit is.
        device: where to work on it.
        cut_from: the model that it is compared with and learns from, if that is another.

    Raises:
        UserError: if it cannot be loaded, lacks weights, or our modelling file does not reproduce its logits.
        InvalidTensorError: naming the first weight that holds NaN or Inf.
    """
    base_config, dense = open_dense(source, granularity, device)
    settings = {
        key: value
        for key, value in base_config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype")
    }
    weights = dense.checkpoint.fingerprint(dense.shapes)
    if not isinstance(base_config, DarwinLMConfig):
        _check_equal(base_config, dense.checkpoint, source)
    fingerprint = digest(json.dumps(settings, sort_keys=True, default=str), weights)
    return replace(dense, fingerprint=fingerprint, cut_from=cut_from)


def open_dense(source: str, granularity: Granularity, device: torch.device) -> tuple[Any, DenseModel]:
    """The config of transformers and the dense model, its weights neither read nor compared. Raises UserError."""
    base_config = load_config(source)
    try:
        # Of a pruned model it would read the config as that of a type that it does not know, and warn.
        known = {"config": base_config} if isinstance(base_config, DarwinLMConfig) else {}
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **known)
    except Exception as error:
        raise UserError(f"model {source!r}: its tokenizer cannot be loaded: {_reason(error, source)}") from None
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for name in templates:  # each becomes a file of the pruned model
        if not re.fullmatch(r"[\w.-]+", str(name)) or str(name).startswith("."):
            raise UserError(f"model {source!r}: its tokenizer has a chat template called {name!r}; rename it")
    checkpoint = Checkpoint(source)
    try:
        config = _in_our_words(base_config)
        shapes = expected_shapes(config)
        sites = find_sites(config, granularity)
    except UserError as error:
        raise UserError(f"model {source!r}: {error}") from None
    except Exception as error:
        raise UserError(
            f"model {source!r}: no model can be built from its config.json: {_reason(error, source)}"
        ) from None
    if not sites:
        raise UserError(f"model {source!r} has neither attention nor MLPs left; there is nothing to prune")
    config._attn_implementation = "sdpa"
    checkpoint.check_names(shapes)
    dense = DenseModel(
        source=source,
        checkpoint=checkpoint,
        config=config,
        sites=sites,
        tokenizer=tokenizer,
        generation_config=_generation_config(base_config, source),
        device=device,
        dtype=base_config.dtype if isinstance(base_config.dtype, torch.dtype) else torch.float32,
        fingerprint="",
        sites_before=find_sites(dense_again(config), granularity) if config.is_heterogeneous else (),
    )
    return base_config, dense


def some_layers(base_config: Any, layers: Sequence[int]) -> Any:
    """The config of transformers for a model that has `layers` of another one, in this order, and no others."""
    shortened = copy.deepcopy(base_config)
    shortened.num_hidden_layers = len(layers)
    if getattr(shortened, "layer_types", None):
        shortened.layer_types = [base_config.layer_types[layer] for layer in layers]
    return shortened


def native_model(base_config: Any, weights: Mapping[str, Tensor], source: str) -> Any:
    """Transformers' own model with these weights, which are not copied; a tied head need not be among them.

    Raises:
        UserError: if they do not make a model.
    """
    device = next(iter(weights.values())).device
    try:
        with torch.device("meta"):
            native: Any = AutoModelForCausalLM.from_config(base_config, trust_remote_code=False)
        native.load_state_dict(weights, strict=not base_config.tie_word_embeddings, assign=True)
        native.tie_weights()
        native.model.rotary_emb = type(native.model.rotary_emb)(config=base_config).to(device)
    except Exception as error:
        raise UserError(
            f"model {source!r} cannot be built from its config.json and weights: {_reason(error, source)}"
        ) from None
    return native.eval()


def _check_equal(base_config: Any, checkpoint: Checkpoint, source: str) -> None:
    """Compare transformers' own model with ours, both cut after the first layers, on the tensors that we read."""
    layers = range(min(_COMPARED_LAYERS, base_config.num_hidden_layers))
    shortened = some_layers(base_config, layers)
    config = dense_config(shortened)
    config._attn_implementation = "sdpa"
    weights = checkpoint.read(expected_shapes(config), torch.device("cpu"), torch.float32)
    native = native_model(shortened, weights, source)
    model = build_model(config, find_sites(config, "kv_group"), weights, {})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, 16), generator=generator)
    expected, found = native(tokens).logits, model(tokens).logits
    scale = expected.abs().max().clamp_min(1e-6)
    difference = ((expected - found).abs().max() / scale).item()
    if not difference < 1e-4:
        raise UserError(
            f"model {source!r}: our modelling file gives other logits than transformers (relative difference "
            f"{difference:.1e}); its config has a setting that is not supported yet"
        )


def _generation_config(base_config: Any, source: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_model_config(base_config)
    except Exception as error:
        raise UserError(
            f"model {source!r}: its generation_config.json cannot be used: {_reason(error, source)}"
        ) from None


def _reason(error: BaseException, source: str) -> str:
    if isinstance(error.__cause__, GatedRepoError):
        return f"access must be asked for at https://huggingface.co/{source}; then log in with `hf auth login`"
    text = " ".join(str(error).split())
    named = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    return text if named else f"{type(error).__name__}: {text}"
