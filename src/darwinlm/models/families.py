"""Model families as data: the names of the modules in their layers, and the classes of transformers that build them.

A family only lists names. Tensor sizes, biases, and norms of queries and keys are read from a layer on the meta device.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from darwinlm.errors import UserError
from darwinlm.models.modeling_darwinlm import PREFIX, PrunedConfig, make_layer, pruned_class
from darwinlm.plan import SiteKind

LAYERS = "model.layers."
"""Prefix of the names of all tensors in layers."""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Names of the modules in a layer."""

    attention: str = "self_attn"
    queries_keys_values: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Modules within `attention`; a single name if queries, keys and values are rows of one tensor, in this order."""
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """Modules within `mlp`; a single fused tensor holds the gates first."""
    mlp_output: str = "down_proj"
    experts: str = ""
    """Module within `mlp` that holds the fused tensors of all experts, in layers that have experts; empty if there are
    none."""
    router: str = "gate"
    """Module within `mlp` that routes tokens to experts."""
    experts_transposed: bool = False
    """Whether the experts' matrices have a row per input, with gate and up of a channel interleaved."""
    before_attention: str = "input_layernorm"
    """Norm before attention; empty if there is none."""
    after_attention: str = ""
    """Norm of attention's output, before it is added to the stream; empty if there is none."""
    before_mlp: str = "post_attention_layernorm"
    """Norm before the MLP; equal to `before_attention` if attention and MLP read the same stream, in parallel."""
    after_mlp: str = ""

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return self.before_mlp == self.before_attention != ""

    @property
    def parts(self) -> dict[str, list[str]]:
        """Modules of a layer that belong to each part: first the part itself, then its norms."""
        attention = (self.attention, "" if self.parallel else self.before_attention, self.after_attention)
        mlp = (self.mlp, "" if self.parallel else self.before_mlp, self.after_mlp)
        return {"attention": [name for name in attention if name], "mlp": [name for name in mlp if name]}

    def output(self, kind: SiteKind) -> str:
        """Return the output projection of a part, within a layer."""
        attention, mlp = f"{self.attention}.{self.attention_output}", f"{self.mlp}.{self.mlp_output}"
        return attention if kind == "attention" else mlp

    def norm_after(self, kind: SiteKind) -> str:
        """Return the norm of a part's output, before it is added to the stream; empty if there is none."""
        return self.after_attention if kind == "attention" else self.after_mlp

    @property
    def reads_after_attention(self) -> str:
        """Module whose input is the stream between attention and MLP; empty if there is none."""
        return "" if self.parallel else self.before_mlp or self.mlp


_SANDWICH = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_NORM_AFTER = Family(
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
)
_PARALLEL = Family(before_mlp="input_layernorm")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "seed_oss", "ernie4_5"), Family()),
    **dict.fromkeys(("ministral", "hunyuan_v1_dense", "smollm3", "granite", "gemma", "olmo"), Family()),
    **dict.fromkeys(("cwm", "qwen3_5_text"), Family()),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _NORM_AFTER),
    **dict.fromkeys(("cohere", "cohere2"), _PARALLEL),
    **dict.fromkeys(("nemotron", "arcee", "jais2"), Family(mlp_inputs=("up_proj",))),
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe"), Family(experts="experts")),
    **dict.fromkeys(("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"), Family(experts="experts")),
    "granitemoe": Family(mlp="block_sparse_moe", experts="experts", router="router"),
    "gpt_oss": Family(experts="experts", router="router", experts_transposed=True),
    "phi3": Family(queries_keys_values=("qkv_proj",), mlp_inputs=("gate_up_proj",)),
    "phi": Family(
        attention_output="dense", mlp_inputs=("fc1",), mlp_output="fc2", before_mlp="input_layernorm"
    ),
    "starcoder2": Family(mlp_inputs=("c_fc",), mlp_output="c_proj"),
    "vaultgemma": Family(before_mlp="pre_feedforward_layernorm"),
    "glm": Family(mlp_inputs=("gate_up_proj",)),
    "glm4": Family(
        mlp_inputs=("gate_up_proj",), after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
    ),
}  # fmt: skip
"""Families by `model_type`."""


