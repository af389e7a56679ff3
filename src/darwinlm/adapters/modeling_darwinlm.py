# Copyright the DarwinLM authors. Licensed under the Apache License, Version 2.0.
"""Decoder-only language model whose layers differ in size: Llama, Mistral, Qwen2 and Qwen3 after structured pruning.

This file travels with every pruned checkpoint and needs torch and transformers only. Sizes stand in `config.json` as
`per_layer_config`: `num_attention_heads`, `num_key_value_heads`, `intermediate_size`, `skip: ["attention", "mlp"]`, and
`query_heads_per_kv_head` where the KV heads of a layer serve unequal numbers of query heads. Tensors keep the names of
the model that was pruned. A skipped part has no tensors at all: no projections and no norm.

In the file, what only a pruned model has stands under `pruned`; the rest is the config of the model that was pruned, so
that AutoTokenizer, which reads it first, need not ask for this code. `hidden_act` alone is none that transformers has:
its own model of that type would take the weights that fit and draw the others at random.

Written for transformers 5; what 4.57 lacks stands below the imports. Later versions may compute something else with it:
when it is imported, `check_transformers` compares a tiny model with a second way to its logits, and refuses to go on if
they differ.
"""

import copy
import inspect
import json
from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PretrainedConfig as PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

if hasattr(PreTrainedConfig, "per_layer_config"):
    BaseConfig = PreTrainedConfig
else:

    class BaseConfig(PreTrainedConfig):
        """Configs by layer, and rope, for transformers before 5.14."""

        @property
        def per_layer_config(self):
            sizes = self.__dict__.get("per_layer_config") or {}
            layers = [copy.copy(self) for _ in range(self.num_hidden_layers)]
            for index, layer in enumerate(layers):
                layer.__dict__.update(sizes.get(index, {}))
            return layers

        @per_layer_config.setter
        def per_layer_config(self, sizes):
            # In `__dict__`, from where it is saved.
            self.__dict__["per_layer_config"] = {int(index): layer for index, layer in (sizes or {}).items()}

        @property
        def rope_theta(self):
            return (self.rope_parameters or {}).get("rope_theta")

        @property
        def rope_scaling(self):
            return self.rope_parameters


if not hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
    _FUNCTIONS = ALL_ATTENTION_FUNCTIONS

    class ALL_ATTENTION_FUNCTIONS:  # noqa: N801
        """As in transformers 5; version 4 looks for ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation] here."""

        @staticmethod
        def get_interface(name, default):
            return default if name in (None, "eager") else _FUNCTIONS[name]


MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
NEEDS_CACHE_POSITION = "input_embeds" in MASK_ARGUMENTS
"""Whether this is transformers 4, where masks and static caches go by it."""
CACHE = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"
"""What this version of transformers calls the KV cache; the name changed in 5.24. Models here take both."""


PRUNED = "pruned"
OWN_SETTINGS = ("model_type", "hidden_act", "layer_types", "per_layer_config")
NEEDS_THIS_CODE = "this model is pruned: load it with trust_remote_code=True"


def whole_settings(settings):
    """What `config.json` holds, with what only a pruned model has in its place; nothing changes for any other model."""
    own = settings.get(PRUNED)
    return {**{name: value for name, value in settings.items() if name != PRUNED}, **own} if own else settings


