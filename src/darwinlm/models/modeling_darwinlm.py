# Copyright the DarwinLM authors. Licensed under the Apache License, Version 2.0.
"""Decoder-only language models whose layers differ in size, built from transformers' own layers.

This file is saved with every pruned checkpoint and only needs torch and transformers. For each class of transformers it
has a class for pruned models: `DarwinLMLlamaForCausalLM` is `LlamaForCausalLM`, but every layer is built from its own
config. Tensors keep the names of the original model.

Settings that only a pruned model has are under `pruned` in `config.json`; the rest is the config of the original model:

- `per_layer_config`: differences in a layer, such as `num_attention_heads`, `num_key_value_heads` and
  `intermediate_size`; `skip` lists removed parts ("attention", "mlp"), which have no tensors at all;
  `query_heads_per_kv_head` is present if the KV heads of a layer serve unequal numbers of query heads.
- `layer_parts`: the modules of a layer that belong to each part: first the part itself, then its norms.
- the activation, and the rope settings of gpt-oss. Their usual place holds a value unknown to transformers: otherwise
  its own model of that type would load the weights that fit and initialize the others randomly.

Later versions of transformers may compute something else: when this file is imported, `check_transformers` compares the
logits of a tiny model with those of a second way to compute them, and raises an error if they differ.
"""

import copy
import functools
import json
import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, Qwen2Config, Qwen2ForCausalLM
from transformers.configuration_utils import PretrainedConfig as PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "DarwinLM"
PRUNED = "pruned"
UNEQUAL_GROUPS = "darwinlm_unequal_groups"
NEEDS_THIS_CODE = "this model is pruned: load it with trust_remote_code=True"
AUTO_CLASSES = {
    "Config": "AutoConfig",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
}
"""Auto classes by the suffix of a class name."""
BEFORE_5 = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose config.json is read by version 4 of transformers as by version 5."""


class ByLayer:
    """Configs per layer, for transformers before 5.14."""

    @property
    def is_heterogeneous(self):
        return bool(self.__dict__.get("per_layer_config"))

    @property
    def per_layer_config(self):
        sizes = self.__dict__.get("per_layer_config") or {}
        layers = [copy.copy(self) for _ in range(self.num_hidden_layers)]
        for index, layer in enumerate(layers):
            layer.__dict__.pop("per_layer_config", None)
            layer.__dict__.update(sizes.get(index, {}))
        return layers

    @per_layer_config.setter
    def per_layer_config(self, sizes):
        # Stored in `__dict__`, which is saved.
        self.__dict__["per_layer_config"] = {int(index): layer for index, layer in (sizes or {}).items()}


class PrunedConfig(object if hasattr(PreTrainedConfig, "per_layer_config") else ByLayer):
    """Additional features of the config of a pruned model."""

    query_heads_per_kv_head = None

    def __getattribute__(self, name):
        """Return the original model's value for settings that differ between layers, where transformers would raise."""
        return object.__getattribute__(self, type(self).attribute_map.get(name, name))

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        settings, unused = super().get_config_dict(*args, **kwargs)
        return whole_settings(settings), unused

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if transformers.__version__.startswith("4.") and cls.model_type not in BEFORE_5:
            raise ImportError(f"a pruned model of type {cls.model_type!r} needs transformers 5 or newer")
        return super().from_dict(whole_settings(config_dict), **kwargs)

    def to_json_string(self, *args, **kwargs):
        """Return the content of `config.json`."""
        settings = json.loads(super().to_json_string(*args, **kwargs))
        own = {name: settings.pop(name) for name in ("layer_parts", "per_layer_config") if name in settings}
        # Gemma's configs can have both, of which only one is used.
        acts = {name: settings[name] for name in ("hidden_act", "hidden_activation") if settings.get(name)}
        rope = settings.get("rope_parameters")
        if self.model_type == "gpt_oss":  # Its own model ignores the activation setting, but not the rope type.
            own["rope_parameters"] = rope
            settings["rope_parameters"] = rope | {"rope_type": NEEDS_THIS_CODE}
        settings |= {PRUNED: own | acts} | dict.fromkeys(acts, NEEDS_THIS_CODE)
        if self.model_type in BEFORE_5 and rope:
            settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope}
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    def validate(self):
        """Validate settings that all layers share; their sizes may be any."""
        whole = copy.copy(self)
        whole.per_layer_config = None
        getattr(super(PrunedConfig, whole), "validate", lambda: None)()

    def layer(self, layer_idx):
        """Return the config of one layer."""
        return LayerConfig(self, layer_idx)

    def skipped(self, layer_idx):
        """Return the removed parts of a layer: a subset of {"attention", "mlp"}."""
        return set(getattr(self.per_layer_config[layer_idx], "skip", None) or ())

    def get_text_config(self, decoder=None, encoder=None):
        """Return the config for caches if `decoder`: only the layers with attention, numbered as in the model.
        Otherwise caches would ask a layer that stores nothing for its sequence length."""
        if not decoder or not self.is_heterogeneous:
            return self
        text = copy.copy(self)
        kept = [i for i in range(self.num_hidden_layers) if "attention" not in self.skipped(i)]
        layers = [self.per_layer_config[i] for i in kept]
        text.per_layer_config = None
        text.num_hidden_layers = len(kept)
        if getattr(self, "layer_types", None):
            text.layer_types = [self.layer_types[i] for i in kept]
        text.per_layer_config = {
            number: {name: getattr(layer, name) for name in ("num_attention_heads", "num_key_value_heads")}
            for number, layer in enumerate(layers)
        }
        return text

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class LayerConfig:
    """Config of one layer; its attention implementation follows the whole model."""

    def __init__(self, whole, layer_idx):
        self.__dict__.update(whole=whole, own=whole.per_layer_config[layer_idx])
        if self.own.query_heads_per_kv_head:
            self._attn_implementation = UNEQUAL_GROUPS

    def __getattr__(self, name):
        if name in ("whole", "own"):  # Not set yet while copying or unpickling.
            raise AttributeError(name)
        return getattr(self.whole if name.startswith("_") else self.own, name)