def family_of(config: Any) -> Family:
    """Return the family of a config. Raises UserError that lists the supported families."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model type {config.model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return family


def dense_config(config: Any) -> PrunedConfig:
    """Convert a transformers config to one that supports sizes per layer."""
    if isinstance(config, PrunedConfig):
        return config
    settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    known: PrunedConfig = config_class(config.model_type).from_dict(settings)
    known.layer_parts = family_of(config).parts
    for name, value in settings.items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop")):
            # Trials are too short for dropout; Llama and similar families have none.
            setattr(known, name, 0.0)
    if getattr(known, "output_router_logits", False):
        # Enables transformers' load-balancing loss, which supports only one number of experts for all layers.
        known.output_router_logits = False
    if getattr(known, "head_dim", None) is None:
        # It could not be inferred in a layer with fewer heads.
        known.head_dim = known.hidden_size // known.num_attention_heads
    if getattr(known, "num_key_value_heads", None) is None:
        known.num_key_value_heads = known.num_attention_heads
    set_attention(known)
    return known


def window_of(config: Any, layer: int) -> int | None:
    """Return the number of tokens that attention sees in a layer; None if all."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    window: int | None = getattr(config, "sliding_window", None) if sliding else None
    return window


def config_class(model_type: str) -> Any:
    """Return the config class of pruned models of that type."""
    kind: Any = CONFIG_MAPPING[model_type]
    return pruned_class(kind)


def has_attention(config: PrunedConfig, layer: int) -> bool:
    """Whether a layer has attention with a KV cache; some layers of hybrid models have linear attention instead."""
    kinds = getattr(config, "layer_types", None)
    return "attention" not in config.skipped(layer) and not (kinds and kinds[layer] == "linear_attention")


def is_hybrid(config: PrunedConfig) -> bool:
    """Whether some layers have linear attention."""
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def expert_setting(config: PrunedConfig) -> str:
    """Return the setting for the number of experts in a layer."""
    return next(name for name in ("num_local_experts", "num_experts") if name in vars(config))


def expert_width_setting(config: PrunedConfig) -> str:
    """Return the setting for the number of channels in each expert."""
    return next(name for name in ("moe_intermediate_size", "intermediate_size") if name in vars(config))


def experts_in(config: PrunedConfig, layer: int) -> int:
    """Return the number of experts in a layer; 0 if its MLP is not a mixture."""
    family = family_of(config)
    if not family.experts or f"{family.mlp}.{family.experts}" not in dict(empty_layer(config, layer).named_modules()):
        return 0
    return int(getattr(config.layer(layer), expert_setting(config)))


def set_attention(config: PrunedConfig) -> None:
    """Use PyTorch's scaled_dot_product_attention in models with `config`, if their family supports it."""
    config._attn_implementation = "sdpa" if causal_lm(config)._supports_sdpa else "eager"
    if family_of(config).experts and not torch.cuda.is_available():
        # Set explicitly, because transformers warns about the default.
        config._experts_implementation = "eager"


def causal_lm(config: PrunedConfig) -> Any:
    """Return the model class for such a config."""
    return pruned_class(MODEL_FOR_CAUSAL_LM_MAPPING[config.made_of])


def auto_map(config: PrunedConfig, module: str) -> dict[str, str]:
    """Return the `auto_map` of `config.json`: by auto class, the class in `module` for a model with `config`."""
    tables: dict[str, Any] = {
        "AutoModel": MODEL_MAPPING,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    }
    base = config.made_of
    kinds = {"AutoConfig": base} | {name: table[base] for name, table in tables.items() if base in table}
    return {name: f"{module}.{PREFIX}{kind.__name__}" for name, kind in kinds.items()}


def empty_layer(config: PrunedConfig, layer: int) -> Any:
    """Create a decoder layer on the meta device."""
    with torch.device("meta"):
        return make_layer(layer_class(config), config, layer)


def layer_class(config: PrunedConfig) -> Any:
    """Return transformers' decoder layer class."""
    return _classes(config)[0]


def rotary_embedding(config: PrunedConfig) -> Any:
    """Create transformers' rotary embedding module, on the CPU."""
    with torch.device("cpu"):
        return _classes(config)[1](config=config)


def _classes(config: PrunedConfig) -> tuple[Any, Any]:
    base = config.made_of
    if base not in _KNOWN_CLASSES:
        one = dense_again(config)
        one.num_hidden_layers = 1
        with torch.device("meta"):
            decoder: Any = pruned_class(MODEL_MAPPING[base])._from_config(one)
        _KNOWN_CLASSES[base] = type(decoder.layers[0]), type(getattr(decoder, "rotary_emb", None))
    return _KNOWN_CLASSES[base]


_KNOWN_CLASSES: dict[type, tuple[type, type]] = {}


def dense_again(config: PrunedConfig) -> PrunedConfig:
    """Return the config of the original model of a pruned one: all layers complete and of the same size."""
    whole = copy.deepcopy(config)
    whole.per_layer_config = None
    return whole