class DarwinLMConfig(BaseConfig):
    model_type = "darwinlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        query_heads_per_kv_head=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        tie_word_embeddings=False,
        rope_parameters=None,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        attention_dropout=0.0,
        sliding_window=None,
        layer_types=None,
        base_model_type=None,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        per_layer_config=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.query_heads_per_kv_head = query_heads_per_kv_head
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_parameters = rope_parameters
        self.qkv_bias = qkv_bias
        self.attention_output_bias = attention_output_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.attention_dropout = attention_dropout
        self.sliding_window = sliding_window
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.base_model_type = base_model_type
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        # Only now: transformers checks settings while it makes a config, and reads sizes that then belong to layers.
        if per_layer_config is not None:
            self.per_layer_config = per_layer_config

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        settings, unused = super().get_config_dict(*args, **kwargs)
        return whole_settings(settings), unused

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(whole_settings(config_dict), **kwargs)

    def to_json_string(self, *args, **kwargs):
        """What `config.json` holds."""
        settings = json.loads(super().to_json_string(*args, **kwargs))
        if self.base_model_type is not None:
            own = {name: settings.pop(name) for name in OWN_SETTINGS if name in settings}
            settings |= {"model_type": self.base_model_type, "hidden_act": NEEDS_THIS_CODE, PRUNED: own}
            settings[PRUNED].setdefault("hidden_act", self.hidden_act)
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    def validate(self):
        """Check the settings as the first layer has them: transformers' checks of rope read a layer's sizes."""
        if hasattr(BaseConfig, "validate"):
            BaseConfig.validate(self.layer(0) if getattr(self, "is_heterogeneous", False) else self)

    def layer(self, layer_idx):
        """The config of one layer."""
        layers = self.per_layer_config
        # In transformers 5.14.0 there are none while all layers are alike.
        return self if layers is None else layers[layer_idx]

    def skipped(self, layer_idx):
        """The parts that a layer lacks: a subset of {"attention", "mlp"}."""
        return set(getattr(self.layer(layer_idx), "skip", None) or ())

    def get_text_config(self, decoder=None, encoder=None):
        """What caches are made from, if `decoder`: the layers with attention, numbered as in the model. A layer
        that stores nothing would be asked how many tokens it has seen."""
        if not decoder:
            return self
        text = copy.copy(self)
        kept = [i for i in range(self.num_hidden_layers) if "attention" not in self.skipped(i)]
        text.per_layer_config = None
        text.layer_types = [self.layer_types[i] for i in kept]
        text.num_hidden_layers = len(kept)
        text.per_layer_config = {
            number: {name: getattr(self.layer(i), name) for name in ("num_attention_heads", "num_key_value_heads")}
            for number, i in enumerate(kept)
        }
        return text


class DarwinLMRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)


class DarwinLMRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        # Rope is the same in all layers, and YaRN's code reads a size that the whole config does not have.
        self.config = config = config.layer(0)
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init(config, device=None)
        self.rope_init_fn = init
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) must not round the frequencies: angles of far positions would be other ones.
        kept = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if not kept[0].is_meta:
            self.inv_freq, self.original_inv_freq = (buffer.to(self.inv_freq.device) for buffer in kept)
        return self

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(x, cos, sin):
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def repeat_kv(hidden_states, repeats):
    """Repeat each KV head for its query heads; `repeats` is one number for all heads or a list with one a head."""
    if isinstance(repeats, int):
        return hidden_states if repeats == 1 else hidden_states.repeat_interleave(repeats, dim=1)
    heads = [hidden_states[:, i : i + 1].expand(-1, count, -1, -1) for i, count in enumerate(repeats)]
    return torch.cat(heads, dim=1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DarwinLMAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        layer = config.layer(layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.query_heads_per_kv_head = layer.query_heads_per_kv_head
        unequal = self.query_heads_per_kv_head is not None
        self.num_key_value_groups = 1 if unequal else layer.num_attention_heads // layer.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        query_size, kv_size = layer.num_attention_heads * self.head_dim, layer.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = DarwinLMRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = DarwinLMRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape)
        key = self.k_proj(hidden_states).view(head_shape)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        query = apply_rotary_pos_emb(query.transpose(1, 2), cos, sin)
        key = apply_rotary_pos_emb(key.transpose(1, 2), cos, sin)
        if cache is not None:
            position = kwargs.get("cache_position")
            extra = () if position is None else ({"cache_position": position},)
            key, value = cache.update(key, value, self.layer_idx, *extra)
        if self.query_heads_per_kv_head is not None:
            key, value = repeat_kv(key, self.query_heads_per_kv_head), repeat_kv(value, self.query_heads_per_kv_head)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class DarwinLMMLP(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        size = config.layer(layer_idx).intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DarwinLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        skipped = config.skipped(layer_idx)
        self.has_attention, self.has_mlp = "attention" not in skipped, "mlp" not in skipped
        if self.has_attention:
            self.input_layernorm = DarwinLMRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = DarwinLMAttention(config, layer_idx)
        if self.has_mlp:
            self.post_attention_layernorm = DarwinLMRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = DarwinLMMLP(config, layer_idx)

    def forward(self, hidden_states, **kwargs):
        if self.has_attention:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def attention_masks(config, inputs_embeds, attention_mask=None, cache=None, position_ids=None, cache_position=None):
    """One mask for each kind of attention that the layers use."""
    if isinstance(attention_mask, dict):
        return attention_mask
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE: cache,
        "position_ids": position_ids,
    }
    if NEEDS_CACHE_POSITION:
        arguments |= {"input_embeds": arguments.pop("inputs_embeds"), "cache_position": cache_position}
    kinds = {kind for i, kind in enumerate(config.layer_types) if "attention" not in config.skipped(i)}
    masks = {}
    if "full_attention" in kinds:
        masks["full_attention"] = create_causal_mask(**arguments)
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    return masks


class DarwinLMPreTrainedModel(PreTrainedModel):
    config_class = DarwinLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DarwinLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class DarwinLMModel(DarwinLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DarwinLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # Caches hold the layers that have attention, and no others.
        for number, layer in enumerate(layer for layer in self.layers if layer.has_attention):
            layer.self_attn.layer_idx = number
        self.norm = DarwinLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DarwinLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not checkpointing
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None or (NEEDS_CACHE_POSITION and kwargs.get("cache_position") is None):
            seen = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = positions.unsqueeze(0) if position_ids is None else position_ids
            if NEEDS_CACHE_POSITION:
                kwargs["cache_position"] = positions

        masks = attention_masks(
            self.config, inputs_embeds, attention_mask, cache, position_ids, kwargs.get("cache_position")
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        all_hidden_states = [hidden_states]
        for layer, kind in zip(self.layers, self.config.layer_types):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(kind),
                position_ids=position_ids,
                cache=cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states[:-1], hidden_states) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )


class DarwinLMForCausalLM(DarwinLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = DarwinLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )


class DarwinLMForSequenceClassification(GenericForSequenceClassification, DarwinLMPreTrainedModel):
    pass


class DarwinLMForTokenClassification(GenericForTokenClassification, DarwinLMPreTrainedModel):
    pass


def tiny_model():
    """A model with layers of all kinds, the first without attention, and the same weights every time."""
    config = DarwinLMConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        sliding_window=4,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
        per_layer_config={0: {"skip": ["attention"]}, 1: {"num_attention_heads": 1}, 3: {"skip": ["mlp"]}},
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(0)
    # Wherever and however a checkpoint is being loaded at the moment; and its user's random numbers stay as they are.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        model = DarwinLMForCausalLM(config).float().eval()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return model


@torch.no_grad()
def generation_error(new_tokens=4):
    """The largest difference between the logits that `generate` sees, with a KV cache and masks by transformers, in a
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
    """Refuse a version of transformers with which this file computes something else than it should."""
    try:
        error, reason = generation_error(), None
    except Exception as failure:
        error, reason = float("inf"), failure
    if not error < 1e-3:
        told = f"{type(reason).__name__}: {reason}" if reason is not None else f"logits differ by {error:.1e}"
        raise ImportError(
            f"this pruned model's code does not work with transformers {transformers.__version__} ({told}): install "
            "another version of transformers, or a newer darwinlm and renew the code: darwinlm export FOLDER --to hf",
            name="transformers",
        ) from reason


DarwinLMConfig.register_for_auto_class()
DarwinLMModel.register_for_auto_class("AutoModel")
DarwinLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
DarwinLMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
DarwinLMForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
# The classifiers make their base model through it.
AutoModel.register(DarwinLMConfig, DarwinLMModel, exist_ok=True)

check_transformers()