def whole_settings(settings):
    """Return settings of `config.json` with those under `pruned` moved to their usual place; other models are
    unchanged."""
    own = settings.get(PRUNED)
    return {**{name: value for name, value in settings.items() if name != PRUNED}, **own} if own else settings


class Nothing(nn.Module):
    """Replacement of a removed part: it adds zero to the stream."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, hidden_states, *args, **kwargs):
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self.part == "attention" else zero


def attend_in_unequal_groups(module, query, key, value, attention_mask, **kwargs):
    """Repeat each KV head for its own query heads, then attend like the whole model."""
    counts = module.config.query_heads_per_kv_head
    key, value = (
        torch.cat([heads[:, i : i + 1].expand(-1, count, -1, -1) for i, count in enumerate(counts)], dim=1)
        for heads in (key, value)
    )
    name = module.config.whole._attn_implementation
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = eager if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]
    return attend(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(UNEQUAL_GROUPS, attend_in_unequal_groups)


def make_layer(kind, config, layer_idx):
    """Create a decoder layer of class `kind` with its sizes in `config`, without removed parts."""
    own, skipped, parts = config.layer(layer_idx), config.skipped(layer_idx), config.layer_parts
    layer = kind(own, layer_idx)
    if own.query_heads_per_kv_head and "attention" not in skipped:
        layer.get_submodule(parts["attention"][0]).num_key_value_groups = 1
    attention = getattr(layer, parts["attention"][0], None)
    if "attention" not in skipped and attention is not None:
        for name in ("q", "k"):
            norm, rows = getattr(attention, f"{name}_norm", None), getattr(attention, f"{name}_proj", None)
            if norm is not None and rows is not None and norm.weight.numel() not in (own.head_dim, rows.out_features):
                # OLMoE's norms over all heads have the hidden size, whatever the number of heads.
                norm.weight = nn.Parameter(norm.weight.new_ones(rows.out_features))
    for part in skipped:
        layer.set_submodule(parts[part][0], Nothing(part))
        for norm in parts[part][1:]:
            layer.set_submodule(norm, nn.Identity())
    return layer


class PrunedModel(nn.Module):
    """Additional features of a pruned model: each of its layers is created from its own config."""

    def __init__(self, config):
        count, sizes = config.num_hidden_layers, config.to_dict().get("per_layer_config")
        # A single dense layer is enough to find the layer class.
        config.num_hidden_layers, config.per_layer_config = 1, None
        try:
            super().__init__(config)
        finally:
            config.num_hidden_layers, config.per_layer_config = count, sizes
        decoder = self.base_model
        decoder.config = config
        kind = type(decoder.layers[0])
        decoder.layers = nn.ModuleList([make_layer(kind, config, index) for index in range(count)])
        # Caches only contain the layers that have attention.
        kept = [index for index in range(count) if "attention" not in config.skipped(index)]
        for number, index in enumerate(kept):
            for module in decoder.layers[index].modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
        self.post_init()

    def _apply(self, fn, recurse=True):
        """Keep the dtype of buffers that are not stored in files, such as rotary frequencies, in
        `model.to(torch.bfloat16)`: rounding them would change the angles of far positions."""
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if name in module._non_persistent_buffers_set and buffer is not None and not buffer.is_meta
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            if module._buffers[name].dtype != buffer.dtype:
                module._buffers[name] = buffer.to(module._buffers[name].device)
        return self

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@functools.cache
def pruned_class(base):
    """Return the class for pruned models (or their configs) derived from the class `base` of transformers."""
    mixin = PrunedConfig if issubclass(base, PreTrainedConfig) else PrunedModel
    own = type(PREFIX + base.__name__, (mixin, base), {"__module__": __name__, "made_of": base})
    if mixin is PrunedModel:
        own.config_class = pruned_class(base.config_class)
        if base is not MODEL_MAPPING[base.config_class]:
            pruned_class(MODEL_MAPPING[base.config_class])
        else:
            # Classifiers create their base model through it.
            AutoModel.register(own.config_class, own, exist_ok=True)
    for end, auto_class in AUTO_CLASSES.items():
        if base.__name__.endswith(end):
            own.register_for_auto_class(auto_class)
    return own


def __getattr__(name):
    """Create `DarwinLMLlamaForCausalLM` and similar classes on access."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(transformers, name.removeprefix(PREFIX), None)
    if not isinstance(base, type):
        version = transformers.__version__
        raise AttributeError(f"transformers {version} has no {name.removeprefix(PREFIX)}: install a newer version")
    return pruned_class(base)


def tiny_model():
    """Create a model with all kinds of layers, the first without attention, and always the same weights."""
    config = pruned_class(Qwen2Config)(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention"] * 2 + ["sliding_attention"] + ["full_attention"] * 2,
        layer_parts={
            "attention": ["self_attn", "input_layernorm"],
            "mlp": ["mlp", "post_attention_layernorm"],
        },
        per_layer_config={
            0: {"skip": ["attention"]},
            1: {"num_attention_heads": 1, "num_key_value_heads": 1},
            3: {"skip": ["mlp"]},
            4: {"num_attention_heads": 3, "query_heads_per_kv_head": [2, 1]},
        },
        pad_token_id=0,
        head_dim=4,
    )
    if transformers.__version__.startswith("4."):
        config.rope_theta = 100.0
    generator = torch.Generator().manual_seed(0)
    # Independent of how a checkpoint is being loaded; the user's random state is preserved.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        config._attn_implementation = "sdpa"
        model = pruned_class(Qwen2ForCausalLM)(config).float().eval()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return model


@torch.no_grad()
def generation_error(new_tokens=4):
    """Return the largest difference between the logits in `generate`, with a KV cache and transformers' masks on a
    batch with left padding, and those of one pass over the text without either."""
    model, generator = tiny_model(), torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        prompt = torch.randint(1, model.config.vocab_size, (2, 7), generator=generator)
        prompt[0, :3] = 0
        mask = (prompt != 0).long()
        answer = model.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            synced_gpus=False,
        )
        length = answer.sequences.shape[1]
        mask = torch.cat([mask, torch.ones(2, new_tokens, dtype=mask.dtype)], dim=1)
        back = torch.arange(length)[:, None] - torch.arange(length)
        seen = (back >= 0) & mask[:, None, None, :].bool()
        masks = {"full_attention": seen, "sliding_attention": seen & (back < model.config.sliding_window)}
        masks = {kind: (~seen).float() * torch.finfo(torch.float32).min for kind, seen in masks.items()}
        model.config._attn_implementation = "eager"
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(answer.sequences, attention_mask=masks, position_ids=positions, use_cache=False).logits
    return (logits[:, -new_tokens - 1 : -1] - torch.stack(answer.logits, 1)).abs().max().item()


def check_transformers():
    """Raise ImportError if this file computes wrong results with the installed version of transformers."""
    try:
        error, reason = generation_error(), None
    except Exception as failure:
        error, reason = float("inf"), failure
    if not error < 1e-3:
        details = f"{type(reason).__name__}: {reason}" if reason is not None else f"logits differ by {error:.1e}"
        raise ImportError(
            f"this pruned model's code does not work with transformers {transformers.__version__} ({details}): "
            "install another version of transformers, or a newer darwinlm and update the code: darwinlm export "
            "FOLDER --to hf",
            name="transformers",
        ) from reason


check_transformers()
